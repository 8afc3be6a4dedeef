package guild

import (
	"time"
)

const (
	// keyLifetime is how long an idempotency key is remembered.
	keyLifetime = 24 * time.Hour
	// maxKeys bounds the keys that a guild remembers; beyond it the oldest go early.
	maxKeys = 100_000
)

// keyTable remembers idempotency keys. Its zero value is empty.
type keyTable struct {
	entries map[string]keyEntry
	order   []string // oldest first
}

type keyEntry struct {
	body    [32]byte
	numbers []uint64
	answer  []byte
	at      time.Time
}

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
	for len(t.order) > 0 && (len(t.order) >= maxKeys || now.Sub(t.entries[t.order[0]].at) >= keyLifetime) {
		delete(t.entries, t.order[0])
		t.order = t.order[1:]
	}
	t.entries[key] = keyEntry{body: body, numbers: numbers, answer: answer, at: now}
	t.order = append(t.order, key)
}
