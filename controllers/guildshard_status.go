package controllers

import (
	"fmt"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

const (
	// bookingsInterval and loadInterval are the least times between two writes of a shard's figures.
	bookingsInterval = 2 * time.Second
	loadInterval     = 30 * time.Second
)

// shardFacts is all that a GuildShard's status depends on.
type shardFacts struct {
	shard    *v1.GuildShard
	health   podHealth
	reports  shardView
	upToDate verdict
	// conflict says which object of a wanted name belongs to somebody else.
	conflict string
	// rejected says what the API server does not take.
	rejected string
	booked   int
	counted  bool // booked is known
	written  figuresWritten
	now      time.Time
}

// figuresWritten has when a shard's figures were last written by this process.
type figuresWritten struct {
	bookings time.Time
	load     time.Time
}

// shardStatus computes a GuildShard's status. recheck, when above 0, is the time after which
// figures that are held back may be written.
func shardStatus(f shardFacts) (status v1.GuildShardStatus, written figuresWritten, recheck time.Duration) {
	f.shard.Status.DeepCopyInto(&status)
	written = f.written
	status.ObservedGeneration = f.shard.Generation
	w := conditionWriter{&status.Conditions, f.shard.Generation, f.now}

	switch {
	case f.conflict != "":
		w.set(condAccepted, isFalse(reasonNameConflict, f.conflict))
	case f.rejected != "":
		w.set(condAccepted, isFalse(reasonRejected, f.rejected))
	default:
		w.set(condAccepted, isTrue(reasonAccepted, ""))
	}
	f.setReady(w)
	f.setReported(w)
	w.set(condUpToDate, f.upToDate)

	schedulable := f.schedulable()
	before := meta.FindStatusCondition(status.Conditions, condSchedulable)
	turned := before == nil || before.Reason != schedulable.reason
	w.set(condSchedulable, schedulable)

	if free := int32(max(int(f.shard.Spec.Capacity.Guilds)-f.booked, 0)); f.counted &&
		!(equals(status.Guilds, int32(f.booked)) && equals(status.CapacityFree, free)) {
		if wait := bookingsInterval - f.now.Sub(written.bookings); wait > 0 && !turned {
			recheck = wait
		} else {
			status.Guilds, status.CapacityFree = new(int32(f.booked)), &free
			written.bookings = f.now
		}
	}
	if f.reports.freshness == fresh {
		status.Version, status.BootID = f.reports.version, f.reports.bootID
		if wait := f.setLoad(&status, &written); wait > 0 && (recheck == 0 || wait < recheck) {
			recheck = wait
		}
	}
	return status, written, recheck
}

func (f shardFacts) setReady(w conditionWriter) {
	switch {
	case f.shard.DeletionTimestamp != nil:
		w.set(condReady, isFalse(reasonDeleting, "the pod is being ended"))
	case f.conflict != "":
		w.set(condReady, isFalse(reasonNameConflict, f.conflict))
	case !f.health.ready():
		w.set(condReady, isFalse(f.health.reason, f.health.message))
	case f.reports.freshness == fresh:
		w.set(condReady, isTrue(reasonServing, ""))
	case f.reports.freshness == stale:
		w.set(condReady, isFalse(reasonNotReporting, fmt.Sprintf("no report for %s", staleAfter)))
	default:
		waiting := isFalse(reasonNotReporting, "waiting for the first report")
		if c := meta.FindStatusCondition(*w.conditions, condReady); c != nil && (c.Reason == reasonServing || c.Reason == reasonNotReporting) {
			w.keep(condReady, waiting) // what the leader before this one wrote
		} else {
			w.set(condReady, waiting)
		}
	}
}

// setReported sets the conditions that come from the shard's report.
func (f shardFacts) setReported(w conditionWriter) {
	logs := isFalse(reasonInMemory, "the logs of the guilds are in memory and end with the process")
	switch {
	case f.reports.disk.full:
		logs = isFalse(reasonDiskFull, "the volume has too little room left: nothing is appended, and publishers are answered 507, until retention or a larger spec.storage.size makes room")
	case f.reports.disk.durable:
		logs = isTrue(reasonOnDisk, "")
	case f.shard.Spec.Storage != nil:
		logs.message += ": the pod is yet to be replaced by one with the volume"
	}
	switch f.reports.freshness {
	case fresh:
		w.set(condLoadFresh, isTrue(reasonReported, ""))
		w.set(condDurable, logs)
	case stale:
		w.set(condLoadFresh, isFalse(reasonStale, fmt.Sprintf("no report for %s", staleAfter)))
		w.keep(condDurable, logs)
	default:
		w.keep(condLoadFresh, isFalse(reasonNotReported, "waiting for the first report"))
		w.keep(condDurable, logs)
	}
}

func (f shardFacts) schedulable() verdict {
	switch {
	case f.shard.DeletionTimestamp != nil:
		return isFalse(reasonDeleting, "the GuildShard is being deleted")
	case availability(f.shard) == v1.ShardCordoned:
		return isFalse(reasonCordoned, "spec.availability: no new guilds")
	case availability(f.shard) == v1.ShardDraining:
		return isFalse(reasonDraining, "spec.availability: no new guilds; those that it has stay, since this version does not move guilds")
	case !f.counted:
		if c := meta.FindStatusCondition(f.shard.Status.Conditions, condSchedulable); c != nil && c.Reason == reasonFull {
			return isFalse(reasonFull, c.Message)
		}
	case f.booked >= int(f.shard.Spec.Capacity.Guilds):
		return isFalse(reasonFull, "it holds as many guilds as spec.capacity.guilds allows")
	}
	return isTrue(reasonActive, "")
}

// setLoad writes the load when it has moved and the last one is old enough.
func (f shardFacts) setLoad(status *v1.GuildShardStatus, written *figuresWritten) (recheck time.Duration) {
	now := f.reports.load
	sessions := rounded(now.Sessions)
	if equals(status.Sessions, sessions) && status.Load != nil && !loadMoved(loadOf(status.Load), now) {
		return 0
	}
	if wait := loadInterval - f.now.Sub(written.load); wait > 0 && status.Load != nil {
		return wait
	}
	status.Sessions = &sessions
	status.Load = &v1.ShardLoad{
		EventsPerSecond:     new(rounded(now.EventsPerSecond)),
		DeliveriesPerSecond: new(rounded(now.DeliveriesPerSecond)),
		CPUMilli:            new(rounded(now.CPUMilli)),
		MemoryBytes:         new(rounded(now.MemoryBytes)),
		DiskUsedBytes:       new(rounded(now.DiskUsedBytes)),
	}
	written.load = f.now
	return 0
}

func loadOf(l *v1.ShardLoad) report.Load {
	return report.Load{
		EventsPerSecond: value(l.EventsPerSecond), DeliveriesPerSecond: value(l.DeliveriesPerSecond),
		CPUMilli: value(l.CPUMilli), MemoryBytes: value(l.MemoryBytes), DiskUsedBytes: value(l.DiskUsedBytes),
	}
}

func value(p *int64) int64 {
	if p == nil {
		return 0
	}
	return *p
}

// loadMoved says whether a load differs by more than a fifth, and more than an idle process wavers.
func loadMoved(was, is report.Load) bool {
	moved := func(a, b, floor int64) bool {
		return max(a-b, b-a) > max(floor, a/5)
	}
	return moved(was.EventsPerSecond, is.EventsPerSecond, 10) ||
		moved(was.DeliveriesPerSecond, is.DeliveriesPerSecond, 100) ||
		moved(was.CPUMilli, is.CPUMilli, 100) ||
		moved(was.MemoryBytes, is.MemoryBytes, 32<<20) ||
		moved(was.DiskUsedBytes, is.DiskUsedBytes, 64<<20)
}

// figureTimes remembers when figures were written.
type figureTimes struct {
	mu    sync.Mutex
	times map[types.UID]figuresWritten
}

func (t *figureTimes) get(shard types.UID) figuresWritten {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.times[shard]
}

func (t *figureTimes) set(shard types.UID, w figuresWritten) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.times[shard] = w
}

func (t *figureTimes) drop(shard types.UID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.times, shard)
}
