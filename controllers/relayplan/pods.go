package relayplan

import (
	"cmp"
	"slices"
)

// pods decides which relays are made, drained and deleted.
func (p *plan) pods() {
	surge := p.surge()
	var live, drained []*Relay
	for i := range p.Relays {
		switch r := &p.Relays[i]; {
		case r.Phase == Failed,
			r.Phase == Pending && (r.draining() || p.Now.Sub(r.PhaseSince) > p.Policy.PendingTimeout):
			p.delete(r)
		case r.draining():
			drained = append(drained, r)
		default:
			live = append(live, r)
		}
	}
	p.endDrains(drained)
	remaining := len(drained)

	// A hung relay is replaced as one that drains: it may still hold sessions. Not all at once:
	// what makes many of them not ready is seldom their own fault.
	hung := 0
	for _, r := range drained {
		if r.Phase == NotReady {
			hung++
		}
	}
	live = slices.DeleteFunc(live, func(r *Relay) bool {
		if hung >= surge || !p.hung(r) {
			return false
		}
		hung++
		p.drain(r)
		return true
	})

	// Never on reports that are old or have holes: those who seem idle may not be.
	if p.Reports == "" {
		if len(live) > p.Want {
			slices.SortFunc(live, p.compareVictims)
		}
		live = p.shrink(live, surge)
		live = p.rollOut(live)
	}
	p.Create = p.Want - len(live)
	if slices.ContainsFunc(live, p.old) {
		p.Create = max(p.Create, p.Want+surge-len(live)-remaining-len(p.Drain))
	}
	p.Create = max(p.Create, 0)
}

// surge is how many relays are replaced at a time.
func (p *plan) surge() int { return max(1, p.Want*p.Policy.SurgePercent/100) }

func (p *plan) old(r *Relay) bool { return r.Revision != p.Revision }

// hung says whether a relay has not been ready for too long. While the shard is not there no
// relay can catch up, so that time does not count.
func (p *plan) hung(r *Relay) bool {
	return r.Phase == NotReady && !p.mem.shardSince.IsZero() &&
		min(p.Now.Sub(r.PhaseSince), p.Now.Sub(p.mem.shardSince)) > p.Policy.HungTimeout
}

// endDrains deletes the draining relays that are empty, and those that take too long.
func (p *plan) endDrains(drained []*Relay) {
	sessions := p.Shard.Sessions
	for _, r := range drained {
		sessions += r.Sessions
	}
	patience := p.Policy.DrainTimeout + 2*duration(sessions, p.rate())
	for _, r := range drained {
		// What was reported before traffic stopped does not say that nobody has come since.
		stopped := !r.Accepting && r.ReportedAt.Sub(r.AcceptingSince) >= endpointLag
		empty := stopped && r.Sessions+r.Waiting == 0 && !p.stale(&r.Endpoint)
		overdue := !p.mem.shardSince.IsZero() && p.Now.Sub(r.DrainingSince) > patience
		if empty || overdue {
			p.delete(r)
		}
	}
}

// shrink takes away what is more than wanted, and old pods that serve nobody, and returns who
// stays. Where there are more than wanted, live is in the order of compareVictims.
func (p *plan) shrink(live []*Relay, surge int) []*Relay {
	surplus := len(live) - p.Want
	if p.Want > 0 && surplus > 0 && slices.ContainsFunc(live[surplus:], p.old) {
		surplus -= surge
	}
	ready := count(live, func(r *Relay) bool { return r.Phase == Ready })
	return slices.DeleteFunc(live, func(r *Relay) bool {
		switch {
		case r.Phase == Pending && (surplus > 0 || p.old(r)):
			p.delete(r)
		case surplus <= 0, r.Phase == Ready && ready == 1 && p.Want > 0:
			return false // the last one that serves stays
		default:
			p.drain(r)
		}
		if r.Phase == Ready {
			ready--
		}
		surplus--
		return true
	})
}

// rollOut drains relays of an old revision, as many as there are ready ones to spare, and returns
// who stays.
func (p *plan) rollOut(live []*Relay) []*Relay {
	spare := count(live, func(r *Relay) bool { return r.Phase == Ready }) - p.Want
	return slices.DeleteFunc(live, func(r *Relay) bool {
		if spare <= 0 || r.Phase != Ready || !p.old(r) {
			return false
		}
		spare--
		p.drain(r)
		return true
	})
}

func (p *plan) drain(r *Relay) {
	r.DrainingSince = p.Now
	p.Drain = append(p.Drain, r.Name)
}

func (p *plan) delete(r *Relay) {
	if !r.draining() {
		r.DrainingSince = p.Now
	}
	p.Delete = append(p.Delete, r.Name)
}

// compareVictims puts first who goes first: who serves nobody, has an old revision or the fewest
// sessions, then the youngest.
func (p *plan) compareVictims(a, b *Relay) int {
	return cmp.Or(
		cmp.Compare(usefulness[a.Phase], usefulness[b.Phase]),
		compareTrueFirst(p.old(a), p.old(b)),
		cmp.Compare(a.Sessions, b.Sessions),
		b.Created.Compare(a.Created),
		cmp.Compare(a.Name, b.Name),
	)
}

var usefulness = map[Phase]int{Pending: 1, NotReady: 2, Ready: 3}

func count(relays []*Relay, is func(*Relay) bool) int {
	n := 0
	for _, r := range relays {
		if is(r) {
			n++
		}
	}
	return n
}

func compareNames(a, b Relay) int { return cmp.Compare(a.Name, b.Name) }

func compareTrueFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}
