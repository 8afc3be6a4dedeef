// Package generator puts a guild under load: many clients that keep their sessions through all kinds
// of trouble, and publishers that repeat what was not answered. Package audit judges what comes.
package generator

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"time"
)

const usage = `usage: load COMMAND [flags]

  run      connect many sessions, publish events and check every delivery
  watch    print what one session receives
  publish  send a message: load publish [flags] TEXT

"load COMMAND --help" lists the flags of a command.
`

// Command does what the arguments say and returns the exit status.
func Command(ctx context.Context, args []string, stdout, stderr io.Writer, terminal bool) int {
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

func (t *Tokens) register(f *flag.FlagSet) {
	f.StringVar(&t.Token, "token", "", "token of the user; default $GUILDHALL_TOKEN")
	f.StringVar(&t.File, "token-file", "", "file with tokens, one a line; sessions take them in turn, publishers the first")
	f.StringVar(&t.Command, "token-command", "", "shell command that prints the token of user $LOAD_USER, $LOAD_NAME; with $LOAD_PUBLISH=true one that may publish")
	f.StringVar(&t.KeysDir, "keys-dir", "", "directory of the key set with which to make tokens")
	f.StringVar(&t.KeysSecret, "keys-secret", "", "NAMESPACE/NAME of the Secret with the key set, such as default/guildhall-keys")
	f.StringVar(&t.Kubeconfig, "kubeconfig", "", "kubeconfig file for --keys-secret; default $KUBECONFIG or ~/.kube/config")
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
	o := Defaults()
	f := flag.NewFlagSet("load run", flag.ContinueOnError)
	guildFlags(f, &o.URL, &o.Guild, &o.Insecure)
	o.Tokens.register(f)
	f.StringVar(&o.PublishToken, "publish-token", "", "token of the publishers; default: from the same source as the sessions'")
	f.Uint64Var(&o.UserBase, "user-base", o.UserBase, "id of the publishers' user; sessions have the following ones")
	f.Uint64Var(&o.Intents, "intents", o.Intents, "intents of the sessions")
	f.IntVar(&o.Sessions, "sessions", o.Sessions, "sessions to connect")
	f.Float64Var(&o.ConnectRate, "connect-rate", o.ConnectRate, "connections to open per second, at most")
	f.DurationVar(&o.ConnectTimeout, "connect-timeout", o.ConnectTimeout, "time for all sessions to connect, on top of what --connect-rate asks for")
	f.BoolVar(&o.Spread, "spread", false, "dial from many addresses of 127.0.0.0/8, for a loopback URL")
	f.IntVar(&o.Events, "events", o.Events, "events to publish")
	f.IntVar(&o.Publishers, "publishers", o.Publishers, "publishers, each with one request at a time")
	f.IntVar(&o.Batch, "batch", o.Batch, "events per request")
	f.Float64Var(&o.Rate, "rate", 0, "events per second of all publishers; 0: as fast as they are acknowledged")
	f.Float64Var(&o.Again, "again", 0, "share of requests after which an earlier one is sent again, with its key; it must be answered as before")
	f.Float64Var(&o.Abandon, "abandon", 0, "share of requests to give up of those that were answered 5xx; they must not have been carried out")
	f.IntVar(&o.Payload, "payload", o.Payload, "characters of each event's content, at least what the check needs (about 80)")
	f.StringVar(&o.Event, "event", o.Event, "type of the events")
	f.StringVar(&o.Channel, "channel", "", "channel id of the events; default: the guild's first text channel")
	f.IntVar(&o.Resumes, "resumes", 0, "connections to cut at random instants, which then resume")
	f.BoolVar(&o.Durable, "durable", false, "the log survives its server: a session that cannot be resumed is a fault")
	f.DurationVar(&o.Settle, "settle", o.Settle, "how long nothing may arrive at the end before what is missing counts as lost")
	f.DurationVar(&o.Timeout, "timeout", o.Timeout, "time for the whole run")
	f.BoolVar(&o.Hold, "hold", false, "stay connected after the audit, until interrupted")
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
	o.ConnectTimeout += time.Duration(float64(o.Sessions) / max(o.ConnectRate, 1e-6) * float64(time.Second))
	return run(ctx, o, stdout, stderr, terminal)
}
