package fanout

import (
	"slices"
	"sync"
	"time"
)

const (
	// maxSpan bounds the bytes of one write. A session further behind takes several.
	maxSpan = 64 << 10
	// maxWindow bounds the frames of one write.
	maxWindow = 256
	// maxCached bounds the bytes that a worker keeps of spans that it has built.
	maxCached = 4 << 20
	// maxIndex bounds the entries that an index keeps room for.
	maxIndex = 1024
	// cacheTime is how long a worker keeps what it has built and nobody uses: sessions that resume one after another
	// want the same.
	cacheTime = 200 * time.Millisecond
)

// extent is how many frames a window has whose first is at position from, in a stream that ends at
// end, and whether they are the last. One far behind stops where those of others begin, so that they are shared.
func extent(from, end uint64) (n int, atHead bool) {
	if end-from < maxWindow {
		return int(end - from), true
	}
	return int(maxWindow - from%maxWindow), false
}

// window is frames of a stream from a position on, as they were when it was made.
type window struct {
	stream *Stream
	from   uint64 // 0: they are from the history
	frames []*Frame
	atHead bool     // they were the stream's last
	owners []uint64 // who have something personal in them, sorted
}

// fill takes over the frames.
func (w *window) fill(stream *Stream, from uint64, frames []*Frame) {
	w.stream, w.from = stream, from
	w.frames, w.owners = append(w.frames[:0], frames...), w.owners[:0]
	for _, f := range frames {
		for i := range f.Personal {
			w.owners = append(w.owners, f.Personal[i].Owner)
		}
	}
	slices.Sort(w.owners)
	w.owners = slices.Compact(w.owners)
}

// personal tells whether some of the frames are not for the owner as for others.
func (w *window) personal(owner uint64) bool {
	if len(w.owners) == 0 {
		return false
	}
	_, found := slices.BinarySearch(w.owners, owner)
	return found
}

// span is what a session with a certain view is sent of a window. It ends where the view turns.
type span struct {
	window *window
	view   View
	until  uint64 // where the replay ends that it is part of, 0: none

	*text
	to      uint64 // position behind the last frame looked at; 0 in the history
	seq     uint64 // number of the last frame looked at
	behind  View   // the view there
	skipped int64  // cost of the frames behind the last mark, which the view did not pick
	atHead  bool   // it ended where the stream ended
}

// text is the bytes of a span. Spans of different views share it where the views pick the same.
//
// Invariant: the bytes of one frame are the frame's own; only those of several are copied.
type text struct {
	bytes  []byte
	marks  []mark // of the frames in bytes
	copied []byte // what bytes are, unless they are a frame's
	next   *text  // of the same hash
}

// mark is the end of a frame within a text.
type mark struct {
	end  int    // offset in bytes
	pos  uint64 // position behind the frame; 0 in the history
	seq  uint64 // its number
	wire []byte
}

// look goes through the window for a session: it appends marks for what the session is sent, and sets
// where that ends.
func (sp *span) look(marks []mark, w *window, view View, owner, until uint64) []mark {
	sp.window, sp.view, sp.until = w, view, until
	sp.behind, sp.to, sp.skipped = view, w.from, 0
	end, looked := 0, 0
	for _, f := range w.frames {
		if until > 0 && sp.to == until || sp.behind != view {
			break
		}
		var p *Personal
		if owner != 0 && len(f.Personal) > 0 {
			p = f.personal(owner)
		}
		var wire []byte
		behind := view
		if !(until > 0 && f.Volatile) {
			wire, behind = f.show(view, p)
		}
		if end > 0 && end+len(wire) > maxSpan {
			break
		}
		looked++
		if w.from > 0 {
			sp.to++
		}
		sp.seq, sp.behind = f.end(), behind
		if len(wire) == 0 {
			sp.skipped += frameCost(f)
			continue
		}
		end += len(wire)
		marks = append(marks, mark{end: end, pos: sp.to, seq: f.end(), wire: wire})
		sp.skipped = 0
	}
	sp.atHead = w.atHead && looked == len(w.frames)
	return marks
}

// write makes the text of these marks.
func (t *text) write(marks []mark) {
	t.marks = append(t.marks[:0], marks...)
	t.bytes, t.copied = nil, t.copied[:0]
	switch len(marks) {
	case 0:
	case 1:
		t.bytes = marks[0].wire
	default:
		for i := range marks {
			t.copied = append(t.copied, marks[i].wire...)
		}
		t.bytes = t.copied
	}
}

// is tells whether the text has these marks: the same messages of the same frames.
func (t *text) is(marks []mark) bool {
	return slices.EqualFunc(t.marks, marks, func(a, b mark) bool { return a.pos == b.pos && same(a.wire, b.wire) })
}

func hash(marks []mark) uint64 {
	h := uint64(14695981039346656037)
	for i := range marks {
		h = (h ^ marks[i].pos) * 1099511628211
		h = (h ^ uint64(len(marks[i].wire))) * 1099511628211
	}
	return h
}

type windowKey struct {
	stream *Stream
	from   uint64
	n      int
	atHead bool
}

type spanKey struct {
	window *window
	view   View
	until  uint64
}

// cache is the windows, spans and texts that a worker has built, for the sessions that they suit.
//
// Invariant: what is in the cache was right when it was made and stays so, as frames do not
// change. It has no window of the frames that were published later: windows are found by how many
// they have. head is no older than the worker's turn: sessions are brought up to there at least.
type cache struct {
	stream  *Stream // of the turn
	head    uint64  // its end
	size    int     // bytes
	used    bool    // since somebody looked
	last    *span
	windows map[windowKey]*window
	spans   map[spanKey]*span
	texts   map[uint64]*text

	pool struct {
		windows pool[window]
		spans   pool[span]
		texts   pool[text]
	}
}

func newCache() *cache {
	return &cache{windows: map[windowKey]*window{}, spans: map[spanKey]*span{}, texts: map[uint64]*text{}}
}

// pool hands out objects that are all given back at once.
type pool[T any] struct {
	all  []*T
	used int
}

func (p *pool[T]) get() *T {
	if p.used == len(p.all) {
		p.all = append(p.all, new(T))
	}
	p.used++
	return p.all[p.used-1]
}

// begin prepares for a turn that serves a stream, or none.
func (c *cache) begin(stream *Stream) {
	c.stream = stream
	if stream != nil {
		c.head = stream.end()
	}
	if c.size > maxCached {
		c.reset()
	}
}

// reset empties the cache: it holds on to no stream and no frame.
func (c *cache) reset() {
	c.last = nil
	if len(c.windows) == 0 {
		return
	}
	windows, spans, texts := &c.pool.windows, &c.pool.spans, &c.pool.texts
	for _, w := range windows.all[:windows.used] {
		w.stream = nil
		clear(w.frames)
	}
	for _, sp := range spans.all[:spans.used] {
		*sp = span{}
	}
	room := 0
	for _, t := range texts.all[:texts.used] {
		clear(t.marks)
		t.bytes, t.next = nil, nil
		if room += cap(t.copied); room > 2*maxCached { // otherwise each text would grow to the largest there ever was
			t.copied = nil
		}
	}
	windows.used, spans.used, texts.used = 0, 0, 0
	c.windows, c.spans, c.texts = emptied(c.windows), emptied(c.spans), emptied(c.texts)
	c.size = 0
}

// emptied is the map without entries: another one if it has grown large, as clearing takes as long as it is large.
func emptied[K comparable, V any](m map[K]V) map[K]V {
	if len(m) > maxIndex {
		return map[K]V{}
	}
	clear(m)
	return m
}

// find returns the span for a session, or nil.
func (c *cache) find(s *Session) *span {
	if s.stream != c.stream {
		return nil
	}
	n, atHead := extent(s.pos, c.head)
	until := s.replayEnd(n)
	if sp := c.last; sp != nil && sp.view == s.view && sp.until == until && sp.window.is(s.stream, s.pos, n, atHead) {
		if sp.window.personal(s.owner) {
			return nil
		}
		c.used = true
		return sp
	}
	w := c.windows[windowKey{s.stream, s.pos, n, atHead}]
	if w == nil || w.personal(s.owner) {
		return nil
	}
	sp := c.spans[spanKey{w, s.view, until}]
	if sp != nil {
		c.last, c.used = sp, true
	}
	return sp
}

// is says whether the window has n frames of the stream from a position on.
func (w *window) is(stream *Stream, from uint64, n int, atHead bool) bool {
	return w.from == from && len(w.frames) == n && w.atHead == atHead && w.stream == stream
}

// window returns the window of these frames, from a position on.
func (c *cache) window(stream *Stream, from uint64, frames []*Frame, atHead bool) *window {
	key := windowKey{stream, from, len(frames), atHead}
	w := c.windows[key]
	c.used = true
	if w == nil {
		w = c.pool.windows.get()
		w.fill(stream, from, frames)
		w.atHead = atHead
		c.windows[key] = w
		c.size += 8*len(frames) + 8*len(w.owners) + 256
	}
	return w
}

// text returns the text of these marks.
func (c *cache) text(marks []mark) *text {
	h := hash(marks)
	for t := c.texts[h]; t != nil; t = t.next {
		if t.is(marks) {
			return t
		}
	}
	t := c.pool.texts.get()
	t.write(marks)
	t.next = c.texts[h]
	c.texts[h] = t
	c.size += len(t.copied) + 48*len(marks) + 256
	return t
}

// scratch is what spans are built with.
type scratch struct {
	cache  *cache // a worker's; nil: spans are for one session
	frames [maxWindow]*Frame
	marks  []mark
	own    struct { // for a session that no other one can share with
		window window
		span   span
		text   text
	}
	joined []byte // messages of Send
}

// scratches are those of the goroutines that write to a session.
var scratches = sync.Pool{New: func() any { return new(scratch) }}

// release gives a scratch of scratches back.
func (b *scratch) release() {
	b.forget()
	scratches.Put(b)
}

// forget lets go of streams and frames.
func (b *scratch) forget() {
	clear(b.frames[:])
	clear(b.marks[:cap(b.marks)])
	clear(b.own.text.marks)
	b.own.window, b.own.span, b.own.text.bytes = window{}, span{}, nil
}

// span returns what the session is to be sent next: nil if there is nothing, errBehind if the
// history has to be read first.
func (b *scratch) span(s *Session) (*span, error) {
	c := b.cache
	if c != nil {
		if s.stream == c.stream && s.pos >= c.head { // what is published meanwhile has a turn of its own
			return nil, nil
		}
		if sp := c.find(s); sp != nil {
			return sp, nil
		}
	}
	n, at, ok := s.stream.window(b.frames[:], s.pos, s.seq.Load())
	switch {
	case ok:
	case s.stream.blocks.history == nil:
		return nil, errOverrun
	default:
		if n = copy(b.frames[:], s.older()); n == 0 {
			return nil, errBehind
		}
	}
	s.pos = at
	if n == 0 || s.replayed() {
		return nil, nil
	}
	atHead := false
	if at > 0 {
		n, atHead = extent(at, at+uint64(n))
	}
	until := s.replayEnd(n)
	if c != nil && at > 0 {
		if c.size > maxCached {
			c.reset()
		}
		if w := c.window(s.stream, at, b.frames[:n], atHead); !w.personal(s.owner) {
			key := spanKey{w, s.view, until}
			sp := c.spans[key]
			if sp == nil {
				sp = c.pool.spans.get()
				b.marks = sp.look(b.marks[:0], w, s.view, 0, key.until)
				sp.text = c.text(b.marks)
				c.spans[key] = sp
				c.size += 256
			}
			c.last = sp
			return sp, nil
		}
	}
	own := &b.own
	own.window = window{stream: s.stream, from: at, frames: b.frames[:n], atHead: atHead}
	b.marks = own.span.look(b.marks[:0], &own.window, s.view, s.owner, until)
	own.text.write(b.marks)
	own.span.text = &own.text
	return &own.span, nil
}
