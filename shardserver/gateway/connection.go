package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/poll"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

// connection is one client: held, then spliced or served. All writes go through the session.
// Messages of the client are read where they arrive: by a goroutine that the poller starts, or where
// there is no poller, by the connection's own.
type connection struct {
	gateway   *Gateway
	conn      net.Conn
	id        snowflake.ID
	version   int8   // of the protocol: 9, 10, or 0 for one that is not spoken here
	early     []byte // came with the handshake, or was left in a broken reader
	forwarded bool   // came from another pod

	session  atomic.Pointer[fanout.Session] // nil while the connection is held or spliced
	closing  atomic.Bool                    // a close message is on its way: the client is not listened to any more
	expires  atomic.Int64                   // when the client must have been heard of, Unix milliseconds; 0: no matter
	guild    *guild.Guild
	interval time.Duration

	mu       sync.Mutex
	watched  *poll.Handle
	attached bool // identified or resumed
	gone     bool // the session has ended
	extra    bool // has no place among the sessions, but may take over that of one that it resumes

	reading sync.Mutex   // held by whoever reads, and owns what follows
	deaf    bool         // what still comes is not the protocol any more
	user    snowflake.ID // who has identified or resumed
	random  uint64       // of the session's id
	budget  int32        // messages left in the present window
	renewed int64        // when the window began, Unix milliseconds
}

// wait sends the answer to the upgrade, holds the connection, and begins to serve it. request is its
// path and query.
func (c *connection) wait(answer []byte, request string) {
	g := c.gateway
	c.conn.SetWriteDeadline(time.Now().Add(answerTime))
	c.conn.Write(answer) //nolint:errcheck // if the socket is gone, reading tells
	c.conn.SetWriteDeadline(time.Time{})
	local, remote := c.hold(request)
	if remote != nil {
		g.splice(c.conn, remote, c.early)
		g.remove(c)
		return
	}
	c.serve(local, nil)
}

// serve begins to serve the connection: with what is to be written first, and HELLO. local is nil if there
// is no guild to be had.
func (c *connection) serve(local *guild.Guild, first []byte) {
	g := c.gateway
	c.guild = local
	if local != nil && c.version != 0 {
		c.interval = g.times.interval - rand.N(g.times.spread)
		c.expectWithin(g.times.identify)
		first = append(first, protocol.Hello(int(c.interval.Milliseconds()))...)
	}
	session := g.o.Core.NewSession(c.conn, c.ended)
	session.Open(first)
	c.session.Store(session)
	switch {
	case local == nil:
		c.close(protocol.CloseUnknownError, "the guild is not available")
	case g.quitting(): // Drain may not have seen the session
		c.close(protocol.CloseUnknownError, restarting)
	case c.version == 0:
		c.close(protocol.CloseInvalidVersion, "v: expected 10 or 9")
	}
	if !c.watch() {
		go c.read(true)
	}
}

// watch leaves the reading to the poller, if there is one that can have the connection.
func (c *connection) watch() bool {
	if c.gateway.o.Poller == nil {
		return false
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	watched, err := c.gateway.o.Poller.Add(c.conn, c.readable)
	if err != nil {
		return false
	}
	c.mu.Lock()
	c.watched = watched
	gone := c.gone
	c.mu.Unlock()
	if gone {
		watched.Remove()
	} else if len(c.early) > 0 {
		c.readMore()
	}
	return true
}

// readable is called when there is something to read.
func (c *connection) readable() {
	c.reading.Lock()
	defer c.reading.Unlock()
	c.readMore()
}

// readMore reads what there is, and has the poller tell when there is more.
func (c *connection) readMore() {
	if !c.read(false) {
		return
	}
	if err := c.watched.Arm(); err != nil {
		c.session.Load().End(err)
	}
}

// ended is called when the session has ended, and with it the socket.
func (c *connection) ended(error) {
	c.mu.Lock()
	c.gone = true
	attached, watched, extra := c.attached, c.watched, c.extra
	c.mu.Unlock()
	if watched != nil {
		watched.Remove()
	}
	if attached {
		c.guild.Detach(c.session.Load(), c.user, c.random)
	}
	switch {
	case extra:
		c.gateway.extra.Add(-1)
	case c.guild != nil:
		c.gateway.sessions.Add(-1)
	}
	c.gateway.remove(c)
}

// closeError ends a connection with a close code.
type closeError struct {
	code   int
	reason string
}

func (e *closeError) Error() string { return strconv.Itoa(e.code) + " " + e.reason }

// silent is the reason of a close for want of messages.
const silent = "nothing heard in time"

// expectWithin sets until when the client must be heard of.
func (c *connection) expectWithin(d time.Duration) {
	c.expires.Store(time.Now().Add(d).UnixMilli())
}

// expire closes the connection when nothing has been heard of the client in time.
func (c *connection) expire(now int64) {
	if e := c.expires.Load(); e != 0 && e < now {
		c.close(protocol.CloseSessionTimeout, silent)
	}
}

// reply sends a message of the connection's own.
func (c *connection) reply(wire []byte) { c.session.Load().Send(wire) }

// close sends a close message, unless one has been sent. The client has a short time to answer. A
// connection that is held has no session yet: it ends with the holding.
func (c *connection) close(code int, reason string) {
	if session := c.session.Load(); session != nil {
		c.closing.Store(true)
		c.expires.Store(0)
		session.Close(protocol.CloseFrame(code, reason))
	}
}

// answerClose answers the client's close message, unless that is an answer itself. Nothing is written
// behind it, so that the client closes the socket: were the server first, what it wrote could be lost.
func (c *connection) answerClose(code int) {
	if code == websocket.CloseNoStatusReceived {
		code = websocket.CloseNormalClosure
	}
	c.closing.Store(true)
	c.expires.Store(0)
	c.session.Load().CloseWrite(protocol.CloseFrame(code, ""))
}

// handle acts on one message of the client.
func (c *connection) handle(payload []byte) error {
	if err := c.spend(); err != nil {
		return err
	}
	var m protocol.Message
	if err := json.Unmarshal(payload, &m); err != nil {
		return &closeError{protocol.CloseDecodeError, "expected a JSON object with op and d"}
	}
	switch m.Op {
	case protocol.OpHeartbeat:
		c.reply(protocol.HeartbeatACK)
		if c.attached {
			c.expectHeartbeat()
		}
		return nil
	case protocol.OpIdentify, protocol.OpResume:
		if c.attached {
			return &closeError{protocol.CloseAlreadyAuthenticated, "already identified"}
		}
		if m.Op == protocol.OpIdentify {
			return c.identify(m.Data)
		}
		return c.resume(m.Data)
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

func (c *connection) expectHeartbeat() { c.expectWithin(c.interval + c.gateway.times.grace) }

// spend counts a message or a ping against the client's limit of 120 per 60 s.
func (c *connection) spend() error {
	now := time.Now().UnixMilli()
	if now-c.renewed >= time.Minute.Milliseconds() {
		c.budget, c.renewed = protocol.MaxClientMessages, now
	}
	if c.budget == 0 {
		return &closeError{protocol.CloseRateLimited, "more than " + strconv.Itoa(protocol.MaxClientMessages) + " messages in 60 s"}
	}
	c.budget--
	return nil
}

// identifyData is op 2. Libraries send more than is documented, so what is not needed is not looked at.
type identifyData struct {
	Token        string          `json:"token"`
	Intents      json.RawMessage `json:"intents"`
	Capabilities json.RawMessage `json:"capabilities"`
	Shard        json.RawMessage `json:"shard"`
}

func (c *connection) identify(data json.RawMessage) error {
	var d identifyData
	if err := json.Unmarshal(data, &d); err != nil {
		return &closeError{protocol.CloseDecodeError, "d: expected token, intents and properties"}
	}
	keys := c.gateway.o.Keys()
	claims, err := keys.Verify(d.Token, time.Now())
	if err != nil {
		return &closeError{protocol.CloseAuthenticationFailed, "authentication failed"}
	}
	if c.isExtra() {
		return errFull
	}
	intents, err := strconv.ParseUint(string(d.Intents), 10, 64)
	if err != nil || !protocol.ValidIntents(intents) {
		return &closeError{protocol.CloseInvalidIntents, "invalid intents"}
	}
	shard, mine, err := shardOf(d.Shard, c.id)
	if err != nil {
		return err
	}
	capabilities, _ := strconv.ParseUint(string(d.Capabilities), 10, 63) // 0 unless it is a number
	if !mine {
		capabilities |= otherShard
	}
	client := guild.Client{
		Session: c.session.Load(), User: guild.NewUser(claims.User, claims.Name, claims.Bot),
		Random: rand.Uint64(), Intents: intents, Outside: !mine,
	}
	c.user, c.random = client.User.ID, client.Random
	ctx, cancel := context.WithTimeout(context.Background(), c.gateway.times.identify)
	defer cancel()
	return c.started(c.guild.Identify(ctx, client, func(s guild.Snapshot) {
		sealed := keys.Seal(token.Session{
			Log: c.guild.LogID(), Base: s.Base, User: claims.User, Random: client.Random,
			Intents: intents, Capabilities: capabilities, Issued: time.Now(),
		})
		ready, _ := protocol.Dispatch("READY", s.Base-1, c.ready(client.User, sealed, shard, s.Guild != nil))
		client.Session.Prepare(ready)
		prepareGuild(&client, s)
	}))
}

// otherShard marks the session id of a client's shard that the guild does not belong to, among
// the capabilities.
const otherShard = 1 << 63

// errFull: clients try again a little later, and keep their sessions.
var errFull = &closeError{protocol.CloseUnknownError, "the shard is full"}

func (c *connection) isExtra() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.extra
}

// started ends the attempt to identify or resume.
func (c *connection) started(err error) error {
	switch {
	case err == nil:
		c.mu.Lock()
		c.attached = true
		gone := c.gone
		c.mu.Unlock()
		if gone {
			c.guild.Detach(c.session.Load(), c.user, c.random)
		}
		c.expectHeartbeat()
		return nil
	case errors.Is(err, guild.ErrFutureSeq):
		return &closeError{protocol.CloseInvalidSeq, "seq is above all that was sent"}
	case errors.Is(err, guild.ErrNotResumable):
		c.reply(protocol.InvalidSession) // the client identifies on this connection or on a new one
		c.expectWithin(c.gateway.times.identify)
		return nil
	}
	return &closeError{protocol.CloseUnknownError, "the guild is not available"}
}

// prepareGuild has the snapshot's guild sent to a client that asked for guilds, as it begins to follow the stream.
func prepareGuild(c *guild.Client, s guild.Snapshot) {
	if s.Guild != nil && c.Intents&protocol.IntentGuilds != 0 {
		head, tail := protocol.DispatchParts("GUILD_CREATE", s.Base, s.Guild.Shared, s.Guild.Own)
		c.Session.Prepare(head, s.Guild.Shared, tail)
	}
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

func (c *connection) ready(user guild.User, sessionID string, shard *[2]int, member bool) []byte {
	place, _ := c.gateway.o.Directory.Find(c.id)
	d := readyData{
		Version: int(c.version), User: readyUser{User: user, Verified: true},
		Guilds: []stub{}, PrivateChannels: []struct{}{}, SessionID: sessionID, Shard: shard,
		Application: &application{ID: user.ID},
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
	Token     string          `json:"token"`
	SessionID string          `json:"session_id"`
	Seq       json.RawMessage `json:"seq"`
}

func (c *connection) resume(data json.RawMessage) error {
	var d resumeData
	if err := json.Unmarshal(data, &d); err != nil {
		return &closeError{protocol.CloseDecodeError, "d: expected token, session_id and seq"}
	}
	keys := c.gateway.o.Keys()
	claims, err := keys.Verify(d.Token, time.Now())
	if err != nil {
		return &closeError{protocol.CloseAuthenticationFailed, "authentication failed"}
	}
	var seq uint64 // some libraries send null for 0
	if json.Unmarshal(d.Seq, &seq) != nil && len(d.Seq) > 0 {
		return c.started(guild.ErrFutureSeq)
	}
	sealed, err := keys.Open(d.SessionID)
	if err != nil || sealed.User != claims.User {
		return c.started(guild.ErrNotResumable)
	}
	if c.isExtra() {
		if !c.guild.Attached(sealed.Random) {
			return errFull
		}
		c.gateway.extra.Add(-1)
		c.gateway.sessions.Add(1) // for as long as it takes the old connection to end
		c.mu.Lock()
		c.extra = false
		c.mu.Unlock()
	}
	client := guild.Client{
		Session: c.session.Load(), User: guild.NewUser(claims.User, claims.Name, claims.Bot),
		Random: sealed.Random, Intents: sealed.Intents, Outside: sealed.Capabilities&otherShard != 0,
	}
	c.user, c.random = client.User.ID, client.Random
	ctx, cancel := context.WithTimeout(context.Background(), c.gateway.times.identify)
	defer cancel()
	return c.started(c.guild.Resume(ctx, client, guild.Resumption{Log: sealed.Log, Base: sealed.Base, Seq: seq}, func(s guild.Snapshot) {
		prepareGuild(&client, s)
	}))
}
