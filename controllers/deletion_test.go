package controllers

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	clocktesting "k8s.io/utils/clock/testing"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// bench has reconcilers that a test calls itself, with a clock that it moves.
type bench struct {
	t         *testing.T
	client    client.Client
	namespace string
	clock     *clocktesting.FakeClock
	inventory *inventory
	hurried   int
}

func newBench(t *testing.T) *bench {
	t.Helper()
	s := server(t)
	return &bench{
		t: t, client: s.client(t, testAgent), namespace: s.namespace(t),
		clock: clocktesting.NewFakeClock(time.Now()), inventory: newInventory(),
	}
}

func (b *bench) guilds() *guildReconciler {
	return &guildReconciler{
		Client: b.client, inventory: b.inventory, clock: b.clock, recorder: events.NewFakeRecorder(100),
		placements: &placementReconciler{ledgers: map[string]*ledger{}, clock: b.clock},
		hurry:      func(types.NamespacedName) { b.hurried++ },
		deleting:   map[types.NamespacedName]sighting{},
		relays: &relays{
			applier: b.objects(), certs: b.certs(), inventory: b.inventory, clock: b.clock, recorder: events.NewFakeRecorder(100),
			budget: &moveBudget{asks: map[string]map[types.UID]float64{}}, states: map[types.UID]*relayState{},
			orders: &orderDesk{term: new(leaderTerm)},
		},
	}
}

func (b *bench) objects() applier { return applier{Client: b.client, live: b.client} }

func (b *bench) certs() *linkCerts {
	return &linkCerts{
		applier: b.objects(), clock: b.clock,
		authorities: map[string]authority{}, checked: map[types.NamespacedName]time.Time{},
	}
}

func (b *bench) shards() *shardReconciler {
	return &shardReconciler{
		applier: b.objects(), clock: b.clock, recorder: events.NewFakeRecorder(100),
		certs: b.certs(), inventory: b.inventory, rollouts: rolloutSlots{slots: map[string]rolloutSlot{}},
		figures: figureTimes{times: map[types.UID]figuresWritten{}},
	}
}

// deletedGuild is one that was placed on a shard and is being deleted.
func (b *bench) deletedGuild(shard shardRef) *v1.Guild {
	b.t.Helper()
	g := makeGuild(b.namespace, "lobby").Obj()
	g.Finalizers = []string{finalizer}
	if err := b.client.Create(b.t.Context(), g); err != nil {
		b.t.Fatal(err)
	}
	if shard.name != "" {
		g.Status.ID = guildID
		g.Status.Placement = &v1.GuildPlacementStatus{ShardName: shard.name, ShardUID: string(shard.uid)}
		if err := b.client.Status().Update(b.t.Context(), g); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := b.client.Delete(b.t.Context(), g); err != nil {
		b.t.Fatal(err)
	}
	if err := b.client.Get(b.t.Context(), client.ObjectKeyFromObject(g), g); err != nil {
		b.t.Fatal(err)
	}
	b.clock.SetTime(g.DeletionTimestamp.Time)
	return g
}

func (b *bench) shard() *v1.GuildShard {
	b.t.Helper()
	s := makeShard(b.namespace, "shard-a").Obj()
	s.Finalizers = []string{finalizer}
	if err := b.client.Create(b.t.Context(), s); err != nil {
		b.t.Fatal(err)
	}
	return s
}

// reconcile makes one pass, and says whether the object is still there.
func (b *bench) reconcile(r reconcile.Reconciler, obj client.Object) (there bool, result ctrl.Result) {
	b.t.Helper()
	result, err := r.Reconcile(b.t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(obj)})
	if err != nil {
		b.t.Fatal(err)
	}
	err = b.client.Get(b.t.Context(), client.ObjectKeyFromObject(obj), obj)
	if err != nil && !apierrors.IsNotFound(err) {
		b.t.Fatal(err)
	}
	return err == nil, result
}

func TestGuildGoesAtTheDeadlineWhenItsShardDoesNotAnswer(t *testing.T) {
	b := newBench(t)
	shard := b.shard()
	g := b.deletedGuild(refOf(shard))
	r := b.guilds()
	there, result := b.reconcile(r, g)
	if !there || result.RequeueAfter <= 0 || b.hurried == 0 {
		t.Fatalf("there: %t, next pass in %s, hurried %d times; want it to wait for the shard", there, result.RequeueAfter, b.hurried)
	}
	if got := reason(g.Status.Conditions, condReady); got != "!"+reasonDeleting {
		t.Errorf("Ready is %s", got)
	}
	b.clock.Step(29 * time.Second)
	if there, _ = b.reconcile(r, g); !there {
		t.Fatal("it went before the deadline")
	}
	b.clock.Step(time.Second)
	if there, _ = b.reconcile(r, g); there {
		t.Error("it is still there after the deadline")
	}
}

func TestGuildGoesAtOnceWhenItsShardIsGone(t *testing.T) {
	b := newBench(t)
	if there, _ := b.reconcile(b.guilds(), b.deletedGuild(shardRef{"shard-a", "uid"})); there {
		t.Error("it is still there")
	}
}

func TestGuildGoesWhenAReportAfterTheDeletionLacksIt(t *testing.T) {
	b := newBench(t)
	shard := b.shard()
	g := b.deletedGuild(refOf(shard))
	key := client.ObjectKeyFromObject(shard)
	take := func(guilds ...report.Guild) {
		b.inventory.take(key, shard.UID, &report.Report{BootID: "b", Complete: true, Guilds: guilds}, b.clock.Now(), b.clock.Now())
	}
	b.inventory.listen(key, shard.UID, b.clock.Now())
	take()
	r := b.guilds()
	if there, _ := b.reconcile(r, g); !there {
		t.Fatal("a report from before the deletion has let it go")
	}
	b.clock.Step(time.Second)
	take(report.Guild{UID: string(g.UID)})
	if there, _ := b.reconcile(r, g); !there {
		t.Fatal("it went while the shard still had it")
	}
	b.clock.Step(time.Second)
	take()
	if there, _ := b.reconcile(r, g); there {
		t.Error("it is still there")
	}
}

func TestGuildWithoutStatusWaitsForTheInventoryWhenDeleted(t *testing.T) {
	b := newBench(t)
	shard := b.shard()
	g := b.deletedGuild(shardRef{})
	r := b.guilds()
	if there, _ := b.reconcile(r, g); !there {
		t.Fatal("it went although a shard may hold it")
	}
	key := client.ObjectKeyFromObject(shard)
	b.inventory.listen(key, shard.UID, b.clock.Now())
	b.inventory.take(key, shard.UID, &report.Report{BootID: "b", Complete: true}, b.clock.Now(), b.clock.Now())
	if there, _ := b.reconcile(r, g); there {
		t.Error("it is still there although no shard holds it")
	}
}

func TestShardGoesAtTheDeadlineWhenItsPodDoesNotEnd(t *testing.T) {
	b := newBench(t)
	shard := b.shard()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: b.namespace, Name: "shard-a-0"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	if err := b.client.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	if err := b.client.Delete(t.Context(), shard); err != nil {
		t.Fatal(err)
	}
	r := b.shards()
	there, result := b.reconcile(r, shard)
	if !there || result.RequeueAfter <= 0 {
		t.Fatalf("there: %t, next pass in %s; want it to wait for the pod", there, result.RequeueAfter)
	}
	if got := reason(shard.Status.Conditions, condReady); got != "!"+reasonDeleting {
		t.Errorf("Ready is %s", got)
	}
	b.clock.SetTime(shard.DeletionTimestamp.Add(deletionDeadline))
	if there, _ = b.reconcile(r, shard); there {
		t.Error("it is still there after the deadline")
	}
}

func TestShardGoesWhenItsPodIsGone(t *testing.T) {
	b := newBench(t)
	shard := b.shard()
	if err := b.client.Delete(t.Context(), shard); err != nil {
		t.Fatal(err)
	}
	if there, _ := b.reconcile(b.shards(), shard); there {
		t.Error("it is still there")
	}
}
