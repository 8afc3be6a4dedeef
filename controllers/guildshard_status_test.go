package controllers

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// servingShard is a shard that all is well with.
func servingShard() shardFacts {
	shard := makeShard("ns", "shard-a").Capacity(10).Obj()
	shard.Generation = 1
	return shardFacts{
		shard:    shard,
		reports:  shardView{freshness: fresh, bootID: "boot", version: "v", load: report.Load{CPUMilli: 1234, MemoryBytes: 50 << 20}},
		upToDate: isTrue(reasonUpToDate, ""),
		booked:   3, counted: true,
		now: noon,
	}
}

func TestShardReasons(t *testing.T) {
	for name, tc := range map[string]struct {
		change                              func(*shardFacts)
		ready, durable, schedulable, loaded string
	}{
		"all is well": {func(*shardFacts) {}, reasonServing, "!InMemory", reasonActive, reasonReported},
		"no pod": {
			func(f *shardFacts) { f.health = healthOf(nil) },
			"!PodMissing", "!InMemory", reasonActive, reasonReported,
		},
		"pod not ready": {
			func(f *shardFacts) { f.health = podHealth{reasonPodNotReady, "x"} },
			"!PodNotReady", "!InMemory", reasonActive, reasonReported,
		},
		"no image": {
			func(f *shardFacts) { f.health = podHealth{reasonImageNotFound, "x"} },
			"!ImageNotFound", "!InMemory", reasonActive, reasonReported,
		},
		"somebody else's object": {
			func(f *shardFacts) { f.conflict = "x" },
			"!NameConflict", "!InMemory", reasonActive, reasonReported,
		},
		"no report yet": {
			func(f *shardFacts) { f.reports = shardView{} },
			"!NotReporting", "!InMemory", reasonActive, "!NotReported",
		},
		"no report any more": {
			func(f *shardFacts) { f.reports.freshness = stale },
			"!NotReporting", "!InMemory", reasonActive, "!Stale",
		},
		"being deleted": {
			func(f *shardFacts) { f.shard.DeletionTimestamp = new(metav1.NewTime(noon)) },
			"!Deleting", "!InMemory", "!Deleting", reasonReported,
		},
		"logs on disk": {
			func(f *shardFacts) { f.reports.disk.durable = true },
			reasonServing, reasonOnDisk, reasonActive, reasonReported,
		},
		"the disk is full": {
			func(f *shardFacts) { f.reports.disk = disk{durable: true, full: true} },
			reasonServing, "!DiskFull", reasonActive, reasonReported,
		},
		"cordoned": {
			func(f *shardFacts) { f.shard.Spec.Availability = v1.ShardCordoned },
			reasonServing, "!InMemory", "!Cordoned", reasonReported,
		},
		"draining": {
			func(f *shardFacts) { f.shard.Spec.Availability = v1.ShardDraining },
			reasonServing, "!InMemory", "!Draining", reasonReported,
		},
		"full": {
			func(f *shardFacts) { f.booked = 10 },
			reasonServing, "!InMemory", "!Full", reasonReported,
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := servingShard()
			tc.change(&f)
			status, _, _ := shardStatus(f)
			got := []string{
				reason(status.Conditions, condReady), reason(status.Conditions, condDurable),
				reason(status.Conditions, condSchedulable), reason(status.Conditions, condLoadFresh),
			}
			if diff := cmp.Diff([]string{tc.ready, tc.durable, tc.schedulable, tc.loaded}, got); diff != "" {
				t.Errorf("Ready, Durable, Schedulable, LoadFresh (-want +got):\n%s", diff)
			}
		})
	}
}

func TestShardStatusStands(t *testing.T) {
	f := servingShard()
	status, written, _ := shardStatus(f)
	if *status.Guilds != 3 || *status.CapacityFree != 7 || status.BootID != "boot" || *status.Load.CPUMilli != 1200 {
		t.Errorf("the status is %+v", status)
	}
	f.shard.Status, f.written, f.now = status, written, noon.Add(time.Hour)
	f.reports.load.CPUMilli = 1300 // wavers
	if again, _, _ := shardStatus(f); cmp.Diff(status, again) != "" {
		t.Errorf("a second pass changes (-first +second):\n%s", cmp.Diff(status, again))
	}
	f.reports, f.counted, f.booked = shardView{}, false, 0
	if restarted, _, _ := shardStatus(f); cmp.Diff(status, restarted) != "" {
		t.Errorf("a new leader, before it has asked, changes (-old +new):\n%s", cmp.Diff(status, restarted))
	}
}

func TestShardFiguresAreWrittenSeldom(t *testing.T) {
	f := servingShard()
	f.shard.Status, f.written, _ = shardStatus(f)

	f.booked, f.reports.load.CPUMilli, f.now = 4, 4000, noon.Add(time.Second)
	status, _, recheck := shardStatus(f)
	if *status.Guilds != 3 || *status.Load.CPUMilli != 1200 || recheck != time.Second {
		t.Errorf("after 1 s %d guilds, %d mCPU, recheck in %s; want what was, and 1 s", *status.Guilds, *status.Load.CPUMilli, recheck)
	}
	f.booked = 10
	if status, _, _ = shardStatus(f); *status.Guilds != 10 || *status.CapacityFree != 0 {
		t.Errorf("a shard that has become full says %d guilds", *status.Guilds)
	}
	f.now = noon.Add(30 * time.Second)
	if status, _, _ = shardStatus(f); *status.Load.CPUMilli != 4000 {
		t.Errorf("after 30 s the load is %d mCPU", *status.Load.CPUMilli)
	}
}

func TestLoadMoved(t *testing.T) {
	for name, tc := range map[string]struct {
		was, is report.Load
		want    bool
	}{
		"an idle process wavers": {report.Load{CPUMilli: 3, MemoryBytes: 20 << 20}, report.Load{CPUMilli: 60, MemoryBytes: 30 << 20}, false},
		"events begin":           {report.Load{}, report.Load{EventsPerSecond: 50}, true},
		"a tenth more":           {report.Load{DeliveriesPerSecond: 100000}, report.Load{DeliveriesPerSecond: 110000}, false},
		"half as many":           {report.Load{DeliveriesPerSecond: 100000}, report.Load{DeliveriesPerSecond: 50000}, true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := loadMoved(tc.was, tc.is); got != tc.want {
				t.Errorf("got %t", got)
			}
		})
	}
}
