package relayplan

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// guildBuilder makes the observation of a guild at noon: reports are 2 s old, everything has been
// as it is for an hour, and as many relays are wanted as stay.
type guildBuilder struct{ Observation }

func guild(shardSessions int, relays ...*relayBuilder) *guildBuilder {
	g := &guildBuilder{Observation{
		Now: noon, Policy: DefaultPolicy(), Revision: "new", Complete: true, LastRound: 6, Budget: 1000,
		Shard: Shard{Endpoint: endpoint(shardSessions), Room: 15000 - shardSessions},
	}}
	g.Shard.Accepting = len(relays) == 0
	desired := 0
	for _, r := range relays {
		g.Relays = append(g.Relays, r.Relay)
		if !r.draining() && r.Phase != Failed {
			desired++
		}
	}
	g.Desired = &desired
	return g
}

func endpoint(sessions int) Endpoint {
	return Endpoint{
		Accepting: true, AcceptingSince: noon.Add(-time.Hour),
		ReportedAt: noon.Add(-2 * time.Second), Sessions: sessions,
	}
}

func (b *guildBuilder) Auto(least, most int) *guildBuilder {
	b.Policy.MinReplicas, b.Policy.MaxReplicas = least, most
	return b
}

func (b *guildBuilder) Manual(n int) *guildBuilder {
	b.Policy.Scaling, b.Policy.Replicas = ScalingManual, n
	return b
}

func (b *guildBuilder) Disabled() *guildBuilder {
	b.Policy.Scaling = ScalingDisabled
	return b
}

func (b *guildBuilder) Deliveries(perSecond float64) *guildBuilder {
	b.Shard.Deliveries = perSecond
	return b
}

func (b *guildBuilder) Wanted(n int) *guildBuilder {
	b.Desired = &n
	return b
}

// ShardAccepting says since how long the shard accepts; a negative time, since how long not.
func (b *guildBuilder) ShardAccepting(since time.Duration) *guildBuilder {
	b.Shard.Accepting, b.Shard.AcceptingSince = since >= 0, noon.Add(-since.Abs())
	return b
}

func (b *guildBuilder) With(change func(o *Observation)) *guildBuilder {
	change(&b.Observation)
	return b
}

type relayBuilder struct{ Relay }

// relay makes one that is ready and accepting; an earlier letter is an older relay.
func relay(name string, sessions int) *relayBuilder {
	return &relayBuilder{Relay{
		Endpoint: endpoint(sessions), Name: name, Revision: "new", Phase: Ready,
		Created: noon.Add(-2*time.Hour + time.Duration(name[0])*time.Minute), PhaseSince: noon.Add(-time.Hour),
	}}
}

func (b *relayBuilder) Is(p Phase, since time.Duration) *relayBuilder {
	b.Phase, b.PhaseSince = p, noon.Add(-since)
	b.Accepting = false
	if p == Pending {
		b.ReportedAt = time.Time{}
	}
	return b
}

func (b *relayBuilder) Old() *relayBuilder { b.Revision = "old"; return b }

// Closed: it has not been among the endpoints for so long.
func (b *relayBuilder) Closed(since time.Duration) *relayBuilder {
	b.Accepting, b.AcceptingSince = false, noon.Add(-since)
	return b
}

func (b *relayBuilder) Draining(since time.Duration) *relayBuilder {
	b.DrainingSince = noon.Add(-since)
	return b.Closed(since)
}

func (b *relayBuilder) Reported(ago time.Duration) *relayBuilder {
	b.ReportedAt = noon.Add(-ago)
	return b
}

func (b *relayBuilder) Doing(p Progress) *relayBuilder {
	b.Order = p
	return b
}

// settled is the memory of a planner that has seen the same for an hour.
func settled(obs Observation) Memory {
	load, _ := obs.load()
	return Memory{
		at: noon.Add(-2 * time.Second), shardSince: noon.Add(-time.Hour), freshSince: noon.Add(-time.Hour),
		loads: peaks{{noon.Add(-2 * time.Second), load}}, deliveries: obs.Shard.Deliveries,
	}
}

func TestWant(t *testing.T) {
	stale := func(o *Observation) { o.Shard.ReportedAt = noon.Add(-11 * time.Second) }
	for name, tc := range map[string]struct {
		guild *guildBuilder
		// fresh: the planner has just started.
		fresh bool
		want  int
		mode  Mode
	}{
		"a light guild stays on its shard":                              {guild: guild(7000), want: 0, mode: Direct},
		"a heavy guild gets relays":                                     {guild: guild(7500), want: 1, mode: Promoting},
		"the count follows the sessions":                                {guild: guild(15000), want: 2, mode: Promoting},
		"clients that wait count":                                       {guild: guild(15000).With(func(o *Observation) { o.Shard.Waiting = 10000 }), want: 3, mode: Promoting},
		"the count follows deliveries when they ask for more":           {guild: guild(5000).Deliveries(200_000), want: 3, mode: Promoting},
		"a relayed guild keeps its relays between the two thresholds":   {guild: guild(0, relay("a", 4000)), want: 1, mode: Relayed},
		"a guild that has become light goes back to its shard":          {guild: guild(0, relay("a", 3000)), want: 0, mode: Demoting},
		"without room on the shard it does not":                         {guild: guild(0, relay("a", 3000)).With(func(o *Observation) { o.Shard.Room = 2000 }), want: 1, mode: Relayed},
		"above the target utilization one more":                         {guild: guild(0, relay("a", 12100), relay("b", 12100)), want: 3, mode: Relayed},
		"between target and hysteresis nothing changes":                 {guild: guild(0, relay("a", 11000), relay("b", 11000)), want: 2, mode: Relayed},
		"below the hysteresis one less":                                 {guild: guild(0, relay("a", 5200), relay("b", 5200)), want: 1, mode: Relayed},
		"a planner that has just started scales up":                     {guild: guild(0, relay("a", 14000)), fresh: true, want: 2, mode: Relayed},
		"a planner that has just started does not scale down":           {guild: guild(0, relay("a", 1000), relay("b", 1000)), fresh: true, want: 2, mode: Relayed},
		"nothing is scaled down on old reports":                         {guild: guild(0, relay("a", 1000), relay("b", 1000)).With(stale), want: 2, mode: Relayed},
		"nor when the shard has not told everything":                    {guild: guild(0, relay("a", 1000), relay("b", 1000)).With(func(o *Observation) { o.Complete = false }), want: 2, mode: Relayed},
		"nor when a relay's report is old":                              {guild: guild(0, relay("a", 1000), relay("b", 1000).Reported(11*time.Second)), want: 2, mode: Relayed},
		"what an old report asks for is added":                          {guild: guild(0, relay("a", 14000)).With(stale), want: 2, mode: Relayed},
		"the maximum holds":                                             {guild: guild(0, relay("a", 15000), relay("b", 15000)).Auto(0, 2), want: 2, mode: Relayed},
		"the minimum holds for an idle guild":                           {guild: guild(0).Auto(2, 9), want: 2, mode: Promoting},
		"the minimum holds for a relayed guild":                         {guild: guild(0, relay("a", 1), relay("b", 1)).Auto(2, 9), want: 2, mode: Relayed},
		"a lowered maximum is kept to":                                  {guild: guild(0, relay("a", 9000), relay("b", 9000)).Auto(0, 1), want: 1, mode: Relayed},
		"Manual is what somebody says":                                  {guild: guild(0, relay("a", 15000)).Manual(4), want: 4, mode: Relayed},
		"Manual 0 leads back to the shard":                              {guild: guild(0, relay("a", 10000)).Manual(0), want: 0, mode: Demoting},
		"Disabled leads back to the shard":                              {guild: guild(0, relay("a", 10000)).Disabled(), want: 0, mode: Demoting},
		"a failed relay is still wanted":                                {guild: guild(0, relay("a", 11000), relay("b", 8000).Is(Failed, 0)).Wanted(2), want: 2, mode: Relayed},
		"without the status what is there is what was wanted":           {guild: guild(0, relay("a", 8000), relay("b", 8000)).With(func(o *Observation) { o.Desired = nil }), want: 2, mode: Relayed},
		"while traffic still goes to the shard it is on its way":        {guild: guild(5000, relay("a", 5000)).ShardAccepting(time.Minute), want: 1, mode: Promoting},
		"sessions left on the shard do not change that it is relayed":   {guild: guild(5000, relay("a", 5000)), want: 1, mode: Relayed},
		"without a ready relay the shard serves, and it is on its way":  {guild: guild(0, relay("a", 9000).Is(NotReady, time.Second)), want: 1, mode: Promoting},
		"relays that drain are no reason to have relays":                {guild: guild(3000, relay("a", 2000).Draining(time.Minute)).ShardAccepting(time.Minute), want: 0, mode: Demoting},
		"a guild that turns heavy while it is demoted gets new relays":  {guild: guild(9000, relay("a", 2000).Draining(time.Minute)).ShardAccepting(time.Minute), want: 1, mode: Promoting},
		"a count that only a rounding error is above is not rounded up": {guild: guild(0, relay("a", 12000), relay("b", 12000), relay("c", 12000)), want: 3, mode: Relayed},
	} {
		t.Run(name, func(t *testing.T) {
			mem := settled(tc.guild.Observation)
			if tc.fresh {
				mem = Memory{}
			}
			d, _ := Plan(tc.guild.Observation, mem)
			if d.Want != tc.want || d.Mode != tc.mode {
				t.Errorf("wanted are %d, %s; should be %d, %s", d.Want, d.Mode, tc.want, tc.mode)
			}
		})
	}
}

func TestPods(t *testing.T) {
	const minute = time.Minute
	crowd := func(n int, each func(r *relayBuilder)) []*relayBuilder {
		var relays []*relayBuilder
		for i := range n {
			r := relay(fmt.Sprintf("%c", 'a'+i), 10000)
			each(r)
			relays = append(relays, r)
		}
		return relays
	}
	old := func(r *relayBuilder) { r.Old() }
	for name, tc := range map[string]struct {
		guild *guildBuilder
		// want has what is created, drained and deleted.
		want string
	}{
		"what is missing is created":                             {guild(0, relay("a", 10000)).Manual(3), "+2"},
		"pods on their way are not created again":                {guild(0, relay("a", 10000), relay("b", 0).Is(Pending, minute)).Manual(3), "+1"},
		"a failed one is deleted and replaced":                   {guild(0, relay("a", 10000), relay("b", 10000).Is(Failed, 0)).Manual(2), "+1 delete b"},
		"one that does not start is deleted and replaced":        {guild(0, relay("a", 10000), relay("b", 0).Is(Pending, 6*minute)).Manual(2), "+1 delete b"},
		"one that hangs is replaced and drained":                 {guild(0, relay("a", 10000), relay("b", 10000).Is(NotReady, 2*minute)).Manual(2), "+1 drain b"},
		"one that is not ready for a moment is not":              {guild(0, relay("a", 10000), relay("b", 10000).Is(NotReady, minute/2)).Manual(2), ""},
		"one that is cut off is replaced though it does not say": {guild(0, relay("a", 10000), relay("b", 10000).Is(NotReady, 2*minute).Reported(2*minute)).Manual(2), "+1 drain b"},
		"of many that hang a few are replaced at a time":         {guild(0, crowd(20, func(r *relayBuilder) { r.Is(NotReady, 2*minute) })...).Manual(20), "+2 drain a b"},
		"hung ones that drain count":                             {guild(0, relay("a", 1), relay("b", 1).Is(NotReady, 2*minute), relay("c", 1).Is(NotReady, 2*minute).Draining(minute)).Manual(2), ""},

		"the one with the fewest sessions goes":                  {guild(0, relay("a", 3000), relay("b", 2000), relay("c", 4000)).Manual(2), "drain b"},
		"of equals the youngest goes":                            {guild(0, relay("a", 3000), relay("b", 3000), relay("c", 3000)).Manual(2), "drain c"},
		"a pod that never served goes before all":                {guild(0, relay("a", 1), relay("b", 0).Is(Pending, minute), relay("c", 1)).Manual(2), "delete b"},
		"one that is not ready goes before ready ones":           {guild(0, relay("a", 1), relay("b", 9000).Is(NotReady, time.Second), relay("c", 1)).Manual(2), "drain b"},
		"one of an old revision goes before new ones":            {guild(0, relay("a", 1), relay("b", 9000).Old(), relay("c", 1), relay("d", 1)).Manual(2), "drain b d"},
		"all victims are told at once, so that sessions go once": {guild(0, crowd(12, func(*relayBuilder) {})...).Manual(9), "drain l k j"},
		"draining ones do not count":                             {guild(0, relay("a", 3000), relay("b", 2000).Draining(minute), relay("c", 4000)).Manual(2), ""},
		"on old reports nobody goes":                             {guild(0, relay("a", 3000), relay("b", 2000).Reported(11*time.Second)).Manual(1), ""},
		"the last ready one stays, whatever its age":             {guild(0, relay("a", 9000).Old(), relay("b", 0).Is(Pending, minute)).Manual(1), ""},
		"the last ready one stays while another is not ready":    {guild(0, relay("a", 9000), relay("b", 20000).Is(NotReady, time.Second)).Manual(1), "drain b"},
		"for the shard all go":                                   {guild(0, relay("a", 9000).Old(), relay("b", 10)).Manual(0), "drain a b"},

		"one that is empty is deleted":                            {guild(0, relay("a", 1), relay("b", 0).Draining(minute)).Manual(1), "delete b"},
		"one that says so from before traffic stopped is not yet": {guild(0, relay("a", 1), relay("b", 0).Draining(3*time.Second)).Manual(1), ""},
		"one that still holds sessions is not":                    {guild(0, relay("a", 1), relay("b", 5).Draining(minute)).Manual(1), ""},
		"one that takes too long is":                              {guild(0, relay("a", 1), relay("b", 5000).Draining(6*minute)).Manual(1), "delete b"},
		"how long it may take follows from the rate":              {guild(0, relay("a", 1), relay("b", 15000).Draining(6*minute-1)).Manual(1), ""},
		"while the shard is silent none is":                       {guild(0, relay("a", 1), relay("b", 5000).Draining(9*minute)).Manual(1).With(func(o *Observation) { o.Shard.ReportedAt = noon.Add(-minute) }), ""},
		"a pending one that is to go is deleted":                  {guild(0, relay("a", 1), relay("b", 0).Is(Pending, minute).Draining(minute)).Manual(1), "delete b"},

		"a roll-out begins with one more":                    {guild(0, crowd(3, old)...).Manual(3), "+1"},
		"a roll-out of many begins with a few more":          {guild(0, crowd(20, old)...).Manual(20), "+2"},
		"it waits until the new one is ready":                {guild(0, relay("a", 5000).Old(), relay("b", 5000).Old(), relay("c", 0).Is(Pending, minute)).Manual(2), ""},
		"then the old one with the fewest sessions goes":     {guild(0, relay("a", 5000).Old(), relay("b", 4000).Old(), relay("c", 0)).Manual(2), "drain b"},
		"while it drains there is no further one":            {guild(0, relay("a", 5000).Old(), relay("b", 4000).Old().Draining(minute), relay("c", 0)).Manual(2), ""},
		"when it is gone there is":                           {guild(0, relay("a", 5000).Old(), relay("c", 4000)).Manual(2), "+1"},
		"the last old one goes like the others":              {guild(0, relay("a", 5000).Old(), relay("c", 4000), relay("d", 0)).Manual(2), "drain a"},
		"an old pod that never became ready is deleted":      {guild(0, relay("a", 5000).Old(), relay("b", 0).Old().Is(Pending, minute)).Manual(1), "+1 delete b"},
		"a new revision that does not start harms nobody":    {guild(0, relay("a", 5000).Old(), relay("c", 0).Is(Pending, 6*minute)).Manual(1), "+1 delete c"},
		"a roll-out and fewer relays are one":                {guild(0, relay("a", 5000).Old(), relay("b", 4000).Old(), relay("c", 3000).Old(), relay("d", 10)).Manual(2), "drain c b"},
		"on old reports a roll-out drains nobody":            {guild(0, relay("a", 1).Old(), relay("c", 0).Reported(11*time.Second)).Manual(1), ""},
		"a roll-out towards the shard makes no pods":         {guild(0, relay("a", 9000).Old()).Manual(0), "drain a"},
		"more relays are created in the midst of a roll-out": {guild(0, relay("a", 9000).Old(), relay("b", 4000).Old().Draining(minute)).Manual(4), "+3"},
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := Plan(tc.guild.Observation, settled(tc.guild.Observation))
			var got []string
			if d.Create > 0 {
				got = append(got, fmt.Sprintf("+%d", d.Create))
			}
			if len(d.Drain) > 0 {
				got = append(got, "drain "+strings.Join(d.Drain, " "))
			}
			if len(d.Delete) > 0 {
				got = append(got, "delete "+strings.Join(d.Delete, " "))
			}
			if diff := cmp.Diff(tc.want, strings.Join(got, " ")); diff != "" {
				t.Errorf("pods (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSteer(t *testing.T) {
	const second = time.Second
	for name, tc := range map[string]struct {
		guild *guildBuilder
		// want are those who accept.
		want string
	}{
		"the shard of a light guild":                                    {guild(100), "shard"},
		"the shard until a relay is ready":                              {guild(9000, relay("a", 0).Is(Pending, second)).ShardAccepting(time.Hour), "shard"},
		"both until the relay is among the endpoints":                   {guild(9000, relay("a", 0).Closed(second)).ShardAccepting(time.Hour), "shard a"},
		"then the relay alone":                                          {guild(9000, relay("a", 0)).ShardAccepting(time.Hour), "a"},
		"relays that are even":                                          {guild(0, relay("a", 10000), relay("b", 10100)), "a b"},
		"not one that is above the others":                              {guild(0, relay("a", 10000), relay("b", 10000), relay("c", 12000)), "a b"},
		"not one that is full":                                          {guild(0, relay("a", 14500), relay("b", 15001)), "a"},
		"all when all are full":                                         {guild(0, relay("a", 15200), relay("b", 15200)), "a b"},
		"small differences do not matter":                               {guild(0, relay("a", 10), relay("b", 55)).Manual(2), "a b"},
		"an empty one that can take what comes, alone":                  {guild(0, relay("a", 10000), relay("b", 10000), relay("c", 0)).Manual(3).With(arrivals(500)), "c"},
		"with the others when it cannot":                                {guild(0, relay("a", 8000), relay("b", 8000), relay("c", 6000)).Manual(3).With(arrivals(5000)), "a b c"},
		"who does not accept begins again only when it is clearly less": {guild(0, relay("a", 10000), relay("b", 10000), relay("c", 10400).Closed(time.Minute)), "a b"},
		"and then it does":                                              {guild(0, relay("a", 10000), relay("b", 10000), relay("c", 10100).Closed(time.Minute)), "a b c"},
		"not those that drain":                                          {guild(0, relay("a", 10000), relay("b", 100).Draining(time.Minute)), "a"},
		"not those that are told to drain just now":                     {guild(0, relay("a", 3000), relay("b", 100)).Manual(1), "a"},
		"not those that are not ready":                                  {guild(0, relay("a", 10000), relay("b", 100).Is(NotReady, second)), "a"},
		"the shard again when no relay is ready":                        {guild(0, relay("a", 10000).Is(NotReady, second)), "shard"},
		"one that drains while nobody else is among the endpoints":      {guild(0, relay("a", 10000).With(accepting), relay("b", 100).Closed(second)).With(func(o *Observation) { o.Relays[0].DrainingSince = noon }), "a b"},
		"relays until the shard is among the endpoints":                 {guild(0, relay("a", 1000), relay("b", 900)).Manual(0), "shard a b"},
		"then the shard alone":                                          {guild(0, relay("a", 1000).Draining(second).With(accepting)).Manual(0).ShardAccepting(second), "shard"},
		"in a roll-out the new ones":                                    {guild(0, relay("a", 9000).Old(), relay("b", 9000).Old(), relay("c", 8000)).Manual(3), "c"},
		"in a roll-out the old ones too when the new ones are full":     {guild(0, relay("a", 9000).Old(), relay("b", 9000).Old(), relay("c", 9800)).Manual(3), "a b"},
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := Plan(tc.guild.Observation, settled(tc.guild.Observation))
			got := d.Accept
			if d.ShardAccepts {
				got = append([]string{"shard"}, got...)
			}
			if diff := cmp.Diff(tc.want, strings.Join(got, " ")); diff != "" {
				t.Errorf("accepting (-want +got):\n%s", diff)
			}
		})
	}
}

func accepting(r *Relay) { r.Accepting = true }

func (b *relayBuilder) With(change func(r *Relay)) *relayBuilder {
	change(&b.Relay)
	return b
}

// arrivals come at the first relay.
func arrivals(perSecond float64) func(o *Observation) {
	return func(o *Observation) { o.Relays[0].Arrivals = perSecond }
}

func TestRounds(t *testing.T) {
	const second, minute = time.Second, time.Minute
	for name, tc := range map[string]struct {
		guild  *guildBuilder
		memory func(m *Memory)
		// want has how many leave whom, "all" when everyone does, or the reason why nobody does.
		want string
	}{
		"even relays are left alone":                             {guild: guild(0, relay("a", 9000), relay("b", 9500)).Manual(2)},
		"a skew within the percentage is left alone":             {guild: guild(0, relay("a", 9000), relay("b", 10900).Closed(minute)).Manual(2)},
		"a skew of few sessions is left alone":                   {guild: guild(0, relay("a", 0), relay("b", 180).Closed(minute)).Manual(2)},
		"the fullest go down to just below the edge":             {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute), relay("c", 6000).Closed(minute)).Manual(3), want: "b 3550, c 550"},
		"nobody leaves while traffic still comes":                {guild: guild(0, relay("a", 0), relay("b", 9000)).Manual(2), want: "EndpointsBehind"},
		"nor just after":                                         {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(second)).Manual(2), want: "EndpointsBehind"},
		"nobody leaves on old reports":                           {guild: guild(0, relay("a", 0).Reported(11*second), relay("b", 9000).Closed(minute)).Manual(2)},
		"nobody leaves in mode Disabled":                         {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute)).Manual(2).With(func(o *Observation) { o.Policy.Rebalance = RebalanceDisabled })},
		"nobody leaves without approval":                         {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute)).Manual(2).With(func(o *Observation) { o.Policy.Rebalance = RebalanceApprove }), want: "AwaitingApproval"},
		"nobody leaves while many are gone who were there":       {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute)).Manual(2), memory: func(m *Memory) { m.loads[0].value = 15000 }, want: "Reconnecting"},
		"who has been gone for long is not waited for":           {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute)).Manual(2), memory: func(m *Memory) { m.loads = slices.Insert(m.loads, 0, peak{noon.Add(-31 * second), 15000}) }, want: "b 4095"},
		"nobody leaves while the last ones are on their way":     {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute)).Manual(2), memory: func(m *Memory) { m.quietUntil = noon.Add(second) }, want: "Settling"},
		"nobody leaves when the namespace has no moves to spare": {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute)).Manual(2).With(func(o *Observation) { o.Budget = 0 }), want: "BudgetSpent"},
		"nobody leaves while an earlier operator's orders last": {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute).
			Doing(Progress{Round: 6, Left: 10, Deadline: noon.Add(minute)})).Manual(2), want: "EarlierRound"},
		"earlier orders that are done do not matter": {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute).
			Doing(Progress{Round: 6, Left: 10, Done: true, Deadline: noon.Add(minute)})).Manual(2), want: "b 4095"},
		"earlier orders that are over do not matter": {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute).
			Doing(Progress{Round: 6, Left: 10, Deadline: noon})).Manual(2), want: "b 4095"},
		"what arrivals will even out is not moved":   {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute)).Manual(2), memory: func(m *Memory) { m.growth = 400 }},
		"what departures will even out is not moved": {guild: guild(0, relay("a", 6000), relay("b", 9000).Closed(minute)).Manual(2).With(arrivals(100))},
		"a round is what the rate allows in a minute": {
			guild: guild(0, relay("a", 0), relay("b", 12000).Closed(minute), relay("c", 11000).Closed(minute)).Manual(3).With(func(o *Observation) { o.Policy.MaxMovesPerSecond = 50 }), want: "b 3000",
		},

		"a relayed guild's shard is emptied":                    {guild: guild(9000, relay("a", 0)).ShardAccepting(-minute), want: "shard 9000"},
		"not while it still accepts":                            {guild: guild(9000, relay("a", 0)).ShardAccepting(minute)},
		"not just after":                                        {guild: guild(9000, relay("a", 0)).ShardAccepting(-second)},
		"relays that drain are emptied":                         {guild: guild(0, relay("a", 5000), relay("b", 5000), relay("c", 800).Draining(minute)).Manual(2), want: "c all"},
		"the emptiest first, as far as a round goes":            {guild: guild(0, relay("a", 100), relay("b", 100), relay("c", 12000).Draining(minute), relay("d", 9000).Draining(minute)).Manual(2).With(func(o *Observation) { o.Policy.MaxMovesPerSecond = 200 }), want: "d all, c 3000"},
		"no more than there is room":                            {guild: guild(0, relay("a", 14000), relay("b", 9000).Draining(minute)).Manual(1), want: "b 1000"},
		"nobody when there is no room":                          {guild: guild(0, relay("a", 15000), relay("b", 9000).Draining(minute)).Manual(1), want: "NoRoom"},
		"nobody when growth takes the room":                     {guild: guild(0, relay("a", 5000), relay("b", 9000).Draining(minute)).Manual(1), memory: func(m *Memory) { m.growth = 500 }, want: "NoRoom"},
		"a drain needs no approval":                             {guild: guild(0, relay("a", 5000), relay("b", 800).Draining(minute)).Manual(1).With(func(o *Observation) { o.Policy.Rebalance = RebalanceApprove }), want: "b all"},
		"a drain goes before rebalancing":                       {guild: guild(0, relay("a", 0), relay("b", 9000).Closed(minute), relay("c", 800).Draining(minute)).Manual(2), want: "c all"},
		"for the shard they are emptied when it accepts":        {guild: guild(0, relay("a", 2000).Draining(minute)).Manual(0).ShardAccepting(minute), want: "a all"},
		"for the shard nobody leaves before it accepts":         {guild: guild(0, relay("a", 2000).Draining(minute)).Manual(0).ShardAccepting(-minute), want: "NoRoom"},
		"for a shard that is full nobody leaves":                {guild: guild(0, relay("a", 2000).Draining(minute)).Manual(0).ShardAccepting(minute).With(func(o *Observation) { o.Shard.Room = 0 }), want: "NoRoom"},
		"a relay that has failed is not ordered about":          {guild: guild(0, relay("a", 5000), relay("b", 800).Draining(minute).Is(Failed, 0)).Manual(1)},
		"one that drains and still has traffic is not emptied":  {guild: guild(0, relay("a", 5000), relay("b", 800).Draining(minute).With(accepting)).Manual(1)},
		"a hung relay whose sessions are known is emptied":      {guild: guild(0, relay("a", 5000), relay("b", 800).Is(NotReady, 2*minute).Draining(minute)).Manual(1), want: "b all"},
		"while the shard is silent nobody leaves, drain or not": {guild: guild(0, relay("a", 5000), relay("b", 800).Draining(minute)).Manual(1).With(func(o *Observation) { o.Shard.ReportedAt = noon.Add(-minute) }), want: "StaleReports"},
	} {
		t.Run(name, func(t *testing.T) {
			mem := settled(tc.guild.Observation)
			if tc.memory != nil {
				tc.memory(&mem)
			}
			d, _ := Plan(tc.guild.Observation, mem)
			got := string(d.Blocked)
			if d.Round != nil {
				got = ordersOf(d.Round)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("orders (-want +got):\n%s", diff)
			}
		})
	}
}

func ordersOf(r *Round) string {
	var orders []string
	for _, o := range r.Orders {
		name := o.Relay
		if name == "" {
			name = "shard"
		}
		if o.All {
			orders = append(orders, name+" all")
		} else {
			orders = append(orders, fmt.Sprint(name, " ", o.Leave))
		}
	}
	return strings.Join(orders, ", ")
}

// later is the observation so much later, with reports as old as before.
func later(o Observation, by time.Duration) Observation {
	o.Now = o.Now.Add(by)
	o.Shard.ReportedAt = o.Shard.ReportedAt.Add(by)
	o.Relays = slices.Clone(o.Relays)
	for i := range o.Relays {
		o.Relays[i].ReportedAt = o.Relays[i].ReportedAt.Add(by)
	}
	return o
}

func TestRoundFromBeginningToEnd(t *testing.T) {
	const step = 2 * time.Second
	obs := guild(0, relay("a", 0), relay("b", 9000).Closed(time.Minute), relay("c", 6000).Closed(time.Minute)).Manual(3).Observation
	obs.Budget = 410
	d, mem := Plan(obs, settled(obs))
	want := &Round{
		ID: 7, Started: noon, Deadline: noon.Add(45 * time.Second), ToMove: 4100,
		Summary: "4100 sessions: 3550 from b, 550 from c",
		Orders: []Order{
			{Relay: "b", Round: 7, Leave: 3550, Rate: 355, Deadline: noon.Add(45 * time.Second), NotYoungerThan: noon},
			{Relay: "c", Round: 7, Leave: 550, Rate: 55, Deadline: noon.Add(45 * time.Second), NotYoungerThan: noon},
		},
	}
	if diff := cmp.Diff(want, d.Round, cmpopts.IgnoreFields(Round{}, "Hash")); diff != "" {
		t.Fatalf("the round (-want +got):\n%s", diff)
	}
	obs.LastRound = 7
	rates := func(d Decision) []float64 {
		return []float64{d.Round.Orders[0].Rate, d.Round.Orders[1].Rate}
	}

	obs = later(obs, step)
	obs.Relays[1].Order = Progress{Round: 7, Left: 700, Deadline: want.Deadline}
	obs.Budget = 205
	d, mem = Plan(obs, mem)
	if d.Round == nil || d.Round.ID != 7 || d.Round.Moved != 700 {
		t.Fatalf("the round does not go on: %+v", d.Round)
	}
	if diff := cmp.Diff([]float64{177.5, 27.5}, rates(d)); diff != "" {
		t.Errorf("rates after a cut of the budget (-want +got):\n%s", diff)
	}

	obs = later(obs, step)
	obs.Relays[0].ReportedAt = noon.Add(-time.Minute)
	d, mem = Plan(obs, mem)
	if diff := cmp.Diff([]float64{0, 0}, rates(d)); diff != "" || d.Blocked != StaleReports {
		t.Errorf("rates on old reports, blocked %q (-want +got):\n%s", d.Blocked, diff)
	}

	obs = later(obs, step)
	obs.Relays[0].ReportedAt = obs.Now
	obs.Relays[1].Order = Progress{Round: 7, Left: 3550, Done: true, Deadline: want.Deadline}
	obs.Relays[2].Order = Progress{Round: 7, Left: 540, Done: true, Deadline: want.Deadline}
	obs.Relays[0].Sessions, obs.Relays[1].Sessions, obs.Relays[2].Sessions = 3000, 5450, 5460
	d, mem = Plan(obs, mem)
	if d.Round != nil {
		t.Fatalf("the round does not end: %+v", d.Round)
	}
	obs = later(obs, step)
	obs.Relays[0].Sessions, obs.Relays[1].Sessions = 0, 8450
	if d, mem = Plan(obs, mem); d.Blocked != Settling {
		t.Errorf("just after a round it is blocked by %q, not by %q", d.Blocked, Settling)
	}
	obs = later(obs, settleTime)
	if d, _ = Plan(obs, mem); d.Round == nil || d.Round.ID != 8 {
		t.Errorf("the next round does not begin, blocked %q", d.Blocked)
	}
}

func TestRoundEndsWithoutItsRelays(t *testing.T) {
	obs := guild(0, relay("a", 0), relay("b", 9000).Closed(time.Minute)).Manual(2).Observation
	_, mem := Plan(obs, settled(obs))
	for name, change := range map[string]func(o *Observation){
		"when the relay is gone":   func(o *Observation) { o.Relays = o.Relays[:1] },
		"when the relay failed":    func(o *Observation) { o.Relays[1].Phase = Failed },
		"when the deadline passes": func(o *Observation) { *o = later(*o, time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			next := later(obs, 2*time.Second)
			if d, _ := Plan(next, mem); d.Round == nil {
				t.Fatal("the round did not last")
			}
			change(&next)
			if d, _ := Plan(next, mem); d.Round != nil {
				t.Error("the round goes on")
			}
		})
	}
}

func TestApproval(t *testing.T) {
	obs := guild(0, relay("a", 0), relay("b", 9000).Closed(time.Minute)).Manual(2).Observation
	obs.Policy.Rebalance = RebalanceApprove
	d, mem := Plan(obs, settled(obs))
	if d.Round != nil || d.Proposal == nil || d.Blocked != AwaitingApproval {
		t.Fatalf("round %v, proposal %v, blocked %q", d.Round, d.Proposal, d.Blocked)
	}
	hash := d.Proposal.Hash

	obs = later(obs, time.Minute)
	obs.Relays[1].Sessions = 8800
	if d, mem = Plan(obs, mem); d.Proposal == nil || d.Proposal.Hash != hash {
		t.Error("a small change made another plan")
	}
	poor := obs
	poor.Budget = 0
	if d, _ := Plan(poor, mem); d.Proposal == nil || d.Proposal.Hash != hash || d.Blocked != BudgetSpent {
		t.Errorf("without a budget: proposal %v, blocked %q", d.Proposal, d.Blocked)
	}
	changed := later(obs, time.Minute)
	changed.Relays[0].Sessions, changed.Relays[1].Sessions = 1900, 6900
	changed.Approved = hash
	if d, _ := Plan(changed, mem); d.Round != nil || d.Proposal == nil || d.Proposal.Hash == hash {
		t.Errorf("a plan that no longer fits: round %v, proposal %v", d.Round, d.Proposal)
	}
	changed.Relays[0].Sessions, changed.Relays[1].Sessions = 4400, 4400
	if d, _ := Plan(changed, mem); d.Round != nil || d.Proposal != nil || d.Blocked != "" {
		t.Errorf("with nothing left to move: round %v, proposal %v, blocked %q", d.Round, d.Proposal, d.Blocked)
	}
	obs = later(obs, time.Minute)
	obs.Approved = hash
	d, mem = Plan(obs, mem)
	if d.Round == nil || d.Round.Hash != hash || d.Proposal != nil {
		t.Fatalf("the approved plan does not begin: %+v, blocked %q", d.Round, d.Blocked)
	}
	obs.LastRound = d.Round.ID
	obs = later(obs, d.Round.Deadline.Sub(obs.Now))
	_, mem = Plan(obs, mem)
	obs = later(obs, settleTime)
	if d, _ = Plan(obs, mem); d.Round != nil || d.Proposal == nil || d.Proposal.Hash == hash {
		t.Errorf("an approval was used twice: round %v, proposal %v", d.Round, d.Proposal)
	}
}

func TestValidate(t *testing.T) {
	fresh := guild(0, relay("a", 0), relay("b", 9000).Closed(time.Minute)).Manual(2).Observation
	d, _ := Plan(fresh, settled(fresh))
	for name, tc := range map[string]struct {
		change func(o *Observation)
		want   Reason
	}{
		"nothing has changed":              {func(*Observation) {}, ""},
		"it has fewer, but enough":         {func(o *Observation) { o.Relays[1].Sessions = 8900 }, ""},
		"it has too few by now":            {func(o *Observation) { o.Relays[1].Sessions = 8000 }, PlanOutdated},
		"the others have caught up":        {func(o *Observation) { o.Relays[0].Sessions = 5000 }, PlanOutdated},
		"it is gone":                       {func(o *Observation) { o.Relays = o.Relays[:1] }, PlanOutdated},
		"it accepts again":                 {func(o *Observation) { o.Relays[1].Accepting = true }, EndpointsBehind},
		"nobody accepts any more":          {func(o *Observation) { o.Relays[0].Accepting = false }, NoRoom},
		"a report has become old":          {func(o *Observation) { o.Relays[0].ReportedAt = noon.Add(-time.Minute) }, StaleReports},
		"the shard has started anew":       {func(o *Observation) { o.Complete = false }, IncompleteReports},
		"a relay that is new says nothing": {func(o *Observation) { o.Relays[0].ReportedAt = time.Time{} }, IncompleteReports},
		"a relay cut off does not hinder it": {func(o *Observation) {
			o.Relays = append(slices.Clone(o.Relays), relay("c", 9).Is(NotReady, time.Second).Reported(time.Minute).Relay)
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			obs := later(fresh, 0)
			tc.change(&obs)
			if got := Validate(d.Round, &obs); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestSummaryNamesAFew(t *testing.T) {
	orders := []Order{{Leave: 5}, {Relay: "a", Leave: 4}, {Relay: "b", Leave: 3}, {Relay: "c", Leave: 2}, {Relay: "d", Leave: 1}}
	if got, want := newRound(1, orders, true).Summary, "15 sessions: 5 from the shard, 4 from a, 3 from b, 2 relays more"; got != want {
		t.Errorf("the summary is %q, want %q", got, want)
	}
}

func TestShare(t *testing.T) {
	for name, tc := range map[string]struct {
		total float64
		asks  []float64
		want  []float64
	}{
		"nobody asks":                               {100, nil, []float64{}},
		"enough for all":                            {100, []float64{30, 20}, []float64{30, 20}},
		"too little is divided evenly":              {100, []float64{500, 500}, []float64{50, 50}},
		"what the modest leave goes to the others":  {100, []float64{500, 10, 500}, []float64{45, 10, 45}},
		"who asks for nothing gets nothing":         {100, []float64{0, 500}, []float64{0, 100}},
		"nothing to divide":                         {0, []float64{5, 5}, []float64{0, 0}},
		"the order of the guilds does not matter":   {90, []float64{10, 80, 20}, []float64{10, 60, 20}},
		"a single guild gets no more than it wants": {90, []float64{10}, []float64{10}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, Share(tc.total, tc.asks)); diff != "" {
				t.Errorf("shares (-want +got):\n%s", diff)
			}
		})
	}
}

// watch plans every 2 s for a guild without relays whose sessions and deliveries follow a curve,
// and returns the most that was wanted.
func watch(lasts time.Duration, relays int, load func(at time.Duration) (sessions int, deliveries float64)) int {
	var mem Memory
	most := 0
	for at := time.Duration(0); at <= lasts; at += 2 * time.Second {
		sessions, deliveries := load(at)
		obs := later(guild(0).Wanted(relays).Observation, at)
		for i := range relays {
			r := relay(fmt.Sprintf("relay-%03d", i), sessions/relays).Relay
			r.ReportedAt = obs.Now
			obs.Relays = append(obs.Relays, r)
		}
		if relays == 0 {
			obs.Shard.Sessions = sessions
		}
		obs.Shard.Deliveries = deliveries
		var d Decision
		d, mem = Plan(obs, mem)
		most = max(most, d.Want)
	}
	return most
}

func TestGrowth(t *testing.T) {
	for name, tc := range map[string]struct {
		relays      int
		load        func(at time.Duration) (int, float64)
		least, most int
	}{
		"a light guild that grows fast is promoted ahead": {
			0, func(at time.Duration) (int, float64) { return int(at.Seconds()) * 150, 0 }, 1, 2,
		},
		"a guild that grows slowly is not": {
			0, func(at time.Duration) (int, float64) { return int(at.Seconds()) * 50, 0 }, 0, 0,
		},
		"a relayed guild that grows gets relays for a pod start ahead": {
			// 100,000 + 500 x (30 + 62) sessions are 12.2 relays' worth at 12,000.
			9, func(at time.Duration) (int, float64) { return 100_000 + int(at.Seconds())*500, 0 }, 12, 13,
		},
		"sessions that come back after a storm are no growth": {
			9, func(at time.Duration) (int, float64) {
				if at > 10*time.Second && at < 14*time.Second {
					return 2000, 0
				}
				return 100_000, 0
			}, 9, 9,
		},
		"a short burst of deliveries is no reason": {
			1, func(at time.Duration) (int, float64) {
				if at > 15*time.Second && at <= 25*time.Second {
					return 7000, 200_000
				}
				return 7000, 20_000
			}, 1, 1,
		},
		"a long one is": {
			1, func(time.Duration) (int, float64) { return 7000, 200_000 }, 3, 3,
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := watch(30*time.Second, tc.relays, tc.load); got < tc.least || got > tc.most {
				t.Errorf("wanted are up to %d relays, should be %d to %d", got, tc.least, tc.most)
			}
		})
	}
}

func TestPeaks(t *testing.T) {
	var p peaks
	var got []float64
	for i, v := range []float64{5, 3, 4, 1, 1, 1, 9} {
		before := slices.Clone(p)
		next := p.add(noon.Add(time.Duration(i)*time.Second), v, 2*time.Second)
		if !slices.Equal(p, before) {
			t.Fatal("an older value has changed")
		}
		p = next
		got = append(got, p.top())
	}
	if diff := cmp.Diff([]float64{5, 5, 5, 4, 4, 1, 9}, got); diff != "" {
		t.Errorf("the largest of the last 2 s (-want +got):\n%s", diff)
	}
	p = peaks{{noon, 5}, {noon.Add(time.Second), 4}}
	got = got[:0]
	for i := range 3 {
		got = append(got, p.since(noon.Add(time.Duration(i)*time.Second)).top())
	}
	if diff := cmp.Diff([]float64{5, 4, 0}, got); diff != "" {
		t.Errorf("the largest since a time (-want +got):\n%s", diff)
	}
}
