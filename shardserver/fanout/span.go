package fanout

// span is the bytes that a session with a certain view is sent from one position to another.
type span struct {
	stream *Stream
	view   View
	from   uint64
	gate   bool // the gate at from
	replay bool

	to      uint64 // position behind the last frame looked at
	bytes   []byte
	marks   []mark // of the frames in bytes
	skipped int64  // cost of the frames behind the last mark, which the view did not admit
	seq     uint64 // number of the last frame looked at
	gateEnd bool
	special bool // some frames are addressed: the span is good for one owner only
}

// mark is the end of a frame within a span.
type mark struct {
	end  int    // offset in span.bytes
	pos  uint64 // position behind the frame
	gate bool   // the gate behind the frame
}

// build fills the span for a session that stands at from, off bytes into the next frame that it is to get.
func (sp *span) build(frames []*Frame, s *Session, off int) {
	sp.stream, sp.view, sp.from, sp.gate = s.stream, s.view, s.pos.Load(), s.gate
	sp.replay = sp.from < s.insertAt
	sp.bytes, sp.marks = sp.bytes[:0], sp.marks[:0]
	sp.skipped, sp.special = 0, false
	gate, pos := s.gate, sp.from
	for _, f := range frames {
		if sp.replay && pos == s.insertAt || len(sp.bytes) > 0 && len(sp.bytes)+len(f.Wire) > maxSpan {
			break
		}
		pos++
		sp.seq = f.Seq
		admitted := false
		switch {
		case sp.replay && f.Volatile:
		case f.Only != nil:
			sp.special = true
			admitted = f.addressedTo(s.owner)
		default:
			admitted = gate && s.view.Admits(f)
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
			wire = wire[off:]
		}
		sp.bytes = append(sp.bytes, wire...)
		sp.marks = append(sp.marks, mark{end: len(sp.bytes), pos: pos, gate: gate})
		sp.skipped = 0
	}
	sp.to, sp.gateEnd = pos, gate
}

// spanCache keeps the spans of one pass. Its zero value is empty.
type spanCache struct {
	spans []*span
	used  int
}

func (c *spanCache) reset() { c.used = 0 }

// find returns the span that suits the session at a frame boundary, or nil.
func (c *spanCache) find(s *Session) *span {
	pos := s.pos.Load()
	for _, sp := range c.spans[:c.used] {
		if sp.from == pos && sp.stream == s.stream && sp.view == s.view && sp.gate == s.gate && sp.replay == (pos < s.insertAt) {
			return sp
		}
	}
	return nil
}

// spare returns a span to be built, nil when the cache is full. It is kept by keep.
func (c *spanCache) spare() *span {
	if c.used == maxCached {
		return nil
	}
	if c.used == len(c.spans) {
		c.spans = append(c.spans, &span{})
	}
	return c.spans[c.used]
}

func (c *spanCache) keep() { c.used++ }
