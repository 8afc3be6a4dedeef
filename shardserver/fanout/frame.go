package fanout

import (
	"cmp"
	"slices"
)

// Frame is one message of a stream, encoded once, as it goes over the socket.
// A Frame must not be changed once it is published.
//
// Invariant: what a session is sent of a frame, and the view that it has behind it, follow from
// the frame, the session's view and its owner alone (see show). So a replay is what was sent live.
type Frame struct {
	// Seq is the message's number. Along a stream numbers rise; a volatile frame repeats the one before it.
	Seq uint64
	// Reserved is how many numbers right behind Seq have no frame.
	Reserved uint64
	// Wire is the message as a complete frame of the socket's protocol. A frame without is for
	// the owners in Personal alone, whatever their view.
	Wire []byte
	// Variants are other bodies of the message, for views to pick.
	Variants [][]byte
	// Tag is what views decide by.
	Tag any
	// Personal is what some owners are sent instead of what their view picks, sorted by owner, each once.
	Personal []Personal
	// Turn changes the view of all sessions that pass the frame; nil: it stays.
	Turn Turn
	// Volatile frames are for sessions that are there now: a replay leaves them out. They turn nothing.
	Volatile bool
}

// end is the last of the frame's numbers.
func (f *Frame) end() uint64 { return f.Seq + f.Reserved }

// Personal is a frame as one owner's sessions see it.
type Personal struct {
	// Owner is not 0.
	Owner uint64
	// Wire is sent where the view picks something, and always where the frame has no Wire; nil: nothing is.
	Wire []byte
	// Turn takes the place of the frame's Turn, unless it is nil.
	Turn Turn
}

// For is one message for some owners, in the order that a frame's Personal has.
func For(wire []byte, owners ...uint64) []Personal {
	list := make([]Personal, 0, len(owners))
	for _, owner := range owners {
		list = append(list, Personal{Owner: owner, Wire: wire})
	}
	slices.SortFunc(list, func(a, b Personal) int { return cmp.Compare(a.Owner, b.Owner) })
	return slices.CompactFunc(list, func(a, b Personal) bool { return a.Owner == b.Owner })
}

// View says what of a stream a session sees. Sessions with the same View, compared with ==, share
// the work of building what they are sent, so views should be interned.
type View interface {
	// Pick returns what is sent of the frame: its Wire, one of its Variants, or nil for nothing.
	Pick(*Frame) []byte
}

// Turn is what a frame does to views. The frame itself is seen by those whose view picks it
// before and behind it, the frames that follow by the view behind.
//
// Invariant: both methods are pure, and Back undoes Ahead.
type Turn interface {
	// Ahead returns the view behind the frame of a session that comes to it with view v.
	// nil: the session is cut, as if it had fallen too far behind.
	Ahead(v View) View
	// Back returns the view before the frame of a session that has view v behind it.
	// nil: none can be replayed to from there.
	Back(v View) View
}

// personal returns what the frame has for an owner, or nil.
func (f *Frame) personal(owner uint64) *Personal {
	i, found := slices.BinarySearchFunc(f.Personal, owner, func(p Personal, owner uint64) int { return cmp.Compare(p.Owner, owner) })
	if !found {
		return nil
	}
	return &f.Personal[i]
}

// turn returns what the frame does to the view of an owner's sessions.
func (f *Frame) turn(p *Personal) Turn {
	if p != nil && p.Turn != nil {
		return p.Turn
	}
	return f.Turn
}

// show returns what a session with view v is sent of the frame, and its view behind it. p is what
// the frame has for the session's owner.
func (f *Frame) show(v View, p *Personal) (wire []byte, behind View) {
	behind = v
	if t := f.turn(p); t != nil {
		behind = t.Ahead(v)
	}
	if f.Wire == nil {
		if p != nil {
			wire = p.Wire
		}
		return wire, behind
	}
	wire = v.Pick(f)
	if behind != v && behind != nil && wire != nil {
		wire = behind.Pick(f)
	}
	if p != nil && wire != nil {
		wire = p.Wire
	}
	return wire, behind
}

// frameCost is what a frame counts for retention, with its index entry and header.
func frameCost(f *Frame) int64 {
	n := int64(len(f.Wire)) + 128
	for _, v := range f.Variants {
		n += int64(len(v)) + 24
	}
	var before []byte
	for i := range f.Personal {
		if wire := f.Personal[i].Wire; !same(wire, before) && !same(wire, f.Wire) {
			n += int64(len(wire))
			before = wire
		}
		n += 48
	}
	return n
}

// same tells whether two messages are the same bytes in memory.
func same(a, b []byte) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}
