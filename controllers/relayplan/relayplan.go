// Package relayplan decides for one guild how many relays it has, which of them go, who takes new
// sessions, and how many sessions leave whom. It is pure: an Observation and a Memory go in, a
// Decision and the next Memory come out; it asks no clock and no client, and the same input
// always gives the same answer. The controller calls Plan about every 2 s and carries out what
// it says; whatever could not be carried out is said again in the next call.
//
// The unit of the count is the relay's worth: the larger of sessions / SessionsPerRelay and
// deliveries per second / DeliveriesPerRelay.
//
// A session is moved by op 7: it reconnects through the guild's Service, which picks one of the
// accepting endpoints at random. So the plan cannot choose the receiver: it says how many leave
// each endpoint, and chooses who accepts meanwhile. Arrivals are steered in the same way, at no
// cost; only what they will not even out is moved.
package relayplan

import (
	"slices"
	"time"
)

// Mode says how a guild's sessions are served; the values are those of the Guild's status.mode.
type Mode string

const (
	// Direct: the shard holds all sessions itself.
	Direct Mode = "Direct"
	// Promoting: relays are on their way.
	Promoting Mode = "Promoting"
	// Relayed: relays take the connections.
	Relayed Mode = "Relayed"
	// Demoting: the relays' sessions are on their way to the shard.
	Demoting Mode = "Demoting"
)

// Scaling says who decides the number of relays; the values are those of spec.relays.mode.
type Scaling string

const (
	// ScalingAuto follows the load.
	ScalingAuto Scaling = "Auto"
	// ScalingManual follows Policy.Replicas.
	ScalingManual Scaling = "Manual"
	// ScalingDisabled keeps every session on the shard.
	ScalingDisabled Scaling = "Disabled"
)

// Rebalancing says what happens to an uneven spread; the values are those of spec.rebalance.mode.
// Drains are no rebalancing: they follow from what else is wished, and need no approval.
type Rebalancing string

const (
	// RebalanceAuto moves sessions at once.
	RebalanceAuto Rebalancing = "Auto"
	// RebalanceApprove moves them when the plan's hash was approved.
	RebalanceApprove Rebalancing = "Approve"
	// RebalanceDisabled leaves evening out to arrivals and departures.
	RebalanceDisabled Rebalancing = "Disabled"
)

// Policy is what the Guild's spec and the operator's settings say; DefaultPolicy has sound values.
type Policy struct {
	Scaling Scaling
	// Replicas is the number of relays in ScalingManual.
	Replicas int
	// MinReplicas and MaxReplicas bound the number in ScalingAuto. With a MinReplicas above 0
	// the guild is always relayed.
	MinReplicas, MaxReplicas int
	// SessionsPerRelay is what a relay holds, at most 15,000: more are made to wait.
	SessionsPerRelay int
	// DeliveriesPerRelay is how many deliveries per second a relay is planned to make.
	DeliveriesPerRelay float64

	// TargetUtilization is the share of a relay that the count plans with, 0 to 1. Relays are
	// added above it, and taken away when the rest would stay Hysteresis below it.
	TargetUtilization, Hysteresis float64
	// PromoteAt and DemoteAt are the relay's worths from which the guild gets relays, and down
	// to which it keeps them.
	PromoteAt, DemoteAt float64
	// StabilizeUp and StabilizeDown are how long a load must ask for more, or for fewer.
	StabilizeUp, StabilizeDown time.Duration
	// PodStart is how long a relay takes to become ready, the slow ones: so far the count looks
	// ahead on growth.
	PodStart time.Duration

	// SurgePercent is how many relays a roll-out replaces at a time, and how many hung ones are
	// replaced at a time, in percent of those wanted; at least one.
	SurgePercent int
	// PendingTimeout is how long a pod may take to become ready, HungTimeout how long it may
	// stay not ready later; then it is replaced. DrainTimeout is what a drain may take beyond
	// twice the time that the rate needs.
	PendingTimeout, HungTimeout, DrainTimeout time.Duration

	Rebalance Rebalancing
	// MaxMovesPerSecond bounds all moves of the guild, drains too.
	MaxMovesPerSecond float64
	// A relay has too many sessions when it is both MaxSkewPercent and MinSkewSessions above the
	// even share.
	MaxSkewPercent, MinSkewSessions int
}

// DefaultPolicy is the policy of a Guild whose spec says nothing.
func DefaultPolicy() Policy {
	return Policy{
		Scaling:            ScalingAuto,
		MaxReplicas:        1000,
		SessionsPerRelay:   15000,
		DeliveriesPerRelay: 100_000,
		TargetUtilization:  0.8,
		Hysteresis:         0.1,
		PromoteAt:          0.5,
		DemoteAt:           0.25,
		StabilizeUp:        4 * time.Second,
		StabilizeDown:      5 * time.Minute,
		PodStart:           time.Minute,
		SurgePercent:       10,
		PendingTimeout:     5 * time.Minute,
		HungTimeout:        time.Minute,
		DrainTimeout:       5 * time.Minute,
		Rebalance:          RebalanceAuto,
		MaxMovesPerSecond:  500,
		MaxSkewPercent:     10,
		MinSkewSessions:    100,
	}
}

const (
	// staleAfter is the age from which a report is not acted on.
	staleAfter = 10 * time.Second
	// endpointLag is how long traffic takes to follow a change of the Service's endpoints.
	endpointLag = 2 * time.Second
	// reaction is how long a decision takes to show in the traffic: until the next call, the
	// write of the label, and endpointLag.
	reaction = 4 * time.Second
)

// Endpoint is a place that holds sessions of the guild, as observed and as last reported.
type Endpoint struct {
	// Accepting: it is among the endpoints of the guild's Service. AcceptingSince is when that
	// last changed.
	Accepting      bool
	AcceptingSince time.Time
	// ReportedAt is when what follows was measured; zero: never.
	ReportedAt time.Time
	// Sessions are connected, Waiting are held until there is room.
	Sessions, Waiting int
	// Arrivals is how many connections came per second, resumed ones too.
	Arrivals float64
	// Order is the last order that it was given.
	Order Progress
}

// Progress is how far an endpoint has come with an order.
type Progress struct {
	Round    int64
	Left     int
	Done     bool
	Deadline time.Time
}

func (p Progress) underWay(now time.Time) bool {
	return p.Round != 0 && !p.Done && now.Before(p.Deadline)
}

// Shard is the guild's shard.
type Shard struct {
	Endpoint
	// Room is how many more sessions it can take.
	Room int
	// Deliveries is how many the guild makes per second, relays included.
	Deliveries float64
}

// Phase is the state of a relay's pod.
type Phase string

const (
	// Pending: it has never been ready.
	Pending Phase = "Pending"
	// Ready: it is healthy and caught up.
	Ready Phase = "Ready"
	// NotReady: it was ready once. It may still hold sessions.
	NotReady Phase = "NotReady"
	// Failed: it has ended, or its node is gone.
	Failed Phase = "Failed"
)

// Relay is a relay pod of the guild. Pods that are being deleted are left out: their sessions
// leave by themselves.
type Relay struct {
	Endpoint
	Name string
	// Revision says from what template it was made.
	Revision string
	Created  time.Time
	Phase    Phase
	// PhaseSince is when the phase began.
	PhaseSince time.Time
	// DrainingSince is when it was marked to go; zero: it was not. There is no way back.
	DrainingSince time.Time
}

func (r *Relay) draining() bool { return !r.DrainingSince.IsZero() }

// Observation is all that is known of a guild at one time.
type Observation struct {
	Now    time.Time
	Policy Policy
	// Desired is the number of relays decided last, as status has it; nil: not known.
	Desired *int
	// Revision is the revision that relays should have.
	Revision string
	Shard    Shard
	Relays   []Relay
	// Complete: the shard has told everything since it started.
	Complete bool
	// LastRound is the highest round ever begun, as status has it.
	LastRound int64
	// Budget is how many moves per second the namespace leaves to this guild; see Share.
	Budget float64
	// Approved is the plan hash that the Guild's annotation approves.
	Approved string
}

// Decision is what to do now. Empty lists mean nothing to do, except for Accept.
type Decision struct {
	Mode Mode
	// Want is the number of relays, for status; a roll-out has a few more for a while.
	Want int
	// Create is how many pods to make, Drain are relays to mark as draining, Delete are pods to
	// delete: ended, never ready, or empty. A pod that still has sessions drains on SIGTERM.
	Create        int
	Drain, Delete []string
	// Accept are all relays that should have the accepting label, by name, ShardAccepts whether the shard
	// should.
	Accept       []string
	ShardAccepts bool
	// Round is the round under way. When its ID is new, first write it to status, then send the
	// orders; send them again as long as the endpoints do not report them, and when a rate
	// changes. Rates of 0 are a pause.
	Round *Round
	// Proposal is what waits for approval.
	Proposal *Round
	// Blocked says why moves that are due do not begin, or pause.
	Blocked Reason
	// Reports says what is wrong with the reports, empty when they are fresh and complete.
	Reports Reason
}

// Memory is what the planner knows from earlier calls; the zero Memory is that of a new operator.
// It loses little with a restart: nothing is scaled down before StabilizeDown has been seen
// again, and growth is known after a few reports.
type Memory struct {
	// at is when growth and deliveries were last brought up to date.
	at time.Time
	// shardSince is since when the shard's reports are fresh, freshSince since when all are.
	shardSince, freshSince time.Time
	// loads has the largest number of sessions lately.
	loads peaks
	// growth is by how many sessions per second that number rises, smoothed.
	growth float64
	// deliveries per second, smoothed.
	deliveries float64
	// ups has the smallest count to grow to, negated, and downs the largest to shrink to.
	ups, downs peaks
	// round is under way, proposal waits for approval; neither is changed, only replaced.
	round, proposal *Round
	// quietUntil is before when no round begins: what was moved is still on its way.
	quietUntil time.Time
}

// plan is a decision in the making.
type plan struct {
	Observation
	Decision
	mem Memory
}

// Plan decides what to do now.
func Plan(obs Observation, mem Memory) (Decision, Memory) {
	obs.Relays = slices.Clone(obs.Relays)
	slices.SortFunc(obs.Relays, compareNames)
	p := plan{Observation: obs}
	p.Reports = obs.reports()
	p.mem = mem.learn(&obs, p.Reports)
	p.count()
	p.pods()
	p.round()
	p.steer()
	p.Mode = p.mode()
	return p.Decision, p.mem
}

// mode follows from what is there, so that no status need be trusted.
func (p *plan) mode() Mode {
	switch {
	case p.Want == 0 && len(p.Relays) == 0:
		return Direct
	case p.Want == 0:
		return Demoting
	case p.ShardAccepts || p.Shard.Accepting:
		return Promoting
	}
	return Relayed
}

// serving are the relays that are ready and stay.
func (o *Observation) serving() []*Relay {
	serving := make([]*Relay, 0, len(o.Relays))
	for i := range o.Relays {
		if r := &o.Relays[i]; r.Phase == Ready && !r.draining() {
			serving = append(serving, r)
		}
	}
	return serving
}
