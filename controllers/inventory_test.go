package controllers

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

func TestIdentitiesOfAGuildThatTwoShardsReport(t *testing.T) {
	guild := func(state report.State, epoch int64) []report.Guild {
		return []report.Guild{{UID: "g", Namespace: "ns", Name: "hall", ID: "1", State: state, Epoch: epoch}}
	}
	for name, tc := range map[string]struct {
		a, b []report.Guild
		want string
	}{
		"one serves it":                           {guild(report.Serving, 1), nil, "a"},
		"one has its log":                         {nil, guild(report.Stored, 1), "b"},
		"both serve it, the later epoch counts":   {guild(report.Serving, 1), guild(report.Serving, 2), "b"},
		"one serves it, the other has an old log": {guild(report.Serving, 1), guild(report.Stored, 1), "a"},
		"one serves it, whatever the other has":   {guild(report.Stored, 3), guild(report.Opening, 0), "b"},
	} {
		t.Run(name, func(t *testing.T) {
			inv, now := newInventory(), time.Now()
			var shards []shardRef
			for shard, guilds := range map[string][]report.Guild{"a": tc.a, "b": tc.b} {
				key, uid := types.NamespacedName{Namespace: "ns", Name: shard}, types.UID("uid-"+shard)
				inv.listen(key, uid, now)
				inv.take(key, uid, &report.Report{BootID: "x", Complete: true, Guilds: guilds}, now, now)
				shards = append(shards, shardRef{name: shard, uid: uid})
			}
			missing, bookings := inv.identities("ns", shards)
			if diff := cmp.Diff(tc.want, bookings["g"].shard.name); diff != "" || len(missing) > 0 {
				t.Errorf("missing %v, holder (-want +got):\n%s", missing, diff)
			}
		})
	}
}

func TestWhatHoldsADeletedGuild(t *testing.T) {
	for name, tc := range map[string]struct {
		state  report.State
		policy v1.DeletionPolicy
		want   bool
	}{
		"it is served":                        {report.Serving, v1.DeletionRetain, true},
		"it is about to open":                 {report.Opening, v1.DeletionRetain, true},
		"its log stays on disk":               {report.Stored, v1.DeletionRetain, false},
		"its log stays, nothing was said":     {report.Stored, "", false},
		"its log is on disk and is to vanish": {report.Stored, v1.DeletionDelete, true},
	} {
		t.Run(name, func(t *testing.T) {
			guild := &v1.Guild{ObjectMeta: metav1.ObjectMeta{Name: "hall"}, Spec: v1.GuildSpec{DeletionPolicy: tc.policy}}
			if got := holdsDeleted(guild)(report.Guild{State: tc.state}); got != tc.want {
				t.Errorf("holds: %v", got)
			}
		})
	}
}
