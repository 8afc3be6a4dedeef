// Command demo is "make run": it starts a Kubernetes cluster on this machine, deploys the
// operator and the samples, connects clients, audits what they receive, and shows how the guild grows over relays
// and shrinks back. What it started it ends again. Its exit status is the audit's verdict, and its last line
// the audit in JSON.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"guildhall.dev/guildhall/hack/local"
)

// Where config/samples go, and the guild that they have.
const (
	namespace = "default"
	guild     = "lobby"
)

func main() {
	sessions := flag.Int("sessions", 300, "clients to connect")
	events := flag.Int("events", 1500, "events to publish")
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
	cluster          *local.Cluster
	sessions, events int
	terminal         bool
	verdict          string // the audit's line
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "\n==> "+format+"\n", args...)
}

func (d *demo) run(ctx context.Context) (status int, err error) {
	began := time.Now()
	d.cluster = &local.Cluster{Root: ".", Log: os.Stderr}
	say("a Kubernetes cluster on this machine (the first time, it is built from source: about ten minutes)")
	defer func() { err = errors.Join(err, d.cluster.Down(ctx)) }()
	if err := d.cluster.Up(ctx); err != nil {
		return 1, err
	}
	say("the operator and the shard server, as one image")
	if err := d.cluster.Deploy(ctx); err != nil {
		return 1, err
	}
	say("two GuildShards and a Guild: kubectl apply -k config/samples")
	if err := d.cluster.Kubectl(ctx, "apply", "-k", "config/samples").Run(); err != nil {
		return 1, err
	}
	applied := time.Now()
	if err := d.cluster.Kubectl(ctx, "wait", "--for=condition=Ready", "guildshards,guilds", "--all", "--timeout=2m").Run(); err != nil {
		return 1, fmt.Errorf("waiting for the guild: %w", err)
	}
	fmt.Fprintf(os.Stderr, "ready %.1f s after apply, %.0f s after the start\n", time.Since(applied).Seconds(), time.Since(began).Seconds())
	base, err := d.cluster.OpenFrontDoor(ctx, namespace)
	if err != nil {
		return 1, err
	}
	url, err := d.cluster.GuildURL(ctx, namespace, guild, base)
	if err != nil {
		return 1, err
	}
	return d.audit(ctx, url)
}

// audit runs the clients. On a terminal it stays until it is interrupted.
func (d *demo) audit(ctx context.Context, url string) (int, error) {
	say("%d clients come to %s, %d events, every delivery audited; the guild grows heavy and is spread over relays", d.sessions, url, d.events)
	load := filepath.Join("build", "load")
	if err := d.cluster.Command(ctx, "go", "build", "-o", load, "./hack/load").Run(); err != nil {
		return 1, err
	}
	args := []string{
		"run", "--url", url, "--keys-secret", namespace + "/guildhall-keys", "--kubeconfig", d.cluster.Kubeconfig,
		"--sessions", strconv.Itoa(d.sessions), "--events", strconv.Itoa(d.events), "--publishers", "4",
		"--resumes", strconv.Itoa(d.sessions / 10), "--connect-rate", "12", "--rate", "20", "--durable",
	}
	s := &spread{asked: map[string]int64{}}
	watching, stop := context.WithCancel(ctx)
	var group sync.WaitGroup
	group.Go(func() { d.watchRelays(watching, s) })
	status, err := d.runLoad(ctx, append(args, "--timeout", "5m"), load)
	stop()
	group.Wait()
	if err != nil || ctx.Err() != nil {
		return max(status, 1), err
	}
	if err := d.awaitShrink(ctx, s); err != nil {
		return max(status, 1), err
	}
	d.verdict = fmt.Sprintf(`%s,"relays_max":%d,"moves":%d,"kills":%d}`, strings.TrimSuffix(d.verdict, "}"), s.most, s.moves(), s.kills)
	if err := d.cluster.Kubectl(ctx, "get", "guilds,guildshards,pods", "-o", "wide").Run(); err != nil {
		return max(status, 1), err
	}
	token, err := d.cluster.Kubectl(ctx, "exec", "shard-a-0", "--", "/shardserver", "token", "--name", "you", "--publish").Text()
	if err != nil {
		return max(status, 1), err
	}
	say("now you, in another terminal")
	fmt.Fprintf(os.Stderr, "export KUBECONFIG=%s GUILDHALL_TOKEN=%s\n", d.cluster.Kubeconfig, token)
	absolute, err := filepath.Abs(load)
	if err != nil {
		return max(status, 1), err
	}
	fmt.Fprintf(os.Stderr, "%s watch --url %s           # connect, and see what happens\n", absolute, url)
	fmt.Fprintf(os.Stderr, "%s publish --url %s hello   # publish\n", absolute, url)
	fmt.Fprintf(os.Stderr, "%s get guilds,guildshards --watch                              # watch\n", d.cluster.KubectlPath)
	if d.terminal && status == 0 {
		say("Ctrl-C ends it")
		<-ctx.Done()
	}
	return status, nil
}

// runLoad runs the load generator and keeps the last line that it prints, the verdict.
func (d *demo) runLoad(ctx context.Context, args []string, load string) (int, error) {
	c := d.cluster.Command(ctx, load, args...)
	c.Stdout, c.Stderr = nil, nil // how it goes the picture shows
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
