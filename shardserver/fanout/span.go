package fanout

import (
	"slices"
	"sync"
)

// span is the bytes that a session with a certain view is sent from one position to another.
type span struct {
	stream *Stream
	view   View
	from   uint64
	gate   bool   // the gate at from
	until  uint64 // where the replay ends that it is part of, 0: none

	to      uint64 // position behind the last frame looked at
	bytes   []byte
	marks   []mark // of the frames in bytes
	skipped int64  // cost of the frames behind the last mark, which the view did not admit
	seq     uint64 // number of the last frame looked at
	gateEnd bool
	whole   bool     // it ended where the stream ended, so not between frames of one number
	private bool     // some frames are addressed to the session's owner: it is good for nobody else
	others  []uint64 // owners that other frames are addressed to: it is not good for them
}

// mark is the end of a frame within a span.
type mark struct {
	end  int    // offset in span.bytes
	pos  uint64 // position behind the frame
	gate bool   // the gate behind the frame
}

// build fills the span for a session that stands at from. Of a frame that is written in part
// it is just the rest, since messages of Send may come next.
func (sp *span) build(frames []*Frame, s *Session) {
	sp.stream, sp.view, sp.from, sp.gate, sp.until = s.stream, s.view, s.pos.Load(), s.gate, s.replayEnd()
	if cap(sp.bytes) > 2*maxSpan { // of a frame beyond all bounds
		sp.bytes = nil
	}
	sp.bytes, sp.marks, sp.others = sp.bytes[:0], sp.marks[:0], sp.others[:0]
	sp.skipped, sp.private = 0, false
	gate, pos := s.gate, sp.from
	for _, f := range frames {
		if sp.until > 0 && pos == sp.until || len(sp.bytes) > 0 && (s.off > 0 || len(sp.bytes)+len(f.Wire) > maxSpan) {
			break
		}
		pos++
		sp.seq = f.Seq
		admitted := false
		switch {
		case sp.until > 0 && f.Volatile:
		case f.Only == nil:
			admitted = gate && s.view.Admits(f)
		case f.addressedTo(s.owner):
			admitted, sp.private = true, true
		default:
			sp.others = append(sp.others, f.Only...)
		}
		if !admitted {
			sp.skipped += frameCost(f)
			continue
		}
		switch f.Gate {
		case OpenGate:
			gate = true
		case CloseGate:
			gate = false
		}
		wire := f.Wire
		if len(sp.marks) == 0 {
			wire = wire[s.off:]
		}
		sp.bytes = append(sp.bytes, wire...)
		sp.marks = append(sp.marks, mark{end: len(sp.bytes), pos: pos, gate: gate})
		sp.skipped = 0
	}
	sp.to, sp.gateEnd = pos, gate
	sp.whole = len(frames) < maxWindow && pos == sp.from+uint64(len(frames))
}

// suits tells whether the span is what the session, at a frame boundary, is to be sent.
func (sp *span) suits(s *Session) bool {
	return sp.from == s.pos.Load() && sp.stream == s.stream && sp.view == s.view && sp.gate == s.gate &&
		sp.until == s.replayEnd() && !slices.Contains(sp.others, s.owner)
}

// scratch is what spans are built with. A worker keeps those of a pass, for the sessions that they suit.
type scratch struct {
	keep   int // how many spans it keeps
	spans  []*span
	used   int
	own    span // for a session that no other one can share with
	window [maxWindow]*Frame
	joined []byte // messages of Send
}

// scratches are those of the goroutines that wait for a socket: they keep no span.
var scratches = sync.Pool{New: func() any { return new(scratch) }}

// release gives a scratch of scratches back.
func (b *scratch) release() {
	b.own.stream, b.own.view = nil, nil
	clear(b.window[:])
	scratches.Put(b)
}

// reset begins a pass.
func (b *scratch) reset() {
	for _, sp := range b.spans[:b.used] {
		sp.stream, sp.view = nil, nil // a stream that is closed is not held on to
	}
	b.used = 0
}

// find returns the span of this pass that suits the session, or nil.
func (b *scratch) find(s *Session) *span {
	if s.off > 0 {
		return nil
	}
	for _, sp := range b.spans[:b.used] {
		if sp.suits(s) {
			return sp
		}
	}
	return nil
}

// build makes a span of the first n frames of the window.
func (b *scratch) build(n int, s *Session) *span {
	if s.off > 0 || b.used == b.keep {
		b.own.build(b.window[:n], s)
		return &b.own
	}
	if b.used == len(b.spans) {
		b.spans = append(b.spans, &span{})
	}
	sp := b.spans[b.used]
	sp.build(b.window[:n], s)
	if !sp.private {
		b.used++
	}
	return sp
}
