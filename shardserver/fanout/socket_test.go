//go:build unix

package fanout

import (
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// dial makes a connection over the loopback interface. small: its buffers hold next to nothing.
func dial(t testing.TB, small bool) (ours, peer net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if peer, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if ours, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	if small {
		peer.(*net.TCPConn).SetReadBuffer(1)
		ours.(*net.TCPConn).SetWriteBuffer(1)
	}
	t.Cleanup(func() { ours.Close(); peer.Close() })
	return ours, peer
}

// blockingConn hides that a connection is a plain socket, as TLS does.
type blockingConn struct{ net.Conn }

// TestSocketsGetWhatTheModelSays has everything happen at once, over real sockets: publishers,
// messages of Send, sessions that resume, lag, take a byte at a time, leave, and are closed.
func TestSocketsGetWhatTheModelSays(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))
		core := New(Options{Workers: 2, Overrun: overrun})
		var streams, readers sync.WaitGroup
		for range 3 {
			publishHere(t, core, random.Uint64(), &streams, &readers)
		}
		streams.Wait()
		readers.Wait()
		core.Stop()
	})
}

// publishHere publishes to a stream while sessions come and go. In the end all that are left
// are closed and must have got everything.
func publishHere(t *testing.T, core *Core, seed uint64, streams, readers *sync.WaitGroup) {
	random := rand.New(rand.NewPCG(seed, 1))
	m := &model{gates: map[uint64]bool{1: true}}
	stream := core.NewStream(0, keepAll)
	var clients []*client
	var got [][]byte // of each client, once its reader has returned
	var mine sync.WaitGroup
	for range 6 {
		c := &client{owner: 1, view: topics(1 + random.IntN(3))}
		ours, peer := dial(t, random.IntN(2) == 0)
		if random.IntN(4) == 0 {
			ours = blockingConn{ours}
		}
		c.session = core.NewSession(ours)
		clients, got = append(clients, c), append(got, nil)
		i, at := len(got)-1, 1+random.IntN(5000)
		mine.Go(func() {
			defer c.session.End(nil)
			buffer := make([]byte, at)
			for {
				n, err := peer.Read(buffer)
				got[i] = append(got[i], buffer[:n]...)
				if err != nil || n >= len(closing) && string(got[i][len(got[i])-len(closing):]) == string(closing) {
					return
				}
			}
		})
	}
	send := func(c *client) {
		wire := line("m %d", len(c.sent))
		c.sent = append(c.sent, string(wire[:len(wire)-1]))
		c.session.Send(wire)
	}
	streams.Go(func() {
		gone := clients[random.IntN(len(clients))]
		for step := range 120 {
			var frames []*Frame
			for range 1 + random.IntN(8) {
				f := m.frame(m.last()+1, random.IntN(2), random.IntN(3000))
				if random.IntN(10) == 0 {
					f.Only = []uint64{1}
				}
				frames = append(frames, f)
			}
			stream.Publish(frames...)
			c := clients[random.IntN(len(clients))]
			send(c)
			if !c.follows {
				start := Start{View: c.view, Owner: 1, GateOpen: true, Seq: random.Uint64N(m.last() + 1), Replayed: replayed}
				if err := c.session.Follow(stream, start); err != nil {
					t.Error(err)
				}
				c.follows, c.from, c.replays, c.replay = true, m.behind(start.Seq), true, len(m.frames)
			}
			if step == 60 {
				gone.session.End(io.EOF)
			}
		}
		for _, c := range clients {
			c.closed = true
			c.session.Close(closing)
		}
		mine.Wait()
		for i, c := range clients {
			// The last message comes before frames that are not yet begun, so a session has a
			// beginning of them. It ends with that message, or somewhere when it was ended.
			_, err := c.check(m, got[i], false)
			if err == nil && c != gone && string(got[i][max(0, len(got[i])-len(closing)):]) != string(closing) {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		}
	})
}

// audience is sessions on real sockets whose peers throw away what they get.
func audience(t testing.TB, n, workers int) (*Core, *Stream) {
	core := New(Options{Workers: workers})
	stream := core.NewStream(0, Retention{Bytes: 4 << 20, Age: time.Hour})
	var peers sync.WaitGroup
	var sessions []*Session
	for range n {
		ours, peer := dial(t, false)
		s := core.NewSession(ours)
		sessions = append(sessions, s)
		if err := s.Follow(stream, Start{View: topics(1), Owner: 1, GateOpen: true}); err != nil {
			t.Fatal(err)
		}
		peers.Go(func() {
			buffer := make([]byte, 16<<10)
			for {
				if _, err := peer.Read(buffer); err != nil {
					return
				}
			}
		})
	}
	t.Cleanup(func() {
		for _, s := range sessions {
			s.End(nil)
		}
		peers.Wait()
		core.Stop()
	})
	return core, stream
}

// await polls until n deliveries have been made.
func await(t testing.TB, core *Core, n uint64) {
	for deadline := time.Now().Add(20 * time.Second); core.Stats().Deliveries < n; time.Sleep(20 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d deliveries", core.Stats().Deliveries, n)
		}
	}
}

func testFrame(seq uint64) *Frame { return &Frame{Seq: seq, Tag: 0, Wire: make([]byte, 256)} }

// TestDeliveriesDoNotAllocate: publishing costs a few allocations, delivering none.
func TestDeliveriesDoNotAllocate(t *testing.T) {
	const sessions = 200
	core, stream := audience(t, sessions, 1)
	seq := uint64(0)
	publish := func() {
		seq++
		stream.Publish(testFrame(seq))
		await(t, core, seq*sessions)
	}
	for range 100 {
		publish()
	}
	if n := testing.AllocsPerRun(100, publish); n > 10 {
		t.Errorf("%v allocations for a frame to %d sessions", n, sessions)
	}
}

// BenchmarkFanout publishes frames of 256 bytes to 1000 sockets. An operation is one frame,
// delivered to all: by itself, or together with the 63 that were published with it.
func BenchmarkFanout(b *testing.B) {
	const sessions = 1000
	for _, bench := range []struct {
		name  string
		batch int
	}{{"one by one", 1}, {"64 at a time", 64}} {
		b.Run(bench.name, func(b *testing.B) {
			core, stream := audience(b, sessions, 0)
			seq := uint64(0)
			frames := make([]*Frame, bench.batch)
			b.ReportAllocs()
			b.SetBytes(sessions * 256)
			for b.Loop() {
				frames[seq%uint64(bench.batch)] = testFrame(seq + 1)
				if seq++; seq%uint64(bench.batch) == 0 {
					stream.Publish(frames...)
					await(b, core, seq*sessions)
				}
			}
			b.ReportMetric(float64(core.Stats().Deliveries)/b.Elapsed().Seconds(), "deliveries/s")
		})
	}
}
