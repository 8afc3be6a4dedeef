package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// bar is what Guildhall has to reach, with what each round measured of it.
type bar struct {
	what     string
	sessions int
	limit    float64
	atLeast  bool // or else at most
	rounds   []float64
}

func (b bar) met() bool {
	if b.atLeast {
		return median(b.rounds) >= b.limit
	}
	return median(b.rounds) <= b.limit
}

// The bars, as they were agreed on. What differs by less than noise is unchanged.
const (
	barFixed, barSame, barFloor, barPeers = 0.90, 0.85, 6.0, 5.0
	barP99                                = 500 // ms
	barIdle, barLoaded, barEmpty          = 3.0, 1.2, 64.0
	barAllocations                        = 0.05 // of a whole process, in which 0 cannot be
	barStorm                              = 100.0
	barStuck, barStuckMemory              = 1.3, 32.0 // twice what a guild's history takes, since the collector leaves as much again
	barGrowth                             = 1.1
	barUnchanged                          = 0.85
	barQuiet                              = 50 // ms
	barPeersFrom, barFloorFrom            = 5000, 15000
)

// bars are those of which the results tell something.
func bars(results []result) []bar {
	// of is a figure in each round; nil when it was not measured. Rounds are in order.
	of := func(system string, n int, mode string, f func(result) float64) (values []float64) {
		for _, r := range results {
			if r.system == system && r.sessions == n && r.mode == mode {
				values = append(values, f(r))
			}
		}
		return values
	}
	speed := func(r result) float64 { return r.perCPUSecond }
	p99 := func(r result) float64 { return r.p99 }
	own := func(n int, mode string, f func(result) float64) []float64 { return of(guildhallName, n, mode, f) }
	toFloor := func(n int, mode string) []float64 {
		return each(quotient, own(n, mode, speed), of(floorName, n, mode, speed))
	}
	var counts []int
	for _, r := range results {
		counts = append(counts, r.sessions)
	}
	slices.Sort(counts)
	counts = slices.Compact(counts)

	var list []bar
	add := func(what string, n int, atLeast bool, limit float64, rounds []float64) {
		if len(rounds) > 0 {
			list = append(list, bar{what: what, sessions: n, limit: limit, atLeast: atLeast, rounds: rounds})
		}
	}
	for _, n := range counts {
		add("fixed: deliveries per CPU-second, in floors", n, true, barFixed, toFloor(n, fixed))
	}
	for _, n := range counts {
		add("flat out: of the bare loop with the same frames per write", n, true, barSame,
			each(quotient, own(n, flatOut, speed), of(floorSame, n, flatOut, speed)))
	}
	for _, n := range counts {
		if n >= barFloorFrom {
			add("flat out: deliveries per CPU-second, in floors", n, true, barFloor, toFloor(n, flatOut))
			add("flat out: p99 ms", n, false, barP99, own(n, flatOut, p99))
		}
		if n >= barPeersFrom {
			for _, s := range systems {
				if s.serve != nil && !strings.HasPrefix(s.name, floorName) {
					add("flat out: times "+s.name, n, true, barPeers, each(quotient, own(n, flatOut, speed), of(s.name, n, flatOut, speed)))
				}
			}
		}
	}
	for _, n := range counts {
		mode := flatOut
		if own(n, mode, speed) == nil {
			mode = fixed
		}
		idle := own(n, mode, func(r result) float64 { return r.rssIdle })
		add("memory: KB per idle session", n, false, barIdle, idle)
		add("memory: after load, of idle", n, false, barLoaded, each(quotient, own(n, mode, func(r result) float64 { return r.rssLoaded }), idle))
		add("memory: MB without sessions", n, false, barEmpty, own(n, mode, func(r result) float64 { return r.rssEmpty / 1024 }))
	}
	for _, n := range counts {
		add("stuck readers: p99 of the others, of that without", n, false, barStuck, each(quotient, own(n, someStuck, p99), own(n, allRead, p99)))
		resident := func(r result) float64 { return r.resident }
		add("stuck readers: MB more", n, false, barStuckMemory, each(difference, own(n, someStuck, resident), own(n, allRead, resident)))
		add("stuck readers: shown, of all", n, true, 1, own(n, someStuck, func(r result) float64 { return r.lagging / r.stuck }))
		for _, mode := range []string{connecting, resuming} {
			cpu := func(r result) float64 { return r.perSession }
			add("storm: us of CPU to "+mode+", beyond an upgrade", n, false, barStorm,
				each(difference, own(n, mode, cpu), of(upgradeOnly.name, n, mode, cpu)))
		}
	}
	if len(counts) > 0 {
		most := counts[len(counts)-1]
		add("flat out: allocations per delivery, whole process", most, false, barAllocations,
			own(most, flatOut, func(r result) float64 { return r.allocations }))
		if least := counts[0]; least < most {
			add(fmt.Sprintf("growth: CPU per event from %d sessions, of the floor's", least), most, false, barGrowth,
				each(quotient, toFloor(least, fixed), toFloor(most, fixed)))
		}
	}
	for _, n := range counts {
		add("quiet guilds: deliveries per CPU-second beside them", n, true, barUnchanged,
			each(quotient, own(n, withQuiet, speed), own(n, alone, speed)))
		add("quiet guilds: p99 ms", n, false, barQuiet, of(quietSystem, n, withQuiet, p99))
	}
	return list
}

func quotient(a, b float64) float64   { return a / b }
func difference(a, b float64) float64 { return a - b }

// each is f of a and b, round by round; nil unless there are both.
func each(f func(a, b float64) float64, a, b []float64) []float64 {
	var values []float64
	for i := range min(len(a), len(b)) {
		values = append(values, f(a[i], b[i]))
	}
	return values
}

func printBars(w io.Writer, bars []bar) {
	if len(bars) == 0 {
		return
	}
	fmt.Fprintln(w, "\n| bar | sessions | wanted | measured | lowest | highest | |")
	fmt.Fprintln(w, "| --- | ---: | ---: | ---: | ---: | ---: | --- |")
	for _, b := range bars {
		wanted, verdict := "at most", "missed"
		if b.atLeast {
			wanted = "at least"
		}
		if b.met() {
			verdict = "met"
		}
		fmt.Fprintf(w, "| %s | %d | %s %g | %.3g | %.3g | %.3g | %s |\n", b.what, b.sessions, wanted, b.limit, median(b.rounds),
			slices.Min(b.rounds), slices.Max(b.rounds), verdict)
	}
}
