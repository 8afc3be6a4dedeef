package fanout

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// quantum is the number of sessions that a worker serves of one stream before it looks after the others.
	quantum = 512
	// maxUnseen bounds the frames that a follower's sessions see nothing of before they pass them nevertheless.
	maxUnseen = 8 * maxWindow
	// maxViews bounds the views that a follower asks whether a frame is seen at all.
	maxViews = 16
)

// follower is a stream's sessions on one worker.
type follower struct {
	stream   *Stream
	worker   *worker
	sessions []*Session // owned by the worker

	// guarded by worker.mu
	pending bool // frames were published after the present round began
	queued  bool // in worker.rounds, or being served

	// Owned by the worker.
	next   int               // session to be served next in the present round
	served uint64            // the stream's end at the last round
	at     int64             // when that was, Unix milliseconds
	looked uint64            // position behind the frames that unseen has looked at
	cost   int64             // of those, and of what some session has passed before without being sent anything
	views  map[View]struct{} // of the sessions that have been flushed since that round began; more than maxViews are not told apart
	last   View              // the one that was noted last
}

// note looks at one of the sessions that has been flushed.
func (f *follower) note(s *Session) {
	f.cost = max(f.cost, s.skipped)
	if s.view != f.last && len(f.views) <= maxViews {
		f.views[s.view] = struct{}{}
		f.last = s.view
	}
}

// unseen says whether none of the sessions is sent anything of what was published since the last round,
// a no-op neither, so that they need not be touched: when thousands join, hardly anybody may be told of it.
func (f *follower) unseen(frames []*Frame) bool {
	w := f.worker
	if len(f.views) > maxViews || w.clock.Load()-f.at >= f.stream.lagTime.Load() || w.parked.Load() > 0 { // a round looks after those
		return false
	}
	for head := w.scratch.cache.head; f.looked < head; {
		n, at, ok := f.stream.window(frames, f.looked, 0)
		if !ok || at != f.looked || head-f.served > maxUnseen || f.seen(frames[:n]) {
			return false
		}
		f.looked += uint64(n)
	}
	// Twice what a no-op is due for: then many sessions get theirs in the one round.
	return f.cost < 2*f.stream.idleBytes.Load()
}

// seen says whether a session is sent something of the frames, or turned by them, as far as views tell.
func (f *follower) seen(frames []*Frame) bool {
	for _, frame := range frames {
		if frame.Turn != nil || len(frame.Personal) > 0 {
			return true
		}
		for v := range f.views {
			if frame.Wire != nil && v != nil && v.Pick(frame) != nil {
				return true
			}
		}
		f.cost += frameCost(frame)
	}
	return false
}

// beginRound prepares for the next round over all sessions. It is not ok when none is needed.
func (f *follower) beginRound(frames []*Frame) (ok bool) {
	if f.unseen(frames) {
		return false
	}
	f.served, f.at = f.worker.scratch.cache.head, f.worker.clock.Load() // what comes now is of the next round
	f.looked, f.cost, f.last = f.served, 0, nil
	clear(f.views)
	return true
}

// worker owns the writes of its sessions. Who has its turn acts for it: its goroutine, or one that has something
// for a session while the worker does nothing, which spares waking it.
type worker struct {
	core   *Core
	signal chan struct{}
	turn   turn // taken before mu

	mu      sync.Mutex
	posted  []func()
	ready   []*Session
	rounds  []*follower
	stopped bool // nothing runs or is written any more

	// Owned by who has the turn.
	scratch scratch
	tidying bool // tidy will be called

	deliveries, writes, bytes, overruns atomic.Uint64
	parked, catchingUp                  atomic.Int64
	clock                               atomic.Int64 // Unix milliseconds at the start of the present turn
}

func (w *worker) poke() {
	select {
	case w.signal <- struct{}{}:
	default:
	}
}

// turn is a lock that can be waited for as synctest wants it.
type turn chan struct{}

func (t turn) lock()   { t <- struct{}{} }
func (t turn) unlock() { <-t }

func (t turn) tryLock() (ok bool) {
	select {
	case t <- struct{}{}:
		return true
	default:
		return false
	}
}

// take takes the worker's turn if nobody has it and nothing waits for it.
func (w *worker) take() (ok bool) {
	if !w.turn.tryLock() {
		return false
	}
	w.mu.Lock()
	ok = len(w.posted) == 0 && !w.stopped
	w.mu.Unlock()
	if !ok {
		w.turn.unlock()
		return false
	}
	w.begin(nil)
	return true
}

// begin begins a turn that has been taken, and serves a stream or none.
func (w *worker) begin(stream *Stream) {
	w.clock.Store(w.core.now().UnixMilli())
	w.scratch.cache.begin(stream)
}

// end ends the turn.
func (w *worker) end() {
	if w.scratch.cache.used && !w.tidying {
		w.tidying = true
		time.AfterFunc(cacheTime, w.tidy)
	}
	w.turn.unlock()
}

// tidy throws away what the worker has built, unless that has been used since the last time.
func (w *worker) tidy() {
	w.turn.lock()
	defer w.turn.unlock()
	if w.tidying = w.scratch.cache.used; w.tidying {
		w.scratch.cache.used = false
		time.AfterFunc(cacheTime, w.tidy)
		return
	}
	w.scratch = scratch{cache: newCache()} // with all the room that a burst has taken
}

// post has f run in a turn of the worker, in the order of the calls, unless the worker has ended.
func (w *worker) post(f func()) (ok bool) {
	if w.take() {
		defer w.end()
		f()
		return true
	}
	w.mu.Lock()
	if w.stopped {
		w.mu.Unlock()
		return false
	}
	w.posted = append(w.posted, f)
	w.mu.Unlock()
	w.poke()
	return true
}

// stop ends the worker, once what was posted has run.
func (w *worker) stop() {
	w.turn.lock()
	defer w.end()
	w.mu.Lock()
	w.stopped = true
	posted := w.posted
	w.mu.Unlock()
	for _, f := range posted {
		f()
	}
}

// wake says that there are frames for the follower's sessions.
func (f *follower) wake() {
	w := f.worker
	w.mu.Lock()
	f.pending = true
	if !f.queued {
		f.queued = true
		w.rounds = append(w.rounds, f)
	}
	w.mu.Unlock()
	w.poke()
}

// schedule has the session flushed, now or soon.
func (w *worker) schedule(s *Session) {
	if w.take() {
		defer w.end()
		w.flush(s)
		return
	}
	if !s.scheduled.CompareAndSwap(false, true) {
		return
	}
	w.mu.Lock()
	w.ready = append(w.ready, s)
	w.mu.Unlock()
	w.poke()
}

func (w *worker) run() {
	var posted []func()
	var ready []*Session
	for {
		clear(posted)
		clear(ready)
		w.turn.lock()
		w.mu.Lock()
		posted, w.posted = w.posted, posted[:0]
		ready, w.ready = w.ready, ready[:0]
		var round *follower
		var stream *Stream
		if len(w.rounds) > 0 {
			round = w.rounds[0]
			stream = round.stream
			w.rounds = slices.Delete(w.rounds, 0, 1)
			if round.next == 0 {
				round.pending = false
			}
		}
		w.mu.Unlock()

		w.begin(stream)
		for _, f := range posted {
			f()
		}
		for _, s := range ready {
			s.scheduled.Store(false)
			w.flush(s)
		}
		if round != nil {
			w.serve(round)
		}
		w.end()
		if round != nil || len(posted) > 0 || len(ready) > 0 {
			continue
		}
		select {
		case <-w.signal:
		case <-w.core.stopped:
			w.stop()
			return
		}
	}
}

// serve gives the follower's sessions one quantum, and queues it again behind the others while there is more to do.
func (w *worker) serve(f *follower) {
	if f.next == 0 && !f.beginRound(w.scratch.frames[:]) {
		f.next = len(f.sessions)
	}
	for range quantum {
		if f.next >= len(f.sessions) {
			break
		}
		s := f.sessions[f.next]
		f.next++
		w.flush(s)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if f.next >= len(f.sessions) {
		f.next = 0
		f.queued = f.pending
	}
	if f.queued {
		w.rounds = append(w.rounds, f)
	}
}

// flush brings a session up to date.
func (w *worker) flush(s *Session) {
	if s.finished.Load() {
		return
	}
	w.write(s)
	if s.follower != nil && !s.parked {
		s.follower.note(s)
	}
}

// write writes to a session what there is for it, until its socket would block. One that takes
// much goes on in the next turn.
func (w *worker) write(s *Session) {
	if s.parked {
		if s.overrun() { // nobody else looks: its goroutine waits for the socket
			s.cutOverrun()
		}
		return
	}
	for range maxWrites {
		c, err := s.next(&w.scratch)
		if errors.Is(err, errBehind) {
			w.park(s)
			return
		}
		if err != nil {
			s.fail(err)
			return
		}
		if len(c.bytes) == 0 {
			s.settle()
			return
		}
		n, again, err := s.socket.write(c.bytes)
		if n > 0 {
			s.advance(c, n)
		}
		switch {
		case err != nil:
			s.fail(err)
			return
		case again:
			w.park(s)
			return
		case c.span != nil && c.span.atHead && s.replay == nil:
			return // whatever came meanwhile has the session flushed again
		}
	}
	w.schedule(s)
}

// park leaves the session to a goroutine until its socket has taken everything there is, from the
// history too.
func (w *worker) park(s *Session) {
	s.parked = true
	w.parked.Add(1)
	go func() {
		err := s.drain()
		overrun, unread := errors.Is(err, errOverrun), errors.Is(err, errUnread)
		if err != nil && !overrun && !unread {
			s.End(err)
		}
		w.post(func() {
			s.parked = false
			w.parked.Add(-1)
			if s.begin != nil {
				s.begin()
				s.begin = nil
			}
			switch {
			case overrun:
				s.cutOverrun()
			case unread:
				s.cut(err)
			}
			w.flush(s)
		})
	}()
}
