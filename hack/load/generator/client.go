package generator

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/hack/load/audit"
	"guildhall.dev/guildhall/hack/load/frame"
)

const (
	helloTimeout = 25 * time.Second // a held client gets its HELLO late
	authTimeout  = 30 * time.Second
	writeTimeout = 2 * time.Second
	maxMessage   = 64 << 20
	keptBuffer   = 64 << 10
)

// Opcodes.
const (
	opDispatch       = 0
	opHeartbeat      = 1
	opIdentify       = 2
	opResume         = 6
	opReconnect      = 7
	opInvalidSession = 9
	opHello          = 10
	opHeartbeatACK   = 11
)

// fatalError is an end that no reconnect would help.
type fatalError struct{ err error }

func (e *fatalError) Error() string { return e.err.Error() }
func (e *fatalError) Unwrap() error { return e.err }

// client is one user's connection to the guild and its session, over all reconnects. One
// goroutine reads; heartbeats and cuts come from others.
type client struct {
	swarm *swarm
	index int
	name  string
	token string

	// Of the reading goroutine.
	id        string // of the session; "" when there is none
	resumeURL string
	failed    int       // dials in a row that did not succeed
	wasLive   bool      // it has been live at some time
	came      bool      // this connection came into a session
	out       bool      // the guild is unavailable
	since     uint64    // acknowledged when the client last identified
	dialed    time.Time // when this connection was made
	lost      time.Time // when the session that is to resume lost its connection; zero: it has one

	session atomic.Pointer[audit.Session]
	seq     atomic.Uint64 // last number
	live    atomic.Bool   // in a session that has its snapshot

	mu       sync.Mutex
	conn     *websocket.Conn // nil while disconnected
	interval time.Duration   // of heartbeats; 0 before HELLO
	beat     time.Time       // of the next heartbeat
	acked    bool            // the last heartbeat was acknowledged
	asked    []time.Time     // when the client was asked to reconnect
}

// run keeps the client connected until ctx ends or nothing helps.
func (c *client) run(ctx context.Context) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		if attempt > 0 || c.wasLive {
			if sleep(ctx, backoff(attempt)) != nil {
				return
			}
		}
		live, err := c.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		if live {
			attempt = -1
		}
		if _, ok := errors.AsType[*fatalError](err); ok {
			c.swarm.fail(fmt.Errorf("session %s: %w", c.name, err))
			return
		}
		c.swarm.lastError.Store(&err)
	}
}

// connect makes one connection and serves it to its end; live tells that it came into a session.
func (c *client) connect(ctx context.Context) (live bool, err error) {
	conn, stop, err := c.dial(ctx)
	if err != nil {
		c.failed++
		return false, err
	}
	c.failed, c.dialed = 0, time.Now()
	defer stop()
	conn.SetReadLimit(maxMessage)
	c.mu.Lock()
	c.conn, c.interval, c.acked = conn, 0, true
	c.mu.Unlock()
	c.came = false
	defer func() {
		live = c.came
		c.dead()
		if c.came && c.lost.IsZero() {
			c.lost = time.Now()
			if at := c.swarm.disturbed.Load(); at != nil && at.After(c.dialed) {
				c.lost = *at // what was still to be read does not count
			}
		}
		c.mu.Lock()
		c.conn = nil
		c.mu.Unlock()
		_ = conn.Close()
	}()
	err = c.serve(ctx, conn)
	if closed, ok := errors.AsType[*websocket.CloseError](err); ok {
		switch closed.Code {
		case 4004, 4010, 4011, 4012, 4013, 4014:
			return false, &fatalError{err}
		case 4003, 4005, 4007, 4009:
			c.forget(closed.Error())
		}
	}
	return false, err
}

// dial opens the WebSocket. The connection is closed when ctx ends, until stop.
func (c *client) dial(ctx context.Context) (*websocket.Conn, func() bool, error) {
	// A resume URL that does not answer, such as one that only the cluster knows, is left for
	// the first one every other time.
	address := c.swarm.guild.gateway
	if c.id != "" && c.resumeURL != "" && c.failed%2 == 0 {
		address = c.resumeURL
	}
	select {
	case c.swarm.dials <- struct{}{}:
		defer func() { <-c.swarm.dials }()
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	dialer := *c.swarm.dialer
	stop := func() bool { return true }
	local := c.swarm.local(c.index, address)
	dialer.NetDialContext = func(ctx2 context.Context, network, addr string) (net.Conn, error) {
		d := net.Dialer{KeepAlive: -1}
		if local != nil {
			d.LocalAddr, d.Control = local, bindLate
		}
		conn, err := d.DialContext(ctx2, network, addr)
		if err == nil {
			stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
		}
		return conn, err
	}
	conn, resp, err := dialer.DialContext(ctx, address+"?v=10&encoding=json", nil)
	if err == nil {
		return conn, stop, nil
	}
	stop()
	if resp != nil {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
		_ = resp.Body.Close()
		err = &statusError{status: resp.StatusCode, body: string(b)}
		if !c.wasLive && !passing(err) {
			return nil, nil, &fatalError{fmt.Errorf("connecting: %w", err)}
		}
	}
	return nil, nil, fmt.Errorf("connecting: %w", err)
}

// serve speaks the protocol on a connection until it ends.
func (c *client) serve(ctx context.Context, conn *websocket.Conn) error {
	if err := conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	waiting := true // for READY or RESUMED, or the first of what was missed
	for {
		_, r, err := conn.NextReader()
		if err != nil {
			return err
		}
		buffer := c.swarm.buffers.Get().(*[]byte)
		*buffer, err = readAll(r, (*buffer)[:0])
		if err != nil {
			return err
		}
		f, err := frame.Parse(*buffer)
		if err != nil {
			return fmt.Errorf("unreadable frame: %w", err)
		}
		if observe := c.swarm.observe; observe != nil {
			observe(f)
		}
		if f.Op == opDispatch {
			if waiting {
				waiting = false
				if err := conn.SetReadDeadline(time.Time{}); err != nil {
					return err
				}
			}
			err = c.dispatch(f)
		} else {
			err = c.control(ctx, conn, f)
		}
		if err != nil {
			return err
		}
		if cap(*buffer) <= keptBuffer {
			c.swarm.buffers.Put(buffer)
		}
	}
}

func readAll(r io.Reader, b []byte) ([]byte, error) {
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if errors.Is(err, io.EOF) {
			return b, nil
		}
		if err != nil {
			return b, err
		}
	}
}

// control handles what is not a dispatch.
func (c *client) control(ctx context.Context, conn *websocket.Conn, f frame.Frame) error {
	switch f.Op {
	case opHello:
		var hello struct {
			Interval int64 `json:"heartbeat_interval"`
		}
		if err := json.Unmarshal(f.Data, &hello); err != nil || hello.Interval <= 0 {
			return fmt.Errorf("unreadable HELLO %.100s", f.Data)
		}
		interval := time.Duration(hello.Interval) * time.Millisecond
		c.mu.Lock()
		c.interval = interval
		c.beat = time.Now().Add(rand.N(interval)) //nolint:gosec // only jitter
		c.mu.Unlock()
		return c.authenticate(conn)
	case opHeartbeat:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.heartbeat(time.Now())
	case opHeartbeatACK:
		c.mu.Lock()
		c.acked = true
		c.mu.Unlock()
	case opReconnect:
		c.mu.Lock()
		c.asked = append(c.asked, time.Now())
		c.mu.Unlock()
		_ = conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(4200, ""), time.Now().Add(writeTimeout))
		return errors.New("asked to reconnect")
	case opInvalidSession:
		if string(f.Data) != "true" {
			c.forget("op 9")
		}
		wait := 100*time.Millisecond + rand.N(900*time.Millisecond) //nolint:gosec // only jitter
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		return c.authenticate(conn)
	}
	return nil
}

// forget ends the session that the server does not know any more: the next one begins anew.
func (c *client) forget(how string) {
	c.dead()
	if c.id == "" {
		return
	}
	c.id = ""
	if s := c.session.Load(); s != nil {
		s.Invalidated(how)
	}
}

// authenticate identifies, or resumes the session that there is.
func (c *client) authenticate(conn *websocket.Conn) error {
	if err := conn.SetReadDeadline(time.Now().Add(authTimeout)); err != nil {
		return err
	}
	var message any
	if c.id != "" {
		message = map[string]any{"op": opResume, "d": map[string]any{
			"token": c.token, "session_id": c.id, "seq": c.seq.Load(),
		}}
	} else {
		c.since = c.swarm.auditor.Last()
		message = map[string]any{"op": opIdentify, "d": map[string]any{
			"token": c.token, "intents": c.swarm.intents,
			"properties": map[string]string{"os": "linux", "browser": "guildhall-load", "device": "guildhall-load"},
		}}
	}
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.write(b)
}

// write sends a message; c.mu is held.
func (c *client) write(b []byte) error {
	if c.conn == nil {
		return net.ErrClosed
	}
	if err := c.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	return c.conn.WriteMessage(websocket.TextMessage, b)
}

// heartbeat sends one; c.mu is held.
func (c *client) heartbeat(now time.Time) error {
	b := append(make([]byte, 0, 40), `{"op":1,"d":`...)
	if seq := c.seq.Load(); seq > 0 {
		b = strconv.AppendUint(b, seq, 10)
	} else {
		b = append(b, "null"...)
	}
	c.acked = false
	c.beat = now.Add(c.interval)
	return c.write(append(b, '}'))
}

// tick sends a heartbeat when it is due, and ends a connection that did not acknowledge the
// last one.
func (c *client) tick(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil || c.interval == 0 || now.Before(c.beat) {
		return
	}
	if !c.acked || c.heartbeat(now) != nil {
		_ = c.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(4900, "no heartbeat ACK"), now.Add(writeTimeout))
		_ = c.conn.Close()
	}
}

// cut breaks the connection off, without any closing and with the unread bytes lost; false when
// there is none with a session.
func (c *client) cut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil || !c.live.Load() {
		return false
	}
	conn := c.conn.NetConn()
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	if t, ok := conn.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	if conn.Close() != nil {
		return false // cut already
	}
	c.dead()
	return true
}

// leave says goodbye; the session ends.
func (c *client) leave(deadline time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		_ = c.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), deadline)
	}
}

// dispatch takes a dispatch to the audit.
func (c *client) dispatch(f frame.Frame) error {
	if f.S > c.seq.Load() {
		c.seq.Store(f.S)
	}
	s := c.session.Load()
	if s == nil && string(f.Type) != "READY" {
		return fmt.Errorf("%.50s before READY", f.Type)
	}
	switch string(f.Type) {
	case "READY":
		return c.ready(f)
	case "RESUMED":
		c.swarm.resumed.Add(1)
		s.Told(f.S)
		if _, begun := s.Position(); begun && !c.out {
			if !c.lost.IsZero() {
				c.swarm.away.add(c.index, time.Since(c.lost))
			}
			c.alive()
		}
	case "GUILD_CREATE":
		c.guildCreate(s, f)
	case "GUILD_DELETE":
		c.dead()
		s.Invalidated("GUILD_DELETE")
		if !unavailable(f.Data) {
			return &fatalError{errors.New("GUILD_DELETE: no longer a member, or the guild is gone")}
		}
		c.out = true
	case "TYPING_START", "PRESENCE_UPDATE", "GUILD_MEMBERS_CHUNK", "SOUNDBOARD_SOUNDS", "CHANNEL_INFO", "RATE_LIMITED",
		"GUILD_MEMBER_LIST_UPDATE", "PASSIVE_UPDATE_V1", "PASSIVE_UPDATE_V2", "CHANNEL_UNREAD_UPDATE", "VOICE_SERVER_UPDATE",
		"READY_SUPPLEMENTAL":
		s.Told(f.S) // volatile, or an answer: it repeats the session's number
	default:
		p, what := find(f.Data)
		switch {
		case what == damaged:
			s.Damaged(f.S)
		case what == whole && p.run == c.swarm.runID:
			c.swarm.latency.add(c.index, time.Since(p.sent))
			s.Event(f.S, p.event, hash(f))
		default:
			s.Other(f.S, xxhash.Sum64(f.Type), hash(f))
		}
	}
	return nil
}

// hash of a frame's body and type.
func hash(f frame.Frame) uint64 {
	return xxhash.Sum64(f.Data) ^ xxhash.Sum64(f.Type)*31
}

func (c *client) ready(f frame.Frame) error {
	var ready struct {
		SessionID string `json:"session_id"`
		ResumeURL string `json:"resume_gateway_url"`
	}
	if err := json.Unmarshal(f.Data, &ready); err != nil || ready.SessionID == "" {
		return fmt.Errorf("unreadable READY %.100s", f.Data)
	}
	if old := c.session.Load(); old != nil {
		old.Invalidated("READY of another")
		c.swarm.reidentified.Add(1)
	}
	c.id, c.resumeURL, c.out = ready.SessionID, ready.ResumeURL, false
	c.seq.Store(f.S)
	s := c.swarm.auditor.Session(c.name, "", c.since)
	s.Told(f.S)
	c.session.Store(s)
	return nil
}

func (c *client) guildCreate(s *audit.Session, f frame.Frame) {
	if unavailable(f.Data) {
		s.Told(f.S)
		return
	}
	_, begun := s.Position()
	switch {
	case c.out: // the guild is back: its state replaces what was missed
		s = c.swarm.auditor.Session(c.name, "", 0)
		c.session.Store(s)
		c.out = false
		s.Snapshot(f.S)
	case begun:
		s.Told(f.S)
	default:
		s.Snapshot(f.S)
	}
	if c.swarm.channel.Load() == nil {
		var g struct {
			Channels []channel `json:"channels"`
		}
		if json.Unmarshal(f.Data, &g) == nil {
			id := firstText(g.Channels)
			c.swarm.channel.CompareAndSwap(nil, &id)
		}
	}
	c.alive()
}

func (c *client) alive() {
	c.wasLive, c.came, c.lost = true, true, time.Time{}
	if !c.live.Swap(true) {
		c.swarm.live.Add(1)
		c.swarm.changed()
	}
}

func (c *client) dead() {
	if c.live.Swap(false) {
		c.swarm.live.Add(-1)
	}
}

// unavailable reads the field of a guild's stub.
func unavailable(body []byte) bool {
	is := false
	_ = frame.Fields(body, func(key, value []byte) {
		if string(key) == "unavailable" {
			is = string(value) == "true"
		}
	})
	return is
}
