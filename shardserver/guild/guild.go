// Package guild is the guild actor: the one writer of a guild's log, the state that the log
// adds up to, and the sessions that follow it.
package guild

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

const (
	// maxPending bounds the commands that wait for the actor; more are refused with ErrBusy.
	maxPending = 1024
	// maxBatch bounds the commands that one append to the log carries.
	maxBatch = 256
)

// Errors of commands. InvalidError is another.
var (
	// ErrBusy: too much waits for the log. Nothing was appended; try again later.
	ErrBusy = errors.New("guild: too many requests wait for the log")
	// ErrClosed: this process does not hold the guild any more. Nothing was appended.
	ErrClosed = errors.New("guild: closed")
	// ErrNotFound: the channel or member that a command names does not exist.
	ErrNotFound = errors.New("guild: not found")
	// ErrNotMember: the user who asks is not a member.
	ErrNotMember = errors.New("guild: not a member")
	// ErrKeyReused: the idempotency key came with another body before.
	ErrKeyReused = errors.New("guild: the idempotency key was used with another body")
)

// InvalidError says which field of a request is wrong and what was expected.
type InvalidError struct {
	Field    string
	Expected string
}

func (e *InvalidError) Error() string { return e.Field + ": " + e.Expected }

// Config of a guild.
type Config struct {
	ID   snowflake.ID
	Name string
	// Open lets every user join by connecting.
	Open bool
	// Channels that the log is born with; one text channel "general" when empty.
	Channels []BootstrapChannel
	// Retention of the log, and so of replay.
	Retention guildlog.Retention
	// Log is the guild's log; empty, it is born now.
	Log guildlog.Log
	// Core that delivers the guild's stream.
	Core *fanout.Core
	// IDs makes message and channel ids; one source per process.
	IDs *snowflake.Source
	// Events counts what is appended; may be nil.
	Events *atomic.Uint64
	// Now is the clock; time.Now when nil.
	Now    func() time.Time
	Logger *slog.Logger
}

// BootstrapChannel is a channel that a guild's log is born with.
type BootstrapChannel struct {
	Name string
	Type int
}

// Guild is a guild that this process holds.
type Guild struct {
	id     snowflake.ID
	log    guildlog.Log
	stream *fanout.Stream
	ids    *snowflake.Source
	now    func() time.Time
	logger *slog.Logger
	events *atomic.Uint64

	commands chan *command
	closed   chan struct{}
	stopped  chan struct{} // the actor has returned

	// mu makes records, state and stream change together: the actor holds it while it appends,
	// those who read the state or attach sessions hold it for reading.
	mu    sync.RWMutex
	state *state
	keys  keyTable
	// snapshots guards what is made of the state for reading when first asked for.
	snapshots sync.Mutex

	sessions registry

	settings struct {
		sync.RWMutex
		open    bool
		name    string // that the resource asks for
		renamed bool   // and that the guild is yet to be given
	}
}

// Open opens a guild: reads its state from the log, or gives birth to the log if it is empty.
func Open(c Config) (*Guild, error) {
	g := &Guild{
		id: c.ID, log: c.Log, ids: c.IDs, now: c.Now, logger: c.Logger, events: c.Events,
		commands: make(chan *command, maxPending), closed: make(chan struct{}), stopped: make(chan struct{}),
		state: newState(),
	}
	if g.now == nil {
		g.now = time.Now
	}
	if g.logger == nil {
		g.logger = slog.Default()
	}
	if g.events == nil {
		g.events = new(atomic.Uint64)
	}
	g.settings.open, g.settings.name = c.Open, c.Name
	g.sessions.init()
	if g.log.Last() == 0 {
		if err := g.log.Append([]guildlog.Record{g.birthRecord(c)}); err != nil {
			return nil, fmt.Errorf("giving birth to the log of guild %s: %w", c.ID, err)
		}
	}
	for seq := uint64(0); seq < g.log.Last(); {
		records, err := g.log.Read(seq, 1024)
		if err != nil {
			return nil, fmt.Errorf("reading the log of guild %s behind %d: %w", c.ID, seq, err)
		}
		for i := range records {
			g.state.apply(&records[i])
			seq = records[i].End()
		}
	}
	g.stream = c.Core.NewStream(g.log.Last(), history{g.id, g.log}, window(c.Retention), fanout.Retention(c.Retention))
	g.settings.renamed = c.Name != g.state.name
	go g.run()
	if err := g.rename(); err != nil {
		return nil, fmt.Errorf("renaming guild %s: %w", c.ID, err)
	}
	return g, nil
}

func (g *Guild) birthRecord(c Config) guildlog.Record {
	channels := c.Channels
	if len(channels) == 0 {
		channels = []BootstrapChannel{{Name: "general", Type: ChannelText}}
	}
	b := birth{ID: c.ID, Name: c.Name}
	for i, ch := range channels {
		// The same ids at each birth: bots that know a channel find it in the new log.
		id := c.ID + 1 + snowflake.ID(i)
		b.Channels = append(b.Channels, channelObject(c.ID, id, ch.Type, ch.Name, i, nil, nil))
	}
	b.Roles = append(b.Roles, everyoneRole(c.ID))
	return guildlog.Record{Seq: guildlog.First, Time: g.now().UnixMilli(), Type: "GUILD_CREATE", Data: encode(b)}
}

// ID is the guild's snowflake.
func (g *Guild) ID() snowflake.ID { return g.id }

// LogID names the guild's log.
func (g *Guild) LogID() guildlog.ID { return g.log.ID() }

// Epoch counts the owners that the log has had.
func (g *Guild) Epoch() int64 { return g.log.Epoch() }

// Counts of a guild.
type Counts struct {
	LastSeq                   uint64
	Members, Online, Sessions int
}

// Counts returns the guild's present counts.
func (g *Guild) Counts() Counts {
	g.mu.RLock()
	c := Counts{LastSeq: g.log.Last(), Members: len(g.state.members)}
	g.mu.RUnlock()
	c.Sessions, c.Online = g.sessions.counts()
	return c
}

// SetOpen changes whether every user may join.
func (g *Guild) SetOpen(open bool) {
	g.settings.Lock()
	defer g.settings.Unlock()
	g.settings.open = open
}

// Open says whether every user may join.
func (g *Guild) Open() bool {
	g.settings.RLock()
	defer g.settings.RUnlock()
	return g.settings.open
}

// SetName changes the name that clients show, when the resource asks for another than before. It
// does not wait for the log.
func (g *Guild) SetName(name string) {
	g.settings.Lock()
	defer g.settings.Unlock()
	if g.settings.name != name {
		g.settings.name, g.settings.renamed = name, true
		go g.rename() //nolint:errcheck // fails only as the guild is closed
	}
}

// rename gives the guild the name of the settings, unless that has been done.
func (g *Guild) rename() error {
	return g.do(context.Background(), func(t *tx) error {
		g.settings.Lock()
		defer g.settings.Unlock()
		if g.settings.renamed && g.state.name != g.settings.name {
			object := g.state.object(g.id)
			object.Name = g.settings.name
			t.emit("GUILD_UPDATE", encode(object), nil)
		}
		g.settings.renamed = false
		return nil
	})
}

// SetRetention changes what the log and the stream keep.
func (g *Guild) SetRetention(r guildlog.Retention) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.log.Retain(r)
	g.stream.Retain(window(r), fanout.Retention(r))
}

// Reconnect asks the sessions to come back on another connection (op 7). The request stands in the
// stream: it overtakes neither READY nor a replay, which some libraries do not survive.
func (g *Guild) Reconnect() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stream.Publish(&fanout.Frame{
		Seq: g.log.Last(), Wire: protocol.Reconnect, Tag: protocol.EventOf("RESUMED"), Volatile: true,
	})
}

// Close ends the guild in this process: commands fail with ErrClosed, and sessions are sent
// last, made for the log's last number, and closed. It returns when nothing is appended any more.
func (g *Guild) Close(last func(seq uint64) []byte) {
	g.mu.Lock()
	select {
	case <-g.closed:
	default:
		close(g.closed)
	}
	g.mu.Unlock()
	<-g.stopped
	g.stream.Close(last(g.log.Last()))
}

// command is one request to the log. run decides, then stages records on the transaction. An
// error refuses the command; it comes before anything is staged.
type command struct {
	run  func(*tx) error
	err  error
	done chan struct{}
}

// tx stages the records of a command.
type tx struct {
	g       *Guild
	last    uint64
	records []guildlog.Record
	frames  []*fanout.Frame
}

// do has the actor run a command and waits until what it appended is durable.
func (g *Guild) do(ctx context.Context, run func(*tx) error) error {
	c := &command{run: run, done: make(chan struct{})}
	select {
	case <-g.closed:
		return ErrClosed
	default:
	}
	select {
	case g.commands <- c:
	case <-g.closed:
		return ErrClosed
	case <-ctx.Done():
		return ErrBusy
	}
	// From here on the command may be carried out: its outcome is waited for.
	select {
	case <-c.done:
		return c.err
	case <-g.stopped:
		select {
		case <-c.done:
			return c.err
		default:
			return ErrClosed
		}
	}
}

func (g *Guild) run() {
	defer close(g.stopped)
	var batch []*command
	for {
		select {
		case <-g.closed:
			return
		case c := <-g.commands:
			batch = append(batch[:0], c)
		}
	more:
		for len(batch) < maxBatch {
			select {
			case c := <-g.commands:
				batch = append(batch, c)
			default:
				break more
			}
		}
		g.carryOut(batch)
		clear(batch)
	}
}

// carryOut runs the commands of a batch, appends what they staged in one go, and only when
// that is durable shows it to sessions and answers.
func (g *Guild) carryOut(batch []*command) {
	g.mu.Lock()
	defer g.mu.Unlock()
	t := &tx{g: g, last: g.log.Last()}
	for _, c := range batch {
		c.err = c.run(t)
	}
	if len(t.records) > 0 {
		if err := g.log.Append(t.records); err != nil {
			// What is on disk is not known, so nothing may be answered: the process ends, and
			// the next one reads the log.
			g.logger.Error("appending to the log", "guild", g.id, "error", err)
			panic(err)
		}
		g.events.Add(uint64(len(t.records)))
	}
	g.stream.Publish(t.frames...)
	for _, c := range batch {
		close(c.done)
	}
}

// emit stages an event, with what follows from it for the sessions of a user whom it lets in or
// out, and applies it to the state. Its body must be a JSON object on one line that check has
// accepted. It returns the event's number; for a volatile event the last one.
func (t *tx) emit(name string, body []byte, users []snowflake.ID) uint64 {
	if protocol.EventOf(name).Volatile {
		f := frame(&guildlog.Record{Seq: t.last, Type: name, Data: body, Users: users})
		f.Volatile = true
		t.frames = append(t.frames, f)
		return t.last
	}
	g := t.g
	r := guildlog.Record{Seq: t.last + 1, Time: g.now().UnixMilli(), Type: name, Data: body, Users: users}
	user := g.state.turnsMembership(&r)
	joins := r.Type == "GUILD_MEMBER_ADD"
	switch {
	case user == 0:
	case !joins:
		g.sessions.left(user)
		r.Reserved = 1
	case g.sessions.joined(user):
		r.Reserved = 1
	}
	f := frame(&r) // the log shares its bytes
	g.state.apply(&r)
	t.records, t.frames, t.last = append(t.records, r), append(t.frames, f), r.End()
	if r.Reserved > 0 {
		var created []byte
		if joins {
			created = g.state.guildCreate(g.id, user).join()
		}
		t.frames = append(t.frames, derived(g.id, &r, created))
	}
	return r.Seq
}
