// Package audit judges what the sessions of a guild have seen against what its publishers were
// promised. It does no I/O: somebody feeds it what was published, what was acknowledged and
// what every session received, in the order of its receipt, and asks for a verdict.
//
// Every published event has a key (publisher and count). The rules, for each session from its
// snapshot to its end:
//
//   - numbers never fall, and each (number, type) comes at most once;
//   - equal numbers mean equal bodies in all sessions of a view;
//   - an acknowledged event comes exactly once, at its acknowledged number, which stays the same
//     however often the event is sent again;
//   - an unacknowledged one comes at most once, at the same number everywhere;
//   - a refused one, of which the server said that it was not appended, does not come;
//   - no two events have one number, and a publisher's events have rising numbers.
//
// Where the log survives the end of its server (NewDurable), all this holds over restarts, and more:
//
//   - no session is lost: none is invalidated, or begun anew for a client that had one;
//   - a new session does not begin before what was acknowledged when it was asked for.
//
// Numbers may be missing otherwise: a server filters. So a session costs a position and, while
// nothing is skipped, no list: what sessions skip is counted per distinct gap in a table that a
// view's sessions share, and looked at when the verdict is due, when it is known which numbers
// carried acknowledged events.
package audit

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// maxProblems is how many problems a verdict tells in words.
const maxProblems = 10

// Event is the key of a published event.
type Event struct {
	Publisher uint32 // counted from 0
	Count     uint32 // of the publisher's events, from 0
}

func (e Event) String() string { return fmt.Sprintf("event %d of publisher %d", e.Count, e.Publisher) }

// packed is the key as a number other than 0.
func (e Event) packed() uint64 { return (uint64(e.Publisher)+1)<<32 | uint64(e.Count) }

func unpack(p uint64) Event {
	return Event{Publisher: uint32(p>>32 - 1), Count: uint32(p & 0xffffffff)} //nolint:gosec // the halves of packed
}

// Auditor holds what is known of one guild's log and of the sessions that read it. All
// methods of it and of its sessions may be called from any goroutine.
type Auditor struct {
	durable bool

	mu         sync.Mutex
	publishers [][]published // by publisher and count
	views      map[string]*view
	sessions   []*Session
	last       uint64 // highest acknowledged number
	acked      int
	reordered  uint64 // found apart from any session
	problems   []string
	untold     int // problems beyond maxProblems
}

// published is what is known of an event: its number, 0 until an acknowledgement or a first
// sight tells it.
type published struct {
	number  uint64
	acked   bool
	refused bool
}

// New makes an auditor that knows of no event and no session. The log may end with its server.
func New() *Auditor { return &Auditor{views: map[string]*view{}} }

// NewDurable is New for a log that survives its server.
func NewDurable() *Auditor {
	a := New()
	a.durable = true
	return a
}

// Publish says that an event is about to be sent to the server for the first time. Events of a
// publisher come in the order of their counts.
func (a *Auditor) Publish(e Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for len(a.publishers) <= int(e.Publisher) {
		a.publishers = append(a.publishers, nil)
	}
	for len(a.publishers[e.Publisher]) <= int(e.Count) {
		a.publishers[e.Publisher] = append(a.publishers[e.Publisher], published{})
	}
}

// Acknowledge says that the server answered for an event that was published: it has that number.
func (a *Auditor) Acknowledge(e Event, number uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.published(e)
	if p == nil {
		a.reordered++
		a.problem("%v was acknowledged without having been published", e)
		return
	}
	if p.number != 0 && p.number != number {
		a.reordered++
		a.problem("%v was acknowledged as number %d after it had been seen or acknowledged as number %d", e, number, p.number)
	}
	p.number = number
	if !p.acked {
		p.acked = true
		a.acked++
	}
	a.last = max(a.last, number)
}

// Refuse says that the server answered that it did not append an event, which will not be sent
// again. Whether it comes all the same is looked at when the verdict is due.
func (a *Auditor) Refuse(e Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.published(e); p != nil {
		p.refused = true
	}
}

// Last is the highest acknowledged number.
func (a *Auditor) Last() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last
}

// Acknowledged is the count of acknowledged events.
func (a *Auditor) Acknowledged() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.acked
}

// Session starts a session; its duty begins with Snapshot. Sessions of one view are to see the
// same bytes: they have equal rights and intents. since is what Last was when the session was asked for.
func (a *Auditor) Session(name, viewName string, since uint64) *Session {
	a.mu.Lock()
	defer a.mu.Unlock()
	v := a.views[viewName]
	if v == nil {
		v = newView()
		a.views[viewName] = v
	}
	s := &Session{a: a, view: v, name: name, since: since}
	a.sessions = append(a.sessions, s)
	return s
}

// published finds what is known of an event, nil when it was never published. a.mu is held.
func (a *Auditor) published(e Event) *published {
	if int(e.Publisher) >= len(a.publishers) || int(e.Count) >= len(a.publishers[e.Publisher]) {
		return nil
	}
	return &a.publishers[e.Publisher][e.Count]
}

// problem notes a problem in words. a.mu is held.
func (a *Auditor) problem(format string, args ...any) {
	if len(a.problems) >= maxProblems {
		a.untold++
		return
	}
	a.problems = append(a.problems, fmt.Sprintf(format, args...))
}

// Verdict is what an audit found.
type Verdict struct {
	Deliveries  uint64 // published events that reached a session, doubles apart
	Lost        uint64 // deliveries that were due and did not come as their number
	Doubled     uint64 // deliveries that came again
	Reordered   uint64 // frames whose number fell, or was not theirs
	Corrupted   uint64 // deliveries with another body than the published one
	Refuted     uint64 // events that came although they had been refused
	Invalidated uint64 // sessions that were lost although their log should have survived
	Problems    []string
}

// Clean says that nothing was found.
func (v Verdict) Clean() bool {
	return v.Lost+v.Doubled+v.Reordered+v.Corrupted+v.Refuted+v.Invalidated == 0
}

// Counts is the part of the verdict that is known at any time: Lost and Refuted are 0 and Problems is nil.
func (a *Auditor) Counts() Verdict {
	a.mu.Lock()
	sessions := a.sessions
	v := Verdict{Reordered: a.reordered}
	a.mu.Unlock()
	for _, s := range sessions {
		s.mu.Lock()
		s.count(&v)
		s.mu.Unlock()
	}
	return v
}

// Verdict judges everything seen so far. When complete, sessions that have not ended are
// expected to have received all that was acknowledged; otherwise all up to their position.
func (a *Auditor) Verdict(complete bool) Verdict {
	v := a.Counts()
	var tails []tail
	if complete {
		tails = a.tails()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	v.Problems = slices.Clone(a.problems)
	untold := a.untold
	tell := func(format string, args ...any) {
		if len(v.Problems) >= maxProblems {
			untold++
			return
		}
		v.Problems = append(v.Problems, fmt.Sprintf(format, args...))
	}

	// Numbers of acknowledged events and of all that have one, and the order of each publisher's events.
	due, all := make([]carried, 0, a.acked), make([]carried, 0, a.acked)
	for i, events := range a.publishers {
		var before uint64
		for j, p := range events {
			if p.number == 0 {
				continue
			}
			e := Event{Publisher: uint32(i), Count: uint32(j)} //nolint:gosec // made from them
			if p.number < before {
				v.Reordered++
				tell("%v has number %d, an earlier one of the same publisher has %d", e, p.number, before)
			}
			before = max(before, p.number)
			if p.refused {
				v.Refuted++
				tell("%v has number %d, although the server said that it was not appended", e, p.number)
			}
			all = append(all, carried{p.number, e})
			if p.acked {
				due = append(due, carried{p.number, e})
			}
		}
	}
	byNumber := func(x, y carried) int { return cmp.Compare(x.number, y.number) }
	slices.SortStableFunc(due, byNumber)
	slices.SortStableFunc(all, byNumber)
	for i := 1; i < len(all); i++ {
		if all[i].number == all[i-1].number {
			v.Reordered++
			tell("%v and %v both have number %d", all[i-1].event, all[i].event, all[i].number)
		}
	}

	for _, w := range a.views {
		for _, g := range w.skipped() {
			for _, c := range within(due, g.span) {
				v.Lost += g.count
				tell("number %d, %v, was lost to %d sessions, one of them %s", c.number, c.event, g.count, g.session)
			}
		}
	}
	for _, t := range tails {
		if missing := within(due, span{t.position + 1, a.last}); len(missing) > 0 {
			v.Lost += uint64(len(missing))
			tell("session %s stopped at number %d and lacks %d events up to number %d", t.session, t.position, len(missing), a.last)
		}
	}
	if untold > 0 {
		v.Problems = append(v.Problems, fmt.Sprintf("and %d more", untold))
	}
	return v
}

// tail says how far a session came that has not ended.
type tail struct {
	session  string
	position uint64
}

func (a *Auditor) tails() []tail {
	a.mu.Lock()
	sessions := a.sessions
	a.mu.Unlock()
	var tails []tail
	for _, s := range sessions {
		s.mu.Lock()
		if s.begun && !s.ended {
			tails = append(tails, tail{s.name, s.pos})
		}
		s.mu.Unlock()
	}
	return tails
}

// carried is a number and the acknowledged event it carries.
type carried struct {
	number uint64
	event  Event
}

// within are those of due, which is sorted, that lie in the span.
func within(due []carried, s span) []carried {
	if s.to < s.from {
		return nil
	}
	compare := func(c carried, n uint64) int { return cmp.Compare(c.number, n) }
	from, _ := slices.BinarySearchFunc(due, s.from, compare)
	rest := due[from:]
	to, found := slices.BinarySearchFunc(rest, s.to, compare)
	for found && to < len(rest) && rest[to].number == s.to {
		to++
	}
	return rest[:to]
}

// check compares an event with what is known of its number. One that comes as another number
// does not count as that number's event: the number is skipped. passed tells whether the session
// went by another number, in its duty and without skipping it.
func (a *Auditor) check(s *Session, number uint64, e Event, body uint64, at *slot, passed func(number uint64) bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.published(e)
	if p == nil {
		s.corrupted++
		a.problem("session %s: number %d has %v, which was never published", s.name, number, e)
		return
	}
	key := at.key.Load()
	if p.number == 0 && key == 0 {
		p.number = number
	}
	switch {
	case p.number == number && key != e.packed():
		at.body.Store(body)
		at.key.Store(e.packed())
	case p.number == number:
		if at.body.Load() != body {
			s.corrupted++
			a.problem("session %s: number %d, %v, has another body than in other sessions", s.name, number, e)
		}
	case p.number != 0 && passed(p.number):
		s.skip(number, number)
		s.doubled++
		a.problem("session %s: %v came as number %d and again as number %d", s.name, e, p.number, number)
	case p.number != 0:
		s.skip(number, number)
		s.reordered++
		a.problem("session %s: %v came as number %d, its number is %d", s.name, e, number, p.number)
	default:
		s.skip(number, number)
		s.reordered++
		a.problem("session %s: %v came as number %d, which is the number of %v", s.name, e, number, unpack(key))
	}
}

// view is what sessions that see the same bytes share.
type view struct {
	mu     sync.RWMutex
	chunks map[uint64]*chunk
	others map[otherFrame]uint64 // body of frames that are not ours

	gapMu sync.Mutex
	gaps  map[span]*gap
}

const (
	chunkBits = 12
	maxOthers = 1 << 20
)

// chunk has the events of numbers that are equal but for their last bits.
type chunk [1 << chunkBits]slot

// slot is the event of one number. It is written under Auditor.mu and read without.
type slot struct {
	key  atomic.Uint64 // Event.packed; 0 as long as nobody saw one
	body atomic.Uint64
}

type otherFrame struct{ number, kind uint64 }

// span are the numbers from..to, both included.
type span struct{ from, to uint64 }

// gap says how many sessions skipped just that span.
type gap struct {
	span    span
	count   uint64
	session string // one of them
}

func newView() *view {
	return &view{
		chunks: map[uint64]*chunk{},
		others: map[otherFrame]uint64{},
		gaps:   map[span]*gap{},
	}
}

func (v *view) chunk(i uint64) *chunk {
	v.mu.RLock()
	c := v.chunks[i]
	v.mu.RUnlock()
	if c != nil {
		return c
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if c = v.chunks[i]; c == nil {
		c = new(chunk)
		v.chunks[i] = c
	}
	return c
}

// same compares a frame that is not ours with the one that others saw at this number.
func (v *view) same(f otherFrame, body uint64) bool {
	v.mu.RLock()
	known, ok := v.others[f]
	v.mu.RUnlock()
	if ok {
		return known == body
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if known, ok = v.others[f]; ok {
		return known == body
	}
	if len(v.others) >= maxOthers {
		clear(v.others)
	}
	v.others[f] = body
	return true
}

func (v *view) skip(s span, session string) {
	v.gapMu.Lock()
	defer v.gapMu.Unlock()
	g := v.gaps[s]
	if g == nil {
		g = &gap{span: s, session: session}
		v.gaps[s] = g
	}
	g.count++
}

func (v *view) unskip(s span) {
	v.gapMu.Lock()
	defer v.gapMu.Unlock()
	if g := v.gaps[s]; g != nil {
		if g.count--; g.count == 0 {
			delete(v.gaps, s)
		}
	}
}

// skipped are the gaps, by number.
func (v *view) skipped() []gap {
	v.gapMu.Lock()
	defer v.gapMu.Unlock()
	gaps := make([]gap, 0, len(v.gaps))
	for _, g := range v.gaps {
		gaps = append(gaps, *g)
	}
	slices.SortFunc(gaps, func(x, y gap) int {
		switch {
		case x.span.from < y.span.from, x.span.from == y.span.from && x.span.to < y.span.to:
			return -1
		case x.span == y.span:
			return 0
		}
		return 1
	})
	return gaps
}
