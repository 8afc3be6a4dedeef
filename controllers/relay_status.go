package controllers

import (
	"cmp"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"k8s.io/apimachinery/pkg/api/meta"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
)

// movedInterval is the least time between two writes of how far a round is.
const movedInterval = 5 * time.Second

// setRelays fills in what a Guild's status says of its relays. recheck, when above 0, is the time after which
// figures that are held back may be written.
func (v guildView) setRelays(status *v1.GuildStatus, w conditionWriter) (recheck time.Duration) {
	if v.decision.id == "" {
		status.Relays = nil
	} else if status.Relays == nil {
		status.Relays = &v1.GuildRelaysStatus{Replicas: new(int32(0))}
	}
	if status.Relays != nil {
		status.Relays.Selector = fmt.Sprintf("%s=%s,%s=%s", labelGuild, v.decision.id, labelComponent, componentRelay)
	}
	if !v.decision.placed() {
		meta.RemoveStatusCondition(w.conditions, condBalanced)
		meta.RemoveStatusCondition(w.conditions, condProgressing)
		return 0
	}
	p := v.relays
	if p == nil {
		// The shard has just been made, or is gone: what was seen last stands.
		w.keep(condBalanced, isTrue(reasonNoRelays, ""))
		w.keep(condProgressing, isFalse(reasonSteady, ""))
		return 0
	}
	status.Relays.Desired = new(int32(p.decision.Want))
	status.Relays.Replicas = new(int32(p.replicas))
	status.Relays.Ready = new(int32(p.ready))
	status.Relays.Updated = new(int32(p.updated))
	status.Relays.Draining = new(int32(p.draining))
	switch {
	case !p.planned:
		status.Mode = v1.GuildDirect
		status.Rebalance = endedRounds(status.Rebalance)
	case p.known() || status.Mode == "":
		status.Mode = v1.GuildMode(p.decision.Mode)
		status.Rebalance, recheck = rebalanceStatus(status.Rebalance, &p.decision, p.blocked(), p.state, v.now)
	case p.unheard() && p.blocked() != "":
		// How far moves are is not known, and why they do not go on is.
		if status.Rebalance = status.Rebalance.DeepCopy(); status.Rebalance == nil {
			status.Rebalance = new(v1.GuildRebalanceStatus)
		}
		status.Rebalance.BlockedReason = string(p.blocked())
	}
	w.set(condProgressing, p.progressing(status.Mode))
	if p.known() || p.unheard() {
		w.set(condBalanced, p.balanced())
	} else {
		w.keep(condBalanced, p.balanced())
	}
	return recheck
}

// known says whether there are reports to judge by; without them what was seen last stands.
func (p *relayPass) known() bool { return !p.planned || p.facts.serving }

// unheard: the shard does not speak of the guild, other than to a process that has only just begun to listen.
func (p *relayPass) unheard() bool {
	return p.planned && !p.facts.serving && p.facts.reports.freshness != awaited
}

// blocked is why relays are left as they are, if they are.
func (p *relayPass) blocked() relayplan.Reason {
	if d := &p.decision; d.Blocked == "" && (d.Want > 0 || p.replicas > 0) {
		return d.Reports
	}
	return p.decision.Blocked
}

// endedRounds keeps of rounds that are over their number, which never comes again.
func endedRounds(s *v1.GuildRebalanceStatus) *v1.GuildRebalanceStatus {
	if s == nil || s.Round == 0 {
		return nil
	}
	return &v1.GuildRebalanceStatus{Round: s.Round, ToMove: new(int64(0)), Moved: s.Moved}
}

// rebalanceStatus is how far moves are.
func rebalanceStatus(was *v1.GuildRebalanceStatus, d *relayplan.Decision, blocked relayplan.Reason, s *relayState, now time.Time) (next *v1.GuildRebalanceStatus, recheck time.Duration) {
	plan := d.Round
	switch {
	case d.Round != nil:
		next = &v1.GuildRebalanceStatus{
			Round: d.Round.ID, StartedAt: new(metav1.NewTime(d.Round.Started).Rfc3339Copy()),
			// Rounded up, so that it holds for who reads it here.
			Deadline: new(metav1.NewTime(d.Round.Deadline.Add(time.Second)).Rfc3339Copy()),
			ToMove:   new(int64(max(0, d.Round.ToMove-d.Round.Moved))), Moved: new(int64(d.Round.Moved)),
		}
	case d.Blocked == relayplan.EarlierRound && was != nil:
		next = was.DeepCopy()
	default:
		if next = endedRounds(was); next != nil && s.round != nil && s.round.ID == next.Round {
			next.Moved = new(int64(s.round.Moved))
		}
		if plan = d.Proposal; plan == nil && blocked == "" {
			return next, 0
		}
		if next == nil {
			next = new(v1.GuildRebalanceStatus)
		}
	}
	if plan != nil {
		next.PlanHash, next.Summary = plan.Hash, plan.Summary
		next.ToMove = new(int64(max(0, plan.ToMove-plan.Moved)))
	}
	next.BlockedReason = string(blocked)
	if was == nil || was.Round != next.Round || was.PlanHash != next.PlanHash || was.BlockedReason != next.BlockedReason || value(next.ToMove) == 0 {
		s.movedAt = now
		return next, 0
	}
	// Nothing but the progress is new.
	if wait := movedInterval - now.Sub(s.movedAt); wait > 0 {
		next.ToMove, next.Moved = was.ToMove, was.Moved
		return next, wait
	}
	if value(was.Moved) != value(next.Moved) || value(was.ToMove) != value(next.ToMove) {
		s.movedAt = now
	}
	return next, 0
}

func (p *relayPass) progressing(mode v1.GuildMode) verdict {
	want, draining := p.decision.Want, ""
	if p.draining > 0 {
		draining = fmt.Sprintf(", %d on their way out", p.draining)
	}
	said := fmt.Sprintf("%d of %d relays ready%s", p.ready, want, draining)
	if p.unready != "" {
		said += "; of those that are not: " + p.unready
	}
	switch {
	case p.trouble.reason != "":
		return p.trouble
	case mode == v1.GuildPromoting:
		return isTrue(string(v1.GuildPromoting), said)
	case mode == v1.GuildDemoting:
		return isTrue(string(v1.GuildDemoting), said)
	case p.updated < p.replicas-p.draining:
		return isTrue(reasonRollingOut, said)
	case p.replicas-p.draining < want:
		return isTrue(reasonScalingUp, said)
	case p.replicas-p.draining > want || p.draining > 0:
		return isTrue(reasonScalingDown, said)
	case p.ready < want:
		return isTrue(reasonWaitingForRelays, said)
	}
	return isFalse(reasonSteady, "")
}

func (p *relayPass) balanced() verdict {
	d := &p.decision
	switch {
	case !p.planned || d.Want == 0 && d.Round == nil:
		return isTrue(reasonNoRelays, "")
	case d.Reports != "":
		return verdict{metav1.ConditionUnknown, string(d.Reports), "a relay or the shard has not reported lately: nobody is moved, and no relay is taken away"}
	case d.Proposal != nil:
		return isFalse(string(relayplan.AwaitingApproval), fmt.Sprintf("%s. To approve it annotate the Guild: %s=%s", d.Proposal.Summary, v1.AnnotationApprove, d.Proposal.Hash))
	case d.Round != nil:
		return isFalse(reasonMoving, fmt.Sprintf("round %d: %s", d.Round.ID, d.Round.Summary))
	case d.Blocked != "":
		return isFalse(string(d.Blocked), cmp.Or(blockedMessages[d.Blocked], "moves are due"))
	case p.uneven:
		return isFalse(reasonUneven, "a relay has more sessions than spec.rebalance allows above the even share")
	}
	return isTrue(reasonBalanced, "")
}

// blockedMessages say why moves that are due do not begin.
var blockedMessages = map[relayplan.Reason]string{
	relayplan.EndpointsBehind: "moves are due; traffic still goes where sessions are to leave",
	relayplan.NoRoom:          "moves are due; who takes new sessions has no room for them",
	relayplan.Reconnecting:    "moves are due; many sessions are gone that were there lately, and most of them will come back",
	relayplan.Settling:        "moves are due; what the last round has moved may still be on its way",
	relayplan.EarlierRound:    "a round that an earlier leader has begun is under way",
	relayplan.BudgetSpent:     "moves are due; other guilds of the namespace use what may be moved per second",
	relayplan.PlanOutdated:    "moves are due; the plan no longer fits the reports",
}
