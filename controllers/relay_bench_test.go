package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	clocktesting "k8s.io/utils/clock/testing"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// relayBench is a bench with a guild, lobby on shard-a, whose reconciler the test calls: relays take their time, of
// which a fake clock has plenty. It plays the kubelet and the controller of endpoints between the passes.
//
// A pass every slowPace is enough where nothing happens for long: reports are still fresh.
type relayBench struct {
	*bench
	*audience
	t      *testing.T
	clock  *clocktesting.FakeClock
	shard  *v1.GuildShard
	guilds *guildReconciler
	// silent: the shard does not report.
	silent bool
	// becomes says what happens to a pod: PodRunning, when absent, makes it ready, PodUnknown not ready.
	becomes func(*corev1.Pod) corev1.PodPhase
	// made are all relays that there have ever been.
	made map[string]bool
	// pace is the time between two passes.
	pace time.Duration
	// each is called after each pass.
	each func(*v1.Guild)
}

const slowPace = 4 * planInterval

// newRelayBench makes a guild of small relays, with the changes of a test.
func newRelayBench(t *testing.T, changes ...func(*guildBuilder)) *relayBench {
	t.Helper()
	b := &relayBench{t: t, bench: newBench(t), made: map[string]bool{}, pace: planInterval}
	b.clock = b.bench.clock
	b.client, b.audience = server(t).clientAt(t, b.clock), newAudience(t, b.clock)
	b.shard = b.bench.shard()
	if err := b.certs().ensureAuthority(t.Context(), b.namespace); err != nil {
		t.Fatal(err)
	}
	b.makeShardPod()
	guild := makeGuild(b.namespace, "lobby").ID(guildID).Relays(v1.GuildRelays{
		SessionsPerRelay: 100, MaxReplicas: 5, StabilizationSeconds: &v1.RelayStabilization{Down: 20},
	})
	guild.Spec.Rebalance = &v1.GuildRebalance{MinSkewSessions: 5, MaxMovesPerSecond: 100}
	for _, change := range changes {
		change(guild)
	}
	b.create(guild.Obj())
	b.restart()
	return b
}

func (b *relayBench) create(obj client.Object) {
	b.t.Helper()
	if err := b.client.Create(b.t.Context(), obj); err != nil {
		b.t.Fatal(err)
	}
}

// makeShardPod makes the pod of the shard, as its StatefulSet would.
func (b *relayBench) makeShardPod() {
	t := b.t
	t.Helper()
	template, err := podTemplate(b.shard, testImage)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := convert[corev1.Pod](template)
	if err != nil {
		t.Fatal(err)
	}
	pod.Namespace, pod.Name, pod.Spec.ServiceAccountName = b.namespace, podName(b.shard.Name), ""
	b.create(pod)
	b.setShardReady(true)
}

func (b *relayBench) setShardReady(ready bool) {
	b.t.Helper()
	pod := new(corev1.Pod)
	b.read(podName(b.shard.Name), pod)
	if err := b.setReady(pod, corev1.PodRunning, ready); err != nil {
		b.t.Fatal(err)
	}
}

func (b *relayBench) setReady(pod *corev1.Pod, phase corev1.PodPhase, ready bool) error {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	if podReady(pod) == ready && pod.Status.Phase == phase {
		return nil
	}
	base := pod.DeepCopy()
	pod.Status.Phase = phase
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: status, LastTransitionTime: metav1.NewTime(b.clock.Now())}}
	return b.client.Status().Patch(b.t.Context(), pod, client.MergeFrom(base))
}

// restart has another process work from now on, which remembers nothing.
func (b *relayBench) restart() {
	b.t.Helper()
	b.inventory = newInventory()
	b.inventory.listen(client.ObjectKeyFromObject(b.shard), b.shard.UID, b.clock.Now())
	r := b.bench.guilds()
	r.placements = &placementReconciler{
		cache: b.client, live: b.client, inventory: b.inventory, clock: b.clock,
		passes: new(trigger), guilds: new(trigger), shards: new(trigger), ledgers: map[string]*ledger{},
	}
	r.relays.shardImage = testImage
	r.relays.orders.post = func(_ context.Context, _ types.NamespacedName, _ types.UID, o *report.Orders) error {
		return b.take(o, roundOf(b.guild()))
	}
	r.relays.orders.term.value.Store(b.clock.Now().UnixNano())
	b.guilds = r
	if _, err := r.placements.Reconcile(b.t.Context(), ctrl.Request{NamespacedName: namespaceKey(b.namespace)}); err != nil {
		b.t.Fatal(err)
	}
	b.pass() // sets the finalizer, the first time
}

// read reads an object by its name.
func (b *relayBench) read(name string, obj client.Object) {
	b.t.Helper()
	if err := b.client.Get(b.t.Context(), b.key(name), obj); err != nil {
		b.t.Fatal(err)
	}
}

// absent fails the test if there is an object of that name.
func (b *relayBench) absent(name string, obj client.Object) {
	b.t.Helper()
	if err := b.client.Get(b.t.Context(), b.key(name), obj); !apierrors.IsNotFound(err) {
		b.t.Errorf("reading %T %s: %v", obj, name, err)
	}
}

func (b *relayBench) key(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: b.namespace, Name: name}
}

func (b *relayBench) guild() *v1.Guild {
	b.t.Helper()
	g := new(v1.Guild)
	b.read("lobby", g)
	return g
}

// leadsTo is what the guild's Service selects.
func (b *relayBench) leadsTo() string {
	b.t.Helper()
	s := new(corev1.Service)
	b.read(relaysName(guildID), s)
	return s.Spec.Selector[labelComponent]
}

// change changes the Guild as a user does, and changeShard its shard.
func (b *relayBench) change(change func(*v1.Guild)) {
	b.t.Helper()
	g := b.guild()
	base := g.DeepCopy()
	change(g)
	if err := b.client.Patch(b.t.Context(), g, client.MergeFrom(base)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *relayBench) changeShard(change func(*v1.GuildShard)) {
	b.t.Helper()
	base := b.shard.DeepCopy()
	change(b.shard)
	if err := b.client.Patch(b.t.Context(), b.shard, client.MergeFrom(base)); err != nil {
		b.t.Fatal(err)
	}
}

// pods are the relays that are there, by name.
func (b *relayBench) pods() []*corev1.Pod {
	b.t.Helper()
	var list corev1.PodList
	if err := b.client.List(b.t.Context(), &list, client.InNamespace(b.namespace), client.MatchingLabels(relaySelector(guildID))); err != nil {
		b.t.Fatal(err)
	}
	pods := make([]*corev1.Pod, len(list.Items))
	for i := range list.Items {
		pods[i] = &list.Items[i]
	}
	return pods
}

// doom has something happen to some pods, and nothing to the others.
func (b *relayBench) doom(phase corev1.PodPhase, pods ...*corev1.Pod) {
	doomed := map[string]bool{}
	for _, pod := range pods {
		doomed[pod.Name] = true
	}
	was := b.becomes
	b.becomes = func(pod *corev1.Pod) corev1.PodPhase {
		switch {
		case doomed[pod.Name]:
			return phase
		case was != nil:
			return was(pod)
		}
		return corev1.PodRunning
	}
}

// always has the same happen to all pods.
func always(phase corev1.PodPhase) func(*corev1.Pod) corev1.PodPhase {
	return func(*corev1.Pod) corev1.PodPhase { return phase }
}

// pass has the shard report and the guild reconciled.
func (b *relayBench) pass() *v1.Guild {
	b.t.Helper()
	g := b.guild()
	if now := b.clock.Now(); !b.silent {
		entry := report.Guild{
			UID: string(g.UID), Namespace: g.Namespace, Name: g.Name, ID: guildID, State: report.Serving, LogID: "log", Epoch: 1,
		}
		relays, load := b.report(&entry)
		b.inventory.take(client.ObjectKeyFromObject(b.shard), b.shard.UID, &report.Report{
			BootID: "boot", Complete: true, Guilds: []report.Guild{entry}, Relays: relays, Load: load,
		}, now, now)
	}
	b.reconcile(b.guilds, g)
	b.saw(g)
	return g
}

// step lets the time until the next pass go by.
func (b *relayBench) step() *v1.Guild {
	b.t.Helper()
	b.clock.Step(b.pace)
	b.play()
	g := b.pass()
	b.play()
	if b.each != nil {
		b.each(g)
	}
	return g
}

// until lets time go by until check has nothing left to wait for, and returns the Guild.
func (b *relayBench) until(limit time.Duration, check func(*v1.Guild) (waitingFor string)) *v1.Guild {
	b.t.Helper()
	for end := b.clock.Now().Add(limit); ; {
		g := b.step()
		waiting := check(g)
		if waiting == "" {
			return g
		}
		if b.clock.Now().After(end) {
			status, _ := json.MarshalIndent(g.Status, "", "  ")
			b.t.Fatalf("after %s still waiting for %s; sessions %v, status %s", limit, waiting, b.counts(), status)
		}
	}
}

// during lets time go by, with a look after each pass.
func (b *relayBench) during(span time.Duration, look func(*v1.Guild)) {
	b.t.Helper()
	for end := b.clock.Now().Add(span); b.clock.Now().Before(end); {
		look(b.step())
	}
}

// relayed says what is missing until a guild has so many relays, and all is at rest on them.
func (b *relayBench) relayed(relays int32) func(*v1.Guild) string {
	return func(g *v1.Guild) string {
		s := g.Status.Relays
		progress, balance := reason(g.Status.Conditions, condProgressing), reason(g.Status.Conditions, condBalanced)
		if g.Status.Mode != v1.GuildRelayed || !equals(s.Desired, relays) || !equals(s.Ready, relays) || !equals(s.Replicas, relays) ||
			progress != "!"+reasonSteady || balance != reasonBalanced || len(b.seats[""].sessions) > 0 {
			return fmt.Sprintf("%d relays at rest", relays)
		}
		return ""
	}
}

// direct says what is missing until a guild is without relays.
func (b *relayBench) direct(g *v1.Guild) string {
	if g.Status.Mode != v1.GuildDirect || !equals(g.Status.Relays.Replicas, 0) || len(b.seats) > 1 {
		return "mode Direct"
	}
	return ""
}

// play brings sessions, pods and endpoints up to date.
func (b *relayBench) play() {
	t := b.t
	t.Helper()
	b.advance()
	var pods corev1.PodList
	if err := b.client.List(t.Context(), &pods, client.InNamespace(b.namespace)); err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{"": true}
	for i := range pods.Items {
		pod := &pods.Items[i]
		if pod.Labels[labelComponent] != componentRelay {
			continue
		}
		there[pod.Name] = true
		if pod.DeletionTimestamp != nil {
			continue
		}
		if err := b.run(pod); err != nil {
			t.Fatalf("running pod %s: %v", pod.Name, err)
		}
	}
	b.endpoints(pods.Items)
	for i := range pods.Items {
		if pod := &pods.Items[i]; pod.DeletionTimestamp != nil {
			b.end(pod.Name)
			if err := b.client.Delete(t.Context(), pod, client.GracePeriodSeconds(0)); client.IgnoreNotFound(err) != nil {
				t.Fatal(err)
			}
		}
	}
	for name := range b.counts() {
		if !there[name] {
			b.end(name)
		}
	}
}

// run does to a pod what is to happen to it.
func (b *relayBench) run(pod *corev1.Pod) error {
	b.made[pod.Name] = true
	if pod.Spec.NodeName == "" {
		// A pod without a node would vanish at once when it is deleted.
		binding := &corev1.Binding{
			ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name},
			Target:     corev1.ObjectReference{Kind: "Node", Name: "node"},
		}
		if err := b.client.SubResource("binding").Create(b.t.Context(), pod, binding); err != nil {
			return err
		}
	}
	fate := corev1.PodRunning
	if b.becomes != nil {
		fate = b.becomes(pod)
	}
	switch fate {
	case corev1.PodPending:
		return nil
	case corev1.PodUnknown:
		return b.setReady(pod, corev1.PodRunning, false)
	case corev1.PodFailed:
		if err := b.setReady(pod, fate, false); err != nil {
			return err
		}
		b.end(pod.Name)
		return nil
	}
	b.attach(pod.Name)
	return b.setReady(pod, fate, true)
}

// endpoints makes those of the guild's Service.
func (b *relayBench) endpoints(pods []corev1.Pod) {
	t := b.t
	t.Helper()
	service := new(corev1.Service)
	if err := b.client.Get(t.Context(), b.key(relaysName(guildID)), service); apierrors.IsNotFound(err) {
		return
	} else if err != nil {
		t.Fatal(err)
	}
	selector, ready := labels.SelectorFromSet(service.Spec.Selector), map[string]bool{}
	var leads []string
	var all []discoveryv1.Endpoint
	for i := range pods {
		pod := &pods[i]
		name, serves := pod.Name, podReady(pod) && pod.DeletionTimestamp == nil
		if pod.Labels[labelComponent] != componentRelay {
			name = ""
		}
		ready[name] = serves
		if !selector.Matches(labels.Set(pod.Labels)) {
			continue
		}
		all = append(all, discoveryv1.Endpoint{
			Addresses:  []string{fmt.Sprintf("10.1.0.%d", i%250+1)},
			Conditions: discoveryv1.EndpointConditions{Ready: new(serves)},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		})
		if serves {
			leads = append(leads, name)
		}
	}
	if len(leads) == 0 && slices.ContainsFunc(b.leads, func(name string) bool { return ready[name] }) {
		t.Errorf("the Service leads nowhere any more; before that it led to %q, which is ready", b.leads)
	}
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Namespace: b.namespace, Name: service.Name + "-0", Labels: maps.Clone(service.Labels),
	}, AddressType: discoveryv1.AddressTypeIPv4, Endpoints: all}
	slice.Labels[discoveryv1.LabelServiceName] = service.Name
	err := b.client.Update(t.Context(), slice)
	if apierrors.IsNotFound(err) {
		err = b.client.Create(t.Context(), slice)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.leads = leads
}

// roundOf is the round that a Guild's status names.
func roundOf(g *v1.Guild) int64 {
	if g.Status.Rebalance == nil {
		return 0
	}
	return g.Status.Rebalance.Round
}

// clientAt is a client to whom pods are made at the time of a clock: the server's own is slower than one that a
// test moves.
func (s *apiServer) clientAt(t *testing.T, c clock.PassiveClock) client.Client {
	t.Helper()
	server, err := client.NewWithWatch(s.configAs(testAgent), client.Options{Scheme: s.scheme})
	if err != nil {
		t.Fatal(err)
	}
	made := map[types.UID]time.Time{}
	shift := func(obj client.Object) {
		if at, ok := made[obj.GetUID()]; ok {
			obj.SetCreationTimestamp(metav1.NewTime(at.Truncate(time.Second)))
		}
	}
	return interceptor.NewClient(server, interceptor.Funcs{
		Create: func(ctx context.Context, w client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
			err := w.Create(ctx, obj, opts...)
			if _, ok := obj.(*corev1.Pod); ok && err == nil {
				made[obj.GetUID()] = c.Now()
				shift(obj)
			}
			return err
		},
		Get: func(ctx context.Context, w client.WithWatch, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
			err := w.Get(ctx, key, obj, opts...)
			shift(obj)
			return err
		},
		Patch: func(ctx context.Context, w client.WithWatch, obj client.Object, patch client.Patch, opts ...client.PatchOption) error {
			err := w.Patch(ctx, obj, patch, opts...)
			shift(obj)
			return err
		},
		List: func(ctx context.Context, w client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			err := w.List(ctx, list, opts...)
			if pods, ok := list.(*corev1.PodList); ok {
				for i := range pods.Items {
					shift(&pods.Items[i])
				}
			}
			return err
		},
	})
}

// past moves the clock to a time that the API server has set, should that be ahead.
func (b *relayBench) past(at time.Time) {
	if b.clock.Now().Before(at) {
		b.clock.SetTime(at)
	}
}
