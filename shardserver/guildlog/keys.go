package guildlog

import "time"

const (
	// maxKeys and maxKeyBytes bound what a log in memory remembers; beyond them the oldest keys go early.
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
	Key
	at time.Time
}

// size is what an entry counts for maxKeyBytes.
func (e *keyEntry) size() int { return 2*len(e.Name) + 8*len(e.Numbers) + len(e.Answer) + 200 }

func (t *keyTable) find(name string, now time.Time) (Key, bool) {
	e, found := t.entries[name]
	if !found || now.Sub(e.at) >= KeyLifetime {
		return Key{}, false
	}
	return e.Key, true
}

func (t *keyTable) put(k Key, now time.Time) {
	if t.entries == nil {
		t.entries = map[string]keyEntry{}
	}
	e := keyEntry{k, now}
	t.bytes += e.size()
	for len(t.order) > 0 {
		oldest := t.entries[t.order[0]]
		if len(t.order) < maxKeys && t.bytes <= maxKeyBytes && now.Sub(oldest.at) < KeyLifetime {
			break
		}
		t.bytes -= oldest.size()
		delete(t.entries, t.order[0])
		t.order = t.order[1:]
	}
	t.entries[k.Name] = e
	t.order = append(t.order, k.Name)
}
