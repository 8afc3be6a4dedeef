package guildlog

import (
	"fmt"
	"testing"
	"time"
)

func TestKeyTableIsBounded(t *testing.T) {
	now := time.Now()
	for name, test := range map[string]struct {
		answer int
		keys   int
	}{
		"by number": {0, maxKeys + 500},
		"by bytes":  {maxKeyBytes / 100, 500},
	} {
		t.Run(name, func(t *testing.T) {
			var table keyTable
			for i := range test.keys {
				table.put(Key{Name: fmt.Sprint(i), Answer: make([]byte, test.answer)}, now)
			}
			bytes := 0
			for _, e := range table.entries {
				bytes += e.size()
			}
			if len(table.entries) > maxKeys || table.bytes > maxKeyBytes || bytes != table.bytes || len(table.order) != len(table.entries) {
				t.Errorf("%d entries, %d of %d bytes, %d in order", len(table.entries), table.bytes, bytes, len(table.order))
			}
			if _, found := table.find(fmt.Sprint(test.keys-1), now); !found {
				t.Error("the newest key was forgotten")
			}
			if _, found := table.find("0", now); found {
				t.Error("the oldest key is still there")
			}
		})
	}
}
