package controllers

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"k8s.io/utils/clock"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// audience plays the sessions of one guild, each of them, as its shard and its relays hold them. They connect where
// the guild's Service leads and, when they are asked to leave, come back there. It watches that nobody is treated
// worse than promised.
type audience struct {
	t     *testing.T
	clock clock.PassiveClock
	last  time.Time
	seats map[string]*seat // by pod; the shard's is ""
	// leads are the pods that the Service leads to; the shard's is "".
	leads []string
	// outside are those that find no endpoint, and try again.
	outside []*session
	turn    int
	term    int64
	// orders are those that were taken, the repeated ones too.
	orders []report.Orders
	// ended has how many sessions each relay had at its end.
	ended     map[string]int
	toldTwice bool
	// modes that the Guild has had, in order.
	modes []v1.GuildMode
}

// seat is a place that holds sessions.
type seat struct {
	sessions []*session
	// silentSince is when it reported last; zero: it reports.
	silentSince time.Time
	// stuck: who is asked to leave stays.
	stuck    bool
	order    report.Order
	round    int64
	began    time.Time
	deadline time.Time
	asked    int64
	due      float64
}

type session struct {
	since time.Time
	// asked is how often it was asked to leave, and in which round last.
	asked int
	round int64
}

func newAudience(t *testing.T, c clock.PassiveClock) *audience {
	return &audience{t: t, clock: c, last: c.Now(), seats: map[string]*seat{"": {}}, leads: []string{""}, ended: map[string]int{}}
}

// grow has so many clients connect.
func (a *audience) grow(n int) {
	for range n {
		a.connect(new(session))
	}
}

func (a *audience) connect(s *session) {
	if len(a.leads) == 0 {
		a.outside = append(a.outside, s)
		return
	}
	s.since = a.clock.Now()
	a.turn++
	at := a.seats[a.leads[a.turn%len(a.leads)]]
	at.sessions = append(at.sessions, s)
}

// shrink has clients leave for good, each from the fullest place, until so many are left.
func (a *audience) shrink(left int) {
	for n := a.size(); n > left; n-- {
		fullest := slices.MaxFunc(slices.Sorted(maps.Keys(a.seats)), func(x, y string) int {
			return len(a.seats[x].sessions) - len(a.seats[y].sessions)
		})
		a.leave(fullest, 1)
	}
}

// leave has clients of one place leave for good.
func (a *audience) leave(pod string, n int) { a.seats[pod].sessions = a.seats[pod].sessions[n:] }

func (a *audience) size() int {
	n := len(a.outside)
	for _, at := range a.seats {
		n += len(at.sessions)
	}
	return n
}

// counts are the sessions by place.
func (a *audience) counts() map[string]int {
	n := map[string]int{}
	for name, at := range a.seats {
		n[name] = len(at.sessions)
	}
	return n
}

// asks says how many sessions were asked to leave how often.
func (a *audience) asks() map[int]int {
	n := map[int]int{}
	for _, at := range a.seats {
		for _, s := range at.sessions {
			n[s.asked]++
		}
	}
	return n
}

// silence has a relay report nothing more, or go on.
func (a *audience) silence(pod string, silent bool) {
	a.seats[pod].silentSince = time.Time{}
	if silent {
		a.seats[pod].silentSince = a.clock.Now()
	}
}

// attach has a relay serve.
func (a *audience) attach(pod string) {
	if a.seats[pod] == nil {
		a.seats[pod] = new(seat)
	}
}

// end has the sessions of a relay come back elsewhere.
func (a *audience) end(pod string) {
	at := a.seats[pod]
	if at == nil {
		return
	}
	delete(a.seats, pod)
	a.ended[pod] = len(at.sessions)
	a.leads = slices.DeleteFunc(a.leads, func(name string) bool { return name == pod })
	for _, s := range at.sessions {
		a.connect(s)
	}
}

// advance has sessions leave that were ordered to.
func (a *audience) advance() {
	now := a.clock.Now()
	passed := now.Sub(a.last)
	a.last = now
	outside := a.outside
	a.outside = nil
	for _, s := range outside {
		a.connect(s)
	}
	for _, name := range slices.Sorted(maps.Keys(a.seats)) {
		at := a.seats[name]
		if at.round == 0 || at.stuck || now.After(at.deadline) {
			continue
		}
		at.due += float64(at.order.PerSecond) * passed.Seconds()
		for at.due >= 1 && (at.order.All || at.asked < at.order.Leave) {
			i := slices.IndexFunc(at.sessions, func(s *session) bool { return at.order.All || s.since.Before(at.began) })
			if i < 0 {
				at.due = 0
				break
			}
			s := at.sessions[i]
			at.sessions = slices.Delete(at.sessions, i, i+1)
			if s.round >= at.round && !a.toldTwice {
				a.toldTwice = true
				a.t.Errorf("round %d asks a session to leave %q that round %d has moved there", at.round, name, s.round)
			}
			at.due--
			at.asked++
			s.asked, s.round = s.asked+1, at.round
			a.connect(s)
		}
	}
}

// take takes orders as a shard does. known is the round that the Guild's status names.
func (a *audience) take(o *report.Orders, known int64) error {
	if o.Round > known {
		a.t.Errorf("round %d is ordered before the status has it: there it is %d", o.Round, known)
	}
	if o.Term < a.term {
		return fmt.Errorf("term %d, and %d has been seen", o.Term, a.term)
	}
	a.term = o.Term
	for _, order := range o.Orders {
		at := a.seats[order.Relay]
		switch {
		case at == nil:
			return fmt.Errorf("no relay %s", order.Relay)
		case o.Round < at.round:
			a.t.Errorf("round %d is ordered from %q, which has seen round %d", o.Round, order.Relay, at.round)
			return fmt.Errorf("round %d, and %d has been seen", o.Round, at.round)
		case o.Round > at.round:
			if slices.Contains(a.leads, order.Relay) {
				a.t.Errorf("sessions of %q are to leave while the Service still leads there", order.Relay)
			}
			at.round, at.began, at.asked, at.due = o.Round, a.clock.Now(), 0, 0
		}
		at.order, at.deadline = order, time.UnixMilli(o.Deadline)
	}
	a.orders = append(a.orders, *o)
	return nil
}

// rounds are those that orders were taken of, in order.
func (a *audience) rounds() []int64 {
	var rounds []int64
	for _, o := range a.orders {
		rounds = append(rounds, o.Round)
	}
	return slices.Compact(rounds)
}

// report fills in what a shard says of the guild, and returns what it says of the relays.
func (a *audience) report(g *report.Guild) (relays []report.Relay, load report.Load) {
	for _, name := range slices.Sorted(maps.Keys(a.seats)) {
		at := a.seats[name]
		n := int64(len(at.sessions))
		g.Sessions += n
		if name == "" {
			g.Direct, g.Round, g.Asked, load.Sessions = n, at.round, at.asked, n
			continue
		}
		r := report.Relay{
			GuildUID: g.UID, Name: name, BootID: "boot", Version: "test", Attached: true, Ready: true, Sessions: n,
			Round: at.round, Asked: at.asked,
		}
		if !at.silentSince.IsZero() {
			r.AgeMillis = a.clock.Now().Sub(at.silentSince).Milliseconds()
		}
		relays = append(relays, r)
	}
	return relays, load
}

// saw notes the mode of the Guild.
func (a *audience) saw(g *v1.Guild) {
	if mode := g.Status.Mode; mode != "" && (len(a.modes) == 0 || a.modes[len(a.modes)-1] != mode) {
		a.modes = append(a.modes, mode)
		if mode == v1.GuildRelayed && slices.Contains(a.leads, "") {
			a.t.Errorf("the guild is Relayed while its Service leads to %q", a.leads)
		}
	}
}
