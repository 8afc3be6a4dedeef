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
func ask(ctx context.Context, n node, method, path string) ([]byte, error) {
	client := http.Client{
		Timeout: controlLimit,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var dialer net.Dialer
				return dialer.DialContext(ctx, "unix", n.controlSocket())
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
		return nil, fmt.Errorf("the cluster of %s belongs to root: %w", n.dir, err)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("no %s runs in %s", n.name, n.dir)
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

func readStatus(ctx context.Context, n node) (clusterStatus, error) {
	var status clusterStatus
	body, err := ask(ctx, n, http.MethodGet, "/status")
	if err != nil {
		return status, err
	}
	return status, json.Unmarshal(body, &status)
}

// control stops or starts a component, and returns when that is done. Those of
// a node that has joined carry its name before their own.
func control(ctx context.Context, l layout, verb, component string) error {
	n, name := l.node(), component
	if before, after, found := strings.Cut(component, "/"); found {
		var err error
		if n, err = l.nodeNamed(before); err != nil {
			return err
		}
		name = after
	}
	if _, err := ask(ctx, n, http.MethodPost, "/"+verb+"/"+name); err != nil {
		return fmt.Errorf("%s %s: %w", verb, component, err)
	}
	return nil
}

func printStatus(ctx context.Context, l layout) error {
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(out, "COMPONENT\tSTATE\tSINCE\tPID\tMEMORY\tRESTARTS\tPROBLEM")
	var result error
	for _, n := range l.nodes() {
		status, err := readStatus(ctx, n)
		if err != nil && n.first() {
			return err
		}
		if err != nil {
			continue // it has not joined
		}
		if err := printNode(out, l, n, status); err != nil {
			return err
		}
		switch {
		case status.Failure != "":
			result = fmt.Errorf("the start of %s was given up: %s", n.name, firstLine(status.Failure))
		case !status.healthy() && result == nil:
			result = exitCode(1)
		}
	}
	return errors.Join(out.Flush(), result)
}

func printNode(out io.Writer, l layout, n node, status clusterStatus) error {
	processes, err := nodeProcesses(l, n)
	if err != nil {
		return err
	}
	pids := map[int]process{}
	for _, p := range processes {
		pids[p.innerPID] = p
	}
	prefix := n.name + "/"
	if n.first() {
		prefix = ""
	}
	for _, c := range status.Components {
		pid, memory := "-", "-"
		if p, ok := pids[c.PID]; ok {
			pid, memory = strconv.Itoa(p.pid), fmt.Sprintf("%d MiB", p.memory>>20)
		}
		fmt.Fprintf(out, "%s%s\t%s\t%v\t%s\t%s\t%d\t%s\n", prefix, c.Name, c.State, time.Since(c.Since).Round(time.Second),
			pid, memory, c.Restarts, firstLine(c.Problem))
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
	var running []node
	for _, n := range l.nodes() {
		if _, err := readStatus(ctx, n); err == nil {
			running = append(running, n)
		} else if n.first() {
			return err
		}
	}
	for _, archive := range archives {
		path, err := filepath.Abs(archive)
		if err != nil {
			return err
		}
		if _, err := os.Stat(path); err != nil {
			return err
		}
		for _, n := range running {
			if err := importImage(ctx, l, n, path); err != nil {
				return err
			}
		}
		fmt.Fprintf(os.Stderr, "loaded %s\n", archive)
	}
	return nil
}
