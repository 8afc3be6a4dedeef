package poll

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
)

// listen listens on this machine as shard servers do.
func listen(t *testing.T, network, address string) net.Listener {
	t.Helper()
	tcp, err := net.Listen(network, address)
	if err != nil {
		t.Skip(err) // a machine without IPv6
	}
	ln, err := Listen(tcp.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// accept makes a connection by a listener.
func accept(ln net.Listener) (server, client net.Conn, err error) {
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		return nil, nil, err
	}
	if server, err = ln.Accept(); err != nil {
		client.Close()
	}
	return server, client, err
}

// TestConnIsAConn: it behaves as any other net.Conn, deadlines and the end included.
func TestConnIsAConn(t *testing.T) {
	ln := listen(t, "tcp", "127.0.0.1:0")
	for name, swap := range map[string]bool{"accepted": false, "its peer": true} {
		t.Run(name, func(t *testing.T) {
			nettest.TestConn(t, func() (a, b net.Conn, stop func(), err error) {
				a, b, err = accept(ln)
				stop = func() { a.Close(); b.Close() }
				if swap {
					a, b = b, a
				}
				return a, b, stop, err
			})
		})
	}
}

func TestConnKnowsItsAddresses(t *testing.T) {
	for network, address := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"} {
		t.Run(network, func(t *testing.T) {
			server, client, err := accept(listen(t, network, address))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if got, want := server.RemoteAddr().String(), client.LocalAddr().String(); got != want {
				t.Errorf("remote address %s, want %s", got, want)
			}
			if got, want := server.LocalAddr().String(), client.RemoteAddr().String(); got != want {
				t.Errorf("local address %s, want %s", got, want)
			}
			server.Close()
			if server.RemoteAddr() == nil || server.LocalAddr() == nil {
				t.Error("no address once it is closed")
			}
		})
	}
}

// TestRuntimeWatchesOnlyWhatWaits: what sessions do with a connection has the runtime watch nothing, until
// the socket makes somebody wait.
func TestRuntimeWatchesOnlyWhatWaits(t *testing.T) {
	poller, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	server, client, err := accept(listen(t, "tcp", "127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c := server.(*Conn)
	p := make([]byte, 8)
	if _, err := Read(c, p, false); !errors.Is(err, ErrNothing) {
		t.Fatalf("%v, want %v", err, ErrNothing)
	}
	if err := c.SetDeadline(time.Time{}); err != nil { // as gorilla does
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	if _, err := poller.Add(c, func() { ready <- "it" }); err != nil {
		t.Fatal(err)
	}
	io.WriteString(client, "hello")
	expect(t, ready, "it")
	if n, err := c.Read(p); err != nil || string(p[:n]) != "hello" {
		t.Fatalf("%q, %v", p[:n], err)
	}
	if c.watched() {
		t.Error("watched before anybody waits")
	}
	time.AfterFunc(10*time.Millisecond, func() { io.WriteString(client, "again") })
	if n, err := c.Read(p); err != nil || string(p[:n]) != "again" {
		t.Fatalf("%q, %v", p[:n], err)
	}
	if !c.watched() {
		t.Error("somebody has waited without being watched for")
	}
	if err := c.CloseWrite(); err != nil {
		t.Error(err)
	}
	if rest, err := io.ReadAll(client); err != nil || len(rest) > 0 {
		t.Errorf("%q, %v behind CloseWrite", rest, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{"Close": c.Close(), "CloseWrite": c.CloseWrite(), "SetDeadline": c.SetDeadline(time.Now()), "Control": (*raw)(c).Control(func(uintptr) { t.Error("used") })} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s of a closed connection: %v, want %v", name, err, net.ErrClosed)
		}
	}
}

// TestDescriptorsAreNotMistaken: whoever uses a connection while it is closed uses its own descriptor, which the
// kernel gives to the next connection at once, or none.
func TestDescriptorsAreNotMistaken(t *testing.T) {
	ln := listen(t, "tcp", "127.0.0.1:0")
	for i := range 300 {
		server, client, err := accept(ln)
		if err != nil {
			t.Fatal(err)
		}
		c := server.(*Conn)
		var users sync.WaitGroup
		for range 3 {
			users.Go(func() {
				var p [1]byte
				for {
					if n, err := Read(c, p[:], i%2 == 0); n > 0 || err != nil && !errors.Is(err, ErrNothing) {
						if !errors.Is(err, net.ErrClosed) {
							t.Errorf("read %d bytes, %v", n, err)
						}
						return
					}
				}
			})
		}
		c.Close()
		next, nextClient, err := accept(ln)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(nextClient, "for the next")
		users.Wait()
		for _, conn := range []net.Conn{client, next, nextClient} {
			conn.Close()
		}
	}
}

// TestDeadlinesHoldThoughThereIsSomethingToRead: a peer that never pauses does not outlive its deadline.
func TestDeadlinesHoldThoughThereIsSomethingToRead(t *testing.T) {
	server, client, err := accept(listen(t, "tcp", "127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	defer server.Close()
	io.WriteString(client, "more")
	ready := make([]byte, 1)
	if _, err := server.Read(ready); err != nil { // so that the rest is there
		t.Fatal(err)
	}
	if err := server.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	for _, wait := range []bool{false, true} {
		if _, err := Read(server, ready, wait); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("wait %v: %v, want %v", wait, err, os.ErrDeadlineExceeded)
		}
	}
	if err := server.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if n, err := server.Read(make([]byte, 8)); n != 3 || err != nil {
		t.Errorf("%d bytes, %v, want 3", n, err)
	}
}

func TestListenerCloses(t *testing.T) {
	ln := listen(t, "tcp", "127.0.0.1:0")
	failed := make(chan error)
	for range 2 {
		go func() {
			_, err := ln.Accept()
			failed <- err
		}()
	}
	ln.Close()
	for range 2 {
		if err := <-failed; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want %v", err, net.ErrClosed)
		}
	}
	if _, err := net.Dial("tcp", ln.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v, want %v", err, syscall.ECONNREFUSED)
	}
}
