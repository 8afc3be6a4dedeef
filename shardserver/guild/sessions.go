package guild

import (
	"context"
	"errors"
	"sync"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// Errors of Resume.
var (
	// ErrNotResumable: the log is another one, or what the session missed is not kept any more.
	ErrNotResumable = errors.New("guild: session cannot be resumed")
	// ErrFutureSeq: the number is above all that the log has.
	ErrFutureSeq = errors.New("guild: number that was never sent")
)

// registry is who is connected. It is not part of the state: it ends with the process.
type registry struct {
	mu       sync.Mutex
	sessions map[uint64]attached  // by the session id's random part
	users    map[snowflake.ID]int // sessions of each user
	direct   int                  // sessions that are not on relays
	// tracked counts, on a guild that follows another, who has or is about to have a session: their
	// memberships are kept.
	tracked map[snowflake.ID]int
	// away are users who are no members, and may come back to a session that they had: when they
	// join meanwhile, the session has to find its GUILD_CREATE in the stream.
	away map[snowflake.ID]struct{}
}

// maxAway bounds registry.away; beyond it some are forgotten.
const maxAway = 100_000

// attached is a connected session, here or on a relay.
type attached struct {
	session *fanout.Session // nil: on a relay
	feed    *Feed           // of that relay
	user    snowflake.ID
	nonce   uint64 // of the attachment, where relays are concerned
	since   int64  // Unix milliseconds
}

func (r *registry) init() {
	r.sessions = map[uint64]attached{}
	r.users = map[snowflake.ID]int{}
	r.away = map[snowflake.ID]struct{}{}
	r.tracked = map[snowflake.ID]int{}
}

// track adds to, or with -1 takes from, the connections of a user, and says whether any is left.
func (r *registry) track(user snowflake.ID, n int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tracked[user] += n; r.tracked[user] > 0 {
		return true
	}
	delete(r.tracked, user)
	return false
}

func (r *registry) isTracked(user snowflake.ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tracked[user] > 0
}

// left notes that a user who is no member may come back to a session.
func (r *registry) left(user snowflake.ID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for forgotten := range r.away {
		if len(r.away) < maxAway {
			break
		}
		delete(r.away, forgotten)
	}
	r.away[user] = struct{}{}
}

// joined says whether a user who joins has a session, or may come back to one.
func (r *registry) joined(user snowflake.ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, away := r.away[user]
	delete(r.away, user)
	return away || r.users[user] > 0
}

// attach registers a session. A session of the same id that is still there is ended: the newest counts.
func (r *registry) attach(random uint64, a attached) {
	r.mu.Lock()
	old, found := r.sessions[random]
	r.replace(random, old, a)
	r.mu.Unlock()
	if found {
		old.evict(random, a)
	}
}

// attachUnlessNewer is attach of a session that has been there for some time: when the same one has come since on
// another connection, it returns false.
func (r *registry) attachUnlessNewer(random uint64, a attached) bool {
	r.mu.Lock()
	old, found := r.sessions[random]
	if found && old.since > a.since && (old.session != nil || old.nonce != a.nonce) {
		r.mu.Unlock()
		return false
	}
	r.replace(random, old, a)
	r.mu.Unlock()
	if found {
		old.evict(random, a)
	}
	return true
}

// replace registers a session instead of an old one, which may be none. r.mu is held.
func (r *registry) replace(random uint64, old, a attached) {
	if old.user != 0 {
		r.count(old, -1)
	}
	r.count(a, 1)
	r.sessions[random] = a
}

// evict ends a session that another has replaced.
func (a attached) evict(random uint64, by attached) {
	switch {
	case a.session != nil:
		a.session.End(errTakenOver)
	case a.feed != by.feed && a.nonce != by.nonce:
		a.feed.send(Evict{Random: random, Nonce: a.nonce})
	}
}

// count adds a session to the figures, or takes it away. r.mu is held.
func (r *registry) count(a attached, n int) {
	if r.users[a.user] += n; r.users[a.user] == 0 {
		delete(r.users, a.user)
	}
	if a.session != nil {
		r.direct += n
	}
}

var errTakenOver = errors.New("guild: session taken over by a newer connection")

// detach forgets a session, unless a newer connection has taken it over.
func (r *registry) detach(random uint64, same func(attached) bool) (a attached, found bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a, found = r.sessions[random]
	if !found || !same(a) {
		return a, false
	}
	delete(r.sessions, random)
	r.count(a, -1)
	return a, true
}

func (r *registry) counts() (sessions, online, direct int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sessions), len(r.users), r.direct
}

// view is of sessions that see the same of the guild: the events that their intents ask for, with or
// without what users write, or nothing while their user is no member.
type view struct {
	intents uint64
	member  bool
}

func (v *view) Pick(f *fanout.Frame) []byte {
	need := f.Tag.(*protocol.Event).Intents
	if !v.member || need != 0 && need&v.intents == 0 {
		return nil
	}
	if len(f.Variants) > 0 && v.intents&protocol.IntentMessageContent == 0 {
		return f.Variants[withoutContent]
	}
	return f.Wire
}

var views sync.Map // view -> *view

func viewOf(intents uint64, member bool) *view {
	key := view{intents, member}
	if v, ok := views.Load(key); ok {
		return v.(*view)
	}
	v, _ := views.LoadOrStore(key, &key)
	return v.(*view)
}

// Client is a connection that wants to become a session.
type Client struct {
	Session *fanout.Session
	User    User
	// Random tells the user's sessions apart.
	Random  uint64
	Intents uint64
	// Outside marks a client's shard that the guild does not belong to: it sees nothing of the guild.
	Outside bool
}

// owner is whom the stream's addressed frames are for.
func (c *Client) owner() uint64 {
	if c.Outside {
		return 0
	}
	return uint64(c.User.ID)
}

// view is the client's, as a member or not. MESSAGE_CONTENT is asked of apps alone, those of bots: a user reads what
// others write (https://docs.discord.com/developers/resources/message#message-object). Whether it is one the token says,
// and the token comes with every resume, so it is the same view on every pod.
func (c *Client) view(member bool) *view {
	intents := c.Intents
	if !c.User.Bot {
		intents |= protocol.IntentMessageContent
	}
	return viewOf(intents, member)
}

// Snapshot is where a new session starts.
type Snapshot struct {
	// Base is the number of the snapshot: READY has Base-1.
	Base uint64
	// Guild is the body of GUILD_CREATE; nil for a user who is no member: the guild comes when they join.
	Guild *Body
}

// Identify starts a session: ready is called with the snapshot to send the first messages, and
// what happens in the guild from there on follows them. In an open guild the user joins.
func (g *Guild) Identify(ctx context.Context, c Client, ready func(Snapshot)) error {
	nonce, err := g.enter(ctx, &c, true)
	if err != nil {
		return err
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	select {
	case <-g.closed:
		err = ErrClosed
	default:
		s := Snapshot{Base: g.last}
		if g.seenBy(&c) {
			s.Guild = g.snapshot(c.User.ID)
		}
		ready(s)
		err = g.follow(c, nonce, fanout.Start{Seq: s.Base})
	}
	if err != nil {
		g.leave(&c, nonce)
	}
	return err
}

// enter sees to it that the state says whether a client's user is a member, and has them join where everybody
// may and the client is new. nonce is that of leave.
func (g *Guild) enter(ctx context.Context, c *Client, fresh bool) (nonce uint64, err error) {
	if g.upstream != nil {
		g.sessions.track(c.User.ID, 1)
		if nonce, err = g.upstream.Attach(ctx, Attachment{User: c.User, Random: c.Random, Join: fresh && !c.Outside}); err != nil {
			g.untrack(c.User.ID)
		}
		return nonce, err
	}
	if !fresh || c.Outside {
		return 0, nil
	}
	return 0, g.admit(ctx, c.User)
}

// admit has a user join where everybody may.
func (g *Guild) admit(ctx context.Context, u User) error {
	g.mu.RLock()
	member := g.state.members[u.ID].object != nil
	g.mu.RUnlock()
	if member || !g.Open() {
		return nil
	}
	_, _, err := g.Join(ctx, u)
	return err
}

// leave undoes enter. g.mu is held for reading.
func (g *Guild) leave(c *Client, nonce uint64) {
	if g.upstream != nil {
		g.upstream.Detach(Detachment{Random: c.Random, Nonce: nonce})
		go g.untrack(c.User.ID)
	}
}

// seenBy says whether a client sees the guild. g.mu is held for reading.
func (g *Guild) seenBy(c *Client) bool {
	return !c.Outside && g.state.members[c.User.ID].object != nil
}

// snapshot is GUILD_CREATE's body. g.mu is held for reading.
func (g *Guild) snapshot(user snowflake.ID) *Body {
	body := g.state.guildCreate(g.id, user)
	return &body
}

// follow attaches a session to the stream. g.mu is held for reading.
func (g *Guild) follow(c Client, nonce uint64, start fanout.Start) error {
	start.View, start.Owner = c.view(g.seenBy(&c)), c.owner()
	if err := c.Session.Follow(g.stream, start); err != nil {
		return err
	}
	g.sessions.attach(c.Random, attached{session: c.Session, user: c.User.ID, nonce: nonce, since: g.now().UnixMilli()})
	if g.upstream != nil {
		g.upstream.Settle(nonce)
	}
	return nil
}

// Attached says whether a session is there whose id has this random part.
func (g *Guild) Attached(random uint64) bool {
	g.sessions.mu.Lock()
	defer g.sessions.mu.Unlock()
	_, found := g.sessions.sessions[random]
	return found
}

// Detach forgets a user's session that has ended, with the random part of its id.
func (g *Guild) Detach(session *fanout.Session, user snowflake.ID, random uint64) {
	a, found := g.sessions.detach(random, func(a attached) bool { return a.session == session })
	if g.upstream != nil {
		if found {
			g.upstream.Detach(Detachment{Random: random, Nonce: a.nonce})
		}
		defer g.untrack(user)
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	if g.state.members[user].object == nil {
		g.sessions.left(user)
	}
}

// Resumption is what a client asks to go on from.
type Resumption struct {
	Log  guildlog.ID
	Base uint64
	// Seq is the last number that the client has seen.
	Seq uint64
}

// Resume continues a session: what it missed is replayed, then RESUMED, then what happens from
// then on. A session that cannot be replayed to as it has not seen the guild yet, or has joined
// it since and too long ago, gets a snapshot instead: fresh is called with it.
func (g *Guild) Resume(ctx context.Context, c Client, r Resumption, fresh func(Snapshot)) error {
	if r.Log != g.log.ID() {
		return ErrNotResumable
	}
	nonce, err := g.enter(ctx, &c, false)
	if err != nil {
		return err
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	if err = g.resume(c, nonce, r, fresh); err != nil {
		g.leave(&c, nonce)
	}
	return err
}

// resume is Resume of one who has entered. g.mu is held for reading.
func (g *Guild) resume(c Client, nonce uint64, r Resumption, fresh func(Snapshot)) error {
	select {
	case <-g.closed:
		return ErrClosed
	default:
	}
	last := g.last
	if r.Seq > last {
		return ErrFutureSeq
	}
	member := g.seenBy(&c)
	snapshot := func() error {
		if member {
			fresh(Snapshot{Base: last, Guild: g.snapshot(c.User.ID)})
		}
		return g.follow(c, nonce, fanout.Start{Seq: last, Replayed: protocol.Resumed})
	}
	// What a membership was further back than the stream's window is not known, only since when it lasts.
	near := g.stream.Holds(r.Seq)
	m := g.state.members[c.User.ID]
	joined := member && m.joined > r.Seq
	switch {
	case r.Seq < r.Base, c.Outside, joined && (!near || !m.told):
		return snapshot()
	case !member && !near:
		return ErrNotResumable
	}
	err := g.follow(c, nonce, fanout.Start{Seq: r.Seq, Replayed: protocol.Resumed})
	switch {
	case errors.Is(err, fanout.ErrDropped) && joined: // while nobody reckoned with the session
		return snapshot()
	case errors.Is(err, fanout.ErrDropped):
		return ErrNotResumable
	}
	return err
}
