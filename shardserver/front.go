package main

import (
	"bufio"
	"bytes"
	"net"
	"net/http"
	"sync"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/shardserver/poll"
)

// front is a listener of clients, in front of net/http. Who opens a WebSocket has mostly sent the whole request by the time that
// the connection is accepted (deferAccept): that is served at once, by the goroutine that accepts, without the
// goroutine and the buffers that net/http has for each connection, which count when thousands come at once.
//
// Whatever is not plainly such a request, or is not answered with an upgrade, is net/http's: it comes out of Accept, with
// the bytes that have been read.
type front struct {
	net.Listener // of listenClients
	handler      http.Handler
}

// Accept implements net.Listener. Several goroutines may call it.
func (f *front) Accept() (net.Conn, error) {
	for {
		conn, err := f.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if rest := f.serve(conn.(*limitedConn)); rest != nil {
			return rest, nil
		}
	}
}

// serve upgrades a connection, or returns it for net/http.
func (f *front) serve(conn *limitedConn) (rest net.Conn) {
	b := firsts.Get().(*first)
	defer b.release()
	n, err := poll.Read(conn, b.bytes[:], false)
	if err != nil { // if there is more than nothing to it, net/http finds out, too
		return conn
	}
	b.in.Reset(b.bytes[:n])
	b.rw.Reader.Reset(&b.in)
	request, err := http.ReadRequest(b.rw.Reader)
	whole := err == nil && request.Host != "" && request.Body == http.NoBody && b.rw.Reader.Buffered() == 0 && b.in.Len() == 0
	if whole && request.Method == http.MethodGet && websocket.IsWebSocketUpgrade(request) {
		answer := answer{conn: conn, rw: &b.rw}
		if f.handler.ServeHTTP(&answer, request); answer.upgraded {
			return nil
		}
	}
	return &readConn{limitedConn: conn, early: bytes.Clone(b.bytes[:n])}
}

// first is what the first bytes of a connection are read with.
type first struct {
	bytes [2048]byte // net/http reads more at once, so readConn gives it all of them
	in    bytes.Reader
	rw    bufio.ReadWriter
}

var firsts = sync.Pool{New: func() any {
	return &first{rw: bufio.ReadWriter{Reader: bufio.NewReaderSize(nil, 2048), Writer: bufio.NewWriterSize(nil, 512)}}
}}

func (b *first) release() {
	b.rw.Reader.Reset(nil) // the upgrade leaves the connection in both
	b.rw.Writer.Reset(nil)
	firsts.Put(b)
}

// answer is the ResponseWriter of a request that may be upgraded. Any other answer is not sent: net/http asks again.
type answer struct {
	conn     net.Conn
	rw       *bufio.ReadWriter
	header   http.Header
	upgraded bool
}

// Header implements http.ResponseWriter.
func (a *answer) Header() http.Header {
	if a.header == nil {
		a.header = http.Header{}
	}
	return a.header
}

// Write implements http.ResponseWriter.
func (a *answer) Write(p []byte) (int, error) { return len(p), nil }

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(int) {}

// Hijack implements http.Hijacker. The buffers are the caller's until its request has been served.
func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if a.upgraded {
		return nil, nil, http.ErrHijacked
	}
	a.upgraded = true
	return a.conn, a.rw, nil
}

// readConn is a connection of which the first bytes have been read.
type readConn struct {
	*limitedConn
	early []byte
}

func (c *readConn) Read(p []byte) (int, error) {
	if len(c.early) == 0 {
		return c.limitedConn.Read(p)
	}
	n := copy(p, c.early)
	c.early = c.early[n:]
	return n, nil
}
