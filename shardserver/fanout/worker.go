package fanout

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
)

// quantum is the number of sessions that a worker serves of one stream before it looks after the others.
const quantum = 512

// follower is a stream's sessions on one worker.
type follower struct {
	stream   *Stream
	worker   *worker
	sessions []*Session // owned by the worker

	// guarded by worker.mu
	pending bool // frames were published after the present round began
	queued  bool // in worker.rounds, or being served

	next int // session to be served next in the present round; owned by the worker
}

// worker owns the writes of its sessions.
type worker struct {
	core   *Core
	signal chan struct{}

	mu      sync.Mutex
	posted  []func()
	ready   []*Session
	rounds  []*follower
	stopped bool // nothing runs or is written any more

	scratch scratch // owned by the goroutine

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

// post has f run by the worker's goroutine, unless that has ended.
func (w *worker) post(f func()) (ok bool) {
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

// schedule has the session flushed soon.
func (w *worker) schedule(s *Session) {
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
		w.mu.Lock()
		posted, w.posted = w.posted, posted[:0]
		ready, w.ready = w.ready, ready[:0]
		var round *follower
		if len(w.rounds) > 0 {
			round = w.rounds[0]
			w.rounds = slices.Delete(w.rounds, 0, 1)
			if round.next == 0 {
				round.pending = false
			}
		}
		w.mu.Unlock()

		w.clock.Store(w.core.now().UnixMilli())
		for _, f := range posted {
			f()
		}
		var stream *Stream
		if round != nil {
			stream = round.stream
		}
		w.scratch.cache.begin(stream)
		for _, s := range ready {
			s.scheduled.Store(false)
			w.flush(s)
		}
		if round != nil {
			w.serve(round)
			continue
		}
		if len(posted) == 0 && len(ready) == 0 {
			w.scratch.cache.reset()
			w.scratch.forget()
			select {
			case <-w.signal:
			case <-w.core.stopped:
				w.stop()
				return
			}
		}
	}
}

// serve gives the follower's sessions one quantum, and queues it again behind the others while there is more to do.
func (w *worker) serve(f *follower) {
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

// flush writes to a session what there is for it, until its socket would block. One that takes
// much goes on in the next turn.
func (w *worker) flush(s *Session) {
	if s.finished.Load() {
		return
	}
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
		case c.span != nil && c.span.atHead && s.insert == nil:
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
		overrun := errors.Is(err, errOverrun)
		if err != nil && !overrun {
			s.End(err)
		}
		w.post(func() {
			s.parked = false
			w.parked.Add(-1)
			if s.begin != nil {
				s.begin()
				s.begin = nil
			}
			if overrun {
				s.cutOverrun()
			}
			w.flush(s)
		})
	}()
}
