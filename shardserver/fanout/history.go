package fanout

import (
	"slices"
	"sync"
	"time"
)

const (
	// maxReaders bounds the sessions of a core that read history at the same time; the others wait.
	maxReaders = 8
	// maxBlocks bounds the blocks of history that a stream keeps while sessions catch up.
	maxBlocks = 8
	// blockNumbers is how far behind a block that is just being read another reader waits for it.
	blockNumbers = 256
	// blockTime is how long blocks outlive the last session that caught up: others may follow.
	blockTime = 5 * time.Second
)

// History makes frames anew that a stream does not keep any more.
type History interface {
	// Kept says whether it has every frame with a number above after. It does not wait.
	Kept(after uint64) bool
	// Frames returns frames with numbers above after, oldest first, at least one and not many, or
	// ErrDropped. They are as they were when published, without the volatile ones. It may wait:
	// it is called in goroutines of their own alone.
	Frames(after uint64) ([]*Frame, error)
}

// blocks are what sessions that catch up with a stream have read of its history last.
//
// Invariants: a block is read once, however many sessions wait for it; none is kept when nobody
// has caught up for blockTime.
type blocks struct {
	history History // nil: the stream has none

	mu      sync.Mutex
	readers int
	idle    *time.Timer // runs forget; nil: not set
	kept    []*block    // oldest first
}

// block is consecutive frames of a history. frames and err are set when done is closed.
type block struct {
	after  uint64 // number that they follow
	done   chan struct{}
	frames []*Frame
	err    error
}

// behind returns the block's frames with numbers above seq.
func (b *block) behind(seq uint64) []*Frame {
	if b == nil || seq < b.after {
		return nil
	}
	i, _ := slices.BinarySearchFunc(b.frames, seq, func(f *Frame, seq uint64) int {
		if f.Seq > seq {
			return 1
		}
		return -1
	})
	return b.frames[i:]
}

// enter counts a session that catches up, until leave.
func (b *blocks) enter() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.readers++
}

func (b *blocks) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.readers--
	if b.readers == 0 && b.idle == nil {
		b.idle = time.AfterFunc(blockTime, b.forget)
	}
}

func (b *blocks) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.idle = nil
	if b.readers == 0 {
		b.kept = nil
	}
}

// read returns a block with frames above number after.
func (b *blocks) read(after uint64) (*block, error) {
	for {
		b.mu.Lock()
		found := b.find(after)
		if found == nil {
			found = &block{after: after, done: make(chan struct{})}
			if len(b.kept) == maxBlocks {
				b.kept = slices.Delete(b.kept, 0, 1)
			}
			b.kept = append(b.kept, found)
			b.mu.Unlock()
			return found, b.load(found)
		}
		b.mu.Unlock()
		<-found.done
		if len(found.behind(after)) > 0 {
			return found, nil
		}
		// It failed, or ended too early: the next round does not find it.
	}
}

// find returns a block that has frames above number after, or may have once it is read. b.mu is held.
func (b *blocks) find(after uint64) *block {
	for _, candidate := range slices.Backward(b.kept) {
		select {
		case <-candidate.done:
			if len(candidate.behind(after)) > 0 {
				return candidate
			}
		default:
			if candidate.after <= after && after-candidate.after < blockNumbers {
				return candidate
			}
		}
	}
	return nil
}

func (b *blocks) load(into *block) error {
	into.frames, into.err = b.history.Frames(into.after)
	if into.err == nil && len(into.behind(into.after)) == 0 {
		into.err = ErrDropped // it would be read for ever
	}
	close(into.done)
	return into.err
}
