package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"guildhall.dev/guildhall/hack/load/audit"
)

// options of a run.
type options struct {
	url            string
	guild          string
	insecure       bool
	tokens         tokenFlags
	publishToken   string
	userBase       uint64
	intents        uint64
	sessions       int
	connectRate    float64
	connectTimeout time.Duration
	spread         bool
	events         int
	publishers     int
	batch          int
	rate           float64
	payload        int
	event          string
	channel        string
	resumes        int
	settle         time.Duration
	timeout        time.Duration
	hold           bool
}

func (o options) check() error {
	switch {
	case o.sessions < 1:
		return errors.New("--sessions: at least 1")
	case o.events < 0, o.resumes < 0, o.rate < 0, o.payload < 0:
		return errors.New("--events, --resumes, --rate and --payload: not negative")
	case o.publishers < 1, o.batch < 1:
		return errors.New("--publishers and --batch: at least 1")
	case o.connectRate <= 0:
		return errors.New("--connect-rate: more than 0")
	case o.events > math.MaxInt32:
		return errors.New("--events: too many")
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && uint64(o.sessions+o.publishers+50) > files.Cur { //nolint:gosec // positive
		return fmt.Errorf("--sessions: this process may open %d files only (ulimit -n)", files.Cur)
	}
	return nil
}

// verdicts of a report.
const (
	auditClean       = "clean"
	auditFailed      = "failed"
	auditInterrupted = "interrupted"
)

// report is the line that a run ends with.
type report struct {
	Audit          string   `json:"audit"`
	Sessions       int      `json:"sessions"`
	Events         int      `json:"events"` // acknowledged
	Deliveries     uint64   `json:"deliveries"`
	Lost           uint64   `json:"lost"`
	Doubled        uint64   `json:"doubled"`
	Reordered      uint64   `json:"reordered"`
	Corrupted      uint64   `json:"corrupted"`
	Resumed        uint64   `json:"resumed"`
	Reidentified   uint64   `json:"reidentified"`
	P50            float64  `json:"p50_ms"`
	P99            float64  `json:"p99_ms"`
	Seconds        float64  `json:"seconds"`         // from the first event published to the last one received
	ConnectSeconds float64  `json:"connect_seconds"` // until all sessions had their snapshot
	CPUSeconds     float64  `json:"cpu_seconds"`     // of this process
	Problems       []string `json:"problems,omitempty"`
	Error          string   `json:"error,omitempty"`
}

// Exit statuses.
const (
	exitClean       = 0
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

var errTimeout = errors.New("--timeout is over")

// setupError is one that came before anything could be audited.
type setupError struct{ err error }

func (e *setupError) Error() string { return e.err.Error() }
func (e *setupError) Unwrap() error { return e.err }

// runner is a run.
type runner struct {
	options
	guildAt *guild
	swarm   *swarm
	auditor *audit.Auditor

	begun     time.Time
	connected time.Time // zero until all sessions are live
	settled   time.Time
}

// run does a whole run: it connects, publishes, audits, prints the report on stdout and returns
// the exit status.
func run(ctx context.Context, o options, stdout, stderr io.Writer, terminal bool) int {
	r := &runner{options: o, auditor: audit.New(), begun: time.Now()}
	err := r.prepare(ctx)
	var stopFigures func()
	if err == nil {
		stopFigures = r.figures(stderr, terminal)
		err = r.execute(ctx)
		if !o.hold {
			stopFigures()
		}
	}
	rep, status := r.judge(ctx, err)
	for _, p := range rep.Problems {
		fmt.Fprintf(stderr, "problem: %s\n", p)
	}
	if rep.Error != "" {
		fmt.Fprintf(stderr, "error: %s\n", rep.Error)
	}
	line, err := json.Marshal(rep)
	if err == nil {
		_, err = fmt.Fprintf(stdout, "%s\n", line)
	}
	if err != nil {
		status = exitFailed
	}
	if r.swarm == nil {
		return status
	}
	if o.hold && status != exitUsage {
		<-ctx.Done()
	}
	if stopFigures != nil {
		stopFigures()
	}
	r.swarm.stop()
	return status
}

// prepare checks the options, makes the tokens and starts to connect.
func (r *runner) prepare(ctx context.Context) error {
	if err := r.check(); err != nil {
		return &setupError{err}
	}
	var err error
	if r.guildAt, err = newGuild(r.url, r.guild, r.insecure, r.publishers); err != nil {
		return &setupError{err}
	}
	if r.spread && !r.guildAt.loopback() {
		return &setupError{errors.New("--spread: only for a loopback address in --url")}
	}
	source, err := r.tokens.source(ctx)
	if err != nil {
		return &setupError{err}
	}
	if r.publishToken == "" {
		if r.publishToken, err = source(ctx, r.userBase, "load-publisher", true); err != nil {
			return &setupError{err}
		}
	}
	names, tokens := make([]string, r.sessions), make([]string, r.sessions)
	for i := range tokens {
		names[i] = fmt.Sprintf("load-%d", i+1)
		if tokens[i], err = source(ctx, r.userBase+uint64(i)+1, names[i], false); err != nil { //nolint:gosec // not negative
			return &setupError{err}
		}
	}
	r.swarm = newSwarm(r.guildAt, r.auditor, r.intents, r.spread)
	// The clients outlive an interrupt: they are to leave properly.
	r.swarm.prepare(context.WithoutCancel(ctx), names, tokens)
	return nil
}

// execute connects, publishes and waits for all to be received.
func (r *runner) execute(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.timeout, errTimeout)
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	r.swarm.failed = fail
	r.swarm.connect(r.connectRate)

	if err := r.waitConnected(ctx); err != nil {
		return &setupError{err}
	}
	r.connected = time.Now()
	if err := r.publish(ctx); err != nil {
		if r.auditor.Acknowledged() == 0 {
			err = &setupError{err}
		}
		return err
	}
	err := r.waitSettled(ctx)
	r.settled = time.Now()
	return err
}

// waitConnected waits until all clients are in a session.
func (r *runner) waitConnected(ctx context.Context) error {
	timeout := time.NewTimer(r.connectTimeout)
	defer timeout.Stop()
	for int(r.swarm.live.Load()) < r.sessions {
		select {
		case <-r.swarm.change:
		case <-timeout.C:
			return fmt.Errorf("%d of %d sessions connected within %v%s", r.swarm.live.Load(), r.sessions, r.connectTimeout, r.swarm.why())
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// publish publishes all events and, meanwhile, cuts connections.
func (r *runner) publish(ctx context.Context) error {
	if r.events == 0 {
		return nil
	}
	channel := r.channel
	if channel == "" {
		if id := r.swarm.channel.Load(); id != nil {
			channel = *id
		}
		if channel == "" {
			return errors.New("the guild has no text channel; name one with --channel")
		}
	}

	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var publishers, cutter sync.WaitGroup
	cuts := make(chan struct{}, r.resumes)
	cutter.Go(func() { r.cut(ctx, cuts) })
	answered := r.cutPlan(cuts)
	start := time.Now()
	for i := range r.publishers {
		p := &publisher{
			guild: r.guildAt, auditor: r.auditor, number: i, of: r.publishers, total: r.events, batch: r.batch, rate: r.rate,
			run: r.swarm.runID, token: r.publishToken, event: r.event, channel: channel, size: r.payload, answered: answered,
		}
		publishers.Go(func() {
			if err := p.publish(ctx, start); err != nil {
				fail(err)
			}
		})
	}
	publishers.Wait()
	close(cuts)
	cutter.Wait()
	return context.Cause(ctx)
}

// cutPlan draws how many events are to be answered before each cut, and gives the function that
// counts them.
func (r *runner) cutPlan(cuts chan<- struct{}) func(events int) {
	at := make([]int, r.resumes)
	for i := range at {
		at[i] = 1 + rand.IntN(r.events) //nolint:gosec // any will do
	}
	slices.Sort(at)
	var mu sync.Mutex
	sum := 0
	return func(events int) {
		mu.Lock()
		defer mu.Unlock()
		sum += events
		for len(at) > 0 && at[0] <= sum {
			at = at[1:]
			cuts <- struct{}{} // has room for all
		}
	}
}

// cut cuts one connection for each of cuts.
func (r *runner) cut(ctx context.Context, cuts <-chan struct{}) {
	for range cuts {
		for !r.swarm.cut() {
			select {
			case <-r.swarm.change:
			case <-ctx.Done():
				return
			}
		}
	}
}

// waitSettled waits until all clients have received what was acknowledged, or for too long nothing
// has moved.
func (r *runner) waitSettled(ctx context.Context) error {
	last := r.auditor.Last()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var before uint64
	moved := time.Now()
	for {
		behind, sum := r.swarm.behind(last)
		if behind == 0 {
			return nil
		}
		if sum != before {
			before, moved = sum, time.Now()
		}
		if time.Since(moved) > r.settle {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if away := r.sessions - int(r.swarm.live.Load()); away > 0 {
		return fmt.Errorf("%d sessions did not come back%s", away, r.swarm.why())
	}
	return nil
}

// judge makes the report and the exit status.
func (r *runner) judge(ctx context.Context, err error) (report, int) {
	complete := err == nil
	v := r.auditor.Verdict(complete)
	rep := report{
		Audit: auditClean, Sessions: r.sessions, Events: r.auditor.Acknowledged(),
		Deliveries: v.Deliveries, Lost: v.Lost, Doubled: v.Doubled, Reordered: v.Reordered, Corrupted: v.Corrupted,
		CPUSeconds: seconds(cpu()), Problems: v.Problems,
	}
	if r.swarm != nil {
		rep.Sessions = int(r.swarm.live.Load())
		rep.Resumed, rep.Reidentified = r.swarm.resumed.Load(), r.swarm.reidentified.Load()
		p := r.swarm.latency.percentiles(0.5, 0.99)
		rep.P50, rep.P99 = milliseconds(p[0]), milliseconds(p[1])
	}
	end := r.settled
	if end.IsZero() {
		end = time.Now()
	}
	if !r.connected.IsZero() {
		rep.ConnectSeconds = seconds(r.connected.Sub(r.begun))
		rep.Seconds = seconds(end.Sub(r.connected))
	}
	_, setup := errors.AsType[*setupError](err)
	switch {
	case ctx.Err() != nil && err != nil:
		rep.Audit = auditInterrupted
		return rep, exitInterrupted
	case err != nil:
		rep.Audit, rep.Error = auditFailed, err.Error()
		if setup {
			return rep, exitUsage
		}
		return rep, exitFailed
	case !v.Clean():
		rep.Audit = auditFailed
		return rep, exitFailed
	}
	return rep, exitClean
}

func seconds(d time.Duration) float64      { return math.Round(d.Seconds()*1000) / 1000 }
func milliseconds(d time.Duration) float64 { return math.Round(d.Seconds()*1e6) / 1000 }

// cpu is the processor time that this process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// figures prints how the run goes: one line that is written over on a terminal, a line every two
// seconds otherwise.
func (r *runner) figures(w io.Writer, terminal bool) (stop func()) {
	every := 2 * time.Second
	if terminal {
		every = 250 * time.Millisecond
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	wait.Go(func() {
		t := time.NewTicker(every)
		defer t.Stop()
		var before audit.Verdict
		var events int
		at := time.Now()
		show := func() {
			v, acked := r.auditor.Counts(), r.auditor.Acknowledged()
			now := time.Now()
			rate := 1 / max(now.Sub(at).Seconds(), 1e-3)
			p := r.swarm.latency.percentiles(0.5, 0.99)
			behind, _ := r.swarm.behind(r.auditor.Last())
			line := fmt.Sprintf("%5.1fs  sessions %d/%d  events %d/%d %.0f/s  deliveries %d %.0f/s  p50 %.1f p99 %.1f ms  behind %d  resumed %d reidentified %d  doubled %d reordered %d corrupted %d",
				now.Sub(r.begun).Seconds(), r.swarm.live.Load(), r.sessions, acked, r.events, float64(acked-events)*rate,
				v.Deliveries, float64(v.Deliveries-before.Deliveries)*rate, milliseconds(p[0]), milliseconds(p[1]),
				behind, r.swarm.resumed.Load(), r.swarm.reidentified.Load(), v.Doubled, v.Reordered, v.Corrupted)
			if terminal {
				fmt.Fprintf(w, "\r\x1b[?7l%s\x1b[K\x1b[?7h", line) // without going on in a second line
			} else {
				fmt.Fprintln(w, line)
			}
			before, events, at = v, acked, now
		}
		for {
			select {
			case <-t.C:
				show()
			case <-ctx.Done():
				show()
				if terminal {
					fmt.Fprintln(w)
				}
				return
			}
		}
	})
	return func() {
		cancel()
		wait.Wait()
	}
}
