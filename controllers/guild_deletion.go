package controllers

import (
	"context"
	"fmt"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// reconcileDeleted lets a Guild go when its shard has let go of it, or at the deadline.
func (r *guildReconciler) reconcileDeleted(ctx context.Context, guild *v1.Guild) (ctrl.Result, error) {
	if !controllerutil.ContainsFinalizer(guild, finalizer) {
		return ctrl.Result{}, nil
	}
	now := r.clock.Now()
	seen := r.seenDeleting(guild, now)
	remaining := guild.DeletionTimestamp.Add(deletionDeadline).Sub(now)
	released, err := r.released(ctx, guild, seen)
	if err != nil {
		return ctrl.Result{}, err
	}
	if !slices.Contains(guild.Finalizers, metav1.FinalizerOrphanDependents) {
		if err := r.relays.remove(ctx, guild, guild.Status.ID); err != nil && remaining > 0 {
			return ctrl.Result{}, err
		}
	}
	if !released && remaining > 0 {
		// The poller wakes this reconciler when the report changes; a report without the guild
		// changes nothing, hence the timer.
		return ctrl.Result{RequeueAfter: min(remaining, 4*hurryInterval)}, r.writeStatus(ctx, guild, deletingStatus(guild, now))
	}
	if !released {
		log.FromContext(ctx).Info("The shard has not released the guild in time; letting it go", "deadline", deletionDeadline)
	}
	return ctrl.Result{}, removeFinalizer(ctx, r.Client, guild)
}

// released says whether no shard serves the guild any more.
func (r *guildReconciler) released(ctx context.Context, guild *v1.Guild, seen time.Time) (bool, error) {
	ref := shardRef{}
	if d, ok := r.placements.decision(guild.Namespace, guild.UID); ok && d.placed() {
		ref = d.shard
	} else if p := guild.Status.Placement; p != nil {
		ref = shardRef{name: p.ShardName, uid: types.UID(p.ShardUID)}
	}
	if ref == (shardRef{}) {
		return r.neverPlaced(ctx, guild)
	}
	key := types.NamespacedName{Namespace: guild.Namespace, Name: ref.name}
	shard := new(v1.GuildShard)
	if err := r.Get(ctx, key, shard); client.IgnoreNotFound(err) != nil {
		return false, fmt.Errorf("reading GuildShard %s: %w", key.Name, err)
	}
	if shard.UID != ref.uid {
		return true, nil
	}
	// Only a report that was asked for after the deletion counts: before, the guild may have
	// been about to open.
	reports := r.inventory.shard(key, ref.uid, r.clock.Now())
	g, reported := r.inventory.guild(key, ref.uid, guild.UID)
	if reports.freshness == fresh && reports.asked.After(seen) && !(reported && holdsDeleted(guild)(g)) {
		return true, nil
	}
	r.hurry(key)
	return false, nil
}

// neverPlaced says whether a guild without a place is on no shard: where its status was lost,
// only the shards know.
func (r *guildReconciler) neverPlaced(ctx context.Context, guild *v1.Guild) (bool, error) {
	if guild.Status.ID != "" {
		return true, nil
	}
	var shards v1.GuildShardList
	if err := r.List(ctx, &shards, client.InNamespace(guild.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return false, fmt.Errorf("listing GuildShards: %w", err)
	}
	var refs []shardRef
	for i := range shards.Items {
		refs = append(refs, refOf(&shards.Items[i]))
	}
	held, complete := r.inventory.holds(refs, guild.Namespace, guild.UID, holdsDeleted(guild))
	return complete && !held, nil
}

// holdsDeleted says whether a shard that reports a deleted guild is not yet done with it: it serves it, or has
// yet to erase its log.
func holdsDeleted(guild *v1.Guild) func(report.Guild) bool {
	return func(g report.Guild) bool {
		return g.State != report.Stored || guild.Spec.DeletionPolicy == v1.DeletionDelete
	}
}

// seenDeleting returns when this process first saw the Guild being deleted.
func (r *guildReconciler) seenDeleting(guild *v1.Guild, now time.Time) time.Time {
	key := client.ObjectKeyFromObject(guild)
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok := r.deleting[key]
	if !ok || s.uid != guild.UID {
		s = sighting{uid: guild.UID, at: now}
		r.deleting[key] = s
	}
	return s.at
}

func (r *guildReconciler) forget(guild types.NamespacedName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.deleting, guild)
}
