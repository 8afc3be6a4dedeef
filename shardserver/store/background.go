package store

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// rest is how long background work pauses after it has come upon a corrupt table. Pebble itself would try
	// again at once, without end.
	rest = time.Minute
	// stallTime is how long writes may wait for background work that corrupt tables hold up.
	stallTime = 2 * rest
	// tellEvery is how often at most the log tells of a table that it is corrupt.
	tellEvery = time.Minute
)

// background is the work that Pebble does by itself: one compaction at a time, as is Pebble's own rule, and none for
// a while after one that came upon a corrupt table.
type background struct {
	db   pebble.DBForCompaction
	stop chan struct{} // closed as the store closes

	granting sync.Mutex // held during calls of db

	mu           sync.Mutex
	running      bool
	unregistered bool
	ended        error // of the last compaction that came upon a corrupt table
	tired        bool  // there is to be a pause behind the present one
	stall        *time.Timer
	told         map[string]time.Time // of which table
}

func newBackground() *background {
	return &background{stop: make(chan struct{}), told: map[string]time.Time{}}
}

var (
	_ pebble.CompactionScheduler   = (*background)(nil)
	_ pebble.CompactionGrantHandle = (*background)(nil)
)

// Register is called once, before all that follow.
func (w *background) Register(_ int, db pebble.DBForCompaction) { w.db = db }

// Unregister returns when db is not called any more.
func (w *background) Unregister() {
	w.mu.Lock()
	w.unregistered = true
	w.mu.Unlock()
	w.granting.Lock()
	defer w.granting.Unlock()
}

// TrySchedule says whether a compaction may begin. When it may not, Done will ask for it.
func (w *background) TrySchedule() (bool, pebble.CompactionGrantHandle) {
	return w.begin(), w
}

// Done is called when a compaction has ended, without locks of Pebble's.
func (w *background) Done() {
	w.mu.Lock()
	tired := w.tired
	w.tired = false
	w.mu.Unlock()
	if tired { // it counts as running until then
		time.AfterFunc(rest, w.next)
		return
	}
	w.next()
}

// next lets the next compaction begin, if there is one.
func (w *background) next() {
	w.granting.Lock()
	defer w.granting.Unlock()
	if w.free(); w.begin() {
		if waiting, _ := w.db.GetWaitingCompaction(); !waiting || !w.db.Schedule(w) {
			w.free()
		}
	}
}

func (w *background) begin() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.running || w.unregistered {
		return false
	}
	w.running = true
	return true
}

func (w *background) free() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running = false
}

// What follows is of no use here.

func (*background) Started()                                          {}
func (*background) MeasureCPU(pebble.CompactionGoroutineKind)         {}
func (*background) CumulativeStats(pebble.CompactionGrantHandleStats) {}
func (*background) UpdateGetAllowedWithoutPermission()                {}

// compacted is told of the end of a compaction. Pebble's lock is held.
func (w *background) compacted(err error) {
	if err != nil && pebble.IsCorruptionError(err) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.ended, w.tired = err, true
	}
}

// erred is told of an error of background work. The end of a compaction has been told before, and Pebble's lock
// is held; what else comes upon a corrupt table gathers statistics, without any lock, and waits here.
func (w *background) erred(err error) {
	if !pebble.IsCorruptionError(err) {
		return
	}
	w.mu.Lock()
	compaction := errors.Is(err, w.ended)
	w.mu.Unlock()
	if !compaction {
		select {
		case <-w.stop:
		case <-time.After(rest):
		}
	}
}

// stalled is told that writes wait, until resumed. fail is called when they do for long, and a corrupt table
// can be why. Pebble's lock is held.
func (w *background) stalled(fail func(error)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stall = time.AfterFunc(stallTime, func() {
		w.mu.Lock()
		err := w.ended
		w.mu.Unlock()
		if err != nil {
			fail(fmt.Errorf("%w: for %v writes have waited for background work, which comes upon a corrupt table: %w", ErrCorrupt, stallTime, err))
		}
	})
}

func (w *background) resumed() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stall != nil {
		w.stall.Stop()
	}
}

// tell says whether to tell of a corrupt table: it has not been done lately.
func (w *background) tell(table string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at, ok := w.told[table]; ok && time.Since(at) < tellEvery {
		return false
	}
	w.told[table] = time.Now()
	return true
}
