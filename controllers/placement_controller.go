package controllers

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

const (
	// placementDelay makes one pass of a burst of new guilds.
	placementDelay = 50 * time.Millisecond
	// inventoryGrace is how long a fresh leader collects reports before it calls them missing.
	inventoryGrace = 3 * time.Second
)

// placementReconciler is the one place where guilds are booked: a pass works on a whole
// namespace, and the queue never runs two passes of one namespace at once. Its ledger holds the
// bookings until the Guilds' status shows them, so a stale cache cannot book a slot twice. It
// writes nothing; guildReconciler carries its decisions out.
type placementReconciler struct {
	cache     client.Reader
	live      client.Reader
	inventory *inventory
	clock     clock.PassiveClock
	ids       *snowflake.Source

	passes *trigger // of this reconciler
	guilds *trigger // of guildReconciler
	shards *trigger // of shardReconciler

	mu      sync.Mutex
	ledgers map[string]*ledger
}

// ledger has the decisions of one namespace.
type ledger struct {
	started   time.Time
	decisions map[types.UID]decision
	counts    map[shardRef]int
	// gone are shards of whose end the server has been asked: the cache may only be late.
	gone map[types.UID]bool
	// waiting: a guild waits for the inventory.
	waiting bool
}

var _ reconcile.Reconciler = (*placementReconciler)(nil)

// Reconcile implements reconcile.Reconciler for the namespace that the request names.
func (r *placementReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	namespace := req.Name
	var guilds v1.GuildList
	if err := r.cache.List(ctx, &guilds, client.InNamespace(namespace), client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("listing Guilds: %w", err)
	}
	var shards v1.GuildShardList
	if err := r.cache.List(ctx, &shards, client.InNamespace(namespace), client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("listing GuildShards: %w", err)
	}
	if len(guilds.Items) == 0 && len(shards.Items) == 0 {
		r.drop(namespace)
		return ctrl.Result{}, nil
	}
	l := r.ledger(namespace)
	in := placementInput{}
	for i := range shards.Items {
		in.shards = append(in.shards, plan(&shards.Items[i]))
	}
	lost := false
	for i := range guilds.Items {
		g := r.guild(l, &guilds.Items[i])
		lost = lost || g.lost
		in.guilds = append(in.guilds, g)
	}
	r.setWaiting(l, lost) // before the inventory is read: a report after that asks for a pass
	in.unreported, in.reported = r.inventory.identities(namespace, reporters(in.shards))
	if err := r.confirmGone(ctx, namespace, l, &in); err != nil {
		return ctrl.Result{}, err
	}

	decisions := planPlacement(in)
	r.assignIDs(decisions, in)
	guildKeys, shardKeys := r.commit(l, decisions, guilds.Items)
	log.FromContext(ctx).V(2).Info("Planned", "guilds", len(decisions), "shards", len(in.shards), "changed", len(guildKeys))
	r.guilds.wake(guildKeys...)
	for _, name := range shardKeys {
		r.shards.wake(types.NamespacedName{Namespace: namespace, Name: name})
	}
	return ctrl.Result{}, nil
}

func plan(s *v1.GuildShard) plannedShard {
	return plannedShard{
		shardRef: refOf(s), labels: s.Labels, capacity: int(s.Spec.Capacity.Guilds),
		availability: availability(s), deleting: s.DeletionTimestamp != nil,
	}
}

// reporters are the shards whose inventory counts: one that is being deleted takes nothing back.
func reporters(shards []plannedShard) []shardRef {
	var out []shardRef
	for _, s := range shards {
		if !s.deleting {
			out = append(out, s.shardRef)
		}
	}
	return out
}

func (r *placementReconciler) guild(l *ledger, g *v1.Guild) plannedGuild {
	out := plannedGuild{
		uid: g.UID, name: g.Name, created: g.CreationTimestamp.Time,
		id: g.Spec.ID, deleting: g.DeletionTimestamp != nil,
	}
	if p := g.Spec.Placement; p != nil {
		out.pin = p.ShardName
		if p.ShardSelector != nil {
			out.selector = selectorOf(p.ShardSelector)
		}
	}
	d, known := r.lookup(l, g.UID)
	switch p := g.Status.Placement; {
	case known && d.booking != booking{}:
		out.booked = d.booking
	case p != nil && g.Status.ID != "":
		out.booked = booking{id: g.Status.ID, shard: shardRef{name: p.ShardName, uid: types.UID(p.ShardUID)}}
	case g.Status.ID != "":
		// Without a place and known to be: the operator keeps the id of a guild whose shard is gone.
		out.booked.id = g.Status.ID
	default:
		// The finalizer comes with the first booking, so one without it is new.
		out.lost = controllerutil.ContainsFinalizer(g, finalizer)
	}
	return out
}

// confirmGone asks the server about booked shards that the cache lacks: to place a guild anew
// ends its log, which a cache that is late must not cause.
func (r *placementReconciler) confirmGone(ctx context.Context, namespace string, l *ledger, in *placementInput) error {
	known := make(map[shardRef]bool, len(in.shards))
	for _, s := range in.shards {
		known[s.shardRef] = true
	}
	for _, g := range in.guilds {
		ref := g.booked.shard
		if ref == (shardRef{}) || known[ref] || l.gone[ref.uid] {
			continue
		}
		var shard v1.GuildShard
		err := r.live.Get(ctx, types.NamespacedName{Namespace: namespace, Name: ref.name}, &shard)
		switch {
		case apierrors.IsNotFound(err) || err == nil && shard.UID != ref.uid:
			l.gone[ref.uid] = true
		case err != nil:
			return fmt.Errorf("reading GuildShard %s: %w", ref.name, err)
		default:
			in.shards = slices.DeleteFunc(in.shards, func(s plannedShard) bool { return s.name == shard.Name })
			in.shards = append(in.shards, plan(&shard))
			known[ref] = true
		}
	}
	return nil
}

// assignIDs makes ids for guilds that got a place and have none.
func (r *placementReconciler) assignIDs(decisions map[types.UID]decision, in placementInput) {
	used := make(map[string]bool, len(in.guilds))
	for _, b := range in.reported {
		used[b.id] = true
	}
	for _, g := range in.guilds {
		used[g.id], used[g.booked.id] = true, true
	}
	for uid, d := range decisions {
		if !d.placed() || d.id != "" {
			continue
		}
		for d.id = r.ids.Next().String(); used[d.id]; {
			d.id = r.ids.Next().String()
		}
		used[d.id] = true
		decisions[uid] = d
	}
}

// commit makes the decisions the ledger's and returns the guilds and shards that they change.
func (r *placementReconciler) commit(l *ledger, decisions map[types.UID]decision, guilds []v1.Guild) (guildKeys []types.NamespacedName, shards []string) {
	counts := make(map[shardRef]int, len(l.counts))
	for _, d := range decisions {
		if d.placed() {
			counts[d.shard]++
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range guilds {
		g := &guilds[i]
		if old, ok := l.decisions[g.UID]; !ok || old != decisions[g.UID] {
			guildKeys = append(guildKeys, client.ObjectKeyFromObject(g))
		}
	}
	for s, n := range counts {
		if old, ok := l.counts[s]; !ok || old != n {
			shards = append(shards, s.name)
		}
	}
	for s := range l.counts {
		if _, ok := counts[s]; !ok {
			shards = append(shards, s.name)
		}
	}
	l.decisions, l.counts = decisions, counts
	return guildKeys, shards
}

func (r *placementReconciler) ledger(namespace string) *ledger {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.ledgers[namespace]
	if l == nil {
		l = &ledger{started: r.clock.Now(), gone: map[types.UID]bool{}}
		r.ledgers[namespace] = l
	}
	return l
}

// drop forgets a namespace that has nothing to place.
func (r *placementReconciler) drop(namespace string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.ledgers, namespace)
}

func (r *placementReconciler) lookup(l *ledger, guild types.UID) (decision, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d, ok := l.decisions[guild]
	return d, ok
}

func (r *placementReconciler) setWaiting(l *ledger, waiting bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l.waiting = waiting
}

// decision returns what was decided for a guild, if a pass has seen it.
func (r *placementReconciler) decision(namespace string, guild types.UID) (decision, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.ledgers[namespace]
	if l == nil {
		return decision{}, false
	}
	d, ok := l.decisions[guild]
	return d, ok
}

// grace is how long a missing inventory is not worth a word yet.
func (r *placementReconciler) grace(namespace string) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.ledgers[namespace]; l != nil {
		return l.started.Add(inventoryGrace).Sub(r.clock.Now())
	}
	return inventoryGrace
}

// booked counts the guilds on a shard, once a pass has run.
func (r *placementReconciler) booked(namespace string, shard shardRef) (int, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.ledgers[namespace]
	if l == nil || l.decisions == nil {
		return 0, false
	}
	return l.counts[shard], true
}

// reported asks for a pass when an inventory that guilds wait for has changed.
func (r *placementReconciler) reported(namespace string) {
	r.mu.Lock()
	l := r.ledgers[namespace]
	waiting := l != nil && l.waiting
	r.mu.Unlock()
	if waiting {
		r.passes.wakeAfter(placementDelay, namespaceKey(namespace))
	}
}

// placementMatters says whether an update of a Guild or a GuildShard can change a placement.
func placementMatters(before, after client.Object) bool {
	if before.GetGeneration() != after.GetGeneration() ||
		(before.GetDeletionTimestamp() == nil) != (after.GetDeletionTimestamp() == nil) {
		return true
	}
	if _, ok := after.(*v1.GuildShard); ok {
		return !maps.Equal(before.GetLabels(), after.GetLabels())
	}
	was, ok1 := before.(*v1.Guild)
	is, ok2 := after.(*v1.Guild)
	return ok1 && ok2 && was.Status.Placement != nil && is.Status.Placement == nil
}
