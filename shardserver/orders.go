package main

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"guildhall.dev/guildhall/shardserver/admin"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/report"
)

// orders hands the operator's orders on, and refuses those of a leader that has been followed by another.
type orders struct {
	mu    sync.Mutex
	terms map[string]int64 // by uid of the Guild
}

// take carries out orders for one guild.
func (s *server) takeOrders(o report.Orders) error {
	g, id := s.directory.Held(o.GuildUID)
	if g == nil {
		return fmt.Errorf("%w: guild %s is not here", admin.ErrStale, o.GuildUID)
	}
	s.orders.mu.Lock()
	defer s.orders.mu.Unlock()
	if o.Term < s.orders.terms[o.GuildUID] {
		return fmt.Errorf("%w: term %d, and %d has been seen", admin.ErrStale, o.Term, s.orders.terms[o.GuildUID])
	}
	if s.orders.terms == nil {
		s.orders.terms = map[string]int64{}
	}
	s.orders.terms[o.GuildUID] = o.Term
	var errs []error
	for _, one := range o.Orders {
		order := guild.Order{Round: o.Round, Leave: int(one.Leave), All: one.All, PerSecond: int(one.PerSecond)}
		if o.Deadline > 0 {
			order.Deadline = time.UnixMilli(o.Deadline)
		}
		switch {
		case one.Relay != "":
			errs = append(errs, s.links.Order(id, one.Relay, order))
		case !g.Move(order):
			errs = append(errs, fmt.Errorf("%w: round %d", admin.ErrStale, o.Round))
		}
	}
	return errors.Join(errs...)
}
