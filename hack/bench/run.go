package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// scenarios are what can be measured. The first two are modes of every system, and names in the CSV file.
var scenarios = []string{fixed, flatOut, "storm", "stuck", "quiet"}

const (
	fixed   = "fixed"
	flatOut = "max"

	warmUp = 500 * time.Millisecond
)

type options struct {
	shardserver  string
	sessions     []int
	rounds       int
	rate         float64 // deliveries per second of the fixed mode
	length       time.Duration
	settle       time.Duration // how long the server is left alone before its memory is read
	only         []string      // scenarios
	systems      []string
	csv, picture string
	stormCSV     string
}

func (o *options) has(system string) bool {
	return o.systems == nil || slices.Contains(o.systems, system)
}

func runCommand(ctx context.Context, args []string) error {
	o := options{sessions: []int{1000, 5000, 15000}, rounds: 3, settle: 1500 * time.Millisecond, only: scenarios}
	f := flag.NewFlagSet("bench run", flag.ContinueOnError)
	f.StringVar(&o.shardserver, "shardserver", "", "the shard server's binary")
	f.IntVar(&o.rounds, "rounds", o.rounds, "how often everything is measured; medians count")
	f.Func("sessions", "numbers of sessions, with commas between (default 1000,5000,15000)", func(s string) error {
		o.sessions = nil
		for field := range strings.SplitSeq(s, ",") {
			n, err := strconv.Atoi(strings.TrimSpace(field))
			if err != nil || n < 1 || n > 18000 {
				return errors.New("expected numbers from 1 to 18000")
			}
			o.sessions = append(o.sessions, n)
		}
		return nil
	})
	f.Float64Var(&o.rate, "rate", 20000, "deliveries per second of the fixed mode")
	f.DurationVar(&o.length, "length", 3*time.Second, "how long each measurement publishes")
	f.Func("systems", "names of systems, with commas between (default all)", func(s string) error {
		o.systems = strings.Split(s, ",")
		for _, name := range o.systems {
			if !slices.ContainsFunc(systems, func(s system) bool { return s.name == name }) {
				return fmt.Errorf("no system %q", name)
			}
		}
		return nil
	})
	f.Func("only", "scenarios, with commas between (default "+strings.Join(scenarios, ",")+")", func(s string) error {
		o.only = strings.Split(s, ",")
		for _, name := range o.only {
			if !slices.Contains(scenarios, name) {
				return errors.New("expected some of " + strings.Join(scenarios, ","))
			}
		}
		return nil
	})
	f.StringVar(&o.csv, "csv", "", "file to write the results of "+fixed+" and "+flatOut+" to")
	f.StringVar(&o.stormCSV, "storm-csv", "", "file to write the results of storms to")
	f.StringVar(&o.picture, "picture", "", "SVG file to draw the results into")
	if err := f.Parse(args); err != nil {
		return err
	}
	if o.shardserver == "" || o.rounds < 1 || o.rate <= 0 || o.length <= 0 || f.NArg() > 0 {
		return errors.New("expected --shardserver, at least one round, a rate and a length, and no arguments")
	}
	runtime.LockOSThread() // children end with the thread that started them
	results, err := runAll(ctx, o)
	if err != nil {
		return err
	}
	rows := summarize(results)
	printTables(os.Stdout, rows)
	printBars(os.Stdout, bars(results))
	if o.csv != "" {
		if err := writeCSV(o.csv, rows); err != nil {
			return err
		}
	}
	if o.stormCSV != "" {
		if err := writeStormCSV(o.stormCSV, rows); err != nil {
			return err
		}
	}
	if o.picture != "" {
		return os.WriteFile(o.picture, draw(rows), 0o644) //nolint:gosec // part of the documentation
	}
	return nil
}

// result is one measurement of one system; what a scenario does not measure is 0.
type result struct {
	system   string
	sessions int
	mode     string // fixed, flatOut, or a part of another scenario

	perCPUSecond, perSecond, framesPerWrite, p50, p99 float64
	rssEmpty                                          float64 // KB of the process without sessions
	rssIdle, rssLoaded                                float64 // KB per connection
	softirq, others                                   float64 // cores: the machine's, and what other processes used

	frameBytes     float64 // of an event, as the client receives it
	allocations    float64 // for each delivery, of all that the process does; Guildhall's alone
	perSession     float64 // microseconds of CPU
	seconds        float64 // until all sessions are connected
	resident       float64 // MB of the process
	lagging, stuck float64 // sessions that do not read: by the server's metrics, and in truth

	counted float64 // deliveries by the server's own count, less those that arrived
}

// runAll measures everything, round by round; each round begins with another system.
func runAll(ctx context.Context, o options) ([]result, error) {
	var list []*system
	for i := range systems {
		if o.has(systems[i].name) {
			list = append(list, &systems[i])
		}
	}
	var results []result
	for round := range o.rounds {
		add := func(what string, n int, rs []result, err error) error {
			if err != nil {
				return errors.Join(ctx.Err(), fmt.Errorf("%s with %d sessions: %w", what, n, err))
			}
			for i := range rs {
				rs[i].sessions = n
				progress(o, round, rs[i])
			}
			results = append(results, rs...)
			return nil
		}
		for _, n := range o.sessions {
			for i := range list {
				s := list[(i+round)%len(list)]
				rs, err := modes(ctx, o, s, n)
				if err := add(s.name, n, rs, err); err != nil {
					return nil, err
				}
				if last := len(rs) - 1; s.name == guildhallName && last >= 0 && rs[last].mode == flatOut {
					rs, err := floorAs(ctx, o, rs[last])
					if err := add(floorSame, n, rs, err); err != nil {
						return nil, err
					}
				}
			}
		}
		for _, s := range sideScenarios {
			if slices.Contains(o.only, s.name) && o.has(guildhallName) {
				n := min(slices.Max(o.sessions), s.most)
				rs, err := s.run(ctx, o, n, round)
				if err := add(s.name, n, rs, err); err != nil {
					return nil, err
				}
			}
		}
	}
	return results, nil
}

// progress tells of a result as it comes.
func progress(o options, round int, r result) {
	fmt.Fprintf(os.Stderr, "%6.0fs  round %d/%d  %5d  %-16s %-7s", time.Since(start).Seconds(), round+1, o.rounds, r.sessions, r.system, r.mode)
	if r.perSession > 0 {
		fmt.Fprintf(os.Stderr, "  %.1f us/session  %.1f s\n", r.perSession, r.seconds)
		return
	}
	fmt.Fprintf(os.Stderr, "  %7.0f/CPU-s  %7.0f/s  %4.1f frames/write  p50 %.1f p99 %.1f ms  %.1f KB idle  others %.2f cores\n",
		r.perCPUSecond, r.perSecond, r.framesPerWrite, r.p50, r.p99, r.rssIdle, r.others)
}

// modes starts a server, connects n sessions, and measures both modes.
func modes(ctx context.Context, o options, s *system, n int) ([]result, error) {
	var list []string
	for _, mode := range []string{fixed, flatOut} {
		if slices.Contains(o.only, mode) && (mode == flatOut || !s.flatOutOnly) {
			list = append(list, mode)
		}
	}
	if len(list) == 0 {
		return nil, nil
	}
	server, err := startServer(ctx, s, o.shardserver, 1)
	if err != nil {
		return nil, err
	}
	defer server.end()
	pause(ctx, o.settle)
	empty, err := server.rss()
	if err != nil {
		return nil, err
	}
	clients, err := server.startClients(ctx, s, n)
	if err != nil {
		return nil, err
	}
	defer clients.end()
	pause(ctx, o.settle)
	idle, err := server.rss()
	if err != nil {
		return nil, err
	}
	if _, err := clients.ask(phase{Length: warmUp}); err != nil {
		return nil, err
	}
	var results []result
	for _, mode := range list {
		p := phase{Length: o.length}
		if mode == fixed {
			p.Rate = o.rate / float64(n)
		}
		r, err := measure(ctx, server, clients, p)
		if err != nil {
			return nil, fmt.Errorf("mode %s: %w", mode, err)
		}
		// A write is counted after it, so the last ones may be missing.
		if math.Abs(r.counted) > 1000 {
			return nil, fmt.Errorf("mode %s: the server counts %+.0f events more than clients received", mode, r.counted)
		}
		r.system, r.mode = s.name, mode
		r.rssEmpty, r.rssIdle = empty, (idle-empty)/float64(n)
		results = append(results, r)
	}
	pause(ctx, o.settle)
	loaded, err := server.rss()
	if err != nil {
		return nil, err
	}
	for i := range results {
		results[i].rssLoaded = (loaded - empty) / float64(n)
	}
	return results, nil
}

// floorSame is the bare loop with the frames of Guildhall: as many in a write, and as long.
const floorSame = "floor-same"

func floorAs(ctx context.Context, o options, r result) ([]result, error) {
	s, err := systemNamed(fmt.Sprintf("floor-%.3f", min(max(r.framesPerWrite, 1), window)))
	if err != nil {
		return nil, err
	}
	s.payload = int(math.Round(r.frameBytes)) - len(frameHeader(payloadSize))
	rs, err := modes(ctx, o, s, r.sessions)
	for i := range rs {
		rs[i].system = floorSame
	}
	return rs, err
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// sample is what the kernel, or Guildhall itself, has counted so far.
type sample struct {
	server, clients float64 // CPU seconds
	machine         machine
	at              time.Time
	counters
}

func take(ctx context.Context, s *server, c *clients) (m sample, err error) {
	var errs [5]error
	m.at = time.Now()
	m.server, errs[0] = s.cpu()
	m.clients, errs[1] = c.cpu()
	m.machine, errs[2] = readMachine()
	m.writes, errs[3] = s.process.writes()
	if s.admin != "" {
		m.counters, errs[4] = guildhallCounters(ctx, s.admin)
	}
	return m, errors.Join(errs[:]...)
}

func measure(ctx context.Context, s *server, c *clients, p phase) (r result, err error) {
	before, err := take(ctx, s, c)
	if err != nil {
		return r, err
	}
	a, err := c.ask(p)
	if err != nil {
		return r, err
	}
	after, err := take(ctx, s, c)
	if err != nil {
		return r, err
	}
	kb, err := s.rss()
	if err != nil {
		return r, err
	}
	r.resident = kb / 1024
	elapsed := after.at.Sub(before.at).Seconds()
	deliveries := float64(a.Deliveries)
	if s.admin != "" {
		r.counted = after.deliveries - before.deliveries - deliveries
		r.allocations = (after.allocations - before.allocations) / deliveries
		r.lagging = after.lagging
	}
	cpu := after.server - before.server
	r.perCPUSecond = deliveries / cpu
	r.frameBytes = float64(a.Bytes) / deliveries
	r.perSecond = deliveries / a.Seconds
	r.framesPerWrite = deliveries / (after.writes - before.writes)
	r.p50, r.p99 = a.P50, a.P99
	r.softirq = (after.machine.softirq - before.machine.softirq) / elapsed
	busy := after.machine.busy - before.machine.busy
	r.others = max(busy-cpu-(after.clients-before.clients), 0) / elapsed
	return r, nil
}

// row is the medians of a system's results.
type row struct {
	result
	ratio  float64 // to the floor's deliveries per CPU-second
	spread float64 // of deliveries per CPU-second, (highest - lowest) / median
}

func summarize(results []result) []row {
	type key struct {
		sessions int
		mode     string
		system   string
	}
	groups := map[key][]result{}
	for _, r := range results {
		k := key{r.sessions, r.mode, r.system}
		groups[k] = append(groups[k], r)
	}
	var rows []row
	for k, g := range groups {
		of := func(f func(*result) *float64) float64 {
			values := make([]float64, len(g))
			for i := range g {
				values[i] = *f(&g[i])
			}
			return median(values)
		}
		r := row{result: result{system: k.system, sessions: k.sessions, mode: k.mode}}
		for _, f := range []func(*result) *float64{
			func(r *result) *float64 { return &r.perCPUSecond }, func(r *result) *float64 { return &r.perSecond },
			func(r *result) *float64 { return &r.framesPerWrite }, func(r *result) *float64 { return &r.p50 },
			func(r *result) *float64 { return &r.p99 }, func(r *result) *float64 { return &r.rssEmpty },
			func(r *result) *float64 { return &r.rssIdle }, func(r *result) *float64 { return &r.rssLoaded },
			func(r *result) *float64 { return &r.softirq }, func(r *result) *float64 { return &r.others },
			func(r *result) *float64 { return &r.perSession }, func(r *result) *float64 { return &r.seconds },
			func(r *result) *float64 { return &r.resident }, func(r *result) *float64 { return &r.lagging },
		} {
			*f(&r.result) = of(f)
		}
		var main []float64
		for _, m := range g {
			main = append(main, cmp.Or(m.perCPUSecond, m.perSession, m.p99))
		}
		r.spread = spread(main)
		rows = append(rows, r)
	}
	order := []string{floorSame, upgradeOnly.name, quietSystem} // behind the others
	for i := range systems {
		order = slices.Insert(order, i, systems[i].name)
	}
	slices.SortFunc(rows, func(a, b row) int {
		return cmp.Or(cmp.Compare(a.sessions, b.sessions), cmp.Compare(slices.Index(modeOrder, a.mode), slices.Index(modeOrder, b.mode)),
			cmp.Compare(slices.Index(order, a.system), slices.Index(order, b.system)))
	})
	var base row // the floor is the first of its group
	for i := range rows {
		if rows[i].system == floorName {
			base = rows[i]
		}
		if base.sessions == rows[i].sessions && base.mode == rows[i].mode {
			rows[i].ratio = rows[i].perCPUSecond / base.perCPUSecond
		}
	}
	return rows
}

// spread is (highest - lowest) / median.
func spread(values []float64) float64 {
	return (slices.Max(values) - slices.Min(values)) / median(values)
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// createFile makes a file and the folders on the way to it.
func createFile(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // a build folder
		return nil, err
	}
	return os.Create(path) //nolint:gosec // the caller names the file
}
