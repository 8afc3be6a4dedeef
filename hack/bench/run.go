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
	systems      []string
	csv, picture string
}

func runCommand(ctx context.Context, args []string) error {
	o := options{sessions: []int{1000, 5000, 15000}, rounds: 3, settle: 1500 * time.Millisecond}
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
			if _, err := systemNamed(name); err != nil {
				return err
			}
		}
		return nil
	})
	f.StringVar(&o.csv, "csv", "", "file to write the results to")
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
	printTable(os.Stdout, rows)
	if o.csv != "" {
		if err := writeCSV(o.csv, rows); err != nil {
			return err
		}
	}
	if o.picture != "" {
		return os.WriteFile(o.picture, draw(rows), 0o644) //nolint:gosec // part of the documentation
	}
	return nil
}

// result is one measurement of one system.
type result struct {
	system   string
	sessions int
	mode     string

	perCPUSecond, perSecond, framesPerWrite, p50, p99 float64
	rssEmpty                                          float64 // KB of the process without sessions
	rssIdle, rssLoaded                                float64 // KB per connection
	softirq, others                                   float64 // cores: the machine's, and what other processes used
}

// runAll measures everything, round by round; each round begins with another system.
func runAll(ctx context.Context, o options) ([]result, error) {
	var list []*system
	for i := range systems {
		if o.systems == nil || slices.Contains(o.systems, systems[i].name) {
			list = append(list, &systems[i])
		}
	}
	began := time.Now()
	var results []result
	for round := range o.rounds {
		for _, n := range o.sessions {
			for i := range list {
				s := list[(i+round)%len(list)]
				rs, err := runOne(ctx, o, s, n)
				if err != nil {
					return nil, errors.Join(ctx.Err(), fmt.Errorf("%s with %d sessions: %w", s.name, n, err))
				}
				for _, r := range rs {
					fmt.Fprintf(os.Stderr, "%6.0fs  round %d/%d  %5d  %-16s %-5s  %7.0f/CPU-s  %7.0f/s  %4.1f frames/write  p50 %.1f p99 %.1f ms  %.1f KB idle  others %.2f cores\n",
						time.Since(began).Seconds(), round+1, o.rounds, n, r.system, r.mode, r.perCPUSecond, r.perSecond, r.framesPerWrite,
						r.p50, r.p99, r.rssIdle, r.others)
				}
				results = append(results, rs...)
			}
		}
	}
	return results, nil
}

// runOne starts a server, connects n sessions, and measures both modes.
func runOne(ctx context.Context, o options, s *system, n int) ([]result, error) {
	dir, err := os.MkdirTemp("", "guildhall-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	server, err := startServer(ctx, s, o.shardserver, dir)
	if err != nil {
		return nil, err
	}
	defer server.end()
	pause(ctx, o.settle)
	empty, err := server.rss()
	if err != nil {
		return nil, err
	}
	clients, err := startClients(ctx, clientConfig{
		System: s.name, Sessions: n, Address: server.address, Publisher: server.publisher, Key: server.key, Guild: server.guild,
	})
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
	for _, mode := range []string{fixed, flatOut} {
		p := phase{Length: o.length}
		if mode == fixed {
			if s.flatOutOnly {
				continue
			}
			p.Rate = o.rate / float64(n)
		}
		r, err := measure(ctx, server, clients, p)
		if err != nil {
			return nil, fmt.Errorf("mode %s: %w", mode, err)
		}
		r.system, r.sessions, r.mode = s.name, n, mode
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

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// sample is what the kernel, or Guildhall itself, has counted so far.
type sample struct {
	server, clients    float64 // CPU seconds
	machine            machine
	at                 time.Time
	deliveries, writes float64
}

func take(ctx context.Context, s *server, c *clients) (m sample, err error) {
	var errs [5]error
	m.at = time.Now()
	m.server, errs[0] = s.cpu()
	m.clients, errs[1] = c.cpu()
	m.machine, errs[2] = readMachine()
	m.writes, errs[3] = s.process.writes()
	if s.admin != "" {
		m.deliveries, m.writes, errs[4] = guildhallCounters(ctx, s.admin)
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
	elapsed := after.at.Sub(before.at).Seconds()
	deliveries := float64(a.Deliveries)
	// A write is counted after it, so the last ones may be missing.
	if counted := after.deliveries - before.deliveries; s.admin != "" && math.Abs(counted-deliveries) > 1000 {
		return r, fmt.Errorf("clients received %.0f events, the server counts %.0f", deliveries, counted)
	}
	cpu := after.server - before.server
	r.perCPUSecond = deliveries / max(cpu, 1.0/ticks)
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
		} {
			*f(&r.result) = of(f)
		}
		compare := func(a, b result) int { return cmp.Compare(a.perCPUSecond, b.perCPUSecond) }
		r.spread = (slices.MaxFunc(g, compare).perCPUSecond - slices.MinFunc(g, compare).perCPUSecond) / r.perCPUSecond
		rows = append(rows, r)
	}
	place := func(name string) int { return slices.IndexFunc(systems, func(s system) bool { return s.name == name }) }
	slices.SortFunc(rows, func(a, b row) int {
		return cmp.Or(cmp.Compare(a.sessions, b.sessions), cmp.Compare(a.mode, b.mode), cmp.Compare(place(a.system), place(b.system)))
	})
	var base row // the floor is the first of its group
	for i := range rows {
		if rows[i].system == systems[0].name {
			base = rows[i]
		}
		if base.sessions == rows[i].sessions && base.mode == rows[i].mode {
			rows[i].ratio = rows[i].perCPUSecond / base.perCPUSecond
		}
	}
	return rows
}

func median(values []float64) float64 {
	slices.Sort(values)
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
