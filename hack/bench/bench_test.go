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
	o := options{sessions: []int{20}, rounds: 1, rate: 2000, length: 200 * time.Millisecond, settle: 10 * time.Millisecond}
	for _, s := range systems {
		if s.serve != nil { // the shard server's binary is not built here
			o.systems = append(o.systems, s.name)
		}
	}
	results, err := runAll(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	rows := summarize(results)
	for _, r := range rows {
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
		return append(appendHex(appendHex([]byte("{"+marker), seq), sinceStart()), `"}`...)
	}
	for _, order := range [][]uint64{{2}, {1, 1}, {1, 3}, {1, 2, 3, 4}} {
		c := &client{sessions: make([]session, 2), published: 3}
		s := &c.sessions[0]
		s.next = 1
		var err error
		for _, seq := range order {
			err = errors.Join(err, c.message(s, event(seq), sinceStart()))
		}
		if err == nil {
			t.Errorf("events %v: expected an error", order)
		}
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
