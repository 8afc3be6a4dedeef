package controllers

import (
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// countsInterval is the least time between two writes of a guild's counts.
const countsInterval = 30 * time.Second

// guildView is all that a Guild's status depends on.
type guildView struct {
	guild    *v1.Guild
	decision decision
	// shard that the guild is booked on; nil when it is not in the cache.
	shard   *v1.GuildShard
	health  podHealth
	reports shardView
	// entry is the guild in its shard's report.
	entry    report.Guild
	reported bool
	// linked: the shard's pod takes links of relays.
	linked bool
	// relays is what a pass over the guild's relays has found; nil when there was none.
	relays *relayPass
	now    time.Time
}

// guildStatus computes a Guild's status. recheck, when above 0, is the time after which counts
// that are held back may be written.
func guildStatus(v guildView) (status v1.GuildStatus, recheck time.Duration) {
	v.guild.Status.DeepCopyInto(&status)
	d := v.decision
	stays := status.Placement != nil && status.Placement.ShardName == d.shard.name && status.Placement.ShardUID == string(d.shard.uid)

	status.ObservedGeneration = v.guild.Generation
	status.ID = d.id
	switch {
	case !d.placed():
		status.Placement, status.Mode = nil, ""
		status.Members, status.Online, status.Sessions, status.CountsObservedAt = nil, nil, nil, nil
	case !stays:
		status.Placement = &v1.GuildPlacementStatus{ShardName: d.shard.name, ShardUID: string(d.shard.uid)}
		if status.Mode == "" {
			status.Mode = v1.GuildDirect
		}
	}
	if d.placed() && v.reported && v.entry.ID == d.id && v.entry.LogID != "" {
		status.Placement.LogID, status.Placement.Epoch = v.entry.LogID, v.entry.Epoch
	}
	if d.placed() && v.shard != nil {
		status.Gateway = &v1.GuildGatewayStatus{URL: v1.AddressesOf(v.guild, d.id, v.shard).Gateway}
	}
	if v.serving() {
		recheck = setCounts(&status, v.entry, v.now)
	}

	w := conditionWriter{&status.Conditions, v.guild.Generation, v.now}
	w.set(condAccepted, v.accepted())
	w.set(condPlaced, v.placed())
	recheck = soonest(recheck, v.setRelays(&status, w))
	// What the leader before this one wrote stands until the shard has been asked.
	unasked := stays && v.reports.freshness == awaited
	if unasked && v.shard != nil && v.health.ready() {
		w.keep(condReady, v.ready())
	} else {
		w.set(condReady, v.ready())
	}
	if unasked {
		w.keep(condLoadFresh, v.loadFresh())
	} else {
		w.set(condLoadFresh, v.loadFresh())
	}
	return status, recheck
}

// deletingStatus is the status of a Guild whose sessions are being ended.
func deletingStatus(guild *v1.Guild, now time.Time) v1.GuildStatus {
	status := *guild.Status.DeepCopy()
	status.ObservedGeneration = guild.Generation
	w := conditionWriter{&status.Conditions, guild.Generation, now}
	w.set(condReady, isFalse(reasonDeleting, "the guild's sessions are being ended"))
	return status
}

func (v guildView) serving() bool {
	return v.reports.freshness == fresh && v.reported && v.entry.State == report.Serving &&
		v.entry.ID == v.decision.id && v.entry.LogID != ""
}

func (v guildView) accepted() verdict {
	if v.decision.reason == reasonIDConflict {
		return isFalse(reasonIDConflict, v.decision.message)
	}
	return isTrue(reasonAccepted, "")
}

func (v guildView) placed() verdict {
	d := v.decision
	switch {
	case !d.placed():
		return isFalse(d.reason, d.message)
	case v.shard != nil && !allows(v.guild.Spec.Placement, v.shard):
		return isTrue(reasonPlaced, fmt.Sprintf("on shard %s, which spec.placement does not allow: this version does not move a guild that is placed", d.shard.name))
	}
	return isTrue(reasonPlaced, "on shard "+d.shard.name)
}

func (v guildView) ready() verdict {
	d := v.decision
	switch {
	case !d.placed():
		return isFalse(d.reason, d.message)
	case v.shard == nil:
		return isFalse(reasonShardNotReady, fmt.Sprintf("GuildShard %s has just been made", d.shard.name))
	case !v.health.ready():
		return isFalse(reasonShardNotReady, fmt.Sprintf("shard %s: %s", d.shard.name, v.health.message))
	case v.reports.freshness == awaited:
		return isFalse(reasonShardNotReady, fmt.Sprintf("waiting for the first report of shard %s", d.shard.name))
	case v.reports.freshness == stale:
		return isFalse(reasonShardNotReady, fmt.Sprintf("shard %s does not report", d.shard.name))
	case v.serving():
		return isTrue(reasonServing, "")
	case v.reported && v.entry.State == report.LogMissing:
		return isFalse(reasonLogMissing, fmt.Sprintf("shard %s: %s. To give that log up and start a new one, annotate the Guild: %s=%s",
			d.shard.name, v.entry.Message, v1.AnnotationTakeOver, logOf(v.guild)))
	case v.reported && v.entry.State == report.Failed:
		return isFalse(reasonOpenFailed, fmt.Sprintf("shard %s: %s", d.shard.name, firstOf(v.entry.Message, "the log could not be opened")))
	}
	return isFalse(reasonOpening, fmt.Sprintf("shard %s is opening the guild", d.shard.name))
}

// logOf is the log that a Guild's status names.
func logOf(guild *v1.Guild) string {
	if p := guild.Status.Placement; p != nil {
		return p.LogID
	}
	return ""
}

func (v guildView) loadFresh() verdict {
	switch {
	case !v.decision.placed():
		return isFalse(reasonNotReported, "the guild has no shard")
	case v.reports.freshness == stale:
		return isFalse(reasonStale, fmt.Sprintf("shard %s has not reported for %s", v.decision.shard.name, staleAfter))
	case v.reports.freshness == fresh && v.reported:
		return isTrue(reasonReported, "")
	}
	return isFalse(reasonNotReported, fmt.Sprintf("shard %s has not reported the guild yet", v.decision.shard.name))
}

// setCounts writes rounded counts when they differ and the last ones are old enough.
func setCounts(status *v1.GuildStatus, g report.Guild, now time.Time) (recheck time.Duration) {
	members, online, sessions := rounded(g.Members), rounded(g.Online), rounded(g.Sessions)
	if equals(status.Members, members) && equals(status.Online, online) && equals(status.Sessions, sessions) {
		return 0
	}
	if at := status.CountsObservedAt; at != nil {
		if wait := countsInterval - now.Sub(at.Time); wait > 0 {
			return wait
		}
	}
	status.Members, status.Online, status.Sessions = &members, &online, &sessions
	status.CountsObservedAt = new(metav1.NewTime(now).Rfc3339Copy())
	return 0
}

func equals[T comparable](p *T, v T) bool { return p != nil && *p == v }
