package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"guildhall.dev/guildhall/controllers/relayplan"
)

// The world runs in steps of a second; times in it are seconds since the start.
const (
	planEvery   = 2
	reportEvery = 2 // so the report at hand is 2 s old
	lostReports = 0.01
	podStartMin = 5
	podStartMax = 60
	// A label shows in the Service's endpoints a second after it was written, and in the traffic
	// another second later.
	endpointsAfter = 1
	trafficAfter   = 2
	// A client that waits for so long is closed, and tries again within retryWithin.
	holdTime    = 12
	retryWithin = 5
	// A moved session is back within so long.
	resumeWithin = 3
	// shardCapacity is how many sessions of this guild its shard holds.
	shardCapacity = 15000

	// A wanted number that turns back sooner oscillates; a skew that lasts for longer counts.
	turnBack  = 10 * time.Minute
	skewAfter = 60
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func at(second int) time.Time { return epoch.Add(time.Duration(second) * time.Second) }

// group are clients that arrive together: since when they try, and whether op 7 sent them.
type group struct {
	n, since int
	moved    bool
}

// place holds sessions: the shard or a relay.
type place struct {
	name    string
	created int
	readyAt int
	// draining is when it was marked; -1: it was not.
	draining int
	sessions int
	// young are the sessions that came since the order that it was given last.
	young    int
	capacity int
	// waiting are the clients that are held, the oldest first, and heldSince since when.
	waiting   []group
	heldSince []int

	label   bool
	labelAt int
	// order is the one it follows; left is how many have gone, credit what the rate allows.
	order  relayplan.Order
	left   int
	done   bool
	credit float64

	arrived int
	// taken is the report in the making; told is the one that the operator has.
	taken, told relayplan.Endpoint

	overSince int // -1: it is not above its capacity
	// counted is the level down to which its sessions are in the bound already; -1: none.
	counted float64
}

// world is a guild, its pods, its clients and the operator.
type world struct {
	curve  curve
	rng    *rand.Rand
	now    int
	shard  *place
	relays []*place
	made   int
	// coming are clients on their way, by the second in which they arrive.
	coming map[int][]group
	mood   float64 // the noise of the curve

	memory     relayplan.Memory
	desired    int
	lastRound  int64
	lastChange int // of the desired number
	lastUp     bool
	// skewed has the skew of every second since a relay became ready or a session moved.
	skewed      []float64
	movesBefore int

	result
}

// result is what a run is judged by.
type result struct {
	peak, sessionsEnd         int
	moves, bound              int
	overload, longestOverload int
	held, longestWait         int
	podsMax, podsEnd          int
	changes, oscillations     int
	landed, landedAstray      int
	skew                      float64
}

func (r *result) ratio() float64 {
	if r.moves == 0 {
		return 0
	}
	return float64(r.moves) / float64(r.bound)
}

func (r *result) astray() float64 { return 100 * float64(r.landedAstray) / float64(max(1, r.landed)) }

// simulate runs a curve from its beginning to its end.
func simulate(c curve, seed uint64) result {
	w := &world{
		curve:  c,
		rng:    rand.New(rand.NewPCG(seed, 0)), //nolint:gosec // repeatable, not secret
		shard:  newPlace("", 0, shardCapacity),
		coming: map[int][]group{},
	}
	w.shard.label, w.shard.labelAt = true, -trafficAfter
	w.shard.sessions = min(int(c.sessions(0)), shardCapacity)
	for w.now = 0; w.now < int(c.lasts.Seconds()); w.now++ {
		w.step()
	}
	w.podsEnd = len(w.relays)
	for _, p := range w.places() {
		w.sessionsEnd += p.sessions
	}
	return w.result
}

func newPlace(name string, now, capacity int) *place {
	return &place{name: name, created: now, readyAt: now, capacity: capacity, draining: -1, overSince: -1, counted: -1}
}

func (w *world) step() {
	w.depart()
	w.follow()
	w.arrive()
	w.settle()
	w.boundOfReady()
	if w.now%reportEvery == 0 {
		w.report()
	}
	if w.now%planEvery == 0 {
		w.plan()
	}
	w.measure()
}

func (w *world) places() []*place { return append([]*place{w.shard}, w.relays...) }

// wanted is how many sessions the curve has; its noise is in the arrivals.
func (w *world) wanted(second int) float64 {
	return w.curve.sessions(time.Duration(second) * time.Second)
}

// depart ends sessions: each with the same chance, and more when the curve falls faster.
func (w *world) depart() {
	chance := max(1/w.curve.stay.Seconds(), 1-w.wanted(w.now+1)/w.wanted(w.now))
	for _, p := range w.places() {
		gone := w.binomial(p.sessions, chance)
		young := 0
		if p.sessions > 0 {
			young = int(float64(gone) * float64(p.young) / float64(p.sessions))
		}
		p.sessions -= gone
		p.young = min(p.young-young, p.sessions)
	}
}

// follow sends away sessions as ordered.
func (w *world) follow() {
	for _, p := range w.places() {
		if p.order.Round == 0 || p.done {
			continue
		}
		if w.now >= second(p.order.Deadline) {
			p.done = true
			continue
		}
		old := p.sessions - p.young // not younger than the order: who came since stays
		p.credit += p.order.Rate
		n := min(int(p.credit), old)
		if !p.order.All {
			n = min(n, p.order.Leave-p.left)
		}
		p.credit -= float64(n)
		p.sessions -= n
		p.left += n
		p.done = old == n || !p.order.All && p.left == p.order.Leave
		w.moves += n
		for i := range resumeWithin {
			part := n * (i + 1) / resumeWithin
			part -= n * i / resumeWithin
			w.come(w.now+1+i, group{part, w.now + 1 + i, true})
		}
	}
}

func second(t time.Time) int { return int(t.Sub(epoch).Seconds()) }

func (w *world) come(when int, g group) {
	if g.n > 0 {
		w.coming[when] = append(w.coming[when], g)
	}
}

// arrive brings new clients and those that come back, each to one of the accepting endpoints.
func (w *world) arrive() {
	w.mood += -w.mood/120 + w.curve.noise*math.Sqrt(2.0/120)*w.rng.NormFloat64()
	rate := w.wanted(w.now+1) - w.wanted(w.now) + w.wanted(w.now)/w.curve.stay.Seconds()
	w.come(w.now, group{n: w.poisson(rate * max(0, 1+w.mood)), since: w.now})
	groups := w.coming[w.now]
	delete(w.coming, w.now)
	var open []*place
	for _, p := range w.places() {
		if p.accepts(w.now, trafficAfter) && p.readyAt <= w.now {
			open = append(open, p)
		}
	}
	if len(open) == 0 {
		panic("nobody accepts") // the planner never lets that happen
	}
	for _, g := range groups {
		rest := g.n
		for i, p := range open {
			n := w.binomial(rest, 1/float64(len(open)-i))
			rest -= n
			if n == 0 {
				continue
			}
			p.arrived += n
			p.waiting = append(p.waiting, group{n, g.since, g.moved})
			p.heldSince = append(p.heldSince, w.now)
			if g.moved {
				w.landed += n
				if p.draining >= 0 {
					w.landedAstray += n
				}
			}
		}
	}
}

// accepts says whether a label that was written shows after so many seconds.
func (p *place) accepts(now, after int) bool {
	return p.label == (now-p.labelAt >= after)
}

// settle lets in who waits while there is room, and closes who has waited for too long.
func (w *world) settle() {
	for _, p := range w.places() {
		for len(p.waiting) > 0 {
			g := &p.waiting[0]
			n := min(g.n, p.capacity-p.sessions)
			if n <= 0 {
				break
			}
			if wait := w.now - g.since; wait > 0 {
				w.held += n
				w.longestWait = max(w.longestWait, wait)
			}
			p.sessions += n
			p.young += n
			if g.n -= n; g.n == 0 {
				p.waiting, p.heldSince = p.waiting[1:], p.heldSince[1:]
			}
		}
		for len(p.waiting) > 0 && w.now-p.heldSince[0] >= holdTime {
			w.disperse(p.waiting[0])
			p.waiting, p.heldSince = p.waiting[1:], p.heldSince[1:]
		}
	}
}

// disperse lets clients try again within a few seconds.
func (w *world) disperse(g group) {
	for i := range retryWithin {
		n := w.binomial(g.n, 1/float64(retryWithin-i))
		g.n -= n
		w.come(w.now+1+i, group{n, g.since, g.moved})
	}
}

func (p *place) held() int {
	n := 0
	for _, g := range p.waiting {
		n += g.n
	}
	return n
}

// report tells the operator what was measured at the last time, unless it gets lost.
func (w *world) report() {
	for _, p := range w.places() {
		if p.readyAt > w.now {
			continue
		}
		if w.rng.Float64() >= lostReports {
			p.told = p.taken
		}
		p.taken = relayplan.Endpoint{
			ReportedAt: at(w.now),
			Sessions:   p.sessions,
			Waiting:    p.held(),
			Arrivals:   float64(p.arrived) / reportEvery,
			Order:      relayplan.Progress{Round: p.order.Round, Left: p.left, Done: p.done, Deadline: p.order.Deadline},
		}
		p.arrived = 0
	}
}

func (p *place) observed(now int) relayplan.Endpoint {
	e := p.told
	e.Accepting = p.accepts(now, endpointsAfter) && p.readyAt <= now
	e.AcceptingSince = at(max(p.labelAt+endpointsAfter, p.readyAt))
	if p.label != e.Accepting {
		e.AcceptingSince = at(p.created)
	}
	return e
}

// plan asks the planner and does what it says.
func (w *world) plan() {
	policy := relayplan.DefaultPolicy()
	if w.curve.policy != nil {
		w.curve.policy(&policy, time.Duration(w.now)*time.Second)
	}
	obs := relayplan.Observation{
		Now:       at(w.now),
		Policy:    policy,
		Desired:   &w.desired,
		Shard:     relayplan.Shard{Endpoint: w.shard.observed(w.now), Room: shardCapacity - w.shard.told.Sessions},
		Complete:  !w.shard.told.ReportedAt.IsZero(),
		LastRound: w.lastRound,
		Budget:    policy.MaxMovesPerSecond,
		Relays:    make([]relayplan.Relay, 0, len(w.relays)),
	}
	for _, p := range w.relays {
		r := relayplan.Relay{
			Endpoint: p.observed(w.now), Name: p.name, Created: at(p.created),
			Phase: relayplan.Ready, PhaseSince: at(p.readyAt),
		}
		if p.readyAt > w.now {
			r.Phase, r.PhaseSince = relayplan.Pending, r.Created
		}
		if p.draining >= 0 {
			r.DrainingSince = at(p.draining)
		}
		obs.Relays = append(obs.Relays, r)
	}
	var d relayplan.Decision
	d, w.memory = relayplan.Plan(obs, w.memory)
	w.wants(d.Want)
	w.boundOfDrains(d.Drain)
	w.relays = slices.DeleteFunc(w.relays, func(p *place) bool {
		if slices.Contains(d.Drain, p.name) {
			p.draining = w.now
		}
		gone := slices.Contains(d.Delete, p.name)
		if gone {
			w.disperse(group{n: p.sessions + p.held(), since: w.now})
		}
		return gone
	})
	for range d.Create {
		w.made++
		p := newPlace(fmt.Sprintf("relay-%06d", w.made), w.now, policy.SessionsPerRelay)
		p.readyAt = w.now + podStartMin + w.rng.IntN(podStartMax-podStartMin+1)
		w.relays = append(w.relays, p)
	}
	w.shard.setLabel(w.now, d.ShardAccepts)
	for _, p := range w.relays {
		_, accepts := slices.BinarySearch(d.Accept, p.name)
		p.setLabel(w.now, accepts)
	}
	if d.Round != nil {
		w.give(d.Round)
	}
}

func (p *place) setLabel(now int, label bool) {
	if p.label != label {
		p.label, p.labelAt = label, now
	}
}

// give sends the orders of a round.
func (w *world) give(r *relayplan.Round) {
	if r.ID > w.lastRound {
		w.lastRound = r.ID
		for _, p := range w.places() {
			p.young = 0
		}
	}
	for _, p := range w.places() {
		i := slices.IndexFunc(r.Orders, func(o relayplan.Order) bool { return o.Relay == p.name })
		if i < 0 {
			continue
		}
		if p.order.Round < r.ID {
			p.left, p.done, p.credit = 0, false, 0
		}
		p.order = r.Orders[i]
	}
}

// wants notes changes of the wanted number.
func (w *world) wants(n int) {
	if n == w.desired {
		return
	}
	up := n > w.desired
	if w.changes > 0 && up != w.lastUp && w.now-w.lastChange < int(turnBack.Seconds()) {
		w.oscillations++
	}
	w.changes++
	w.lastUp, w.lastChange, w.desired = up, w.now, n
}

// boundOfReady counts the load above target when relays have become ready.
func (w *world) boundOfReady() {
	var serving []*place
	sessions, became := w.shard.sessions, false
	for _, p := range w.relays {
		if p.readyAt <= w.now && p.draining < 0 {
			serving = append(serving, p)
			sessions += p.sessions
			became = became || p.readyAt == w.now
		}
	}
	if len(serving) == 0 {
		w.shard.counted = -1
		return
	}
	target := tolerated(sessions, len(serving))
	for _, p := range serving {
		if float64(p.sessions) <= max(target, p.counted) {
			p.counted = -1 // it has been dealt with, by moves or by arrivals elsewhere
		}
	}
	if !became {
		return
	}
	w.skewed = nil
	w.countAbove(w.shard, 0)
	for _, p := range serving {
		w.countAbove(p, target)
	}
}

// tolerated is how many sessions a relay may have of so many on so many relays.
func tolerated(sessions, relays int) float64 {
	policy := relayplan.DefaultPolicy()
	even := float64(sessions) / float64(relays)
	return even + max(even*float64(policy.MaxSkewPercent)/100, float64(policy.MinSkewSessions))
}

// countAbove counts what a place has above its target, unless an earlier change counted it.
func (w *world) countAbove(p *place, target float64) {
	from := float64(p.sessions)
	if p.counted >= 0 {
		from = min(from, p.counted)
	}
	if from > target {
		w.bound += int(from - target)
		p.counted = target
	}
}

// boundOfDrains counts the smallest loads when relays are taken away.
func (w *world) boundOfDrains(names []string) {
	var loads []int
	for _, p := range w.relays {
		if p.readyAt <= w.now && p.draining < 0 {
			loads = append(loads, p.sessions)
		}
	}
	slices.Sort(loads)
	for _, n := range loads[:min(len(names), len(loads))] {
		w.bound += n
	}
}

func (w *world) measure() {
	over, sessions, serving, fullest := false, w.shard.sessions, 0, 0
	for _, p := range w.relays {
		sessions += p.sessions
		if p.sessions+p.held() <= p.capacity {
			p.overSince = -1
		} else {
			over = true
			if p.overSince < 0 {
				p.overSince = w.now
			}
			w.longestOverload = max(w.longestOverload, w.now-p.overSince+1)
		}
		if p.readyAt <= w.now && p.draining < 0 {
			serving++
			fullest = max(fullest, p.sessions)
		}
	}
	if over {
		w.overload++
	}
	w.peak = max(w.peak, sessions)
	w.podsMax = max(w.podsMax, len(w.relays))
	w.measureSkew(sessions, serving, fullest)
}

// measureSkew looks for the worst skew that lasted for a minute while no relay became ready and
// nobody was moved.
func (w *world) measureSkew(sessions, serving, fullest int) {
	if serving == 0 || w.moves != w.movesBefore {
		w.skewed, w.movesBefore = nil, w.moves
		return
	}
	w.skewed = append(w.skewed, float64(fullest)*float64(serving)/float64(sessions)-1)
	if len(w.skewed) > skewAfter {
		w.skewed = w.skewed[1:]
		w.skew = max(w.skew, slices.Min(w.skewed))
	}
}

// binomial draws how many of n do what each does with a chance.
func (w *world) binomial(n int, chance float64) int {
	if chance >= 1 {
		return n
	}
	if mean := float64(n) * chance; n > 100 && mean > 20 {
		return min(max(0, int(math.Round(mean+math.Sqrt(mean*(1-chance))*w.rng.NormFloat64()))), n)
	} else if n > 100 {
		return min(w.poisson(mean), n)
	}
	hits := 0
	for range n {
		if w.rng.Float64() < chance {
			hits++
		}
	}
	return hits
}

// poisson draws how often something happens that happens so often on average.
func (w *world) poisson(mean float64) int {
	if mean > 50 {
		return max(0, int(math.Round(mean+math.Sqrt(mean)*w.rng.NormFloat64())))
	}
	n := 0
	for left := mean - w.rng.ExpFloat64(); left > 0; left -= w.rng.ExpFloat64() {
		n++
	}
	return n
}
