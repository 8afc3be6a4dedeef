// Package gateway is the WebSocket side of a shard server: it accepts connections, holds them
// until their guild can serve them, splices those that belong to another pod, and speaks the
// Discord Gateway protocol with the rest.
package gateway

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/shardserver/directory"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

const (
	// HoldTime is how long a client waits for HELLO while its guild cannot serve it. All known
	// libraries take 14 s; one that is refused instead may drop its session.
	HoldTime = 12 * time.Second
	// maxHeld bounds the connections that are held at a time.
	maxHeld = 4096
	// heartbeatInterval is what HELLO asks for, less a random part that spreads the beats.
	heartbeatInterval = 45 * time.Second
	heartbeatSpread   = 5 * time.Second
	// heartbeatGrace is what a heartbeat may be late.
	heartbeatGrace = 20 * time.Second
	// identifyTimeout is how long a client may take to identify or resume after HELLO.
	identifyTimeout = 30 * time.Second
	// reconnectGrace is how long clients have between op 7 and the close; discordgo waits 1 s.
	reconnectGrace = 2500 * time.Millisecond
	// sendBuffer bounds what the kernel keeps for a slow client.
	sendBuffer = 256 << 10
)

// Options of a Gateway.
type Options struct {
	Directory *directory.Directory
	Core      *fanout.Core
	// Keys returns the present key set.
	Keys   func() *token.Keys
	Logger *slog.Logger
	// HoldTime is the constant of that name when 0.
	HoldTime time.Duration
}

// Gateway serves WebSocket connections. Make one with New.
type Gateway struct {
	o        Options
	upgrader websocket.Upgrader

	mu       sync.Mutex
	conns    map[*connection]struct{}
	spliced  map[*splice]struct{}
	draining bool
	wait     sync.WaitGroup

	held     atomic.Int64
	sessions atomic.Int64
	quit     chan struct{} // closed when nobody is held any longer
}

// New makes a Gateway.
func New(o Options) *Gateway {
	if o.HoldTime == 0 {
		o.HoldTime = HoldTime
	}
	return &Gateway{
		o: o,
		upgrader: websocket.Upgrader{
			HandshakeTimeout: 10 * time.Second,
			ReadBufferSize:   512,
			WriteBufferSize:  512,
			WriteBufferPool:  &sync.Pool{},
			// Clients prove themselves with tokens, not cookies: any origin may connect.
			CheckOrigin: func(*http.Request) bool { return true },
		},
		conns:   map[*connection]struct{}{},
		spliced: map[*splice]struct{}{},
		quit:    make(chan struct{}),
	}
}

// Serve upgrades a request for the guild with that id and serves the connection.
func (g *Gateway) Serve(w http.ResponseWriter, r *http.Request, id snowflake.ID) {
	query := r.URL.Query()
	if e := query.Get("encoding"); e != "" && e != "json" {
		http.Error(w, "encoding: expected json, the one that this version speaks, got "+strconv.Quote(e), http.StatusBadRequest)
		return
	}
	if c := query.Get("compress"); c != "" {
		http.Error(w, "compress: expected none, this version speaks uncompressed JSON, got "+strconv.Quote(c), http.StatusBadRequest)
		return
	}
	if g.held.Load() >= maxHeld {
		http.Error(w, "too many connections wait for their guilds", http.StatusServiceUnavailable)
		return
	}
	hijacker := &hijacker{ResponseWriter: w}
	ws, err := g.upgrader.Upgrade(hijacker, r, nil)
	if err != nil {
		return // the upgrader has answered
	}
	if tcp, ok := hijacker.conn.Conn.(*net.TCPConn); ok {
		tcp.SetWriteBuffer(sendBuffer)
	}
	c := &connection{
		gateway: g, ws: ws, conn: hijacker.conn, id: id,
		version: query.Get("v"), request: r.URL.RequestURI(), forwarded: r.Header.Get(splicedHeader) != "",
	}
	if !g.add(c) {
		ws.Close()
		return
	}
	// The request's goroutine ends here, with all that net/http keeps for it.
	go c.run()
}

func (g *Gateway) add(c *connection) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.draining {
		return false
	}
	g.conns[c] = struct{}{}
	g.wait.Add(1)
	return true
}

func (g *Gateway) remove(c *connection) {
	g.mu.Lock()
	delete(g.conns, c)
	g.mu.Unlock()
	g.wait.Done()
}

// Held is the number of connections that wait for their guild.
func (g *Gateway) Held() int { return int(g.held.Load()) }

// Spliced is the number of connections that are forwarded to another pod.
func (g *Gateway) Spliced() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.spliced)
}

// Connections is the number of all connections.
func (g *Gateway) Connections() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.conns)
}

// Sessions is the number of connections that have identified or resumed.
func (g *Gateway) Sessions() int { return int(g.sessions.Load()) }

// Drain asks every session to reconnect (op 7), closes the connections shortly afterwards in a way
// that lets sessions resume, and returns when they are gone or ctx ends. It is called once.
func (g *Gateway) Drain(ctx context.Context) {
	g.mu.Lock()
	g.draining = true
	for c := range g.conns {
		c.askToReconnect()
	}
	g.mu.Unlock()
	select {
	case <-time.After(reconnectGrace):
	case <-ctx.Done():
	}
	close(g.quit)
	g.mu.Lock()
	for c := range g.conns {
		c.close(protocol.CloseUnknownError, "the server restarts")
	}
	for s := range g.spliced {
		s.close()
	}
	g.mu.Unlock()
	gone := make(chan struct{})
	go func() {
		g.wait.Wait()
		close(gone)
	}()
	select {
	case <-gone:
	case <-ctx.Done():
	}
}

// hijacker hands the upgrader the connection in a wrapper: once a session owns the connection,
// gorilla's own control messages go through the session.
type hijacker struct {
	http.ResponseWriter
	conn *sharedConn
}

// hold waits until the connection's guild can serve it. It returns the guild, or the pod that
// holds it, or neither when the client has waited long enough.
func (c *connection) hold() (local *guild.Guild, remote net.Conn) {
	g := c.gateway
	g.held.Add(1)
	defer g.held.Add(-1)
	deadline := time.Now().Add(g.o.HoldTime)
	timeout := time.NewTimer(g.o.HoldTime)
	defer timeout.Stop()
	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	for attempt := 0; ; attempt++ {
		place, changed := g.o.Directory.Find(c.id)
		switch {
		case place.Guild != nil && g.admit():
			return place.Guild, nil
		case place.Remote != "" && !c.forwarded:
			if conn, err := g.dial(place.Remote, c.request, deadline); err == nil {
				return nil, conn
			}
		}
		// Looked at again when the directory changes, and now and then: a pod may be back, a session gone.
		retry.Reset(time.Duration(100+rand.IntN(200)) * time.Millisecond)
		select {
		case <-changed:
		case <-retry.C:
		case <-timeout.C:
			return nil, nil
		case <-g.quit:
			return nil, nil
		}
	}
}

// admit takes a place among the sessions of this server, if there is one.
func (g *Gateway) admit() bool {
	if g.sessions.Add(1) > int64(g.o.Directory.SessionCapacity()) {
		g.sessions.Add(-1)
		return false
	}
	return true
}
