package guild

import (
	"context"
	"encoding/json"
	"slices"
	"sort"
	"sync"
	"time"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

const (
	// maxFeed bounds what waits to be taken from a feed, in bytes; beyond it the feed reads the log again.
	maxFeed = 8 << 20
	// FollowerHistory and FollowerBytes are how much of a log's past one who follows the guild is given: what
	// sessions resume within.
	FollowerHistory = 5 * time.Minute
	FollowerBytes   = 32 << 20
)

// Feed is what one who follows the guild from another process reads: a cursor on the log, which
// also passes what is not logged, and messages for the follower at their place between the records.
//
// Invariants:
//   - sent is the last number that Next has returned; records come in order and without a hole;
//   - while not behind, queue has everything behind sent that has been published, in order;
//   - while behind, queue has messages alone, and the records are read from the log.
type Feed struct {
	g *Guild

	mu     sync.Mutex
	queue  []Item
	bytes  int
	behind bool
	sent   uint64
	signal chan struct{}
}

// Item is one thing that a feed passes. One of its fields is set besides Seq.
type Item struct {
	// Seq is the number that the item comes behind, of a message, or that it ends with.
	Seq uint64
	// Records that follow each other.
	Records []guildlog.Record
	// Volatile is an event that is not logged, with the number that it comes behind.
	Volatile *guildlog.Record
	// Message is a State, an Answer, an Evict or what was given to Feed.Tell.
	Message any
}

// State is a guild's state for one who follows it, without its members.
type State struct {
	// Seq is the number that it is as of.
	Seq     uint64
	Members int
	Rows    []guildlog.Row
}

// Attachment asks for a session of a user to be let in by a follower.
type Attachment struct {
	User   User   `json:"user"`
	Random uint64 `json:"random"`
	// Join has the user join where everybody may.
	Join bool `json:"join,omitempty"`
	// Nonce tells the attachments of a follower apart.
	Nonce uint64 `json:"nonce"`
}

// Answer says whether the user of an attachment is a member.
type Answer struct {
	Nonce  uint64          `json:"nonce"`
	Random uint64          `json:"random"`
	User   snowflake.ID    `json:"user"`
	Member json.RawMessage `json:"member,omitempty"`
	// Joined is the last number of the record that let them in.
	Joined uint64 `json:"joined,omitempty"`
	// Error says why nothing can be said.
	Error string `json:"error,omitempty"`
}

// Detachment ends an attachment.
type Detachment struct {
	Random uint64 `json:"random"`
	Nonce  uint64 `json:"nonce"`
}

// Evict ends a session of a follower: a newer connection has taken it over.
type Evict Detachment

// NewFeed makes a feed of what follows number after of the log that is named. When that is another log, or
// what follows is not kept, the feed begins further on: with the history that a follower needs, and with
// the State behind it.
func (g *Guild) NewFeed(log guildlog.ID, after uint64) (f *Feed, begin uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f = &Feed{g: g, behind: true, sent: after, signal: make(chan struct{}, 1)}
	if log != g.log.ID() || after > g.last || after == 0 || !g.log.Resumable(after) {
		f.sent = g.recent()
		s := State{Seq: g.last, Members: g.state.count, Rows: g.state.layout.rows()}
		f.queue = append(f.queue, Item{Seq: g.last, Message: s})
	}
	g.feeds = append(g.feeds, f)
	return f, f.sent
}

// recent is the number behind which the history of a follower begins.
func (g *Guild) recent() uint64 {
	since := g.now().Add(-FollowerHistory).UnixMilli()
	// Numbers without a record behind them, and those that were dropped, are not recent.
	n := sort.Search(int(g.last), func(i int) bool {
		records, err := g.log.Read(uint64(i), 1)
		return err == nil && (len(records) == 0 || records[0].Time >= since)
	})
	begin := uint64(n)
	if records, err := g.log.Read(begin, 1); err == nil && len(records) > 0 && records[0].Seq <= begin {
		begin = records[0].Seq - 1 // not within a record's numbers
	}
	return begin
}

// Close ends the feed. Sessions that it has attached stay until Forget.
func (f *Feed) Close() {
	g := f.g
	g.mu.Lock()
	defer g.mu.Unlock()
	g.feeds = slices.DeleteFunc(g.feeds, func(other *Feed) bool { return other == f })
}

// push passes what has been published. g.mu is held.
func (f *Feed) push(records, volatile []guildlog.Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.wake()
	if f.behind {
		return
	}
	for len(records)+len(volatile) > 0 {
		if len(volatile) > 0 && (len(records) == 0 || volatile[0].Seq < records[0].Seq) {
			f.queue = append(f.queue, Item{Seq: volatile[0].Seq, Volatile: &volatile[0]})
			f.bytes += len(volatile[0].Data) + 64
			volatile = volatile[1:]
			continue
		}
		n := len(records)
		if len(volatile) > 0 {
			n = sort.Search(n, func(i int) bool { return records[i].Seq > volatile[0].Seq })
		}
		f.queue = append(f.queue, Item{Seq: records[n-1].End(), Records: records[:n]})
		for i := range records[:n] {
			f.bytes += len(records[i].Data) + 64
		}
		records = records[n:]
	}
	if f.bytes > maxFeed {
		f.behind, f.bytes = true, 0
		f.queue = slices.DeleteFunc(f.queue, func(i Item) bool { return i.Message == nil })
	}
}

// Tell passes a message behind what has been published.
func (f *Feed) Tell(message any) {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	f.send(message)
}

// send is Tell for one who holds g.mu, or does not mind the message's place.
func (f *Feed) send(message any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	seq := f.sent
	if n := len(f.queue); n > 0 {
		seq = f.queue[n-1].Seq
	}
	f.queue = append(f.queue, Item{Seq: max(seq, f.at()), Message: message})
	f.wake()
}

// at is the number that a message is placed behind. f.mu is held.
func (f *Feed) at() uint64 {
	if f.behind {
		return f.g.shown.Load()
	}
	return 0
}

func (f *Feed) wake() {
	select {
	case f.signal <- struct{}{}:
	default:
	}
}

// Next returns what comes next, and waits for it. It fails with guildlog.ErrDropped when the
// follower is too far behind, as the log does, or as ctx ends.
func (f *Feed) Next(ctx context.Context) ([]Item, error) {
	for {
		items, err := f.take()
		if len(items) > 0 || err != nil {
			return items, err
		}
		select {
		case <-f.signal:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (f *Feed) take() ([]Item, error) {
	f.catchUp()
	f.mu.Lock()
	if !f.behind {
		items := f.queue
		f.queue, f.bytes = nil, 0
		for i := range items {
			f.sent = max(f.sent, items[i].Seq)
		}
		f.mu.Unlock()
		return items, nil
	}
	until, message := f.g.shown.Load(), Item{}
	if len(f.queue) > 0 {
		message = f.queue[0]
		until = min(until, message.Seq)
	}
	if message.Message != nil && message.Seq <= f.sent {
		f.queue = f.queue[1:]
		f.mu.Unlock()
		return []Item{message}, nil
	}
	from := f.sent
	f.mu.Unlock()
	if from >= until {
		return nil, nil
	}
	records, err := f.g.log.Read(from, 512)
	if err != nil {
		return nil, err
	}
	n := sort.Search(len(records), func(i int) bool { return records[i].End() > until })
	if records = records[:n]; n == 0 {
		return nil, nil
	}
	f.mu.Lock()
	f.sent = records[n-1].End()
	f.mu.Unlock()
	return []Item{{Seq: records[n-1].End(), Records: records}}, nil
}

// catchUp ends being behind when there is nothing more to read, so that what is published from now on is passed at once.
func (f *Feed) catchUp() {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.behind && f.sent == f.g.last && len(f.queue) == 0 {
		f.behind = false
	}
}

// Attach registers a session of the follower's, and tells it whether the user is a member.
func (f *Feed) Attach(ctx context.Context, a Attachment) {
	g := f.g
	answer := Answer{Nonce: a.Nonce, Random: a.Random, User: a.User.ID}
	if a.Join {
		if err := g.admit(ctx, a.User); err != nil {
			answer.Error = err.Error()
			f.Tell(answer)
			return
		}
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	m := g.state.members[a.User.ID]
	answer.Member, answer.Joined = m.object, m.joined
	g.sessions.attach(a.Random, attached{feed: f, user: a.User.ID, nonce: a.Nonce, since: g.now().UnixMilli()})
	f.send(answer)
}

// Detach forgets a session of the follower's.
func (f *Feed) Detach(d Detachment) {
	a, found := f.g.sessions.detach(d.Random, func(a attached) bool { return a.feed == f && a.nonce == d.Nonce })
	if !found {
		return
	}
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	if f.g.state.members[a.user].object == nil {
		f.g.sessions.left(a.user)
	}
}

// Attached is a session that a follower has when its link comes up again.
type Attached struct {
	Random uint64       `json:"random"`
	User   snowflake.ID `json:"user"`
	Nonce  uint64       `json:"nonce"`
	// Age is for how long it has been there, in milliseconds: clocks differ.
	Age int64 `json:"age,omitempty"`
}

// Reattach registers sessions that the follower has had before its link came up. Those that have come back
// elsewhere meanwhile are ended.
func (f *Feed) Reattach(sessions []Attached) {
	now := f.g.now().UnixMilli()
	for _, s := range sessions {
		a := attached{feed: f, user: s.User, nonce: s.Nonce, since: now - s.Age}
		if !f.g.sessions.attachUnlessNewer(s.Random, a) {
			f.send(Evict{Random: s.Random, Nonce: s.Nonce})
		}
	}
}

// Forget forgets the sessions of a feed that was closed.
func (f *Feed) Forget() {
	r := &f.g.sessions
	r.mu.Lock()
	defer r.mu.Unlock()
	for random, a := range r.sessions {
		if a.feed == f {
			delete(r.sessions, random)
			r.count(a, -1)
		}
	}
}
