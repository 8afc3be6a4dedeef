package gateway

import (
	"bufio"
	"net"
	"net/http"
	"sync/atomic"

	"guildhall.dev/guildhall/shardserver/fanout"
)

// sharedConn is the connection under gorilla's protocol. gorilla reads from it and writes the
// answer to the upgrade; from then on a session owns all writes, and what gorilla still writes,
// its answers to protocol errors, is handed to it.
type sharedConn struct {
	net.Conn
	session atomic.Pointer[fanout.Session]
}

func (c *sharedConn) Write(p []byte) (int, error) {
	if s := c.session.Load(); s != nil {
		s.Send(append([]byte(nil), p...))
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// Hijack implements http.Hijacker.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	h.conn = &sharedConn{Conn: conn}
	return h.conn, rw, nil
}
