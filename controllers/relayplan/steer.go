package relayplan

import (
	"cmp"
	"math"
	"slices"
)

// steer decides who takes new sessions: relays as soon as one is ready, else the shard.
func (p *plan) steer() {
	var chosen []*Relay
	if p.Want > 0 {
		chosen = p.choose(p.serving())
	}
	p.ShardAccepts = len(chosen) == 0
	// Whoever is among the endpoints stays there until somebody chosen is: of the relays those
	// that do not drain, and if there are none everyone.
	if !p.ShardAccepts && !slices.ContainsFunc(chosen, func(r *Relay) bool { return r.Accepting }) || p.ShardAccepts && !p.Shard.Accepting {
		kept := p.reachable(false)
		if len(kept) == 0 {
			p.ShardAccepts = p.ShardAccepts || p.Shard.Accepting
			kept = p.reachable(true)
		}
		chosen = append(chosen, kept...)
	}
	for _, r := range chosen {
		p.Accept = append(p.Accept, r.Name)
	}
	slices.Sort(p.Accept)
}

// reachable are the ready relays that traffic goes to, those that drain or the others.
func (p *plan) reachable(draining bool) []*Relay {
	var reachable []*Relay
	for i := range p.Relays {
		if r := &p.Relays[i]; r.Accepting && r.Phase == Ready && r.draining() == draining {
			reachable = append(reachable, r)
		}
	}
	return reachable
}

// choose picks the relays that take new sessions: those below the even share, and as many more
// as it takes to stay within it until the next decision shows. In a roll-out the new ones are
// asked first, so that sessions move once.
func (p *plan) choose(serving []*Relay) []*Relay {
	if len(serving) == 0 {
		return nil
	}
	_, arrivals := p.load()
	now, lag := p.spread(), (reaction + p.age()).Seconds()
	incoming := max(arrivals, p.mem.growth) * lag
	ceiling := now.even + incoming/float64(now.relays) + now.band/2
	if r := p.Round; r != nil {
		moves := min(p.rate()*lag, float64(r.ToMove-r.Moved))
		incoming += moves
		if r.Drain {
			ceiling += moves / float64(now.relays)
		}
		// Nobody is sent away to come back to the same relay.
		others := slices.DeleteFunc(slices.Clone(serving), func(s *Relay) bool {
			return slices.ContainsFunc(r.Orders, func(o Order) bool { return o.Relay == s.Name })
		})
		if len(others) > 0 {
			serving = others
		}
	}
	ceiling = min(ceiling, float64(p.Policy.SessionsPerRelay))

	// Who does not accept counts as a little fuller than it is, so that labels do not flap.
	load := func(r *Relay) float64 {
		if r.Accepting {
			return r.load()
		}
		return r.load() + now.band/4
	}
	slices.SortFunc(serving, func(a, b *Relay) int { return cmp.Or(cmp.Compare(load(a), load(b)), cmp.Compare(a.Name, b.Name)) })
	if latest := slices.DeleteFunc(slices.Clone(serving), p.old); len(latest) > 0 && len(latest) < len(serving) {
		if n, fits := receivers(latest, load, incoming, ceiling); fits {
			return latest[:n]
		}
	}
	n, _ := receivers(serving, load, incoming, ceiling)
	return serving[:n]
}

// receivers says how many of the emptiest relays share what comes, which spreads evenly over
// them: as many as stay below the ceiling. Where no number does, the fullest is kept least full.
func receivers(byLoad []*Relay, load func(*Relay) float64, incoming, ceiling float64) (n int, fits bool) {
	least := math.Inf(1)
	for k := len(byLoad); k > 0; k-- {
		level := load(byLoad[k-1]) + incoming/float64(k)
		if level <= ceiling {
			return k, true
		}
		if level < least {
			n, least = k, level
		}
	}
	return n, false
}
