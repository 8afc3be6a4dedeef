package guildlog

import (
	"slices"
	"sort"
	"sync"
	"time"
)

// memory is a log that ends with its process.
type memory struct {
	id    ID
	epoch int64
	now   func() time.Time

	mu        sync.RWMutex
	retention Retention
	records   []Record // oldest first
	bytes     int64
	dropped   uint64 // last number of the newest dropped record
	last      uint64
	keys      keyTable
}

// NewMemory makes an empty log in memory, with a new ID. now is the clock.
func NewMemory(r Retention, now func() time.Time) Log {
	return &memory{id: NewID(false), epoch: 1, now: now, retention: r}
}

// NewReplica makes a log in memory of what follows number after in another log, whose ID and epoch it has.
func NewReplica(id ID, epoch int64, after uint64, r Retention, now func() time.Time) Log {
	return &memory{id: id, epoch: epoch, now: now, retention: r, dropped: after, last: after}
}

func (m *memory) ID() ID       { return m.id }
func (m *memory) Epoch() int64 { return m.epoch }

func (m *memory) Last() uint64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.last
}

func (m *memory) Resumable(seq uint64) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return seq >= m.dropped && seq <= m.last
}

// Room: memory is bounded by retention.
func (m *memory) Room() error { return nil }

func (m *memory) Commit(c Commit) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := checkOrder(m.last, c.Records); err != nil {
		return err
	}
	for i := range c.Records {
		m.bytes += c.Records[i].size()
		m.last = c.Records[i].End()
	}
	m.records = append(m.records, c.Records...)
	for _, k := range c.Keys {
		m.keys.put(k, m.now())
	}
	m.drop()
	return nil
}

func (m *memory) Find(name string) (Key, bool, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	k, found := m.keys.find(name, m.now())
	return k, found, nil
}

// State has no rows: a log in memory is read by nobody but the process that has its state.
func (m *memory) State(func(key, value []byte) error) (uint64, error) { return 0, nil }

func (m *memory) Read(seq uint64, limit int) ([]Record, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if seq < m.dropped {
		return nil, ErrDropped
	}
	from := sort.Search(len(m.records), func(i int) bool { return m.records[i].End() > seq })
	rest := m.records[from:]
	return slices.Clone(rest[:min(len(rest), limit)]), nil
}

func (m *memory) Retain(r Retention) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.retention = r
	m.drop()
}

func (m *memory) drop() {
	oldest := m.now().Add(-m.retention.Age).UnixMilli()
	n := 0
	for n < len(m.records)-1 && (m.bytes > m.retention.Bytes || m.records[n].Time < oldest) {
		m.bytes -= m.records[n].size()
		m.dropped = m.records[n].End()
		n++
	}
	clear(m.records[:n]) // for the garbage collector: the array behind the slice lives on
	m.records = m.records[n:]
}
