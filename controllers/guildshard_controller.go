package controllers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
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
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1 "guildhall.dev/guildhall/api/v1"
	acv1 "guildhall.dev/guildhall/api/v1/applyconfiguration/api/v1"
	"guildhall.dev/guildhall/shardserver/linkcert"
)

// foreignRetry is how soon a shard looks again whether somebody else's object is gone: the
// operator watches only its own.
const foreignRetry = 30 * time.Second

// shardReconciler makes the objects of a GuildShard, rolls its pod and shows how it is.
type shardReconciler struct {
	applier
	shardImage string
	namespaces *namespaceReconciler
	placements *placementReconciler
	inventory  *inventory
	clock      clock.PassiveClock
	recorder   events.EventRecorder
	hurry      func(types.NamespacedName)
	certs      *linkCerts

	rollouts rolloutSlots
	figures  figureTimes
}

var _ reconcile.Reconciler = (*shardReconciler)(nil)

// +kubebuilder:rbac:groups=guildhall.dev,resources=guildshards,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=guildhall.dev,resources=guildshards/status,verbs=patch
// +kubebuilder:rbac:groups=guildhall.dev,resources=guildshards/finalizers,verbs=update
// +kubebuilder:rbac:groups=apps,resources=statefulsets,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups="",resources=services,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups="",resources=persistentvolumeclaims,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch;delete

// Reconcile implements reconcile.Reconciler.
func (r *shardReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	shard := new(v1.GuildShard)
	if err := r.Get(ctx, req.NamespacedName, shard); err != nil {
		if apierrors.IsNotFound(err) {
			r.rollouts.drop(req.Namespace, req.Name)
		}
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if shard.DeletionTimestamp != nil {
		return retryOnConflict(r.reconcileDeleted(ctx, shard))
	}
	if !controllerutil.ContainsFinalizer(shard, finalizer) {
		return retryOnConflict(ctrl.Result{}, addFinalizer(ctx, r.Client, shard))
	}
	common, ok := r.namespaces.state(shard.Namespace)
	if !ok {
		return ctrl.Result{}, nil // its pass wakes this reconciler
	}
	return retryOnConflict(r.reconcileShard(ctx, shard, common))
}

func (r *shardReconciler) reconcileShard(ctx context.Context, shard *v1.GuildShard, common namespaceState) (ctrl.Result, error) {
	f := shardFacts{
		shard: shard, now: r.clock.Now(), conflict: common.conflict, rejected: common.rejected,
		upToDate: isFalse(reasonNotMade, "the StatefulSet does not exist"),
	}
	key := client.ObjectKeyFromObject(shard)
	pod, err := podOf(ctx, r.Client, key)
	if err != nil {
		return ctrl.Result{}, err
	}

	var sts *appsv1.StatefulSet
	var retry time.Duration
	var failed []error
	phases := []func() error{
		func() error { return r.ensureServices(ctx, shard) },
		func() error { return r.ensureClaim(ctx, shard) },
		func() (err error) {
			if !common.ready {
				return nil // a pod without its ServiceAccount and keys could not start
			}
			id := linkcert.Identity{Namespace: shard.Namespace, Shard: shard.Name}
			if err := r.certs.ensure(ctx, shardLinkName(shard.Name), id, shardLabels(shard.Name), ownerOf(shard)); err != nil {
				return err
			}
			sts, err = r.ensureStatefulSet(ctx, shard)
			return err
		},
		func() (err error) {
			f.upToDate, retry, err = r.rollOut(ctx, shard, sts, pod)
			return err
		},
	}
	for _, phase := range phases {
		switch err := phase(); {
		case namespaceEnding(err):
			return ctrl.Result{}, nil
		case isNameConflict(err):
			conflict, _ := errors.AsType[*nameConflictError](err)
			f.conflict = conflict.Error()
		case err != nil:
			f.rejected = firstOf(f.rejected, rejection(err))
			failed = append(failed, err)
		}
	}

	f.health = healthOf(pod)
	f.reports = r.inventory.shard(key, shard.UID, f.now)
	if f.health.ready() && !meta.IsStatusConditionTrue(shard.Status.Conditions, condReady) {
		r.hurry(key) // another process may answer now than the one that is known
	}
	f.booked, f.counted = r.placements.booked(shard.Namespace, refOf(shard))
	f.written = r.figures.get(shard.UID)
	status, written, recheck := shardStatus(f)
	if err := r.writeStatus(ctx, shard, status); err != nil {
		failed = append(failed, err)
	} else {
		r.figures.set(shard.UID, written)
	}
	if len(failed) > 0 {
		return ctrl.Result{}, errors.Join(failed...)
	}
	if f.conflict != "" {
		retry = foreignRetry
	}
	if pod != nil && f.upToDate.reason == reasonWaitingToRoll && !f.health.ready() {
		retry = rolloutRetry
	}
	return ctrl.Result{RequeueAfter: soonest(recheck, retry)}, nil
}

// writeStatus applies a status that differs from the one in the cache.
func (r *shardReconciler) writeStatus(ctx context.Context, shard *v1.GuildShard, status v1.GuildShardStatus) error {
	if equality.Semantic.DeepEqual(shard.Status, status) {
		return nil
	}
	ac, err := convert[acv1.GuildShardStatusApplyConfiguration](status)
	if err != nil {
		return fmt.Errorf("converting the status: %w", err)
	}
	apply := acv1.GuildShard(shard.Name, shard.Namespace).
		WithUID(shard.UID).WithResourceVersion(shard.ResourceVersion).WithStatus(ac)
	if err := r.Status().Apply(ctx, apply, client.FieldOwner(fieldManager), client.ForceOwnership); err != nil {
		return err
	}
	before, now := meta.FindStatusCondition(shard.Status.Conditions, condReady), meta.FindStatusCondition(status.Conditions, condReady)
	if now == nil || before != nil && before.Status == now.Status && before.Reason == now.Reason {
		return nil
	}
	switch {
	case now.Status == metav1.ConditionTrue:
		r.recorder.Eventf(shard, nil, corev1.EventTypeNormal, condReady, "Serve", "The shard serves")
	case before != nil && before.Status == metav1.ConditionTrue,
		now.Reason == reasonImageNotFound, now.Reason == reasonNameConflict:
		r.recorder.Eventf(shard, nil, corev1.EventTypeWarning, now.Reason, "Serve", "Not ready: %s", now.Message)
	}
	return nil
}

// reconcileDeleted ends the pod and lets the GuildShard go when it has ended, or at the deadline:
// its guilds are placed anew when the GuildShard is gone, and should not be in two pods.
func (r *shardReconciler) reconcileDeleted(ctx context.Context, shard *v1.GuildShard) (ctrl.Result, error) {
	r.rollouts.drop(shard.Namespace, shard.Name)
	if !controllerutil.ContainsFinalizer(shard, finalizer) {
		return ctrl.Result{}, nil
	}
	r.figures.drop(shard.UID)
	now := r.clock.Now()
	key := client.ObjectKeyFromObject(shard)
	remaining := shard.DeletionTimestamp.Add(deletionDeadline).Sub(now)
	pod, err := podOf(ctx, r.Client, key)
	if err != nil {
		return ctrl.Result{}, err
	}
	orphaned := slices.Contains(shard.Finalizers, metav1.FinalizerOrphanDependents)
	if orphaned {
		return ctrl.Result{}, removeFinalizer(ctx, r.Client, shard)
	}
	if err := r.remove(ctx, new(appsv1.StatefulSet), key, shard.UID, client.PropagationPolicy(metav1.DeletePropagationBackground)); err != nil {
		return ctrl.Result{}, err
	}
	if pod == nil || remaining <= 0 {
		if err := r.removeOwned(ctx, shard); err != nil {
			return ctrl.Result{}, err
		}
		return ctrl.Result{}, removeFinalizer(ctx, r.Client, shard)
	}
	status := *shard.Status.DeepCopy()
	status.ObservedGeneration = shard.Generation
	w := conditionWriter{&status.Conditions, shard.Generation, now}
	f := shardFacts{shard: shard}
	f.setReady(w)
	w.set(condSchedulable, f.schedulable())
	return ctrl.Result{RequeueAfter: remaining}, r.writeStatus(ctx, shard, status)
}

// retryOnConflict tries again soon after a write on a stale object.
func retryOnConflict(result ctrl.Result, err error) (ctrl.Result, error) {
	switch {
	case apierrors.IsConflict(err):
		return ctrl.Result{RequeueAfter: conflictDelay}, nil
	case err != nil:
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	return result, nil
}

// soonest is the least of two waits, of which 0 is none.
func soonest(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
