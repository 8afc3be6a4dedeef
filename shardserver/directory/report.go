package directory

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"sort"
	"sync"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/store"
)

// maxGone bounds the dropped guilds that a delta can name; beyond it the answer is complete.
const maxGone = 4096

// reporter numbers the changes of the report's guilds.
type reporter struct {
	mu       sync.Mutex
	bootID   string
	revision int64
	guilds   map[string]numbered // by uid
	gone     []goneGuild         // oldest first
	goneFrom int64               // deltas since a revision below this do not know all that is gone
}

type numbered struct {
	report.Guild
	revision int64
}

type goneGuild struct {
	uid      string
	revision int64
}

func newReporter() reporter {
	var id [8]byte
	rand.Read(id[:])
	return reporter{bootID: hex.EncodeToString(id[:]), guilds: map[string]numbered{}}
}

// Report is this shard server's account of itself: all of it, or what changed since a revision of this process.
func (d *Directory) Report(bootID string, since int64) report.Report {
	now := d.localGuilds()
	r := &d.reports
	r.mu.Lock()
	defer r.mu.Unlock()
	r.update(now)

	answer := report.Report{
		BootID: r.bootID, ShardName: d.o.ShardName, ShardUID: d.o.ShardUID, Version: d.o.Version,
		Revision: r.revision, Guilds: []report.Guild{}, Load: d.o.Load(), Durable: d.o.Store != nil,
	}
	if d.o.Store != nil {
		answer.DiskFull = errors.Is(d.o.Store.Room(), guildlog.ErrFull)
	}
	answer.Complete = bootID != r.bootID || since < r.goneFrom || since > r.revision
	for _, g := range r.guilds {
		if answer.Complete || g.revision > since {
			answer.Guilds = append(answer.Guilds, g.Guild)
		}
	}
	sort.Slice(answer.Guilds, func(i, j int) bool { return answer.Guilds[i].UID < answer.Guilds[j].UID })
	if !answer.Complete {
		for _, g := range r.gone {
			if g.revision > since {
				answer.Gone = append(answer.Gone, g.uid)
			}
		}
	}
	return answer
}

func (r *reporter) update(now map[string]report.Guild) {
	for uid, g := range now {
		if old, ok := r.guilds[uid]; !ok || old.Guild != g {
			r.revision++
			r.guilds[uid] = numbered{Guild: g, revision: r.revision}
		}
	}
	for uid := range r.guilds {
		if _, ok := now[uid]; !ok {
			r.revision++
			delete(r.guilds, uid)
			r.gone = append(r.gone, goneGuild{uid: uid, revision: r.revision})
		}
	}
	if extra := len(r.gone) - maxGone; extra > 0 {
		r.goneFrom = r.gone[extra-1].revision
		r.gone = append([]goneGuild(nil), r.gone[extra:]...)
	}
}

// localGuilds are the guilds that this process holds or is to hold, and those whose logs it merely has, by uid.
func (d *Directory) localGuilds() map[string]report.Guild {
	d.mu.RLock()
	defer d.mu.RUnlock()
	guilds, held := make(map[string]report.Guild), make(map[snowflake.ID]bool)
	for uid, e := range d.guilds {
		if e.local == nil && !d.isMine(e.object) {
			continue
		}
		held[e.id] = true
		g := report.Guild{
			UID: uid, Namespace: e.object.Namespace, Name: e.object.Name, ID: e.object.Status.ID, State: report.Opening,
		}
		switch {
		case e.local != nil:
			c := e.local.Counts()
			g.State, g.LogID, g.Epoch = report.Serving, e.local.LogID().String(), e.local.Epoch()
			g.LastSeq, g.Members, g.Online, g.Sessions = c.LastSeq, int64(c.Members), int64(c.Online), int64(c.Sessions)
			round, asked := e.local.Moved()
			g.Direct, g.Round, g.Asked = int64(c.Direct), round, int64(asked)
			g.Relayed = d.placeOf(e).Relays != ""
		case errors.Is(e.failed, store.ErrLogMissing):
			g.State, g.Message = report.LogMissing, e.failed.Error()
		case e.failed != nil:
			g.State, g.Message = report.Failed, e.failed.Error()
		}
		guilds[uid] = g
	}
	for _, id := range d.stored(held) {
		if _, known := guilds[id.UID]; known {
			continue
		}
		guilds[id.UID] = report.Guild{
			UID: id.UID, Namespace: id.Namespace, Name: id.Name, ID: id.Guild.String(), State: report.Stored,
			LogID: id.Log.String(), Epoch: id.Epoch,
		}
	}
	return guilds
}
