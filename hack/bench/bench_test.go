package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"testing"
	"time"
)

// TestMain lets the test binary be the children that it starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "server" || os.Args[1] == "client") {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestEverySystemDelivers(t *testing.T) {
	o := options{
		sessions: []int{20}, rounds: 1, rate: 2000, length: 200 * time.Millisecond, settle: 10 * time.Millisecond,
		only: []string{fixed, flatOut},
	}
	for _, s := range systems {
		if s.serve != nil { // the shard server's binary is not built here
			o.systems = append(o.systems, s.name)
		}
	}
	results, err := runAll(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	storm, err := storm(context.Background(), o, upgradeOnly.name, 20)
	if err != nil || len(storm) != 2 || storm[0].perSession <= 0 || storm[1].perSession <= 0 {
		t.Errorf("storm: %+v, %v", storm, err)
	}
	rows := summarize(append(results, storm...))
	for _, r := range inModes(rows, fixed, flatOut) {
		if r.perSecond < 100 || r.p99 < r.p50 || r.rssEmpty <= 0 {
			t.Errorf("%s %s: %+v", r.system, r.mode, r)
		}
		if r.system == "floor" && (r.ratio != 1 || math.Abs(r.framesPerWrite-1) > 0.2) {
			t.Errorf("floor: ratio %v, %v frames per write", r.ratio, r.framesPerWrite)
		}
	}
	decoder := xml.NewDecoder(bytes.NewReader(draw(rows)))
	for {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal("picture:", err)
		}
	}
}

// A client that is sent a wrong number says so.
func TestClientChecksNumbers(t *testing.T) {
	event := func(seq uint64) []byte {
		return append(appendHex(appendHex([]byte("{"+marker), seq), clock()), `"}`...)
	}
	for _, order := range [][]uint64{{2}, {1, 1}, {1, 3}, {1, 2, 3, 4}} {
		for _, readers := range []int{2, 0} { // all, or all stuck
			c := &client{config: clientConfig{Guilds: 1}, sessions: make([]session, 2), readers: readers, published: 3}
			c.sessions[0].next = 1
			var err error
			for _, seq := range order {
				err = errors.Join(err, c.message(0, event(seq), clock()))
			}
			if err == nil {
				t.Errorf("events %v: expected an error", order)
			}
		}
	}
}

// The floor's batches have the wanted mean, and differ by one at most.
func TestBatchSize(t *testing.T) {
	for _, k := range []float64{1, 7.125, 16, 26.7, 32} {
		sum := 0
		for n := 1; n <= 1000; n++ {
			size := batchSize(k, n)
			if sum += size; size < int(k) || size > int(math.Ceil(k)) {
				t.Fatalf("%v frames per write: batch of %d", k, size)
			}
		}
		if math.Abs(float64(sum)-1000*k) > 1 {
			t.Errorf("%v frames per write: %d in 1000 batches", k, sum)
		}
	}
}

func TestBars(t *testing.T) {
	var results []result
	for _, own := range []float64{70, 90, 95} { // medians count, of rounds whose floors differ
		results = append(results,
			result{system: floorName, sessions: 1000, mode: fixed, perCPUSecond: 100},
			result{system: guildhallName, sessions: 1000, mode: fixed, perCPUSecond: own, rssIdle: 4, rssLoaded: 4.4, rssEmpty: 1024},
			result{system: floorName, sessions: 5000, mode: fixed, perCPUSecond: 50},
			result{system: guildhallName, sessions: 5000, mode: fixed, perCPUSecond: own / 4, rssIdle: 2, rssLoaded: 3, rssEmpty: 1024},
			result{system: upgradeOnly.name, sessions: 5000, mode: connecting, perSession: 50},
			result{system: guildhallName, sessions: 5000, mode: connecting, perSession: 50 + own})
	}
	want := []struct {
		what     string
		sessions int
		measured float64
		met      bool
	}{
		{"fixed: deliveries per CPU-second, in floors", 1000, 0.9, true},
		{"fixed: deliveries per CPU-second, in floors", 5000, 0.45, false},
		{"memory: KB per idle session", 1000, 4, false},
		{"memory: after load, of idle", 1000, 1.1, true},
		{"memory: MB without sessions", 1000, 1, true},
		{"memory: KB per idle session", 5000, 2, true},
		{"memory: after load, of idle", 5000, 1.5, false},
		{"memory: MB without sessions", 5000, 1, true},
		{"storm: us of CPU to connect, beyond an upgrade", 5000, 90, true},
		{"growth: CPU per event from 1000 sessions, of the floor's", 5000, 2, false},
	}
	got := bars(results)
	for i, w := range want {
		if i >= len(got) {
			t.Fatalf("expected %+v", w)
		}
		if g := got[i]; g.what != w.what || g.sessions != w.sessions || math.Abs(median(g.rounds)-w.measured) > 1e-6 || g.met() != w.met {
			t.Errorf("expected %+v, got %+v", w, g)
		}
	}
	if len(got) > len(want) {
		t.Errorf("too many: %+v", got[len(want):])
	}
}

func TestHistogram(t *testing.T) {
	for _, ns := range []uint64{0, 1, 31, 32, 33, 63, 64, 65, 1000, 123456, 7_000_000_000} {
		var h histogram
		h.add(ns)
		if got := h.quantile(0.5) * 1e6; math.Abs(got-float64(ns)) > float64(ns)/32+0.01 {
			t.Errorf("%d ns: got %v", ns, got)
		}
	}
	var h histogram
	for ns := range uint64(100_000) {
		h.add(ns)
	}
	if got := h.quantile(0.99) * 1e6; math.Abs(got-99_000) > 99_000/32.0 {
		t.Errorf("0.99 of 100,000 ns: got %v", got)
	}
}
