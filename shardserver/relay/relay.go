// Package relay is the part of a shard server that serves one guild from a copy of its log, which it follows
// over a link to the shard that writes it.
package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"sync"
	"time"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/directory"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/link"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// linklessTime is how long a relay without link stays ready: a shard that restarts is back by then.
const linklessTime = 30 * time.Second

// Options of a Relay.
type Options struct {
	Guild    snowflake.ID
	GuildUID string
	// Name of the relay: its pod's.
	Name string
	// ShardLinks and ShardClients are host and port of the shard's links, and of its gateway and REST.
	ShardLinks, ShardClients string
	// GatewayURL is the address where clients resume, ws(s)://host[:port][/path]/g/<guild id>/.
	GatewayURL string
	// Sessions is how many connections the relay is planned to hold.
	Sessions int
	TLS      *tls.Config
	Core     *fanout.Core
	Version  string
	BootID   string
	// Load measures the process.
	Load   func() report.Load
	Logger *slog.Logger
}

// Relay is what the gateway asks of where guilds are, on a relay.
type Relay struct {
	o      Options
	object *v1.Guild
	client *link.Client

	mu      sync.Mutex
	guild   *guild.Guild // nil until the first link has brought its history
	changed chan struct{}
	ending  bool
}

// New makes a Relay, which follows the guild while Run runs.
func New(o Options) *Relay {
	r := &Relay{o: o, object: &v1.Guild{}, changed: make(chan struct{})}
	r.object.Status.ID = o.Guild.String()
	r.client = link.NewClient(link.ClientOptions{
		Address: o.ShardLinks, Name: o.Name, TLS: o.TLS, Logger: o.Logger, Changed: r.become, Report: r.report,
		Guild: guild.Config{ID: o.Guild, Core: o.Core, Logger: o.Logger},
	})
	return r
}

// Run keeps up with the shard until ctx ends, and then closes the guild.
func (r *Relay) Run(ctx context.Context) {
	r.client.Run(ctx)
	if g := r.current(); g != nil {
		g.Close(directory.MovedFrames)
	}
	r.become(nil)
}

func (r *Relay) become(g *guild.Guild) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.guild = g
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *Relay) current() *guild.Guild {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.guild
}

// Find says where a guild is: here, if it is the relay's.
func (r *Relay) Find(id snowflake.ID) (p directory.Place, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id == r.o.Guild {
		p.Object, p.Guild = r.object, r.guild
	}
	return p, r.changed
}

// Addresses are those where clients of the guild resume.
func (r *Relay) Addresses(*v1.Guild) v1.Addresses {
	return v1.Addresses{Gateway: r.o.GatewayURL, Direct: r.o.GatewayURL}
}

// SessionCapacity is how many connections the relay is planned to hold.
func (r *Relay) SessionCapacity() int { return r.o.Sessions }

// Reconnect asks all sessions to come back on another connection.
func (r *Relay) Reconnect() {
	if g := r.current(); g != nil {
		g.Reconnect()
	}
}

// Holding is the number of guilds that are here.
func (r *Relay) Holding() int {
	if r.current() == nil {
		return 0
	}
	return 1
}

var (
	errNoHistory = errors.New("the guild's history has not come yet")
	errNoLink    = errors.New("no link to the shard")
)

// Ready says why clients should not come, nil when they may.
func (r *Relay) Ready() error {
	switch {
	case r.current() == nil:
		return errNoHistory
	case r.client.Down() > linklessTime:
		return errNoLink
	}
	return nil
}

func (r *Relay) report() report.Relay {
	load := r.o.Load()
	a := report.Relay{
		GuildUID: r.o.GuildUID, Name: r.o.Name, BootID: r.o.BootID, Version: r.o.Version, Ready: r.Ready() == nil,
		Sessions: load.Sessions, DeliveriesPerSecond: load.DeliveriesPerSecond,
		ArrivalsPerSecond: load.ArrivalsPerSecond, Waiting: load.Waiting,
	}
	r.mu.Lock()
	g, ending := r.guild, r.ending
	r.mu.Unlock()
	a.Draining = ending
	if g != nil {
		c := g.Counts()
		round, asked := g.Moved()
		a.LastSeq, a.Sessions, a.Round, a.Asked = c.LastSeq, int64(c.Sessions), round, int64(asked)
		a.Draining = a.Draining || g.Draining()
	}
	return a
}

// Drain has all sessions leave, evenly over a time, and returns when they have left or the time is over.
func (r *Relay) Drain(ctx context.Context, within time.Duration) {
	r.mu.Lock()
	r.ending = true
	g := r.guild
	r.mu.Unlock()
	if g == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	asking := max(within-2*time.Second, time.Second) // the last ones need a moment, too
	g.Drain(int(float64(g.Counts().Sessions)/asking.Seconds()) + 1)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for g.Counts().Sessions > 0 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Requests is where REST requests go: to the shard.
func (r *Relay) Requests() *Requests { return &Requests{r} }

// Requests is what REST asks of where guilds are, on a relay.
type Requests struct{ r *Relay }

// Find says where the guild's requests are answered.
func (q *Requests) Find(id snowflake.ID) (p directory.Place, changed <-chan struct{}) {
	p, changed = q.r.Find(id)
	if p.Object != nil {
		p.Guild, p.Remote = nil, q.r.o.ShardClients
	}
	return p, changed
}

// Addresses are those of the relay.
func (q *Requests) Addresses(object *v1.Guild) v1.Addresses { return q.r.Addresses(object) }

// Synced says that no other guild will be known.
func (q *Requests) Synced() bool { return true }

// Stopped says that nothing is served any more.
func (q *Requests) Stopped() bool { return false }
