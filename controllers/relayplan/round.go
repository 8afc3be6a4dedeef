package relayplan

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Reason says why moves that are due do not begin, or pause.
type Reason string

const (
	// StaleReports: a report is older than 10 s.
	StaleReports Reason = "StaleReports"
	// IncompleteReports: the shard or a relay has not reported yet.
	IncompleteReports Reason = "IncompleteReports"
	// EndpointsBehind: traffic still goes to an endpoint that sessions are to leave.
	EndpointsBehind Reason = "EndpointsBehind"
	// NoRoom: those who accept new sessions are full, or nobody accepts.
	NoRoom Reason = "NoRoom"
	// Reconnecting: many sessions are gone that were there lately; most will come back.
	Reconnecting Reason = "Reconnecting"
	// Settling: what the last round moved may still be on its way.
	Settling Reason = "Settling"
	// EarlierRound: endpoints still follow orders of a round that this planner did not begin.
	EarlierRound Reason = "EarlierRound"
	// BudgetSpent: the namespace leaves this guild no moves.
	BudgetSpent Reason = "BudgetSpent"
	// AwaitingApproval: the plan's hash has to be approved.
	AwaitingApproval Reason = "AwaitingApproval"
	// PlanOutdated: the plan no longer fits the reports.
	PlanOutdated Reason = "PlanOutdated"
)

const (
	// settleTime is how long moved sessions take to be back and reported.
	settleTime = 10 * time.Second
	// evenOutTime is how long arrivals and departures are given to even out a spread, and those who are gone to come back.
	evenOutTime = 30 * time.Second
	// roundTime is how long a round is planned to last at most; then the reports are asked again.
	roundTime = time.Minute
)

// Order tells an endpoint to send sessions away with op 7.
type Order struct {
	// Relay is the relay's name; empty is the shard.
	Relay string
	Round int64
	// Leave is how many sessions leave. With All everyone does who may, and Leave is what was
	// expected.
	Leave int
	All   bool
	// Rate is how many leave per second; 0 is a pause.
	Rate float64
	// Deadline ends the order, whatever is left.
	Deadline time.Time
	// NotYoungerThan spares connections made after it, which the round may itself have moved.
	// It is the beginning of the round, so nobody is moved twice in one.
	NotYoungerThan time.Time
}

// Round is a set of orders that are carried out together; at most one is under way.
type Round struct {
	// ID is one above the last round's.
	ID                int64
	Started, Deadline time.Time
	// Hash names the plan, its ID and every order's Relay and Leave.
	Hash string
	// Summary is the plan in one line, of bounded length.
	Summary string
	// Drain: the orders empty endpoints, and need no approval.
	Drain  bool
	Orders []Order
	// ToMove and Moved are sums over the orders.
	ToMove, Moved int
}

// Validate says why a plan may not be acted on now; empty: it may. Ask with fresh reports just
// before the first order.
func Validate(r *Round, obs *Observation) Reason {
	if reason := obs.reports(); reason != "" {
		return reason
	}
	ordered, even := map[string]bool{}, obs.spread().even
	for i := range r.Orders {
		o := &r.Orders[i]
		ordered[o.Relay] = true
		e := obs.endpoint(o.Relay)
		if e == nil {
			return PlanOutdated
		}
		if !obs.stopped(e) {
			return EndpointsBehind
		}
		if !r.Drain && e.load()-float64(o.Leave) < even {
			return PlanOutdated // it would have less than its share
		}
	}
	if obs.room(ordered) < r.ToMove {
		return NoRoom
	}
	return ""
}

// Share divides a namespace's moves per second among its guilds: nobody gets more than it asks
// for, and who gets less than that gets no less than anybody else.
func Share(total float64, asks []float64) []float64 {
	order := make([]int, len(asks))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(asks[a], asks[b]) })
	shares := make([]float64, len(asks))
	for i, guild := range order {
		shares[guild] = min(asks[guild], total/float64(len(asks)-i))
		total -= shares[guild]
	}
	return shares
}

// round begins, watches and ends rounds.
func (p *plan) round() {
	if p.mem.round != nil {
		p.watch()
		return
	}
	if p.earlierRound() {
		p.Blocked = EarlierRound
		return
	}
	orders, rebalancing := p.drains(), false
	if len(orders) == 0 {
		orders, rebalancing = p.rebalance(), true
	}
	if len(orders) == 0 || !rebalancing || p.Policy.Rebalance != RebalanceApprove {
		p.mem.proposal = nil
	}
	if orders = p.limit(orders); len(orders) == 0 {
		p.Proposal = p.mem.proposal
		return
	}
	next := newRound(p.LastRound+1, orders, !rebalancing)
	if rebalancing && p.Policy.Rebalance == RebalanceApprove {
		// The one that was proposed stays while it fits, so that its hash does.
		if old := p.mem.proposal; old != nil && old.ID == next.ID && Validate(old, &p.Observation) != PlanOutdated {
			next = old
		}
		p.mem.proposal = next
		if p.Approved != next.Hash {
			p.Proposal, p.Blocked = next, AwaitingApproval
			return
		}
	}
	if p.Blocked = Validate(next, &p.Observation); p.Now.Before(p.mem.quietUntil) {
		p.Blocked = Settling
	}
	if p.Blocked != "" {
		p.Proposal = p.mem.proposal
		return
	}
	p.mem.proposal = nil
	p.mem.round = p.begin(next)
	p.Round = p.paced(p.mem.round, p.rate())
}

// begin dates a round.
func (p *plan) begin(planned *Round) *Round {
	r := *planned
	r.Started = p.Now
	r.Deadline = p.Now.Add(30*time.Second + duration(r.ToMove, p.rate())*3/2)
	r.Orders = slices.Clone(planned.Orders)
	for i := range r.Orders {
		o := &r.Orders[i]
		o.Round, o.Deadline, o.NotYoungerThan = r.ID, r.Deadline, r.Started
	}
	return &r
}

// watch paces or pauses the round under way, or ends it.
func (p *plan) watch() {
	r := *p.mem.round
	r.Moved = 0
	over := true
	ordered := map[string]bool{}
	for i := range r.Orders {
		o := &r.Orders[i]
		ordered[o.Relay] = true
		e := p.endpoint(o.Relay)
		if e == nil {
			continue // its sessions have left with it
		}
		if e.Order.Round == r.ID {
			r.Moved += e.Order.Left
		}
		if e.Order.Round < r.ID || e.Order.Round == r.ID && !e.Order.Done {
			over = false
		}
	}
	if over || !p.Now.Before(r.Deadline) {
		p.mem.round = nil
		p.mem.quietUntil = p.Now.Add(settleTime)
		return
	}
	rate := p.rate()
	switch {
	case p.Reports != "":
		p.Blocked = p.Reports
	case p.spare(ordered) <= 0:
		p.Blocked = NoRoom
	case rate <= 0:
		p.Blocked = BudgetSpent
	}
	if p.Blocked != "" {
		rate = 0
	}
	p.Round = p.paced(&r, rate)
}

// paced is a round whose orders share a rate so that they end together.
func (p *plan) paced(r *Round, rate float64) *Round {
	paced := *r
	paced.Orders = slices.Clone(r.Orders)
	for i := range paced.Orders {
		paced.Orders[i].Rate = rate * float64(paced.Orders[i].Leave) / float64(r.ToMove)
	}
	return &paced
}

// earlierRound says whether endpoints follow orders of another planner, before a restart.
func (p *plan) earlierRound() bool {
	return p.Shard.Order.underWay(p.Now) ||
		slices.ContainsFunc(p.Relays, func(r Relay) bool { return r.Phase != Failed && r.Order.underWay(p.Now) })
}

// drains are the orders that empty endpoints: the shard of a relayed guild, then relays that go,
// the emptiest first. Who still accepts is left for later.
func (p *plan) drains() []Order {
	var orders []Order
	for i := range p.Relays {
		if r := &p.Relays[i]; r.draining() && r.Phase != Failed && r.Sessions > 0 && p.stopped(&r.Endpoint) {
			orders = append(orders, Order{Relay: r.Name, Leave: r.Sessions, All: true})
		}
	}
	slices.SortStableFunc(orders, func(a, b Order) int { return cmp.Compare(a.Leave, b.Leave) })
	if p.Want > 0 && p.Shard.Sessions > 0 && p.stopped(&p.Shard.Endpoint) {
		// Not All: the shard stays, and while the order stands those may come back to it that it has moved.
		orders = slices.Insert(orders, 0, Order{Leave: p.Shard.Sessions})
	}
	return orders
}

// limit cuts orders down to what fits in a round and in the room there is, the first ones first.
func (p *plan) limit(orders []Order) []Order {
	limit := int(p.rate() * roundTime.Seconds())
	switch spare := p.spare(nil); {
	case len(orders) == 0:
		return nil
	case limit <= 0:
		p.Blocked = BudgetSpent
	case spare <= 0:
		p.Blocked = NoRoom
	default:
		limit = min(limit, spare)
	}
	if p.Blocked != "" {
		return nil
	}
	return cut(orders, limit)
}

// cut keeps so many moves, those of the first orders.
func cut(orders []Order, moves int) []Order {
	for i := range orders {
		o := &orders[i]
		if o.Leave > moves {
			o.Leave, o.All = moves, false
		}
		moves -= o.Leave
	}
	return slices.DeleteFunc(orders, func(o Order) bool { return o.Leave <= 0 })
}

// rebalance are the orders that even out the relays: who will still be above the edge when
// arrivals and departures have had their time goes down to a little below it.
func (p *plan) rebalance() []Order {
	if p.Policy.Rebalance == RebalanceDisabled || p.Reports != "" || p.Want == 0 {
		return nil
	}
	sessions, arrivals := p.load()
	if sessions == 0 {
		return nil
	}
	now := p.spread()
	// Of every session so much departs, and so many come on balance.
	departing := max(0, arrivals-p.mem.growth) / sessions * evenOutTime.Seconds()
	later := p.spreadOf(now.even*float64(now.relays)+p.mem.growth*evenOutTime.Seconds(), now.relays)
	target := later.even + later.band*0.9
	var orders []Order
	serving := p.serving()
	for _, r := range serving {
		if stays := r.load() * (1 - departing); stays > later.even+later.band {
			orders = append(orders, Order{Relay: r.Name, Leave: min(r.Sessions, int(math.Ceil(stays-target)))})
		}
	}
	if len(orders) == 0 {
		return nil
	}
	if sessions < 0.9*p.mem.loads.since(p.Now.Add(-evenOutTime)).top() {
		p.Blocked = Reconnecting
		return nil
	}
	slices.SortStableFunc(orders, func(a, b Order) int { return cmp.Compare(b.Leave, a.Leave) })
	// What leaves spreads evenly over those who accept, so no more leave at a time than can land
	// on some number of the emptiest without lifting one of them above the target.
	slices.SortFunc(serving, func(a, b *Relay) int { return cmp.Compare(a.load(), b.load()) })
	land := 0.0
	for i, r := range serving {
		land = max(land, float64(i+1)*(target-r.load()))
	}
	return cut(orders, int(land))
}

// spread is how sessions would lie evenly over relays, and by how many a relay may be above that.
type spread struct {
	relays     int
	even, band float64
}

func (o *Observation) spread() spread {
	var sum float64
	serving := o.serving()
	for _, r := range serving {
		sum += r.load()
	}
	return o.spreadOf(sum, len(serving))
}

func (o *Observation) spreadOf(sessions float64, relays int) spread {
	even := sessions / float64(max(relays, 1))
	return spread{relays, even, max(even*float64(o.Policy.MaxSkewPercent)/100, float64(o.Policy.MinSkewSessions))}
}

// room is how many more sessions fit where new ones go: on the relays that serve or, when there
// are none, on the shard; the ordered ones are not asked. Nobody accepting is no room.
func (o *Observation) room(ordered map[string]bool) int {
	room, accepted := 0, false
	for _, r := range o.serving() {
		if !ordered[r.Name] {
			room += o.Policy.SessionsPerRelay - r.Sessions - r.Waiting
			accepted = accepted || r.Accepting
		}
	}
	if !accepted && o.Shard.Accepting && !ordered[""] {
		return o.Shard.Room
	}
	if !accepted {
		return 0
	}
	return room
}

// spare is the room that growth will leave.
func (p *plan) spare(ordered map[string]bool) int {
	return p.room(ordered) - int(p.mem.growth*evenOutTime.Seconds())
}

// stopped says whether no traffic goes to an endpoint any more.
func (o *Observation) stopped(e *Endpoint) bool {
	return !e.Accepting && o.Now.Sub(e.AcceptingSince) >= endpointLag
}

// endpoint is the one of that name that is still there; empty is the shard.
func (o *Observation) endpoint(name string) *Endpoint {
	if name == "" {
		return &o.Shard.Endpoint
	}
	for i := range o.Relays {
		if r := &o.Relays[i]; r.Name == name && r.Phase != Failed {
			return &r.Endpoint
		}
	}
	return nil
}

// rate is how many sessions may move per second.
func (o *Observation) rate() float64 { return min(o.Policy.MaxMovesPerSecond, o.Budget) }

// duration that a number of moves takes at a rate.
func duration(moves int, rate float64) time.Duration {
	if rate <= 0 {
		return 0
	}
	return time.Duration(float64(moves) / rate * float64(time.Second))
}

func newRound(id int64, orders []Order, drain bool) *Round {
	r := Round{ID: id, Orders: orders, Drain: drain}
	sum := sha256.New()
	fmt.Fprintln(sum, id)
	var parts []string
	for _, o := range orders {
		r.ToMove += o.Leave
		fmt.Fprintln(sum, o.Relay, o.Leave)
		parts = append(parts, fmt.Sprintf("%d from %s", o.Leave, cmp.Or(o.Relay, "the shard")))
	}
	const few = 3
	if more := len(parts) - few; more > 0 {
		parts = append(parts[:few], fmt.Sprintf("%d relays more", more))
	}
	r.Hash = hex.EncodeToString(sum.Sum(nil))[:16]
	r.Summary = fmt.Sprintf("%d sessions: %s", r.ToMove, strings.Join(parts, ", "))
	return &r
}
