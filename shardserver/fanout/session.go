package fanout

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// maxJoined bounds the messages of Send that one write carries.
	maxJoined = 16 << 10
	// maxUrgent bounds the bytes of Send that wait for the socket.
	maxUrgent = 4 << 20
	// closeTimeout is how long a session has to take its last messages, and its peer to close.
	closeTimeout = 3 * time.Second
	// lingerTime is how long a peer has to close that is told that it may.
	lingerTime = time.Second
	// idleNoop is the share of what can be replayed after which a session that got nothing is sent a no-op.
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
	errUnread  = errors.New("fanout: the history cannot be read")
	errBehind  = errors.New("fanout: session is to go on from the history")
	errUrgent  = errors.New("fanout: session does not take its messages")
)

// Session is a socket, and the cursor on the stream that it follows.
//
// Invariants:
//   - one goroutine at a time writes to the socket: the one that has the worker's turn, or while
//     the session is parked, the one that waits for the socket;
//   - messages of Send go out whole, in order, between frames of the stream;
//   - frames of the stream go out whole, in order, each that the view picks once;
//   - the cursor is at a frame boundary: of a frame that was begun, rest is what is left;
//   - view is that at the cursor, and seq the number of the last frame before it, from where the
//     history goes on when the stream does not keep the frame at pos any more;
//   - behind the message of Close nothing goes out.
type Session struct {
	// What each delivery reads comes first, in two cache lines. In front, what anybody may look at.
	finished  atomic.Bool
	waiting   atomic.Bool // urgent is not empty, or closing is set
	scheduled atomic.Bool // in worker.ready
	parked    bool        // owned by the worker
	worker    *worker
	socket    socket
	// Owned by whoever writes.
	stream *Stream       // nil until the session follows one
	pos    uint64        // cursor: position of the next frame; 0: behind seq in the history
	view   View          // nil: it cannot go on
	seq    atomic.Uint64 // read by the worker at any time
	owner  uint64
	replay *replay // nil: it has ended, or there was none
	rest   []byte

	skipped   int64  // cost of the frames passed since the last one written
	writtenAt int64  // when that was, Unix milliseconds
	block     *block // of the history, while reading
	reading   bool   // the session is one of the core's readers

	following atomic.Bool // Follow has been called
	ended     func(cause error)

	mu          sync.Mutex
	urgent      [][]byte
	urgentBytes int
	closing     bool // urgent ends with the last message
	hangUp      bool // behind the last message the stream of bytes ends

	// Owned by the worker.
	follower *follower
	index    int    // in the follower's sessions
	begin    func() // shows the stream to the writer, once the session is not parked any more

	_ [8]byte // to a multiple of a cache line: no session begins within another's
}

// replay is what a session missed and is yet to be sent.
type replay struct {
	end []byte // the message that ends it
	at  uint64 // its position
	seq uint64 // the number that it comes behind
}

// NewSession makes a session of a connection, which it owns from now on for writing and closing.
// When the session has ended, ended is called in a goroutine of its own, with the cause: nil after Close.
func (c *Core) NewSession(conn net.Conn, ended func(cause error)) *Session {
	return &Session{worker: c.nextWorker(), socket: newSocket(conn), ended: ended}
}

// Open writes a session's first bytes, in the caller's goroutine as far as the socket takes them at once.
// Nobody else has the session yet.
func (s *Session) Open(first []byte) {
	if len(first) == 0 {
		return
	}
	n, _, err := s.socket.write(first)
	s.worker.writes.Add(1)
	s.worker.bytes.Add(uint64(n))
	switch {
	case err != nil:
		s.End(err)
	case n < len(first):
		s.Send(first[n:])
	}
}

// Start says where and how a session follows a stream.
type Start struct {
	// View is the session's at the stream's head.
	View View
	// Owner is whom personal frames are for; 0: nobody.
	Owner uint64
	// Seq is the number to go on behind. Where the stream's window does not hold all behind it, the
	// view there is that at the window's beginning: turns further back are the caller's concern.
	Seq uint64
	// Replayed makes the message that tells the session, with the number that the stream has now,
	// that everything before it has been sent; nil: none.
	Replayed func(seq uint64) []byte
}

// Follow has the session receive the stream's frames behind number start.Seq. The caller keeps
// others from publishing what turns the session's view meanwhile.
func (s *Session) Follow(stream *Stream, start Start) error {
	if !s.following.CompareAndSwap(false, true) {
		return ErrFollowing
	}
	stream.mu.RLock()
	pos, ok := stream.seek(start.Seq)
	head, last := stream.first+uint64(len(stream.frames)), stream.last
	view := stream.viewAt(max(pos, stream.first), start.Owner, start.View)
	stream.mu.RUnlock()
	if view == nil || start.Seq > last || !ok && stream.lacks(start.Seq) {
		s.following.Store(false)
		return ErrDropped
	}
	var missed *replay
	if start.Replayed != nil {
		missed = &replay{end: start.Replayed(last), at: head, seq: last}
	}
	sub := stream.subs[0]
	for _, f := range stream.subs {
		if f.worker == s.worker {
			sub = f
		}
	}
	begin := func() {
		s.stream, s.owner, s.view, s.pos = stream, start.Owner, view, pos
		s.replay = missed
		s.writtenAt = s.worker.clock.Load()
	}
	s.worker.post(func() {
		if s.finished.Load() {
			return
		}
		s.follower, s.index = sub, len(sub.sessions)
		sub.sessions = append(sub.sessions, s)
		s.seq.Store(start.Seq)
		if s.parked { // another goroutine writes, and must not see the stream come up
			s.begin = begin
			return
		}
		begin()
		if c := s.worker.scratch.cache; c.stream == nil {
			c.begin(stream)
		}
		s.worker.flush(s)
	})
	return nil
}

// Send sends messages of the session's own, ahead of the stream's frames that are not yet
// written, and of all that are published afterwards. They may come in parts, which sessions can
// share; parts must not be changed afterwards.
func (s *Session) Send(parts ...[]byte) {
	if s.Prepare(parts...) {
		s.worker.schedule(s)
	}
}

// Prepare is Send, but for what is written together with what comes next: that of another Send, or of Follow.
// It is not ok when the session has ended.
func (s *Session) Prepare(parts ...[]byte) (ok bool) {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return false
	}
	for _, part := range parts {
		if len(part) > 0 {
			s.urgent = append(s.urgent, part)
			s.urgentBytes += len(part)
		}
	}
	s.waiting.Store(true)
	full := s.urgentBytes > maxUrgent
	s.mu.Unlock()
	if full {
		s.End(errUrgent)
	}
	return !full
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
	s.waiting.Store(true)
	s.mu.Unlock()
	s.worker.schedule(s)
	time.AfterFunc(closeTimeout, func() { s.End(nil) })
}

// End closes the socket without another word. The first cause counts.
func (s *Session) End(cause error) {
	if !s.finished.CompareAndSwap(false, true) {
		return
	}
	s.mu.Lock()
	s.closing, s.urgent = true, nil
	s.waiting.Store(true)
	s.mu.Unlock()
	if !s.worker.post(s.leave) {
		s.socket.close()
	}
	go s.ended(cause)
}

// leave closes the socket, and takes the session out of its follower.
func (s *Session) leave() {
	s.socket.close()
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
	return s.follower.stream.lacks(s.seq.Load())
}

// cutOverrun ends a session that has fallen behind.
func (s *Session) cutOverrun() {
	if !s.finished.Load() {
		s.worker.overruns.Add(1)
		s.cut(errOverrun)
	}
}

// cut ends a session that cannot be brought up to date: with a message, if it stands between frames.
func (s *Session) cut(cause error) {
	if s.finished.Load() {
		return
	}
	if s.parked || len(s.rest) > 0 || s.worker.core.overrun == nil {
		s.End(cause)
		return
	}
	s.Close(s.worker.core.overrun())
}

// chunk is the next bytes of a session: the rest of a frame, those of a span and perhaps of what ends the
// replay behind it, or else messages of Send.
type chunk struct {
	bytes []byte
	rest  bool
	span  *span
}

// next finds what the session is to be sent. Whoever writes calls it, and advance with what
// was written.
func (s *Session) next(b *scratch) (chunk, error) {
	if len(s.rest) > 0 {
		return chunk{bytes: s.rest, rest: true}, nil
	}
	if c, ok := s.nextUrgent(b); ok {
		return c, nil
	}
	if s.stream == nil {
		return chunk{}, nil
	}
	for {
		if s.replayed() {
			wire := s.replay.end
			s.replay = nil
			return s.sendFirst(wire), nil
		}
		if s.view == nil {
			return chunk{}, errOverrun
		}
		sp, err := b.span(s)
		switch {
		case err != nil:
			return chunk{}, err
		case sp == nil && s.replayed():
			continue
		case sp == nil:
			return chunk{}, nil
		case len(sp.bytes) > 0:
			// What was sent before the span's frames were published comes before them.
			c, ok := s.nextUrgent(b)
			if ok {
				return c, nil
			}
			c = chunk{bytes: sp.bytes, span: sp}
			if s.replay != nil && sp.to > 0 && sp.to == s.replay.at && len(sp.bytes) <= maxJoined {
				b.joined = append(append(b.joined[:0], sp.bytes...), s.replay.end...)
				c.bytes = b.joined
			}
			return c, nil
		}
		s.passed(sp, s.skipped+sp.skipped)
		if sp.atHead {
			if wire := s.idle(); wire != nil {
				return s.sendFirst(wire), nil
			}
		}
	}
}

// passed moves the cursor behind a span.
func (s *Session) passed(sp *span, skipped int64) {
	s.pos, s.view, s.skipped = sp.to, sp.behind, skipped
	s.seq.Store(sp.seq)
}

// replayed says whether the session has got all of its replay but the end.
func (s *Session) replayed() bool { return s.replay != nil && s.pos >= s.replay.at }

// older returns the frames behind the cursor that the block of the history has, as far as the stream
// does not keep them and as they belong to the replay.
func (s *Session) older() []*Frame {
	frames := s.stream.upTo(s.block.behind(s.seq.Load()))
	if s.replay == nil {
		return frames
	}
	for i, f := range frames {
		if f.Seq > s.replay.seq {
			if i == 0 {
				s.replay.at = 0 // now
			}
			return frames[:i]
		}
	}
	return frames
}

// nextUrgent returns the messages of Send that come next, small ones together. It is empty, and ok,
// when there is to be nothing any more.
func (s *Session) nextUrgent(b *scratch) (c chunk, ok bool) {
	if !s.waiting.Load() {
		return c, false
	}
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
		s.waiting.Store(s.closing)
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
	s.waiting.Store(true)
	return chunk{bytes: wire}
}

// replayEnd is where the session's replay ends, as far as the n frames from the cursor on are
// concerned; 0 when it is behind that. So it is the same for all sessions that replay all of them.
func (s *Session) replayEnd(n int) uint64 {
	if s.replay != nil && s.pos < s.replay.at {
		return min(s.replay.at, s.pos+uint64(n))
	}
	return 0
}

// idle returns a no-op message when the session has been sent nothing for a good part of what the stream keeps.
func (s *Session) idle() []byte {
	now := s.worker.clock.Load()
	if s.worker.core.noop == nil || s.skipped < s.stream.idleBytes.Load() && now-s.writtenAt < s.stream.idleTime.Load() {
		return nil
	}
	s.skipped, s.writtenAt = 0, now
	return s.worker.core.noop(s.seq.Load())
}

// advance moves the cursor by n bytes of c.
func (s *Session) advance(c chunk, n int) {
	w := s.worker
	w.writes.Add(1)
	w.bytes.Add(uint64(n))
	switch {
	case c.rest:
		if s.rest = s.rest[n:]; len(s.rest) == 0 {
			s.rest = nil
			w.deliveries.Add(1)
		}
		return
	case c.span == nil:
		s.mu.Lock()
		s.passUrgent(n)
		s.mu.Unlock()
		return
	}
	sp := c.span
	s.writtenAt = w.clock.Load()
	if over := n - len(sp.bytes); over >= 0 {
		w.deliveries.Add(uint64(len(sp.marks)))
		s.passed(sp, sp.skipped)
		switch {
		case over == 0:
		case over < len(s.replay.end):
			s.rest, s.replay = s.replay.end[over:], nil
		default:
			s.replay = nil
		}
		return
	}
	begun := 0 // the frame that was written in part, or none of
	for sp.marks[begun].end <= n {
		begun++
	}
	w.deliveries.Add(uint64(begun))
	start := 0
	if begun > 0 {
		start = sp.marks[begun-1].end
	}
	m := sp.marks[begun]
	if n > start {
		s.rest = m.wire[n-start:]
	} else {
		m = sp.marks[begun-1]
	}
	s.pos, s.skipped = m.pos, 0
	s.seq.Store(m.seq)
	if m.seq == sp.seq { // it turned the view, or nothing did
		s.view = sp.behind
	}
}

// settle runs on the worker when there is nothing left to write.
func (s *Session) settle() {
	if !s.waiting.Load() {
		return
	}
	s.mu.Lock()
	hangUp := s.hangUp
	s.hangUp = false
	s.mu.Unlock()
	if hangUp {
		s.socket.closeWrite()
		time.AfterFunc(lingerTime, func() { s.End(nil) })
	}
}

// drain writes, waiting for the socket and for the history, until there is nothing left.
func (s *Session) drain() error {
	err := s.wait()
	if !errors.Is(err, errBehind) {
		return err
	}
	blocks := &s.stream.blocks
	s.worker.catchingUp.Add(1)
	blocks.enter()
	defer func() {
		s.yield()
		blocks.leave()
		s.worker.catchingUp.Add(-1)
	}()
	for errors.Is(err, errBehind) {
		s.yield()
		s.worker.core.readers <- struct{}{}
		s.reading = true
		if s.finished.Load() {
			return net.ErrClosed
		}
		if s.block, err = blocks.read(s.seq.Load()); errors.Is(err, ErrDropped) {
			return errOverrun
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errUnread, err)
		}
		err = s.wait()
	}
	return err
}

// yield lets others read the history: a session that waits for its socket holds on to nothing of it.
func (s *Session) yield() {
	if s.reading {
		s.block, s.reading = nil, false
		<-s.worker.core.readers
	}
}

// wait writes, waiting for the socket, until there is nothing left or errBehind.
func (s *Session) wait() (err error) {
	if s.socket.fd == noFD {
		return s.waitBlocking()
	}
	raw, err := s.socket.conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	waitErr := raw.Write(func(fd uintptr) (done bool) {
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
				s.yield()
				return false
			}
		}
	})
	if err == nil {
		err = waitErr
	}
	return err
}

func (s *Session) waitBlocking() error {
	b := scratches.Get().(*scratch)
	defer b.release()
	for {
		c, err := s.next(b)
		if err != nil || len(c.bytes) == 0 {
			return err
		}
		s.yield()
		n, err := s.socket.conn.Write(c.bytes)
		if n > 0 {
			s.advance(c, n)
		}
		if err != nil {
			return err
		}
	}
}
