package controllers

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"guildhall.dev/guildhall/controllers/relayplan"
	"guildhall.dev/guildhall/shardserver/report"
)

const (
	// namespaceMoves bounds the moves per second of all guilds of a namespace.
	namespaceMoves = 2000
	// orderRetry is how soon orders are sent again that nobody has reported to follow.
	orderRetry = 2 * time.Second
	// termShift leaves room for the transitions of a lease in a term.
	termShift = 20
)

// leaderTerm counts the leaders: orders carry it, and relays refuse those of an earlier one. It is the time at which the
// lease was made, and how often it has changed hands; so it grows also when the lease is deleted.
// Without leader election it is the time at which the process began to work.
type leaderTerm struct {
	live  client.Reader
	clock clock.Clock
	// lease of the leader election; empty without.
	lease types.NamespacedName
	value atomic.Int64
}

var (
	_ manager.Runnable               = (*leaderTerm)(nil)
	_ manager.LeaderElectionRunnable = (*leaderTerm)(nil)
)

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (t *leaderTerm) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable. It runs once this process is the leader, and before that there is no term.
func (t *leaderTerm) Start(ctx context.Context) error {
	for {
		term, err := t.read(ctx)
		if err == nil {
			t.value.Store(term)
			log.FromContext(ctx).V(1).Info("Leading", "term", term)
			return nil
		}
		log.FromContext(ctx).Error(err, "Reading the lease: no sessions are moved before")
		select {
		case <-ctx.Done():
			return nil
		case <-t.clock.After(retryInterval):
		}
	}
}

func (t *leaderTerm) read(ctx context.Context) (int64, error) {
	if t.lease.Name == "" {
		return t.clock.Now().Unix() << termShift, nil
	}
	lease := new(coordinationv1.Lease)
	if err := t.live.Get(ctx, t.lease, lease); err != nil {
		return 0, fmt.Errorf("reading Lease %s: %w", t.lease, err)
	}
	term := lease.CreationTimestamp.Unix() << termShift
	if n := lease.Spec.LeaseTransitions; n != nil {
		term += int64(*n)
	}
	return term, nil
}

// moveBudget divides the moves per second of a namespace among its guilds.
type moveBudget struct {
	mu sync.Mutex
	// asks are what the guilds with a round under way ask for, by namespace.
	asks map[string]map[types.UID]float64
}

// share is what a guild may use of what it asks for.
func (b *moveBudget) share(namespace string, guild types.UID, ask float64) float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	asks := b.asks[namespace]
	if asks == nil {
		asks = map[types.UID]float64{}
		b.asks[namespace] = asks
	}
	asks[guild] = ask
	guilds := slices.Sorted(maps.Keys(asks))
	amounts := make([]float64, len(guilds))
	for i, g := range guilds {
		amounts[i] = asks[g]
	}
	at, _ := slices.BinarySearch(guilds, guild)
	return relayplan.Share(namespaceMoves, amounts)[at]
}

// release gives back what a guild without a round does not need.
func (b *moveBudget) release(namespace string, guild types.UID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.asks[namespace], guild)
	if len(b.asks[namespace]) == 0 {
		delete(b.asks, namespace)
	}
}

// orderDesk sends orders to shards, which pass them on to their relays.
type orderDesk struct {
	term *leaderTerm
	post func(ctx context.Context, shard types.NamespacedName, uid types.UID, o *report.Orders) error
}

// sentOrders are those that a guild's shard has taken last.
type sentOrders struct {
	orders *report.Orders
	at     time.Time
}

// order sends the orders of the round under way. The status has the round by now.
func (r *relays) order(ctx context.Context, v *guildView) {
	p := v.relays
	if p == nil || !p.planned || p.decision.Round == nil {
		return
	}
	term := r.orders.term.value.Load()
	if term == 0 {
		return
	}
	s := p.state
	o := ordersOf(p.decision.Round, string(v.guild.UID), term)
	if s.sent.orders != nil && equalOrders(s.sent.orders, o) &&
		(p.followed() || p.facts.now.Sub(s.sent.at) < orderRetry) {
		return
	}
	key := types.NamespacedName{Namespace: v.guild.Namespace, Name: v.shard.Name}
	if err := r.orders.post(ctx, key, v.shard.UID, o); err != nil {
		log.FromContext(ctx).Info("The shard has not taken the orders of a round", "round", o.Round, "error", err.Error())
		return // the next pass tries again
	}
	s.sent = sentOrders{o, p.facts.now}
}

// followed says whether all who have orders in the round report that they know it.
func (p *relayPass) followed() bool {
	round := p.decision.Round
	known := map[string]int64{"": p.facts.entry.Round}
	for _, r := range p.facts.relays {
		known[r.Name] = r.Round
	}
	for _, o := range round.Orders {
		if known[o.Relay] < round.ID {
			return false
		}
	}
	return true
}

// ordersOf gives a round the shape in which it is sent. The rates are rounded so that their sum is right, and no
// order that is not paused stands still.
func ordersOf(r *relayplan.Round, guild string, term int64) *report.Orders {
	out := &report.Orders{GuildUID: guild, Term: term, Round: r.ID, Deadline: r.Deadline.UnixMilli()}
	sum, given := 0.0, int64(0)
	for _, o := range r.Orders {
		sum += o.Rate
		rate := int64(math.Round(sum)) - given
		if o.Rate > 0 {
			rate = max(rate, 1)
		}
		given += rate
		out.Orders = append(out.Orders, report.Order{Relay: o.Relay, Leave: int64(o.Leave), All: o.All, PerSecond: max(rate, 0)})
	}
	return out
}

func equalOrders(a, b *report.Orders) bool {
	return a.Term == b.Term && a.Round == b.Round && a.Deadline == b.Deadline && slices.Equal(a.Orders, b.Orders)
}

// order posts orders to a shard's admin port.
func (p *poller) order(ctx context.Context, key types.NamespacedName, uid types.UID, o *report.Orders) error {
	p.mu.Lock()
	t, podIP := p.targets[key], ""
	if t != nil && t.shard.uid == uid {
		podIP = t.podIP
	}
	p.mu.Unlock()
	if podIP == "" {
		return fmt.Errorf("shard %s has no address", key.Name)
	}
	body, err := json.Marshal(o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	u := url.URL{Scheme: "http", Host: net.JoinHostPort(podIP, strconv.Itoa(adminPort)), Path: report.OrdersPath}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := p.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	said, _ := io.ReadAll(io.LimitReader(resp.Body, maxMessage))
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("%s answers %s: %s", report.OrdersPath, resp.Status, said)
	}
	return nil
}
