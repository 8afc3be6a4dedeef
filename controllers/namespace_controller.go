package controllers

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1 "guildhall.dev/guildhall/api/v1"
)

// keysCheck is how often the key set is looked at; Secrets are not watched, so that the operator
// needs no right to read others.
const keysCheck = 5 * time.Minute

// namespaceReconciler makes the objects that a namespace with GuildShards has once, and removes
// them, except the keys, after the last GuildShard.
type namespaceReconciler struct {
	applier
	operatorNamespace string
	clock             clock.PassiveClock
	certs             *linkCerts
	shards            *trigger // of shardReconciler

	mu     sync.Mutex
	states map[string]namespaceState
}

// namespaceState is what the shards of a namespace need to know.
type namespaceState struct {
	// ready: everything that a pod needs to start is there.
	ready bool
	// conflict says which object of a wanted name belongs to somebody else.
	conflict string
	// rejected says what the API server does not take.
	rejected string
}

var _ reconcile.Reconciler = (*namespaceReconciler)(nil)

// The operator grants shards what their Role says, so it must hold that itself: get, list and
// watch of guilds and guildshards.
// +kubebuilder:rbac:groups="",resources=serviceaccounts,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=rbac.authorization.k8s.io,resources=roles;rolebindings,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=networking.k8s.io,resources=networkpolicies,verbs=get;list;watch;create;patch;delete

// Reconcile implements reconcile.Reconciler for the namespace that the request names.
func (r *namespaceReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	namespace := req.Name
	var shards v1.GuildShardList
	if err := r.List(ctx, &shards, client.InNamespace(namespace), client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("listing GuildShards: %w", err)
	}
	alive, tls := 0, false
	for i := range shards.Items {
		if shards.Items[i].DeletionTimestamp == nil {
			alive++
			tls = tls || tlsSecret(&shards.Items[i]) != ""
		}
	}
	switch {
	case len(shards.Items) == 0:
		return ctrl.Result{}, r.cleanUp(ctx, namespace)
	case alive == 0:
		return ctrl.Result{}, nil // nothing is made any more, and pods still end
	}

	err := r.ensureAll(ctx, namespace, tls)
	state := namespaceState{ready: err == nil, rejected: rejection(err)}
	if conflict, ok := errors.AsType[*nameConflictError](err); ok {
		state.conflict = conflict.Error()
	}
	if r.setState(namespace, state) {
		if err := r.wakeShards(ctx, namespace); err != nil {
			return ctrl.Result{}, err
		}
	}
	switch {
	case namespaceEnding(err):
		return ctrl.Result{}, nil
	case state.conflict != "":
		return ctrl.Result{RequeueAfter: foreignRetry}, nil
	case err != nil:
		return ctrl.Result{}, err
	}
	return ctrl.Result{RequeueAfter: keysCheck}, nil
}

// wakeShards has the shards look at a new state. It lists them after the state is set: a shard
// that has seen none before is in the cache by now, and one that comes later finds it.
func (r *namespaceReconciler) wakeShards(ctx context.Context, namespace string) error {
	var shards v1.GuildShardList
	if err := r.List(ctx, &shards, client.InNamespace(namespace), client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("listing GuildShards: %w", err)
	}
	for i := range shards.Items {
		r.shards.wake(client.ObjectKeyFromObject(&shards.Items[i]))
	}
	return nil
}

func (r *namespaceReconciler) ensureAll(ctx context.Context, namespace string, tls bool) error {
	if err := r.ensureKeys(ctx, namespace); err != nil {
		return err
	}
	if err := r.certs.ensureAuthority(ctx, namespace); err != nil {
		return err
	}
	for _, o := range namespaceObjects(namespace, r.operatorNamespace, tls) {
		key := types.NamespacedName{Namespace: namespace, Name: o.name}
		if _, err := r.ensure(ctx, key, o.empty, o.desired, ""); err != nil {
			return err
		}
	}
	return nil
}

// cleanUp removes what a namespace without shards does not need. The keys stay: tokens and
// sessions outlive the shards.
func (r *namespaceReconciler) cleanUp(ctx context.Context, namespace string) error {
	// The cache may be late, and to remove a front door in use would cut its clients off.
	var shards v1.GuildShardList
	if err := r.live.List(ctx, &shards, client.InNamespace(namespace), client.Limit(1)); err != nil {
		return fmt.Errorf("listing GuildShards: %w", err)
	}
	if len(shards.Items) > 0 {
		return nil // its event is on the way
	}
	r.mu.Lock()
	delete(r.states, namespace)
	r.mu.Unlock()
	var failed []error
	for _, o := range namespaceObjects(namespace, r.operatorNamespace, false) {
		key := types.NamespacedName{Namespace: namespace, Name: o.name}
		failed = append(failed, r.remove(ctx, o.empty, key, ""))
	}
	return errors.Join(failed...)
}

// state returns what the last pass over a namespace has found, if there was one.
func (r *namespaceReconciler) state(namespace string) (namespaceState, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok := r.states[namespace]
	return s, ok
}

func (r *namespaceReconciler) setState(namespace string, s namespaceState) (changed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old, ok := r.states[namespace]
	r.states[namespace] = s
	return !ok || old != s
}

// commonObjectsMatter says whether an update of a GuildShard can change the namespace's objects.
func commonObjectsMatter(before, after client.Object) bool {
	return before.GetGeneration() != after.GetGeneration() ||
		(before.GetDeletionTimestamp() == nil) != (after.GetDeletionTimestamp() == nil)
}
