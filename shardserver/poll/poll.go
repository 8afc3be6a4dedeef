// Package poll tells when sockets have something to read, so that a connection without traffic
// needs no goroutine. It works on Linux, with plain sockets; elsewhere, and for connections
// over TLS, callers read in a goroutine of their own. Connections of Listen are polled by nobody else, until
// somebody waits for one.
package poll

import (
	"errors"
	"net"
)

var (
	// ErrUnsupported: the connection cannot be polled here.
	ErrUnsupported = errors.New("poll: not supported for this connection")
	// ErrNothing: there is nothing to read now, or only a read that waits could tell.
	ErrNothing = errors.New("poll: nothing to read")
)

// Read reads from a connection what is there now; with wait, it waits until there is something.
func Read(conn net.Conn, p []byte, wait bool) (int, error) {
	if wait {
		return conn.Read(p)
	}
	return readNow(conn, p)
}
