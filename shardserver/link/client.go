package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/url"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/report"
)

const (
	// reportTime is how often a relay reports.
	reportTime = time.Second
	// minRetry and maxRetry bound the wait before a link is tried again.
	minRetry, maxRetry = 100 * time.Millisecond, 2 * time.Second
	// maxPending bounds the sessions that wait to be let in.
	maxPending = 8192
)

// ClientOptions of a Client.
type ClientOptions struct {
	// Address of the shard's links, host and port.
	Address string
	// Name of this relay.
	Name string
	TLS  *tls.Config
	// Guild is the config of the guild that is followed; its Log is the client's.
	Guild guild.Config
	// Changed is told of the guild when it is there, and of another one that takes its place: then the former
	// one's sessions have been sent away.
	Changed func(*guild.Guild)
	// Report is this relay's account.
	Report func() report.Relay
	Logger *slog.Logger
}

// Client is a relay's end of the link. It is the upstream of the guild that it makes.
type Client struct {
	o ClientOptions

	// Of the goroutine that receives.
	log   guildlog.Log
	guild *guild.Guild

	mu      sync.Mutex
	conn    *websocket.Conn // nil while there is no link
	down    time.Time       // since when there is none
	pending map[uint64]*pending
	nonce   uint64
}

// pending is a session that waits to be let in, or was let in and is not yet among those that the guild has.
type pending struct {
	guild.Attachment
	answered bool
	done     chan error
}

// NewClient makes a Client.
func NewClient(o ClientOptions) *Client {
	return &Client{o: o, pending: map[uint64]*pending{}, down: time.Now(), nonce: rand.Uint64()}
}

// Run keeps the link up until ctx ends.
func (c *Client) Run(ctx context.Context) {
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { c.keepReporting(ctx) })
	wait := minRetry
	for ctx.Err() == nil {
		began := time.Now()
		err := c.link(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > maxRetry {
			wait = minRetry
		}
		c.o.Logger.Info("no link to the shard", "address", c.o.Address, "error", err)
		select {
		case <-time.After(wait/2 + rand.N(wait)):
		case <-ctx.Done():
		}
		wait = min(2*wait, maxRetry)
	}
}

// Down is how long there has been no link; 0 while there is one.
func (c *Client) Down() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		return 0
	}
	return time.Since(c.down)
}

// link connects and receives until something fails.
func (c *Client) link(ctx context.Context) error {
	dialer := websocket.Dialer{
		NetDialContext:  (&net.Dialer{Timeout: dialTime}).DialContext,
		TLSClientConfig: c.o.TLS, HandshakeTimeout: writeTime, ReadBufferSize: 64 << 10, WriteBufferSize: 16 << 10,
	}
	u := url.URL{
		Scheme: "wss", Host: c.o.Address, Path: Path + c.o.Guild.ID.String(),
		RawQuery: url.Values{"name": {c.o.Name}}.Encode(),
	}
	conn, response, err := dialer.DialContext(ctx, u.String(), nil)
	if response != nil {
		response.Body.Close()
	}
	switch {
	case err != nil && response != nil:
		return fmt.Errorf("%w: %s", err, response.Status)
	case err != nil:
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	conn.SetReadLimit(maxMessage)
	answer := conn.PingHandler()
	conn.SetPingHandler(func(data string) error {
		conn.SetReadDeadline(time.Now().Add(silence))
		return answer(data)
	})
	hello := follow{Version: version}
	if c.guild != nil {
		hello.Log, hello.After = c.log.ID().String(), c.log.Last()
	}
	if err := write(conn, jsonPart(nil, partFollow, hello)); err != nil {
		return err
	}
	r := &receiver{Client: c, conn: conn}
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.conn != nil {
			c.conn, c.down = nil, time.Now()
		}
	}()
	for {
		message, err := receive(conn)
		if err != nil {
			return err
		}
		if err := r.take(message); err != nil {
			return err
		}
	}
}

func write(conn *websocket.Conn, message []byte) error {
	conn.SetWriteDeadline(time.Now().Add(writeTime))
	return conn.WriteMessage(websocket.BinaryMessage, message)
}

// receiver takes in what comes over one link.
type receiver struct {
	*Client
	conn *websocket.Conn

	welcomed bool
	next     guildlog.Log // the history that a state is to come behind; nil: none
	prev     uint64       // the number that the next record follows
	batch    []guildlog.Record
}

func (r *receiver) take(message []byte) error {
	r.batch = r.batch[:0]
	err := parts(message, func(kind byte, content []byte) error {
		if kind == partRecord {
			record, prev, err := readRecord(content)
			switch {
			case err != nil:
				return err
			case !r.welcomed || prev != r.prev:
				return fmt.Errorf("record %d follows %d, the last one ended at %d", record.Seq, prev, r.prev)
			}
			r.prev = record.End()
			r.batch = append(r.batch, record)
			return nil
		}
		// What comes behind records finds them applied.
		if err := r.flush(); err != nil {
			return err
		}
		return r.other(kind, content)
	})
	return errors.Join(err, r.flush())
}

// flush applies the records that have come.
func (r *receiver) flush() (err error) {
	if len(r.batch) == 0 {
		return nil
	}
	if r.next != nil {
		err = r.next.Commit(guildlog.Commit{Records: r.batch})
	} else {
		err = r.guild.Take(r.batch)
	}
	r.batch = nil // they are the log's now
	return err
}

func (r *receiver) other(kind byte, content []byte) error {
	if !r.welcomed && kind != partWelcome {
		return errOrder
	}
	if r.guild == nil && kind != partWelcome && kind != partState {
		return nil // about what is not here yet
	}
	switch kind {
	case partWelcome:
		return r.welcome(content)
	case partState:
		return r.state(content)
	case partVolatile:
		record, _, err := readRecord(content)
		if err == nil && r.next == nil {
			r.guild.TakeVolatile(record)
		}
		return err
	case partAnswer:
		var a guild.Answer
		if err := json.Unmarshal(content, &a); err != nil {
			return err
		}
		r.answer(a)
	case partEvict:
		var e guild.Evict
		if err := json.Unmarshal(content, &e); err != nil {
			return err
		}
		r.guild.TakeEvict(e)
	case partOrder:
		var o guild.Order
		if err := json.Unmarshal(content, &o); err != nil {
			return err
		}
		r.guild.Move(o)
	}
	return nil
}

func (r *receiver) welcome(content []byte) error {
	var w welcome
	if err := json.Unmarshal(content, &w); err != nil {
		return err
	}
	id, err := guildlog.ParseID(w.Log)
	switch {
	case err != nil:
		return err
	case r.welcomed:
		return errOrder
	case w.Version < version:
		return errVersion
	case r.guild != nil && id == r.log.ID() && w.Epoch < r.log.Epoch():
		return fmt.Errorf("link: epoch %d, and %d has been seen: another shard has taken over", w.Epoch, r.log.Epoch())
	}
	r.welcomed, r.prev = true, w.Begin
	if r.guild != nil && id == r.log.ID() && w.Begin == r.log.Last() {
		return r.up()
	}
	r.next = guildlog.NewReplica(id, w.Epoch, w.Begin, guildlog.Retention{Bytes: guild.FollowerBytes, Age: guild.FollowerHistory}, time.Now)
	return nil
}

// state makes the guild of the history that has come.
func (r *receiver) state(content []byte) error {
	s, err := readState(content)
	if err != nil {
		return err
	}
	if r.next == nil {
		return errOrder
	}
	for i := range s.Rows {
		s.Rows[i] = guildlog.Row{Key: bytes.Clone(s.Rows[i].Key), Value: bytes.Clone(s.Rows[i].Value)}
	}
	config := r.o.Guild
	config.Log = r.next
	config.Retention = guildlog.Retention{Bytes: guild.FollowerBytes, Age: guild.FollowerHistory}
	next, err := guild.Follow(config, s, r.Client)
	if err != nil {
		return err
	}
	former := r.guild
	r.guild, r.log, r.next = next, r.next, nil
	if former != nil {
		r.failPending()
		former.Close(func(uint64) []byte { return protocol.CloseFrame(protocol.CloseUnknownError, "the server starts over") })
	}
	r.o.Changed(next)
	return r.up()
}

// up makes this the link that others write to, and tells the shard what is here.
func (r *receiver) up() error {
	// Who leaves meanwhile waits to say so until the shard has the list.
	r.mu.Lock()
	defer r.mu.Unlock()
	list := r.guild.AttachedHere()
	for _, p := range r.pending {
		if p.answered {
			list = append(list, guild.Attached{Random: p.Random, User: p.User.ID, Nonce: p.Nonce})
		}
	}
	for {
		n := min(len(list), maxList)
		if err := write(r.conn, jsonPart(nil, partSessions, append([]guild.Attached{}, list[:n]...))); err != nil {
			return err
		}
		if list = list[n:]; n < maxList {
			break
		}
	}
	for _, p := range r.pending {
		if p.answered {
			continue
		}
		if err := write(r.conn, jsonPart(nil, partAttach, p.Attachment)); err != nil {
			return err
		}
	}
	r.Client.conn = r.conn
	return nil
}

// answer tells one that waits what the shard has said.
func (c *Client) answer(a guild.Answer) {
	c.guild.TakeAnswer(a)
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.pending[a.Nonce]
	switch {
	case p == nil && a.Error == "": // given up meanwhile
		c.send(jsonPart(nil, partDetach, guild.Detachment{Random: a.Random, Nonce: a.Nonce}))
	case p == nil || p.answered:
	case a.Error != "":
		delete(c.pending, a.Nonce)
		p.done <- errors.New(a.Error)
	default:
		p.answered = true
		p.done <- nil
	}
}

// failPending has those that wait try again on another connection.
func (c *Client) failPending() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for nonce, p := range c.pending {
		delete(c.pending, nonce)
		if !p.answered {
			p.done <- guild.ErrClosed
		}
	}
}

// send writes when there is a link. Where it fails the link ends, and what matters is sent again over the next
// one. c.mu is held.
func (c *Client) send(message []byte) {
	if c.conn != nil && write(c.conn, message) != nil {
		c.conn.Close()
	}
}

// Attach implements guild.Upstream.
func (c *Client) Attach(ctx context.Context, a guild.Attachment) (nonce uint64, err error) {
	c.mu.Lock()
	if len(c.pending) >= maxPending {
		c.mu.Unlock()
		return 0, guild.ErrBusy
	}
	c.nonce++
	a.Nonce = c.nonce
	p := &pending{Attachment: a, done: make(chan error, 1)}
	c.pending[a.Nonce] = p
	c.send(jsonPart(nil, partAttach, a))
	c.mu.Unlock()
	select {
	case err := <-p.done:
		return a.Nonce, err
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, a.Nonce)
	if p.answered { // a moment ago
		c.send(jsonPart(nil, partDetach, guild.Detachment{Random: a.Random, Nonce: a.Nonce}))
	}
	return 0, ctx.Err()
}

// Settle implements guild.Upstream.
func (c *Client) Settle(nonce uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, nonce)
}

// Detach implements guild.Upstream.
func (c *Client) Detach(d guild.Detachment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, d.Nonce)
	c.send(jsonPart(nil, partDetach, d))
}

// keepReporting reports until ctx ends.
func (c *Client) keepReporting(ctx context.Context) {
	tick := time.NewTicker(reportTime)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		account := jsonPart(nil, partReport, c.o.Report())
		c.mu.Lock()
		c.send(account)
		c.mu.Unlock()
	}
}
