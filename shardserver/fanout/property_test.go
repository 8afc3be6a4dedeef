package fanout

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

const unlimited = 1 << 40

// TestSessionsGetWhatTheModelSays runs random operations against the model, on connections
// whose peers take any number of bytes at a time.
func TestSessionsGetWhatTheModelSays(t *testing.T) {
	for _, run := range []struct {
		name      string
		retention Retention
		settle    bool // after each operation wait until nothing moves
	}{
		{"with a stream that keeps little, sessions that lag are cut", Retention{Bytes: 4 << 10, Age: time.Minute}, true},
		{"with a stream that keeps all, nobody is cut", Retention{Bytes: 1 << 30, Age: 1e6 * time.Hour}, false},
	} {
		t.Run(run.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rapid.Check(struct{ testing.TB }{t}, func(rt *rapid.T) {
					p := newProperty(rt, run.retention, run.settle)
					defer p.stop()
					rt.Repeat(map[string]func(*rapid.T){
						"":        p.settled,
						"publish": p.publish,
						"connect": p.connect,
						"follow":  p.follow,
						"send":    p.send,
						"take":    p.take,
						"close":   p.close,
						"end":     p.end,
						"wait":    p.wait,
					})
					p.finish(rt)
				})
			})
		})
	}
}

type property struct {
	model   model
	core    *Core
	stream  *Stream
	clock   atomic.Int64 // of the core, Unix milliseconds
	settle  bool
	small   bool
	clients []*client
	conns   map[*client]*fakeConn
}

func newProperty(rt *rapid.T, r Retention, settle bool) *property {
	p := &property{settle: settle, small: r.Bytes < 1<<20, conns: map[*client]*fakeConn{}}
	p.model.gates = map[uint64]bool{1: true, 2: true, 3: rapid.Bool().Draw(rt, "gate of owner 3")}
	p.core = New(Options{
		Workers: rapid.IntRange(1, 2).Draw(rt, "workers"), Noop: noop, Overrun: overrun,
		Now: func() time.Time { return time.UnixMilli(p.clock.Load()) },
	})
	p.stream = p.core.NewStream(0, r)
	return p
}

func (p *property) stop() {
	for _, c := range p.clients {
		c.session.End(nil)
	}
	synctest.Wait()
	p.core.Stop()
}

func (p *property) publish(rt *rapid.T) {
	var frames []*Frame
	numbered := false // what is derived has the number of a record published with it
	for range rapid.IntRange(1, 4).Draw(rt, "frames") {
		kind := rapid.SampledFrom([]string{"all", "all", "all", "volatile", "addressed", "gate", "derived"}).Draw(rt, "kind")
		seq := p.model.last() + uint64(rapid.IntRange(1, 2).Draw(rt, "step"))
		if kind == "volatile" || kind == "derived" && numbered {
			seq = p.model.last()
		}
		numbered = numbered || kind != "volatile"
		var only []uint64
		owner := rapid.Uint64Range(1, 3).Draw(rt, "owner")
		gate := LeaveGate
		switch kind {
		case "addressed":
			only = []uint64{owner, 9}
		case "gate":
			only, gate = []uint64{owner}, OpenGate
			if p.model.gate(owner, len(p.model.frames)) {
				gate = CloseGate
			}
		}
		f := p.model.frame(seq, rapid.IntRange(0, 2).Draw(rt, "topic"), rapid.IntRange(0, 300).Draw(rt, "padding"), only...)
		f.Gate, f.Volatile = gate, kind == "volatile"
		frames = append(frames, f)
	}
	p.stream.Publish(frames...)
}

func (p *property) connect(rt *rapid.T) {
	c := &client{
		owner: rapid.Uint64Range(1, 3).Draw(rt, "owner"), view: topics(rapid.IntRange(0, 7).Draw(rt, "view")),
		unlimited: rapid.Bool().Draw(rt, "unlimited"),
	}
	fake := newFake(0)
	if c.unlimited {
		fake.take(unlimited)
	}
	var conn net.Conn = fake
	if rapid.Bool().Draw(rt, "socket") {
		conn = fakeSocket{fake}
	}
	c.session = p.core.NewSession(conn, c.outcome.ended)
	p.clients, p.conns[c] = append(p.clients, c), fake
}

// pick draws one of the clients that are still there and of which ok is true.
func (p *property) pick(rt *rapid.T, ok func(*client) bool) *client {
	var list []*client
	for _, c := range p.clients {
		if done, _ := c.outcome.get(); !done && ok(c) {
			list = append(list, c)
		}
	}
	if len(list) == 0 {
		rt.Skip("no such client")
	}
	return list[rapid.IntRange(0, len(list)-1).Draw(rt, "client")]
}

func (p *property) follow(rt *rapid.T) {
	c := p.pick(rt, func(c *client) bool { return !c.follows && !c.closed })
	start := Start{View: c.view, Owner: c.owner, GateOpen: p.model.gate(c.owner, len(p.model.frames)), Seq: p.model.last()}
	if rapid.Bool().Draw(rt, "resume") {
		start.Seq, start.Replayed = rapid.Uint64Range(0, p.model.last()+1).Draw(rt, "seq"), replayed
	}
	dropped := start.Seq > p.model.last() || p.stream.first > 0 && start.Seq < p.model.frames[p.stream.first-1].Seq
	err := c.session.Follow(p.stream, start)
	if dropped != errors.Is(err, ErrDropped) {
		rt.Fatalf("following from %d: %v, dropped: %v", start.Seq, err, dropped)
	}
	if err != nil {
		return
	}
	c.follows, c.from = true, p.model.behind(start.Seq)
	if start.Replayed != nil {
		c.replays, c.replay = true, len(p.model.frames)
	}
	if err := c.session.Follow(p.stream, start); !errors.Is(err, ErrFollowing) {
		rt.Fatalf("following twice: %v", err)
	}
}

func (p *property) send(rt *rapid.T) {
	c := p.pick(rt, func(c *client) bool { return !c.closed })
	text := fmt.Sprintf("m %d%s", len(c.sent), strings.Repeat("y", rapid.IntRange(0, 40).Draw(rt, "padding")))
	c.sent = append(c.sent, text)
	c.session.Send(line("%s", text))
}

func (p *property) take(rt *rapid.T) {
	c := p.pick(rt, func(c *client) bool { return !c.unlimited })
	p.conns[c].take(rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(1, 2000)).Draw(rt, "bytes"))
}

func (p *property) close(rt *rapid.T) {
	c := p.pick(rt, func(*client) bool { return true })
	c.closed = true
	c.session.Close(closing)
}

func (p *property) end(rt *rapid.T) { p.pick(rt, func(*client) bool { return true }).session.End(nil) }

// wait lets time pass: much for the stream's retention, little for the sockets' deadlines, since
// rapid's own deadline is within the same bubble.
func (p *property) wait(rt *rapid.T) {
	seconds := rapid.Int64Range(1, 30).Draw(rt, "seconds")
	p.clock.Add(1000 * seconds)
	time.Sleep(time.Duration(seconds) * time.Second / 10)
}

// settled checks all clients once nothing moves any more.
func (p *property) settled(rt *rapid.T) {
	if !p.settle {
		return
	}
	synctest.Wait()
	p.check(rt, false)
}

func (p *property) check(rt *rapid.T, complete bool) {
	for i, c := range p.clients {
		ended, cause := c.outcome.get()
		got := p.conns[c].bytes()
		missing, err := c.check(&p.model, got, !ended && (complete || c.unlimited))
		if err != nil {
			rt.Fatalf("client %d (owner %d, view %b): %v\n%s", i, c.owner, c.view, err, got)
		}
		cut := errors.Is(cause, errOverrun) || strings.HasSuffix(string(got), "overrun\n")
		if cut && (c.unlimited || !p.small) {
			rt.Fatalf("client %d was cut, but did not lag", i)
		}
		if !ended && !cut && !c.closed && missing >= 0 && uint64(missing) < p.stream.first {
			rt.Fatalf("client %d waits for frame %d, which has been dropped", i, missing)
		}
	}
}

// finish has all peers take everything: now everybody has all that the model says.
func (p *property) finish(rt *rapid.T) {
	for _, c := range p.conns {
		c.take(unlimited)
	}
	synctest.Wait()
	p.check(rt, true)
	if s := p.core.Stats(); s.Parked != 0 {
		rt.Fatalf("%d sessions are still parked", s.Parked)
	}
}
