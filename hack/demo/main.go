// Command demo is "make run": it starts a Kubernetes cluster on this machine, deploys the
// operator and the samples, connects clients, audits what they receive, and shows the guild at
// work. What it started it ends again. Its exit status is the audit's verdict, and its last line
// the audit in JSON.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	image     = "guildhall.dev/guildhall:dev"
	namespace = "default"
	guild     = "lobby"
	// patience bounds each wait for the cluster.
	patience = 2 * time.Minute
	// endTimeout bounds the end of a child that was asked to end.
	endTimeout = 30 * time.Second
)

func main() {
	sessions := flag.Int("sessions", 200, "clients to connect")
	events := flag.Int("events", 1000, "events to publish")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := &demo{sessions: *sessions, events: *events, terminal: isTerminal(os.Stdout)}
	status, err := d.run(ctx)
	if err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "\nmake run:", err)
		status = max(status, 1)
	}
	if d.verdict != "" {
		fmt.Println(d.verdict)
	}
	os.Exit(status)
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

type demo struct {
	sessions, events int
	terminal         bool

	kubeconfig string
	kubectl    string
	verdict    string // the audit's line
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "\n\033[1m==> "+format+"\033[0m\n", args...)
}

func (d *demo) run(ctx context.Context) (status int, err error) {
	began := time.Now()
	if err := os.MkdirAll("build", 0o755); err != nil {
		return 1, err
	}
	running := d.command(ctx, "go", "-C", "hack/cluster", "run", ".", "status").quiet() == nil
	if !running {
		// Before it can fail half-way, so that nothing is left behind.
		defer func() {
			say("ending the cluster")
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
			defer cancel()
			err = errors.Join(err, d.command(end, "go", "-C", "hack/cluster", "run", ".", "down").toStderr())
		}()
	}
	say("a Kubernetes cluster on this machine (the first time, it is built from source: about ten minutes)")
	out, err := d.command(ctx, "go", "-C", "hack/cluster", "run", ".", "up").output()
	if err != nil {
		return 1, fmt.Errorf("starting the cluster: %w", err)
	}
	d.kubeconfig = strings.TrimSpace(out)
	d.kubectl = filepath.Join(filepath.Dir(d.kubeconfig), "bin", "kubectl")

	say("the operator and the shard server, as one image")
	if err := d.command(ctx, "make", "--no-print-directory", "cluster-load", "IMG="+image).toStderr(); err != nil {
		return 1, fmt.Errorf("making the image: %w", err)
	}
	if err := d.command(ctx, "make", "--no-print-directory", "deploy", "IMG="+image, "KUBECTL="+d.kubectl).toStderr(); err != nil {
		return 1, fmt.Errorf("deploying the operator: %w", err)
	}
	if running { // the image has the name of the one before
		if err := d.kube(ctx, "-n", "guildhall-system", "rollout", "restart", "deployment/guildhall-controller-manager").toStderr(); err != nil {
			return 1, err
		}
	}
	if err := d.kube(ctx, "-n", "guildhall-system", "rollout", "status", "deployment/guildhall-controller-manager",
		"--timeout="+patience.String()).toStderr(); err != nil {
		return 1, fmt.Errorf("waiting for the operator: %w", err)
	}

	say("two GuildShards and a Guild: kubectl apply -k config/samples")
	if err := d.kube(ctx, "apply", "-k", "config/samples").toStderr(); err != nil {
		return 1, err
	}
	applied := time.Now()
	if err := d.kube(ctx, "wait", "--for=condition=Ready", "guildshards,guilds", "--all", "--timeout="+patience.String()).toStderr(); err != nil {
		return 1, fmt.Errorf("waiting for the guild: %w", err)
	}
	fmt.Fprintf(os.Stderr, "ready %.1f s after apply, %.0f s after the start\n", time.Since(applied).Seconds(), time.Since(began).Seconds())
	url, err := d.publish(ctx)
	if err != nil {
		return 1, err
	}
	return d.audit(ctx, url)
}

// publish makes the front door known under the address that leads to it from this machine, as
// one does with a load balancer's, and returns the guild's URL.
func (d *demo) publish(ctx context.Context) (string, error) {
	ip, err := d.kube(ctx, "get", "service", "guildhall-gateway", "-o", "jsonpath={.spec.clusterIP}").output()
	if err != nil {
		return "", fmt.Errorf("finding the front door: %w", err)
	}
	base := "ws://" + strings.TrimSpace(ip)
	patch := fmt.Sprintf(`{"spec":{"gateway":{"frontDoorURL":%q}}}`, base)
	for _, shard := range []string{"shard-a", "shard-b"} {
		if err := d.kube(ctx, "patch", "guildshard", shard, "--type=merge", "-p", patch).toStderr(); err != nil {
			return "", err
		}
	}
	id, err := d.kube(ctx, "get", "guild", guild, "-o", "jsonpath={.status.id}").output()
	if err != nil {
		return "", err
	}
	url := base + "/g/" + strings.TrimSpace(id) + "/"
	if err := d.kube(ctx, "wait", "guild/"+guild, "--for=jsonpath={.status.gateway.url}="+url, "--timeout="+patience.String()).toStderr(); err != nil {
		return "", fmt.Errorf("waiting for the guild's address: %w", err)
	}
	return url, nil
}

// audit runs the clients. On a terminal it stays until it is interrupted.
func (d *demo) audit(ctx context.Context, url string) (int, error) {
	say("%d clients on %s, %d events, every delivery audited", d.sessions, url, d.events)
	load := filepath.Join("build", "load")
	if err := d.command(ctx, "go", "build", "-o", load, "./hack/load").toStderr(); err != nil {
		return 1, err
	}
	args := []string{
		"run", "--url", url, "--keys-secret", namespace + "/guildhall-keys", "--kubeconfig", d.kubeconfig,
		"--sessions", strconv.Itoa(d.sessions), "--events", strconv.Itoa(d.events), "--publishers", "4",
		"--resumes", strconv.Itoa(d.sessions / 10),
	}
	status, err := d.runLoad(ctx, append(args, "--timeout", "5m"), load)
	if err != nil || ctx.Err() != nil {
		return max(status, 1), err
	}
	if err := d.kube(ctx, "get", "guilds,guildshards,pods", "-o", "wide").toStderr(); err != nil {
		return max(status, 1), err
	}
	token, err := d.kube(ctx, "exec", "shard-a-0", "--", "/shardserver", "token", "--name", "you", "--publish").output()
	if err != nil {
		return max(status, 1), err
	}
	say("now you, in another terminal")
	fmt.Fprintf(os.Stderr, "export KUBECONFIG=%s GUILDHALL_TOKEN=%s\n", d.kubeconfig, strings.TrimSpace(token))
	absolute, err := filepath.Abs(load)
	if err != nil {
		return max(status, 1), err
	}
	fmt.Fprintf(os.Stderr, "%s watch --url %s           # connect, and see what happens\n", absolute, url)
	fmt.Fprintf(os.Stderr, "%s publish --url %s hello   # publish\n", absolute, url)
	fmt.Fprintf(os.Stderr, "%s get guilds,guildshards --watch                              # watch\n", d.kubectl)
	if d.terminal && status == 0 {
		say("Ctrl-C ends it")
		<-ctx.Done()
	}
	return status, nil
}

// runLoad runs the load generator and keeps the last line that it prints, the verdict.
func (d *demo) runLoad(ctx context.Context, args []string, load string) (int, error) {
	c := d.command(ctx, load, args...)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		return 1, err
	}
	if err := c.Start(); err != nil {
		return 1, err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		d.verdict = lines.Text()
	}
	var exit *exec.ExitError
	if err := c.Wait(); errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	} else if err != nil {
		return 1, err
	}
	return 0, nil
}

// command is a child that is asked to end when ctx does. It has a process group of its own, so that
// Ctrl-C reaches only this process, which ends things in order.
type command struct{ *exec.Cmd }

func (d *demo) command(ctx context.Context, name string, args ...string) command {
	c := exec.CommandContext(ctx, name, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGINT) }
	c.WaitDelay = endTimeout
	c.Env = os.Environ()
	if d.kubeconfig != "" {
		c.Env = append(c.Env, "KUBECONFIG="+d.kubeconfig)
	}
	return command{c}
}

func (d *demo) kube(ctx context.Context, args ...string) command {
	return d.command(ctx, d.kubectl, args...)
}

func (c command) toStderr() error {
	c.Stdout, c.Stderr = os.Stderr, os.Stderr
	return c.Run()
}

func (c command) quiet() error {
	c.Stdout, c.Stderr = io.Discard, io.Discard
	return c.Run()
}

func (c command) output() (string, error) {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, os.Stderr
	err := c.Run()
	return out.String(), err
}
