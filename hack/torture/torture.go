package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"guildhall.dev/guildhall/hack/load/generator"
)

const (
	minDelay = 50 * time.Millisecond
	// earlyEvery is how many kills there are for one that comes before the server serves.
	earlyEvery = 10
	// earlyWithin is when that comes at the latest.
	earlyWithin = 200 * time.Millisecond
	// restEvery is after how many of the things done to the server all sessions have to be there.
	restEvery = 20
	diskSize  = 512 << 20
	// keptFree is what a shard server keeps free of it: of one so small, an eighth.
	keptFree = diskSize / 8
)

// deed is something that is done to the server.
type deed int

const (
	kill deed = iota
	killEarly
	term
	stop
	full
	readOnly
)

// plan is what is done, in its order.
func (o options) plan(random *rand.Rand) []deed {
	early := o.kills / earlyEvery
	var deeds []deed
	for d, n := range map[deed]int{kill: o.kills - early, killEarly: early, term: o.terms, stop: o.stops, full: o.full, readOnly: o.readOnly} {
		deeds = append(deeds, slices.Repeat([]deed{d}, n)...)
	}
	slices.Sort(deeds) // the map's order is not the seed's
	random.Shuffle(len(deeds), func(i, j int) { deeds[i], deeds[j] = deeds[j], deeds[i] })
	return deeds
}

// tormentor is a run.
type tormentor struct {
	options
	random  *rand.Rand
	shard   *shard
	disk    *disk // nil when the directory is on the real one
	load    *generator.Run
	probe   *probe
	report  report
	times   []time.Duration // from start to serving
	other   string          // address for a second server
	release func()          // of both
	copied  string          // for controlRollback: the old copy
	stderr  io.Writer
}

// torture does a whole run.
func torture(ctx context.Context, o options, stderr io.Writer, terminal bool) report {
	t := &tormentor{options: o, random: rand.New(rand.NewPCG(o.seed, 0)), stderr: stderr} //nolint:gosec // to be repeatable
	t.report.Seed = o.seed
	fmt.Fprintf(stderr, "seed %d\n", o.seed)
	err := t.prepare()
	if err == nil {
		err = t.run(ctx, terminal)
	}
	rep := &t.report
	switch {
	case t.load == nil:
		rep.Audit = generator.AuditFailed
		if err != nil {
			rep.Error = err.Error()
		}
	case err != nil && rep.Audit == "":
		rep.Report = t.load.Report(ctx, err)
	}
	if err != nil && rep.Audit == generator.AuditClean {
		rep.Audit, rep.Error = generator.AuditFailed, err.Error()
	}
	if t.load != nil {
		rep.Statuses = t.load.Statuses()
		t.load.Close()
	}
	slices.Sort(t.times)
	if n := len(t.times); n > 0 {
		rep.RestartP50, rep.RestartP99, rep.RestartMax = milliseconds(t.times[n/2]), milliseconds(t.times[n*99/100]), milliseconds(t.times[n-1])
	}
	if t.shard != nil {
		t.shard.gone()
		t.release()
	}
	t.remove()
	return *rep
}

func milliseconds(d time.Duration) float64 { return math.Round(d.Seconds()*1e6) / 1000 }

func (t *tormentor) prepare() (err error) {
	if t.dir == "" {
		if t.dir, err = os.MkdirTemp("", "torture-*"); err != nil {
			return err
		}
	} else if err := errors.Join(os.RemoveAll(t.dir), os.MkdirAll(t.dir, 0o700)); err != nil {
		return err
	}
	if t.dir, err = filepath.Abs(t.dir); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(t.dir, "server.log"))
	if err != nil {
		return err
	}
	spec := ""
	if t.damages > 0 {
		spec = keepAll
	}
	s, release, err := newShard(t.dir, t.shardserver, spec, log)
	if err != nil {
		return err
	}
	t.shard, t.release = s, release
	other, release2, err := reserve()
	if err != nil {
		return err
	}
	t.other, t.release = other, func() { release(); release2() }
	switch {
	case t.control == controlMemory:
		s.data = ""
	case t.full+t.readOnly > 0:
		mount := filepath.Join(t.dir, "disk")
		if t.disk, err = newDisk(mount, diskSize); err != nil {
			return err
		}
		s.data = filepath.Join(mount, "data")
	}
	return nil
}

// remove leaves nothing behind when all went well, and otherwise what helps to find out why not.
func (t *tormentor) remove() {
	var err error
	switch {
	case t.report.Audit == generator.AuditClean:
		if t.disk != nil {
			err = t.disk.close()
		}
		if err == nil {
			err = os.RemoveAll(t.dir)
		}
	case t.disk != nil:
		if t.shard.data != "" {
			err = os.CopyFS(filepath.Join(t.dir, "data"), os.DirFS(t.shard.data))
		}
		err = errors.Join(err, t.disk.close())
		fallthrough
	default:
		fmt.Fprintf(t.stderr, "kept: %s\n", t.dir)
	}
	if err != nil {
		fmt.Fprintln(t.stderr, "torture:", err)
	}
}

// run does everything between the first start and the last end.
func (t *tormentor) run(outer context.Context, terminal bool) error {
	ctx, fail := context.WithCancelCause(outer)
	defer fail(nil)
	if err := t.restart(ctx); err != nil {
		return err
	}
	o := generator.Defaults()
	o.URL, o.Tokens.KeysDir, o.Spread, o.Durable = t.shard.url(), t.shard.keys, true, true
	o.Sessions, o.Publishers, o.Batch, o.Rate, o.Payload, o.Events = t.sessions, t.publishers, t.batch, t.rate, t.payload, math.MaxInt32
	o.Again, o.Abandon = 0.05, 0.25
	var err error
	if t.load, err = generator.New(ctx, o); err != nil {
		return err
	}
	if t.damages > 0 {
		if t.probe, err = newProbe(ctx, t.shard.url(), t.shard.keys); err != nil {
			return err
		}
	}
	if err := t.load.Connect(ctx, fail); err != nil {
		return err
	}
	figures := t.load.Figures(t.stderr, terminal)
	published := make(chan struct{})
	go func() {
		defer close(published)
		if err := t.load.Publish(ctx); err != nil {
			fail(err)
		}
	}()
	err = t.torment(ctx)
	if err == nil {
		err = t.finish(ctx, published)
	} else {
		fail(err)
		<-published
	}
	figures()
	if err == nil {
		err = context.Cause(ctx)
	}
	t.report.Report = t.load.Report(outer, err)
	if err == nil && t.damages > 0 {
		return t.damage(ctx)
	}
	return err
}

// torment does to the server what is planned.
func (t *tormentor) torment(ctx context.Context) error {
	plan := t.plan(t.random)
	for i, d := range plan {
		if i%restEvery == restEvery-1 {
			if err := t.rest(ctx); err != nil {
				return err
			}
			fmt.Fprintf(t.stderr, "%d of %d done to the server\n", i, len(plan))
		}
		if err := t.serve(ctx, t.delay(minDelay, t.within)); err != nil {
			return err
		}
		if v := t.load.Faults(); !v.Clean() && t.control == "" {
			return errors.New("the audit has found faults already")
		}
		if err := t.do(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

func (t *tormentor) do(ctx context.Context, d deed) error {
	t.load.Disturb()
	switch d {
	case kill:
		t.report.Kills++
		if err := t.shard.kill(); err != nil {
			return err
		}
		if err := t.rollback(); err != nil {
			return err
		}
		return t.restart(ctx)
	case killEarly:
		t.report.Kills++
		t.report.EarlyKills++
		return t.killEarly(ctx)
	case term:
		t.report.Terms++
		if err := t.shard.end(); err != nil {
			return err
		}
		return t.restart(ctx)
	case stop:
		t.report.Stops++
		return t.stop(ctx)
	case full:
		t.report.Full++
		return t.fill(ctx)
	default:
		t.report.ReadOnly++
		return t.startReadOnly(ctx)
	}
}

func (t *tormentor) delay(from, to time.Duration) time.Duration {
	return from + time.Duration(t.random.Int64N(int64(to-from)+1))
}

// serve lets the server serve so long.
func (t *tormentor) serve(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.shard.ended:
		return t.shard.unexpected()
	case <-time.After(d):
		return nil
	}
}

// until waits for something that the server brings about.
func (t *tormentor) until(ctx context.Context, what string, ok func() bool) error {
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v: %s", patience, what)
		}
		if err := t.serve(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// restart starts the server and waits until it serves.
func (t *tormentor) restart(ctx context.Context) error {
	if err := t.shard.start(); err != nil {
		return err
	}
	took, err := t.shard.serving(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	t.times = append(t.times, took)
	return nil
}

// rest waits until all sessions are there and something new was published.
func (t *tormentor) rest(ctx context.Context) error {
	acknowledged := t.load.Acknowledged()
	return t.until(ctx, "all sessions back, and something published", func() bool {
		return t.load.Live() == t.sessions && t.load.Acknowledged() > acknowledged
	})
}

// finish lets publishers come to their end and sessions receive everything.
func (t *tormentor) finish(ctx context.Context, published <-chan struct{}) error {
	if err := t.rest(ctx); err != nil {
		return err
	}
	t.load.Finish()
	select {
	case <-published:
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	case <-time.After(patience):
		return errors.New("publishers are not answered")
	case <-t.shard.ended:
		return t.shard.unexpected()
	}
	return t.load.Settle(ctx)
}

// killEarly kills the server twice, the second time before it serves.
func (t *tormentor) killEarly(ctx context.Context) error {
	if err := t.shard.kill(); err != nil {
		return err
	}
	if err := t.shard.start(); err != nil {
		return err
	}
	if err := t.serve(ctx, t.delay(0, earlyWithin)); err != nil {
		return err
	}
	if err := t.shard.kill(); err != nil {
		return err
	}
	return t.restart(ctx)
}

// rollback is controlRollback: at the first kill it copies the directory, which takes the place of the one
// that the last kill leaves.
func (t *tormentor) rollback() error {
	if t.control != controlRollback {
		return nil
	}
	if t.copied == "" {
		t.copied = filepath.Join(t.dir, "copy")
		return os.CopyFS(t.copied, os.DirFS(t.shard.data))
	}
	if t.report.Kills < t.kills {
		return nil
	}
	return errors.Join(os.RemoveAll(t.shard.data), os.CopyFS(t.shard.data, os.DirFS(t.copied)))
}

// stop stops the process, makes sure that no other one can have the directory meanwhile, and lets it go
// on or, in one case of three, kills it.
func (t *tormentor) stop(ctx context.Context) error {
	long := t.delay(t.stopTime, t.stopTime*3/2)
	begun := time.Now()
	if err := t.shard.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	second := *t.shard
	second.address = t.other
	if err := second.start(); err != nil {
		return err
	}
	defer second.gone()
	if err := t.serve(ctx, time.Until(begun.Add(long))); err != nil {
		return err
	}
	if !second.tail.says("another process") || second.answers() {
		return errors.New("while another server has the directory: the second one does not say so, or serves: " + second.tail.text())
	}
	second.gone()
	if t.random.IntN(3) == 0 {
		if err := t.shard.kill(); err != nil {
			return err
		}
		return t.restart(ctx)
	}
	if err := t.shard.signal(syscall.SIGCONT); err != nil {
		return err
	}
	return t.rest(ctx)
}

// refuses checks that a server ends by itself instead of serving, and says why.
func (s *shard) refuses(ctx context.Context, why string) error {
	if err := s.start(); err != nil {
		return err
	}
	select {
	case <-s.ended:
	case <-time.After(patience):
		s.gone()
		return errors.New("the server did not refuse to start: " + s.tail.text())
	case <-ctx.Done():
		s.gone()
		return context.Cause(ctx)
	}
	if s.err == nil || !s.tail.says(why) {
		return fmt.Errorf("the server ended with status %d and did not say %q: %s", s.cmd.ProcessState.ExitCode(), why, s.tail.text())
	}
	return nil
}

// fill takes the server's disk away for a while, in one case of two with a restart meanwhile.
func (t *tormentor) fill(ctx context.Context) error {
	leave := []int64{0, keptFree / 4, keptFree * 3 / 4}[t.random.IntN(3)]
	before := t.load.Statuses()[507]
	if err := t.disk.fill(leave); err != nil {
		return err
	}
	what := func(s string) string { return fmt.Sprintf("with %d MiB free: %s", leave>>20, s) }
	if err := t.until(ctx, what("publishers answered 507"), func() bool { return t.load.Statuses()[507] > before }); err != nil {
		return err
	}
	// Readers are served: sessions come back.
	resumed, cut := t.load.Resumed(), uint64(0)
	for range max(t.sessions/10, 1) {
		if t.load.Cut() {
			cut++
		}
	}
	if err := t.until(ctx, what("sessions back"), func() bool {
		return t.load.Live() == t.sessions && t.load.Resumed() >= resumed+cut
	}); err != nil {
		return err
	}
	refused := false
	if t.random.IntN(2) == 0 {
		t.load.Disturb()
		if err := t.shard.kill(); err != nil {
			return err
		}
		err := t.restart(ctx)
		if _, ok := errors.AsType[*refusal](err); ok {
			refused = t.shard.tail.says("full")
		}
		if err != nil && !refused {
			return fmt.Errorf("with %d MiB free: %w", leave>>20, err)
		}
	}
	if err := t.disk.drain(); err != nil {
		return err
	}
	if refused {
		if err := t.restart(ctx); err != nil {
			return fmt.Errorf("after the disk was full: %w", err)
		}
	}
	return t.rest(ctx)
}

// startReadOnly starts the server on a read-only file system.
func (t *tormentor) startReadOnly(ctx context.Context) error {
	if err := t.shard.kill(); err != nil {
		return err
	}
	if err := t.disk.readOnly(true); err != nil {
		return err
	}
	err := t.shard.refuses(ctx, "read-only file system")
	if err := errors.Join(err, t.disk.readOnly(false)); err != nil {
		return fmt.Errorf("read-only: %w", err)
	}
	return t.restart(ctx)
}
