package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// crowd is the sessions of a guild: it plays its clients, its relays and what makes the endpoints of its Service.
// Whoever loses their connection comes back at once wherever the Service leads; new ones do so, too.
//
// It holds the operator to the rules: a round is in the status before its first order, the last endpoint is never
// taken away, nobody is asked twice in a round, no relay with sessions on it is deleted, and of the relays that were ready
// never fewer than floor are left.
type crowd struct {
	w     *world
	guild string
	ended chan struct{}

	// Guarded by w.node.mu. Endpoints are named by their pod, the shard has the empty name.
	want     int            // sessions
	on       map[string]int // how many are where
	waiting  int            // how many have no endpoint to go to
	orders   map[string]endpointOrder
	round    int64
	term     int64
	posted   []report.Orders
	relays   map[string]*corev1.Pod // those that are ready
	pending  map[string]bool        // those that never get ready
	trouble  string                 // why new ones do not get ready
	leads    map[string]bool        // endpoints of the guild's Service
	floor    int
	wrongs   []string
	stopped  map[string]bool // relays that do not report any more
	paused   bool            // nobody leaves, whatever they are asked
	lastMove time.Time
}

type endpointOrder struct {
	report.Order
	round int64
	asked int64
	due   float64
}

// playRelays has a guild's clients and relays play until the test ends.
func (w *world) playRelays(guild string, sessions int) *crowd {
	w.t.Helper()
	c := &crowd{
		w: w, guild: guild, want: sessions, ended: make(chan struct{}), on: map[string]int{}, orders: map[string]endpointOrder{}, relays: map[string]*corev1.Pod{},
		pending: map[string]bool{}, leads: map[string]bool{}, stopped: map[string]bool{}, lastMove: time.Now(),
	}
	w.node.set(func(n *node) { n.crowds[guild] = c })
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(c.ended)
		for tick := time.NewTicker(25 * time.Millisecond); ; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case <-tick.C:
				c.turn(ctx)
			}
		}
	}()
	w.t.Cleanup(func() {
		cancel()
		<-c.ended
		w.node.set(func(*node) {
			for _, wrong := range c.wrongs {
				w.t.Error(wrong)
			}
		})
	})
	return c
}

func (c *crowd) wrong(format string, args ...any) {
	if len(c.wrongs) < 5 {
		c.wrongs = append(c.wrongs, fmt.Sprintf(format, args...))
	}
}

// set changes the crowd.
func (c *crowd) set(change func(*crowd)) { c.w.node.set(func(*node) { change(c) }) }

// turn does what happens in a moment.
func (c *crowd) turn(ctx context.Context) {
	n := c.w.node
	var pods corev1.PodList
	if err := n.cache.List(ctx, &pods, client.InNamespace(n.namespace), client.MatchingLabels{labelComponent: componentRelay}); err != nil {
		return
	}
	there := map[string]*corev1.Pod{}
	for i := range pods.Items {
		pod := &pods.Items[i]
		there[pod.Name] = pod
		n.mu.Lock()
		known, trouble := c.relays[pod.Name] != nil || c.pending[pod.Name], c.trouble
		n.mu.Unlock()
		if known || pod.Status.Phase != "" && pod.Status.Phase != corev1.PodPending {
			continue
		}
		if trouble != "" {
			n.set(func(*node) { c.pending[pod.Name] = true })
			n.setPodStatus(ctx, pod.DeepCopy(), corev1.PodPending, corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: trouble}}, "")
			continue
		}
		ip := ""
		n.set(func(n *node) {
			n.pods++
			ip = fmt.Sprintf("10.1.%d.%d", n.pods/250, n.pods%250+1)
		})
		n.setPodStatus(ctx, pod.DeepCopy(), corev1.PodRunning, corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}, ip)
		n.set(func(*node) { c.relays[pod.Name] = pod.DeepCopy() })
	}
	leads := c.endpoints(ctx)
	// Nobody is led away from the last one that takes connections. It may die, though.
	alive := func(name string) bool {
		pod := new(corev1.Pod)
		return name == "" || n.cache.Get(ctx, c.w.key(name), pod) == nil && pod.DeletionTimestamp == nil && pod.Status.Phase != corev1.PodFailed
	}

	n.mu.Lock()
	defer n.mu.Unlock()
	for name := range c.relays {
		if there[name] == nil {
			if lost := c.on[name]; lost > 0 && c.floor > 0 {
				c.wrong("relay %s was deleted with %d sessions", name, lost)
			}
			c.waiting += c.on[name]
			delete(c.relays, name)
			delete(c.on, name)
			delete(c.orders, name)
		}
	}
	if serving := len(c.serving(there)); serving < c.floor {
		c.wrong("%d relays serve, expected at least %d", serving, c.floor)
	}
	if leads != nil {
		if len(leads) == 0 && slices.ContainsFunc(slices.Collect(maps.Keys(c.leads)), alive) {
			c.wrong("the guild's Service leads nowhere")
		}
		c.leads = leads
	}
	c.move()
	c.arrive()
}

// serving are the relays that are ready and stay.
func (c *crowd) serving(there map[string]*corev1.Pod) (names []string) {
	for name := range c.relays {
		if pod := there[name]; pod != nil && pod.Labels[labelDraining] == "" {
			names = append(names, name)
		}
	}
	return names
}

// endpoints makes the endpoints of the guild's Service, and returns whom it leads to; nil when there is none.
func (c *crowd) endpoints(ctx context.Context) map[string]bool {
	n := c.w.node
	g := new(v1.Guild)
	if err := n.cache.Get(ctx, c.w.key(c.guild), g); err != nil || g.Status.ID == "" || g.DeletionTimestamp != nil {
		return nil
	}
	service := new(corev1.Service)
	if err := n.cache.Get(ctx, c.w.key(relaysName(g.Status.ID)), service); err != nil {
		return nil
	}
	var pods corev1.PodList
	if err := n.cache.List(ctx, &pods, client.InNamespace(n.namespace),
		client.MatchingLabelsSelector{Selector: labels.SelectorFromSet(service.Spec.Selector)}); err != nil {
		return nil
	}
	leads := map[string]bool{}
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Namespace: n.namespace, Name: service.Name + "-test", Labels: maps.Clone(service.Labels),
	}, AddressType: discoveryv1.AddressTypeIPv4}
	slice.Labels[discoveryv1.LabelServiceName] = service.Name
	for i := range pods.Items {
		pod := &pods.Items[i]
		if !podReady(pod) || pod.DeletionTimestamp != nil {
			continue
		}
		name := pod.Name
		if pod.Labels[labelComponent] != componentRelay {
			name = ""
		}
		leads[name] = true
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{pod.Status.PodIP}, Conditions: discoveryv1.EndpointConditions{Ready: new(true)},
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name},
		})
	}
	slices.SortFunc(slice.Endpoints, func(a, b discoveryv1.Endpoint) int {
		return slices.Compare(a.Addresses, b.Addresses)
	})
	old := new(discoveryv1.EndpointSlice)
	switch err := n.client.Get(ctx, client.ObjectKeyFromObject(slice), old); {
	case apierrors.IsNotFound(err):
		err = n.client.Create(ctx, slice)
		if err != nil {
			return nil
		}
	case err != nil:
		return nil
	case !slices.EqualFunc(old.Endpoints, slice.Endpoints, func(a, b discoveryv1.Endpoint) bool { return a.TargetRef.Name == b.TargetRef.Name }):
		old.Endpoints = slice.Endpoints
		if err := n.client.Update(ctx, old); err != nil {
			return nil
		}
	}
	return leads
}

// move has those leave who are asked to.
func (c *crowd) move() {
	since := time.Since(c.lastMove).Seconds()
	c.lastMove = time.Now()
	if c.paused {
		return
	}
	for name, o := range c.orders {
		o.due = min(o.due+since*float64(o.PerSecond), float64(o.PerSecond))
		left := o.Leave - o.asked
		if o.All {
			left = int64(c.on[name])
		}
		n := min(int64(o.due), left, int64(c.on[name]))
		if n > 0 {
			o.due -= float64(n)
			o.asked += n
			c.on[name] -= int(n)
			c.waiting += int(n)
		}
		c.orders[name] = o
	}
}

// arrive leads those who have no connection to where the Service leads, and to the shard before there is one.
func (c *crowd) arrive() {
	have := c.waiting
	for _, n := range c.on {
		have += n
	}
	for name := range c.on { // too many: some leave
		for have > c.want && c.on[name] > 0 {
			c.on[name]--
			have--
		}
	}
	if have < c.want {
		c.waiting += c.want - have
	}
	to := slices.Sorted(maps.Keys(c.leads))
	if len(to) == 0 {
		to = []string{""}
	}
	for i := 0; c.waiting > 0; i++ {
		c.on[to[i%len(to)]]++
		c.waiting--
	}
}

// take takes orders as the shard server does.
func (c *crowd) take(ctx context.Context, o report.Orders) (status int, said string) {
	g := new(v1.Guild)
	if err := c.w.client.Get(ctx, c.w.key(c.guild), g); err != nil {
		return http.StatusInternalServerError, err.Error()
	}
	c.w.node.mu.Lock()
	defer c.w.node.mu.Unlock()
	if r := g.Status.Rebalance; r == nil || r.Round < o.Round {
		c.wrong("orders of round %d, and the status has %+v", o.Round, r)
	}
	if o.Term < c.term || o.Round < c.round {
		return http.StatusConflict, fmt.Sprintf("term %d, round %d, and %d, %d have been seen", o.Term, o.Round, c.term, c.round)
	}
	c.term, c.round = o.Term, o.Round
	c.posted = append(c.posted, o)
	for _, one := range o.Orders {
		if one.Relay != "" && c.relays[one.Relay] == nil {
			return http.StatusConflict, "relay " + one.Relay + " has no link"
		}
		old := c.orders[one.Relay]
		if old.round != o.Round {
			old = endpointOrder{round: o.Round}
		}
		old.Order = one
		c.orders[one.Relay] = old
	}
	return http.StatusNoContent, ""
}

// account fills in a shard's report what it says of the guild and its relays. node.mu is held.
func (c *crowd) account(e *report.Guild) (relays []report.Relay) {
	e.Direct, e.Sessions = int64(c.on[""]), int64(c.waiting)
	for _, n := range c.on {
		e.Sessions += int64(n)
	}
	e.Online, e.Members = e.Sessions, e.Sessions
	e.Round, e.Asked = c.orders[""].round, c.orders[""].asked
	for name, pod := range c.relays {
		r := report.Relay{
			GuildUID: e.UID, Name: name, BootID: "boot-" + string(pod.UID), Version: "test", Attached: true, Ready: true, AgeMillis: 50,
			Sessions: int64(c.on[name]), Round: c.orders[name].round, Asked: c.orders[name].asked, Draining: c.orders[name].All,
		}
		if c.stopped[name] {
			r.AgeMillis, r.Attached = 30_000, false
		}
		relays = append(relays, r)
	}
	return relays
}

// takeOrders answers the operator.
func (s *shardServer) takeOrders(w http.ResponseWriter, r *http.Request) {
	var o report.Orders
	if err := json.NewDecoder(r.Body).Decode(&o); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	held := s.guilds[o.GuildUID]
	s.mu.Unlock()
	if held == nil {
		http.Error(w, "not here", http.StatusConflict)
		return
	}
	s.node.mu.Lock()
	c := s.node.crowds[held.Name]
	s.node.mu.Unlock()
	status, said := c.take(r.Context(), o)
	if status != http.StatusNoContent {
		http.Error(w, said, status)
		return
	}
	w.WriteHeader(status)
}

// relayed waits until the guild has a mode, and so many relays that are ready and nothing else, and the sessions
// are where they belong.
func (c *crowd) relayed(mode v1.GuildMode, relays int) *v1.Guild {
	c.w.t.Helper()
	var g *v1.Guild
	eventually(c.w.t, time.Minute, func() string {
		g = c.w.guild(c.guild)
		s := g.Status.Relays
		counts := func(p *int32) int {
			if p == nil {
				return 0
			}
			return int(*p)
		}
		if s == nil || g.Status.Mode != mode || counts(s.Replicas) != relays || counts(s.Ready) != relays || counts(s.Draining) != 0 {
			var on string
			c.set(func(c *crowd) { on = fmt.Sprint(c.on, " of ", c.want, ", leading to ", c.leads) })
			return fmt.Sprintf("mode %s with %d relays; it is %s, %s; %s %s; sessions %s", mode, relays, g.Status.Mode,
				message(g.Status.Conditions, condProgressing), reason(g.Status.Conditions, condBalanced), message(g.Status.Conditions, condBalanced), on)
		}
		var waiting string
		c.set(func(c *crowd) {
			for name, n := range c.on {
				if n > 0 && (name == "") != (relays == 0) {
					waiting = fmt.Sprintf("nobody on %q; there are %d", name, n)
				}
			}
			if len(c.relays) != relays {
				waiting = strconv.Itoa(relays) + " relays"
			}
		})
		return waiting
	})
	return g
}

// awaitRound waits for orders of a later round, and returns its number.
func (c *crowd) awaitRound(after int64) (round int64) {
	c.w.t.Helper()
	eventually(c.w.t, time.Minute, func() string {
		c.set(func(c *crowd) { round = c.round })
		if round <= after {
			return fmt.Sprintf("a round above %d", after)
		}
		return ""
	})
	return round
}

// relayWorld is a guild of so many sessions on a shard, that has no relays yet.
func relayWorld(t *testing.T, sessions int, relays v1.GuildRelays, rebalance *v1.GuildRebalance) (*world, *crowd) {
	t.Helper()
	t.Parallel()
	w := newWorld(t)
	guild := makeGuild(w.namespace, "lobby").Relays(relays).Obj()
	guild.Spec.Rebalance = rebalance
	w.create(makeShard(w.namespace, "shard-a").Obj(), guild)
	return w, w.playRelays("lobby", sessions)
}

func manual(n int32) v1.GuildRelays { return v1.GuildRelays{Mode: v1.RelaysManual, Replicas: &n} }

// brisk moves many sessions, down to single ones.
func brisk() *v1.GuildRebalance {
	return &v1.GuildRebalance{MaxMovesPerSecond: 1000, MinSkewSessions: 1}
}

// scale sets the number of relays as kubectl scale does.
func (w *world) scale(guild string, n int32) {
	w.t.Helper()
	update(w, guild, func(g *v1.Guild) { g.Spec.Relays = manual(n) })
}
