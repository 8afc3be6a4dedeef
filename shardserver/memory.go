package main

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// gcPercent is GOGC unless the environment says otherwise. Delivering allocates nothing, so
	// collecting more often costs little, and much of what sessions take is what a collection leaves between them.
	gcPercent = 50

	trimPeriod = 500 * time.Millisecond
	// trimCalm is how many bytes are allocated in a period when nothing much goes on.
	trimCalm = 1 << 20
	// trimWorth is how many bytes have to have been allocated since the last time.
	trimWorth = 8 << 20
)

func init() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// trimMemory gives memory back to the system behind a burst, such as thousands of sessions that
// connect: the runtime by itself would keep as much again as is in use, and a session is in use of little.
func trimMemory(ctx context.Context) {
	tick := time.NewTicker(trimPeriod)
	defer tick.Stop()
	allocated := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	var before, trimmed uint64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(allocated)
		now := allocated[0].Value.Uint64()
		if now-before < trimCalm && now-trimmed > trimWorth {
			runtime.GC() // what is in a sync.Pool outlives one collection
			debug.FreeOSMemory()
			trimmed = now
		}
		before = now
	}
}
