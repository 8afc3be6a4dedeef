// Command torture mistreats a shard server and audits what its clients saw.
//
// It starts the server on a directory of its own, connects sessions, publishes all the time, and then
// does to the server what it is told to, in random order and at random instants:
//
//	--kills N      kill -9, every tenth before the server serves again
//	--terms N      SIGTERM, after which the server has to end by itself
//	--stops N      SIGSTOP for --stop-time and up to half as long again, then SIGCONT or, sometimes, kill -9;
//	               meanwhile a second server has to refuse the directory
//	--full N       leave little or no space on the disk: publishers have to be answered 507, readers served,
//	               and all is to be well again when the space comes back
//	--read-only N  start on a read-only file system, which the server has to refuse
//	--damages N    when all is over, start on copies with a damaged file: the server has to refuse them or to
//	               serve the whole log, never one with a hole
//
// --full and --read-only put the directory on a small tmpfs, and need root. What is checked is told in package
// audit; the log is to survive everything.
//
// The last line of stdout is a report in JSON; "audit" in it is "clean", "failed" or "interrupted", and the
// exit status 0, 1 or 130. It is 2 for wrong flags. Unless the audit is clean the directory stays, with the
// server's log.
//
//	go build -o shardserver ./shardserver && go run ./hack/torture --shardserver shardserver --kills 20
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"guildhall.dev/guildhall/hack/load/generator"
)

// Exit statuses.
const (
	exitClean       = 0
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	info, err := os.Stderr.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	os.Exit(command(ctx, os.Args[1:], os.Stdout, os.Stderr, terminal))
}

// options of a run.
type options struct {
	shardserver string // binary
	dir         string // of everything that the run makes; a temporary one when empty
	kills       int
	terms       int
	stops       int
	full        int
	readOnly    int
	damages     int
	damageTo    string        // kinds of files
	within      time.Duration // after serving again, the next comes at most so much later
	stopTime    time.Duration
	sessions    int
	publishers  int
	batch       int
	rate        float64
	payload     int
	seed        uint64
	control     string
}

// Controls of the audit: runs that have to fail.
const (
	controlMemory   = "memory"   // the server has no directory
	controlRollback = "rollback" // at the last kill an old copy of the directory takes its place
)

func (o options) check() error {
	switch {
	case o.shardserver == "":
		return errors.New("--shardserver: give the binary")
	case min(o.kills, o.terms, o.stops, o.full, o.readOnly, o.damages) < 0:
		return errors.New("counts: not negative")
	case o.within < minDelay || o.stopTime <= 0:
		return fmt.Errorf("--within: at least %v; --stop-time: more than 0", minDelay)
	case o.control == controlRollback && o.kills < 2:
		return errors.New("--control rollback: needs two --kills")
	}
	switch o.control {
	case "", controlMemory, controlRollback:
		return nil
	}
	return fmt.Errorf("--control: expected %s or %s", controlMemory, controlRollback)
}

// report is the last line of a run.
type report struct {
	Kills      int `json:"kills"`
	EarlyKills int `json:"early_kills"` // of them, before the server served again
	Terms      int `json:"terms"`
	Stops      int `json:"stops"`
	Full       int `json:"full"`
	ReadOnly   int `json:"read_only"`
	Damages    int `json:"damages"`
	generator.Report
	// From the start of a process until its guild answers.
	RestartP50 float64 `json:"restart_p50_ms"`
	RestartP99 float64 `json:"restart_p99_ms"`
	RestartMax float64 `json:"restart_max_ms"`
	// Answers to publishers that were errors, by status.
	Statuses map[int]int `json:"statuses,omitempty"`
	// What became of damaged copies.
	Damaged map[string]int `json:"damaged,omitempty"`
	Seed    uint64         `json:"seed"`
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer, terminal bool) int {
	var o options
	f := flag.NewFlagSet("torture", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.shardserver, "shardserver", "", "binary of the shard server")
	f.StringVar(&o.dir, "dir", "", "directory for what the run makes, emptied before; default: a temporary one")
	f.IntVar(&o.kills, "kills", 0, "how often to kill the server with SIGKILL")
	f.IntVar(&o.terms, "terms", 0, "how often to end it with SIGTERM")
	f.IntVar(&o.stops, "stops", 0, "how often to stop it with SIGSTOP")
	f.IntVar(&o.full, "full", 0, "how often to fill its disk (root)")
	f.IntVar(&o.readOnly, "read-only", 0, "how often to start it on a read-only file system (root)")
	f.IntVar(&o.damages, "damages", 0, "how many damaged copies to start it on")
	f.StringVar(&o.damageTo, "damage-to", fileKinds, "kinds of files to damage")
	f.DurationVar(&o.within, "within", 2*time.Second, "the most that passes between serving again and what is done next")
	f.DurationVar(&o.stopTime, "stop-time", 30*time.Second, "the least that a stop lasts")
	f.IntVar(&o.sessions, "sessions", 1000, "sessions to connect")
	f.IntVar(&o.publishers, "publishers", 64, "publishers, each with one request at a time")
	f.IntVar(&o.batch, "batch", 1, "events per request")
	f.Float64Var(&o.rate, "rate", 100, "events per second of all publishers; 0: as fast as they are acknowledged")
	f.IntVar(&o.payload, "payload", 256, "characters of each event's content")
	f.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of what is random in order and instants") //nolint:gosec // after 1970
	f.StringVar(&o.control, "control", "", "a control of the audit, which has to fail: "+controlMemory+", a server without a directory, or "+
		controlRollback+", an old copy of the directory instead of the last one")
	switch err := f.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitClean
	case err != nil:
		return exitUsage
	}
	if err := o.check(); err != nil || f.NArg() > 0 {
		fmt.Fprintln(stderr, "torture:", errors.Join(err, unexpected(f.Args())))
		return exitUsage
	}
	rep := torture(ctx, o, stderr, terminal)
	for _, p := range rep.Problems {
		fmt.Fprintln(stderr, "problem:", p)
	}
	if rep.Error != "" {
		fmt.Fprintln(stderr, "error:", rep.Error)
	}
	line, err := json.Marshal(rep)
	if err == nil {
		_, err = fmt.Fprintf(stdout, "%s\n", line)
	}
	switch {
	case err != nil:
		return exitFailed
	case rep.Audit == generator.AuditClean:
		return exitClean
	case rep.Audit == generator.AuditInterrupted:
		return exitInterrupted
	}
	return exitFailed
}

func unexpected(args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("unexpected arguments %q", args)
}
