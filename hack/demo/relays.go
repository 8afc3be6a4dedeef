package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"guildhall.dev/guildhall/shardserver/report"
)

const (
	// lookTime is how often the guild is looked at.
	lookTime = 2 * time.Second
	// killFrom is how many sessions have to be on relays before one of those is killed.
	killFrom = 150
	// shrinkTime bounds the wait until a guild that everybody has left is without relays again.
	shrinkTime = 2 * time.Minute
	// barWidth is how many sessions a character of the picture stands for.
	barWidth = 4
)

// spread is how the guild is spread over its shard and relays, and what has happened so far.
type spread struct {
	mode        string
	direct      int64
	relays      []report.Relay
	most, kills int
	asked       map[string]int64 // by relay and round
	drawn       int              // lines of the last picture
	last        string           // without a terminal
}

func (s *spread) moves() (n int64) {
	for _, asked := range s.asked {
		n += asked
	}
	return n
}

// watchRelays shows how the guild's sessions are spread until ctx ends, and kills a relay on the way.
func (d *demo) watchRelays(ctx context.Context, s *spread) {
	tick := time.NewTicker(lookTime)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := d.look(ctx, s); err != nil {
			continue // the shard may be about to start; the next look tells
		}
		s.show(d.terminal)
		if s.kills == 0 {
			d.killOne(ctx, s)
		}
	}
}

// look asks the guild's status, and its shard, how the sessions are spread.
func (d *demo) look(ctx context.Context, s *spread) error {
	status, err := d.cluster.Kubectl(ctx, "-n", namespace, "get", "guild", guild, "-o", "jsonpath={.status.mode} {.status.placement.shardName} {.metadata.uid}").Text()
	fields := strings.Fields(status)
	if err != nil || len(fields) != 3 {
		return errors.Join(err, errors.New("the guild has no place"))
	}
	text, err := d.cluster.Kubectl(ctx, "get", "--raw", "/api/v1/namespaces/"+namespace+"/pods/"+fields[1]+"-0:9090/proxy"+report.Path).Text()
	if err != nil {
		return err
	}
	var r report.Report
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return err
	}
	s.mode, s.relays = fields[0], nil
	note := func(name string, round, asked int64) {
		if key := fmt.Sprint(name, " ", round); asked > s.asked[key] {
			s.asked[key] = asked
		}
	}
	for _, g := range r.Guilds {
		if g.UID == fields[2] {
			s.direct = g.Direct
			note("", g.Round, g.Asked)
		}
	}
	for _, relay := range r.Relays {
		if relay.GuildUID == fields[2] {
			note(relay.Name, relay.Round, relay.Asked)
			if relay.Attached {
				s.relays = append(s.relays, relay)
			}
		}
	}
	sort.Slice(s.relays, func(i, j int) bool { return s.relays[i].Name < s.relays[j].Name })
	s.most = max(s.most, len(s.relays))
	return nil
}

// show draws the spread: over the last picture on a terminal, otherwise in a line when it is another one.
func (s *spread) show(terminal bool) {
	var b strings.Builder
	if !terminal {
		fmt.Fprintf(&b, "%-9s  shard %d", s.mode, s.direct)
		for _, r := range s.relays {
			fmt.Fprintf(&b, "  %s %d", r.Name[len(r.Name)-5:], r.Sessions)
		}
		if line := b.String(); line != s.last {
			fmt.Fprintln(os.Stderr, line)
			s.last = line
		}
		return
	}
	if s.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\x1b[J", s.drawn)
	}
	bar := func(name string, sessions int64, more string) {
		fmt.Fprintf(&b, "  %-6s %5d %s%s\n", name, sessions, strings.Repeat("█", int(sessions+barWidth-1)/barWidth), more)
	}
	fmt.Fprintf(&b, "%s, %d relays, %d moves\n", s.mode, len(s.relays), s.moves())
	bar("shard", s.direct, "")
	for _, r := range s.relays {
		more := ""
		if r.Draining {
			more = " (leaving)"
		}
		bar(r.Name[len(r.Name)-5:], r.Sessions, more)
	}
	s.drawn = 2 + len(s.relays)
	fmt.Fprint(os.Stderr, b.String())
}

// killOne ends a relay the hard way once there is something to see.
func (d *demo) killOne(ctx context.Context, s *spread) {
	var sessions int64
	for _, r := range s.relays {
		sessions += r.Sessions
	}
	if len(s.relays) < 2 || sessions < killFrom {
		return
	}
	victim := s.relays[0]
	say("killing relay %s with its %d sessions", victim.Name, victim.Sessions)
	s.drawn = 0
	if d.cluster.Kubectl(ctx, "-n", namespace, "delete", "pod", victim.Name, "--grace-period=0", "--force").Run() == nil {
		s.kills++
	}
}

// awaitShrink waits until the guild is its shard's alone again.
func (d *demo) awaitShrink(ctx context.Context, s *spread) error {
	say("everybody has left: the guild shrinks back")
	s.drawn = 0
	ctx, cancel := context.WithTimeout(ctx, shrinkTime)
	defer cancel()
	for ctx.Err() == nil {
		if d.look(ctx, s) == nil {
			s.show(d.terminal)
			if s.mode == "Direct" && len(s.relays) == 0 {
				return nil
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(lookTime):
		}
	}
	return fmt.Errorf("the guild is %s with %d relays after %s", s.mode, len(s.relays), shrinkTime)
}
