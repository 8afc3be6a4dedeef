// Package poll tells when sockets have something to read, so that a connection without traffic
// needs no goroutine. It works on Linux, with plain sockets; elsewhere, and for connections
// over TLS, callers read in a goroutine of their own.
package poll

import "errors"

// ErrUnsupported: the connection cannot be polled here.
var ErrUnsupported = errors.New("poll: not supported for this connection")
