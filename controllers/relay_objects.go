package controllers

import (
	"context"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	accorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	acmetav1 "k8s.io/client-go/applyconfigurations/meta/v1"
	acpolicyv1 "k8s.io/client-go/applyconfigurations/policy/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
	"guildhall.dev/guildhall/shardserver/linkcert"
)

const (
	// labelSettles is how long a label takes until whoever makes endpoints has surely seen it: a
	// Service that asks for it before would lead nowhere for a moment.
	labelSettles = 500 * time.Millisecond
	// budgetYields is how long a PodDisruptionBudget protects relays whose fellows are not ready:
	// then a node drain goes on all the same.
	budgetYields = 5 * time.Minute
)

// guildOwner is the controller owner reference to a Guild.
func guildOwner(guild *v1.Guild) *acmetav1.OwnerReferenceApplyConfiguration {
	return acmetav1.OwnerReference().
		WithAPIVersion(v1.GroupVersion.String()).
		WithKind("Guild").
		WithName(guild.Name).
		WithUID(guild.UID).
		WithController(true).
		WithBlockOwnerDeletion(true)
}

func relayIdentity(w relayWish) linkcert.Identity {
	return linkcert.Identity{Namespace: w.guild.Namespace, Guild: w.id}
}

// route has the guild's Service lead to the relays that take connections or, while there are none, to the shard.
func (r *relays) route(ctx context.Context, v *guildView, p *relayPass, cached []*corev1.Pod) error {
	toShard, settled := p.state.leadsToShard(&p.decision, p.facts, cached, v.health.ready())
	if !settled {
		p.wait = labelSettles
	}
	if !p.facts.routed && p.decision.Want == 0 {
		return nil
	}
	return r.ensureService(ctx, v, toShard)
}

// leadsToShard says where the Service is to lead. It has one selector, so it leads either to relays or to the
// shard, and changes over in one step: to the shard when that is ready, to relays when one of those to accept is ready and
// its label has been there for a while; until then it is not settled.
func (s *relayState) leadsToShard(d *relayplan.Decision, f *relayFacts, cached []*corev1.Pod, shardReady bool) (toShard, settled bool) {
	shown := map[string]bool{}
	for _, pod := range cached {
		if pod.Labels[labelAccepting] == "true" && podReady(pod) && pod.DeletionTimestamp == nil {
			shown[pod.Name] = true
			if _, ok := s.accepts[pod.Name]; !ok {
				s.accepts[pod.Name] = f.now
			}
		}
	}
	for name := range s.accepts {
		if !shown[name] {
			delete(s.accepts, name)
		}
	}
	fresh := false
	for _, name := range d.Accept {
		fresh = fresh || !f.endpoints[name]
		since, ok := s.accepts[name]
		settled = settled || ok && f.now.Sub(since) >= labelSettles
	}
	switch {
	case d.ShardAccepts && !fresh && !shardReady && f.toRelays && len(f.endpoints) > 0:
		return false, true // a shard that is not ready takes nothing over
	case d.ShardAccepts && !fresh:
		return true, true // what the relays keep they keep until the shard takes over
	case settled:
		return false, true
	}
	return !f.toRelays || len(shown) == 0, false // where it leads now
}

func (r *relays) ensureService(ctx context.Context, v *guildView, toShard bool) error {
	id := v.decision.id
	selector := acceptingSelector(relaySelector(id))
	if toShard {
		selector = acceptingSelector(shardSelector(v.shard.Name))
	}
	desired := accorev1.Service(relaysName(id), v.guild.Namespace).
		WithLabels(relayLabels(id)).
		WithOwnerReferences(guildOwner(v.guild)).
		WithSpec(accorev1.ServiceSpec().
			WithSelector(selector).
			WithPorts(clientPorts(tlsSecret(v.shard) != "")...))
	key := types.NamespacedName{Namespace: v.guild.Namespace, Name: relaysName(id)}
	_, err := r.ensure(ctx, key, new(corev1.Service), desired, v.guild.UID)
	return err
}

// highs are numbers seen within a time.
type highs []high

type high struct {
	at time.Time
	n  int
}

// add takes in a number and returns the largest of the last while.
func (h *highs) add(now time.Time, n int, span time.Duration) int {
	*h = slices.DeleteFunc(*h, func(old high) bool { return old.n <= n || now.Sub(old.at) > span })
	*h = append(*h, high{now, n})
	return (*h)[0].n
}

// ensureBudget has voluntary evictions leave most of the relays alone: all but a tenth of them, at least one. It
// counts with those that have been ready lately, so that it never asks for more than can be had.
func (r *relays) ensureBudget(ctx context.Context, guild *v1.Guild, id string, p *relayPass) error {
	ready := min(p.decision.Want, p.state.ready.add(p.facts.now, p.ready, budgetYields))
	least := max(0, ready-max(1, ready/10))
	desired := acpolicyv1.PodDisruptionBudget(relaysName(id), guild.Namespace).
		WithLabels(relayLabels(id)).
		WithOwnerReferences(guildOwner(guild)).
		WithSpec(acpolicyv1.PodDisruptionBudgetSpec().
			WithMinAvailable(intstr.FromInt32(int32(least))).
			WithUnhealthyPodEvictionPolicy(policyv1.AlwaysAllow).
			// Who drains may go: it is no longer needed.
			WithSelector(acmetav1.LabelSelector().WithMatchLabels(relaySelector(id)).
				WithMatchExpressions(acmetav1.LabelSelectorRequirement().
					WithKey(labelDraining).WithOperator(metav1.LabelSelectorOpDoesNotExist))))
	key := types.NamespacedName{Namespace: guild.Namespace, Name: relaysName(id)}
	_, err := r.ensure(ctx, key, new(policyv1.PodDisruptionBudget), desired, guild.UID)
	return err
}

func (r *relays) removeBudget(ctx context.Context, guild *v1.Guild, id string) error {
	key := types.NamespacedName{Namespace: guild.Namespace, Name: relaysName(id)}
	budget := new(policyv1.PodDisruptionBudget)
	if err := r.Get(ctx, key, budget); err != nil {
		return client.IgnoreNotFound(err) // what this operator has made is in the cache
	}
	return r.applier.remove(ctx, budget, key, guild.UID)
}
