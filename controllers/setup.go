package controllers

import (
	"context"
	"fmt"
	"net"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// Options of the operator.
type Options struct {
	// ShardImage runs in shards that name no image of their own.
	ShardImage string
	// Namespace that the operator runs in: shards let it, and it alone, read their reports.
	Namespace string
	// Lease is the name of the leader election's lease in that namespace; empty without leader election.
	Lease string
	// Clock and Dial are the real ones when absent.
	Clock clock.WithTicker
	Dial  func(ctx context.Context, network, address string) (net.Conn, error)
}

// CacheOptions are those of the manager that the controllers run in: of the kinds that others have
// as well, only the operator's own objects, and nothing that no controller has asked for.
func CacheOptions() cache.Options {
	own := cache.ByObject{Label: labels.SelectorFromSet(labels.Set{labelManagedBy: managedBy})}
	byObject := map[client.Object]cache.ByObject{}
	for _, obj := range ownKinds() {
		byObject[obj] = own
	}
	return cache.Options{
		ReaderFailOnMissingInformer: true,
		DefaultTransform:            cache.TransformStripManagedFields(),
		ByObject:                    byObject,
	}
}

// ownKinds are the built-in kinds that the operator watches.
func ownKinds() []client.Object {
	return []client.Object{
		new(corev1.Pod), new(corev1.Service), new(corev1.PersistentVolumeClaim), new(corev1.ServiceAccount),
		new(appsv1.StatefulSet), new(rbacv1.Role), new(rbacv1.RoleBinding), new(networkingv1.NetworkPolicy),
		// Endpoints have the labels of their Service.
		new(policyv1.PodDisruptionBudget), new(discoveryv1.EndpointSlice),
	}
}

// operator is all parts of it, connected.
type operator struct {
	inventory  *inventory
	poller     *poller
	placements *placementReconciler
	guilds     *guildReconciler
	namespaces *namespaceReconciler
	shards     *shardReconciler
	term       *leaderTerm

	guildTrigger, shardTrigger, placementTrigger *trigger
}

func newOperator(mgr ctrl.Manager, o Options) *operator {
	if o.Clock == nil {
		o.Clock = clock.RealClock{}
	}
	if o.Dial == nil {
		o.Dial = new(net.Dialer).DialContext
	}
	recorder := mgr.GetEventRecorder("guildhall")
	objects := applier{Client: mgr.GetClient(), live: mgr.GetAPIReader()}
	certs := &linkCerts{
		applier: objects, clock: o.Clock,
		authorities: map[string]authority{}, checked: map[types.NamespacedName]time.Time{},
	}
	op := &operator{
		inventory:    newInventory(),
		guildTrigger: new(trigger), shardTrigger: new(trigger), placementTrigger: new(trigger),
	}
	op.poller = newPoller(mgr.GetClient(), op.inventory, o.Clock, o.Dial)
	op.poller.told = op.spread
	op.term = &leaderTerm{live: mgr.GetAPIReader(), clock: o.Clock}
	if o.Lease != "" {
		op.term.lease = types.NamespacedName{Namespace: o.Namespace, Name: o.Lease}
	}
	op.placements = &placementReconciler{
		cache: mgr.GetClient(), live: mgr.GetAPIReader(), inventory: op.inventory, clock: o.Clock,
		ids:    &snowflake.Source{Now: o.Clock.Now},
		passes: op.placementTrigger, guilds: op.guildTrigger, shards: op.shardTrigger,
		ledgers: map[string]*ledger{},
	}
	op.guilds = &guildReconciler{
		Client: mgr.GetClient(), placements: op.placements, inventory: op.inventory, clock: o.Clock,
		recorder: recorder, hurry: op.poller.hurry, deleting: map[types.NamespacedName]sighting{},
		relays: &relays{
			applier: objects, certs: certs, inventory: op.inventory, clock: o.Clock, recorder: recorder, shardImage: o.ShardImage,
			orders: &orderDesk{term: op.term, post: op.poller.order},
			budget: &moveBudget{asks: map[string]map[types.UID]float64{}},
			states: map[types.UID]*relayState{},
		},
	}
	op.namespaces = &namespaceReconciler{
		applier: objects, operatorNamespace: o.Namespace, clock: o.Clock, certs: certs,
		shards: op.shardTrigger, states: map[string]namespaceState{},
	}
	op.shards = &shardReconciler{
		applier: objects, shardImage: o.ShardImage, namespaces: op.namespaces, placements: op.placements,
		inventory: op.inventory, clock: o.Clock, recorder: recorder, hurry: op.poller.hurry, certs: certs,
		rollouts: rolloutSlots{slots: map[string]rolloutSlot{}},
		figures:  figureTimes{times: map[types.UID]figuresWritten{}},
	}
	return op
}

// spread tells the reconcilers what a poll has brought.
func (op *operator) spread(shard types.NamespacedName, n news) {
	op.guildTrigger.wake(n.guilds...)
	if n.shard {
		op.shardTrigger.wake(shard)
	}
	if n.process {
		op.guildTrigger.wake(op.guilds.of(context.Background(), shard)...)
	}
	if n.identities {
		op.placements.reported(shard.Namespace)
	}
}

// Setup adds the controllers to a manager made with CacheOptions.
func Setup(ctx context.Context, mgr ctrl.Manager, o Options) error {
	op := newOperator(mgr, o)
	if err := mgr.GetFieldIndexer().IndexField(ctx, new(v1.Guild), guildShardIndex, func(obj client.Object) []string {
		if g, ok := obj.(*v1.Guild); ok && g.Status.Placement != nil {
			return []string{g.Status.Placement.ShardName}
		}
		return nil
	}); err != nil {
		return fmt.Errorf("indexing Guilds: %w", err)
	}
	// Informers of all kinds from the start, also while another is the leader: a follower is
	// ready when its caches are.
	for _, obj := range append(ownKinds(), new(v1.Guild), new(v1.GuildShard)) {
		if _, err := mgr.GetCache().GetInformer(ctx, obj, cache.BlockUntilSynced(false)); err != nil {
			return fmt.Errorf("watching %T: %w", obj, err)
		}
	}
	if err := mgr.Add(op.poller); err != nil {
		return fmt.Errorf("adding the poller: %w", err)
	}
	if err := mgr.Add(op.term); err != nil {
		return fmt.Errorf("adding the term: %w", err)
	}
	for name, setup := range map[string]func(ctrl.Manager) error{
		"placement": op.setupPlacement, "guild": op.setupGuilds,
		"guildshard": op.setupShards, "namespace": op.setupNamespaces,
	} {
		if err := setup(mgr); err != nil {
			return fmt.Errorf("adding controller %s: %w", name, err)
		}
	}
	return nil
}

// options of a controller. The plain queue: in the priority queue, what was added at the start
// keeps the lowest priority through its timers, and starves under steady traffic.
func options(workers int) controller.Options {
	return controller.Options{
		MaxConcurrentReconciles: workers,
		UsePriorityQueue:        new(false),
		// Per object; the usual bound of 10 a second over all objects would make a burst of
		// errors last for minutes.
		RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](retryBase, retryMax),
	}
}

func (op *operator) setupPlacement(mgr ctrl.Manager) error {
	h := namespaceHandler{delay: placementDelay, changed: placementMatters}
	return ctrl.NewControllerManagedBy(mgr).Named("placement").
		Watches(new(v1.Guild), h).
		Watches(new(v1.GuildShard), h).
		WatchesRawSource(op.placementTrigger).
		WithOptions(options(4)).
		Complete(op.placements)
}

func (op *operator) setupGuilds(mgr ctrl.Manager) error {
	ofShard := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, obj client.Object) []reconcile.Request {
		shard := client.ObjectKeyFromObject(obj)
		if _, ok := obj.(*corev1.Pod); ok {
			shard.Name = obj.GetLabels()[labelShard]
		}
		var requests []reconcile.Request
		for _, key := range op.guilds.of(ctx, shard) {
			requests = append(requests, reconcile.Request{NamespacedName: key})
		}
		return requests
	})
	return ctrl.NewControllerManagedBy(mgr).Named("guild").
		For(new(v1.Guild)).
		// A shard's own status says nothing that a Guild shows.
		Watches(new(v1.GuildShard), ofShard, builder.WithPredicates(predicate.Or(
			predicate.GenerationChangedPredicate{}, predicate.LabelChangedPredicate{}))).
		Watches(new(corev1.Pod), ofShard, builder.WithPredicates(labelled(labelShard), healthChanged())).
		Watches(new(corev1.Pod), handler.EnqueueRequestsFromMapFunc(guildOf), builder.WithPredicates(labelled(labelGuild), relayChanged())).
		Watches(new(corev1.Service), handler.EnqueueRequestsFromMapFunc(guildOf), builder.WithPredicates(labelled(labelGuild))).
		Watches(new(policyv1.PodDisruptionBudget), handler.EnqueueRequestsFromMapFunc(guildOf),
			builder.WithPredicates(labelled(labelGuild), predicate.GenerationChangedPredicate{})).
		Watches(new(discoveryv1.EndpointSlice), handler.EnqueueRequestsFromMapFunc(op.guildOfEndpoints), builder.WithPredicates(labelled(labelGuild))).
		WatchesRawSource(op.guildTrigger).
		WithOptions(options(16)).
		Complete(op.guilds)
}

func (op *operator) setupShards(mgr ctrl.Manager) error {
	ofShard := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, obj client.Object) []reconcile.Request {
		name := obj.GetLabels()[labelShard]
		if name == "" {
			return nil
		}
		return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: obj.GetNamespace(), Name: name}}}
	})
	return ctrl.NewControllerManagedBy(mgr).Named("guildshard").
		For(new(v1.GuildShard)).
		Watches(new(appsv1.StatefulSet), ofShard).
		Watches(new(corev1.Pod), ofShard).
		Watches(new(corev1.Service), ofShard).
		Watches(new(corev1.PersistentVolumeClaim), ofShard).
		WatchesRawSource(op.shardTrigger).
		WithOptions(options(8)).
		Complete(op.shards)
}

func (op *operator) setupNamespaces(mgr ctrl.Manager) error {
	common := builder.WithPredicates(predicate.NewPredicateFuncs(func(obj client.Object) bool {
		return obj.GetLabels()[labelShard] == "" && obj.GetLabels()[labelGuild] == ""
	}))
	ofNamespace := namespaceHandler{}
	return ctrl.NewControllerManagedBy(mgr).Named("namespace").
		Watches(new(v1.GuildShard), namespaceHandler{changed: commonObjectsMatter}).
		Watches(new(corev1.Service), ofNamespace, common).
		Watches(new(corev1.ServiceAccount), ofNamespace, common).
		Watches(new(rbacv1.Role), ofNamespace, common).
		Watches(new(rbacv1.RoleBinding), ofNamespace, common).
		Watches(new(networkingv1.NetworkPolicy), ofNamespace, common).
		WithOptions(options(4)).
		Complete(op.namespaces)
}

// healthChanged lets through what changes how well a pod is.
func healthChanged() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		was, ok1 := e.ObjectOld.(*corev1.Pod)
		is, ok2 := e.ObjectNew.(*corev1.Pod)
		return !ok1 || !ok2 || healthOf(was) != healthOf(is)
	}}
}

// labelled lets objects through that have a label.
func labelled(key string) predicate.Predicate {
	return predicate.NewPredicateFuncs(func(obj client.Object) bool { return obj.GetLabels()[key] != "" })
}

// relayChanged lets through what a relay's pod is marked with, and how well it is.
func relayChanged() predicate.Predicate {
	return predicate.Or(predicate.LabelChangedPredicate{}, healthChanged())
}

// guildOf is the Guild that controls an object.
func guildOf(_ context.Context, obj client.Object) []reconcile.Request {
	c := metav1.GetControllerOf(obj)
	if c == nil || c.Kind != "Guild" {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: obj.GetNamespace(), Name: c.Name}}}
}

// guildOfEndpoints is the Guild that controls the Service whose endpoints an object has.
func (op *operator) guildOfEndpoints(ctx context.Context, obj client.Object) []reconcile.Request {
	service := new(corev1.Service)
	key := types.NamespacedName{Namespace: obj.GetNamespace(), Name: obj.GetLabels()[discoveryv1.LabelServiceName]}
	if err := op.guilds.Get(ctx, key, service); err != nil {
		return nil
	}
	return guildOf(ctx, service)
}
