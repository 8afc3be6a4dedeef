package controllers

import (
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
	"guildhall.dev/guildhall/shardserver/report"
)

// relayFacts is all that is known of a guild's relays in one pass.
type relayFacts struct {
	now      time.Time
	guild    *v1.Guild
	policy   relayplan.Policy
	revision string
	// shard that the guild is on; what it reports of the guild counts while serving.
	shard   *v1.GuildShard
	reports shardView
	entry   report.Guild
	serving bool
	relays  []report.Relay
	// pods are those of the guild's relays.
	pods []*corev1.Pod
	// routed: the guild's Service is there; endpoints are the pods that it leads to.
	routed bool
	// toRelays: it asks for relays, not for the shard.
	toRelays  bool
	endpoints map[string]bool
	// budget is how many moves per second the namespace leaves to this guild.
	budget float64
}

// routes remembers who was among the endpoints of a guild's Service, and since when that is so.
type routes map[string]route

type route struct {
	leads bool
	since time.Time
}

// update takes in who is there now; the shard has the empty name.
func (r routes) update(f *relayFacts) {
	see := func(name string, leads bool) {
		if old, ok := r[name]; !ok || old.leads != leads {
			r[name] = route{leads, f.now}
		}
	}
	// Before there is a Service, the shard's own leads to it.
	see("", !f.routed || f.endpoints[podName(f.shard.Name)])
	there := map[string]bool{"": true}
	for _, pod := range f.pods {
		there[pod.Name] = true
		see(pod.Name, f.endpoints[pod.Name])
	}
	for name := range r {
		if !there[name] {
			delete(r, name)
		}
	}
}

// endpointsOf are the names of the ready pods of a Service's slices.
func endpointsOf(slices []discoveryv1.EndpointSlice) map[string]bool {
	names := map[string]bool{}
	for i := range slices {
		for _, e := range slices[i].Endpoints {
			if e.TargetRef != nil && e.TargetRef.Kind == "Pod" && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				names[e.TargetRef.Name] = true
			}
		}
	}
	return names
}

// observe is what the planner gets to see.
func observe(f *relayFacts, s *relayState) relayplan.Observation {
	obs := relayplan.Observation{
		Now: f.now, Policy: f.policy, Desired: s.desired, Revision: f.revision,
		Complete: f.reports.complete, LastRound: s.lastRound, Budget: f.budget,
		Approved: f.guild.Annotations[v1.AnnotationApprove],
	}
	if obs.Desired == nil && f.guild.Status.Relays != nil && f.guild.Status.Relays.Desired != nil {
		obs.Desired = new(int(*f.guild.Status.Relays.Desired))
	}
	earlier := earlierOrders(f)
	obs.Shard.Accepting, obs.Shard.AcceptingSince = s.routes[""].leads, s.routes[""].since
	if f.serving {
		obs.Shard.ReportedAt = f.reports.seen
		obs.Shard.Sessions = int(directOf(f.entry, f.relays))
		obs.Shard.Arrivals = arrivalsOf(f.entry, f.relays, f.reports.load)
		obs.Shard.Deliveries = float64(deliveriesOf(f.entry, f.relays, f.reports.load))
		obs.Shard.Room = max(0, int(f.shard.Spec.Capacity.Sessions)-int(f.reports.load.Sessions))
		obs.Shard.Order = s.progress("", f.entry.Round, f.entry.Asked, obs.Shard.Sessions, earlier)
		obs.LastRound = max(obs.LastRound, f.entry.Round)
	}
	reported := make(map[string]report.Relay, len(f.relays))
	for _, r := range f.relays {
		reported[r.Name] = r
		obs.LastRound = max(obs.LastRound, r.Round)
	}
	for _, pod := range f.pods {
		if pod.DeletionTimestamp != nil {
			continue
		}
		r := relayplan.Relay{
			Name: pod.Name, Revision: pod.Annotations[annotationRevision], Created: pod.CreationTimestamp.Time,
			DrainingSince: drainingSince(pod),
		}
		r.Phase, r.PhaseSince = relayPhase(pod)
		r.Accepting, r.AcceptingSince = s.routes[pod.Name].leads, s.routes[pod.Name].since
		if said, ok := reported[pod.Name]; ok && f.serving {
			r.ReportedAt = f.reports.seen.Add(-time.Duration(said.AgeMillis) * time.Millisecond)
			r.Sessions, r.Waiting, r.Arrivals = int(said.Sessions), int(said.Waiting), float64(said.ArrivalsPerSecond)
			r.Order = s.progress(pod.Name, said.Round, said.Asked, r.Sessions, earlier)
		}
		obs.Relays = append(obs.Relays, r)
	}
	if status := f.guild.Status.Rebalance; status != nil {
		obs.LastRound = max(obs.LastRound, status.Round)
	}
	return obs
}

// relayPhase is the state of a relay's pod, and since when it is in it.
func relayPhase(pod *corev1.Pod) (relayplan.Phase, time.Time) {
	since := pod.CreationTimestamp.Time
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.LastTransitionTime.After(since) {
			since = c.LastTransitionTime.Time
		}
	}
	switch {
	case pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded:
		return relayplan.Failed, since
	case podReady(pod):
		return relayplan.Ready, since
	case pod.Annotations[annotationReadySince] != "":
		return relayplan.NotReady, since
	}
	return relayplan.Pending, pod.CreationTimestamp.Time
}

// drainingSince is when a relay's pod was marked to go; zero: it was not.
func drainingSince(pod *corev1.Pod) time.Time {
	mark, ok := pod.Labels[labelDraining]
	if !ok {
		return time.Time{}
	}
	seconds, err := strconv.ParseInt(mark, 10, 64)
	if err != nil || seconds <= 0 {
		return pod.CreationTimestamp.Time // marked by hand
	}
	return time.Unix(seconds, 0)
}

// earlier is a round that a leader before this one began: of it only the status and the reports tell.
type earlier struct {
	round    int64
	deadline time.Time
	done     bool
}

func earlierOrders(f *relayFacts) earlier {
	status := f.guild.Status.Rebalance
	if status == nil || status.Deadline == nil {
		return earlier{}
	}
	e := earlier{round: status.Round, deadline: status.Deadline.Time}
	asked := int64(0)
	if f.entry.Round == e.round {
		asked += f.entry.Asked
	}
	for _, r := range f.relays {
		if r.Round == e.round {
			asked += r.Asked
		}
	}
	e.done = asked >= value(status.Moved)+value(status.ToMove)
	return e
}

// progress is how far an endpoint has come with the last order that it was given.
func (s *relayState) progress(name string, round, asked int64, sessions int, e earlier) relayplan.Progress {
	p := relayplan.Progress{Round: round, Left: int(asked), Done: true}
	switch {
	case round == 0:
		return relayplan.Progress{}
	case s.round != nil && s.round.ID == round:
		p.Deadline = s.round.Deadline
		for _, o := range s.round.Orders {
			if o.Relay == name {
				p.Done = p.Left >= o.Leave || sessions == 0
			}
		}
	case s.round == nil && e.round == round:
		p.Deadline, p.Done = e.deadline, e.done || sessions == 0
	}
	return p
}

// relaysOf returns what a guild's shard last reported of its relays.
func (inv *inventory) relaysOf(key types.NamespacedName, shardUID, guild types.UID) []report.Relay {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	r := inv.shards[key]
	if r == nil || r.uid != shardUID {
		return nil
	}
	return r.relays[guild]
}
