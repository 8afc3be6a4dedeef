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
		history   bool
		settle    bool // after each operation wait until nothing moves
	}{
		{"with a stream that keeps little, sessions that lag are cut", Retention{Bytes: 4 << 10, Age: time.Minute}, false, true},
		{"with a stream that keeps all, nobody is cut", Retention{Bytes: 1 << 30, Age: 1e6 * time.Hour}, false, false},
		{"with a history, sessions that lag catch up unless it drops them", Retention{Bytes: 2 << 10, Age: time.Minute}, true, true},
		{"with a history, while all goes on", Retention{Bytes: 2 << 10, Age: time.Minute}, true, false},
	} {
		t.Run(run.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rapid.Check(struct{ testing.TB }{t}, func(rt *rapid.T) {
					p := newProperty(rt, run.retention, run.history, run.settle)
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
	history bool
	clients []*client
	conns   map[*client]*fakeConn
}

func newProperty(rt *rapid.T, r Retention, history, settle bool) *property {
	p := &property{settle: settle, small: r.Bytes < 1<<20, history: history, conns: map[*client]*fakeConn{}}
	p.core = New(Options{
		Workers: rapid.IntRange(1, 2).Draw(rt, "workers"), Noop: noop, Overrun: overrun,
		Now: func() time.Time { return time.UnixMilli(p.clock.Load()) },
	})
	var h History
	if history {
		p.model.block = rapid.IntRange(1, 20).Draw(rt, "block")
		h = &p.model
	}
	p.stream = p.core.NewStream(0, h, r, r)
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
	for range rapid.IntRange(1, 4).Draw(rt, "frames") {
		kind := rapid.SampledFrom([]string{"all", "all", "volatile", "addressed", "personal", "turn", "turn one", "record"}).Draw(rt, "kind")
		seq := p.model.last() + uint64(rapid.IntRange(1, 2).Draw(rt, "step"))
		if kind == "volatile" {
			seq = p.model.last()
		}
		var only []uint64
		owner := rapid.Uint64Range(1, 3).Draw(rt, "owner")
		if kind == "addressed" {
			only = []uint64{owner, 9, owner}
		}
		f := p.model.frame(seq, rapid.IntRange(0, 2).Draw(rt, "topic"), rapid.IntRange(0, 300).Draw(rt, "padding"), only...)
		f.Volatile = kind == "volatile"
		frames = append(frames, f)
		if rapid.Bool().Draw(rt, "variant") && f.Wire != nil {
			f.Variants = [][]byte{line("v %d", len(p.model.frames)-1)}
		}
		turn := flip(rapid.IntRange(1, 7).Draw(rt, "flip"))
		if kind != "volatile" && kind != "record" {
			f.Reserved = uint64(rapid.IntRange(0, 1).Draw(rt, "reserved"))
		}
		switch kind {
		case "personal":
			p.model.personal(f, owner, "instead", nil)
			if rapid.Bool().Draw(rt, "drop") {
				p.model.personal(f, owner%3+1, "", nil)
			}
		case "turn":
			f.Turn = turn
			if rapid.Bool().Draw(rt, "and one otherwise") {
				p.model.personal(f, owner, "other turn", flip(rapid.IntRange(0, 7).Draw(rt, "flip")))
			}
		case "turn one":
			p.model.personal(f, owner, "", turn)
		case "record": // turns all, has something derived for each view, and something more for one owner
			f.Turn = turn
			derived := p.model.frame(seq+1, rapid.IntRange(0, 2).Draw(rt, "topic"), 0)
			inserted := p.model.frame(seq+2, 0, 0, owner)
			frames = append(frames, derived, inserted)
		}
	}
	if p.history && rapid.IntRange(0, 4).Draw(rt, "forget") == 0 {
		p.model.mu.Lock()
		p.model.forgotten = max(p.model.forgotten, p.lost()*rapid.Uint64Range(0, 4).Draw(rt, "quarters")/4)
		p.model.mu.Unlock()
	}
	p.model.publish(p.stream, frames...)
}

// lost is the number up to which the window has dropped frames.
func (p *property) lost() uint64 {
	p.stream.mu.RLock()
	defer p.stream.mu.RUnlock()
	return p.stream.lost
}

// gone is the number up to which frames cannot be replayed.
func (p *property) gone() uint64 {
	if p.history {
		return min(p.lost(), p.model.forgotten)
	}
	return p.lost()
}

func (p *property) connect(rt *rapid.T) {
	c := &client{
		owner: rapid.Uint64Range(1, 3).Draw(rt, "owner"), view: topics(rapid.IntRange(0, 7).Draw(rt, "view")),
		unlimited: rapid.Bool().Draw(rt, "unlimited"),
	}
	if rapid.Bool().Draw(rt, "variants") {
		c.view |= variant
	}
	c.lags = p.small && !(c.unlimited && p.settle)
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
	start := Start{View: c.view, Owner: c.owner, Seq: p.model.last()}
	if rapid.Bool().Draw(rt, "resume") {
		start.Seq, start.Replayed = rapid.Uint64Range(0, p.model.last()+1).Draw(rt, "seq"), replayed
	}
	from, lost := p.model.behind(start.Seq), p.lost()
	if start.Seq < lost && p.model.turned(c.owner, from, p.model.behind(lost)) != 0 {
		rt.Skip("the caller's concern")
	}
	dropped := start.Seq > p.model.last() || start.Seq < p.gone()
	err := c.session.Follow(p.stream, start)
	if dropped != errors.Is(err, ErrDropped) {
		rt.Fatalf("following from %d: %v, dropped: %v", start.Seq, err, dropped)
	}
	if err != nil {
		return
	}
	c.follows, c.from = true, from
	c.view ^= p.model.turned(c.owner, from, len(p.model.frames))
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
		if cut && (c.unlimited && p.settle || !p.small) {
			rt.Fatalf("client %d was cut, but did not lag", i)
		}
		if p.settle && !ended && !cut && !c.closed && missing >= 0 && p.model.frames[missing].Seq <= p.gone() {
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
