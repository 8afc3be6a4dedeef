package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// controlLimit is more than any request to the daemon takes.
const controlLimit = startLimit + stopGrace + 5*time.Second

// ask sends a request over the control socket.
func ask(ctx context.Context, l layout, method, path string) ([]byte, error) {
	client := http.Client{
		Timeout: controlLimit,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var dialer net.Dialer
				return dialer.DialContext(ctx, "unix", l.controlSocket())
			},
		},
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://supervisor"+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("the cluster in %s belongs to root: %w", l.dir, err)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("no cluster runs in %s", l.dir)
	case err != nil:
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, errors.New(strings.TrimSpace(string(body)))
	}
	return body, nil
}

func readStatus(ctx context.Context, l layout) (clusterStatus, error) {
	var status clusterStatus
	body, err := ask(ctx, l, http.MethodGet, "/status")
	if err != nil {
		return status, err
	}
	return status, json.Unmarshal(body, &status)
}

// control stops or starts a component, and returns when that is done.
func control(ctx context.Context, l layout, verb, component string) error {
	_, err := ask(ctx, l, http.MethodPost, "/"+verb+"/"+component)
	if err != nil {
		return fmt.Errorf("%s %s: %w", verb, component, err)
	}
	return nil
}

func printStatus(ctx context.Context, l layout) error {
	status, err := readStatus(ctx, l)
	if err != nil {
		return err
	}
	processes, err := clusterProcesses(l)
	if err != nil {
		return err
	}
	pids := map[int]process{}
	for _, p := range processes {
		pids[p.innerPID] = p
	}
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "COMPONENT\tSTATE\tSINCE\tPID\tMEMORY\tRESTARTS\tPROBLEM")
	line := func(c componentStatus) {
		pid, memory := "-", "-"
		if p, ok := pids[c.PID]; ok {
			pid, memory = strconv.Itoa(p.pid), fmt.Sprintf("%d MiB", p.memory>>20)
		}
		fmt.Fprintf(out, "%s\t%s\t%v\t%s\t%s\t%d\t%s\n", c.Name, c.State, time.Since(c.Since).Round(time.Second),
			pid, memory, c.Restarts, firstLine(c.Problem))
	}
	for _, c := range status.Components {
		line(c)
	}
	if err := out.Flush(); err != nil {
		return err
	}
	switch {
	case status.Failure != "":
		return fmt.Errorf("the start was given up: %s", firstLine(status.Failure))
	case !status.healthy():
		return exitCode(1)
	}
	return nil
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}

// kubectl becomes the cluster's kubectl.
func kubectl(l layout, args []string) error {
	if !l.exists() {
		return fmt.Errorf("no cluster runs in %s", l.dir)
	}
	// Set, not appended: of two values, programs disagree on which one counts.
	for key, value := range map[string]string{
		"KUBECONFIG":   l.kubeconfig(),
		"KUBECACHEDIR": l.path("kubectl-cache"), // not the user's home, which stays
	} {
		if err := os.Setenv(key, value); err != nil {
			return err
		}
	}
	err := syscall.Exec(l.bin("kubectl"), append([]string{"kubectl"}, args...), os.Environ())
	return fmt.Errorf("starting kubectl: %w", err)
}

func load(ctx context.Context, l layout, archives []string) error {
	if len(archives) == 0 {
		return errors.New("load takes the image archives to import")
	}
	if _, err := readStatus(ctx, l); err != nil {
		return err
	}
	for _, archive := range archives {
		path, err := filepath.Abs(archive)
		if err != nil {
			return err
		}
		if _, err := os.Stat(path); err != nil {
			return err
		}
		if err := importImage(ctx, l, path); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "loaded %s\n", archive)
	}
	return nil
}
