//go:build unix

package fanout

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// roles is a view: a set of up to 256 roles. A frame's tag is the set of roles that may see it.
type roles [4]uint64

func (r *roles) Pick(f *Frame) []byte {
	seers := f.Tag.(*roles)
	if r[0]&seers[0]|r[1]&seers[1]|r[2]&seers[2]|r[3]&seers[3] == 0 {
		return nil
	}
	return f.Wire
}

// manyViews makes views with some roles each, and seers of a number of channels.
func manyViews(random *rand.Rand, views, channels int) (sets, seers []*roles) {
	draw := func(n int) *roles {
		r := &roles{1} // everyone
		for range n {
			i := random.IntN(256)
			r[i/64] |= 1 << (i % 64)
		}
		return r
	}
	for range views {
		sets = append(sets, draw(6))
	}
	for i := range channels {
		r := draw(40)
		if i%4 > 0 { // not for everyone
			r[0] &^= 1
		}
		seers = append(seers, r)
	}
	return sets, seers
}

// TestThousandsOfViews: 5,000 sessions with a role set each get what their roles may see.
func TestThousandsOfViews(t *testing.T) {
	const views, frames = 5000, 100
	random := rand.New(rand.NewPCG(1, 2))
	sets, seers := manyViews(random, views, 50)
	core := New(Options{Workers: 2})
	defer core.Stop()
	stream := core.NewStream(0, nil, keepAll, keepAll)
	conns := make([]*fakeConn, views)
	for i, set := range sets {
		conns[i] = newFake(unlimited)
		s := core.NewSession(fakeSocket{conns[i]}, ignore)
		defer s.End(nil)
		if err := s.Follow(stream, Start{View: set, Owner: uint64(i + 1)}); err != nil {
			t.Fatal(err)
		}
	}
	want := make([][]byte, views)
	deliveries := uint64(0)
	var batch []*Frame
	for n := range frames {
		f := &Frame{Seq: uint64(n + 1), Tag: seers[random.IntN(len(seers))], Wire: line("f %d", n)}
		for i := range 300 { // hundreds have something of their own
			f.Personal = append(f.Personal, Personal{Owner: uint64(i*17 + n%17 + 1)})
			if i%2 == 0 {
				f.Personal[i].Wire = line("p %d %d", n, i)
			}
		}
		for i, set := range sets {
			wire := set.Pick(f)
			if p := f.personal(uint64(i + 1)); p != nil && wire != nil {
				wire = p.Wire
			}
			if wire != nil {
				want[i] = append(want[i], wire...)
				deliveries++
			}
		}
		if batch = append(batch, f); random.IntN(5) == 0 || n == frames-1 {
			stream.Publish(batch...)
			batch = nil
		}
	}
	await(t, core, deliveries)
	for i, c := range conns {
		if got := c.bytes(); !bytes.Equal(got, want[i]) {
			t.Fatalf("session %d got %q, expected %q", i, got, want[i])
		}
	}
}

// discard is a connection whose peer takes everything and throws it away.
type discard struct {
	net.Conn // of what a session does not call
	null     *os.File
}

func (d discard) SyscallConn() (syscall.RawConn, error) { return d.null.SyscallConn() }
func (d discard) Close() error                          { return nil }

// BenchmarkViews publishes 64 frames at a time to 5,000 sessions that take everything at once:
// with one view, and with a view each. An operation is one frame.
func BenchmarkViews(b *testing.B) {
	const sessions, batch = 5000, 64
	for _, views := range []int{1, sessions} {
		b.Run(fmt.Sprint(views), func(b *testing.B) {
			null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer null.Close()
			random := rand.New(rand.NewPCG(1, 2))
			sets, seers := manyViews(random, views, 50)
			core := New(Options{Workers: 1})
			keep := Retention{Bytes: 4 << 20, Age: time.Hour}
			stream := core.NewStream(0, nil, keep, keep)
			for i := range sessions {
				s := core.NewSession(discard{null: null}, ignore)
				b.Cleanup(func() { s.End(nil) })
				if err := s.Follow(stream, Start{View: sets[i%views], Owner: uint64(i + 1)}); err != nil {
					b.Fatal(err)
				}
			}
			b.Cleanup(core.Stop)
			seq, deliveries := uint64(0), uint64(0)
			frames := make([]*Frame, batch)
			seen := map[*roles]uint64{}
			for _, s := range seers {
				for i := range sessions {
					if sets[i%views].Pick(&Frame{Tag: s, Wire: []byte{1}}) != nil {
						seen[s]++
					}
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				f := testFrame(seq + 1)
				s := seers[random.IntN(len(seers))]
				f.Tag = s
				deliveries += seen[s]
				frames[seq%batch] = f
				if seq++; seq%batch == 0 {
					stream.Publish(frames...)
					await(b, core, deliveries)
				}
			}
			b.ReportMetric(float64(core.Stats().Deliveries)/b.Elapsed().Seconds(), "deliveries/s")
		})
	}
}
