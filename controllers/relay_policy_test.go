package controllers

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
	"guildhall.dev/guildhall/shardserver/report"
)

func TestRelayPolicyOfASpec(t *testing.T) {
	for name, tc := range map[string]struct {
		spec v1.GuildSpec
		want func(*relayplan.Policy)
	}{
		"nothing is said": {v1.GuildSpec{}, func(*relayplan.Policy) {}},
		"a number by hand": {
			v1.GuildSpec{Relays: v1.GuildRelays{Mode: v1.RelaysManual, Replicas: new(int32(3))}},
			func(p *relayplan.Policy) { p.Scaling, p.Replicas = relayplan.ScalingManual, 3 },
		},
		"small relays within bounds": {
			v1.GuildSpec{Relays: v1.GuildRelays{
				MinReplicas: new(int32(1)), MaxReplicas: 4, SessionsPerRelay: 100, StabilizationSeconds: &v1.RelayStabilization{Down: 20},
			}},
			func(p *relayplan.Policy) {
				p.MinReplicas, p.MaxReplicas, p.SessionsPerRelay, p.StabilizeDown = 1, 4, 100, 20*time.Second
			},
		},
		"moves that somebody approves": {
			v1.GuildSpec{Rebalance: &v1.GuildRebalance{Mode: v1.RebalanceApprove, MaxMovesPerSecond: 50, MaxSkewPercent: 20, MinSkewSessions: 7}},
			func(p *relayplan.Policy) {
				p.Rebalance, p.MaxMovesPerSecond, p.MaxSkewPercent, p.MinSkewSessions = relayplan.RebalanceApprove, 50, 20, 7
			},
		},
		"no moves": {
			v1.GuildSpec{Rebalance: &v1.GuildRebalance{Mode: v1.RebalanceDisabled}},
			func(p *relayplan.Policy) { p.Rebalance = relayplan.RebalanceDisabled },
		},
	} {
		t.Run(name, func(t *testing.T) {
			want := relayplan.DefaultPolicy()
			tc.want(&want)
			if diff := cmp.Diff(want, relayPolicy(&v1.Guild{Spec: tc.spec})); diff != "" {
				t.Errorf("policy (-want +got):\n%s", diff)
			}
		})
	}
}

func TestGracePeriodFitsTheMovesOfARelay(t *testing.T) {
	for name, tc := range map[string]struct {
		sessions int
		rate     float64
		want     time.Duration
	}{
		"the default":          {15000, 500, 30*time.Second + graceSlack},
		"a small relay":        {100, 500, graceSlack},
		"moves that take ages": {15000, 1, maxGrace},
	} {
		t.Run(name, func(t *testing.T) {
			p := relayplan.DefaultPolicy()
			p.SessionsPerRelay, p.MaxMovesPerSecond = tc.sessions, tc.rate
			if got := gracePeriod(p); got != tc.want {
				t.Errorf("%s, expected %s", got, tc.want)
			}
		})
	}
}

func TestGuildsThatAreNotPlannedFor(t *testing.T) {
	for name, tc := range map[string]struct {
		scaling              relayplan.Scaling
		replicas, least      int
		sessions, deliveries int64
		want                 bool
	}{
		"a light guild":                {relayplan.ScalingAuto, 0, 0, 100, 0, false},
		"one that grows":               {relayplan.ScalingAuto, 0, 0, 5000, 0, true},
		"one with many events":         {relayplan.ScalingAuto, 0, 0, 10, 50000, true},
		"one that always has some":     {relayplan.ScalingAuto, 0, 1, 0, 0, true},
		"by hand, none":                {relayplan.ScalingManual, 0, 0, 15000, 0, false},
		"by hand, one":                 {relayplan.ScalingManual, 1, 0, 0, 0, true},
		"a heavy one that may not":     {relayplan.ScalingDisabled, 3, 3, 15000, 0, false},
		"a number for another mode":    {relayplan.ScalingAuto, 3, 0, 0, 0, false},
		"the least of a mode by hand":  {relayplan.ScalingManual, 0, 3, 0, 0, false},
		"nobody and nothing happening": {relayplan.ScalingAuto, 0, 0, 0, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := relayplan.DefaultPolicy()
			p.Scaling, p.Replicas, p.MinReplicas = tc.scaling, tc.replicas, tc.least
			if got := wantsRelays(p, tc.sessions, tc.deliveries); got != tc.want {
				t.Errorf("planned for: %v", got)
			}
		})
	}
}

func TestPhaseOfARelaysPod(t *testing.T) {
	made := metav1.NewTime(noon)
	ready := func(status corev1.ConditionStatus) []corev1.PodCondition {
		return []corev1.PodCondition{{Type: corev1.PodReady, Status: status, LastTransitionTime: metav1.NewTime(noon.Add(time.Minute))}}
	}
	for name, tc := range map[string]struct {
		pod   corev1.Pod
		want  relayplan.Phase
		since time.Time
	}{
		"it starts":             {corev1.Pod{}, relayplan.Pending, noon},
		"it starts, unready":    {corev1.Pod{Status: corev1.PodStatus{Conditions: ready(corev1.ConditionFalse)}}, relayplan.Pending, noon},
		"it is ready":           {corev1.Pod{Status: corev1.PodStatus{Conditions: ready(corev1.ConditionTrue)}}, relayplan.Ready, noon.Add(time.Minute)},
		"it has been ready":     {corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{annotationReadySince: "x"}}, Status: corev1.PodStatus{Conditions: ready(corev1.ConditionFalse)}}, relayplan.NotReady, noon.Add(time.Minute)},
		"it has failed":         {corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodFailed}}, relayplan.Failed, noon},
		"it has ended, somehow": {corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodSucceeded}}, relayplan.Failed, noon},
	} {
		t.Run(name, func(t *testing.T) {
			tc.pod.CreationTimestamp = made
			phase, since := relayPhase(&tc.pod)
			if phase != tc.want || !since.Equal(tc.since) {
				t.Errorf("%v since %s, expected %v since %s", phase, since, tc.want, tc.since)
			}
		})
	}
}

func TestSessionsOfAShardThatKnowsNoRelays(t *testing.T) {
	old := report.Guild{Sessions: 40}
	if got := directOf(old, nil); got != 40 {
		t.Errorf("%d direct sessions, expected all", got)
	}
	relays := []report.Relay{{Sessions: 30, DeliveriesPerSecond: 300}}
	now := report.Guild{Sessions: 40, Direct: 10}
	if got := directOf(now, relays); got != 10 {
		t.Errorf("%d direct sessions, expected 10", got)
	}
	// The shard's deliveries are those of all its guilds: this one has half of the sessions.
	if got := deliveriesOf(now, relays, report.Load{Sessions: 20, DeliveriesPerSecond: 100}); got != 350 {
		t.Errorf("%d deliveries per second, expected 350", got)
	}
	load := report.Load{Sessions: 20, ArrivalsPerSecond: 100}
	if got := arrivalsOf(now, relays, load); got != 50 {
		t.Errorf("%v arrivals per second, expected 50", got)
	}
	if now.Relayed = true; arrivalsOf(now, relays, load) != 0 {
		t.Errorf("%v arrivals per second of a relayed guild at its shard", arrivalsOf(now, relays, load))
	}
}
