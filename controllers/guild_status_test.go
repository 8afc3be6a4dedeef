package controllers

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

const guildID = "123456789012345678"

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// serving is the view of a guild that all is well with.
func servingView() guildView {
	shard := makeShard("ns", "shard-a").Obj()
	shard.UID = "shard-uid"
	guild := makeGuild("ns", "lobby").Obj()
	guild.Generation = 1
	return guildView{
		guild:    guild,
		decision: decision{booking: booking{guildID, refOf(shard)}},
		shard:    shard,
		reports:  shardView{freshness: fresh, complete: true},
		entry:    report.Guild{ID: guildID, State: report.Serving, LogID: "log", Epoch: 2, Members: 1234, Online: 99, Sessions: 100},
		reported: true,
		linked:   true,
		relays:   &relayPass{},
		now:      noon,
	}
}

func TestGuildReadyReasons(t *testing.T) {
	unplaced := func(reason string) func(*guildView) {
		return func(v *guildView) { v.decision = decision{reason: reason, message: "because"} }
	}
	for name, tc := range map[string]struct {
		change                             func(*guildView)
		ready, placed, accepted, loadFresh string
		message                            string
	}{
		"all is well": {func(*guildView) {}, reasonServing, reasonPlaced, reasonAccepted, reasonReported, ""},
		"another guild has the id": {
			unplaced(reasonIDConflict),
			"!IDConflict", "!IDConflict", "!IDConflict", "!NotReported", "because",
		},
		"no shard":            {unplaced(reasonNoShard), "!NoShard", "!NoShard", reasonAccepted, "!NotReported", "because"},
		"no matching shard":   {unplaced(reasonNoMatchingShard), "!NoMatchingShard", "!NoMatchingShard", reasonAccepted, "!NotReported", "because"},
		"pin to no shard":     {unplaced(reasonShardMissing), "!ShardMissing", "!ShardMissing", reasonAccepted, "!NotReported", "because"},
		"cordoned shards":     {unplaced(reasonShardsCordoned), "!ShardsCordoned", "!ShardsCordoned", reasonAccepted, "!NotReported", "because"},
		"full shards":         {unplaced(reasonShardsFull), "!ShardsFull", "!ShardsFull", reasonAccepted, "!NotReported", "because"},
		"waits for inventory": {unplaced(reasonInventoryIncomplete), "!InventoryIncomplete", "!InventoryIncomplete", reasonAccepted, "!NotReported", "because"},
		"the pod is not ready": {
			func(v *guildView) { v.health = podHealth{reasonPodNotReady, "CrashLoopBackOff: it ends"} },
			"!ShardNotReady", reasonPlaced, reasonAccepted, reasonReported, "shard shard-a: CrashLoopBackOff: it ends",
		},
		"the shard has not reported yet": {
			func(v *guildView) { v.reports, v.reported = shardView{freshness: awaited}, false },
			"!ShardNotReady", reasonPlaced, reasonAccepted, "!NotReported", "waiting for the first report of shard shard-a",
		},
		"the shard has stopped reporting": {
			func(v *guildView) { v.reports.freshness = stale },
			"!ShardNotReady", reasonPlaced, reasonAccepted, "!Stale", "shard shard-a does not report",
		},
		"the shard does not have it yet": {
			func(v *guildView) { v.reported = false },
			"!Opening", reasonPlaced, reasonAccepted, "!NotReported", "shard shard-a is opening the guild",
		},
		"the shard is opening it": {
			func(v *guildView) { v.entry.State, v.entry.LogID = report.Opening, "" },
			"!Opening", reasonPlaced, reasonAccepted, reasonReported, "shard shard-a is opening the guild",
		},
		"the shard has it under another id": {
			func(v *guildView) { v.entry.ID = "999999999999999999" },
			"!Opening", reasonPlaced, reasonAccepted, reasonReported, "shard shard-a is opening the guild",
		},
		"the shard could not open it": {
			func(v *guildView) { v.entry.State, v.entry.Message = report.Failed, "disk full" },
			"!OpenFailed", reasonPlaced, reasonAccepted, reasonReported, "shard shard-a: disk full",
		},
		"the disk lacks its log": {
			func(v *guildView) {
				v.guild.Status.Placement = &v1.GuildPlacementStatus{ShardName: "shard-a", ShardUID: string(v.decision.shard.uid), LogID: "80"}
				v.entry.State, v.entry.Message, v.entry.LogID = report.LogMissing, "no such log", ""
			},
			"!LogMissing", reasonPlaced, reasonAccepted, reasonReported,
			"shard shard-a: no such log. To give that log up and start a new one, annotate the Guild: guildhall.dev/take-over=80",
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := servingView()
			tc.change(&v)
			status, _ := guildStatus(v)
			got := []string{
				reason(status.Conditions, condReady), reason(status.Conditions, condPlaced),
				reason(status.Conditions, condAccepted), reason(status.Conditions, condLoadFresh),
				message(status.Conditions, condReady),
			}
			want := []string{tc.ready, tc.placed, tc.accepted, tc.loadFresh, tc.message}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("Ready, Placed, Accepted, LoadFresh, message (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("being deleted", func(t *testing.T) {
		if got := reason(deletingStatus(servingView().guild, noon).Conditions, condReady); got != "!Deleting" {
			t.Errorf("Ready is %s", got)
		}
	})
}

func TestGuildStatusOfAServingGuild(t *testing.T) {
	status, recheck := guildStatus(servingView())
	status.Conditions = nil
	want := v1.GuildStatus{
		ObservedGeneration: 1, ID: guildID, Mode: v1.GuildDirect,
		Placement:        &v1.GuildPlacementStatus{ShardName: "shard-a", ShardUID: "shard-uid", LogID: "log", Epoch: 2},
		Gateway:          &v1.GuildGatewayStatus{URL: "ws://guildhall-gateway.ns.svc/g/" + guildID + "/"},
		Members:          new(int64(1200)),
		Online:           new(int64(99)),
		Sessions:         new(int64(100)),
		CountsObservedAt: new(metav1.NewTime(noon)),
		Relays: &v1.GuildRelaysStatus{
			Desired: new(int32(0)), Replicas: new(int32(0)), Ready: new(int32(0)), Updated: new(int32(0)), Draining: new(int32(0)),
			Selector: "guildhall.dev/guild=" + guildID + ",app.kubernetes.io/component=relay",
		},
	}
	if diff := cmp.Diff(want, status); diff != "" || recheck != 0 {
		t.Errorf("status (-want +got), recheck %s:\n%s", recheck, diff)
	}
}

func TestGuildStatusStands(t *testing.T) {
	v := servingView()
	status, _ := guildStatus(v)
	v.guild.Status = status
	v.now = noon.Add(time.Hour)

	again, _ := guildStatus(v)
	if diff := cmp.Diff(status, again); diff != "" {
		t.Errorf("a second pass changes (-first +second):\n%s", diff)
	}
	v.reports, v.reported = shardView{freshness: awaited}, false
	if restarted, _ := guildStatus(v); cmp.Diff(status, restarted) != "" {
		t.Errorf("a new leader, before it has asked, changes (-old +new):\n%s", cmp.Diff(status, restarted))
	}
}

func TestGuildCountsAreWrittenSeldom(t *testing.T) {
	v := servingView()
	v.guild.Status, _ = guildStatus(v)
	v.entry.Members, v.now = 1249, noon.Add(time.Minute)
	if status, _ := guildStatus(v); *status.Members != 1200 || !status.CountsObservedAt.Time.Equal(noon) {
		t.Errorf("a change that rounding hides is written: %d", *status.Members)
	}
	v.entry.Members, v.now = 5000, noon.Add(10*time.Second)
	status, recheck := guildStatus(v)
	if *status.Members != 1200 || recheck != 20*time.Second {
		t.Errorf("after 10 s members are %d, recheck in %s; want 1200 and 20 s", *status.Members, recheck)
	}
	v.now = noon.Add(30 * time.Second)
	if status, _ = guildStatus(v); *status.Members != 5000 || !status.CountsObservedAt.Time.Equal(v.now) {
		t.Errorf("after 30 s members are %d", *status.Members)
	}
}

func TestPlacedSaysThatASpecIsNotFollowed(t *testing.T) {
	v := servingView()
	v.guild.Spec.Placement = &v1.GuildPlacement{ShardName: "shard-b"}
	status, _ := guildStatus(v)
	if got := message(status.Conditions, condPlaced); got != "on shard shard-a, which spec.placement does not allow: this version does not move a guild that is placed" {
		t.Errorf("the message of Placed is %q", got)
	}
}

func TestGuildURL(t *testing.T) {
	for name, tc := range map[string]struct {
		guild *guildBuilder
		shard *shardBuilder
		want  string
	}{
		"the namespace's front door":         {makeGuild("ns", "g"), makeShard("ns", "s"), "ws://guildhall-gateway.ns.svc/g/1/"},
		"the shard's front door URL":         {makeGuild("ns", "g"), makeShard("ns", "s").FrontDoor("wss://d.example/p/"), "wss://d.example/p/g/1/"},
		"the guild's own URL before all":     {makeGuild("ns", "g").PublicURL("wss://g.example"), makeShard("ns", "s").FrontDoor("wss://d.example"), "wss://g.example/g/1/"},
		"a TLS secret alone changes nothing": {makeGuild("ns", "g"), makeShard("ns", "s").TLS("cert"), "ws://guildhall-gateway.ns.svc/g/1/"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := v1.AddressesOf(tc.guild.Obj(), "1", tc.shard.Obj()).Gateway; got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestRounded(t *testing.T) {
	for n, want := range map[int64]int64{0: 0, 7: 7, 99: 99, 100: 100, 101: 100, 105: 110, 149: 150, 994: 990, 999: 1000, 1234: 1200, 15000: 15000, 1_999_999: 2_000_000} {
		if got := rounded(n); got != want {
			t.Errorf("rounded(%d) = %d, want %d", n, got, want)
		}
		if got := rounded(rounded(n)); got != rounded(n) {
			t.Errorf("rounding %d twice gives %d", n, got)
		}
	}
}
