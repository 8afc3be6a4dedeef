// Package directory knows which guild of the namespace is where, and holds the guilds that are
// placed on this shard server.
package directory

import (
	"bytes"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/store"
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
	// Store has the guilds' logs; they are in memory when it is nil.
	Store *store.Store
	// PodAddress is host and port of the gateway of the pod of another GuildShard.
	PodAddress func(shardName string) string
	// RelayAddress is host and port of the relays of a guild; nil: there are none.
	RelayAddress func(id snowflake.ID) string
	// Load measures the process for the report.
	Load   func() report.Load
	Logger *slog.Logger
}

// Directory is fed with the namespace's resources as they change and asked by those who serve clients.
type Directory struct {
	o   Options
	ids snowflake.Source

	// opening is held by the one who opens or ends guilds, which may wait for the disk.
	opening sync.Mutex

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
	failed error        // why it could not be opened here
}

// retryTime is when a guild that could not be opened is tried again.
const retryTime = 5 * time.Second

// New makes an empty Directory.
func New(o Options) *Directory {
	return &Directory{
		o: o, shard: &v1.GuildShard{ObjectMeta: metav1.ObjectMeta{Name: o.ShardName}},
		guilds: map[string]*entry{}, byID: map[snowflake.ID]*entry{}, changed: make(chan struct{}),
		reports: newReporter(),
	}
}

// ForwardedHeader marks what another pod has forwarded, a connection or a request: it is not forwarded again.
const ForwardedHeader = "Guildhall-Spliced"

// Place is where a guild is.
type Place struct {
	// Guild is set when it is held here.
	Guild *guild.Guild
	// Object is the Guild resource; nil when the guild is unknown.
	Object *v1.Guild
	// Remote is host and port of the pod that holds it, when that is another one.
	Remote string
	// Relays is host and port of the relays that serve its sessions, when there are some.
	Relays string
}

// Find looks a guild up. changed is closed when the answer may be another one.
func (d *Directory) Find(id snowflake.ID) (p Place, changed <-chan struct{}) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	e := d.byID[id]
	if e == nil {
		return p, d.changed
	}
	return d.placeOf(e), d.changed
}

// placeOf is where a placed guild is. d.mu is held.
func (d *Directory) placeOf(e *entry) (p Place) {
	p.Guild, p.Object = e.local, e.object
	if d.o.RelayAddress != nil && e.object.Status.Mode == v1.GuildRelayed {
		p.Relays = d.o.RelayAddress(e.id)
	}
	if shard := e.object.Status.Placement.ShardName; e.local == nil && shard != d.o.ShardName {
		p.Remote = d.o.PodAddress(shard)
	}
	return p
}

// Held returns the guild of a Guild object, when it is held here.
func (d *Directory) Held(uid string) (g *guild.Guild, id snowflake.ID) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if e := d.guilds[uid]; e != nil {
		return e.local, e.id
	}
	return nil, 0
}

// UID returns the uid of the Guild object of a guild that is placed somewhere; empty when it is not known.
func (d *Directory) UID(id snowflake.ID) string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if e := d.byID[id]; e != nil {
		return string(e.object.UID)
	}
	return ""
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
	return v1.AddressesOf(object, object.Status.ID, d.shard)
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
	d.shard = s
	d.notify()
	d.mu.Unlock()
	for _, g := range d.locals() {
		g.SetRetention(retentionOf(s))
	}
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
	d.opening.Lock()
	defer d.opening.Unlock()
	stop, last := d.apply(g)
	if stop != nil {
		stop.Close(last)
		d.o.Logger.Info("guild stopped", "guild", g.Name, "id", stop.ID())
	}
	if g.DeletionTimestamp != nil {
		d.forget(g)
	} else {
		d.hold(string(g.UID))
	}
}

// apply returns the guild that is to be stopped, if one is, and what ends its sessions.
func (d *Directory) apply(g *v1.Guild) (stop *guild.Guild, last func(seq uint64) []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	uid := string(g.UID)
	e := d.guilds[uid]
	if g.DeletionTimestamp != nil {
		if e == nil {
			return nil, nil
		}
		if d.byID[e.id] == e {
			delete(d.byID, e.id)
		}
		stop, e.local = e.local, nil
		d.notify()
		return stop, deletedFrames(e.id)
	}
	if e == nil {
		e = &entry{}
		d.guilds[uid] = e
	}
	if g.Status.Placement == nil && e.object != nil && e.object.Status.Placement != nil {
		g = g.DeepCopy() // the status was lost: go on with the placement that is known
		g.Status.ID, g.Status.Placement = e.object.Status.ID, e.object.Status.Placement
	}
	var before Place
	if d.byID[e.id] == e {
		before = d.placeOf(e)
	}
	if g.Status.Placement == nil {
		e.object = g
		return nil, nil
	}
	id, err := snowflake.Parse(g.Status.ID)
	if err != nil {
		d.o.Logger.Error("guild has no valid id", "guild", g.Name, "error", err)
		return nil, nil
	}
	if d.byID[e.id] == e && e.id != id {
		delete(d.byID, e.id)
	}
	if former := d.byID[id]; former != nil && former != e { // made anew, while the deletion is not known here
		stop, former.local = former.local, nil
	}
	e.object, e.id, d.byID[id] = g, id, e
	if !d.isMine(g) && e.local != nil {
		stop, e.local = e.local, nil
	}
	// Resources change often, in what does not matter to those who wait.
	if after := d.placeOf(e); before.Object == nil || before.Guild != after.Guild || before.Remote != after.Remote || before.Relays != after.Relays {
		d.notify()
	}
	return stop, MovedFrames
}

// hold opens a guild that is placed here, if it is not open, and brings it in line with its spec. d.opening is held.
func (d *Directory) hold(uid string) {
	d.mu.RLock()
	e := d.guilds[uid]
	if e == nil || d.stopped || d.byID[e.id] != e || !d.isMine(e.object) {
		d.mu.RUnlock()
		return
	}
	object, local := e.object, e.local
	c := guild.Config{
		ID: e.id, Name: object.DisplayName(), Open: object.JoinPolicy() == v1.JoinOpen, Channels: bootstrapChannels(object),
		Retention: retentionOf(d.shard), Core: d.o.Core, IDs: &d.ids, Events: &d.events, Logger: d.o.Logger,
	}
	d.mu.RUnlock()
	if local != nil {
		local.SetOpen(c.Open)
		local.SetName(c.Name)
		return
	}
	local, err := d.open(object, c)

	d.mu.Lock()
	if d.stopped && local != nil {
		d.mu.Unlock()
		local.Close(MovedFrames)
		return
	}
	defer d.mu.Unlock()
	if err != nil {
		if e.failed == nil || e.failed.Error() != err.Error() {
			d.o.Logger.Error("guild not opened", "guild", object.Name, "id", c.ID, "error", err)
		}
		e.failed = err
		time.AfterFunc(retryTime, func() {
			d.opening.Lock()
			defer d.opening.Unlock()
			d.hold(uid)
		})
		return
	}
	e.local, e.failed = local, nil
	d.notify()
	d.o.Logger.Info("guild opened", "guild", object.Name, "id", e.id, "log", local.LogID())
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

// MovedFrames end the sessions of a guild that is served elsewhere from now on: they resume there.
func MovedFrames(uint64) []byte {
	return append(bytes.Clone(protocol.Reconnect), protocol.CloseFrame(protocol.CloseUnknownError, "the guild has moved")...)
}

// deletedFrames end the sessions of a guild that is being deleted.
func deletedFrames(id snowflake.ID) func(seq uint64) []byte {
	return func(seq uint64) []byte {
		frame, _ := protocol.Dispatch("GUILD_DELETE", seq, fmt.Appendf(nil, `{"id":"%s"}`, id))
		return append(frame, protocol.CloseFrame(protocol.CloseUnknownError, "the guild was deleted")...)
	}
}

// Reconnect asks all sessions on this process's guilds to come back on another connection.
func (d *Directory) Reconnect() {
	for _, g := range d.locals() {
		g.Reconnect()
	}
}

// locals are the guilds that this process holds.
func (d *Directory) locals() (guilds []*guild.Guild) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, e := range d.guilds {
		if e.local != nil {
			guilds = append(guilds, e.local)
		}
	}
	return guilds
}

// Stop stops all guilds of this process: nothing is appended any more, and none is opened. Sessions
// are let go before.
func (d *Directory) Stop() {
	d.mu.Lock()
	d.stopped = true
	d.mu.Unlock()
	d.opening.Lock() // what is being opened is seen here, or ended there
	defer d.opening.Unlock()
	for _, g := range d.locals() {
		g.Close(MovedFrames)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.guilds {
		e.local = nil
	}
	d.notify()
}

// Stopped says that Stop has been called: no guild of this process will be available again.
func (d *Directory) Stopped() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.stopped
}

// Holding is the number of guilds that this process holds.
func (d *Directory) Holding() int { return len(d.locals()) }
