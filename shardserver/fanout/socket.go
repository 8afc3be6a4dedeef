package fanout

import (
	"net"
	"syscall"
)

// socket is a connection. Where it is a plain socket, the worker writes to the descriptor itself, past
// the net package's bookkeeping, most of which would have to come from memory for each delivery. That is
// safe as the worker alone closes it, too: the descriptor is no other connection's meanwhile.
type socket struct {
	fd   uintptr // noFD: every write waits, as with TLS
	conn net.Conn
}

const noFD = ^uintptr(0)

func newSocket(conn net.Conn) socket {
	s := socket{fd: noFD, conn: conn}
	sc, ok := conn.(syscall.Conn)
	if !ok || !nonblocking {
		return s
	}
	if raw, err := sc.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { s.fd = fd }) //nolint:errcheck // then writes find it closed, too
	}
	return s
}

// write writes what the socket takes now. again: it takes no more.
func (s *socket) write(p []byte) (n int, again bool, err error) {
	if s.fd == noFD {
		return 0, true, nil
	}
	n, again, err = writeOnce(s.fd, p)
	return n, again || n < len(p), err
}

// close closes the connection. It does not wait: TLS says goodbye to a peer that may not read.
func (s *socket) close() {
	if s.fd == noFD {
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
	case s.fd == noFD:
		go half.CloseWrite() //nolint:errcheck // the session ends in a moment anyhow
	default:
		half.CloseWrite() //nolint:errcheck // likewise
	}
}
