// Package fanout delivers streams of frames to many sockets. A frame is stored once per
// stream; a session is a cursor on a stream, seen through a view, and has no queue of its
// own for what is published. The package knows frames, sockets, views and cursors, and
// nothing of what is in the frames.
//
// A view picks a body of each frame. A frame may turn views, at exactly its number, and may have
// something else for some owners: both stand in the frame, so that a replay is what was sent live.
//
// A session belongs to one worker, which owns all writes to its socket. While a worker does nothing, a goroutine that has
// something for a session takes its turn. A worker looks through
// the frames between a position and the head once per view, copies the bytes once for all views
// that pick the same, and writes them to every session of those views at that position. A
// socket that would block is parked: a goroutine waits until it is writable again and brings
// the session up to date, while the others go on.
//
// A stream keeps frames for a short time alone. A session further behind is brought up to date
// from the stream's history, which makes the frames anew, by a goroutine as if it were parked.
package fanout

import (
	"runtime"
	"sync/atomic"
	"time"
)

// Options of a Core.
type Options struct {
	// Workers is the number of workers; GOMAXPROCS when 0.
	Workers int
	// Noop makes a message with number seq and no meaning. It is sent to a session whose view
	// has let nothing through for long, so that the session's number stays within what is kept.
	Noop func(seq uint64) []byte
	// Overrun makes the last message of a session that fell behind what its stream keeps, or can read.
	Overrun func() []byte
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Core is a set of workers that serve streams. Make one with New.
type Core struct {
	workers []*worker
	noop    func(seq uint64) []byte
	overrun func() []byte
	now     func() time.Time
	turn    atomic.Uint32
	stopped chan struct{}
	readers chan struct{} // has one for each session that reads history
}

// Stats counts what a Core has done since its start.
type Stats struct {
	// Deliveries: frames written to sessions, without those of Session.Send.
	Deliveries uint64
	// Writes: write calls, and Bytes that they took.
	Writes, Bytes uint64
	// Parked: sessions whose socket does not take more now.
	Parked int64
	// CatchingUp: sessions that are brought up to date from the history.
	CatchingUp int64
	// Overruns: sessions closed since they fell behind what their stream keeps.
	Overruns uint64
}

// New starts a Core.
func New(o Options) *Core {
	c := &Core{noop: o.Noop, overrun: o.Overrun, now: o.Now, stopped: make(chan struct{}), readers: make(chan struct{}, maxReaders)}
	if c.now == nil {
		c.now = time.Now
	}
	n := o.Workers
	if n <= 0 {
		n = runtime.GOMAXPROCS(0)
	}
	for range n {
		w := &worker{core: c, signal: make(chan struct{}, 1), turn: make(turn, 1), scratch: scratch{cache: newCache()}}
		c.workers = append(c.workers, w)
		go w.run()
	}
	return c
}

// Stop ends the workers. Sessions must have been closed before: what was not yet written to them is lost.
func (c *Core) Stop() { close(c.stopped) }

// Stats returns the counters.
func (c *Core) Stats() (s Stats) {
	for _, w := range c.workers {
		s.Deliveries += w.deliveries.Load()
		s.Writes += w.writes.Load()
		s.Bytes += w.bytes.Load()
		s.Parked += w.parked.Load()
		s.CatchingUp += w.catchingUp.Load()
		s.Overruns += w.overruns.Load()
	}
	return s
}

func (c *Core) nextWorker() *worker {
	return c.workers[c.turn.Add(1)%uint32(len(c.workers))]
}
