package controllers

import (
	"time"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
	"guildhall.dev/guildhall/shardserver/report"
)

const (
	// attention is the share of the load that makes a guild relayed from which on it is planned
	// for: growth has to be seen before it matters.
	attention = 0.1
	// graceSlack is what a relay that ends has beyond the time that its moves take; maxGrace is the most.
	graceSlack = 30 * time.Second
	maxGrace   = time.Hour
)

// relayPolicy is what a Guild's spec says of relays, with the defaults filled in.
func relayPolicy(guild *v1.Guild) relayplan.Policy {
	p := relayplan.DefaultPolicy()
	relays := guild.Spec.Relays
	if relays.Mode != "" {
		p.Scaling = relayplan.Scaling(relays.Mode)
	}
	if relays.Replicas != nil {
		p.Replicas = int(*relays.Replicas)
	}
	if relays.MinReplicas != nil {
		p.MinReplicas = int(*relays.MinReplicas)
	}
	set(&p.MaxReplicas, relays.MaxReplicas)
	set(&p.SessionsPerRelay, relays.SessionsPerRelay)
	if s := relays.StabilizationSeconds; s != nil {
		setSeconds(&p.StabilizeUp, s.Up)
		setSeconds(&p.StabilizeDown, s.Down)
	}
	if b := guild.Spec.Rebalance; b != nil {
		if b.Mode != "" {
			p.Rebalance = relayplan.Rebalancing(b.Mode)
		}
		if b.MaxMovesPerSecond > 0 {
			p.MaxMovesPerSecond = float64(b.MaxMovesPerSecond)
		}
		set(&p.MaxSkewPercent, b.MaxSkewPercent)
		set(&p.MinSkewSessions, b.MinSkewSessions)
	}
	return p
}

// set takes over a value of the spec that is there.
func set(to *int, v int32) {
	if v > 0 {
		*to = int(v)
	}
}

func setSeconds(to *time.Duration, v int32) {
	if v > 0 {
		*to = time.Duration(v) * time.Second
	}
}

// gracePeriod is what a relay that ends needs to ask all its sessions to leave.
func gracePeriod(p relayplan.Policy) time.Duration {
	moves := time.Duration(float64(p.SessionsPerRelay) / p.MaxMovesPerSecond * float64(time.Second))
	return min(moves.Truncate(time.Second)+graceSlack, maxGrace)
}

// wantsRelays says whether a guild without relays may get some soon: only such guilds are planned for.
func wantsRelays(p relayplan.Policy, sessions, deliveries int64) bool {
	switch p.Scaling {
	case relayplan.ScalingDisabled:
		return false
	case relayplan.ScalingManual:
		return p.Replicas > 0
	case relayplan.ScalingAuto:
	}
	units := max(float64(sessions)/float64(p.SessionsPerRelay), float64(deliveries)/p.DeliveriesPerRelay)
	return p.MinReplicas > 0 || units >= attention*p.PromoteAt
}

// deliveriesOf is how many deliveries per second a guild makes: those that its relays report, and of those of
// the shard as large a part as it has of the sessions there.
func deliveriesOf(g report.Guild, relays []report.Relay, load report.Load) int64 {
	var sum int64
	for _, r := range relays {
		sum += r.DeliveriesPerSecond
	}
	return sum + int64(float64(load.DeliveriesPerSecond)*directShare(g, relays, load))
}

// arrivalsOf is how many of the clients that come to the shard in a second stay there for a guild. Who comes for one that is
// relayed goes on, and counts where it arrives.
func arrivalsOf(g report.Guild, relays []report.Relay, load report.Load) float64 {
	if g.Relayed {
		return 0
	}
	return float64(load.ArrivalsPerSecond) * directShare(g, relays, load)
}

// directShare is the part that a guild has of the sessions on its shard.
func directShare(g report.Guild, relays []report.Relay, load report.Load) float64 {
	if load.Sessions <= 0 {
		return 0
	}
	return min(1, float64(directOf(g, relays))/float64(load.Sessions))
}

// directOf is the number of a guild's sessions on the shard itself. A shard that knows nothing of relays has all.
func directOf(g report.Guild, relays []report.Relay) int64 {
	if len(relays) == 0 {
		return max(g.Direct, g.Sessions)
	}
	return g.Direct
}
