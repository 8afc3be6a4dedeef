package controllers

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	v1 "guildhall.dev/guildhall/api/v1"
)

// shardRef names a GuildShard; one made anew under the same name is another.
type shardRef struct {
	name string
	uid  types.UID
}

func refOf(shard *v1.GuildShard) shardRef { return shardRef{name: shard.Name, uid: shard.UID} }

// booking is an id and a place on a shard. A guild whose shard is gone has an id alone.
type booking struct {
	id    string
	shard shardRef
}

// decision is what the planner says of one guild: a booking, or the reason why it has no place.
type decision struct {
	booking
	reason  string
	message string
}

func (d decision) placed() bool { return d.shard != shardRef{} }

// plannedShard is a GuildShard as the planner sees it.
type plannedShard struct {
	shardRef
	labels       labels.Set
	capacity     int
	availability v1.Availability
	deleting     bool
}

// plannedGuild is a Guild as the planner sees it.
type plannedGuild struct {
	uid     types.UID
	name    string
	created time.Time
	id      string // spec.id
	pin     string
	// selector allows the shards that match; nil allows all.
	selector labels.Selector
	// booked is what is known of its identity and place.
	booked booking
	// lost: it was placed once, and its status does not say where.
	lost     bool
	deleting bool
}

// placementInput is all that a placement depends on. The planner asks no clock and no client.
type placementInput struct {
	shards []plannedShard
	guilds []plannedGuild
	// reported are the guilds that shards say they hold.
	reported map[types.UID]booking
	// unreported are the names of shards that have not said what they hold.
	unreported []string
}

// planPlacement decides id and place of every guild of a namespace. Guilds that have a place keep
// it; the others get one in the order of their age, each on the shard with the most room. An id
// left empty is to be made. The order of the input does not matter.
func planPlacement(in placementInput) map[types.UID]decision {
	p := placementPlan{
		shards:    map[string]*shardPlan{},
		holders:   map[string]*plannedGuild{},
		decisions: make(map[types.UID]decision, len(in.guilds)),
	}
	for _, s := range in.shards {
		p.shards[s.name] = &shardPlan{plannedShard: s}
		p.order = append(p.order, p.shards[s.name])
	}
	slices.SortFunc(p.order, func(a, b *shardPlan) int { return cmp.Compare(a.name, b.name) })
	for _, name := range in.unreported {
		if s := p.shards[name]; s != nil {
			s.unreported = true
		}
	}

	guilds := make([]*plannedGuild, len(in.guilds))
	for i := range in.guilds {
		g := in.guilds[i]
		if r, ok := in.reported[g.uid]; ok && g.booked == (booking{}) && p.exists(r.shard) {
			if g.lost && len(in.unreported) > 0 {
				p.shards[r.shard.name].used++ // it will come back there
			} else {
				g.booked = r
			}
		}
		if g.lost && g.booked == (booking{}) && in.reported[g.uid] == (booking{}) {
			p.unfound++
		}
		if g.booked.shard != (shardRef{}) && !p.exists(g.booked.shard) {
			g.booked.shard = shardRef{} // its log ended with the shard
		}
		guilds[i] = &g
	}
	// Who was placed comes before who was not, then the older one.
	slices.SortFunc(guilds, func(a, b *plannedGuild) int {
		return cmp.Or(
			compareTrueFirst(a.booked.shard != shardRef{}, b.booked.shard != shardRef{}),
			compareTrueFirst(a.booked.id != "", b.booked.id != ""),
			a.created.Compare(b.created),
			cmp.Compare(a.name, b.name),
			cmp.Compare(a.uid, b.uid),
		)
	})
	for _, g := range guilds {
		p.decisions[g.uid] = p.decide(g, in.unreported)
	}
	return p.decisions
}

// placementPlan is a plan in the making.
type placementPlan struct {
	shards map[string]*shardPlan
	order  []*shardPlan
	// unfound guilds are lost, and no report has them: each unreported shard may.
	unfound   int
	holders   map[string]*plannedGuild
	decisions map[types.UID]decision
}

// shardPlan is a shard with the guilds that it gets.
type shardPlan struct {
	plannedShard
	used       int
	unreported bool
}

func (p *placementPlan) exists(s shardRef) bool {
	found, ok := p.shards[s.name]
	return ok && found.uid == s.uid
}

func (p *placementPlan) decide(g *plannedGuild, unreported []string) decision {
	d := decision{booking: booking{id: firstOf(g.booked.id, g.id)}}
	if d.id != "" {
		if holder := p.holders[d.id]; holder != nil {
			d.reason, d.message = reasonIDConflict, fmt.Sprintf("Guild %q has id %s", holder.name, d.id)
			d.id = ""
			return d
		}
		p.holders[d.id] = g
	}
	switch {
	case g.booked.shard != shardRef{}:
		d.shard = g.booked.shard
	case g.deleting:
		d.reason, d.message = reasonDeleting, "the Guild is being deleted"
	case g.lost && len(unreported) > 0:
		d.reason = reasonInventoryIncomplete
		d.message = "the status was lost; waiting for reports of " + someOf(unreported)
	default:
		d.shard, d.reason, d.message = p.place(g)
	}
	if d.placed() {
		p.shards[d.shard.name].used++
	} else if g.booked.id == "" {
		d.id = "" // given with the place
	}
	return d
}

// place finds the shard with the most room, or says why there is none.
func (p *placementPlan) place(g *plannedGuild) (best shardRef, reason, message string) {
	var alive, matching, active, most int
	for _, s := range p.order {
		if s.deleting {
			continue
		}
		alive++
		if g.pin != "" && s.name != g.pin || g.selector != nil && !g.selector.Matches(s.labels) {
			continue
		}
		matching++
		if s.availability != v1.ShardActive {
			continue
		}
		active++
		free := s.capacity - s.used
		if s.unreported {
			free -= p.unfound
		}
		if free > most {
			best, most = s.shardRef, free
		}
	}
	switch {
	case most > 0:
		return best, "", ""
	case alive == 0:
		return best, reasonNoShard, "the namespace has no GuildShard"
	case matching == 0 && g.pin != "":
		return best, reasonShardMissing, fmt.Sprintf("GuildShard %q, to which spec.placement.shardName pins it, does not exist", g.pin)
	case matching == 0:
		return best, reasonNoMatchingShard, "no GuildShard matches spec.placement.shardSelector"
	case active == 0:
		return best, reasonShardsCordoned, "every GuildShard that could hold it is Cordoned or Draining"
	}
	return best, reasonShardsFull, "every GuildShard that could hold it is full: raise spec.capacity.guilds or add a GuildShard"
}

// allows says whether a Guild's spec lets a shard hold it.
func allows(placement *v1.GuildPlacement, shard *v1.GuildShard) bool {
	switch {
	case placement == nil:
		return true
	case placement.ShardName != "":
		return placement.ShardName == shard.Name
	case placement.ShardSelector != nil:
		return selectorOf(placement.ShardSelector).Matches(labels.Set(shard.Labels))
	}
	return true
}

// selectorOf reads a label selector; one that makes no sense matches nothing.
func selectorOf(s *metav1.LabelSelector) labels.Selector {
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Nothing()
	}
	return selector
}

// someOf names the first few: a message must not grow with the namespace.
func someOf(names []string) string {
	const few = 3
	if len(names) <= few {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:few], ", "), len(names)-few)
}

func compareTrueFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}
