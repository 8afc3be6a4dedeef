//go:build unix

package fanout

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// dial makes a connection within this machine; buffer bounds what it holds, 0: the default.
// Unix sockets can hold less than TCP, which slows down to nothing then.
func dial(t testing.TB, network string, buffer int) (ours, peer net.Conn) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "socket")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if peer, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if ours, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	if buffer > 0 {
		peer.(interface{ SetReadBuffer(int) error }).SetReadBuffer(buffer)
		ours.(interface{ SetWriteBuffer(int) error }).SetWriteBuffer(buffer)
	}
	t.Cleanup(func() { ours.Close(); peer.Close() })
	return ours, peer
}

// blockingConn hides that a connection is a plain socket, as TLS does.
type blockingConn struct{ net.Conn }

// TestSocketsGetWhatTheModelSays has everything happen at once, over real sockets: publishers,
// messages of Send, sessions that resume, lag, take a byte at a time and leave.
func TestSocketsGetWhatTheModelSays(t *testing.T) {
	for seed := range uint64(5) {
		core := New(Options{Workers: 2, Overrun: overrun})
		var streams sync.WaitGroup
		for i := range uint64(3) {
			streams.Go(func() { publishToSockets(t, core, rand.New(rand.NewPCG(seed, i))) })
		}
		streams.Wait()
		core.Stop()
	}
}

// publishToSockets publishes to a stream of its own while sessions come and go. Those that see
// the last frame are closed, and have then got everything.
func publishToSockets(t *testing.T, core *Core, random *rand.Rand) {
	m := &model{block: 50}
	var stream *Stream
	if random.IntN(2) == 0 {
		stream = core.NewStream(0, nil, keepAll, keepAll)
	} else {
		stream = core.NewStream(0, m, Retention{Bytes: 20 << 10, Age: time.Hour}, keepAll)
	}
	last := []byte("the end\n")
	clients := make([]*client, 6)
	got := make([][]byte, len(clients)) // of each client, once its reader has returned
	var readers sync.WaitGroup
	for i := range clients {
		kind := random.IntN(3)
		ours, peer := dial(t, []string{"tcp", "tcp", "unix"}[kind], []int{0, 32 << 10, 1}[kind])
		if random.IntN(4) == 0 {
			ours = blockingConn{ours}
		}
		c := &client{owner: 1, view: topics(1 + random.IntN(3)), session: core.NewSession(ours, ignore)}
		clients[i] = c
		atOnce := 1 + random.IntN(5000)
		peer.SetReadDeadline(time.Now().Add(time.Minute))
		readers.Go(func() {
			defer c.session.End(nil)
			buffer := make([]byte, atOnce)
			for {
				n, err := peer.Read(buffer)
				got[i] = append(got[i], buffer[:n]...)
				switch {
				case err != nil || bytes.HasSuffix(got[i], closing):
					return
				case bytes.Contains(got[i], last): // a message of Send may come behind it
					c.session.Close(closing)
				}
			}
		})
	}
	follow := func(c *client) {
		start := Start{View: c.view, Owner: 1, Seq: random.Uint64N(m.last() + 1), Replayed: replayed}
		if err := c.session.Follow(stream, start); err != nil {
			t.Error(err)
		}
		c.follows, c.from, c.replays, c.replay = true, m.behind(start.Seq), true, len(m.frames)
	}
	send := func(c *client) {
		text := fmt.Sprintf("m %d%s", len(c.sent), strings.Repeat("y", random.IntN(9000)))
		c.sent = append(c.sent, text)
		c.session.Send(line("%s", text))
	}
	gone := clients[0]
	for step := range 60 {
		var frames []*Frame
		for range 1 + random.IntN(8) {
			var only []uint64
			if random.IntN(10) == 0 {
				only = []uint64{1}
			}
			f := m.frame(m.last()+1, random.IntN(2), random.IntN(3000), only...)
			if only == nil && random.IntN(10) == 0 {
				m.personal(f, 1, "instead", nil)
			}
			frames = append(frames, f)
		}
		m.publish(stream, frames...)
		c := clients[random.IntN(len(clients))]
		send(c)
		if !c.follows && random.IntN(3) == 0 {
			follow(c)
		}
		if step == 40 {
			gone.session.End(nil)
		}
	}
	for _, c := range clients[1:] {
		if !c.follows {
			follow(c)
		}
		c.closed = true
	}
	f := m.frame(m.last()+1, 0, 0, 1)
	f.Personal[0].Wire = append(f.Personal[0].Wire[:len(f.Personal[0].Wire)-1], last...)
	m.publish(stream, f)
	readers.Wait()
	for i, c := range clients {
		if _, err := c.check(m, got[i], c != gone); err != nil {
			t.Errorf("client %d: %v", i, err)
		}
	}
}

// audience is sessions on real sockets whose peers throw away what they get.
func audience(t testing.TB, n, workers int) (*Core, *Stream) {
	core := New(Options{Workers: workers})
	keep := Retention{Bytes: 4 << 20, Age: time.Hour}
	stream := core.NewStream(0, nil, keep, keep)
	var peers sync.WaitGroup
	var sessions []*Session
	for range n {
		ours, peer := dial(t, "tcp", 0)
		s := core.NewSession(ours, ignore)
		sessions = append(sessions, s)
		if err := s.Follow(stream, Start{View: topics(1), Owner: 1}); err != nil {
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
	for name, frame := range map[string]func(seq uint64) *Frame{
		"a frame": testFrame,
		"a frame with something for others": func(seq uint64) *Frame {
			f := testFrame(seq)
			f.Variants, f.Personal = [][]byte{f.Wire[:100]}, For(f.Wire, 2, 3)
			return f
		},
		"a frame with something for each": func(seq uint64) *Frame {
			f := testFrame(seq)
			f.Personal = For(f.Wire[:100], 1)
			return f
		},
	} {
		t.Run(name, func(t *testing.T) {
			core, stream := audience(t, sessions, 1)
			seq := uint64(0)
			publish := func() {
				seq++
				stream.Publish(frame(seq))
				await(t, core, seq*sessions)
			}
			for range 100 {
				publish()
			}
			if n := testing.AllocsPerRun(100, publish); n > 20 {
				t.Errorf("%v allocations for a frame to %d sessions", n, sessions)
			}
		})
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
