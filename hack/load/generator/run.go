package generator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"guildhall.dev/guildhall/hack/load/audit"
)

// Options of a run.
type Options struct {
	URL            string // of the guild, ws://HOST/g/GUILD/
	Guild          string // id, when it is not in the URL's path
	Insecure       bool   // any TLS certificate will do
	Tokens         Tokens
	PublishToken   string // from Tokens when empty
	UserBase       uint64 // id of the publishers' user; sessions have the following ones
	Intents        uint64
	Sessions       int
	ConnectRate    float64       // connections per second, at most
	ConnectTimeout time.Duration // for all of them
	Spread         bool          // dial from many addresses of 127.0.0.0/8
	Events         int           // math.MaxInt32: until Finish
	Publishers     int
	Batch          int           // events per request
	Rate           float64       // events per second of all publishers; 0: as fast as they are acknowledged
	Again          float64       // share of requests after which an earlier one is sent again, with its key
	Abandon        float64       // share of refused requests that are given up; they must not have been appended
	Payload        int           // characters of an event's content
	Event          string        // type of the events
	Channel        string        // their channel; the guild's first text channel when empty
	Resumes        int           // connections to cut
	Durable        bool          // the log survives its server: a session that is lost is a fault
	Settle         time.Duration // how long nothing may arrive at the end before what is missing counts as lost
	Timeout        time.Duration // of the whole run
	Hold           bool          // stay connected after the audit
}

// Defaults are the options of "load run" without flags.
func Defaults() Options {
	return Options{
		UserBase: defaultUser, Intents: defaultIntents, Sessions: 100, ConnectRate: 500, ConnectTimeout: time.Minute,
		Events: 1000, Publishers: 1, Batch: 1, Payload: 128, Event: "MESSAGE_CREATE", Settle: 20 * time.Second, Timeout: 5 * time.Minute,
	}
}

func (o Options) check() error {
	switch {
	case o.Sessions < 1:
		return errors.New("--sessions: at least 1")
	case o.Events < 0, o.Resumes < 0, o.Rate < 0, o.Payload < 0:
		return errors.New("--events, --resumes, --rate and --payload: not negative")
	case o.Again < 0, o.Again > 1, o.Abandon < 0, o.Abandon > 1:
		return errors.New("--again and --abandon: 0 to 1")
	case o.Publishers < 1, o.Batch < 1:
		return errors.New("--publishers and --batch: at least 1")
	case o.ConnectRate <= 0:
		return errors.New("--connect-rate: more than 0")
	case o.Events > math.MaxInt32:
		return errors.New("--events: too many")
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && uint64(o.Sessions+o.Publishers+50) > files.Cur { //nolint:gosec // positive
		return fmt.Errorf("--sessions: this process may open %d files only (ulimit -n)", files.Cur)
	}
	return nil
}

// Verdicts of a report.
const (
	AuditClean       = "clean"
	AuditFailed      = "failed"
	AuditInterrupted = "interrupted"
)

// Report is the line that a run ends with.
type Report struct {
	Audit          string   `json:"audit"`
	Sessions       int      `json:"sessions"`
	Events         int      `json:"events"` // acknowledged
	Deliveries     uint64   `json:"deliveries"`
	Lost           uint64   `json:"lost"`
	Doubled        uint64   `json:"doubled"`
	Reordered      uint64   `json:"reordered"`
	Corrupted      uint64   `json:"corrupted"`
	Refuted        uint64   `json:"refuted"`
	Invalidated    uint64   `json:"invalidated"`
	Resumed        uint64   `json:"resumed"`
	Reidentified   uint64   `json:"reidentified"`
	P50            float64  `json:"p50_ms"` // from publishing to receipt
	P99            float64  `json:"p99_ms"`
	AckP50         float64  `json:"ack_p50_ms"` // from publishing to the answer, repetitions included
	AckP99         float64  `json:"ack_p99_ms"`
	ResumeP50      float64  `json:"resume_p50_ms"` // from the loss of a session's connection to its RESUMED
	ResumeP99      float64  `json:"resume_p99_ms"`
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

// Run is a load on a guild: New, Connect, Publish, Settle, Report and Close, in this order.
type Run struct {
	o       Options
	guild   *guild
	swarm   *swarm
	auditor *audit.Auditor
	finish  chan struct{}
	once    sync.Once

	begun     time.Time
	connected time.Time // zero until all sessions are live
	settled   time.Time

	acks     histogram
	mu       sync.Mutex
	statuses map[int]int
}

// run does a whole run: it connects, publishes, audits, prints the report on stdout and returns
// the exit status.
func run(ctx context.Context, o Options, stdout, stderr io.Writer, terminal bool) int {
	r, err := New(ctx, o)
	var stopFigures func()
	if err == nil {
		stopFigures = r.Figures(stderr, terminal)
		err = r.execute(ctx)
		if !o.Hold {
			stopFigures()
		}
	}
	rep := r.Report(ctx, err)
	status := rep.status(err)
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
	if o.Hold && stopFigures != nil && status != exitUsage {
		<-ctx.Done()
	}
	if stopFigures != nil {
		stopFigures()
	}
	r.Close()
	return status
}

// New checks the options and makes the tokens. The Run that it returns with an error is good for Report
// and Close.
func New(ctx context.Context, o Options) (*Run, error) {
	r := &Run{o: o, auditor: audit.New(), finish: make(chan struct{}), begun: time.Now(), statuses: map[int]int{}}
	if o.Durable {
		r.auditor = audit.NewDurable()
	}
	if err := r.prepare(ctx); err != nil {
		return r, &setupError{err}
	}
	return r, nil
}

func (r *Run) prepare(ctx context.Context) error {
	if err := r.o.check(); err != nil {
		return err
	}
	var err error
	if r.guild, err = newGuild(r.o.URL, r.o.Guild, r.o.Insecure, r.o.Publishers); err != nil {
		return err
	}
	if r.o.Spread && !r.guild.loopback() {
		return errors.New("--spread: only for a loopback address in --url")
	}
	source, err := r.o.Tokens.source(ctx)
	if err != nil {
		return err
	}
	if r.o.PublishToken == "" {
		if r.o.PublishToken, err = source(ctx, r.o.UserBase, "load-publisher", true); err != nil {
			return err
		}
	}
	names, tokens := make([]string, r.o.Sessions), make([]string, r.o.Sessions)
	for i := range tokens {
		names[i] = fmt.Sprintf("load-%d", i+1)
		if tokens[i], err = source(ctx, r.o.UserBase+uint64(i)+1, names[i], false); err != nil { //nolint:gosec // not negative
			return err
		}
	}
	r.swarm = newSwarm(r.guild, r.auditor, r.o.Intents, r.o.Spread)
	// The clients outlive an interrupt: they are to leave properly.
	r.swarm.prepare(context.WithoutCancel(ctx), names, tokens)
	return nil
}

// execute connects, publishes and waits for all to be received.
func (r *Run) execute(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.o.Timeout, errTimeout)
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	if err := r.Connect(ctx, fail); err != nil {
		return err
	}
	if err := r.Publish(ctx); err != nil {
		return err
	}
	return r.Settle(ctx)
}

// Connect connects all clients and waits until they are in a session. fail is told, then and later, of
// an end that no reconnect helps.
func (r *Run) Connect(ctx context.Context, fail func(error)) error {
	r.swarm.failed = fail
	r.swarm.connect(r.o.ConnectRate)
	if err := r.waitConnected(ctx); err != nil {
		return &setupError{err}
	}
	r.connected = time.Now()
	return nil
}

// Publish publishes all events, until Finish, and, meanwhile, cuts connections. It returns when they are
// answered.
func (r *Run) Publish(ctx context.Context) error {
	err := r.publish(ctx)
	if err != nil && r.auditor.Acknowledged() == 0 {
		err = &setupError{err}
	}
	return err
}

// Finish lets publishers end after the request that they are at.
func (r *Run) Finish() { r.once.Do(func() { close(r.finish) }) }

// Settle waits until all clients have received what was acknowledged, or nothing has come for too long.
func (r *Run) Settle(ctx context.Context) error {
	err := r.waitSettled(ctx)
	r.settled = time.Now()
	return err
}

// Disturb says that the server is being disturbed: sessions that now lose their connections count as
// lost since this moment.
func (r *Run) Disturb() {
	now := time.Now()
	r.swarm.disturbed.Store(&now)
}

// Cut cuts one connection off; false when no client is in a session.
func (r *Run) Cut() bool { return r.swarm.cut() }

// Live is how many clients are in a session.
func (r *Run) Live() int { return int(r.swarm.live.Load()) }

// Resumed is how often sessions were resumed.
func (r *Run) Resumed() uint64 { return r.swarm.resumed.Load() }

// Asked is when each session was asked to reconnect.
func (r *Run) Asked() [][]time.Time {
	asked := make([][]time.Time, len(r.swarm.clients))
	for i, c := range r.swarm.clients {
		c.mu.Lock()
		asked[i] = slices.Clone(c.asked)
		c.mu.Unlock()
	}
	return asked
}

// Acknowledged is how many events were.
func (r *Run) Acknowledged() int { return r.auditor.Acknowledged() }

// Last is the highest number of an acknowledged event.
func (r *Run) Last() uint64 { return r.auditor.Last() }

// Behind is how many clients have not got as far as a number.
func (r *Run) Behind(number uint64) int {
	n, _ := r.swarm.behind(number)
	return n
}

// Statuses counts the answers to publishers that were errors, by HTTP status.
func (r *Run) Statuses() map[int]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.statuses)
}

func (r *Run) status(code int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.statuses[code]++
}

// Faults is what the audit has found up to now, as far as that is known before the end.
func (r *Run) Faults() audit.Verdict { return r.auditor.Counts() }

// Close lets all clients leave.
func (r *Run) Close() {
	if r.swarm != nil {
		r.swarm.stop()
	}
}

// waitConnected waits until all clients are in a session.
func (r *Run) waitConnected(ctx context.Context) error {
	timeout := time.NewTimer(r.o.ConnectTimeout)
	defer timeout.Stop()
	for int(r.swarm.live.Load()) < r.o.Sessions {
		select {
		case <-r.swarm.change:
		case <-timeout.C:
			return fmt.Errorf("%d of %d sessions connected within %v%s", r.swarm.live.Load(), r.o.Sessions, r.o.ConnectTimeout, r.swarm.why())
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// publish publishes all events and, meanwhile, cuts connections.
func (r *Run) publish(ctx context.Context) error {
	if r.o.Events == 0 {
		return nil
	}
	channel := r.o.Channel
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
	cuts := make(chan struct{}, r.o.Resumes)
	cutter.Go(func() { r.cut(ctx, cuts) })
	answered := r.cutPlan(cuts)
	start := time.Now()
	for i := range r.o.Publishers {
		p := &publisher{
			guild: r.guild, auditor: r.auditor, number: i, of: r.o.Publishers, total: r.o.Events, batch: r.o.Batch, rate: r.o.Rate,
			again: r.o.Again, abandon: r.o.Abandon, finish: r.finish, status: r.status,
			took: func(d time.Duration) { r.acks.add(i, d) },
			run:  r.swarm.runID, token: r.o.PublishToken, event: r.o.Event, channel: channel, size: r.o.Payload, answered: answered,
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
func (r *Run) cutPlan(cuts chan<- struct{}) func(events int) {
	at := make([]int, r.o.Resumes)
	for i := range at {
		at[i] = 1 + rand.IntN(r.o.Events) //nolint:gosec // any will do
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
func (r *Run) cut(ctx context.Context, cuts <-chan struct{}) {
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
func (r *Run) waitSettled(ctx context.Context) error {
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
		if time.Since(moved) > r.o.Settle {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if away := r.o.Sessions - int(r.swarm.live.Load()); away > 0 {
		return fmt.Errorf("%d sessions did not come back%s", away, r.swarm.why())
	}
	return nil
}

// Report is the verdict on what was seen up to now, err what kept the run from its end. An end of ctx is
// an interrupt.
func (r *Run) Report(ctx context.Context, err error) Report {
	v := r.auditor.Verdict(err == nil)
	rep := Report{
		Audit: AuditClean, Sessions: r.o.Sessions, Events: r.auditor.Acknowledged(),
		Deliveries: v.Deliveries, Lost: v.Lost, Doubled: v.Doubled, Reordered: v.Reordered, Corrupted: v.Corrupted,
		Refuted: v.Refuted, Invalidated: v.Invalidated,
		CPUSeconds: seconds(cpu()), Problems: v.Problems,
	}
	if r.swarm != nil {
		rep.Sessions = r.Live()
		rep.Resumed, rep.Reidentified = r.swarm.resumed.Load(), r.swarm.reidentified.Load()
		p := r.swarm.latency.percentiles(0.5, 0.99)
		rep.P50, rep.P99 = milliseconds(p[0]), milliseconds(p[1])
		p = r.acks.percentiles(0.5, 0.99)
		rep.AckP50, rep.AckP99 = milliseconds(p[0]), milliseconds(p[1])
		p = r.swarm.away.percentiles(0.5, 0.99)
		rep.ResumeP50, rep.ResumeP99 = milliseconds(p[0]), milliseconds(p[1])
	}
	end := r.settled
	if end.IsZero() {
		end = time.Now()
	}
	if !r.connected.IsZero() {
		rep.ConnectSeconds = seconds(r.connected.Sub(r.begun))
		rep.Seconds = seconds(end.Sub(r.connected))
	}
	switch {
	case ctx.Err() != nil && err != nil:
		rep.Audit = AuditInterrupted
	case err != nil:
		rep.Audit, rep.Error = AuditFailed, err.Error()
	case !v.Clean():
		rep.Audit = AuditFailed
	}
	return rep
}

// status is the exit status of a run that ended with err.
func (r Report) status(err error) int {
	_, setup := errors.AsType[*setupError](err)
	switch {
	case r.Audit == AuditClean:
		return exitClean
	case r.Audit == AuditInterrupted:
		return exitInterrupted
	case setup:
		return exitUsage
	}
	return exitFailed
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

// Figures prints how the run goes: one line that is written over on a terminal, a line every two
// seconds otherwise.
func (r *Run) Figures(w io.Writer, terminal bool) (stop func()) {
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
		of := ""
		if r.o.Events < math.MaxInt32 {
			of = fmt.Sprint("/", r.o.Events)
		}
		at := time.Now()
		show := func() {
			v, acked := r.auditor.Counts(), r.auditor.Acknowledged()
			now := time.Now()
			rate := 1 / max(now.Sub(at).Seconds(), 1e-3)
			p := r.swarm.latency.percentiles(0.5, 0.99)
			behind, _ := r.swarm.behind(r.auditor.Last())
			line := fmt.Sprintf("%5.1fs  sessions %d/%d  events %d%s %.0f/s  deliveries %d %.0f/s  p50 %.1f p99 %.1f ms  behind %d  resumed %d reidentified %d  doubled %d reordered %d corrupted %d invalidated %d",
				now.Sub(r.begun).Seconds(), r.swarm.live.Load(), r.o.Sessions, acked, of, float64(acked-events)*rate,
				v.Deliveries, float64(v.Deliveries-before.Deliveries)*rate, milliseconds(p[0]), milliseconds(p[1]),
				behind, r.swarm.resumed.Load(), r.swarm.reidentified.Load(), v.Doubled, v.Reordered, v.Corrupted, v.Invalidated)
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
