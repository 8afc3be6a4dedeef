package fanout

import (
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// Retention bounds what is kept: the oldest goes when either bound is passed.
type Retention struct {
	Bytes int64
	Age   time.Duration
}

// Stream is the frames of one guild, in order, and the sessions that follow it. It keeps the
// newest of them, its window; what is older its history makes anew.
//
// Invariants, with position meaning a frame's place in the stream, from 1:
//   - frames[i] is the frame at position first+i; there is no hole;
//   - every frame with a number above lost, and no other but volatile ones, is in frames;
//   - turns has the positions in frames of those that turn views, by the owner whose views they
//     turn, 0 for all sessions; ascending, and no empty list.
type Stream struct {
	core   *Core
	subs   []*follower // one per worker
	blocks blocks

	// A no-op is due when a view let nothing of so many bytes through, or nothing for so many milliseconds.
	idleBytes, idleTime atomic.Int64
	// lagTime is how many milliseconds of what they do not see sessions may be behind at rest.
	lagTime atomic.Int64

	mu        sync.RWMutex
	retention Retention
	frames    []*Frame
	times     []int64 // when frames[i] was published, Unix milliseconds
	first     uint64
	bytes     int64
	lost      uint64 // number of the newest frame that was dropped, but for volatile ones
	last      uint64 // last number of the newest frame
	turns     map[uint64][]uint64
}

// NewStream makes a stream whose last number is seq: sessions may start there, and behind as far
// as the history goes, which may be nil. window is for the frames that the stream keeps, whole for all that
// can be replayed, which only says when a session needs a no-op.
func (c *Core) NewStream(seq uint64, h History, window, whole Retention) *Stream {
	s := &Stream{core: c, lost: seq, last: seq, first: 1, turns: map[uint64][]uint64{}}
	s.blocks.history = h
	s.Retain(window, whole)
	for _, w := range c.workers {
		s.subs = append(s.subs, &follower{stream: s, worker: w, served: 1, looked: 1, views: map[View]struct{}{}})
	}
	return s
}

// Publish appends frames and has them sent. It does not wait for any session. The frames that
// were made from one record are published together.
func (s *Stream) Publish(frames ...*Frame) {
	if len(frames) == 0 {
		return
	}
	now := s.core.now().UnixMilli()
	s.mu.Lock()
	for _, f := range frames {
		eachTurned(f, func(owner uint64) { s.turns[owner] = append(s.turns[owner], s.first+uint64(len(s.frames))) })
		s.frames = append(s.frames, f)
		s.times = append(s.times, now)
		s.bytes += frameCost(f)
		s.last = f.end()
	}
	s.drop(now)
	s.mu.Unlock()
	for _, sub := range s.subs {
		sub.wake()
	}
}

// Retain sets the retentions of NewStream.
func (s *Stream) Retain(window, whole Retention) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retention = window
	s.idleBytes.Store(min(whole.Bytes/idleNoop, window.Bytes/4)) // the window costs less to replay than the history
	s.idleTime.Store(whole.Age.Milliseconds() / idleNoop)
	s.lagTime.Store(min(whole.Age.Milliseconds()/idleNoop, window.Age.Milliseconds()/2))
	s.drop(s.core.now().UnixMilli())
}

// Close closes the sessions that follow the stream: each is sent wire as its last frame.
func (s *Stream) Close(wire []byte) {
	for _, sub := range s.subs {
		sub.worker.post(func() {
			for _, session := range sub.sessions {
				session.Close(wire)
			}
		})
	}
}

// eachTurned calls a function with those whose views the frame turns: 0 for all, owners by themselves.
func eachTurned(f *Frame, do func(owner uint64)) {
	if f.Turn != nil {
		do(0)
	}
	for i := range f.Personal {
		if f.Personal[i].Turn != nil {
			do(f.Personal[i].Owner)
		}
	}
}

// drop forgets the oldest frames beyond the retention; the newest one stays. s.mu is held.
func (s *Stream) drop(now int64) {
	oldest := now - s.retention.Age.Milliseconds()
	n := 0
	for n < len(s.frames)-1 && (s.bytes > s.retention.Bytes || s.times[n] < oldest) {
		f := s.frames[n]
		eachTurned(f, func(owner uint64) {
			if s.turns[owner] = s.turns[owner][1:]; len(s.turns[owner]) == 0 {
				delete(s.turns, owner)
			}
		})
		s.bytes -= frameCost(f)
		if !f.Volatile { // its number may be one that the frame before it reserves
			s.lost = f.Seq
		}
		s.frames[n] = nil // the array behind the slice lives on
		n++
	}
	s.frames, s.times, s.first = s.frames[n:], s.times[n:], s.first+uint64(n)
}

// Holds says whether the window has every frame with a number above seq.
func (s *Stream) Holds(seq uint64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return seq >= s.lost
}

// lacks says whether neither the window nor the history has every frame with a number above seq.
func (s *Stream) lacks(seq uint64) bool {
	h := s.blocks.history
	return !s.Holds(seq) && (h == nil || !h.Kept(seq))
}

// seek finds the position behind number seq, if all frames from there on are kept. s.mu is held.
func (s *Stream) seek(seq uint64) (pos uint64, ok bool) {
	if seq < s.lost {
		return 0, false
	}
	i := sort.Search(len(s.frames), func(i int) bool { return s.frames[i].Seq > seq })
	return s.first + uint64(i), true
}

// window copies up to len(dst) frames from position pos on, or where that has been dropped,
// from behind number seq. at is their position; not ok: the history has to be asked.
func (s *Stream) window(dst []*Frame, pos, seq uint64) (n int, at uint64, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if pos < s.first {
		if pos, ok = s.seek(seq); !ok {
			return 0, 0, false
		}
	}
	if i := pos - s.first; i < uint64(len(s.frames)) {
		n = copy(dst, s.frames[i:])
	}
	return n, pos, true
}

// upTo cuts off the frames of a block that the window has, or will have when they are published.
func (s *Stream) upTo(frames []*Frame) []*Frame {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return frames[:sort.Search(len(frames), func(i int) bool { return frames[i].Seq > s.lost })]
}

// end is the position behind the newest frame.
func (s *Stream) end() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.first + uint64(len(s.frames))
}

// viewAt is the view before position pos of an owner's session that has view v at the head:
// it goes back over the turns in between. nil: none can be replayed to. s.mu is held.
func (s *Stream) viewAt(pos, owner uint64, v View) View {
	all, own := s.turns[0], s.turns[owner]
	if owner == 0 {
		own = nil
	}
	for v != nil {
		var at uint64 // the newest of both
		if n := len(all); n > 0 {
			at = all[n-1]
		}
		if n := len(own); n > 0 {
			at = max(at, own[n-1])
		}
		if at < pos || at == 0 {
			break
		}
		if n := len(all); n > 0 && all[n-1] == at {
			all = all[:n-1]
		}
		if n := len(own); n > 0 && own[n-1] == at {
			own = own[:n-1]
		}
		f := s.frames[at-s.first]
		v = f.turn(f.personal(owner)).Back(v)
	}
	return v
}
