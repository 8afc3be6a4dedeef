package relayplan

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// checkDecision holds a decision to what must always be true.
func checkDecision(t *rapid.T, obs *Observation, d *Decision) {
	reports := obs.reports()
	p := &obs.Policy
	if p.Scaling == ScalingAuto && (d.Want < p.MinReplicas || d.Want > p.MaxReplicas) {
		t.Fatalf("%d relays are wanted, not %d to %d", d.Want, p.MinReplicas, p.MaxReplicas)
	}
	if p.Scaling == ScalingAuto && reports != "" && obs.Desired != nil && d.Want < min(*obs.Desired, p.MaxReplicas) {
		t.Fatalf("scaled down from %d to %d on %s", *obs.Desired, d.Want, reports)
	}
	relays := map[string]*Relay{}
	for i := range obs.Relays {
		relays[obs.Relays[i].Name] = &obs.Relays[i]
	}
	going := map[string]bool{}
	for _, name := range slices.Concat(d.Drain, d.Delete) {
		if relays[name] == nil || going[name] {
			t.Fatalf("%s is drained or deleted, and is not there or goes twice", name)
		}
		going[name] = true
	}

	// Some relay stays that was ready and meant to stay, unless the shard is to serve.
	ready, stay, hung := 0, 0, 0
	for name, r := range relays {
		if r.draining() || r.Phase == Failed {
			continue
		}
		if r.Phase == Ready {
			ready++
			if !going[name] {
				stay++
			}
		} else if r.Phase == NotReady && going[name] {
			hung++
		}
	}
	if d.Want > 0 && ready > 0 && stay == 0 {
		t.Fatal("no ready relay stays")
	}
	if reports != "" && (stay != ready || hung > max(1, d.Want*p.SurgePercent/100)) {
		t.Fatalf("%d ready and %d hung relays go on %s", ready-stay, hung, reports)
	}

	// The endpoints are never empty: some endpoint that traffic can reach now stays one.
	reachable, left := obs.Shard.Accepting, obs.Shard.Accepting && d.ShardAccepts
	for name, r := range relays {
		if r.Accepting && r.Phase == Ready {
			reachable = true
			left = left || slices.Contains(d.Accept, name)
		}
	}
	if len(d.Accept) == 0 && !d.ShardAccepts {
		t.Fatal("nobody shall accept")
	}
	gone := 0
	for _, name := range d.Accept {
		if relays[name] == nil || relays[name].Phase != Ready {
			t.Fatalf("%s shall accept", name)
		}
		if relays[name].draining() || going[name] {
			gone++
		}
	}
	if reachable && !left {
		t.Fatalf("nobody of %v (shard %v) is among the endpoints", d.Accept, d.ShardAccepts)
	}
	if gone > 0 && gone < len(d.Accept) && slices.ContainsFunc(d.Accept, func(n string) bool {
		return relays[n].Accepting && !relays[n].draining() && !going[n]
	}) {
		t.Fatalf("relays that go shall accept without need: %v", d.Accept)
	}

	checkRound(t, obs, d, relays)
}

func checkRound(t *rapid.T, obs *Observation, d *Decision, relays map[string]*Relay) {
	if d.Round == nil {
		return
	}
	r := d.Round
	rate, moves := 0.0, 0
	ordered := map[string]bool{}
	for _, o := range r.Orders {
		rate += o.Rate
		moves += o.Leave
		if ordered[o.Relay] {
			t.Fatalf("%q is ordered twice", o.Relay)
		}
		ordered[o.Relay] = true
		if o.Round != r.ID || !o.NotYoungerThan.Equal(r.Started) || !o.Deadline.Equal(r.Deadline) || o.Leave <= 0 {
			t.Fatalf("order %+v in round %+v", o, r)
		}
	}
	if rate > min(obs.Policy.MaxMovesPerSecond, obs.Budget)+1e-6 {
		t.Fatalf("%f moves per second, allowed are %f and %f", rate, obs.Policy.MaxMovesPerSecond, obs.Budget)
	}
	if moves != r.ToMove {
		t.Fatalf("%d leave, the round says %d", moves, r.ToMove)
	}
	if obs.reports() != "" && rate > 0 {
		t.Fatalf("sessions move on %s", obs.reports())
	}
	if !r.Started.Equal(obs.Now) {
		return
	}
	if r.ID != obs.LastRound+1 {
		t.Fatalf("round %d after %d", r.ID, obs.LastRound)
	}
	for _, o := range r.Orders {
		e := obs.Shard.Endpoint
		if o.Relay != "" {
			e = relays[o.Relay].Endpoint
		}
		if e.Accepting || o.Leave > e.Sessions || o.All && o.Leave != e.Sessions {
			t.Fatalf("order %+v for %+v", o, e)
		}
	}
}

// drawObservation makes any guild.
func drawObservation(t *rapid.T, now time.Time) Observation {
	chance := func(percent int, label string) bool { return rapid.IntRange(0, 99).Draw(t, label) < percent }
	ago := func(most int, label string) time.Time {
		return now.Add(-time.Duration(rapid.IntRange(0, most).Draw(t, label)) * time.Second)
	}
	obs := Observation{
		Now: now, Policy: DefaultPolicy(), Revision: "new", Complete: chance(95, "complete"),
		LastRound: int64(rapid.IntRange(0, 3).Draw(t, "last round")), Budget: float64(rapid.IntRange(0, 600).Draw(t, "budget")),
	}
	draw := func() Endpoint {
		return Endpoint{
			Accepting: chance(50, "accepting"), AcceptingSince: ago(20, "since"), ReportedAt: ago(rapid.SampledFrom([]int{5, 5, 5, 30}).Draw(t, "age"), "reported"),
			Sessions: rapid.IntRange(0, 16000).Draw(t, "sessions"), Arrivals: float64(rapid.IntRange(0, 300).Draw(t, "arrivals")),
		}
	}
	obs.Shard = Shard{Endpoint: draw(), Room: rapid.IntRange(0, 15000).Draw(t, "room"), Deliveries: float64(rapid.IntRange(0, 500_000).Draw(t, "deliveries"))}
	p := &obs.Policy
	p.MinReplicas = rapid.IntRange(0, 3).Draw(t, "min")
	p.MaxReplicas = p.MinReplicas + rapid.IntRange(1, 5).Draw(t, "max")
	p.Replicas = rapid.IntRange(0, 5).Draw(t, "replicas")
	p.Scaling = rapid.SampledFrom([]Scaling{ScalingAuto, ScalingAuto, ScalingManual, ScalingDisabled}).Draw(t, "scaling")
	p.Rebalance = rapid.SampledFrom([]Rebalancing{RebalanceAuto, RebalanceAuto, RebalanceApprove, RebalanceDisabled}).Draw(t, "rebalancing")
	for i := range rapid.IntRange(0, 6).Draw(t, "relays") {
		r := Relay{
			Endpoint: draw(), Name: fmt.Sprintf("relay-%d", i),
			Revision:   rapid.SampledFrom([]string{"new", "new", "old"}).Draw(t, "revision"),
			Created:    ago(1000, "created"),
			Phase:      rapid.SampledFrom([]Phase{Ready, Ready, Ready, Ready, Pending, NotReady, Failed}).Draw(t, "phase"),
			PhaseSince: ago(400, "phase since"),
		}
		if chance(20, "draining") {
			r.DrainingSince = ago(400, "draining since")
		}
		obs.Relays = append(obs.Relays, r)
	}
	if chance(80, "desired known") {
		n := rapid.IntRange(0, 6).Draw(t, "desired")
		obs.Desired = &n
	}
	return obs
}

func TestAnyDecision(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var mem Memory
		now := noon
		for range rapid.IntRange(1, 5).Draw(t, "calls") {
			obs := drawObservation(t, now)
			shuffled := obs
			shuffled.Relays = rapid.Permutation(obs.Relays).Draw(t, "order")
			d, next := Plan(obs, mem)
			other, _ := Plan(shuffled, mem)
			if diff := cmp.Diff(d, other); diff != "" {
				t.Fatalf("the order matters:\n%s", diff)
			}
			checkDecision(t, &obs, &d)
			mem = next
			now = now.Add(time.Duration(rapid.IntRange(1, 400).Draw(t, "passes")) * time.Second)
		}
	})
}

// model is a guild whose pods, labels and clients do at once, or after a drawn time, what the
// planner says; what it sees is 2 s old. Sessions that arrive spread evenly over the endpoints.
type model struct {
	t      *rapid.T
	obs    Observation // as it is; reports are those of the last step
	before map[string]int
	starts map[string]time.Time
	mem    Memory
	made   int
	moved  int
	turn   int
	wants  []int
}

const step = 2 * time.Second

func newModel(t *rapid.T, loads ...int) *model {
	obs := guild(0).Observation
	obs.Shard.Accepting = true
	m := &model{t: t, obs: obs, before: map[string]int{}, starts: map[string]time.Time{}}
	for _, sessions := range loads {
		m.obs.Shard.Accepting = false
		r := relay("a", sessions).Relay
		r.Name = m.name()
		m.obs.Relays = append(m.obs.Relays, r)
	}
	n := len(loads)
	m.obs.Desired = &n
	return m
}

func (m *model) name() string {
	m.made++
	return fmt.Sprintf("relay-%03d", m.made)
}

func (m *model) endpoints() []*Endpoint {
	all := []*Endpoint{&m.obs.Shard.Endpoint}
	for i := range m.obs.Relays {
		all = append(all, &m.obs.Relays[i].Endpoint)
	}
	return all
}

func (m *model) total() int {
	n := 0
	for _, e := range m.endpoints() {
		n += e.Sessions
	}
	return n
}

// arrive spreads clients over those who accept.
func (m *model) arrive(n int) {
	var open []*Endpoint
	for _, e := range m.endpoints() {
		if e.Accepting {
			open = append(open, e)
		}
	}
	if len(open) == 0 {
		m.t.Fatal("nobody accepts")
	}
	for i, e := range open {
		part := n / len(open)
		if (i+m.turn)%len(open) < n%len(open) {
			part++
		}
		e.Sessions += part
		e.Arrivals = float64(part) / step.Seconds()
	}
	m.turn++
}

// to lets clients come and go until there are so many.
func (m *model) to(sessions int) {
	for _, e := range m.endpoints() {
		e.Arrivals = 0
	}
	if total := m.total(); sessions >= total {
		m.arrive(sessions - total)
	} else {
		for _, e := range m.endpoints() {
			e.Sessions = e.Sessions * sessions / total
		}
	}
}

// step plans with a guild of so many sessions, and does what is said.
func (m *model) step(sessions int) {
	m.obs.Now = m.obs.Now.Add(step)
	now := m.obs.Now
	m.to(sessions)
	for i := range m.obs.Relays {
		if r := &m.obs.Relays[i]; r.Phase == Pending && !now.Before(m.starts[r.Name]) {
			r.Phase, r.PhaseSince = Ready, now
		}
	}

	seen := m.obs
	seen.Relays = slices.Clone(m.obs.Relays)
	seen.Shard.Sessions, m.before[""] = m.report("", m.obs.Shard.Sessions), m.obs.Shard.Sessions
	seen.Shard.Room = 15000 - seen.Shard.Sessions
	seen.Shard.ReportedAt = now.Add(-step)
	for i := range seen.Relays {
		r := &seen.Relays[i]
		r.ReportedAt = now.Add(-step)
		r.Sessions, m.before[r.Name] = m.report(r.Name, r.Sessions), r.Sessions
	}
	d, mem := Plan(seen, m.mem)
	m.mem = mem
	checkDecision(m.t, &seen, &d)
	m.wants = append(m.wants, d.Want)
	m.obs.Desired = &d.Want
	m.do(&d)
}

func (m *model) report(name string, sessions int) int {
	if n, ok := m.before[name]; ok {
		return n
	}
	return sessions
}

func (m *model) do(d *Decision) {
	now := m.obs.Now
	m.obs.Relays = slices.DeleteFunc(m.obs.Relays, func(r Relay) bool {
		if slices.Contains(d.Delete, r.Name) && r.Sessions > 0 {
			m.t.Fatalf("%s is deleted with %d sessions", r.Name, r.Sessions)
		}
		return slices.Contains(d.Delete, r.Name)
	})
	set := func(e *Endpoint, accepting bool) {
		if e.Accepting != accepting {
			e.Accepting, e.AcceptingSince = accepting, now
		}
	}
	set(&m.obs.Shard.Endpoint, d.ShardAccepts)
	for i := range m.obs.Relays {
		r := &m.obs.Relays[i]
		set(&r.Endpoint, slices.Contains(d.Accept, r.Name))
		if slices.Contains(d.Drain, r.Name) {
			r.DrainingSince = now
		}
	}
	for range d.Create {
		r := Relay{Name: m.name(), Revision: m.obs.Revision, Created: now, Phase: Pending, PhaseSince: now, Endpoint: Endpoint{AcceptingSince: now}}
		m.starts[r.Name] = now.Add(time.Duration(rapid.IntRange(5, 60).Draw(m.t, "pod start")) * time.Second)
		m.obs.Relays = append(m.obs.Relays, r)
	}
	if d.Round != nil {
		m.obs.LastRound = d.Round.ID
		for _, o := range d.Round.Orders {
			m.obey(o)
		}
	}
}

// obey sends away what an order allows in a step; they are back at once.
func (m *model) obey(o Order) {
	e := m.obs.endpoint(o.Relay)
	if e == nil || e.Order.Round == o.Round && e.Order.Done {
		return
	}
	if e.Order.Round != o.Round {
		e.Order = Progress{Round: o.Round, Deadline: o.Deadline}
	}
	if e.Accepting {
		m.t.Fatalf("who leaves %q may come back to it in the same round, and leave again", o.Relay)
	}
	n := min(int(math.Ceil(o.Rate*step.Seconds())), e.Sessions)
	if !o.All {
		n = min(n, o.Leave-e.Order.Left)
	}
	e.Sessions -= n
	e.Order.Left += n
	e.Order.Done = o.All && e.Sessions == 0 || !o.All && e.Order.Left == o.Leave
	m.moved += n
	m.arrive(n)
}

// turns says how often the wanted number began to go the other way.
func turns(wants []int) int {
	n, last := 0, 0
	for i := 1; i < len(wants); i++ {
		if way := cmp3(wants[i], wants[i-1]); way != 0 {
			if last != 0 && way != last {
				n++
			}
			last = way
		}
	}
	return n
}

func cmp3(a, b int) int { return min(1, max(-1, a-b)) }

func TestNoOscillationUnderNoise(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(t)
		base := rapid.IntRange(100, 120_000).Draw(t, "sessions")
		noise := rapid.Float64Range(0, 0.04).Draw(t, "noise")
		seed := rapid.Uint64().Draw(t, "seed")
		for range 900 { // half an hour
			seed = seed*6364136223846793005 + 1442695040888963407
			m.step(base + int(float64(base)*noise*(float64(seed>>11)/(1<<52)-1)))
		}
		if n := turns(m.wants); n > 1 {
			t.Fatalf("the wanted number turned %d times: %v", n, slices.Compact(m.wants))
		}
		if tail := m.wants[450:]; turns(tail) > 0 || len(slices.Compact(slices.Clone(tail))) > 2 {
			t.Fatalf("the wanted number does not rest: %v", slices.Compact(tail))
		}
	})
}

func TestConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(t)
		sessions := 0
		for range rapid.IntRange(1, 4).Draw(t, "changes") {
			to, steps := rapid.IntRange(0, 100_000).Draw(t, "to"), rapid.IntRange(1, 200).Draw(t, "in steps")
			from := sessions
			for i := 1; i <= steps; i++ {
				sessions = from + (to-from)*i/steps
				m.step(sessions)
			}
			if rapid.Bool().Draw(t, "roll-out") {
				m.obs.Revision = fmt.Sprint("revision ", m.made)
			}
		}
		const minute = int(time.Minute / step)
		for range 40 * minute {
			m.step(sessions)
		}
		moved, wants := m.moved, len(m.wants)
		for range 10 * minute {
			m.step(sessions)
		}
		if m.moved != moved {
			t.Fatalf("%d sessions still move", m.moved-moved)
		}
		if want := slices.Compact(m.wants[wants:]); len(want) != 1 || len(m.obs.Relays) != want[0] {
			t.Fatalf("%d relays, wanted are %v", len(m.obs.Relays), want)
		}
		if len(m.obs.Relays) == 0 {
			return
		}
		if m.obs.Shard.Sessions > 0 {
			t.Fatalf("%d sessions are still on the shard", m.obs.Shard.Sessions)
		}
		spread := m.obs.spread()
		for _, r := range m.obs.Relays {
			if r.Revision != m.obs.Revision {
				t.Fatalf("%s still has %s", r.Name, r.Revision)
			}
			if float64(r.Sessions) > spread.even+spread.band+1 {
				t.Fatalf("%s has %d sessions, %+v", r.Name, r.Sessions, spread)
			}
		}
	})
}

func TestMovesAreFew(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		loads := rapid.SliceOfN(rapid.IntRange(0, 14000), 2, 12).Draw(t, "loads")
		m := newModel(t, loads...)
		m.obs.Policy.Scaling, m.obs.Policy.Replicas = ScalingManual, len(loads)
		spread := m.obs.spread()
		bound, total := 0.0, 0
		for _, n := range loads {
			total += n
			bound += max(0, float64(n)-spread.even-spread.band*0.9)
		}
		for range 450 {
			m.step(total)
		}
		// Steering follows a little late, and each round rounds.
		if float64(m.moved) > bound*1.05+float64(2*len(loads)) {
			t.Fatalf("%d sessions moved, %.0f had to", m.moved, bound)
		}
		for _, r := range m.obs.Relays {
			if float64(r.Sessions) > spread.even+spread.band+1 {
				t.Fatalf("%s has %d sessions, %+v", r.Name, r.Sessions, spread)
			}
		}
	})
}

func BenchmarkPlan(b *testing.B) {
	var relays []*relayBuilder
	for i := range 150 {
		r := relay("a", 11000+i)
		r.Name = fmt.Sprintf("relay-%03d", i)
		relays = append(relays, r)
	}
	obs := guild(0, relays...).Observation
	mem := settled(obs)
	for b.Loop() {
		Plan(obs, mem)
	}
}
