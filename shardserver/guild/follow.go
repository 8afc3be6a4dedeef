package guild

import (
	"context"
	"fmt"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// Upstream is where a guild that follows another has its sessions let in.
type Upstream interface {
	// Attach returns when the guild has been told of the attachment's Answer, with the attachment's nonce.
	Attach(ctx context.Context, a Attachment) (nonce uint64, err error)
	// Settle says that an attachment that was answered is among AttachedHere. It does not wait.
	Settle(nonce uint64)
	// Detach does not wait.
	Detach(d Detachment)
}

// Follow makes a guild of the history in a replica of its log, up to the number of state, that goes on with
// what Take is given. It appends nothing itself: commands fail with ErrClosed.
func Follow(c Config, s State, up Upstream) (*Guild, error) {
	g := newGuild(c)
	if g.last != s.Seq {
		return nil, fmt.Errorf("guild: the history ends at %d, the state is as of %d", g.last, s.Seq)
	}
	for _, row := range s.Rows {
		if err := g.state.loadRow(row.Key, row.Value); err != nil {
			return nil, err
		}
	}
	g.shown.Store(g.last)
	g.upstream, g.state.count, g.state.keeps = up, s.Members, g.sessions.isTracked
	g.newStream(c)
	go func() {
		<-g.closed
		close(g.stopped)
	}()
	return g, nil
}

// Take takes records that follow the last one. It is called by one goroutine at a time.
func (g *Guild) Take(records []guildlog.Record) error {
	t := g.newTx()
	for _, r := range records {
		var turns turn
		if r.Reserved > 0 {
			turns = turnOf(&r)
		}
		t.append(r, turns)
	}
	if err := g.log.Commit(guildlog.Commit{Records: t.records}); err != nil {
		return err
	}
	g.publish(t)
	return nil
}

// TakeVolatile takes an event that is not logged.
func (g *Guild) TakeVolatile(r guildlog.Record) {
	t := g.newTx()
	r.Seq = t.last
	t.frames = append(t.frames, volatileFrame(r))
	g.publish(t)
}

// TakeAnswer takes the membership of a user who is about to have a session. From here on the records keep it up to date.
func (g *Guild) TakeAnswer(a Answer) {
	if a.Error != "" {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if m := g.state.members[a.User]; a.Member != nil && m.object == nil && g.sessions.isTracked(a.User) {
		g.state.members[a.User] = member{object: a.Member, joined: a.Joined}
	}
}

// TakeEvict ends a session that a newer connection elsewhere has taken over.
func (g *Guild) TakeEvict(e Evict) {
	g.sessions.mu.Lock()
	a := g.sessions.sessions[e.Random]
	g.sessions.mu.Unlock()
	if a.session != nil && a.nonce == e.Nonce {
		a.session.End(errTakenOver)
	}
}

// AttachedHere are the sessions that are here.
func (g *Guild) AttachedHere() (list []Attached) {
	now := g.now().UnixMilli()
	g.sessions.mu.Lock()
	defer g.sessions.mu.Unlock()
	for random, a := range g.sessions.sessions {
		list = append(list, Attached{Random: random, User: a.user, Nonce: a.nonce, Age: max(0, now-a.since)})
	}
	return list
}

// untrack forgets one connection of a user, and with the last one the membership.
func (g *Guild) untrack(user snowflake.ID) {
	if g.sessions.track(user, -1) {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.sessions.isTracked(user) {
		delete(g.state.members, user)
	}
}
