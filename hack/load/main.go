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
	"os"
	"os/signal"
	"syscall"

	"guildhall.dev/guildhall/hack/load/generator"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	info, err := os.Stderr.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	os.Exit(generator.Command(ctx, os.Args[1:], os.Stdout, os.Stderr, terminal))
}
