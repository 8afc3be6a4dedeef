package gateway

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/shardserver/poll"
	"guildhall.dev/guildhall/shardserver/protocol"
)

// maxHalfSent bounds the messages of which a part has come and the rest is waited for: each takes
// a reader and a goroutine. A client beyond it is closed, and may resume.
const maxHalfSent = 1024

// reader is gorilla's side of a WebSocket connection, without a socket of its own. Between two
// messages gorilla's connection has no state, so a reader is lent to a connection while messages
// are there, and then serves another one.
//
// A reader goes back to the others only between two messages, with nothing buffered and after no error.
type reader struct {
	gateway *Gateway
	ws      *websocket.Conn
	in      *bufio.Reader
	payload bytes.Buffer

	// Of the present loan.
	conn    *connection
	wait    bool // for the next message to begin
	read    bool // the socket has been read from
	between bool // no byte of the next message has been read
	inside  bool // a message has begun: control frames may come between its frames
	late    bool // the socket has a read deadline
	broken  bool // gorilla's connection reads nothing more
}

// newReader makes a reader by the only way that gorilla has for a server's connections: an upgrade.
func (g *Gateway) newReader() *reader {
	r := &reader{gateway: g}
	r.in = bufio.NewReaderSize(readerConn{reader: r}, 1024)
	upgrader := websocket.Upgrader{WriteBufferSize: 128, WriteBufferPool: &g.writeBuffers}
	ws, err := upgrader.Upgrade(readerUpgrade{reader: r}, &http.Request{Method: http.MethodGet, Header: http.Header{
		"Connection": {"upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"AAAAAAAAAAAAAAAAAAAAAA=="},
	}}, nil)
	if err != nil { // there is nothing in it that could fail
		panic(err)
	}
	ws.SetPingHandler(r.ping)
	ws.SetCloseHandler(func(int, string) error { return nil }) // the connection answers
	r.ws = ws
	return r
}

// errPinged ends a loan: gorilla would go on to wait for a data frame, and that may take for ever.
var errPinged = errors.New("gateway: ping between messages")

func (r *reader) ping(data string) error {
	c := r.conn
	if c.closing.Load() {
		return nil
	}
	if err := c.spend(); err != nil {
		return err
	}
	c.reply(protocol.PongFrame([]byte(data)))
	if r.inside {
		return nil
	}
	return errPinged
}

// next reads one message of at most MaxClientPayload bytes. It is good until the next call.
func (r *reader) next() ([]byte, error) {
	defer r.relax()
	r.inside, r.broken = false, true
	kind, in, err := r.ws.NextReader()
	if err != nil {
		return nil, err
	}
	r.inside = true
	r.payload.Reset()
	if _, err = r.payload.ReadFrom(io.LimitReader(in, protocol.MaxClientPayload+1)); err != nil {
		return nil, err
	}
	if r.payload.Len() > protocol.MaxClientPayload {
		r.conn.deaf = true
		return nil, &closeError{protocol.CloseDecodeError, "payload too large"}
	}
	r.broken = false
	if kind != websocket.TextMessage {
		return nil, &closeError{protocol.CloseDecodeError, "expected a text message"}
	}
	return r.payload.Bytes(), nil
}

// pending waits for the next message to begin, or tells that there is none now: that is not asked of
// the socket twice in a loan, since the poller will tell.
func (r *reader) pending() error {
	if r.read && !r.wait && r.in.Buffered() == 0 && len(r.conn.early) == 0 {
		return poll.ErrNothing
	}
	r.between = true
	_, err := r.in.Peek(1)
	r.between, r.read = false, true
	return err
}

// read reads and handles what the client has sent. With wait, it goes on until the connection ends;
// otherwise, more tells whether there will be more to read later.
func (c *connection) read(wait bool) (more bool) {
	g := c.gateway
	for !c.deaf {
		r := g.lend(c, wait)
		err := r.serve()
		if r.broken {
			early, _ := r.in.Peek(r.in.Buffered())
			c.early = append(append([]byte(nil), early...), c.early...)
		}
		g.takeBack(r)
		if err != nil {
			return errors.Is(err, poll.ErrNothing)
		}
	}
	return c.sink(wait)
}

// serve handles messages while the reader is good for it. An error says that nothing more can be read
// now, or ever.
func (r *reader) serve() error {
	c := r.conn
	for !r.broken {
		if err := r.pending(); err != nil {
			if !errors.Is(err, poll.ErrNothing) {
				c.session.Load().End(nil) // the socket is gone
			}
			return err
		}
		payload, err := r.next()
		if err == nil && !c.closing.Load() {
			err = c.handle(payload)
		}
		if err = c.failed(err); err != nil {
			return err
		}
	}
	return nil
}

// failed acts on an error in reading or handling a message. It returns the error when the socket is gone.
func (c *connection) failed(err error) error {
	closing, _ := errors.AsType[*closeError](err)
	closed, _ := errors.AsType[*websocket.CloseError](err)
	network, _ := errors.AsType[net.Error](err)
	switch {
	case err == nil, errors.Is(err, errPinged):
	case closing != nil:
		c.close(closing.code, closing.reason)
	case closed != nil && closed.Code != websocket.CloseAbnormalClosure:
		c.deaf = true
		c.answerClose(closed.Code)
	case network != nil && network.Timeout():
		c.deaf = true
		c.close(protocol.CloseSessionTimeout, silent)
	case closed != nil, network != nil, errors.Is(err, net.ErrClosed), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		c.session.Load().End(nil)
		return err
	default:
		c.deaf = true
		c.close(websocket.CloseProtocolError, "not the WebSocket protocol")
	}
	return nil
}

// sink throws away what the client still sends, until it closes or the session ends.
func (c *connection) sink(wait bool) (more bool) {
	c.early = nil
	buffer := make([]byte, 4096)
	for {
		_, err := poll.Read(c.conn, buffer, wait)
		switch {
		case errors.Is(err, poll.ErrNothing):
			return true
		case err != nil:
			c.session.Load().End(nil)
			return false
		}
	}
}

// lend gives a connection a reader.
func (g *Gateway) lend(c *connection, wait bool) *reader {
	r, _ := g.readers.Get().(*reader)
	if r == nil {
		r = g.newReader()
	}
	r.conn, r.wait, r.read = c, wait, false
	return r
}

// takeBack ends a loan.
func (g *Gateway) takeBack(r *reader) {
	r.conn = nil
	if !r.broken && r.in.Buffered() == 0 {
		g.readers.Put(r)
	}
}

// relax takes back the deadline that a message has had.
func (r *reader) relax() {
	if r.late {
		r.late = false
		r.conn.conn.SetReadDeadline(time.Time{})
	}
}

// readerConn is what gorilla takes for the socket: whichever the reader is lent for.
type readerConn struct {
	net.Conn // of what gorilla does not call
	reader   *reader
}

func (rc readerConn) Read(p []byte) (int, error) {
	r := rc.reader
	c := r.conn
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	if r.between {
		return poll.Read(c.conn, p, r.wait)
	}
	return r.rest(p)
}

// rest reads more of a message that has begun. All of it must come in good time.
func (r *reader) rest(p []byte) (int, error) {
	c, g := r.conn, r.gateway
	if n, err := poll.Read(c.conn, p, false); !errors.Is(err, poll.ErrNothing) {
		return n, err
	}
	if !r.late {
		r.late = true
		c.conn.SetReadDeadline(time.Now().Add(g.times.message))
	}
	if g.halfSent.Add(1) > g.maxHalfSent {
		g.halfSent.Add(-1)
		return 0, os.ErrDeadlineExceeded
	}
	defer g.halfSent.Add(-1)
	return c.conn.Read(p)
}

// Write takes what gorilla writes by itself, answers to protocol errors: the connection has its own.
func (readerConn) Write(p []byte) (int, error) { return len(p), nil }

func (readerConn) SetDeadline(time.Time) error      { return nil }
func (readerConn) SetWriteDeadline(time.Time) error { return nil }

// readerUpgrade is the request that a reader is made from.
type readerUpgrade struct {
	http.ResponseWriter // of what gorilla does not call
	reader              *reader
}

// Hijack implements http.Hijacker.
func (u readerUpgrade) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn := readerConn{reader: u.reader}
	return conn, bufio.NewReadWriter(u.reader.in, bufio.NewWriterSize(conn, 16)), nil
}
