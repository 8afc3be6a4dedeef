// Package guild is the guild actor: the one writer of a guild's log, the state that the log
// adds up to, and the sessions that follow it.
package guild

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
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
	// maxPendingBytes bounds what the waiting commands have to append, but for the last of them.
	maxPendingBytes = 16 << 20
	// maxBatch bounds the commands that one commit to the log carries.
	maxBatch = 256
)

// Errors of commands. InvalidError is another.
var (
	// ErrBusy: too much waits for the log. Nothing was appended; try again later.
	ErrBusy = errors.New("guild: too many requests wait for the log")
	// ErrClosed: this process does not hold the guild any more. Nothing was appended.
	ErrClosed = errors.New("guild: closed")
	// ErrFull: the disk has no room for more. Nothing was appended.
	ErrFull = guildlog.ErrFull
	// ErrUncertain: the log failed. Whether the request was appended only the next process finds out.
	ErrUncertain = guildlog.ErrFailed
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
	// Log is the guild's log, born with the commit that Birth makes.
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
	pending  atomic.Int64 // bytes of the commands that wait
	closed   chan struct{}
	stopped  chan struct{} // the actor has returned

	// mu makes last, state and stream change together, once the log has committed: the actor alone changes
	// them and holds it then, those who read the state or attach sessions hold it for reading.
	mu    sync.RWMutex
	last  uint64        // the last number that may be shown
	shown atomic.Uint64 // the same, for those who do not hold mu
	state *state
	feeds []*Feed

	sessions registry
	upstream Upstream // nil: the guild writes its log itself
	mover    mover

	settings struct {
		sync.RWMutex
		open    bool
		name    string // that the resource asks for
		renamed bool   // and that the guild is yet to be given
	}
}

// Birth is what the log of a guild is born with.
func Birth(c Config) guildlog.Commit {
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
	now := time.Now
	if c.Now != nil {
		now = c.Now
	}
	r := guildlog.Record{Seq: guildlog.First, Time: now().UnixMilli(), Type: "GUILD_CREATE", Data: encode(b)}
	t := newState().stage()
	t.apply(&r, turn{})
	return guildlog.Commit{Records: []guildlog.Record{r}, State: t.rows}
}

// newGuild makes a guild without its state.
func newGuild(c Config) *Guild {
	g := &Guild{
		id: c.ID, log: c.Log, ids: c.IDs, now: c.Now, logger: c.Logger, events: c.Events,
		commands: make(chan *command, maxPending), closed: make(chan struct{}), stopped: make(chan struct{}),
		last: c.Log.Last(), state: newState(),
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
	return g
}

func (g *Guild) newStream(c Config) {
	g.stream = c.Core.NewStream(g.last, &history{guild: g.id, log: g.log, logger: g.logger}, window(c.Retention), fanout.Retention(c.Retention))
}

// Open opens a guild, with the state that its log adds up to.
func Open(c Config) (*Guild, error) {
	g := newGuild(c)
	if g.last == 0 {
		return nil, fmt.Errorf("opening guild %s: its log has not been born", c.ID)
	}
	if err := g.state.load(g.log); err != nil {
		return nil, fmt.Errorf("reading the state of guild %s: %w", c.ID, err)
	}
	g.shown.Store(g.last)
	g.newStream(c)
	g.settings.renamed = c.Name != g.state.layout.name
	go g.run()
	if g.settings.renamed {
		go g.rename()
	}
	return g, nil
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
	// Direct is the sessions that are not on relays.
	Direct int
}

// Counts returns the guild's present counts.
func (g *Guild) Counts() Counts {
	g.mu.RLock()
	c := Counts{LastSeq: g.last, Members: g.state.count}
	g.mu.RUnlock()
	c.Sessions, c.Online, c.Direct = g.sessions.counts()
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
		go g.rename()
	}
}

// rename gives the guild the name of the settings, unless that has been done.
func (g *Guild) rename() {
	err := g.do(context.Background(), 0, func(t *tx) error {
		g.settings.Lock()
		defer g.settings.Unlock()
		if g.settings.renamed && t.state.layout.name != g.settings.name {
			object := t.state.layout.object(g.id)
			object.Name = g.settings.name
			t.emit("GUILD_UPDATE", encode(object), nil)
		}
		g.settings.renamed = false
		return nil
	})
	if err != nil && !errors.Is(err, ErrClosed) { // the next start tries again
		g.logger.Error("guild not renamed", "guild", g.id, "error", err)
	}
}

// SetRetention changes what the log and the stream keep.
func (g *Guild) SetRetention(r guildlog.Retention) {
	g.log.Retain(r)
	g.stream.Retain(window(r), fanout.Retention(r))
}

// Reconnect asks the sessions to come back on another connection (op 7). The request stands in the
// stream: it overtakes neither READY nor a replay, which some libraries do not survive.
func (g *Guild) Reconnect() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stream.Publish(&fanout.Frame{
		Seq: g.last, Wire: protocol.Reconnect, Tag: protocol.EventOf("RESUMED"), Volatile: true,
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
	g.mover.stop()
	g.stream.Close(last(g.last))
}

// command is one request to the log. run decides, then stages records on the transaction. An
// error refuses the command; it comes before anything is staged.
type command struct {
	run  func(*tx) error
	err  error
	done chan struct{}
}

// tx stages what commands write.
type tx struct {
	g       *Guild
	last    uint64
	state   staged
	records []guildlog.Record
	keys    []guildlog.Key
	frames  []*fanout.Frame
	untold  []untold
	// volatile are staged events that are not logged, with the number that they come behind.
	volatile []guildlog.Record
}

// untold is a join of which nobody was to be told when it was staged.
type untold struct {
	user  snowflake.ID
	seq   uint64 // that GUILD_CREATE would have
	frame int    // where it would be among the frames: behind that of the join, which has its number meanwhile
}

func (g *Guild) newTx() *tx { return &tx{g: g, last: g.last, state: g.state.stage()} }

func (t *tx) writes() bool { return len(t.records) > 0 || len(t.keys) > 0 }

// do has the actor run a command that appends about so many bytes, and waits until that is durable.
func (g *Guild) do(ctx context.Context, size int, run func(*tx) error) error {
	c := &command{run: run, done: make(chan struct{})}
	select {
	case <-g.closed:
		return ErrClosed
	default:
	}
	if g.pending.Load() >= maxPendingBytes {
		return ErrBusy
	}
	g.pending.Add(int64(size))
	defer g.pending.Add(-int64(size))
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
		if !g.carryOut(batch) {
			return
		}
		clear(batch)
	}
}

// carryOut runs the commands of a batch, commits what they staged in one go, and only when that is durable
// shows it to sessions and answers. It returns false when the log takes no more.
func (g *Guild) carryOut(batch []*command) bool {
	t := g.newTx()
	if full := g.log.Room(); full == nil {
		for _, c := range batch {
			c.err = c.run(t)
		}
	} else {
		// Those that write nothing are answered: a key that is known, what is refused anyway.
		for _, c := range batch {
			own := g.newTx()
			if c.err = c.run(own); c.err == nil && own.writes() {
				c.err = full
			} else {
				t.frames, t.volatile = append(t.frames, own.frames...), append(t.volatile, own.volatile...)
			}
		}
	}
	var err error
	if t.writes() {
		err = g.log.Commit(guildlog.Commit{Records: t.records, Keys: t.keys, State: t.state.rows})
	}
	if err == nil {
		g.publish(t)
	}
	for _, c := range batch {
		if err != nil { // all of them decided on what has not come to pass
			c.err = err
		}
		close(c.done)
	}
	if err != nil {
		g.logger.Error("committing to the log", "guild", g.id, "error", err)
	}
	return !errors.Is(err, guildlog.ErrFailed)
}

// publish shows what has been committed.
func (g *Guild) publish(t *tx) {
	g.mu.Lock()
	defer g.mu.Unlock()
	t.state.merge()
	g.last = t.last
	g.shown.Store(g.last)
	g.events.Add(uint64(len(t.records)))
	for _, u := range slices.Backward(t.untold) { // a session may have come since
		if m := g.state.members[u.user]; m.object != nil && g.expects(u.user) {
			created := derived(g.id, u.seq, turn{u.user, true}, g.state.guildCreate(g.id, u.user).join())
			t.frames[u.frame-1].Reserved = 0
			t.frames = slices.Insert(t.frames, u.frame, created)
			m.told = true
			g.state.members[u.user] = m
		}
	}
	g.stream.Publish(t.frames...)
	for _, f := range g.feeds {
		f.push(t.records, t.volatile)
	}
}

// emit stages an event, with what follows from it for the sessions of a user whom it lets in or
// out, and applies it to the state. Its body must be a JSON object on one line that check has
// accepted. It returns the event's number; for a volatile event the last one.
func (t *tx) emit(name string, body []byte, users []snowflake.ID) uint64 {
	if protocol.EventOf(name).Volatile {
		t.volatile = append(t.volatile, guildlog.Record{Seq: t.last, Type: name, Data: body, Users: users})
		t.frames = append(t.frames, volatileFrame(t.volatile[len(t.volatile)-1]))
		return t.last
	}
	r := t.record(name, body, users)
	t.turn(r, t.state.turn(&r))
	return r.Seq
}

// record is the next record of the log.
func (t *tx) record(name string, body []byte, users []snowflake.ID) guildlog.Record {
	return guildlog.Record{Seq: t.last + 1, Time: t.g.now().UnixMilli(), Type: name, Data: body, Users: users}
}

// turn stages a record and what it does to a membership.
func (t *tx) turn(r guildlog.Record, turns turn) {
	if turns.user != 0 {
		r.Reserved = 1
	}
	t.append(r, turns)
}

// append stages a record and the frames that are made of it.
func (t *tx) append(r guildlog.Record, turns turn) {
	g := t.g
	f := frame(&r, turns) // the log shares its bytes
	t.state.apply(&r, turns)
	t.records, t.frames, t.last = append(t.records, r), append(t.frames, f), r.End()
	switch {
	case turns.user == 0:
	case !turns.joins:
		g.sessions.left(turns.user)
		t.frames = append(t.frames, derived(g.id, t.last, turns, nil))
	case g.expects(turns.user):
		t.state.tell(turns.user)
		t.frames = append(t.frames, derived(g.id, t.last, turns, t.state.guildCreate(g.id, turns.user).join()))
	default:
		f.Reserved = r.Reserved
		t.untold = append(t.untold, untold{turns.user, t.last, len(t.frames)})
	}
}

// expects says whether a user who joins has a session here, or may come back to one.
func (g *Guild) expects(user snowflake.ID) bool {
	return g.sessions.joined(user) && (g.upstream == nil || g.sessions.isTracked(user))
}

// find looks an idempotency key up, those that are staged as well; the empty key is never found.
// ErrKeyReused: it came with another body.
func (t *tx) find(name string, body [32]byte) (k guildlog.Key, found bool, err error) {
	if name == "" {
		return k, false, nil
	}
	i := slices.IndexFunc(t.keys, func(k guildlog.Key) bool { return k.Name == name })
	if found = i >= 0; found {
		k = t.keys[i]
	} else if k, found, err = t.g.log.Find(name); err != nil {
		return k, false, err
	}
	if found && k.Body != body {
		return k, true, ErrKeyReused
	}
	return k, found, nil
}

// remember stages an idempotency key; the empty key is not remembered.
func (t *tx) remember(k guildlog.Key) {
	if k.Name != "" {
		t.keys = append(t.keys, k)
	}
}
