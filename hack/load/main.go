// Command load puts a guild under load and audits what it delivers.
//
//	load run      connects many sessions, publishes events and checks every delivery
//	load watch    prints what one session receives
//	load publish  sends a message
//
// For example, with the key set of a shard server that runs alone:
//
//	go run ./hack/load run --url ws://127.0.0.1:8080/g/GUILD/ --keys-dir KEYS --sessions 200 --events 1000 --resumes 20
//
// A run prints how it goes on stderr and ends with one line of JSON on stdout; "audit" in it is
// "clean", "failed" or "interrupted", and the exit status 0, 1 or 130. It is 2 when the run
// could not begin. What is checked is told in package audit.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	info, err := os.Stderr.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	os.Exit(command(ctx, os.Args[1:], os.Stdout, os.Stderr, terminal))
}

const usage = `usage: load COMMAND [flags]

  run      connect many sessions, publish events and check every delivery
  watch    print what one session receives
  publish  send a message: load publish [flags] TEXT

"load COMMAND --help" lists the flags of a command.
`

// command does what the arguments say and returns the exit status.
func command(ctx context.Context, args []string, stdout, stderr io.Writer, terminal bool) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	switch args[0] {
	case "run":
		return runCommand(ctx, args[1:], stdout, stderr, terminal)
	case "watch":
		return watchCommand(ctx, args[1:], stdout, stderr)
	case "publish":
		return publishCommand(ctx, args[1:], stdout, stderr)
	case "help", "-h", "--help":
		fmt.Fprint(stdout, usage)
		return exitClean
	}
	fmt.Fprintf(stderr, "load: no command %q\n%s", args[0], usage)
	return exitUsage
}

func guildFlags(f *flag.FlagSet, url, guild *string, insecure *bool) {
	f.StringVar(url, "url", "", "address of the guild: ws://HOST/g/GUILD/")
	f.StringVar(guild, "guild", "", "id of the guild, when it is not in the URL's path")
	f.BoolVar(insecure, "insecure", false, "accept any TLS certificate")
}

func (t *tokenFlags) register(f *flag.FlagSet) {
	f.StringVar(&t.token, "token", "", "token of the user; default $GUILDHALL_TOKEN")
	f.StringVar(&t.file, "token-file", "", "file with tokens, one a line; sessions take them in turn, publishers the first")
	f.StringVar(&t.command, "token-command", "", "shell command that prints the token of user $LOAD_USER, $LOAD_NAME; with $LOAD_PUBLISH=true one that may publish")
	f.StringVar(&t.keysDir, "keys-dir", "", "directory of the key set with which to make tokens")
	f.StringVar(&t.keysSecret, "keys-secret", "", "NAMESPACE/NAME of the Secret with the key set, such as default/guildhall-keys")
	f.StringVar(&t.kubeconfig, "kubeconfig", "", "kubeconfig file for --keys-secret; default $KUBECONFIG or ~/.kube/config")
}

const (
	defaultUser    = 900000000000000000
	defaultIntents = 1<<0 | 1<<9 | 1<<15 // GUILDS, GUILD_MESSAGES, MESSAGE_CONTENT
)

// parse reads flags; when ok is false, the command is over with the status.
func parse(f *flag.FlagSet, args []string, stderr io.Writer) (status int, ok bool) {
	f.SetOutput(stderr)
	switch err := f.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitClean, false
	case err != nil:
		return exitUsage, false
	}
	return 0, true
}

func runCommand(ctx context.Context, args []string, stdout, stderr io.Writer, terminal bool) int {
	var o options
	f := flag.NewFlagSet("load run", flag.ContinueOnError)
	guildFlags(f, &o.url, &o.guild, &o.insecure)
	o.tokens.register(f)
	f.StringVar(&o.publishToken, "publish-token", "", "token of the publishers; default: from the same source as the sessions'")
	f.Uint64Var(&o.userBase, "user-base", defaultUser, "id of the publishers' user; sessions have the following ones")
	f.Uint64Var(&o.intents, "intents", defaultIntents, "intents of the sessions")
	f.IntVar(&o.sessions, "sessions", 100, "sessions to connect")
	f.Float64Var(&o.connectRate, "connect-rate", 500, "connections to open per second, at most")
	f.DurationVar(&o.connectTimeout, "connect-timeout", time.Minute, "time for all sessions to connect, on top of what --connect-rate asks for")
	f.BoolVar(&o.spread, "spread", false, "dial from many addresses of 127.0.0.0/8, for a loopback URL")
	f.IntVar(&o.events, "events", 1000, "events to publish")
	f.IntVar(&o.publishers, "publishers", 1, "publishers, each with one request at a time")
	f.IntVar(&o.batch, "batch", 1, "events per request")
	f.Float64Var(&o.rate, "rate", 0, "events per second of all publishers; 0: as fast as they are acknowledged")
	f.IntVar(&o.payload, "payload", 128, "characters of each event's content, at least what the check needs (about 80)")
	f.StringVar(&o.event, "event", "MESSAGE_CREATE", "type of the events")
	f.StringVar(&o.channel, "channel", "", "channel id of the events; default: the guild's first text channel")
	f.IntVar(&o.resumes, "resumes", 0, "connections to cut at random instants, which then resume")
	f.DurationVar(&o.settle, "settle", 20*time.Second, "how long nothing may arrive at the end before what is missing counts as lost")
	f.DurationVar(&o.timeout, "timeout", 5*time.Minute, "time for the whole run")
	f.BoolVar(&o.hold, "hold", false, "stay connected after the audit, until interrupted")
	status, ok := parse(f, args, stderr)
	if !ok {
		if status == exitUsage {
			return refuse(stdout, stderr, "wrong flags")
		}
		return status
	}
	if f.NArg() > 0 {
		return refuse(stdout, stderr, fmt.Sprintf("unexpected argument %q", f.Arg(0)))
	}
	o.connectTimeout += time.Duration(float64(o.sessions) / max(o.connectRate, 1e-6) * float64(time.Second))
	return run(ctx, o, stdout, stderr, terminal)
}
