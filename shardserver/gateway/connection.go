package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

// connection is one client: held, then spliced or served. Its goroutine reads; all writes go
// through the session.
type connection struct {
	gateway   *Gateway
	ws        *websocket.Conn
	conn      *sharedConn
	id        snowflake.ID
	version   string
	request   string // path and query
	forwarded bool   // came from another pod

	session *fanout.Session
	guild   *guild.Guild

	mu       sync.Mutex
	attached bool // identified or resumed

	client  guild.Client
	budget  int       // messages left in the present window
	renewed time.Time // when the window began
}

func (c *connection) run() {
	g := c.gateway
	defer g.remove(c)
	local, remote := c.hold()
	if remote != nil {
		g.splice(c.conn.Conn, remote)
		return
	}
	session := g.o.Core.NewSession(c.conn.Conn)
	c.mu.Lock()
	c.session = session
	c.mu.Unlock()
	c.conn.session.Store(session)
	defer session.End(nil)
	if local == nil {
		c.close(protocol.CloseUnknownError, "the guild is not available")
		c.discard()
		return
	}
	defer g.sessions.Add(-1)
	c.guild = local
	c.serve()
	c.mu.Lock()
	attached := c.attached
	c.mu.Unlock()
	if attached {
		local.Detach(c.client)
	}
}

// readLimit is where gorilla stops reading a message. Those between MaxClientPayload and this
// limit are answered with the protocol's own close code.
const readLimit = 64 << 10

// closeError ends a connection with a close code.
type closeError struct {
	code   int
	reason string
}

func (e *closeError) Error() string { return strconv.Itoa(e.code) + " " + e.reason }

func (c *connection) serve() {
	if c.version != "" && c.version != "10" && c.version != "9" {
		c.close(protocol.CloseInvalidVersion, "v: expected 10 or 9")
		c.discard()
		return
	}
	c.ws.SetReadLimit(readLimit)
	c.ws.SetPingHandler(func(data string) error {
		c.session.Send(protocol.PongFrame([]byte(data)))
		return nil
	})
	c.ws.SetCloseHandler(func(code int, _ string) error {
		if code == websocket.CloseNoStatusReceived {
			code = websocket.CloseNormalClosure
		}
		c.session.Close(protocol.CloseFrame(code, ""))
		return nil
	})
	interval := heartbeatInterval - time.Duration(rand.Int64N(int64(heartbeatSpread)))
	c.session.Send(protocol.Hello(int(interval.Milliseconds())))
	c.expectWithin(identifyTimeout)
	for {
		kind, payload, err := c.read()
		if err == nil && kind != websocket.TextMessage {
			err = &closeError{protocol.CloseDecodeError, "expected a text message"}
		}
		if err == nil {
			err = c.handle(payload, interval+heartbeatGrace)
		}
		if err == nil {
			continue
		}
		var closing *closeError
		if errors.As(err, &closing) {
			c.close(closing.code, closing.reason)
			c.discard()
		} else if isTimeout(err) {
			c.close(protocol.CloseSessionTimeout, "no heartbeat in time")
			c.discard()
		}
		return
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// read reads one message of at most MaxClientPayload bytes.
func (c *connection) read() (int, []byte, error) {
	kind, payload, err := c.ws.ReadMessage()
	if err == nil && len(payload) > protocol.MaxClientPayload {
		return 0, nil, &closeError{protocol.CloseDecodeError, "payload too large"}
	}
	return kind, payload, err
}

func (c *connection) expectWithin(d time.Duration) {
	select {
	case <-c.session.Done():
	default:
		c.ws.SetReadDeadline(time.Now().Add(d))
	}
}

// discard reads until the peer closes or the session's last deadline passes.
func (c *connection) discard() {
	io.Copy(io.Discard, io.LimitReader(c.conn.Conn, 1<<20))
}

func (c *connection) close(code int, reason string) {
	c.mu.Lock()
	session := c.session
	c.mu.Unlock()
	if session == nil { // held or spliced: ends with its socket
		c.conn.Close()
		return
	}
	session.Close(protocol.CloseFrame(code, reason))
}

// askToReconnect sends op 7, but never before the first dispatch: several libraries start over or hang on that.
func (c *connection) askToReconnect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.attached {
		c.session.Send(protocol.Reconnect)
	}
}

// handle acts on one message of the client.
func (c *connection) handle(payload []byte, patience time.Duration) error {
	if err := c.spend(); err != nil {
		return err
	}
	var m protocol.Message
	if err := json.Unmarshal(payload, &m); err != nil {
		return &closeError{protocol.CloseDecodeError, "expected a JSON object with op and d"}
	}
	switch m.Op {
	case protocol.OpHeartbeat:
		c.session.Send(protocol.HeartbeatACK)
		if c.attached {
			c.expectWithin(patience)
		}
		return nil
	case protocol.OpIdentify, protocol.OpResume:
		if c.attached {
			return &closeError{protocol.CloseAlreadyAuthenticated, "already identified"}
		}
		if m.Op == protocol.OpIdentify {
			return c.identify(m.Data, patience)
		}
		return c.resume(m.Data, patience)
	}
	if !c.attached {
		return &closeError{protocol.CloseNotAuthenticated, "expected op 2 or 6 first"}
	}
	switch m.Op {
	case protocol.OpPresenceUpdate, protocol.OpVoiceStateUpdate, protocol.OpRequestGuildMembers,
		protocol.OpGuildSubscriptions, protocol.OpBulkSubscriptions, protocol.OpSoundboardSounds, protocol.OpChannelInfo:
		return nil // known, and without effect in this version
	}
	return &closeError{protocol.CloseUnknownOpcode, "unknown op " + strconv.Itoa(m.Op)}
}

// spend counts a message against the client's limit of 120 per 60 s.
func (c *connection) spend() error {
	now := time.Now()
	if now.Sub(c.renewed) >= time.Minute {
		c.budget, c.renewed = protocol.MaxClientMessages, now
	}
	if c.budget == 0 {
		return &closeError{protocol.CloseRateLimited, "more than 120 messages in 60 s"}
	}
	c.budget--
	return nil
}

// identifyData is op 2. Libraries send more than is documented, so what is not needed is not looked at.
type identifyData struct {
	Token        string          `json:"token"`
	Intents      *uint64         `json:"intents"`
	Capabilities json.RawMessage `json:"capabilities"`
	Shard        json.RawMessage `json:"shard"`
}

func (c *connection) identify(data json.RawMessage, patience time.Duration) error {
	var d identifyData
	if err := json.Unmarshal(data, &d); err != nil {
		return &closeError{protocol.CloseDecodeError, "d: expected token, intents and properties"}
	}
	keys := c.gateway.o.Keys()
	claims, err := keys.Verify(d.Token, time.Now())
	if err != nil {
		return &closeError{protocol.CloseAuthenticationFailed, "authentication failed"}
	}
	if d.Intents == nil || !protocol.ValidIntents(*d.Intents) {
		return &closeError{protocol.CloseInvalidIntents, "invalid intents"}
	}
	var capabilities uint64
	json.Unmarshal(d.Capabilities, &capabilities) // 0 unless it is a number
	shard, mine, err := shardOf(d.Shard, c.id)
	if err != nil {
		return err
	}
	c.client = guild.Client{
		Session: c.session, User: guild.NewUser(claims.User, claims.Name, claims.Bot),
		Random: rand.Uint64(), Intents: *d.Intents,
	}
	ctx, cancel := context.WithTimeout(context.Background(), identifyTimeout)
	defer cancel()
	err = c.guild.Identify(ctx, c.client, func(s guild.Snapshot) {
		sealed := keys.Seal(token.Session{
			Log: c.guild.LogID(), Base: s.Base, User: claims.User, Random: c.client.Random,
			Intents: *d.Intents, Capabilities: capabilities, Issued: time.Now(),
		})
		c.setAttached()
		member := s.Guild != nil && mine
		c.send("READY", s.Base-1, c.ready(sealed, shard, member))
		if member && *d.Intents&protocol.IntentGuilds != 0 {
			c.send("GUILD_CREATE", s.Base, s.Guild)
		}
	})
	return c.started(err, patience)
}

// started ends the attempt to identify or resume.
func (c *connection) started(err error, patience time.Duration) error {
	switch {
	case err == nil:
		c.expectWithin(patience)
		return nil
	case errors.Is(err, guild.ErrClosed), errors.Is(err, guild.ErrBusy):
		return &closeError{protocol.CloseUnknownError, "the guild is not available"}
	case errors.Is(err, guild.ErrFutureSeq):
		return &closeError{protocol.CloseInvalidSeq, "seq is above all that was sent"}
	case errors.Is(err, guild.ErrNotResumable):
		c.session.Send(protocol.InvalidSession) // the client identifies on this connection or on a new one
		c.expectWithin(identifyTimeout)
		return nil
	}
	return err
}

func (c *connection) setAttached() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.attached = true
}

func (c *connection) send(event string, seq uint64, body []byte) {
	frame, _ := protocol.Dispatch(event, seq, body)
	c.session.Send(frame)
}

// shardOf reads the shard of an Identify: [index, count]. mine: the guild belongs to that shard
// (https://docs.discord.com/developers/events/gateway#sharding).
func shardOf(raw json.RawMessage, id snowflake.ID) (shard *[2]int, mine bool, err error) {
	if len(raw) == 0 || string(raw) == "null" {
		return nil, true, nil
	}
	var list []int
	if json.Unmarshal(raw, &list) != nil || len(list) != 2 || list[0] < 0 || list[1] < 1 || list[0] >= list[1] {
		return nil, false, &closeError{protocol.CloseInvalidShard, "shard: expected [index, count] with index below count"}
	}
	return &[2]int{list[0], list[1]}, uint64(id>>22)%uint64(list[1]) == uint64(list[0]), nil
}

// readyData is READY's body: what all known libraries need of it.
type readyData struct {
	Version          int          `json:"v"`
	User             readyUser    `json:"user"`
	Guilds           []stub       `json:"guilds"`
	PrivateChannels  []struct{}   `json:"private_channels"` // undocumented, but eris needs it
	SessionID        string       `json:"session_id"`
	ResumeGatewayURL string       `json:"resume_gateway_url"`
	Shard            *[2]int      `json:"shard,omitempty"`
	Application      *application `json:"application"`
}

type readyUser struct {
	guild.User
	MFAEnabled bool    `json:"mfa_enabled"`
	Verified   bool    `json:"verified"`
	Email      *string `json:"email"`
	Flags      int     `json:"flags"`
}

type stub struct {
	ID          snowflake.ID `json:"id"`
	Unavailable bool         `json:"unavailable"`
}

type application struct {
	ID    snowflake.ID `json:"id"`
	Flags int          `json:"flags"`
}

func (c *connection) ready(sessionID string, shard *[2]int, member bool) []byte {
	place, _ := c.gateway.o.Directory.Find(c.id)
	d := readyData{
		Version: 10, User: readyUser{User: c.client.User, Verified: true},
		Guilds: []stub{}, PrivateChannels: []struct{}{}, SessionID: sessionID, Shard: shard,
		Application: &application{ID: c.client.User.ID},
	}
	if c.version == "9" {
		d.Version = 9
	}
	if place.Object != nil {
		d.ResumeGatewayURL = c.gateway.o.Directory.Addresses(place.Object).Gateway
	}
	if member {
		d.Guilds = append(d.Guilds, stub{ID: c.id, Unavailable: true})
	}
	body, err := json.Marshal(d)
	if err != nil { // only for types that JSON does not know
		panic(err)
	}
	return body
}

// resumeData is op 6.
type resumeData struct {
	Token     string `json:"token"`
	SessionID string `json:"session_id"`
	Seq       uint64 `json:"seq"`
}

func (c *connection) resume(data json.RawMessage, patience time.Duration) error {
	var d resumeData
	if err := json.Unmarshal(data, &d); err != nil {
		return &closeError{protocol.CloseDecodeError, "d: expected token, session_id and seq"}
	}
	keys := c.gateway.o.Keys()
	claims, err := keys.Verify(d.Token, time.Now())
	if err != nil {
		return &closeError{protocol.CloseAuthenticationFailed, "authentication failed"}
	}
	sealed, err := keys.Open(d.SessionID)
	if err != nil || sealed.User != claims.User {
		return c.started(guild.ErrNotResumable, patience)
	}
	c.client = guild.Client{
		Session: c.session, User: guild.NewUser(claims.User, claims.Name, claims.Bot),
		Random: sealed.Random, Intents: sealed.Intents,
	}
	err = c.guild.Resume(c.client, guild.Resumption{Log: sealed.Log, Base: sealed.Base, Seq: d.Seq}, func(s guild.Snapshot) {
		if sealed.Intents&protocol.IntentGuilds != 0 {
			c.send("GUILD_CREATE", s.Base, s.Guild)
		}
	})
	if err == nil {
		c.setAttached()
	}
	return c.started(err, patience)
}
