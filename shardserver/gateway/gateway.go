// Package gateway is the WebSocket side of a shard server: it accepts connections, holds them
// until their guild can serve them, splices those that belong to another pod, and speaks the
// Discord Gateway protocol with the rest.
package gateway

import (
	"bufio"
	"context"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/directory"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/poll"
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
	// maxExtra bounds the connections beyond the shard's capacity that may still resume a session
	// whose old connection has not been missed yet.
	maxExtra = 256
	// helloSize is room for HELLO.
	helloSize = 64
	// answerTime is how long a client that is held may take to take the answer to its upgrade.
	answerTime = 10 * time.Second

	// pauseTime is from when on the process is said to have stood still: it was stopped, or its machine.
	pauseTime = 2 * time.Second

	restarting = "the server restarts"
)

// times of a Gateway; tests have shorter ones.
type times struct {
	// interval between heartbeats is what HELLO asks for, less a random part of spread.
	interval, spread time.Duration
	// grace is what a heartbeat may be late.
	grace time.Duration
	// identify is how long a client may take to identify or resume after HELLO.
	identify time.Duration
	// message is how long the rest of a message may take.
	message time.Duration
	// reconnect is what clients have between op 7 and the close; discordgo waits 1 s.
	reconnect time.Duration
}

var defaultTimes = times{
	interval: 45 * time.Second, spread: 5 * time.Second, grace: 20 * time.Second,
	identify: 30 * time.Second, message: 10 * time.Second, reconnect: 2500 * time.Millisecond,
}

// versions of the protocol, by the parameter that asks for them.
var versions = map[string]int8{"": 10, "10": 10, "9": 9}

// Directory knows where guilds are.
type Directory interface {
	Find(id snowflake.ID) (place directory.Place, changed <-chan struct{})
	Addresses(object *v1.Guild) v1.Addresses
	// SessionCapacity is how many connections this server is planned to hold.
	SessionCapacity() int
	// Reconnect asks all sessions to come back on another connection.
	Reconnect()
}

// Options of a Gateway.
type Options struct {
	Directory Directory
	Core      *fanout.Core
	// Poller tells when connections have something to read; nil: each has a goroutine that waits for it.
	Poller *poll.Poller
	// Keys returns the present key set.
	Keys func() *token.Keys
	// Dial connects to another pod, with the dialer's options; the dialer itself when nil.
	Dial func(ctx context.Context, d *net.Dialer, network, address string) (net.Conn, error)
	// HoldTime is the constant of that name when 0.
	HoldTime time.Duration
}

// Gateway serves WebSocket connections. Make one with New.
type Gateway struct {
	o        Options
	times    times
	maxHeld  int64
	upgrader websocket.Upgrader

	readers      sync.Pool // of *reader
	writeBuffers sync.Pool // gorilla's
	halfSent     atomic.Int64
	maxHalfSent  int64

	sweeper sync.Once

	mu      sync.Mutex
	conns   map[*connection]struct{}
	spliced map[*splice]struct{}
	emptied chan struct{} // told when the last connection has gone

	arrivals atomic.Uint64
	held     atomic.Int64
	sessions atomic.Int64
	extra    atomic.Int64
	draining atomic.Bool   // clients that come now are held
	quit     chan struct{} // closed when nobody is held any longer
}

// New makes a Gateway.
func New(o Options) *Gateway {
	if o.HoldTime == 0 {
		o.HoldTime = HoldTime
	}
	if o.Dial == nil {
		o.Dial = func(ctx context.Context, d *net.Dialer, network, address string) (net.Conn, error) {
			return d.DialContext(ctx, network, address)
		}
	}
	return &Gateway{
		o: o, times: defaultTimes, maxHeld: maxHeld, maxHalfSent: maxHalfSent,
		upgrader: websocket.Upgrader{
			WriteBufferSize: 512,
			WriteBufferPool: &sync.Pool{},
			// Clients prove themselves with tokens, not cookies: any origin may connect.
			CheckOrigin: func(*http.Request) bool { return true },
		},
		conns:   map[*connection]struct{}{},
		spliced: map[*splice]struct{}{},
		quit:    make(chan struct{}),
		emptied: make(chan struct{}, 1),
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
	places := g.maxHeld
	if place, _ := g.o.Directory.Find(id); place.Object == nil {
		places /= 4 // whoever asks for guilds that do not exist leaves room for those that do
	}
	if g.held.Load() >= places {
		http.Error(w, "too many connections wait for their guilds", http.StatusServiceUnavailable)
		return
	}
	upgrade := &upgrade{ResponseWriter: w}
	if _, err := g.upgrader.Upgrade(upgrade, r, nil); err != nil {
		return // the upgrader has answered
	}
	c := &connection{
		gateway: g, conn: upgrade.Conn, early: upgrade.early, id: id,
		version: versions[query.Get("v")], forwarded: r.Header.Get(directory.ForwardedHeader) != "",
	}
	g.add(c)
	if local := c.admitted(); local != nil {
		c.serve(local, upgrade.answer)
		return
	}
	// The request's goroutine ends here, with all that net/http keeps for it.
	go c.wait(upgrade.answer, r.URL.RequestURI())
}

// upgrade keeps the connection that gorilla takes over: afterwards messages are read by
// readers that are lent, and written by the session. It keeps gorilla's answer, too, which goes
// out together with HELLO if there is nothing to wait for.
type upgrade struct {
	http.ResponseWriter
	net.Conn
	early  []byte // sent by the client before it had the answer
	answer []byte
}

// Write implements net.Conn for gorilla.
func (u *upgrade) Write(p []byte) (int, error) {
	u.answer = append(make([]byte, 0, len(p)+helloSize), p...)
	return len(p), nil
}

// Hijack implements http.Hijacker.
func (u *upgrade) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(u.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	early, _ := rw.Reader.Peek(rw.Reader.Buffered())
	u.Conn, u.early = conn, append([]byte(nil), early...)
	return u, rw, nil
}

func (g *Gateway) add(c *connection) {
	g.arrivals.Add(1)
	g.sweeper.Do(func() { go g.sweep() })
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conns[c] = struct{}{}
}

func (g *Gateway) remove(c *connection) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, c)
	if len(g.conns) == 0 {
		select {
		case g.emptied <- struct{}{}:
		default:
		}
	}
}

// Arrivals is the number of connections that have come so far.
func (g *Gateway) Arrivals() uint64 { return g.arrivals.Load() }

// Held is the number of connections that wait for their guild.
func (g *Gateway) Held() int { return int(g.held.Load()) }

// HalfSent is the number of messages of which a part has come and the rest is waited for.
func (g *Gateway) HalfSent() int { return int(g.halfSent.Load()) }

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
	g.draining.Store(true)
	g.o.Directory.Reconnect()
	if g.Connections() > 0 {
		select {
		case <-time.After(g.times.reconnect):
		case <-ctx.Done():
		}
	}
	close(g.quit)
	g.mu.Lock()
	for c := range g.conns {
		c.close(protocol.CloseUnknownError, restarting)
	}
	for s := range g.spliced {
		s.close()
	}
	g.mu.Unlock()
	for g.Connections() > 0 {
		select {
		case <-g.emptied:
		case <-ctx.Done():
			return
		}
	}
}

// quitting says that connections are closed as they come.
func (g *Gateway) quitting() bool {
	select {
	case <-g.quit:
		return true
	default:
		return false
	}
}

// sweep closes the connections of clients that have not been heard of in time, until the Gateway quits.
func (g *Gateway) sweep() {
	period := max(min(g.times.identify, g.times.grace)/8, time.Millisecond)
	tick := time.NewTicker(period)
	defer tick.Stop()
	last := time.Now().UnixMilli()
	for {
		select {
		case <-tick.C:
		case <-g.quit:
			return
		}
		now := time.Now().UnixMilli()
		// While the process stood still it heard nobody: that is no client's fault.
		if pause := now - last - 2*period.Milliseconds(); pause > pauseTime.Milliseconds() {
			g.forgive(pause)
		}
		last = now
		g.mu.Lock()
		for c := range g.conns {
			c.expire(now)
		}
		g.mu.Unlock()
	}
}

// forgive gives every client so many milliseconds more.
func (g *Gateway) forgive(pause int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		if e := c.expires.Load(); e != 0 {
			c.expires.CompareAndSwap(e, e+pause)
		}
	}
}

// admitted returns the connection's guild if that can serve it at once, as it mostly can.
func (c *connection) admitted() *guild.Guild {
	g := c.gateway
	if place, _ := g.o.Directory.Find(c.id); place.Guild != nil && place.Relays == "" && !g.draining.Load() && g.admit() {
		return place.Guild
	}
	return nil
}

// hold waits until the connection's guild can serve it. It returns the guild, or the pod that
// holds it, or neither when the client has waited long enough.
func (c *connection) hold(request string) (local *guild.Guild, remote net.Conn) {
	g := c.gateway
	g.held.Add(1)
	defer g.held.Add(-1)
	deadline := time.Now().Add(g.o.HoldTime)
	timeout := time.NewTimer(g.o.HoldTime)
	defer timeout.Stop()
	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	for {
		place, changed := g.o.Directory.Find(c.id)
		if place.Relays != "" && !c.forwarded && !g.draining.Load() {
			if conn, err := g.dial(place.Relays, request, deadline); err == nil {
				return nil, conn
			}
			// Better here than nowhere.
		}
		switch {
		case g.draining.Load():
		case place.Guild != nil && g.admit():
			return place.Guild, nil
		case place.Guild != nil && time.Until(deadline) < g.o.HoldTime/2 && g.admitExtra():
			c.extra = true
			return place.Guild, nil
		case place.Remote != "" && !c.forwarded:
			if conn, err := g.dial(place.Remote, request, deadline); err == nil {
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

// admitExtra takes a place among those who may take over another's.
func (g *Gateway) admitExtra() bool {
	if g.extra.Add(1) > maxExtra {
		g.extra.Add(-1)
		return false
	}
	return true
}
