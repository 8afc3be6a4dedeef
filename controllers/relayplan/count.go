package relayplan

import (
	"math"
	"slices"
	"time"
)

const (
	// growthTime and deliveriesTime are the time constants of the two averages. A burst of
	// deliveries shorter than the latter hardly counts.
	growthTime     = 6 * time.Second
	deliveriesTime = 30 * time.Second
	// recent is how far back a number of sessions is remembered: to come back to it, as after a
	// storm of reconnects, is no growth.
	recent = 2 * time.Minute
)

// reports says what is wrong with the reports, if anything. Relays that are not ready may be cut
// off: they count with what they said last.
func (o *Observation) reports() Reason {
	if o.stale(&o.Shard.Endpoint) {
		return StaleReports
	}
	if !o.Complete {
		return IncompleteReports
	}
	for i := range o.Relays {
		switch r := &o.Relays[i]; {
		case r.Phase != Ready:
		case r.ReportedAt.IsZero():
			return IncompleteReports
		case o.stale(&r.Endpoint):
			return StaleReports
		}
	}
	return ""
}

func (o *Observation) stale(e *Endpoint) bool { return o.Now.Sub(e.ReportedAt) > staleAfter }

// load is the number of sessions, those that wait too, and of arrivals per second.
func (o *Observation) load() (sessions, arrivals float64) {
	sessions, arrivals = o.Shard.load(), o.Shard.Arrivals
	for i := range o.Relays {
		if r := &o.Relays[i]; r.Phase != Failed {
			sessions += r.load()
			arrivals += r.Arrivals
		}
	}
	return sessions, arrivals
}

func (e *Endpoint) load() float64 { return float64(e.Sessions + e.Waiting) }

// age of the oldest report that is acted on.
func (o *Observation) age() time.Duration {
	age := o.Now.Sub(o.Shard.ReportedAt)
	for i := range o.Relays {
		if r := &o.Relays[i]; r.Phase == Ready && !o.stale(&r.Endpoint) {
			age = max(age, o.Now.Sub(r.ReportedAt))
		}
	}
	return min(max(age, 0), staleAfter)
}

// learn takes in an observation.
func (m Memory) learn(obs *Observation, reports Reason) Memory {
	now := obs.Now
	if reports != "" {
		m.freshSince = time.Time{}
	} else if m.freshSince.IsZero() {
		m.freshSince = now
	}
	if obs.stale(&obs.Shard.Endpoint) {
		m.shardSince = time.Time{}
		return m
	}
	if m.shardSince.IsZero() {
		m.shardSince = now
	}
	sessions, _ := obs.load()
	if m.at.IsZero() {
		m.at, m.deliveries = now, obs.Shard.Deliveries
		m.loads = m.loads.add(now, sessions, recent)
		return m
	}
	passed := now.Sub(m.at)
	if passed <= 0 {
		return m
	}
	before := m.loads.top()
	m.loads = m.loads.add(now, sessions, recent)
	rise := max(0, m.loads.top()-before) / passed.Seconds()
	m.growth += (rise - m.growth) * share(passed, growthTime)
	m.deliveries += (obs.Shard.Deliveries - m.deliveries) * share(passed, deliveriesTime)
	m.at = now
	return m
}

// share is what a value that lasted for a while counts in a moving average.
func share(passed, constant time.Duration) float64 {
	return 1 - math.Exp(-passed.Seconds()/constant.Seconds())
}

// count decides how many relays are wanted.
func (p *plan) count() {
	p.Want = p.current()
	switch p.Policy.Scaling {
	case ScalingDisabled:
		p.Want = 0
		return
	case ScalingManual:
		p.Want = p.Policy.Replicas
		return
	case ScalingAuto:
	}
	promoted := p.Want > 0
	sessions, _ := p.load()
	horizon := p.Policy.PodStart + p.age()
	if p.spare(nil) < 0 {
		horizon *= 2 // clients will have to wait: of more pods the first ones are ready sooner
	}
	ahead := sessions + p.mem.growth*horizon.Seconds()
	units := max(ahead/float64(p.Policy.SessionsPerRelay), p.mem.deliveries/p.Policy.DeliveriesPerRelay)
	up, down := p.Policy.recommend(units, promoted)
	if down == 0 && promoted && int(sessions) > p.Shard.Room+p.Shard.Sessions {
		down = 1 // the shard has no room for them
	}
	p.mem.ups = p.mem.ups.add(p.Now, -float64(up), p.Policy.StabilizeUp)
	if p.Reports == "" {
		p.mem.downs = p.mem.downs.add(p.Now, float64(down), p.Policy.StabilizeDown)
	}
	if most := int(-p.mem.ups.top()); most > p.Want {
		p.Want = most
	} else if p.Reports == "" && p.Now.Sub(p.mem.freshSince) >= p.Policy.StabilizeDown {
		p.Want = min(p.Want, int(p.mem.downs.top()))
	}
	p.Want = p.Policy.clamp(p.Want)
}

// current is the number of relays decided last.
func (p *plan) current() int {
	if p.Desired != nil {
		return *p.Desired
	}
	n := 0
	for i := range p.Relays {
		if r := &p.Relays[i]; r.Phase != Failed && !r.draining() {
			n++
		}
	}
	return n
}

// recommend says how many relays a load asks for: the count to grow to, and the count to shrink
// to, which is larger. What lies between the two stays as it is.
func (p *Policy) recommend(units float64, promoted bool) (up, down int) {
	if !promoted && units < p.PromoteAt {
		return p.clamp(0), p.clamp(0)
	}
	up = max(1, ceil(units/p.TargetUtilization))
	down = max(1, ceil(units/(p.TargetUtilization-p.Hysteresis)))
	if promoted && units <= p.DemoteAt {
		down = 0
	}
	return p.clamp(up), p.clamp(down)
}

func (p *Policy) clamp(n int) int { return min(max(n, p.MinReplicas), p.MaxReplicas) }

// ceil rounds up, but not for what is only an error of the division.
func ceil(f float64) int { return int(math.Ceil(f - 1e-9)) }

// peaks are values seen within a time, as far as one of them can still become the largest: they
// fall from the first to the last.
type peaks []peak

type peak struct {
	at    time.Time
	value float64
}

// add takes in a value and forgets those older than the span. It leaves the receiver as it is.
func (p peaks) add(now time.Time, value float64, span time.Duration) peaks {
	next := slices.DeleteFunc(slices.Clone(p), func(old peak) bool {
		return old.value <= value || now.Sub(old.at) > span
	})
	return append(next, peak{now, value})
}

// since are those that were seen at a time or later. The first one is the largest value since then.
func (p peaks) since(at time.Time) peaks {
	for len(p) > 0 && p[0].at.Before(at) {
		p = p[1:]
	}
	return p
}

// top is the largest value.
func (p peaks) top() float64 {
	if len(p) == 0 {
		return 0
	}
	return p[0].value
}
