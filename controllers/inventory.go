package controllers

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"guildhall.dev/guildhall/shardserver/report"
)

// staleAfter is the age at which a report says nothing any more about the present.
const staleAfter = 10 * time.Second

// freshness of what is known of a shard.
type freshness int

const (
	// awaited: this process has not heard from the shard, and has not listened for long. A status
	// that an earlier leader wrote stands until then.
	awaited freshness = iota
	fresh
	stale
)

// inventory is what the shards have last reported, by GuildShard.
type inventory struct {
	mu     sync.Mutex
	shards map[types.NamespacedName]*shardRecord
}

// shardRecord is what is known of one GuildShard. A record ends with its uid.
type shardRecord struct {
	uid types.UID
	// since when this process listens, and when it last heard.
	since    time.Time
	lastSeen time.Time
	// asked is when the last answered request was sent.
	asked time.Time
	// complete: guilds is all that the shard holds.
	complete bool
	bootID   string
	version  string
	disk     disk
	revision int64
	load     report.Load
	guilds   map[types.UID]report.Guild
	// relays of each guild.
	relays map[types.UID][]report.Relay
	// told and toldLoad are what the reconcilers have been told of.
	told     freshness
	toldLoad report.Load
}

// shardView is a copy of a record without its guilds.
type shardView struct {
	freshness freshness
	complete  bool
	asked     time.Time
	// seen is when the last report came.
	seen    time.Time
	bootID  string
	version string
	disk    disk
	load    report.Load
}

// disk is what a shard says of where its logs are.
type disk struct {
	durable, full bool
}

// news says whom a report concerns.
type news struct {
	// guilds whose state, log or rounded counts are new.
	guilds []types.NamespacedName
	// shard: it has something to show.
	shard bool
	// process: its first report, another process, or another freshness, which all its guilds show.
	process bool
	// identities: the set of guilds or their ids changed, or the inventory became complete.
	identities bool
}

func newInventory() *inventory {
	return &inventory{shards: map[types.NamespacedName]*shardRecord{}}
}

func (r *shardRecord) freshness(now time.Time) freshness {
	switch {
	case !r.lastSeen.IsZero() && now.Sub(r.lastSeen) < staleAfter:
		return fresh
	case r.lastSeen.IsZero() && now.Sub(r.since) < staleAfter:
		return awaited
	}
	return stale
}

// listen begins a record for a shard, unless there is one.
func (inv *inventory) listen(key types.NamespacedName, uid types.UID, now time.Time) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	if r := inv.shards[key]; r == nil || r.uid != uid {
		inv.shards[key] = &shardRecord{uid: uid, since: now, guilds: map[types.UID]report.Guild{}}
	}
}

// forget ends the records of shards that are not among those that exist.
func (inv *inventory) forget(exists func(types.NamespacedName) bool) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	maps.DeleteFunc(inv.shards, func(key types.NamespacedName, _ *shardRecord) bool { return !exists(key) })
}

// cursor is what the next request for a report should ask for.
func (inv *inventory) cursor(key types.NamespacedName) (bootID string, revision int64) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	if r := inv.shards[key]; r != nil && r.complete {
		return r.bootID, r.revision
	}
	return "", 0
}

// take takes in a valid report that was asked for at a time.
func (inv *inventory) take(key types.NamespacedName, uid types.UID, rep *report.Report, asked, now time.Time) news {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	r := inv.shards[key]
	if r == nil || r.uid != uid {
		return news{} // the shard has gone meanwhile
	}
	if !rep.Complete && (rep.BootID != r.bootID || !r.complete) {
		return news{} // changes to something that is not known; the next request asks for all
	}
	var n news
	n.process = r.bootID != rep.BootID || r.freshness(now) != fresh || r.told != fresh
	n.shard = n.process || r.disk != diskOf(rep) || r.version != rep.Version ||
		rounded(r.toldLoad.Sessions) != rounded(rep.Load.Sessions) || loadMoved(r.toldLoad, rep.Load)
	if n.shard {
		r.toldLoad = rep.Load
	}
	n.identities = !r.complete

	changed := make(map[types.UID]report.Guild, len(rep.Guilds))
	for _, g := range rep.Guilds {
		changed[types.UID(g.UID)] = g
	}
	gone := make([]types.UID, 0, len(rep.Gone))
	if rep.Complete {
		for uid := range r.guilds {
			if _, ok := changed[uid]; !ok {
				gone = append(gone, uid)
			}
		}
	} else {
		for _, uid := range rep.Gone {
			gone = append(gone, types.UID(uid))
		}
	}
	for _, uid := range gone {
		if old, ok := r.guilds[uid]; ok {
			n.guilds = append(n.guilds, types.NamespacedName{Namespace: old.Namespace, Name: old.Name})
			n.identities = true
			delete(r.guilds, uid)
		}
	}
	for uid, g := range changed {
		old, known := r.guilds[uid]
		if !known || old.ID != g.ID {
			n.identities = true
		}
		if !known || notable(old) != notable(g) {
			n.guilds = append(n.guilds, types.NamespacedName{Namespace: g.Namespace, Name: g.Name})
		}
		r.guilds[uid] = g
	}

	r.relays = map[types.UID][]report.Relay{}
	for _, relay := range rep.Relays {
		uid := types.UID(relay.GuildUID)
		r.relays[uid] = append(r.relays[uid], relay)
	}
	n.guilds = append(n.guilds, r.heavy(rep.Load)...)
	r.bootID, r.version, r.disk = rep.BootID, rep.Version, diskOf(rep)
	r.revision, r.complete = rep.Revision, true
	r.load, r.lastSeen, r.asked, r.told = rep.Load, now, asked, fresh
	return n
}

// heavyDeliveries is how many deliveries per second make a guild worth a look at each report: few sessions with
// many events need relays, too, and nothing else of them changes.
const heavyDeliveries = 5000

// heavy are the guilds that make many deliveries.
func (r *shardRecord) heavy(load report.Load) []types.NamespacedName {
	if load.DeliveriesPerSecond < heavyDeliveries {
		return nil
	}
	var keys []types.NamespacedName
	for uid, g := range r.guilds {
		if g.Sessions > 0 && deliveriesOf(g, r.relays[uid], load) >= heavyDeliveries {
			keys = append(keys, types.NamespacedName{Namespace: g.Namespace, Name: g.Name})
		}
	}
	return keys
}

// notable leaves of a guild what a status can show.
func notable(g report.Guild) report.Guild {
	g.LastSeq, g.Round, g.Asked = 0, 0, 0
	g.Direct = rounded(g.Direct)
	g.Members, g.Online, g.Sessions = rounded(g.Members), rounded(g.Online), rounded(g.Sessions)
	return g
}

// aged returns the shards whose freshness has changed without a report since the last call.
func (inv *inventory) aged(now time.Time) []types.NamespacedName {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	var keys []types.NamespacedName
	for key, r := range inv.shards {
		if f := r.freshness(now); f != r.told {
			r.told = f
			keys = append(keys, key)
		}
	}
	return keys
}

// shard returns what is known of a shard; nothing of another uid's.
func (inv *inventory) shard(key types.NamespacedName, uid types.UID, now time.Time) shardView {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	r := inv.shards[key]
	if r == nil || r.uid != uid {
		return shardView{}
	}
	return shardView{
		freshness: r.freshness(now), complete: r.complete, asked: r.asked, seen: r.lastSeen,
		bootID: r.bootID, version: r.version, disk: r.disk, load: r.load,
	}
}

func diskOf(rep *report.Report) disk { return disk{durable: rep.Durable, full: rep.DiskFull} }

// guild returns a guild as its shard last reported it.
func (inv *inventory) guild(key types.NamespacedName, shardUID, guild types.UID) (report.Guild, bool) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	r := inv.shards[key]
	if r == nil || r.uid != shardUID {
		return report.Guild{}, false
	}
	g, ok := r.guilds[guild]
	return g, ok
}

// holds says whether any shard of a namespace has the guild, by a test of what it reports, and whether all of
// them are known.
func (inv *inventory) holds(shards []shardRef, namespace string, guild types.UID, has func(report.Guild) bool) (held, complete bool) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	complete = true
	for _, s := range shards {
		r := inv.shards[types.NamespacedName{Namespace: namespace, Name: s.name}]
		if r == nil || r.uid != s.uid || !r.complete {
			complete = false
			continue
		}
		if g, ok := r.guilds[guild]; ok && has(g) {
			held = true
		}
	}
	return held, complete
}

// identities returns which of the namespace's shards have not reported, in order, and the
// bookings that the others' reports amount to.
func (inv *inventory) identities(namespace string, shards []shardRef) (missing []string, bookings map[types.UID]booking) {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	bookings = map[types.UID]booking{}
	holders := map[types.UID]report.Guild{}
	shards = slices.SortedFunc(slices.Values(shards), func(a, b shardRef) int { return cmp.Compare(a.name, b.name) })
	for _, s := range shards {
		r := inv.shards[types.NamespacedName{Namespace: namespace, Name: s.name}]
		if r == nil || r.uid != s.uid || !r.complete {
			missing = append(missing, s.name)
			continue
		}
		for uid, g := range r.guilds {
			if other, ok := holders[uid]; ok && !comesBefore(g, other) {
				continue
			}
			bookings[uid], holders[uid] = booking{id: g.ID, shard: s}, g
		}
	}
	return missing, bookings
}

// comesBefore says which of two reports of one guild, from different shards, counts: of two holders the one with
// the later epoch has taken over, and who merely has a log on disk is none.
func comesBefore(a, b report.Guild) bool {
	if stored := a.State == report.Stored; stored != (b.State == report.Stored) {
		return !stored
	}
	return a.Epoch > b.Epoch
}
