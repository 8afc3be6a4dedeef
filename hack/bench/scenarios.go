package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"
)

// sideScenarios are those that are not modes of every system, but Guildhall's. Each round has each of
// them once, with the most sessions of the run, but not more than most.
var sideScenarios = []struct {
	name string
	most int
	run  func(ctx context.Context, o options, n, round int) ([]result, error)
}{
	{"storm", math.MaxInt, storms},
	{"stuck", math.MaxInt, stuck},
	{"quiet", shardSessions - quietGuilds, quiet},
}

// Parts of the scenarios, which are modes of their results.
const (
	connecting = "connect"
	resuming   = "resume"

	allRead   = "all read"
	someStuck = "stuck"

	alone     = "alone"
	withQuiet = "with quiet"
)

var modeOrder = []string{fixed, flatOut, connecting, resuming, allRead, someStuck, alone, withQuiet}

// storms measures what it costs a server to take all sessions, and to take them back after all
// connections were cut: CPU until it has come to rest, for each session.
func storms(ctx context.Context, o options, n, round int) ([]result, error) {
	list := slices.Insert([]string{upgradeOnly.name}, round%2, guildhallName)
	var results []result
	for _, name := range list {
		rs, err := storm(ctx, o, name, n)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		results = append(results, rs...)
	}
	return results, nil
}

func storm(ctx context.Context, o options, name string, n int) ([]result, error) {
	s, err := systemNamed(name)
	if err != nil {
		return nil, err
	}
	server, err := startServer(ctx, s, o.shardserver, 1)
	if err != nil {
		return nil, err
	}
	defer server.end()
	pause(ctx, o.settle)
	var clients *clients
	var results []result
	for _, mode := range []string{connecting, resuming} {
		before, err := server.cpu()
		if err != nil {
			return nil, err
		}
		var a answer
		if clients == nil {
			if clients, err = server.startClients(ctx, s, n); err != nil {
				return nil, err
			}
			defer clients.end()
			a = clients.connected
		} else if a, err = clients.ask(phase{Cut: true}); err != nil {
			return nil, err
		}
		pause(ctx, o.settle)
		after, err := server.cpu()
		if err != nil {
			return nil, err
		}
		results = append(results, result{system: name, mode: mode, perSession: (after - before) / float64(n) * 1e6, seconds: a.Seconds})
	}
	if s.dialect.resume != nil { // numbers go on where they were
		_, err = clients.ask(phase{Length: warmUp})
	}
	return results, err
}

// startWarm starts Guildhall with so many guilds, connects n sessions to the first, and publishes for a
// moment. end ends both processes.
func startWarm(ctx context.Context, o options, n, guilds int) (server *server, clients *clients, end func(), err error) {
	s, err := systemNamed(guildhallName)
	if err != nil {
		return nil, nil, nil, err
	}
	if server, err = startServer(ctx, s, o.shardserver, guilds); err != nil {
		return nil, nil, nil, err
	}
	if clients, err = server.startClients(ctx, s, n); err != nil {
		server.end()
		return nil, nil, nil, err
	}
	end = func() {
		clients.end()
		server.end()
	}
	if _, err = clients.ask(phase{Length: warmUp}); err != nil {
		end()
		return nil, nil, nil, err
	}
	return server, clients, end, nil
}

const (
	stuckPart = 10               // of so many sessions one does not read
	fillTime  = 60 * time.Second // within which the kernel takes no more for any of them
)

// stuck measures Guildhall flat out, first with all sessions reading, then with a part of them stuck
// and their sockets full. In the end those read again, and miss nothing.
func stuck(ctx context.Context, o options, n, _ int) ([]result, error) {
	server, clients, end, err := startWarm(ctx, o, n, 1)
	if err != nil {
		return nil, err
	}
	defer end()
	var results []result
	for _, count := range []int{0, max(n/stuckPart, 1)} {
		p := phase{Length: o.length, Stuck: count}
		if count > 0 {
			if err := fill(ctx, server, clients, count); err != nil {
				return nil, err
			}
		}
		r, err := measure(ctx, server, clients, p)
		if err != nil {
			return nil, err
		}
		r.system, r.mode, r.stuck = guildhallName, allRead, float64(count)
		if count > 0 {
			r.mode = someStuck
		}
		results = append(results, r)
	}
	_, err = clients.ask(phase{Length: warmUp})
	return results, err
}

// fill publishes until the server says that so many sessions take no more.
func fill(ctx context.Context, server *server, clients *clients, stuck int) error {
	for end := time.Now().Add(fillTime); ; {
		if _, err := clients.ask(phase{Length: time.Second, Stuck: stuck}); err != nil {
			return err
		}
		c, err := guildhallCounters(ctx, server.admin)
		if err != nil || c.lagging >= float64(stuck) {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d sessions read nothing for %s, the server shows %.0f", stuck, fillTime, c.lagging)
		}
	}
}

const (
	quietSystem   = "quiet guilds"
	quietGuilds   = 1000
	quietRate     = 100 // events per second of all together
	shardSessions = 15000
)

// quiet measures a guild flat out, first alone, then beside many others with a session each, that have
// an event now and then.
func quiet(ctx context.Context, o options, n, _ int) ([]result, error) {
	server, hot, end, err := startWarm(ctx, o, n, 1+quietGuilds)
	if err != nil {
		return nil, err
	}
	defer end()
	first, err := measure(ctx, server, hot, phase{Length: o.length})
	if err != nil {
		return nil, err
	}
	first.system, first.mode = guildhallName, alone

	s, err := systemNamed(guildhallName)
	if err != nil {
		return nil, err
	}
	config := server.clientConfig(s, quietGuilds)
	config.Guild, config.Guilds = guildID+1, quietGuilds
	others, err := startClients(ctx, config)
	if err != nil {
		return nil, err
	}
	defer others.end()
	// Long enough for a p99 of theirs.
	p := phase{Length: 3 * o.length}
	answered := make(chan error, 1)
	var a answer
	go func() {
		var err error
		a, err = others.ask(phase{Length: p.Length, Rate: quietRate})
		answered <- err
	}()
	second, err := measure(ctx, server, hot, p)
	if err != nil {
		return nil, err
	}
	if err := <-answered; err != nil {
		return nil, fmt.Errorf("quiet guilds: %w", err)
	}
	second.system, second.mode = guildhallName, withQuiet
	return []result{first, second, {
		system: quietSystem, mode: withQuiet, perSecond: float64(a.Deliveries) / a.Seconds, p50: a.P50, p99: a.P99,
	}}, nil
}
