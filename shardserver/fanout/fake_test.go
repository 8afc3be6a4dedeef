package fanout

import (
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// firstFake is above all file descriptors of real sockets.
const firstFake = uintptr(1) << 30

var (
	fakes    sync.Map // file descriptor -> *fakeConn; a late write may still look for one that is closed
	lastFake atomic.Uintptr
)

func TestMain(m *testing.M) {
	write := writeOnce
	writeOnce = func(fd uintptr, p []byte) (int, bool, error) {
		if fd < firstFake {
			return write(fd, p)
		}
		c, _ := fakes.Load(fd)
		return c.(*fakeConn).writeOnce(p)
	}
	goleak.VerifyTestMain(m)
}

// fakeConn is a connection whose peer takes as many bytes as take has allowed. All that waits
// in it waits on a sync.Cond, so that synctest knows when nothing moves any more.
type fakeConn struct {
	net.Conn // of what a session does not call
	fd       uintptr

	mu      sync.Mutex
	changed *sync.Cond
	allowed int
	got     []byte
	closed  bool
	hungUp  bool   // nothing may be written any more
	onWrite func() // called before bytes are taken
	onClose func()
}

func newFake(allowed int) *fakeConn {
	c := &fakeConn{fd: firstFake + lastFake.Add(1), allowed: allowed}
	c.changed = sync.NewCond(&c.mu)
	fakes.Store(c.fd, c)
	return c
}

// fakeSocket is a fakeConn that can be written to without waiting.
type fakeSocket struct{ *fakeConn }

func (c fakeSocket) SyscallConn() (syscall.RawConn, error) { return fakeRaw(c), nil }

type fakeRaw struct {
	*fakeConn
}

func (r fakeRaw) Control(f func(uintptr)) error { f(r.fd); return nil }
func (fakeRaw) Read(func(uintptr) bool) error   { panic("not called") }

func (r fakeRaw) Write(f func(uintptr) bool) error {
	for {
		if err := r.state(); err != nil {
			return err
		}
		if f(r.fd) {
			return nil
		}
		r.wait()
	}
}

func (c *fakeConn) state() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return nil
}

// wait waits until something can be written, or never will be.
func (c *fakeConn) wait() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.allowed == 0 && !c.closed {
		c.changed.Wait()
	}
}

func (c *fakeConn) writeOnce(p []byte) (n int, again bool, err error) {
	if c.onWrite != nil {
		c.onWrite()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.hungUp {
		return 0, false, net.ErrClosed
	}
	n = min(len(p), c.allowed)
	c.allowed -= n
	c.got = append(c.got, p[:n]...)
	return n, n == 0, nil
}

func (c *fakeConn) Write(p []byte) (written int, err error) {
	for written < len(p) {
		if err := c.state(); err != nil {
			return written, err
		}
		n, again, _ := c.writeOnce(p[written:])
		written += n
		if again {
			c.wait()
		}
	}
	return written, nil
}

func (c *fakeConn) Close() error {
	if c.onClose != nil {
		c.onClose()
	}
	c.change(func() { c.closed = true })
	return nil
}

func (c *fakeConn) CloseWrite() error {
	c.change(func() { c.hungUp = true })
	return nil
}

func (c *fakeConn) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	c.changed.Broadcast()
}

// take has the peer take n bytes more.
func (c *fakeConn) take(n int) { c.change(func() { c.allowed += n }) }

func (c *fakeConn) bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]byte(nil), c.got...)
}

// outcome is whether and why a session has ended.
type outcome struct {
	mu    sync.Mutex
	done  bool
	cause error
}

func (o *outcome) ended(cause error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.done, o.cause = true, cause
}

func (o *outcome) get() (done bool, cause error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.done, o.cause
}

func ignore(error) {}
