package controllers

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	v1 "guildhall.dev/guildhall/api/v1"
)

var birth = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

type plannedGuildBuilder struct{ plannedGuild }

// planGuild makes a guild whose age follows from its number.
func planGuild(n int) *plannedGuildBuilder {
	name := fmt.Sprintf("guild-%d", n)
	return &plannedGuildBuilder{plannedGuild{uid: types.UID(name), name: name, created: birth.Add(time.Duration(n) * time.Minute)}}
}

func (b *plannedGuildBuilder) ID(id string) *plannedGuildBuilder { b.id = id; return b }
func (b *plannedGuildBuilder) Pin(s string) *plannedGuildBuilder { b.pin = s; return b }
func (b *plannedGuildBuilder) Lost() *plannedGuildBuilder        { b.lost = true; return b }
func (b *plannedGuildBuilder) Deleting() *plannedGuildBuilder    { b.deleting = true; return b }
func (b *plannedGuildBuilder) Select(s string) *plannedGuildBuilder {
	b.selector, _ = labels.Parse(s)
	return b
}

func (b *plannedGuildBuilder) On(id, shard string) *plannedGuildBuilder {
	b.booked = booking{id: id, shard: planRef(shard)}
	return b
}

func planRef(name string) shardRef {
	if name == "" {
		return shardRef{}
	}
	return shardRef{name: name, uid: types.UID("uid-" + name)}
}

func planShard(name string, capacity int) plannedShard {
	return plannedShard{shardRef: planRef(name), capacity: capacity, availability: v1.ShardActive, labels: labels.Set{"zone": name[:1]}}
}

func TestPlanPlacement(t *testing.T) {
	cordoned := func(s plannedShard) plannedShard { s.availability = v1.ShardCordoned; return s }
	draining := func(s plannedShard) plannedShard { s.availability = v1.ShardDraining; return s }
	deleting := func(s plannedShard) plannedShard { s.deleting = true; return s }
	const id1, id2 = "100000000000000001", "100000000000000002"

	for name, tc := range map[string]struct {
		shards     []plannedShard
		guilds     []*plannedGuildBuilder
		reported   map[types.UID]booking
		unreported []string
		// want has shard and id, or the reason, by guild.
		want map[types.UID]string
	}{
		"without a shard nothing is placed": {
			guilds: []*plannedGuildBuilder{planGuild(1)},
			want:   map[types.UID]string{"guild-1": reasonNoShard},
		},
		"shards that are being deleted take nothing": {
			shards: []plannedShard{deleting(planShard("a", 5))},
			guilds: []*plannedGuildBuilder{planGuild(1)},
			want:   map[types.UID]string{"guild-1": reasonNoShard},
		},
		"the shard with the most room is first, then the name": {
			shards: []plannedShard{planShard("b", 3), planShard("c", 2), planShard("a", 2)},
			guilds: []*plannedGuildBuilder{planGuild(1), planGuild(2), planGuild(3), planGuild(4)},
			want:   map[types.UID]string{"guild-1": "b ", "guild-2": "a ", "guild-3": "b ", "guild-4": "c "},
		},
		"the older guild gets the last place": {
			shards: []plannedShard{planShard("a", 1)},
			guilds: []*plannedGuildBuilder{planGuild(2), planGuild(1)},
			want:   map[types.UID]string{"guild-1": "a ", "guild-2": reasonShardsFull},
		},
		"a pin is kept to, and a pin to nothing is said": {
			shards: []plannedShard{planShard("a", 1), planShard("b", 9)},
			guilds: []*plannedGuildBuilder{planGuild(1).Pin("a"), planGuild(2).Pin("c"), planGuild(3).Pin("a")},
			want:   map[types.UID]string{"guild-1": "a ", "guild-2": reasonShardMissing, "guild-3": reasonShardsFull},
		},
		"a selector is kept to, and one that nothing matches is said": {
			shards: []plannedShard{planShard("a", 1), planShard("b", 9)},
			guilds: []*plannedGuildBuilder{planGuild(1).Select("zone=a"), planGuild(2).Select("zone=z")},
			want:   map[types.UID]string{"guild-1": "a ", "guild-2": reasonNoMatchingShard},
		},
		"cordoned and draining shards keep what they have and take nothing": {
			shards: []plannedShard{cordoned(planShard("a", 9)), draining(planShard("b", 9))},
			guilds: []*plannedGuildBuilder{planGuild(1), planGuild(2).On(id1, "a"), planGuild(3).On(id2, "b")},
			want:   map[types.UID]string{"guild-1": reasonShardsCordoned, "guild-2": "a " + id1, "guild-3": "b " + id2},
		},
		"a guild stays where it is when its pin changes or the capacity shrinks": {
			shards: []plannedShard{planShard("a", 1), planShard("b", 9)},
			guilds: []*plannedGuildBuilder{planGuild(1).On(id1, "a").Pin("b"), planGuild(2).On(id2, "a")},
			want:   map[types.UID]string{"guild-1": "a " + id1, "guild-2": "a " + id2},
		},
		"a guild whose shard is gone keeps its id and gets another place": {
			shards: []plannedShard{planShard("b", 9)},
			guilds: []*plannedGuildBuilder{planGuild(1).On(id1, "a")},
			want:   map[types.UID]string{"guild-1": "b " + id1},
		},
		"a shard made anew under the same name is another one": {
			shards: []plannedShard{{shardRef: shardRef{"a", "other"}, capacity: 9, availability: v1.ShardActive}},
			guilds: []*plannedGuildBuilder{planGuild(1).On(id1, "a").Pin("a"), planGuild(2).On(id2, "a").Pin("b")},
			want:   map[types.UID]string{"guild-1": "a " + id1, "guild-2": reasonShardMissing + " " + id2},
		},
		"of two guilds with one id the older has it": {
			shards: []plannedShard{planShard("a", 9)},
			guilds: []*plannedGuildBuilder{planGuild(2).ID(id1), planGuild(1).ID(id1)},
			want:   map[types.UID]string{"guild-1": "a " + id1, "guild-2": reasonIDConflict},
		},
		"of two guilds with one id the placed one has it": {
			shards: []plannedShard{planShard("a", 9)},
			guilds: []*plannedGuildBuilder{planGuild(1).ID(id1), planGuild(2).On(id1, "a")},
			want:   map[types.UID]string{"guild-1": reasonIDConflict, "guild-2": "a " + id1},
		},
		"a lost guild waits for all reports, and its place is kept": {
			shards:     []plannedShard{planShard("a", 1), planShard("b", 1)},
			guilds:     []*plannedGuildBuilder{planGuild(1).Lost(), planGuild(2), planGuild(3)},
			reported:   map[types.UID]booking{"guild-1": {id1, planRef("a")}},
			unreported: []string{"b"},
			want:       map[types.UID]string{"guild-1": reasonInventoryIncomplete, "guild-2": "b ", "guild-3": reasonShardsFull},
		},
		"where a lost guild may be, its place is kept as well": {
			shards:     []plannedShard{planShard("a", 1), planShard("b", 2)},
			guilds:     []*plannedGuildBuilder{planGuild(1).Lost(), planGuild(2), planGuild(3)},
			unreported: []string{"a", "b"},
			want:       map[types.UID]string{"guild-1": reasonInventoryIncomplete, "guild-2": "b ", "guild-3": reasonShardsFull},
		},
		"a lost guild comes back where it was, even above the capacity": {
			shards:   []plannedShard{planShard("a", 1), planShard("b", 9)},
			guilds:   []*plannedGuildBuilder{planGuild(1).Lost(), planGuild(2).On(id2, "a")},
			reported: map[types.UID]booking{"guild-1": {id1, planRef("a")}},
			want:     map[types.UID]string{"guild-1": "a " + id1, "guild-2": "a " + id2},
		},
		"a lost guild that no shard has is placed as a new one": {
			shards: []plannedShard{planShard("a", 1)},
			guilds: []*plannedGuildBuilder{planGuild(1).Lost()},
			want:   map[types.UID]string{"guild-1": "a "},
		},
		"a guild that is being deleted gets no place and keeps the one it has": {
			shards: []plannedShard{planShard("a", 1), planShard("b", 1)},
			guilds: []*plannedGuildBuilder{planGuild(1).Deleting(), planGuild(2).On(id2, "a").Deleting(), planGuild(3)},
			want:   map[types.UID]string{"guild-1": reasonDeleting, "guild-2": "a " + id2, "guild-3": "b "},
		},
	} {
		t.Run(name, func(t *testing.T) {
			in := placementInput{shards: tc.shards, reported: tc.reported, unreported: tc.unreported}
			for _, g := range tc.guilds {
				in.guilds = append(in.guilds, g.plannedGuild)
			}
			got := map[types.UID]string{}
			for uid, d := range planPlacement(in) {
				switch {
				case d.placed():
					got[uid] = d.shard.name + " " + d.id
				case d.id != "":
					got[uid] = d.reason + " " + d.id
				default:
					got[uid] = d.reason
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("decisions (-want +got):\n%s", diff)
			}
		})
	}
}

func TestMessagesNameAFewShards(t *testing.T) {
	d := planPlacement(placementInput{
		shards:     []plannedShard{planShard("a", 1)},
		guilds:     []plannedGuild{planGuild(1).Lost().plannedGuild},
		unreported: []string{"a", "b", "c", "d", "e"},
	})["guild-1"]
	if want := "the status was lost; waiting for reports of a, b, c and 2 more"; d.message != want {
		t.Errorf("the message is %q, want %q", d.message, want)
	}
}

// drawInput makes any namespace.
func drawInput(t *rapid.T) placementInput {
	var in placementInput
	names := []string{"a", "b", "c", "d", "e"}
	for _, name := range names[:rapid.IntRange(0, 5).Draw(t, "shards")] {
		s := planShard(name, rapid.IntRange(1, 5).Draw(t, "capacity"))
		s.availability = rapid.SampledFrom([]v1.Availability{v1.ShardActive, v1.ShardActive, v1.ShardCordoned, v1.ShardDraining}).Draw(t, "availability")
		s.deleting = rapid.IntRange(0, 9).Draw(t, "deleting") == 0
		in.shards = append(in.shards, s)
		if rapid.IntRange(0, 4).Draw(t, "unreported") == 0 {
			in.unreported = append(in.unreported, name)
		}
	}
	in.reported = map[types.UID]booking{}
	for n := range rapid.IntRange(0, 25).Draw(t, "guilds") {
		g := planGuild(n)
		switch rapid.IntRange(0, 3).Draw(t, "wish") {
		case 0:
			g.Pin(rapid.SampledFrom(names).Draw(t, "pin"))
		case 1:
			g.Select("zone in (a,c)")
		}
		id := fmt.Sprintf("1000000000000000%02d", rapid.IntRange(0, 30).Draw(t, "id"))
		switch rapid.IntRange(0, 5).Draw(t, "past") {
		case 0:
			g.On(id, rapid.SampledFrom(names).Draw(t, "on"))
		case 1:
			g.Lost()
			in.reported[g.uid] = booking{id, planRef(rapid.SampledFrom(names).Draw(t, "reported"))}
		case 2:
			g.Lost()
		case 3:
			g.ID(id)
		}
		g.deleting = rapid.IntRange(0, 9).Draw(t, "guild deleting") == 0
		in.guilds = append(in.guilds, g.plannedGuild)
	}
	return in
}

func TestPlacementProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawInput(t)
		plan := planPlacement(in)
		if len(plan) != len(in.guilds) {
			t.Fatalf("%d decisions for %d guilds", len(plan), len(in.guilds))
		}
		shards := map[shardRef]plannedShard{}
		for _, s := range in.shards {
			shards[s.shardRef] = s
		}
		kept, used, ids := map[shardRef]int{}, map[shardRef]int{}, map[string]string{}
		for _, g := range in.guilds {
			d := plan[g.uid]
			if d.placed() == (d.reason != "") {
				t.Fatalf("%s: %+v is neither a place nor a reason", g.name, d)
			}
			if d.id != "" && ids[d.id] != "" {
				t.Fatalf("%s and %s both have id %s", g.name, ids[d.id], d.id)
			}
			if d.id != "" {
				ids[d.id] = g.name
			}
			if !d.placed() {
				continue
			}
			s, ok := shards[d.shard]
			if !ok {
				t.Fatalf("%s is placed on %v, which does not exist", g.name, d.shard)
			}
			used[d.shard]++
			if d.shard == g.booked.shard || d.shard == in.reported[g.uid].shard {
				kept[d.shard]++
				continue
			}
			if s.deleting || s.availability != v1.ShardActive || g.deleting {
				t.Fatalf("%s is new on %+v", g.name, s)
			}
			if g.pin != "" && g.pin != s.name || g.selector != nil && !g.selector.Matches(s.labels) {
				t.Fatalf("%s is on %s against its wish", g.name, s.name)
			}
		}
		for ref, n := range used {
			if n > max(shards[ref].capacity, kept[ref]) {
				t.Fatalf("shard %s has %d guilds, capacity %d, %d were there", ref.name, n, shards[ref].capacity, kept[ref])
			}
		}
	})
}

func TestPlacementIsStable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawInput(t)
		plan := planPlacement(in)
		for i := range in.guilds {
			if d := plan[in.guilds[i].uid]; d.placed() {
				if d.id == "" {
					d.id = fmt.Sprintf("2000000000000000%02d", i)
				}
				in.guilds[i].booked, in.guilds[i].lost = d.booking, false
				plan[in.guilds[i].uid] = d
			}
		}
		for uid, d := range planPlacement(in) {
			if plan[uid].placed() && d.booking != plan[uid].booking {
				t.Fatalf("%s moves from %+v to %+v", uid, plan[uid], d)
			}
		}
	})
}

func TestPlacementDoesNotDependOnOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawInput(t)
		shuffled := in
		shuffled.guilds = rapid.Permutation(in.guilds).Draw(t, "guild order")
		shuffled.shards = rapid.Permutation(in.shards).Draw(t, "shard order")
		if diff := cmp.Diff(planPlacement(in), planPlacement(shuffled), cmp.AllowUnexported(decision{}, booking{}, shardRef{})); diff != "" {
			t.Fatalf("the order matters:\n%s", diff)
		}
	})
}

func BenchmarkPlanPlacement(b *testing.B) {
	var in placementInput
	for s := range 1000 {
		in.shards = append(in.shards, planShard(fmt.Sprintf("shard-%d", s), 20))
	}
	for n := range 10000 {
		in.guilds = append(in.guilds, planGuild(n).plannedGuild)
	}
	b.Run("10,000 new guilds on 1,000 shards", func(b *testing.B) {
		for b.Loop() {
			planPlacement(in)
		}
	})
	for i, d := range planPlacement(in) {
		for g := range in.guilds {
			if in.guilds[g].uid == i {
				in.guilds[g].booked = d.booking
				break
			}
		}
	}
	b.Run("10,000 placed guilds on 1,000 shards", func(b *testing.B) {
		for b.Loop() {
			planPlacement(in)
		}
	})
}
