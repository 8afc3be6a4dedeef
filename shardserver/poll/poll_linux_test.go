package poll

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func pair(t *testing.T) (server, client *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accepted, dialed, err := accept(ln)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = accepted.Close()
		_ = dialed.Close()
	})
	return accepted.(*net.TCPConn), dialed.(*net.TCPConn)
}

func expect(t *testing.T, events chan string, want string) {
	t.Helper()
	select {
	case got := <-events:
		if got != want {
			t.Fatalf("event of %s, expected %s", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("no event of %s", want)
	}
}

func TestPoller(t *testing.T) {
	defer goleak.VerifyNone(t)
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	events := make(chan string, 8)
	a, peerA := pair(t)
	b, peerB := pair(t)
	ha, err := p.Add(a, func() { events <- "a" })
	if err != nil {
		t.Fatal(err)
	}
	hb, err := p.Add(b, func() { events <- "b" })
	if err != nil {
		t.Fatal(err)
	}
	write := func(c net.Conn) {
		t.Helper()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	arm := func(h *Handle) {
		t.Helper()
		if err := h.Arm(); err != nil {
			t.Fatal(err)
		}
	}
	write(peerA)
	expect(t, events, "a")
	write(peerB)
	expect(t, events, "b")
	write(peerA) // before it is armed again: told when it is
	arm(ha)
	expect(t, events, "a")
	arm(ha) // still unread
	expect(t, events, "a")
	_ = peerB.Close()
	arm(hb)
	expect(t, events, "b") // the end is an event too
	hb.Remove()
	_ = b.Close()
	if len(events) != 0 {
		t.Errorf("%d events too many", len(events))
	}
}

func TestClosedConnectionsAreNotMistaken(t *testing.T) {
	defer goleak.VerifyNone(t)
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var wrong atomic.Int32
	for range 200 { // descriptors are given out again at once
		old, peer := pair(t)
		h, err := p.Add(old, func() { wrong.Add(1) })
		if err != nil {
			t.Fatal(err)
		}
		h.Remove()
		_ = old.Close()
		_ = peer.Close()
		right := make(chan string, 1)
		fresh, freshPeer := pair(t)
		hf, err := p.Add(fresh, func() { right <- "fresh" })
		if err != nil {
			t.Fatal(err)
		}
		if _, err := freshPeer.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		expect(t, right, "fresh")
		hf.Remove()
		_ = fresh.Close()
		_ = freshPeer.Close()
	}
	if n := wrong.Load(); n != 0 {
		t.Errorf("%d events of closed connections", n)
	}
}
