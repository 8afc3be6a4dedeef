// Command bench compares what it costs to deliver one event to many WebSocket sessions: a bare
// loop of write(2), three Go WebSocket servers, and Guildhall's shard server, in one run, on the
// same work. README.md tells how, docs/performance.md what came of it.
//
//	bench run            runs all, prints a table
//	bench crowd          has one guild's sessions on several relays
//	bench publish        compares publishing with logs on disk and in memory
//	bench restart        kills a shard server with long logs on disk
//	bench server SYSTEM  is one of the servers; started by run
//	bench client         is the sessions and the publisher; started by run
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	err := command(ctx, os.Args[1:])
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "bench: interrupted")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func command(ctx context.Context, args []string) error {
	switch {
	case len(args) >= 1 && args[0] == "run":
		return runCommand(ctx, args[1:])
	case len(args) >= 1 && args[0] == "crowd":
		return crowdCommand(ctx, args[1:])
	case len(args) >= 1 && args[0] == "publish":
		return publishCommand(ctx, args[1:])
	case len(args) >= 1 && args[0] == "restart":
		return restartCommand(ctx, args[1:])
	case len(args) == 2 && args[0] == "server":
		return serverCommand(args[1])
	case len(args) == 1 && args[0] == "client":
		return clientCommand(os.Stdin, os.Stdout)
	}
	return errors.New("usage: bench run [flags], bench publish [flags], bench restart [flags], bench crowd [flags], bench server SYSTEM, or bench client")
}
