package fanout

import (
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxJoined bounds the messages of Send that one write carries.
	maxJoined = 16 << 10
	// maxUrgent bounds the bytes of Send that wait for the socket.
	maxUrgent = 4 << 20
	// closeTimeout is how long a session has to take its last messages, and its peer to close.
	closeTimeout = 2 * time.Second
	// idleNoop is the share of a stream's retention after which a session that got nothing is sent a no-op.
	idleNoop = 8
	// maxWrites bounds the writes to a session before its worker looks after the others.
	maxWrites = 8
)

// Errors of sessions.
var (
	// ErrDropped: the number that a session wants to go on from is not within what the stream keeps.
	ErrDropped = errors.New("fanout: number not within what the stream keeps")
	// ErrFollowing: the session follows a stream already.
	ErrFollowing = errors.New("fanout: session follows a stream already")

	errOverrun = errors.New("fanout: session fell behind what the stream keeps")
	errUrgent  = errors.New("fanout: session does not take its messages")
)

// Session is a socket, and the cursor on the stream that it follows.
//
// Invariants:
//   - one goroutine at a time writes to the socket: the worker's, or while the session is
//     parked, the one that waits for the socket;
//   - messages of Send go out whole, in order, between frames of the stream;
//   - frames of the stream go out whole, in order, each admitted one once;
//   - behind the message of Close nothing goes out.
type Session struct {
	core   *Core
	worker *worker
	socket socket

	scheduled atomic.Bool // in worker.ready
	finished  atomic.Bool
	ended     func(cause error)

	mu          sync.Mutex
	urgent      [][]byte
	urgentBytes int
	closing     bool // urgent ends with the last message
	hangUp      bool // behind the last message the stream of bytes ends

	// Owned by whoever writes. pos is atomic for those who measure the lag.
	stream    *Stream // nil until the session follows one
	owner     uint64
	view      View
	pos       atomic.Uint64 // cursor: position of the next frame
	off       int           // bytes of the next admitted frame that are written already
	gate      bool
	insertAt  uint64 // where insert goes, and the end of the replay
	insert    []byte
	seq       uint64
	skipped   int64 // cost of the frames passed since the last one written
	writtenAt int64 // when that was, Unix milliseconds

	following atomic.Bool // Follow has been called

	// Owned by the worker.
	follower *follower
	index    int    // in the follower's sessions
	begin    func() // shows the stream to the writer, once the session is not parked any more
	parked   bool
}

// NewSession makes a session of a connection, which it owns from now on for writing and closing.
// When the session has ended, ended is called in a goroutine of its own, with the cause: nil after Close.
func (c *Core) NewSession(conn net.Conn, ended func(cause error)) *Session {
	return &Session{core: c, worker: c.nextWorker(), socket: newSocket(conn), ended: ended}
}

// Start says where and how a session follows a stream.
type Start struct {
	View View
	// Owner is whom addressed frames are for.
	Owner uint64
	// GateOpen is how the owner's gate stands at the stream's head. While it is closed, only addressed frames pass.
	GateOpen bool
	// Seq is the number to go on behind.
	Seq uint64
	// Replayed makes the message that tells the session, with the number that the stream has now,
	// that everything before it has been sent; nil: none.
	Replayed func(seq uint64) []byte
}

// Follow has the session receive the stream's frames behind number start.Seq. The caller keeps
// others from publishing addressed frames to the owner meanwhile.
func (s *Session) Follow(stream *Stream, start Start) error {
	if !s.following.CompareAndSwap(false, true) {
		return ErrFollowing
	}
	stream.mu.RLock()
	pos, ok := stream.seek(start.Seq)
	head, last := stream.first+uint64(len(stream.frames)), stream.last
	gate := start.GateOpen
	if ok {
		gate = stream.gateAt(pos, start.Owner, start.GateOpen)
	}
	stream.mu.RUnlock()
	if !ok {
		s.following.Store(false)
		return ErrDropped
	}
	var insert []byte
	if start.Replayed != nil {
		insert = start.Replayed(last)
	}
	sub := stream.subs[0]
	for _, f := range stream.subs {
		if f.worker == s.worker {
			sub = f
		}
	}
	begin := func() {
		s.stream, s.owner, s.view, s.gate = stream, start.Owner, start.View, gate
		s.seq = start.Seq
		if insert != nil {
			s.insertAt, s.insert = head, insert
		}
		s.writtenAt = s.worker.clock.Load()
	}
	s.worker.post(func() {
		if s.finished.Load() {
			return
		}
		s.follower, s.index = sub, len(sub.sessions)
		sub.sessions = append(sub.sessions, s)
		s.pos.Store(pos)
		if s.parked { // another goroutine writes, and must not see the stream come up
			s.begin = begin
			return
		}
		begin()
		s.worker.flush(s)
	})
	return nil
}

// Send sends messages of the session's own, ahead of the stream's frames that are not yet
// written, and of all that are published afterwards. They may come in parts, which sessions can
// share; parts must not be changed afterwards.
func (s *Session) Send(parts ...[]byte) {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return
	}
	for _, part := range parts {
		if len(part) > 0 {
			s.urgent = append(s.urgent, part)
			s.urgentBytes += len(part)
		}
	}
	full := s.urgentBytes > maxUrgent
	s.mu.Unlock()
	if full {
		s.End(errUrgent)
		return
	}
	s.worker.schedule(s)
}

// Close sends a last message. The peer has a short time to take it and to close from its side;
// then the session ends.
func (s *Session) Close(wire []byte) { s.close(wire, false) }

// CloseWrite sends a last message, unless Close has, and then no byte more, which tells the peer that
// it may close. It has a short time to.
func (s *Session) CloseWrite(wire []byte) { s.close(wire, true) }

func (s *Session) close(wire []byte, hangUp bool) {
	s.mu.Lock()
	if s.closing {
		s.hangUp = s.hangUp || hangUp
		s.mu.Unlock()
		s.worker.schedule(s)
		return
	}
	s.closing, s.hangUp = true, hangUp
	s.urgent = append(s.urgent, wire)
	s.mu.Unlock()
	s.socket.conn.SetWriteDeadline(time.Now().Add(closeTimeout))
	s.worker.schedule(s)
	time.AfterFunc(closeTimeout+time.Second, func() { s.End(nil) })
}

// End closes the socket at once. The first cause counts.
func (s *Session) End(cause error) {
	if !s.finished.CompareAndSwap(false, true) {
		return
	}
	s.mu.Lock()
	s.closing, s.urgent = true, nil
	s.mu.Unlock()
	s.socket.close()
	s.worker.post(s.leave)
	go s.ended(cause)
}

// leave takes the session out of its follower.
func (s *Session) leave() {
	f := s.follower
	if f == nil {
		return
	}
	last := len(f.sessions) - 1
	moved := f.sessions[last]
	f.sessions[s.index], moved.index = moved, s.index
	f.sessions[last] = nil
	f.sessions = f.sessions[:last]
	if moved != s && s.index < f.next { // it would miss the present round
		s.worker.schedule(moved)
	}
	s.follower = nil
}

func (s *Session) fail(err error) {
	if errors.Is(err, errOverrun) {
		s.cutOverrun()
		return
	}
	s.End(err)
}

func (s *Session) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// overrun tells whether the session can no longer be brought up to date. One that is closing
// has its time to take the last message.
func (s *Session) overrun() bool {
	if s.follower == nil || s.isClosing() {
		return false
	}
	stream := s.follower.stream
	stream.mu.RLock()
	defer stream.mu.RUnlock()
	return s.pos.Load() < stream.first
}

// cutOverrun ends a session that has fallen behind: with a message, if it stands between frames.
func (s *Session) cutOverrun() {
	if s.finished.Load() {
		return
	}
	s.worker.overruns.Add(1)
	if s.parked || s.off > 0 || s.core.overrun == nil {
		s.End(errOverrun)
		return
	}
	s.Close(s.core.overrun())
}

// chunk is the next bytes of a session.
type chunk struct {
	bytes []byte
	span  *span // nil: bytes are a message of its own
}

// next finds what the session is to be sent. Whoever writes calls it, and advance with what
// was written.
func (s *Session) next(b *scratch) (chunk, error) {
	if s.off == 0 {
		if c, ok := s.nextUrgent(b); ok {
			return c, nil
		}
	}
	if s.stream == nil {
		return chunk{}, nil
	}
	for {
		if s.insert != nil && s.pos.Load() == s.insertAt && s.off == 0 {
			wire := s.insert
			s.insert = nil
			return s.sendFirst(wire), nil
		}
		sp := b.find(s)
		if sp == nil {
			n, ok := s.stream.window(b.window[:], s.pos.Load())
			if !ok {
				return chunk{}, errOverrun
			}
			if n == 0 {
				return chunk{}, nil
			}
			sp = b.build(n, s)
		}
		if len(sp.bytes) > 0 {
			if s.off == 0 { // what was sent before the span's frames were published comes before them
				if c, ok := s.nextUrgent(b); ok {
					return c, nil
				}
			}
			return chunk{bytes: sp.bytes, span: sp}, nil
		}
		s.pos.Store(sp.to)
		s.gate, s.seq = sp.gateEnd, sp.seq
		s.skipped += sp.skipped
		if sp.whole {
			if wire := s.idle(); wire != nil {
				return s.sendFirst(wire), nil
			}
		}
	}
}

// nextUrgent returns the messages of Send that come next, small ones together. It is empty, and ok,
// when there is to be nothing any more.
func (s *Session) nextUrgent(b *scratch) (c chunk, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.urgent) == 0:
		return c, s.closing
	case len(s.urgent) == 1 || len(s.urgent[0]) >= maxJoined:
		c.bytes = s.urgent[0]
		return c, true
	}
	b.joined = b.joined[:0]
	for _, part := range s.urgent {
		room := maxJoined - len(b.joined)
		if room == 0 {
			break
		}
		b.joined = append(b.joined, part[:min(len(part), room)]...)
	}
	c.bytes = b.joined
	return c, true
}

// passUrgent forgets the first n bytes of what Send gave. s.mu is held.
func (s *Session) passUrgent(n int) {
	s.urgentBytes -= n
	for len(s.urgent) > 0 && n >= len(s.urgent[0]) {
		n -= len(s.urgent[0])
		s.urgent[0] = nil
		s.urgent = s.urgent[1:]
	}
	if len(s.urgent) == 0 {
		s.urgent = nil // an idle session holds on to nothing
		return
	}
	s.urgent[0] = s.urgent[0][n:]
}

// sendFirst puts a message of the core's own before those of Send. It is called between two
// messages, so none of them is written in part.
func (s *Session) sendFirst(wire []byte) chunk {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.urgent = slices.Insert(s.urgent, 0, wire)
	s.urgentBytes += len(wire)
	return chunk{bytes: wire}
}

// replayEnd is where the session's replay ends, 0 when it is behind that.
func (s *Session) replayEnd() uint64 {
	if s.pos.Load() < s.insertAt {
		return s.insertAt
	}
	return 0
}

// idle returns a no-op message when the session has been sent nothing for a good part of what the stream keeps.
func (s *Session) idle() []byte {
	now := s.worker.clock.Load()
	if s.core.noop == nil || !s.gate || s.skipped < s.stream.idleBytes.Load() && now-s.writtenAt < s.stream.idleTime.Load() {
		return nil
	}
	s.skipped, s.writtenAt = 0, now
	return s.core.noop(s.seq)
}

// advance moves the cursor by n bytes of c.
func (s *Session) advance(c chunk, n int) {
	w := s.worker
	w.writes.Add(1)
	w.bytes.Add(uint64(n))
	if c.span == nil {
		s.mu.Lock()
		s.passUrgent(n)
		s.mu.Unlock()
		return
	}
	sp := c.span
	s.writtenAt = w.clock.Load()
	if n == len(sp.bytes) {
		w.deliveries.Add(uint64(len(sp.marks)))
		s.pos.Store(sp.to)
		s.off, s.gate, s.seq = 0, sp.gateEnd, sp.seq
		s.skipped = sp.skipped
		return
	}
	written := 0
	for written < len(sp.marks) && sp.marks[written].end <= n {
		written++
	}
	if written == 0 {
		s.off += n
		return
	}
	w.deliveries.Add(uint64(written))
	m := sp.marks[written-1]
	s.pos.Store(m.pos)
	s.off, s.gate, s.skipped = n-m.end, m.gate, 0
}

// settle runs on the worker when there is nothing left to write.
func (s *Session) settle() {
	s.mu.Lock()
	hangUp := s.hangUp
	s.hangUp = false
	s.mu.Unlock()
	if hangUp {
		s.socket.closeWrite()
	}
}

// drain writes, waiting for the socket, until there is nothing left.
func (s *Session) drain() (err error) {
	if s.socket.raw == nil {
		return s.drainBlocking()
	}
	waitErr := s.socket.raw.Write(func(fd uintptr) (done bool) {
		b := scratches.Get().(*scratch) // not kept while the socket is waited for
		defer b.release()
		for {
			var c chunk
			if c, err = s.next(b); err != nil || len(c.bytes) == 0 {
				return true
			}
			n, again, writeErr := writeOnce(fd, c.bytes)
			if n > 0 {
				s.advance(c, n)
			}
			if writeErr != nil {
				err = writeErr
				return true
			}
			if again {
				return false
			}
		}
	})
	if err == nil {
		err = waitErr
	}
	return err
}

func (s *Session) drainBlocking() error {
	b := scratches.Get().(*scratch)
	defer b.release()
	for {
		c, err := s.next(b)
		if err != nil || len(c.bytes) == 0 {
			return err
		}
		n, err := s.socket.conn.Write(c.bytes)
		s.advance(c, n)
		if err != nil {
			return err
		}
	}
}
