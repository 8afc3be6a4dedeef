package controllers

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
	acv1 "guildhall.dev/guildhall/api/v1/applyconfiguration/api/v1"
)

// place is what must survive everything: id, shard and log.
type place struct{ id, shard, log string }

func (w *world) places() map[string]place {
	w.t.Helper()
	var guilds v1.GuildList
	if err := w.client.List(context.Background(), &guilds, client.InNamespace(w.namespace)); err != nil {
		w.t.Fatal(err)
	}
	out := map[string]place{}
	for _, g := range guilds.Items {
		if p := g.Status.Placement; p != nil && reason(g.Status.Conditions, condReady) == reasonServing {
			out[g.Name] = place{g.Status.ID, p.ShardName, p.LogID}
		}
	}
	return out
}

func (w *world) serving(want int, limit time.Duration) map[string]place {
	w.t.Helper()
	var got map[string]place
	eventually(w.t, limit, func() string {
		if got = w.places(); len(got) != want {
			return fmt.Sprintf("%d guilds to serve; %d do", want, len(got))
		}
		return ""
	})
	return got
}

// inParallel does a thing for each of n numbers, in no order.
func inParallel(t *testing.T, n int, do func(i int) error) {
	t.Helper()
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for _, i := range rand.Perm(n) {
		slots <- struct{}{}
		wg.Go(func() {
			if err := do(i); err != nil {
				t.Error(err)
			}
			<-slots
		})
	}
	wg.Wait()
}

// settled waits until nobody has written to the namespace for a while.
func (w *world) settled(quiet time.Duration, excused ...string) {
	w.t.Helper()
	eventually(w.t, time.Minute, func() string {
		if writes := w.server.writes(w.t, w.namespace, time.Now().Add(-quiet), excused...); len(writes) > 0 {
			return fmt.Sprintf("%d writes to end, the last one: %s", len(writes), writes[len(writes)-1])
		}
		return ""
	})
}

// still fails the test if anybody but the excused writes to the namespace within a time.
func (w *world) still(during time.Duration, excused ...string) {
	w.t.Helper()
	since := time.Now()
	<-time.After(during) // what is observed is that nothing happens in it
	if writes := w.server.writes(w.t, w.namespace, since, excused...); len(writes) > 0 {
		w.t.Errorf("%d writes in a steady state, such as %s", len(writes), writes[0])
	}
}

func guildName(i int) string {
	return fmt.Sprintf("guild-%05d", i*7919%10007) // their order by name is not that of their age
}

func TestThousandGuildsOnTenShards(t *testing.T) {
	const shards, capacity, guilds = 10, 100, 1000
	w := newWorld(t)
	stop := w.operate()
	gitops := w.server.client(t, gitopsAgent)
	manifest := func(i int) *acv1.GuildApplyConfiguration {
		return acv1.Guild(guildName(i), w.namespace).WithSpec(acv1.GuildSpec().WithDisplayName(fmt.Sprintf("Guild %d", i)))
	}
	shardManifest := func(i int) *acv1.GuildShardApplyConfiguration {
		return acv1.GuildShard(fmt.Sprintf("shard-%d", i), w.namespace).
			WithSpec(acv1.GuildShardSpec().WithCapacity(acv1.ShardCapacity().WithGuilds(capacity)))
	}
	apply := func() {
		t.Helper()
		inParallel(t, shards, func(i int) error {
			return gitops.Apply(t.Context(), shardManifest(i), client.FieldOwner(gitopsAgent))
		})
		inParallel(t, guilds, func(i int) error {
			return gitops.Apply(t.Context(), manifest(i), client.FieldOwner(gitopsAgent))
		})
	}
	began := time.Now()
	apply()
	t.Logf("applied after %s", time.Since(began).Round(time.Millisecond))
	before := w.serving(guilds, 3*time.Minute)
	t.Logf("all serve after %s", time.Since(began).Round(time.Millisecond))

	perShard, ids := map[string]int{}, map[string]bool{}
	for _, p := range before {
		perShard[p.shard]++
		ids[p.id] = true
	}
	if len(ids) != guilds {
		t.Errorf("%d ids for %d guilds", len(ids), guilds)
	}
	for i := range shards {
		if n := perShard[fmt.Sprintf("shard-%d", i)]; n != capacity {
			t.Errorf("shard-%d has %d guilds, want %d", i, n, capacity)
		}
		s := w.shardIs(fmt.Sprintf("shard-%d", i), condSchedulable, "!"+reasonFull)
		if *s.Status.Guilds != capacity || *s.Status.CapacityFree != 0 {
			t.Errorf("%s says %d guilds, %d free", s.Name, *s.Status.Guilds, *s.Status.CapacityFree)
		}
	}
	if err := gitops.Apply(t.Context(), manifest(guilds), client.FieldOwner(gitopsAgent)); err != nil {
		t.Fatal(err)
	}
	w.guildIs(guildName(guilds), "!"+reasonShardsFull)
	w.settled(3 * time.Second)

	stop()
	w.operate()
	ctx, cancel := context.WithCancel(t.Context())
	var reapply sync.WaitGroup
	reapply.Go(func() {
		for ctx.Err() == nil {
			apply()
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	})
	w.still(20*time.Second, gitopsAgent)
	cancel()
	reapply.Wait()
	if diff := cmp.Diff(before, w.places(), cmp.AllowUnexported(place{})); diff != "" {
		t.Errorf("places (-before +after):\n%s", diff)
	}
}

func TestLostStatusComesBackFromTheShards(t *testing.T) {
	const guilds = 60
	w := newWorld(t)
	stop := w.operate()
	for i := range 3 {
		w.create(makeShard(w.namespace, fmt.Sprintf("shard-%d", i)).Capacity(20).Obj())
	}
	inParallel(t, guilds, func(i int) error {
		return w.client.Create(t.Context(), makeGuild(w.namespace, guildName(i)).Obj())
	})
	before := w.serving(guilds, time.Minute)
	w.settled(3 * time.Second)
	stop()

	w.node.mute("shard-1", true)
	inParallel(t, guilds, func(i int) error {
		g := new(v1.Guild)
		if err := w.client.Get(t.Context(), w.key(guildName(i)), g); err != nil {
			return err
		}
		g.Status = v1.GuildStatus{}
		return w.client.Status().Update(t.Context(), g)
	})
	w.operate()
	w.create(makeGuild(w.namespace, "late").Obj())
	g := w.guildIs(guildName(0), "!"+reasonInventoryIncomplete)
	if got := message(g.Status.Conditions, condReady); got != "the status was lost; waiting for reports of shard-1" {
		t.Errorf("the message is %q", got)
	}
	if g.Status.ID != "" || g.Status.Placement != nil {
		t.Errorf("it has id %q and placement %v before all shards have reported", g.Status.ID, g.Status.Placement)
	}

	w.node.mute("shard-1", false)
	after := w.serving(guilds, time.Minute)
	if diff := cmp.Diff(before, after, cmp.AllowUnexported(place{})); diff != "" {
		t.Errorf("places (-before +after):\n%s", diff)
	}
	// The 60 guilds fill the shards: a new one does not take the place of a lost one.
	w.guildIs("late", "!"+reasonShardsFull)
}

func TestDeletedShardDoesNotCountForTheInventory(t *testing.T) {
	w := newWorld(t)
	stop := w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj(), makeGuild(w.namespace, "lobby").Obj())
	w.guildIs("lobby", reasonServing)
	w.create(makeShard(w.namespace, "shard-b").Obj())
	w.shardIs("shard-b", condReady, reasonServing)
	before := w.places()
	w.settled(2 * time.Second)
	stop()
	w.node.mute("shard-b", true)
	g := w.guild("lobby")
	g.Status = v1.GuildStatus{}
	if err := w.client.Status().Update(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	w.operate()
	w.guildIs("lobby", "!"+reasonInventoryIncomplete)
	if err := w.client.Delete(t.Context(), w.shard("shard-b")); err != nil {
		t.Fatal(err)
	}
	w.guildIs("lobby", reasonServing)
	if diff := cmp.Diff(before, w.places(), cmp.AllowUnexported(place{})); diff != "" {
		t.Errorf("places (-before +after):\n%s", diff)
	}
}

func TestGuildOfADeletedShardIsPlacedAnew(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj(), makeGuild(w.namespace, "lobby").Obj(), makeGuild(w.namespace, "pinned").Pin("shard-a").Obj())
	lobby := w.guildIs("lobby", reasonServing)
	w.guildIs("pinned", reasonServing)
	w.create(makeShard(w.namespace, "shard-b").Obj())
	if err := w.client.Delete(t.Context(), w.shard("shard-a")); err != nil {
		t.Fatal(err)
	}
	pinned := w.guildIs("pinned", "!"+reasonShardMissing)
	moved := w.guildIs("lobby", reasonServing)
	if moved.Status.Placement.ShardName != "shard-b" || moved.Status.ID != lobby.Status.ID {
		t.Errorf("it is on %s with id %s; want shard-b and the old id %s", moved.Status.Placement.ShardName, moved.Status.ID, lobby.Status.ID)
	}

	// The same name with another uid is another shard; the pin leads there, under the old id.
	w.create(makeShard(w.namespace, "shard-a").Obj())
	again := w.guildIs("pinned", reasonServing)
	if again.Status.ID != pinned.Status.ID || again.Status.Placement.ShardUID != string(w.shard("shard-a").UID) {
		t.Errorf("it has id %s on %+v; want id %s", again.Status.ID, again.Status.Placement, pinned.Status.ID)
	}
}

func TestIDsAreUniqueInANamespace(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj(), makeGuild(w.namespace, "first").ID(guildID).Obj())
	w.guildIs("first", reasonServing)
	w.create(makeGuild(w.namespace, "second").ID(guildID).Obj())
	second := w.guildIs("second", "!"+reasonIDConflict)
	if got := reason(second.Status.Conditions, condAccepted); got != "!"+reasonIDConflict {
		t.Errorf("Accepted is %s", got)
	}
	if err := w.client.Delete(t.Context(), w.guild("first")); err != nil {
		t.Fatal(err)
	}
	if g := w.guildIs("second", reasonServing); g.Status.ID != guildID {
		t.Errorf("it has id %s", g.Status.ID)
	}
}
