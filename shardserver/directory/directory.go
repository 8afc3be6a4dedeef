// Package directory knows which guild of the namespace is where, and holds the guilds that are
// placed on this shard server.
package directory

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// Retention of a guild's log where the GuildShard does not say.
const (
	DefaultRetentionBytes = 16 << 20
	DefaultRetentionAge   = time.Hour
)

// Options of a Directory.
type Options struct {
	// ShardName and ShardUID are those of the GuildShard that this process serves.
	ShardName, ShardUID string
	// Version of the shard server, for the report.
	Version string
	// Core delivers the guilds' streams.
	Core *fanout.Core
	// PodAddress is host and port of the gateway of the pod of another GuildShard.
	PodAddress func(shardName string) string
	// Load measures the process for the report.
	Load   func() report.Load
	Logger *slog.Logger
}

// Directory is fed with the namespace's resources as they change and asked by those who serve clients.
type Directory struct {
	o   Options
	ids snowflake.Source

	mu      sync.RWMutex
	shard   *v1.GuildShard
	guilds  map[string]*entry       // by uid
	byID    map[snowflake.ID]*entry // placed ones
	changed chan struct{}           // closed at the next change
	synced  bool
	stopped bool

	events  atomic.Uint64 // appended to the logs of this process
	reports reporter
}

// Events is the number of events that this process has appended to logs.
func (d *Directory) Events() uint64 { return d.events.Load() }

// entry is what is known of a guild.
type entry struct {
	object *v1.Guild
	id     snowflake.ID
	local  *guild.Guild // held here
	failed string       // why it could not be opened here
}

// New makes an empty Directory.
func New(o Options) *Directory {
	return &Directory{
		o: o, shard: &v1.GuildShard{},
		guilds: map[string]*entry{}, byID: map[snowflake.ID]*entry{}, changed: make(chan struct{}),
		reports: newReporter(),
	}
}

// Place is where a guild is.
type Place struct {
	// Guild is set when it is held here.
	Guild *guild.Guild
	// Object is the Guild resource; nil when the guild is unknown.
	Object *v1.Guild
	// Remote is host and port of the pod that holds it, when that is another one.
	Remote string
}

// Find looks a guild up. changed is closed when the answer may be another one.
func (d *Directory) Find(id snowflake.ID) (p Place, changed <-chan struct{}) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	e := d.byID[id]
	if e == nil {
		return p, d.changed
	}
	p.Guild, p.Object = e.local, e.object
	if e.local == nil && !d.isMine(e.object) {
		p.Remote = d.o.PodAddress(e.object.Status.Placement.ShardName)
	}
	return p, d.changed
}

// Synced says that the directory knows every guild of the namespace.
func (d *Directory) Synced() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.synced
}

// SetSynced is told once that everything that exists has been applied.
func (d *Directory) SetSynced() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.synced = true
	d.notify()
}

// SessionCapacity is how many connections this shard server is planned to hold.
func (d *Directory) SessionCapacity() int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if n := d.shard.Spec.Capacity.Sessions; n > 0 {
		return int(n)
	}
	return v1.MaxSessions
}

// Addresses are the URLs of a guild.
func (d *Directory) Addresses(object *v1.Guild) v1.Addresses {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return v1.AddressesOf(object, d.shard)
}

func (d *Directory) isMine(g *v1.Guild) bool {
	p := g.Status.Placement
	return p != nil && p.ShardName == d.o.ShardName && p.ShardUID == d.o.ShardUID
}

// notify wakes those who wait for a change. d.mu is held.
func (d *Directory) notify() {
	close(d.changed)
	d.changed = make(chan struct{})
}

// ApplyShard takes the present state of this server's GuildShard.
func (d *Directory) ApplyShard(s *v1.GuildShard) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shard = s
	r := retentionOf(s)
	for _, e := range d.guilds {
		if e.local != nil {
			e.local.SetRetention(r)
		}
	}
	d.notify()
}

func retentionOf(s *v1.GuildShard) guildlog.Retention {
	r := guildlog.Retention{Bytes: DefaultRetentionBytes, Age: DefaultRetentionAge}
	if spec := s.Spec.Retention; spec != nil {
		if spec.Bytes != nil {
			r.Bytes = spec.Bytes.Value()
		}
		if spec.Age != nil {
			r.Age = spec.Age.Duration
		}
	}
	return r
}

// Apply takes the present state of a Guild. A guild is opened when it is placed here, and
// stopped when it is being deleted or placed elsewhere: never since something is missing.
func (d *Directory) Apply(g *v1.Guild) {
	d.mu.Lock()
	e := d.guilds[string(g.UID)]
	if e == nil {
		e = &entry{}
		d.guilds[string(g.UID)] = e
	}
	if g.Status.Placement == nil && e.object != nil && g.DeletionTimestamp == nil {
		g = g.DeepCopy() // the status was lost: go on with the placement that is known
		g.Status.ID, g.Status.Placement = e.object.Status.ID, e.object.Status.Placement
	}
	e.object = g
	var stop *guild.Guild
	var last []byte
	switch {
	case g.DeletionTimestamp != nil:
		stop, e.local = e.local, nil
		if stop != nil {
			last = deletedFrames(stop)
		}
		delete(d.guilds, string(g.UID))
		if d.byID[e.id] == e {
			delete(d.byID, e.id)
		}
	case g.Status.Placement == nil:
	default:
		id, err := snowflake.Parse(g.Status.ID)
		if err != nil {
			d.o.Logger.Error("guild has no valid id", "guild", g.Name, "error", err)
			break
		}
		e.id = id
		d.byID[id] = e
		if d.isMine(g) {
			d.hold(e)
		} else {
			stop, e.local = e.local, nil
			last = movedFrames
		}
	}
	d.notify()
	d.mu.Unlock()
	if stop != nil {
		stop.Close(last)
		d.o.Logger.Info("guild stopped", "guild", g.Name, "id", g.Status.ID)
	}
}

// hold opens the guild if it is not open, and brings it in line with its spec. d.mu is held.
func (d *Directory) hold(e *entry) {
	if d.stopped {
		return
	}
	open := e.object.JoinPolicy() == v1.JoinOpen
	if e.local != nil {
		e.local.SetOpen(open)
		go e.local.Rename(context.Background(), e.object.DisplayName())
		return
	}
	r := retentionOf(d.shard)
	local, err := guild.Open(guild.Config{
		ID: e.id, Name: e.object.DisplayName(), Open: open, Channels: bootstrapChannels(e.object),
		Retention: r, Log: guildlog.NewMemory(r, time.Now), Core: d.o.Core, IDs: &d.ids,
		Events: &d.events, Logger: d.o.Logger,
	})
	if err != nil {
		e.failed = err.Error()
		d.o.Logger.Error("guild not opened", "guild", e.object.Name, "id", e.id, "error", err)
		return
	}
	e.local, e.failed = local, ""
	d.o.Logger.Info("guild opened", "guild", e.object.Name, "id", e.id, "log", local.LogID())
}

func bootstrapChannels(g *v1.Guild) (channels []guild.BootstrapChannel) {
	if g.Spec.Bootstrap == nil {
		return nil
	}
	types := map[v1.ChannelType]int{
		v1.ChannelText: guild.ChannelText, v1.ChannelVoice: guild.ChannelVoice, v1.ChannelCategory: guild.ChannelCategory,
	}
	for _, c := range g.Spec.Bootstrap.Channels {
		channels = append(channels, guild.BootstrapChannel{Name: c.Name, Type: types[c.Type]})
	}
	return channels
}

// movedFrames end the sessions of a guild that is placed elsewhere: they resume there.
var movedFrames = append(append([]byte(nil), protocol.Reconnect...),
	protocol.CloseFrame(protocol.CloseUnknownError, "the guild has moved")...)

// deletedFrames end the sessions of a guild that is being deleted.
func deletedFrames(g *guild.Guild) []byte {
	frame, _ := protocol.Dispatch("GUILD_DELETE", g.Counts().LastSeq, fmt.Appendf(nil, `{"id":"%s"}`, g.ID()))
	return append(frame, protocol.CloseFrame(protocol.CloseUnknownError, "the guild was deleted")...)
}

// Stop stops all guilds of this process: nothing is appended any more. Sessions are left to the caller.
func (d *Directory) Stop() {
	d.mu.Lock()
	d.stopped = true
	var stop []*guild.Guild
	for _, e := range d.guilds {
		if e.local != nil {
			stop = append(stop, e.local)
			e.local = nil
		}
	}
	d.notify()
	d.mu.Unlock()
	for _, g := range stop {
		g.Close(movedFrames)
	}
}

// Holding says whether this process holds guilds now, and the sessions on them.
func (d *Directory) Holding() (guilds, sessions int) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, e := range d.guilds {
		if e.local != nil {
			guilds++
			sessions += e.local.Counts().Sessions
		}
	}
	return guilds, sessions
}
