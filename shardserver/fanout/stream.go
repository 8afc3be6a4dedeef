package fanout

import (
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// Frame is one message of a stream, encoded once, as it goes over the socket.
// A Frame must not be changed once it is published.
type Frame struct {
	// Seq is the message's number. Along a stream numbers never fall; frames that share one
	// were made from the same record.
	Seq uint64
	// Wire is the message as a complete frame of the socket's protocol.
	Wire []byte
	// Tag is what views decide by.
	Tag any
	// Only limits the frame to sessions of these owners, whatever their view; nil: all.
	Only []uint64
	// Gate opens or closes the gate of the sessions that an addressed frame (Only) goes to,
	// right behind the frame.
	Gate Gate
	// Volatile frames are for sessions that are there now: a replay leaves them out.
	Volatile bool
}

// Gate is what a frame does to the gate of the sessions that it is addressed to.
type Gate uint8

// Gates.
const (
	LeaveGate Gate = iota
	OpenGate
	CloseGate
)

func (f *Frame) addressedTo(owner uint64) bool {
	return slices.Contains(f.Only, owner)
}

// View decides which frames a session receives. Sessions with the same View, compared with ==,
// share the work of building what they are sent, so views should be interned.
type View interface {
	Admits(*Frame) bool
}

// Retention bounds what a stream keeps for replay and for slow sessions: the oldest frames
// go when either bound is passed.
type Retention struct {
	Bytes int64
	Age   time.Duration
}

// Stream is the frames of one guild, in order, and the sessions that follow it.
//
// Invariants, with position meaning a frame's place in the stream, from 0:
//   - frames[i] is the frame at position first+i; there is no hole;
//   - a session's cursor is the position of the next frame that it has not been sent in full,
//     and the cursor never goes back;
//   - a session whose cursor is below first has been overrun and is closed.
type Stream struct {
	core *Core
	subs []*follower // one per worker

	// A no-op is due when a view let nothing of so many bytes through, or nothing for so many milliseconds.
	idleBytes, idleTime atomic.Int64

	mu        sync.RWMutex
	retention Retention
	frames    []*Frame
	times     []int64 // when frames[i] was published, Unix milliseconds
	first     uint64
	bytes     int64
	lost      uint64 // number of the newest frame that was dropped
	last      uint64 // number of the newest frame
}

// NewStream makes a stream whose last number is seq: sessions may start there.
func (c *Core) NewStream(seq uint64, r Retention) *Stream {
	s := &Stream{core: c, lost: seq, last: seq}
	s.Retain(r)
	for _, w := range c.workers {
		s.subs = append(s.subs, &follower{stream: s, worker: w})
	}
	return s
}

// Publish appends frames and has them sent. It does not wait for any session. The frames of one
// number are published together, but for volatile ones.
func (s *Stream) Publish(frames ...*Frame) {
	if len(frames) == 0 {
		return
	}
	now := s.core.now().UnixMilli()
	s.mu.Lock()
	for _, f := range frames {
		s.frames = append(s.frames, f)
		s.times = append(s.times, now)
		s.bytes += frameCost(f)
		s.last = f.Seq
	}
	s.drop(now)
	s.mu.Unlock()
	for _, sub := range s.subs {
		sub.wake()
	}
}

// Retain sets the retention.
func (s *Stream) Retain(r Retention) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retention = r
	s.idleBytes.Store(r.Bytes / idleNoop)
	s.idleTime.Store(r.Age.Milliseconds() / idleNoop)
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

// frameCost is what a frame counts for retention, with its index entry and header.
func frameCost(f *Frame) int64 { return int64(len(f.Wire)+8*len(f.Only)) + 128 }

// drop forgets the oldest frames beyond the retention; the newest one stays. s.mu is held.
func (s *Stream) drop(now int64) {
	oldest := now - s.retention.Age.Milliseconds()
	n := 0
	for n < len(s.frames)-1 && (s.bytes > s.retention.Bytes || s.times[n] < oldest) {
		s.bytes -= frameCost(s.frames[n])
		s.lost = s.frames[n].Seq
		s.frames[n] = nil // the array behind the slice lives on
		n++
	}
	s.frames, s.times, s.first = s.frames[n:], s.times[n:], s.first+uint64(n)
}

// Head is the stream's end: the position of the next frame and the number of the last one.
func (s *Stream) Head() (pos, seq uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.first + uint64(len(s.frames)), s.last
}

// seek finds the position behind number seq. It fails when a frame with a larger number has
// been dropped, or seq has not been reached yet. s.mu is held.
func (s *Stream) seek(seq uint64) (pos uint64, ok bool) {
	if seq < s.lost || seq > s.last {
		return 0, false
	}
	i := sort.Search(len(s.frames), func(i int) bool { return s.frames[i].Seq > seq })
	return s.first + uint64(i), true
}

// window copies up to len(dst) frames from position pos on. ok is false when pos has been dropped.
func (s *Stream) window(dst []*Frame, pos uint64) (n int, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if pos < s.first {
		return 0, false
	}
	if i := pos - s.first; i < uint64(len(s.frames)) {
		n = copy(dst, s.frames[i:])
	}
	return n, true
}

// gateAt tells whether the owner's gate was open at position pos, given that it is open at the
// head now: the first frame on the way that turned it tells how it stood before. s.mu is held.
func (s *Stream) gateAt(pos uint64, owner uint64, open bool) bool {
	for _, f := range s.frames[pos-s.first:] {
		if f.Gate != LeaveGate && f.addressedTo(owner) {
			return f.Gate == CloseGate
		}
	}
	return open
}
