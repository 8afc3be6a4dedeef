package audit

import (
	"slices"
	"sync"
)

// keptGaps is how many of its latest gaps a session remembers, to tell a late frame from a
// doubled one.
const keptGaps = 32

// Session is one session's part in the audit. What a connection of it receives is reported in
// the order of receipt; a resumed session goes on, an invalidated one ends.
type Session struct {
	a    *Auditor
	view *view
	name string
	// since is what was acknowledged when the session was asked for.
	since uint64

	mu    sync.Mutex
	begun bool
	ended bool
	base  uint64 // number of its snapshot
	pos   uint64 // highest number told to it
	ours  bool   // it saw one of our events at pos
	kinds []uint64
	gaps  []span // the latest ones, unsorted

	chunk   *chunk // of pos, to spare looking it up
	chunkNo uint64

	deliveries, doubled, reordered, corrupted, invalidated uint64
}

// Position is the highest number that the session was told, and whether it has a snapshot.
func (s *Session) Position() (number uint64, begun bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pos, s.begun
}

// Snapshot says that the session received the guild's state as of number: its duty begins.
func (s *Session) Snapshot(number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if number < s.pos {
		s.fell(number)
	}
	if s.a.durable && number < s.since {
		s.reordered++
		s.problem("session %s begins at number %d, after number %d had been acknowledged", s.name, number, s.since)
	}
	s.move(number)
	s.begun, s.base, s.ours, s.kinds = true, number, false, nil
}

// End says that the session is over and has no further duty.
func (s *Session) End() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
}

// Invalidated says that the server does not know the session any more, and how it said so: the session
// is over. Where the log survives its server, that is a fault.
func (s *Session) Invalidated(how string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	if s.a.durable {
		s.invalidated++
		s.problem("session %s was lost at number %d: %s", s.name, s.pos, how)
	}
}

// Told says that a frame without a number of its own came: it repeats the session's number.
func (s *Session) Told(number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case number < s.pos:
		s.fell(number)
	case number > s.pos:
		s.skip(s.pos+1, number)
		s.move(number)
	}
}

// Other says that a frame came which has a number and is none of the published events; kind
// and body are hashes of its type and body.
func (s *Session) Other(number, kind, body uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case number < s.pos:
		s.fell(number)
		return
	case number > s.pos:
		// The number itself counts as skipped: one of our events may belong there.
		s.skip(s.pos+1, number)
		s.move(number)
	case slices.Contains(s.kinds, kind):
		s.doubled++
		s.problem("session %s: number %d came twice with the same type", s.name, number)
		return
	}
	s.kinds = append(s.kinds, kind)
	if s.begun && !s.view.same(otherFrame{number, kind}, body) {
		s.corrupted++
		s.problem("session %s: number %d has another body than in other sessions", s.name, number)
	}
}

// Event says that a published event came whole; body is a hash of its type and body.
func (s *Session) Event(number uint64, e Event, body uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.pos
	if !s.arrive(number) {
		return
	}
	c := s.chunk
	if i := number >> chunkBits; c == nil || i != s.chunkNo {
		c = s.view.chunk(i)
		s.chunk, s.chunkNo = c, i
	}
	at := &c[number&(1<<chunkBits-1)]
	if at.key.Load() == e.packed() && at.body.Load() == body {
		return
	}
	s.a.check(s, number, e, body, at, func(other uint64) bool {
		return s.base < other && other <= before && !s.skipped(other)
	})
}

// Damaged says that a published event came with a wrong checksum.
func (s *Session) Damaged(number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.arrive(number) {
		s.corrupted++
		s.problem("session %s: number %d has a wrong checksum", s.name, number)
	}
}

// arrive counts the arrival of one of our events; false when it is a double.
func (s *Session) arrive(number uint64) bool {
	switch {
	case !s.begun:
		s.reordered++
		s.problem("session %s: number %d came before the session's snapshot", s.name, number)
		s.move(number)
		return false
	case number > s.pos:
		s.skip(s.pos+1, number-1)
		s.move(number)
		s.ours = true
	case number == s.pos && s.ours, number < s.pos && number > s.base && !s.skipped(number):
		s.doubled++
		s.problem("session %s: number %d came twice", s.name, number)
		return false
	case number == s.pos && len(s.kinds) > 0:
		s.fill(number) // after another frame of that number
		s.ours = true
	default:
		s.fell(number)
		s.fill(number)
		s.ours = s.ours || number == s.pos
	}
	s.deliveries++
	return true
}

// move makes number the session's position.
func (s *Session) move(number uint64) {
	if number > s.pos {
		s.pos, s.ours = number, false
		s.kinds = s.kinds[:0]
	}
}

// fell counts a frame whose number is not above the session's position.
func (s *Session) fell(number uint64) {
	s.reordered++
	s.problem("session %s: number %d came after number %d", s.name, number, s.pos)
}

// skip notes that the session's duty has no frame of ours for the numbers from..to.
func (s *Session) skip(from, to uint64) {
	if !s.begun || to < from {
		return
	}
	if len(s.gaps) == keptGaps {
		s.gaps = append(s.gaps[:0], s.gaps[1:]...)
	}
	s.gaps = append(s.gaps, span{from, to})
	s.view.skip(span{from, to}, s.name)
}

func (s *Session) skipped(number uint64) bool {
	return slices.ContainsFunc(s.gaps, func(g span) bool { return g.from <= number && number <= g.to })
}

// fill takes a number out of the gap it is in.
func (s *Session) fill(number uint64) {
	for i, g := range s.gaps {
		if number < g.from || number > g.to {
			continue
		}
		s.view.unskip(g)
		s.gaps = append(s.gaps[:i], s.gaps[i+1:]...)
		s.skip(g.from, number-1)
		s.skip(number+1, g.to)
		return
	}
}

func (s *Session) problem(format string, args ...any) {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	s.a.problem(format, args...)
}

func (s *Session) count(v *Verdict) {
	v.Deliveries += s.deliveries
	v.Doubled += s.doubled
	v.Reordered += s.reordered
	v.Corrupted += s.corrupted
	v.Invalidated += s.invalidated
}
