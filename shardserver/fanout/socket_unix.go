//go:build unix

package fanout

import (
	"io"
	"net"
	"syscall"
)

// socket writes to a connection without blocking where the connection is a plain socket.
type socket struct {
	conn net.Conn
	raw  syscall.RawConn // nil: only blocking writes, as with TLS
}

func newSocket(conn net.Conn) socket {
	s := socket{conn: conn}
	if sc, ok := conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			s.raw = raw
		}
	}
	return s
}

// try writes what the socket takes now. again: it would block.
func (s *socket) try(p []byte) (n int, again bool, err error) {
	if s.raw == nil {
		return 0, true, nil
	}
	var werr error
	err = s.raw.Write(func(fd uintptr) bool {
		n, werr = writeOnce(int(fd), p)
		return true
	})
	if err == nil {
		err = werr
	}
	if err == syscall.EAGAIN {
		return 0, true, nil
	}
	return n, err == nil && n < len(p), err
}

// drain writes the chunks of next until one is empty, and waits whenever the socket is full.
// While it waits it holds no bytes.
func (s *socket) drain(next func() (chunk, error), advance func(chunk, int)) error {
	if s.raw == nil {
		return s.drainBlocking(next, advance)
	}
	var inner error
	err := s.raw.Write(func(fd uintptr) bool {
		for {
			c, err := next()
			if err != nil || len(c.bytes) == 0 {
				inner = err
				return true
			}
			n, err := writeOnce(int(fd), c.bytes)
			if err == syscall.EAGAIN {
				return false
			}
			if err != nil {
				inner = err
				return true
			}
			advance(c, n)
		}
	})
	if err != nil {
		return err
	}
	return inner
}

func (s *socket) drainBlocking(next func() (chunk, error), advance func(chunk, int)) error {
	for {
		c, err := next()
		if err != nil || len(c.bytes) == 0 {
			return err
		}
		n, err := s.conn.Write(c.bytes)
		advance(c, n)
		if err != nil {
			return err
		}
	}
}

func writeOnce(fd int, p []byte) (int, error) {
	for {
		n, err := syscall.Write(fd, p)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		default:
			return n, nil
		}
	}
}
