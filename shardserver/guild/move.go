package guild

import (
	"sync"
	"time"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

const (
	// moveTick is how often sessions are asked to leave.
	moveTick = 50 * time.Millisecond
	// leaveTime is what a session that was asked has until its connection is closed.
	leaveTime = 5 * time.Second
)

// Order has sessions that are here come back on another connection (op 7). Some of a user's sessions
// are asked when one is.
type Order struct {
	// Round of moves. An order of an earlier one than the last is ignored.
	Round int64
	// Leave is how many sessions are asked in this round, in all. Sessions that have come since its first order
	// are not asked.
	Leave int
	// All has every session leave, also those that come later.
	All bool
	// PerSecond bounds how many are asked in a second; 0: none for now.
	PerSecond int
	// Deadline is when asking ends; the zero time: never.
	Deadline time.Time
}

// mover carries out the last order.
type mover struct {
	mu      sync.Mutex
	order   Order
	began   int64 // when the round's first order came, Unix milliseconds
	asked   int   // in the round
	running bool
	final   bool // no other order is taken any more
	quit    chan struct{}
}

// Move takes an order; it does not wait until it has been carried out. It returns false for one that is out of date.
func (g *Guild) Move(o Order) bool {
	m := &g.mover
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.final || o.Round < m.order.Round {
		return false
	}
	return g.begin(o)
}

// Drain has all sessions leave, and takes no other order any more.
func (g *Guild) Drain(perSecond int) {
	m := &g.mover
	m.mu.Lock()
	defer m.mu.Unlock()
	m.final = true
	g.begin(Order{Round: m.order.Round, All: true, PerSecond: perSecond})
}

// begin goes on with an order. mover.mu is held.
func (g *Guild) begin(o Order) bool {
	m := &g.mover
	select {
	case <-g.closed: // Close stops the mover behind this
		return false
	default:
	}
	o.PerSecond = max(o.PerSecond, 0)
	if o.Round > m.order.Round || m.began == 0 {
		m.began, m.asked = g.now().UnixMilli(), 0
	}
	m.order = o
	if !m.running {
		m.running, m.quit = true, make(chan struct{})
		go g.move(m.quit)
	}
	return true
}

// Moved returns the last round of which orders were taken, and how many sessions have been asked to leave in it.
func (g *Guild) Moved() (round int64, asked int) {
	g.mover.mu.Lock()
	defer g.mover.mu.Unlock()
	return g.mover.order.Round, g.mover.asked
}

// Draining says that all sessions are to leave.
func (g *Guild) Draining() bool {
	g.mover.mu.Lock()
	defer g.mover.mu.Unlock()
	return g.mover.order.All && g.mover.running
}

func (m *mover) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.running {
		m.running = false
		close(m.quit)
	}
}

// leaving is a session that was asked to leave.
type leaving struct {
	session *fanout.Session
	until   time.Time
}

// move asks sessions to leave until the order is carried out.
func (g *Guild) move(quit chan struct{}) {
	tick := time.NewTicker(moveTick)
	defer tick.Stop()
	asked := map[*fanout.Session]bool{}
	var late []leaving
	var due float64
	last := time.Now()
	for {
		select {
		case <-quit:
			return
		case <-tick.C:
		}
		now := time.Now()
		since := now.Sub(last) // a late tick has more to do
		last = now
		for len(late) > 0 && !now.Before(late[0].until) {
			late[0].session.Close(protocol.CloseFrame(protocol.CloseUnknownError, "moved"))
			delete(asked, late[0].session)
			late = late[1:]
		}
		m := &g.mover
		m.mu.Lock()
		o, began := m.order, m.began
		want := o.Leave - m.asked
		if o.All {
			want, began = int(^uint(0)>>1), int64(1<<62)
		}
		over := want <= 0 || !o.Deadline.IsZero() && now.After(o.Deadline)
		if over && len(late) == 0 {
			m.running = false
			m.mu.Unlock()
			return
		}
		m.mu.Unlock()
		if over {
			continue
		}
		due = min(due+float64(o.PerSecond)*since.Seconds(), float64(o.PerSecond))
		n := min(int(due), want)
		if n == 0 {
			continue
		}
		chosen := g.choose(n, began, asked)
		due -= float64(len(chosen))
		for _, s := range chosen {
			asked[s] = true
			late = append(late, leaving{s, now.Add(leaveTime)})
		}
		m.mu.Lock()
		if m.order.Round == o.Round {
			m.asked += len(chosen)
		}
		if !o.All && len(chosen) < n { // nobody is left to ask
			m.order.Leave = m.asked
		}
		m.mu.Unlock()
	}
}

// choose asks up to n users' sessions to leave, and returns all of theirs.
func (g *Guild) choose(n int, began int64, asked map[*fanout.Session]bool) (chosen []*fanout.Session) {
	users := map[snowflake.ID]bool{}
	r := &g.sessions
	r.mu.Lock()
	count := 0
	for _, a := range r.sessions {
		if a.session != nil && a.since < began && !asked[a.session] && !users[a.user] {
			users[a.user] = true
			if count += r.users[a.user]; count >= n {
				break
			}
		}
	}
	for _, a := range r.sessions {
		if users[a.user] && a.session != nil && !asked[a.session] {
			chosen = append(chosen, a.session)
		}
	}
	r.mu.Unlock()
	if len(users) == 0 {
		return nil
	}
	owners := make([]uint64, 0, len(users))
	for u := range users {
		owners = append(owners, uint64(u))
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	// It stands in the stream: it overtakes neither READY nor a replay, which some libraries do not survive.
	g.stream.Publish(&fanout.Frame{
		Seq: g.last, Tag: protocol.EventOf("RESUMED"), Personal: fanout.For(protocol.Reconnect, owners...), Volatile: true,
	})
	return chosen
}
