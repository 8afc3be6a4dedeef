package controllers

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
)

// planInterval is how often a guild that has relays, or may get some soon, is planned for.
const planInterval = 2 * time.Second

// relays is the part of guildReconciler that looks after the relays of guilds: it observes, has relayplan
// decide, and carries that out. What it finds becomes part of the Guild's status.
type relays struct {
	applier
	certs      *linkCerts
	inventory  *inventory
	clock      clock.PassiveClock
	recorder   events.EventRecorder
	shardImage string
	orders     *orderDesk
	budget     *moveBudget

	mu     sync.Mutex
	states map[types.UID]*relayState
}

// relayState is what this process remembers of a guild's relays. All of it can be lost: the status, the pods
// and the reports have what matters. Passes of one guild never run at once.
type relayState struct {
	memory relayplan.Memory
	// desired and lastRound are what was decided last; the status in the cache may be older.
	desired   *int
	lastRound int64
	// round is the last one that this process has begun.
	round  *relayplan.Round
	sent   sentOrders
	routes routes
	ledger podLedger
	// accepts has since when the cache shows that a relay takes connections.
	accepts map[string]time.Time
	create  backoff
	ready   highs
	// movedAt is when progress of moves was last written.
	movedAt time.Time
}

// relayPass is what a pass has found and done.
type relayPass struct {
	state *relayState
	// planned: the guild has relays, or may get some soon; the decision is what was decided.
	planned  bool
	decision relayplan.Decision
	facts    *relayFacts
	replicas int
	// ready are those that serve and stay, updated those of the present revision, draining those that go.
	ready, updated, draining int
	// trouble says what keeps relays from being made.
	trouble verdict
	// unready is the reason of a relay that does not get ready.
	unready string
	uneven  bool
	// wait is when the next pass is due.
	wait time.Duration
}

// The operator makes relay pods itself, since it chooses which of them goes.
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups="",resources=services,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=policy,resources=poddisruptionbudgets,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=discovery.k8s.io,resources=endpointslices,verbs=get;list;watch

// pass observes, plans and acts for one guild that has a place. The rounds that it decides are not ordered
// yet: that follows when the status has them.
func (r *relays) pass(ctx context.Context, v *guildView) (*relayPass, error) {
	p := &relayPass{wait: planInterval}
	f, err := r.observe(ctx, v)
	if err != nil {
		return nil, err
	}
	p.facts = f
	if !r.matters(v, f) {
		r.forget(v.guild)
		p.count(v.linked)
		return p, r.settle(ctx, v, f)
	}
	p.planned = true
	p.state = r.state(v.guild.UID)
	if !v.linked {
		f.policy.Scaling = relayplan.ScalingDisabled // none could reach the shard
	}
	wish := relayWish{guild: v.guild, id: v.decision.id, shard: v.shard, policy: f.policy}
	if wish.image, err = r.image(ctx, v.shard); err != nil {
		return nil, err
	}
	if f.revision, err = wish.revision(); err != nil {
		return nil, err
	}
	cached := f.pods
	f.pods = p.state.ledger.current(cached, f.now)
	p.state.routes.update(f)
	f.budget = r.budget.share(v.guild.Namespace, v.guild.UID, f.policy.MaxMovesPerSecond)
	obs := observe(f, p.state)
	p.decision, p.state.memory = relayplan.Plan(obs, p.state.memory)
	p.take(ctx)
	if p.decision.Round == nil {
		r.budget.release(v.guild.Namespace, v.guild.UID)
	}
	p.count(v.linked)
	p.uneven = unevenLoad(&obs)
	err = r.act(ctx, v, wish, p, cached)
	p.trouble = firstTrouble(p.trouble, p.state.create.trouble)
	return p, err
}

// take remembers what was decided.
func (p *relayPass) take(ctx context.Context) {
	d, s, f := &p.decision, p.state, p.facts
	if s.desired == nil || *s.desired != d.Want {
		log.FromContext(ctx).V(1).Info("Relays wanted", "relays", d.Want, "sessions", f.entry.Sessions)
		s.desired = new(d.Want)
	}
	if d.Round != nil {
		if s.round == nil || s.round.ID != d.Round.ID {
			log.FromContext(ctx).V(1).Info("A round of moves begins", "round", d.Round.ID, "plan", d.Round.Summary)
		}
		s.round = d.Round
		s.lastRound = max(s.lastRound, d.Round.ID)
	}
}

// matters says whether a guild has relays or is about to get some.
func (r *relays) matters(v *guildView, f *relayFacts) bool {
	if len(f.pods) > 0 || v.guild.Status.Mode != "" && v.guild.Status.Mode != v1.GuildDirect {
		return true
	}
	sessions, deliveries := int64(0), int64(0)
	if f.serving {
		sessions, deliveries = f.entry.Sessions, deliveriesOf(f.entry, f.relays, f.reports.load)
	}
	return wantsRelays(f.policy, sessions, deliveries)
}

// observe reads what there is.
func (r *relays) observe(ctx context.Context, v *guildView) (*relayFacts, error) {
	id := v.decision.id
	f := &relayFacts{
		now: v.now, guild: v.guild, policy: relayPolicy(v.guild), shard: v.shard,
		reports: v.reports, entry: v.entry, serving: v.serving(),
		relays: r.inventory.relaysOf(client.ObjectKeyFromObject(v.shard), v.shard.UID, v.guild.UID),
	}
	var err error
	if f.pods, err = r.pods(ctx, v.guild, id); err != nil {
		return nil, err
	}
	service := new(corev1.Service)
	err = r.Get(ctx, types.NamespacedName{Namespace: v.guild.Namespace, Name: relaysName(id)}, service)
	if client.IgnoreNotFound(err) != nil {
		return nil, fmt.Errorf("reading Service %s: %w", relaysName(id), err)
	}
	if f.routed = err == nil && controllerOf(service) == v.guild.UID; f.routed {
		var slices discoveryv1.EndpointSliceList
		if err := r.List(ctx, &slices, client.InNamespace(v.guild.Namespace), client.UnsafeDisableDeepCopy,
			client.MatchingLabels{discoveryv1.LabelServiceName: service.Name}); err != nil {
			return nil, fmt.Errorf("listing the endpoints of Service %s: %w", service.Name, err)
		}
		f.toRelays = service.Spec.Selector[labelComponent] == componentRelay
		f.endpoints = endpointsOf(slices.Items)
	}
	return f, nil
}

// image is that of the shard: relays follow its roll-outs, and nothing else.
func (r *relays) image(ctx context.Context, shard *v1.GuildShard) (string, error) {
	sts := new(appsv1.StatefulSet)
	err := r.Get(ctx, client.ObjectKeyFromObject(shard), sts)
	if client.IgnoreNotFound(err) != nil {
		return "", fmt.Errorf("reading StatefulSet %s: %w", shard.Name, err)
	}
	for _, c := range sts.Spec.Template.Spec.Containers {
		if c.Name == containerName && shard.Spec.Image == "" {
			return c.Image, nil
		}
	}
	return firstOf(shard.Spec.Image, r.shardImage), nil
}

// act carries out a decision. What cannot be done is decided again in the next pass.
func (r *relays) act(ctx context.Context, v *guildView, wish relayWish, p *relayPass, cached []*corev1.Pod) error {
	d := &p.decision
	var failed []error
	if d.Create > 0 || len(p.facts.pods) > 0 {
		failed = append(failed,
			r.certs.ensure(ctx, relayLinkName(wish.id), relayIdentity(wish), relayLabels(wish.id), guildOwner(v.guild)),
			r.ensureBudget(ctx, v.guild, wish.id, p),
		)
	} else {
		failed = append(failed, r.removeBudget(ctx, v.guild, wish.id))
	}
	failed = append(failed,
		r.markPods(ctx, p),
		r.route(ctx, v, p, cached),
	)
	certified := errors.Join(failed...) == nil
	// First, since what has failed makes the next ones wait.
	failed = append(failed, r.deletePods(ctx, p))
	if certified {
		// Without their certificate they would only wait.
		failed = append(failed, r.createPods(ctx, wish, p))
	}
	return r.sort(p, failed)
}

// sort makes conditions of what the user has to mend, and errors of the rest.
func (r *relays) sort(p *relayPass, failed []error) error {
	var left []error
	for _, err := range failed {
		if conflict, ok := errors.AsType[*nameConflictError](err); ok {
			p.trouble = isFalse(reasonNameConflict, conflict.Error())
			continue
		}
		if err == nil || namespaceEnding(err) || apierrors.IsConflict(err) || errors.Is(err, errNoAuthority) {
			continue // a conflict: the cache is about to catch up
		}
		left = append(left, err)
	}
	return errors.Join(left...)
}

// settle leaves behind, for a guild without relays, nothing but the Service that its sessions know.
func (r *relays) settle(ctx context.Context, v *guildView, f *relayFacts) error {
	err := r.removeBudget(ctx, v.guild, v.decision.id)
	if f.routed {
		err = errors.Join(err, r.ensureService(ctx, v, true))
	}
	return r.sort(new(relayPass), []error{err})
}

// remove ends what belongs to the relays of a guild that is being deleted. It does not wait for the pods:
// the guild's sessions are ended by the shard.
func (r *relays) remove(ctx context.Context, guild *v1.Guild, id string) error {
	r.forget(guild)
	if id == "" {
		return nil
	}
	pods, err := r.pods(ctx, guild, id)
	failed := []error{err}
	for _, pod := range pods {
		if pod.DeletionTimestamp == nil {
			failed = append(failed, r.deletePod(ctx, pod, client.GracePeriodSeconds(int64(deletionDeadline/time.Second))))
		}
	}
	key := types.NamespacedName{Namespace: guild.Namespace, Name: relaysName(id)}
	failed = append(failed,
		r.applier.remove(ctx, new(corev1.Service), key, guild.UID),
		r.removeBudget(ctx, guild, id),
		r.certs.drop(ctx, types.NamespacedName{Namespace: guild.Namespace, Name: relayLinkName(id)}, guild.UID),
	)
	return errors.Join(failed...)
}

func (r *relays) state(guild types.UID) *relayState {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.states[guild]
	if s == nil {
		s = &relayState{routes: routes{}, ledger: podLedger{}, accepts: map[string]time.Time{}}
		r.states[guild] = s
	}
	return s
}

// forget drops what is remembered of a guild, and what was set aside for its moves.
func (r *relays) forget(guild *v1.Guild) {
	r.budget.release(guild.Namespace, guild.UID)
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.states, guild.UID)
}

// count counts the pods.
func (p *relayPass) count(linked bool) {
	f := p.facts
	for _, pod := range f.pods {
		p.replicas++
		phase, _ := relayPhase(pod)
		old := pod.Annotations[annotationRevision] != f.revision
		switch drains := !drainingSince(pod).IsZero(); {
		case drains || pod.DeletionTimestamp != nil:
			p.draining++
			continue
		case phase == relayplan.Ready:
			p.ready++
		case p.unready == "":
			p.unready = healthOf(pod).message
		}
		if !old {
			p.updated++
		}
	}
	if !linked && (f.policy.Replicas > 0 || p.planned) {
		p.trouble = isFalse(reasonShardWithoutLink, fmt.Sprintf(
			"the pod of shard %s was made by an earlier version, to which relays cannot connect: change spec.template or spec.image of the GuildShard to have it made anew", f.shard.Name))
	}
}

// unevenLoad says whether a relay has more sessions than the policy allows, or the shard as many that relays ought to have.
func unevenLoad(obs *relayplan.Observation) bool {
	sum, most, n := 0, 0, 0
	for i := range obs.Relays {
		if r := &obs.Relays[i]; r.Phase == relayplan.Ready && r.DrainingSince.IsZero() {
			sum, most, n = sum+r.Sessions, max(most, r.Sessions), n+1
		}
	}
	if n == 0 {
		return false
	}
	even := float64(sum+obs.Shard.Sessions) / float64(n)
	slack := max(even*float64(obs.Policy.MaxSkewPercent)/100, float64(obs.Policy.MinSkewSessions))
	return float64(most) > even+slack || float64(obs.Shard.Sessions) > slack
}

func firstTrouble(verdicts ...verdict) verdict {
	for _, v := range verdicts {
		if v.reason != "" {
			return v
		}
	}
	return verdict{}
}
