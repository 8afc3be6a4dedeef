package fanout

import (
	"net"
	"syscall"
)

// socket is a connection. Where it is a plain socket, writes need not wait.
type socket struct {
	conn net.Conn
	raw  syscall.RawConn // nil: every write waits, as with TLS
}

func newSocket(conn net.Conn) socket {
	s := socket{conn: conn}
	if sc, ok := conn.(syscall.Conn); ok && nonblocking {
		if raw, err := sc.SyscallConn(); err == nil {
			s.raw = raw
		}
	}
	return s
}

// close closes the connection. It does not wait: TLS says goodbye to a peer that may not read.
func (s *socket) close() {
	if s.raw == nil {
		go s.conn.Close()
		return
	}
	s.conn.Close()
}

// closeWrite ends what is written. Like close it does not wait.
func (s *socket) closeWrite() {
	half, ok := s.conn.(interface{ CloseWrite() error })
	switch {
	case !ok:
		s.close()
	case s.raw == nil:
		go half.CloseWrite() //nolint:errcheck // the session ends in a moment anyhow
	default:
		half.CloseWrite() //nolint:errcheck // likewise
	}
}

// attempt is a write that does not wait. It is reused, so that a write allocates nothing.
type attempt struct {
	bytes []byte
	n     int
	again bool
	err   error
	run   func(fd uintptr) bool
}

func newAttempt() *attempt {
	a := &attempt{}
	a.run = func(fd uintptr) bool {
		a.n, a.again, a.err = writeOnce(fd, a.bytes)
		return true
	}
	return a
}

// write writes what the socket takes now. again: it takes no more.
func (a *attempt) write(s *socket, p []byte) (n int, again bool, err error) {
	if s.raw == nil {
		return 0, true, nil
	}
	a.bytes, a.n, a.again, a.err = p, 0, false, nil
	err = s.raw.Write(a.run)
	a.bytes = nil
	if err == nil {
		err = a.err
	}
	return a.n, a.again || a.n < len(p), err
}
