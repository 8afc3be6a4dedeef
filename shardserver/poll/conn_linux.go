package poll

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Listen takes over a listener. Go's runtime does not watch its connections until somebody waits for one: that
// would be a good part of what an idle connection takes, and the runtime would be told, too, of each byte that a Poller tells of.
// What connections inherit, such as TCP_NODELAY, is set on ln.
func Listen(ln *net.TCPListener) (net.Listener, error) {
	file, err := ln.File() // the net package lets nobody else accept
	if err != nil {
		return nil, err
	}
	l := &listener{file: file, addr: ln.Addr()}
	if l.raw, err = file.SyscallConn(); err != nil {
		return nil, err
	}
	return l, ln.Close()
}

type listener struct {
	file *os.File
	raw  syscall.RawConn
	addr net.Addr
}

func (l *listener) Addr() net.Addr { return l.addr }

func (l *listener) Close() error { return opError("close", l.file.Close()) }

// Accept implements net.Listener. Its connections are *Conn.
func (l *listener) Accept() (net.Conn, error) {
	var fd int
	var errno error
	err := l.raw.Read(func(listening uintptr) bool {
		for {
			fd, _, errno = syscall.Accept4(int(listening), syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
			if errno != syscall.EINTR && errno != syscall.ECONNABORTED { // the latter has gone again
				return errno != syscall.EAGAIN
			}
		}
	})
	switch {
	case err != nil: // nothing else ends the waiting
		return nil, opError("accept", net.ErrClosed)
	case errno != nil:
		return nil, opError("accept", os.NewSyscallError("accept4", errno))
	}
	return &Conn{fd: int32(fd)}, nil
}

// Conn is a TCP connection of Listen's. Reads, writes and deadlines are those of any net.Conn; the first deadline, Write, or Read that
// has to wait has Go's runtime watch the socket from then on. Once the peer has reset the connection, nobody knows its address any more.
//
// Invariants:
//   - who uses the descriptor holds mu, and does not wait meanwhile, or uses file, which counts its users:
//     it is closed once, and is no other connection's while it is used;
//   - once there is a file, the descriptor is the file's to close.
type Conn struct {
	mu     sync.Mutex
	fd     int32
	closed bool
	file   *os.File // nil until somebody waits
}

// SyscallConn implements syscall.Conn. The functions given to its Control, and to Read the first time, must not wait.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return (*raw)(c), nil }

// watched says whether there is a file, and with it there may be a deadline.
func (c *Conn) watched() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.file != nil
}

// waiting returns the file, by which a goroutine can wait.
func (c *Conn) waiting() (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return nil, net.ErrClosed
	case c.file == nil:
		c.file = os.NewFile(uintptr(c.fd), "socket")
	}
	return c.file, nil
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	if !c.watched() {
		if n, err := readNow(c, p); !errors.Is(err, ErrNothing) {
			return n, err
		}
	}
	file, err := c.waiting()
	if err != nil {
		return 0, opError("read", err)
	}
	n, err := file.Read(p)
	return n, opError("read", err)
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	file, err := c.waiting()
	if err != nil {
		return 0, opError("write", err)
	}
	n, err := file.Write(p)
	return n, opError("write", err)
}

// Close implements net.Conn. Those who wait return.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return opError("close", net.ErrClosed)
	}
	c.closed = true
	if c.file != nil {
		return opError("close", c.file.Close())
	}
	return opError("close", os.NewSyscallError("close", syscall.Close(int(c.fd))))
}

// CloseWrite ends what is written.
func (c *Conn) CloseWrite() error {
	var errno error
	err := (*raw)(c).Control(func(fd uintptr) { errno = syscall.Shutdown(int(fd), syscall.SHUT_WR) })
	if err == nil {
		err = os.NewSyscallError("shutdown", errno)
	}
	return opError("close", err)
}

// LocalAddr implements net.Conn. It asks the kernel.
func (c *Conn) LocalAddr() net.Addr { return c.addr(syscall.Getsockname) }

// RemoteAddr implements net.Conn. It asks the kernel.
func (c *Conn) RemoteAddr() net.Addr { return c.addr(syscall.Getpeername) }

func (c *Conn) addr(of func(fd int) (syscall.Sockaddr, error)) net.Addr {
	a := &net.TCPAddr{}                  // of a connection that is closed
	(*raw)(c).Control(func(fd uintptr) { //nolint:errcheck // likewise
		switch sa, _ := of(int(fd)); sa := sa.(type) {
		case *syscall.SockaddrInet4:
			a.IP, a.Port = sa.Addr[:], sa.Port
		case *syscall.SockaddrInet6:
			a.IP, a.Port = sa.Addr[:], sa.Port
		}
	})
	return a
}

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.setDeadline((*os.File).SetDeadline, t) }

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	return c.setDeadline((*os.File).SetReadDeadline, t)
}

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline((*os.File).SetWriteDeadline, t)
}

func (c *Conn) setDeadline(set func(*os.File, time.Time) error, t time.Time) error {
	if t.IsZero() && !c.watched() {
		return nil // there is none to take back
	}
	file, err := c.waiting()
	if err == nil {
		err = c.orClosed(set(file, t))
	}
	return opError("set", err)
}

// orClosed is an error of a file's, which may just have been closed.
func (c *Conn) orClosed(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && c.closed {
		return net.ErrClosed
	}
	return err
}

// raw is a Conn's syscall.RawConn.
type raw Conn

func (r *raw) Control(f func(fd uintptr)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return net.ErrClosed
	}
	f(uintptr(r.fd))
	return nil
}

func (r *raw) Read(f func(fd uintptr) (done bool)) error {
	if !(*Conn)(r).watched() {
		done := false
		if err := r.Control(func(fd uintptr) { done = f(fd) }); err != nil || done {
			return err
		}
	}
	return r.wait(f, syscall.RawConn.Read)
}

// Write is for those whom the socket has told that it takes no more.
func (r *raw) Write(f func(fd uintptr) (done bool)) error {
	return r.wait(f, syscall.RawConn.Write)
}

func (r *raw) wait(f func(fd uintptr) (done bool), until func(syscall.RawConn, func(uintptr) bool) error) error {
	file, err := (*Conn)(r).waiting()
	if err != nil {
		return err
	}
	waiting, err := file.SyscallConn()
	if err != nil {
		return err
	}
	return (*Conn)(r).orClosed(until(waiting, f))
}

// opError is an error of a file as the net package has it.
func opError(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if path, ok := errors.AsType[*os.PathError](err); ok {
		err = path.Err
	}
	if errors.Is(err, os.ErrClosed) {
		err = net.ErrClosed
	}
	return &net.OpError{Op: op, Net: "tcp", Err: err}
}
