package controllers

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1 "guildhall.dev/guildhall/api/v1"
	acv1 "guildhall.dev/guildhall/api/v1/applyconfiguration/api/v1"
)

const (
	// deletionDeadline is how long an object that is being deleted waits for its shard or pod.
	deletionDeadline = 30 * time.Second
	// conflictDelay is the wait after a write on a stale object: the cache is about to catch up.
	conflictDelay = 20 * time.Millisecond
	retryBase     = 10 * time.Millisecond
	retryMax      = 30 * time.Second
	// guildShardIndex finds the Guilds of a shard.
	guildShardIndex = ".status.placement.shardName"
)

// guildReconciler carries out what the planner decides of a Guild and shows what its shard
// reports. It alone writes the status of Guilds.
type guildReconciler struct {
	client.Client
	placements *placementReconciler
	inventory  *inventory
	clock      clock.PassiveClock
	recorder   events.EventRecorder
	// hurry has a shard polled soon.
	hurry func(types.NamespacedName)
	// relays looks after the guilds' relays.
	relays *relays

	mu sync.Mutex
	// deleting has the time at which this process first saw a Guild being deleted.
	deleting map[types.NamespacedName]sighting
}

// sighting is when a process first saw something of an object.
type sighting struct {
	uid types.UID
	at  time.Time
}

var _ reconcile.Reconciler = (*guildReconciler)(nil)

// +kubebuilder:rbac:groups=guildhall.dev,resources=guilds,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=guildhall.dev,resources=guilds/status,verbs=patch
// +kubebuilder:rbac:groups=guildhall.dev,resources=guilds/finalizers,verbs=update
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// Reconcile implements reconcile.Reconciler.
func (r *guildReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	guild := new(v1.Guild)
	if err := r.Get(ctx, req.NamespacedName, guild); err != nil {
		r.forget(req.NamespacedName)
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if guild.DeletionTimestamp != nil {
		return retryOnConflict(r.reconcileDeleted(ctx, guild))
	}
	d, ok := r.placements.decision(guild.Namespace, guild.UID)
	if !ok {
		return ctrl.Result{}, nil // the planner wakes this reconciler
	}
	if d.placed() && !controllerutil.ContainsFinalizer(guild, finalizer) {
		// Before the place is written, so that no shard opens a guild which could vanish
		// unseen. The write comes back as an event.
		return retryOnConflict(ctrl.Result{}, addFinalizer(ctx, r.Client, guild))
	}
	if d.reason == reasonInventoryIncomplete {
		if wait := r.placements.grace(guild.Namespace); wait > 0 {
			return ctrl.Result{RequeueAfter: wait}, nil
		}
	}
	view, err := r.view(ctx, guild, d)
	if err != nil {
		return ctrl.Result{}, err
	}
	var failed error
	if d.placed() && view.shard != nil {
		view.relays, failed = r.relays.pass(ctx, &view)
	}
	status, recheck := guildStatus(view)
	if p := view.relays; p != nil && p.planned {
		recheck = soonest(recheck, p.wait)
	}
	if err := r.writeStatus(ctx, guild, status); err != nil {
		return retryOnConflict(ctrl.Result{}, err)
	}
	// A round is in the status before its first order goes out.
	r.relays.order(ctx, &view)
	return ctrl.Result{RequeueAfter: recheck}, failed
}

// view collects what the status depends on.
func (r *guildReconciler) view(ctx context.Context, guild *v1.Guild, d decision) (guildView, error) {
	v := guildView{guild: guild, decision: d, now: r.clock.Now()}
	if !d.placed() {
		return v, nil
	}
	key := types.NamespacedName{Namespace: guild.Namespace, Name: d.shard.name}
	shard := new(v1.GuildShard)
	if err := r.Get(ctx, key, shard); err == nil && shard.UID == d.shard.uid {
		v.shard = shard
	} else if client.IgnoreNotFound(err) != nil {
		return v, fmt.Errorf("reading GuildShard %s: %w", key.Name, err)
	}
	pod, err := podOf(ctx, r.Client, key)
	if err != nil {
		return v, err
	}
	v.health = healthOf(pod)
	v.linked = pod == nil || linked(pod)
	v.reports = r.inventory.shard(key, d.shard.uid, v.now)
	v.entry, v.reported = r.inventory.guild(key, d.shard.uid, guild.UID)
	return v, nil
}

// podOf reads the pod of a shard; nil when there is none.
func podOf(ctx context.Context, c client.Reader, shard types.NamespacedName) (*corev1.Pod, error) {
	pod := new(corev1.Pod)
	err := c.Get(ctx, types.NamespacedName{Namespace: shard.Namespace, Name: podName(shard.Name)}, pod)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the pod of shard %s: %w", shard.Name, err)
	}
	return pod, nil
}

// writeStatus applies a status that differs from the one in the cache.
func (r *guildReconciler) writeStatus(ctx context.Context, guild *v1.Guild, status v1.GuildStatus) error {
	if equality.Semantic.DeepEqual(guild.Status, status) {
		return nil
	}
	ac, err := convert[acv1.GuildStatusApplyConfiguration](status)
	if err != nil {
		return fmt.Errorf("converting the status: %w", err)
	}
	// The version makes a status that was computed from a stale one fail.
	apply := acv1.Guild(guild.Name, guild.Namespace).
		WithUID(guild.UID).WithResourceVersion(guild.ResourceVersion).WithStatus(ac)
	if err := r.Status().Apply(ctx, apply, client.FieldOwner(fieldManager), client.ForceOwnership); err != nil {
		return err
	}
	r.announce(ctx, guild, status)
	if p := status.Placement; p != nil && !meta.IsStatusConditionTrue(status.Conditions, condReady) {
		if old := guild.Status.Placement; old == nil || old.ShardUID != p.ShardUID {
			r.hurry(types.NamespacedName{Namespace: guild.Namespace, Name: p.ShardName})
		}
	}
	return nil
}

// announce records events of transitions.
func (r *guildReconciler) announce(ctx context.Context, guild *v1.Guild, status v1.GuildStatus) {
	was, is := guild.Status.Conditions, status.Conditions
	if placed := meta.FindStatusCondition(is, condPlaced); placed != nil && placed.Status == metav1.ConditionTrue &&
		(guild.Status.Placement == nil || guild.Status.Placement.ShardUID != status.Placement.ShardUID) {
		r.recorder.Eventf(guild, nil, corev1.EventTypeNormal, reasonPlaced, "Place", "Placed %s with id %s", placed.Message, status.ID)
	}
	before, now := meta.FindStatusCondition(was, condReady), meta.FindStatusCondition(is, condReady)
	if now == nil || before != nil && before.Status == now.Status && before.Reason == now.Reason {
		return
	}
	log.FromContext(ctx).V(1).Info("Guild changed", "ready", now.Status, "reason", now.Reason)
	switch {
	case now.Status == metav1.ConditionTrue:
		r.recorder.Eventf(guild, nil, corev1.EventTypeNormal, condReady, "Serve", "Clients can connect to %s", status.Gateway.URL)
	case now.Reason == reasonOpening || now.Reason == reasonDeleting || now.Reason == reasonInventoryIncomplete:
		if before != nil && before.Status == metav1.ConditionTrue {
			r.recorder.Eventf(guild, nil, corev1.EventTypeNormal, now.Reason, "Serve", "Not ready: %s", now.Message)
		}
	default:
		r.recorder.Eventf(guild, nil, corev1.EventTypeWarning, now.Reason, "Serve", "Not ready: %s", now.Message)
	}
}

// of lists the Guilds that are placed on a shard.
func (r *guildReconciler) of(ctx context.Context, shard types.NamespacedName) []types.NamespacedName {
	var guilds v1.GuildList
	if err := r.List(ctx, &guilds, client.InNamespace(shard.Namespace),
		client.MatchingFields{guildShardIndex: shard.Name}, client.UnsafeDisableDeepCopy); err != nil {
		log.FromContext(ctx).Error(err, "Listing the Guilds of a shard", "shard", shard.String())
		return nil
	}
	keys := make([]types.NamespacedName, len(guilds.Items))
	for i := range guilds.Items {
		keys[i] = client.ObjectKeyFromObject(&guilds.Items[i])
	}
	return keys
}
