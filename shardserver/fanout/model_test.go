package fanout

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// Messages of the tests are lines: "f <position> <padding>" is a frame of the stream, "m <text>"
// a message of Send; "replayed", "noop" with a number, "overrun" and "close" come from the core.

func line(format string, args ...any) []byte { return fmt.Appendf(nil, format+"\n", args...) }

func replayed(seq uint64) []byte { return line("replayed %d", seq) }
func noop(seq uint64) []byte     { return line("noop %d", seq) }
func overrun() []byte            { return line("overrun") }

var closing = line("close")

// topics is the view of the tests: a set of topics. A frame's tag is its topic.
type topics uint8

func (t topics) Admits(f *Frame) bool { return t>>f.Tag.(int)&1 == 1 }

// model is all frames that a stream has ever had, and what follows from them.
type model struct {
	frames []*Frame
	gates  map[uint64]bool // how each owner's gate was before the first frame
}

// frame makes the next frame; pad is the length of its padding.
func (m *model) frame(seq uint64, topic, pad int, only ...uint64) *Frame {
	f := &Frame{Seq: seq, Tag: topic, Only: only, Wire: line("f %d %s", len(m.frames), strings.Repeat("x", pad))}
	m.frames = append(m.frames, f)
	return f
}

func (m *model) last() uint64 {
	if len(m.frames) == 0 {
		return 0
	}
	return m.frames[len(m.frames)-1].Seq
}

// gate is how the owner's gate stands behind the first n frames.
func (m *model) gate(owner uint64, n int) bool {
	open := m.gates[owner]
	for _, f := range m.frames[:n] {
		if f.Gate != LeaveGate && slices.Contains(f.Only, owner) {
			open = f.Gate == OpenGate
		}
	}
	return open
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
	view      topics
	follows   bool
	from      int // position where it started
	replays   bool
	replay    int // position where its replay ended
	sent      []string
	closed    bool // Close has been called
	unlimited bool // takes all at once
}

// wants are the positions of the frames that the client is to get.
func (c *client) wants(m *model) (list []int) {
	for i := c.from; c.follows && i < len(m.frames); i++ {
		f := m.frames[i]
		admitted := slices.Contains(f.Only, c.owner)
		if f.Only == nil {
			admitted = m.gate(c.owner, i) && c.view.Admits(f)
		}
		if admitted && !(f.Volatile && i < c.replay) {
			list = append(list, i)
		}
	}
	return list
}

// check compares what the client got with the model:
//   - messages are whole, but for the last one if the session has ended or not all was taken;
//   - frames of the stream are a beginning of what it wants, and all of it when complete;
//   - messages of Send likewise;
//   - replayed stands between the frames before and behind the end of the replay;
//   - whoever resumes from the number of a no-op misses nothing: no frame that is replayed has
//     a number up to that and comes later;
//   - behind close and overrun nothing comes.
//
// missing is the position of the first frame that it has not got, -1 if there is none.
func (c *client) check(m *model, got []byte, complete bool) (missing int, err error) {
	wants, sent, replay, end := c.wants(m), c.sent, c.replays, false
	cut := bytes.LastIndexByte(got, '\n') + 1
	if complete && cut < len(got) {
		return -1, fmt.Errorf("cut message %q", got[cut:])
	}
	for l := range strings.SplitSeq(string(got[:cut]), "\n") {
		kind, text, _ := strings.Cut(l, " ")
		var number int
		fmt.Sscan(text, &number)
		switch {
		case l == "":
			continue
		case end:
			return -1, fmt.Errorf("%q behind the last message", l)
		case kind == "f" && len(wants) > 0 && l+"\n" == string(m.frames[wants[0]].Wire) && !(replay && wants[0] >= c.replay):
			wants = wants[1:]
		case kind == "m" && len(sent) > 0 && l == sent[0]:
			sent = sent[1:]
		case kind == "replayed" && replay && (len(wants) == 0 || wants[0] >= c.replay):
			replay = false
		case kind == "noop" && uint64(number) <= m.last() && !slices.ContainsFunc(wants, func(i int) bool {
			return !m.frames[i].Volatile && m.frames[i].Seq <= uint64(number)
		}):
		case kind == "close" && c.closed, kind == "overrun":
			end = true
		default:
			return -1, fmt.Errorf("got %q; it wants frames %v, messages %q, replayed %v", l, wants, sent, replay)
		}
	}
	if len(wants) > 0 {
		missing = wants[0]
	} else {
		missing = -1
	}
	if complete && (len(wants) > 0 && !end || len(sent) > 0 && !end || replay && !end || c.closed && !end) {
		return missing, fmt.Errorf("frames %v, messages %q, replayed %v, close %v are missing", wants, sent, replay, c.closed)
	}
	return missing, nil
}
