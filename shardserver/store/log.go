package store

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"guildhall.dev/guildhall/shardserver/guildlog"
)

const (
	// maxRead bounds what Read returns, in bytes on disk, unless the first record alone is more.
	maxRead = 1 << 20
	// maxBlock is the size in bytes from which on a block gets no further records.
	maxBlock = 1 << 20
	// slack divides the retention's bounds: so much of them a block may take.
	slack = 16
)

// Log is a guild's log on disk, a guildlog.Log. Retention drops whole blocks of records, which take up to a
// sixteenth of the bounds and one record: so much sooner than they have to, records go for the bytes, and so
// much later for their age. It is applied when something is appended and when it is set.
//
// Invariants:
//   - Records with numbers behind dropped and up to last are on disk, synced, and each holds the end of the
//     one before it: the oldest kept that is dropped, the newest ends at last.
//   - Of these, the records of head.Newest have no summary on disk yet; all others belong to one
//     summary each, in order. The newest record is of head.Newest, so that it is never dropped.
//   - head.Bytes is the size of them all; head.OldestTo is To of the oldest summary, if there is one.
type Log struct {
	s  *Store
	id Identity

	// commit is held by the one who writes. It guards head and retention.
	commit    sync.Mutex
	head      head
	retention guildlog.Retention

	// mu guards what readers see. last follows head when a write is synced, dropped goes ahead of it:
	// who has got an iterator and then finds a record not dropped has it in the iterator.
	mu            sync.RWMutex
	last, dropped uint64
	ended         error
}

var _ guildlog.Log = (*Log)(nil)

func (s *Store) newLog(id Identity) *Log {
	return &Log{s: s, id: id, head: head{Log: id.Log}, retention: s.o.Retention}
}

// load reads the head and checks it against the records. It drops nothing: what retention the log is to have
// its opener may be about to say.
func (l *Log) load() error {
	value, closer, err := l.s.db.Get(l.key(tableHead))
	if err != nil {
		return fmt.Errorf("reading the head: %w", classify(err))
	}
	defer closer.Close()
	if err := decodeFixed(value, &l.head); err != nil {
		return fmt.Errorf("%w: the head: %w", ErrCorrupt, err)
	}
	if l.head.Log != l.id.Log {
		return fmt.Errorf("%w: the head is of log %s, the identity of %s", ErrCorrupt, l.head.Log, l.id.Log)
	}
	oldest, newest := uint64(0), uint64(0)
	if err := l.s.with(l.between(tableRecord, l.head.Dropped+1, ^uint64(0)-1), func(it *pebble.Iterator) error {
		if it.Last() {
			r, _, err := current(it)
			if err != nil {
				return err
			}
			newest = r.End()
		}
		if it.First() {
			_, prev, err := current(it)
			if err != nil {
				return err
			}
			oldest = prev
		}
		return nil
	}); err != nil {
		return err
	}
	if newest != l.head.Last || oldest != l.head.Dropped {
		return fmt.Errorf("%w: by the head records follow %d and end at %d, those on disk follow %d and end at %d",
			ErrCorrupt, l.head.Dropped, l.head.Last, oldest, newest)
	}
	l.publish(l.head)
	return nil
}

// current decodes the record that an iterator is at.
func current(it *pebble.Iterator) (guildlog.Record, uint64, error) {
	value, err := it.ValueAndErr()
	if err != nil {
		return guildlog.Record{}, 0, classify(err)
	}
	seq := lastNumber(it.Key())
	r, prev, err := guildlog.DecodeRecord(seq, value)
	if err != nil {
		return r, 0, fmt.Errorf("%w: record %d: %w", ErrCorrupt, seq, err)
	}
	return r, prev, nil
}

// publish makes a head that is on disk the current one. commit is held, or nobody has l yet.
func (l *Log) publish(h head) {
	l.head = h
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last, l.dropped = h.Last, h.Dropped
}

// end makes everything fail from now on.
func (l *Log) end() {
	l.commit.Lock()
	defer l.commit.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = fmt.Errorf("%w: log %s of guild %s was deleted", ErrLogMissing, l.id.Log, l.id.Guild)
}

// use is Store.enter for a log.
func (l *Log) use() error {
	if err := l.s.enter(); err != nil {
		return err
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.ended != nil {
		l.s.leave()
		return l.ended
	}
	return nil
}

// ID names the log.
func (l *Log) ID() guildlog.ID { return l.id.Log }

// Epoch counts the log's owners.
func (l *Log) Epoch() int64 { return l.id.Epoch }

// Last is the last number of the newest record.
func (l *Log) Last() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.last
}

// Resumable says whether every record after number seq is still kept.
func (l *Log) Resumable(seq uint64) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return seq >= l.dropped && seq <= l.last
}

// Room is Store.Room.
func (l *Log) Room() error { return l.s.Room() }

// Commit writes, and returns when everything is on disk. It fails with guildlog.ErrFull, ErrLogMissing, ErrClosed or
// for numbers that do not rise, and has written nothing then; or with guildlog.ErrFailed.
func (l *Log) Commit(c guildlog.Commit) error {
	if len(c.Records) == 0 && len(c.Keys) == 0 && len(c.State) == 0 {
		return nil
	}
	l.commit.Lock()
	defer l.commit.Unlock()
	if err := l.use(); err != nil {
		return err
	}
	defer l.s.leave()
	if err := l.s.room(l.s.o.Reserve/2, 2*reservePart); err != nil {
		l.drop() // so that a full disk does not stay so for ever
		return err
	}
	b := l.s.newBatch()
	h := l.head
	if err := l.stage(b, &h, c); err != nil {
		return err
	}
	if err := l.s.apply(b, pebble.Sync); err != nil {
		return err
	}
	l.publish(h)
	l.s.commits.Add(1)
	l.s.records.Add(uint64(len(c.Records)))
	l.drop()
	return nil
}

// stage puts a commit into a batch and its outcome into h.
func (l *Log) stage(b *pebble.Batch, h *head, c guildlog.Commit) error {
	before := h.Clock
	h.Clock = max(h.Clock, l.s.o.Now().UnixMilli())
	for i := range c.Records {
		r := &c.Records[i]
		if r.Seq <= h.Last || r.Seq < guildlog.First || r.End() < r.Seq {
			return fmt.Errorf("store: number %d, with %d reserved, does not follow %d", r.Seq, r.Reserved, h.Last)
		}
		if n := &h.Newest; n.Bytes > 0 && (n.Bytes >= min(maxBlock, l.retention.Bytes/slack) ||
			r.Time-n.From >= (l.retention.Age/slack).Milliseconds()) {
			set(b, l.numbered(tableBlock, n.End), encodeFixed(n))
			if h.Bytes == n.Bytes {
				h.OldestTo = n.To
			}
			*n = block{}
		}
		key, value := l.numbered(tableRecord, r.Seq), guildlog.EncodeRecord(r, h.Last)
		set(b, key, value)
		h.add(r, int64(len(key)+len(value)))
	}
	expired := periodOf(h.Clock - guildlog.KeyLifetime.Milliseconds())
	if before > 0 && expired > periodOf(before-guildlog.KeyLifetime.Milliseconds()) {
		remove(b, span{l.key(tableKey), l.numbered(tableKey, expired)})
	}
	for i := range c.Keys {
		k := &c.Keys[i]
		set(b, l.idempotencyKey(periodOf(h.Clock), k.Name), encodeKey(k, h.Clock))
	}
	for _, row := range c.State {
		key := append(l.key(tableState), row.Key...)
		if row.Value == nil {
			unset(b, key)
		} else {
			set(b, key, row.Value)
		}
	}
	set(b, l.key(tableHead), encodeFixed(h))
	return nil
}

// add counts a record of some bytes.
func (h *head) add(r *guildlog.Record, bytes int64) {
	n := &h.Newest
	if n.Bytes == 0 {
		n.From, n.To = r.Time, r.Time
	}
	n.From, n.To = min(n.From, r.Time), max(n.To, r.Time)
	n.End = r.End()
	n.Bytes += bytes
	h.Bytes += bytes
	h.Last = r.End()
}

// Retain sets the retention. Bytes are counted as they are written, before compression.
func (l *Log) Retain(r guildlog.Retention) {
	l.commit.Lock()
	defer l.commit.Unlock()
	l.retention = r
	if l.use() == nil {
		defer l.s.leave()
		l.drop()
	}
}

// drop applies the retention. commit is held, or nobody has l yet. Where it cannot read or write, the
// store is told, and what was to go stays.
func (l *Log) drop() {
	cutoff := l.s.o.Now().Add(-l.retention.Age).UnixMilli()
	overdue := func(h *head) bool {
		return h.Bytes > h.Newest.Bytes && (h.Bytes > l.retention.Bytes || h.OldestTo < cutoff)
	}
	h := l.head
	if !overdue(&h) {
		return
	}
	stop := errors.New("enough")
	err := l.s.iterate(l.between(tableBlock, h.Dropped+1, h.Last), func(key, value []byte) error {
		var oldest block
		if err := decodeFixed(value, &oldest); err != nil {
			return fmt.Errorf("%w: block that ends at %d: %w", ErrCorrupt, lastNumber(key), err)
		}
		h.OldestTo = oldest.To
		if !overdue(&h) {
			return stop
		}
		h.Dropped, h.Bytes = oldest.End, h.Bytes-oldest.Bytes
		return nil
	})
	switch {
	case err == nil && h.Bytes != h.Newest.Bytes:
		err = fmt.Errorf("%w: %d bytes of records are in no block", ErrCorrupt, h.Bytes-h.Newest.Bytes)
	case err == nil || errors.Is(err, stop):
		b := l.s.newBatch()
		remove(b, l.between(tableRecord, l.head.Dropped+1, h.Dropped))
		remove(b, l.between(tableBlock, l.head.Dropped+1, h.Dropped))
		set(b, l.key(tableHead), encodeFixed(&h))
		l.publish(h)
		// A power cut may undo this, and with it nothing that came before.
		err = l.s.apply(b, pebble.NoSync)
	}
	if err != nil {
		err = fmt.Errorf("retention of guild %s: %w", l.id.Guild, err)
		l.s.trouble.Store(&err)
		l.s.o.Logger.Error("the store's retention", "guild", l.id.Guild, "error", err.Error())
	}
}

// Read returns up to limit records, and about a MiB, that end above number seq, oldest first. It
// fails with guildlog.ErrDropped, ErrCorrupt, ErrLogMissing or ErrClosed.
func (l *Log) Read(seq uint64, limit int) ([]guildlog.Record, error) {
	if err := l.use(); err != nil {
		return nil, err
	}
	defer l.s.leave()
	l.mu.RLock()
	last, dropped := l.last, l.dropped
	l.mu.RUnlock()
	if seq < dropped {
		return nil, guildlog.ErrDropped
	}
	if seq >= last || limit <= 0 {
		return nil, nil
	}
	var records []guildlog.Record
	if err := l.s.with(l.between(tableRecord, dropped+1, last), func(it *pebble.Iterator) (err error) {
		if !l.Resumable(seq) {
			return guildlog.ErrDropped // in the meantime: the iterator may lack some
		}
		records, err = read(it, l.numbered(tableRecord, seq+1), seq, last, limit)
		return err
	}); err != nil {
		return nil, fmt.Errorf("reading the log of guild %s behind %d: %w", l.id.Guild, seq, err)
	}
	return records, nil
}

// read collects records that end above seq from an iterator over those up to last. next is the key of
// number seq+1.
func read(it *pebble.Iterator, next []byte, seq, last uint64, limit int) (records []guildlog.Record, err error) {
	// The record before the key may have reserved numbers above seq.
	ok := it.SeekLT(next)
	if ok {
		r, _, err := current(it)
		if err != nil {
			return nil, err
		}
		ok = r.End() > seq
	}
	if !ok {
		ok = it.SeekGE(next)
	}
	size := 0
	for end := seq; ok && len(records) < limit && size < maxRead; ok = it.Next() {
		r, prev, err := current(it)
		switch {
		case err != nil:
			return nil, err
		case prev > end, len(records) > 0 && prev != end:
			return nil, fmt.Errorf("%w: record %d follows %d, which is missing", ErrCorrupt, r.Seq, prev)
		}
		records = append(records, r)
		end = r.End()
		size += len(it.Key()) + len(r.Data)
	}
	if err := it.Error(); err != nil {
		return nil, classify(err)
	}
	if !ok && (len(records) == 0 || records[len(records)-1].End() != last) {
		return nil, fmt.Errorf("%w: records up to %d are missing", ErrCorrupt, last)
	}
	return records, nil
}

// Find looks an idempotency key up. It waits for a Commit under way.
func (l *Log) Find(name string) (k guildlog.Key, found bool, err error) {
	l.commit.Lock()
	defer l.commit.Unlock()
	if err := l.use(); err != nil {
		return k, false, err
	}
	defer l.s.leave()
	now := max(l.head.Clock, l.s.o.Now().UnixMilli())
	expired := now - guildlog.KeyLifetime.Milliseconds()
	for p := periodOf(now) + 1; p > periodOf(expired); p-- {
		value, closer, err := l.s.db.Get(l.idempotencyKey(p-1, name))
		if errors.Is(err, pebble.ErrNotFound) {
			continue
		}
		if err != nil {
			return k, false, classify(err)
		}
		defer closer.Close()
		k, at, err := decodeKey(name, value)
		if err != nil {
			return guildlog.Key{}, false, fmt.Errorf("%w: key %q of guild %s: %w", ErrCorrupt, name, l.id.Guild, err)
		}
		if at <= expired {
			break
		}
		return k, true, nil
	}
	return guildlog.Key{}, false, nil
}

// State calls each with all rows of the state, by key, and returns the log's last number, which they are
// as of. Key and value are only good during the call. It waits for a Commit under way and holds up those
// that follow; an error of each ends it and is returned.
func (l *Log) State(each func(key, value []byte) error) (seq uint64, err error) {
	l.commit.Lock()
	defer l.commit.Unlock()
	if err := l.use(); err != nil {
		return 0, err
	}
	defer l.s.leave()
	first := l.key(tableState)
	return l.head.Last, l.s.iterate(span{first, l.key(tableState + 1)}, func(key, value []byte) error {
		return each(key[len(first):], value)
	})
}
