package fanout

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Messages of the tests are lines: "f <position> <padding>" is a frame of the stream, "m <text>"
// a message of Send; "replayed", "noop" with a number, "overrun" and "close" come from the core.

func line(format string, args ...any) []byte { return fmt.Appendf(nil, format+"\n", args...) }

func replayed(seq uint64) []byte { return line("replayed %d", seq) }
func noop(seq uint64) []byte     { return line("noop %d", seq) }
func overrun() []byte            { return line("overrun") }

var closing = line("close")

// topics is the view of the tests: a set of topics. A frame's tag is its topic. Bit 7 prefers a variant.
type topics uint8

const variant topics = 1 << 7

func (t topics) sees(f *Frame) bool { return t>>f.Tag.(int)&1 == 1 }

func (t topics) Pick(f *Frame) []byte {
	switch {
	case !t.sees(f):
		return nil
	case t&variant != 0 && len(f.Variants) > 0:
		return f.Variants[0]
	}
	return f.Wire
}

// flip is a turn that adds and takes topics.
type flip topics

func (t flip) Ahead(v View) View { return v.(topics) ^ topics(t) }
func (t flip) Back(v View) View  { return v.(topics) ^ topics(t) }

// model is all frames that a stream has ever had, and what follows from them. As a History it
// makes those behind number forgotten anew, a few at a time.
type model struct {
	mu        sync.Mutex
	frames    []*Frame
	complete  int // how many of them are as they will be; 0: all
	forgotten uint64
	block     int
	reads     int

	unreadable error // of Frames
}

func (m *model) Kept(after uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return after >= m.forgotten
}

func (m *model) Frames(after uint64) (list []*Frame, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	if m.unreadable != nil {
		return nil, m.unreadable
	}
	if after < m.forgotten {
		return nil, ErrDropped
	}
	frames := m.frames
	if m.complete > 0 {
		frames = frames[:m.complete]
	}
	for _, f := range frames {
		if f.Seq > after && !f.Volatile && len(list) < max(m.block, 1) {
			again := *f
			again.Wire = bytes.Clone(f.Wire)
			list = append(list, &again)
		}
	}
	return list, nil
}

// frame makes the next frame; pad is the length of its padding. Those in only are whom it is for.
func (m *model) frame(seq uint64, topic, pad int, only ...uint64) *Frame {
	f := &Frame{Seq: seq, Tag: topic, Wire: line("f %d %s", len(m.frames), strings.Repeat("x", pad))}
	if only != nil {
		f.Personal, f.Wire = For(f.Wire, only...), nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frames = append(m.frames, f)
	return f
}

// publish publishes the newest frames, which the history has before the stream.
func (m *model) publish(stream *Stream, frames ...*Frame) {
	m.mu.Lock()
	m.complete = len(m.frames)
	m.mu.Unlock()
	stream.Publish(frames...)
}

// personal adds what the newest frame has for an owner.
func (m *model) personal(f *Frame, owner uint64, text string, turn Turn) {
	p := Personal{Owner: owner, Turn: turn}
	if text != "" {
		p.Wire = line("p %d %s", len(m.frames)-1, text)
	}
	f.Personal = slices.DeleteFunc(f.Personal, func(p Personal) bool { return p.Owner == owner })
	f.Personal = append(f.Personal, p)
	slices.SortFunc(f.Personal, func(a, b Personal) int { return int(a.Owner) - int(b.Owner) })
}

func (m *model) last() uint64 {
	if len(m.frames) == 0 {
		return 0
	}
	return m.frames[len(m.frames)-1].end()
}

// turned is what frames from position from to before to do to an owner's view.
func (m *model) turned(owner uint64, from, to int) (by topics) {
	for _, f := range m.frames[from:to] {
		t := f.Turn
		for _, p := range f.Personal {
			if p.Owner == owner && p.Turn != nil {
				t = p.Turn
			}
		}
		if t != nil {
			by ^= topics(t.(flip))
		}
	}
	return by
}

// behind is the position of the first frame with a number above seq.
func (m *model) behind(seq uint64) int {
	i := slices.IndexFunc(m.frames, func(f *Frame) bool { return f.Seq > seq })
	if i < 0 {
		return len(m.frames)
	}
	return i
}

// client is what the model knows of a session.
type client struct {
	session   *Session
	outcome   outcome
	owner     uint64
	view      topics // where it started
	follows   bool
	from      int // position where it started
	replays   bool
	replay    int // position where its replay ended
	sent      []string
	closed    bool // Close has been called
	unlimited bool // takes all at once
	lags      bool // may miss volatile frames
}

// want is a message of the stream that a client is to get.
type want struct {
	pos      int
	text     string
	volatile bool
}

// wants are the messages of the stream that the client is to get.
func (c *client) wants(m *model) (list []want) {
	view := c.view
	for i := c.from; c.follows && i < len(m.frames); i++ {
		f := m.frames[i]
		behind := view ^ m.turned(c.owner, i, i+1)
		wire := f.Wire
		if wire != nil && behind&variant != 0 && f.Variants != nil {
			wire = f.Variants[0]
		}
		if wire != nil && !(view.sees(f) && behind.sees(f)) {
			wire = nil
		}
		for _, p := range f.Personal {
			if p.Owner == c.owner && (wire != nil || f.Wire == nil) {
				wire = p.Wire
			}
		}
		if wire != nil && !(f.Volatile && i < c.replay) {
			list = append(list, want{i, string(wire[:len(wire)-1]), f.Volatile})
		}
		view = behind
	}
	return list
}

// check compares what the client got with the model:
//   - messages are whole, but for the last one if the session has ended or not all was taken;
//   - frames of the stream are a beginning of what it wants, and all of it when complete, but for
//     volatile ones that it missed as it lagged;
//   - messages of Send likewise;
//   - replayed stands between the frames before and behind the end of the replay;
//   - whoever resumes from the number of a no-op misses nothing: no frame that is replayed has
//     a number up to that and comes later;
//   - behind close and overrun nothing comes.
//
// missing is the position of the first frame of which it has got nothing, -1 if there is none.
func (c *client) check(m *model, got []byte, complete bool) (missing int, err error) {
	wants, sent, replay, end := c.wants(m), c.sent, c.replays, false
	cut := bytes.LastIndexByte(got, '\n') + 1
	if complete && cut < len(got) {
		return -1, fmt.Errorf("cut message %q", got[cut:])
	}
	skip := func(until string) { // what it missed as it lagged
		for c.lags && len(wants) > 0 && wants[0].volatile && wants[0].text != until {
			wants = wants[1:]
		}
	}
	for l := range strings.SplitSeq(string(got[:cut]), "\n") {
		kind, text, _ := strings.Cut(l, " ")
		var number int
		fmt.Sscan(text, &number)
		if kind == "f" || kind == "v" || kind == "p" {
			skip(l)
		}
		switch {
		case l == "":
			continue
		case end:
			return -1, fmt.Errorf("%q behind the last message", l)
		case len(wants) > 0 && l == wants[0].text && !(replay && wants[0].pos >= c.replay):
			wants = wants[1:]
		case kind == "m" && len(sent) > 0 && l == sent[0]:
			sent = sent[1:]
		case kind == "replayed" && replay && (len(wants) == 0 || wants[0].pos >= c.replay):
			replay = false
		case kind == "noop" && uint64(number) <= m.last() && !slices.ContainsFunc(wants, func(w want) bool {
			return !w.volatile && m.frames[w.pos].Seq <= uint64(number)
		}):
		case kind == "close" && c.closed, kind == "overrun":
			end = true
		default:
			return -1, fmt.Errorf("got %q; it wants frames %v, messages %q, replayed %v", l, wants, sent, replay)
		}
	}
	if begun := string(got[cut:]); begun != "" && len(wants) > 0 && strings.ContainsAny(begun[:1], "fvp") {
		wants = wants[1:]
	}
	missing = -1
	if skip(""); len(wants) > 0 {
		missing = wants[0].pos
	}
	if complete && (len(wants) > 0 && !end || len(sent) > 0 && !end || replay && !end || c.closed && !end) {
		return missing, fmt.Errorf("frames %v, messages %q, replayed %v, close %v are missing", wants, sent, replay, c.closed)
	}
	return missing, nil
}
