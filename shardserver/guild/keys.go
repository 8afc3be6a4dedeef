package guild

import (
	"time"
)

const (
	// keyLifetime is how long an idempotency key is remembered.
	keyLifetime = 24 * time.Hour
	// maxKeys and maxKeyBytes bound what a guild remembers; beyond them the oldest keys go early.
	maxKeys     = 100_000
	maxKeyBytes = 64 << 20
)

// keyTable remembers idempotency keys. Its zero value is empty.
type keyTable struct {
	entries map[string]keyEntry
	order   []string // oldest first
	bytes   int
}

type keyEntry struct {
	body    [32]byte
	numbers []uint64
	answer  []byte
	at      time.Time
}

// size is what an entry counts for maxKeyBytes.
func (e *keyEntry) size(key string) int { return 2*len(key) + 8*len(e.numbers) + len(e.answer) + 200 }

// find looks a key up. The empty key is never found. ErrKeyReused: it came with another body.
func (t *keyTable) find(key string, body [32]byte, now time.Time) (e keyEntry, found bool, err error) {
	if key == "" {
		return e, false, nil
	}
	e, found = t.entries[key]
	if !found || now.Sub(e.at) >= keyLifetime {
		return keyEntry{}, false, nil
	}
	if e.body != body {
		return e, true, ErrKeyReused
	}
	return e, true, nil
}

// put remembers a key; the empty key is not remembered.
func (t *keyTable) put(key string, body [32]byte, numbers []uint64, answer []byte, now time.Time) {
	if key == "" {
		return
	}
	if t.entries == nil {
		t.entries = map[string]keyEntry{}
	}
	e := keyEntry{body: body, numbers: numbers, answer: answer, at: now}
	t.bytes += e.size(key)
	for len(t.order) > 0 {
		oldest := t.entries[t.order[0]]
		if len(t.order) < maxKeys && t.bytes <= maxKeyBytes && now.Sub(oldest.at) < keyLifetime {
			break
		}
		t.bytes -= oldest.size(t.order[0])
		delete(t.entries, t.order[0])
		t.order = t.order[1:]
	}
	t.entries[key] = e
	t.order = append(t.order, key)
}
