package controllers

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
)

// byHand has a guild's number of relays be what somebody says.
func byHand(relays int32) func(*guildBuilder) {
	return func(g *guildBuilder) { g.Spec.Relays.Mode, g.Spec.Relays.Replicas = v1.RelaysManual, &relays }
}

func movesPerSecond(n int32) func(*guildBuilder) {
	return func(g *guildBuilder) { g.Spec.Rebalance.MaxMovesPerSecond = n }
}

func thereAndBack() []v1.GuildMode {
	return []v1.GuildMode{v1.GuildPromoting, v1.GuildRelayed, v1.GuildDemoting, v1.GuildDirect}
}

func TestRelaysComeBeforeTheyAreNeededAndGoWhenTheyAreEmpty(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t)
	b.grow(70)
	b.until(time.Minute, b.relayed(1))
	b.each = func(*v1.Guild) {
		for pod, n := range b.counts() {
			if pod != "" && n > 100 {
				t.Errorf("relay %s has %d sessions, and holds 100", pod, n)
			}
		}
	}
	for b.size() < 250 {
		b.grow(2)
		b.step()
	}
	var many int32
	b.until(3*time.Minute, func(g *v1.Guild) string {
		if many = *g.Status.Relays.Desired; many < 4 {
			return "4 relays, for 250 sessions at four fifths"
		}
		return b.relayed(many)(g)
	})

	// Most of them leave. Nothing follows until that has lasted; then relays drain before they go.
	b.shrink(120)
	left, round, drained := b.clock.Now(), roundOf(b.guild()), map[string]bool{}
	b.each = func(g *v1.Guild) {
		if passed := b.clock.Now().Sub(left); passed < 20*time.Second && *g.Status.Relays.Desired < many {
			t.Errorf("only %d relays are wanted after %s", *g.Status.Relays.Desired, passed)
		}
		for _, pod := range b.pods() {
			if pod.Labels[labelDraining] == "" {
				continue
			}
			drained[pod.Name] = true
			if pod.Labels[labelAccepting] != "" {
				t.Errorf("relay %s drains and still accepts", pod.Name)
			}
		}
	}
	b.until(5*time.Minute, b.relayed(2))
	if now := roundOf(b.guild()); now <= round {
		t.Errorf("the last round is %d, as before the drain", now)
	}
	if len(drained) != int(many)-2 {
		t.Errorf("%d relays drained, expected %d", len(drained), many-2)
	}
	for pod, n := range b.ended {
		if n > 0 || !drained[pod] {
			t.Errorf("relay %s ended with %d sessions; it drained: %v", pod, n, drained[pod])
		}
	}

	b.each = nil
	b.shrink(10)
	b.until(3*time.Minute, b.direct)
	b.step()
	if diff := cmp.Diff(thereAndBack(), b.modes); diff != "" {
		t.Errorf("modes (-want +got):\n%s", diff)
	}
	// Sessions know the Service's address; it stays, for the shard.
	if got := b.leadsTo(); got != componentShard {
		t.Errorf("the Service leads to the %s", got)
	}
	b.absent(relaysName(guildID), new(policyv1.PodDisruptionBudget))
}

func TestRelayThatDoesNotGetEmptyGoesAtTheDeadline(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2))
	b.grow(100)
	b.until(time.Minute, b.relayed(2))
	for _, at := range b.seats {
		at.stuck = true
	}
	b.change(func(g *v1.Guild) { g.Spec.Relays.Replicas = new(int32(1)) })
	b.until(10*time.Second, func(g *v1.Guild) string {
		if *g.Status.Relays.Draining == 0 {
			return "a relay to drain"
		}
		return ""
	})
	since := b.clock.Now()
	b.pace = slowPace
	b.until(10*time.Minute, func(*v1.Guild) string {
		if len(b.ended) == 0 {
			return "it to go"
		}
		return ""
	})
	if took, least := b.clock.Now().Sub(since), relayplan.DefaultPolicy().DrainTimeout; took < least-2*planInterval || took > least+20*time.Second {
		t.Errorf("it went after %s, expected %s", took, least)
	}
	if n := slices.Collect(maps.Values(b.ended)); n[0] == 0 || b.size() != 100 {
		t.Errorf("it had %d sessions; %d of 100 are left", n[0], b.size())
	}
}

func TestRelaysAreReplacedWithoutALackOfThem(t *testing.T) {
	for name, change := range map[string]func(*v1.GuildShard){
		"another relayTemplate": func(s *v1.GuildShard) {
			s.Spec.RelayTemplate = &v1.PodTemplate{NodeSelector: map[string]string{"disk": "fast"}}
		},
		"another image": func(s *v1.GuildShard) { s.Spec.Image = "registry.example/guildhall:2" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const relays = 3
			b := newRelayBench(t, byHand(relays))
			b.grow(150)
			b.until(time.Minute, b.relayed(relays))
			old := b.made
			b.made = map[string]bool{}
			b.each = func(*v1.Guild) {
				pods := b.pods()
				serve := 0
				for _, pod := range pods {
					if podReady(pod) && pod.DeletionTimestamp == nil && pod.Labels[labelDraining] == "" {
						serve++
					}
				}
				if serve < relays || len(pods) > relays+1 {
					t.Errorf("%d of %d relays serve, expected %d and a surge of 1", serve, len(pods), relays)
				}
			}
			b.changeShard(change)
			b.until(10*time.Second, func(g *v1.Guild) string {
				if got := reason(g.Status.Conditions, condProgressing); got != reasonRollingOut {
					return reasonRollingOut + " instead of " + got
				}
				return ""
			})
			b.until(10*time.Minute, b.relayed(relays))
			for _, pod := range b.pods() {
				c := pod.Spec.Containers[0]
				if old[pod.Name] || c.Image == testImage && pod.Spec.NodeSelector["disk"] == "" {
					t.Errorf("relay %s is as it was", pod.Name)
				}
			}
			for pod, n := range b.ended {
				if n > 0 {
					t.Errorf("relay %s ended with %d sessions", pod, n)
				}
			}
		})
	}
}

func TestNobodyIsToldToLeaveTheShardThatTheyHaveComeBackTo(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t)
	b.grow(150)
	b.until(time.Minute, b.relayed(2))
	// At once: the deadline of the promotion's round has not come.
	b.change(func(g *v1.Guild) { g.Spec.Relays.Mode = v1.RelaysDisabled })
	b.until(2*time.Minute, b.direct)
	b.during(time.Minute, func(*v1.Guild) {})
	if diff := cmp.Diff(map[string]int{"": 150}, b.counts()); diff != "" {
		t.Errorf("sessions (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[int]int{2: 150}, b.asks()); diff != "" {
		t.Errorf("how often sessions were told to leave (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(thereAndBack(), b.modes); diff != "" {
		t.Errorf("modes (-want +got):\n%s", diff)
	}
}

func TestServiceStaysWithTheRelaysWhileTheShardIsNotReady(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t)
	b.grow(150)
	b.until(time.Minute, b.relayed(2))
	b.setShardReady(false)
	b.change(func(g *v1.Guild) { g.Spec.Relays.Mode = v1.RelaysDisabled })
	b.during(30*time.Second, func(*v1.Guild) {
		if got := b.leadsTo(); got != componentRelay {
			t.Fatalf("the Service leads to the %s", got)
		}
	})
	b.setShardReady(true)
	b.until(2*time.Minute, b.direct)
}

func TestRelayThatIsLostIsReplaced(t *testing.T) {
	for name, tc := range map[string]struct {
		happens func(*relayBench, *corev1.Pod)
		// How long it takes until another does its work.
		least, most time.Duration
	}{
		"it ends": {
			func(b *relayBench, pod *corev1.Pod) { b.doom(corev1.PodFailed, pod) }, 0, 3 * planInterval,
		},
		"somebody deletes it": {
			func(b *relayBench, pod *corev1.Pod) {
				if err := b.client.Delete(b.t.Context(), pod); err != nil {
					b.t.Fatal(err)
				}
			}, 0, 3 * planInterval,
		},
		"it is not ready any more": {
			func(b *relayBench, pod *corev1.Pod) { b.doom(corev1.PodUnknown, pod) }, time.Minute, time.Minute + 5*planInterval,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newRelayBench(t, byHand(2))
			b.grow(100)
			b.until(time.Minute, b.relayed(2))
			victim, began := b.pods()[0], b.clock.Now()
			tc.happens(b, victim)
			b.until(tc.most, func(*v1.Guild) string {
				serve := 0
				for _, pod := range b.pods() {
					if podReady(pod) && pod.Name != victim.Name {
						serve++
					}
				}
				if serve < 2 {
					return "2 relays that serve"
				}
				return ""
			})
			if took := b.clock.Now().Sub(began); took < tc.least {
				t.Errorf("it was replaced after %s", took)
			}
			b.until(10*time.Minute, b.relayed(2))
			if b.size() != 100 {
				t.Errorf("%d of 100 sessions are left", b.size())
			}
		})
	}
}

func TestRelayThatNeverGetsReadyIsReplaced(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(1))
	b.becomes = always(corev1.PodPending)
	b.step()
	made := b.clock.Now()
	b.pace = slowPace
	g := b.until(6*time.Minute, func(*v1.Guild) string {
		if len(b.made) < 2 {
			return "another pod"
		}
		return ""
	})
	if took := b.clock.Now().Sub(made); took < relayplan.DefaultPolicy().PendingTimeout {
		t.Errorf("it was replaced after %s", took)
	}
	if got := b.leadsTo(); g.Status.Mode != v1.GuildPromoting || got != componentShard {
		t.Errorf("without a relay that serves the guild is %s, and the Service leads to the %s", g.Status.Mode, got)
	}
	b.becomes, b.pace = nil, planInterval
	b.until(time.Minute, b.relayed(1))
}

func TestRelaysThatAlwaysFailAreMadeLessAndLessOften(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(1))
	b.becomes = always(corev1.PodFailed)
	var after []time.Duration // the one before
	last, n := b.clock.Now(), len(b.made)
	b.during(2*time.Minute, func(*v1.Guild) {
		if len(b.made) > n {
			after, last, n = append(after, b.clock.Now().Sub(last)), b.clock.Now(), len(b.made)
		}
	})
	// The first one that fails is replaced at once, the next ones after 5 s, 10 s and so on; each by a pass.
	want := []time.Duration{0, createDelay, 2 * createDelay, 4 * createDelay, 8 * createDelay}
	if n > len(want)+2 {
		t.Fatalf("%d were made, after %s", n, after)
	}
	for i, least := range want {
		if got := after[len(after)-len(want):][i]; got < least || got > least+3*planInterval {
			t.Errorf("made after %s, expected %s or little more at the end", after, want)
			break
		}
	}
	b.becomes = nil
	b.until(3*time.Minute, b.relayed(1))
}

func TestRelaysThatEndTogetherAreReplacedTogether(t *testing.T) {
	t.Parallel()
	const relays = 8
	b := newRelayBench(t, byHand(relays))
	b.grow(160)
	b.until(time.Minute, b.relayed(relays))
	// With their node; the first one is noticed alone.
	pods := b.pods()
	b.doom(corev1.PodFailed, pods[0])
	b.step()
	b.doom(corev1.PodFailed, pods[1:6]...)
	b.until(5*planInterval, func(g *v1.Guild) string {
		if *g.Status.Relays.Ready < relays {
			return "8 relays"
		}
		return ""
	})
}

func TestQuotaThatForbidsRelaysIsSaidAndNotAskedForEver(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2))
	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: b.namespace, Name: "few"}}
	quota.Spec.Hard = corev1.ResourceList{corev1.ResourcePods: resource.MustParse("2")} // the shard's and one more
	b.create(quota)
	// By the controller of quotas, which a bare API server lacks.
	quota.Status = corev1.ResourceQuotaStatus{Hard: quota.Spec.Hard, Used: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("1")}}
	if err := b.client.Status().Update(t.Context(), quota); err != nil {
		t.Fatal(err)
	}
	b.grow(60)
	g := b.until(time.Minute, func(g *v1.Guild) string {
		if got := reason(g.Status.Conditions, condProgressing); got != "!"+reasonQuotaExceeded || !equals(g.Status.Relays.Ready, 1) {
			return "Progressing to be QuotaExceeded, not " + got
		}
		return ""
	})
	said := message(g.Status.Conditions, condProgressing)
	if !strings.Contains(said, "exceeded quota: few") {
		t.Errorf("the message is %q", said)
	}
	refused := len(server(t).refused(t, b.namespace, time.Time{}))
	b.during(40*time.Second, func(g *v1.Guild) {
		if got := message(g.Status.Conditions, condProgressing); got != said {
			t.Errorf("the message is now %q", got)
		}
	})
	if n := len(server(t).refused(t, b.namespace, time.Time{})) - refused; n < 1 || n > 4 {
		t.Errorf("a relay was asked for %d times", n)
	}
	if err := b.client.Delete(t.Context(), quota); err != nil {
		t.Fatal(err)
	}
	b.until(2*time.Minute, b.relayed(2))
}

func TestApprovalIsOfOnePlan(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2), func(g *guildBuilder) { g.Spec.Rebalance.Mode = v1.RebalanceApprove })
	b.grow(100)
	b.until(time.Minute, b.relayed(2))
	before, full := b.rounds(), b.pods()[1].Name
	b.leave(b.pods()[0].Name, 45)
	proposed := func(old string) *v1.GuildRebalanceStatus {
		return b.until(5*time.Minute, func(g *v1.Guild) string {
			if r := g.Status.Rebalance; r.BlockedReason != string(relayplan.AwaitingApproval) || r.PlanHash == "" || r.PlanHash == old {
				return "a plan"
			}
			return ""
		}).Status.Rebalance
	}
	plan := proposed("")
	if !strings.Contains(plan.Summary, "from "+full) || value(plan.ToMove) == 0 {
		t.Errorf("the plan is %q with %d moves", plan.Summary, value(plan.ToMove))
	}
	if got := reason(b.guild().Status.Conditions, condBalanced); got != "!"+string(relayplan.AwaitingApproval) {
		t.Errorf("Balanced is %s", got)
	}
	nothing := func(*v1.Guild) {
		if diff := cmp.Diff(before, b.rounds()); diff != "" {
			t.Fatalf("rounds (-before +now):\n%s", diff)
		}
	}
	b.change(func(g *v1.Guild) { g.Annotations = map[string]string{v1.AnnotationApprove: "0123456789abcdef"} })
	b.during(30*time.Second, nothing)
	if got := b.guild().Status.Rebalance.PlanHash; got != plan.PlanHash {
		t.Errorf("the plan has become %s although it fits", got)
	}

	// Another plan has another hash, and what was approved is not that.
	b.leave(full, 20)
	b.step()
	other := proposed(plan.PlanHash)
	b.change(func(g *v1.Guild) { g.Annotations[v1.AnnotationApprove] = plan.PlanHash })
	b.during(30*time.Second, nothing)

	b.change(func(g *v1.Guild) { g.Annotations[v1.AnnotationApprove] = other.PlanHash })
	b.until(time.Minute, b.relayed(2))
	if got := len(b.rounds()) - len(before); got != 1 {
		t.Errorf("%d rounds were ordered", got)
	}
	if got := int64(b.asks()[2]); got != value(other.ToMove) {
		t.Errorf("%d sessions were moved, and the plan said %d", got, value(other.ToMove))
	}
}

func TestNumberByHandFollowsTheScaleSubresource(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(1))
	b.grow(20)
	b.until(time.Minute, b.relayed(1))
	for _, n := range []int32{3, 1, 0} {
		scale := new(autoscalingv1.Scale)
		if err := b.client.SubResource("scale").Get(t.Context(), b.guild(), scale); err != nil {
			t.Fatal(err)
		}
		if got := len(b.pods()); int(scale.Status.Replicas) != got {
			t.Errorf("the subresource says %d relays; there are %d", scale.Status.Replicas, got)
		}
		if want := labelGuild + "=" + guildID + "," + labelComponent + "=" + componentRelay; scale.Status.Selector != want {
			t.Errorf("the selector is %s, expected %s", scale.Status.Selector, want)
		}
		scale.Spec.Replicas = n
		if err := b.client.SubResource("scale").Update(t.Context(), b.guild(), client.WithSubResourceBody(scale)); err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			b.until(5*time.Minute, b.direct)
			continue
		}
		b.until(5*time.Minute, b.relayed(n))
	}
	if diff := cmp.Diff(map[string]int{"": 20}, b.counts()); diff != "" {
		t.Errorf("sessions (-want +got):\n%s", diff)
	}
}

func TestRoundOfAnEarlierProcessEndsAndNobodyIsToldToLeaveTwice(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2), movesPerSecond(5))
	b.grow(150)
	moved := func(n int) func(*v1.Guild) string {
		return func(*v1.Guild) string {
			if b.asks()[1] < n {
				return "moves"
			}
			return ""
		}
	}
	b.until(time.Minute, moved(20))
	b.restart()
	round := roundOf(b.guild())
	b.until(time.Minute, moved(60)) // the round goes on
	if diff := cmp.Diff([]int64{round}, b.rounds()); diff != "" {
		t.Errorf("rounds (-want +got):\n%s", diff)
	}
	if got := b.guild().Status.Rebalance.BlockedReason; got != string(relayplan.EarlierRound) {
		t.Errorf("blocked by %q", got)
	}
	b.restart()
	b.until(5*time.Minute, b.relayed(2))
	if diff := cmp.Diff(map[int]int{1: 150}, b.asks()); diff != "" {
		t.Errorf("how often sessions were told to leave (-want +got):\n%s", diff)
	}
}

func TestRoundThatWasRecordedAndNeverOrderedIsFollowedByAnother(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2))
	// The process ends between the status and the orders.
	b.guilds.relays.orders.term.value.Store(0)
	b.grow(150)
	b.until(time.Minute, func(g *v1.Guild) string {
		if roundOf(g) == 0 {
			return "a round"
		}
		return ""
	})
	b.restart()
	b.until(2*time.Minute, b.relayed(2))
	if diff := cmp.Diff([]int64{2}, b.rounds()); diff != "" {
		t.Errorf("rounds (-want +got):\n%s", diff)
	}
}

func TestNothingIsTakenAwayOnOldReports(t *testing.T) {
	for name, silence := range map[string]func(b *relayBench, relay string, silent bool){
		"the shard is silent": func(b *relayBench, _ string, silent bool) { b.silent = silent },
		"a relay is silent":   func(b *relayBench, relay string, silent bool) { b.audience.silence(relay, silent) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newRelayBench(t)
			b.grow(150)
			b.until(time.Minute, b.relayed(2))
			rounds := b.rounds()
			silence(b, b.pods()[0].Name, true)
			b.until(20*time.Second, func(g *v1.Guild) string {
				if got := g.Status.Rebalance.BlockedReason; got != string(relayplan.StaleReports) {
					return "moves to be blocked, not by " + got
				}
				return ""
			})
			// There is enough to do: few are left, and they lie unevenly.
			b.leave(b.pods()[1].Name, 70)
			b.during(time.Minute, func(g *v1.Guild) {
				if *g.Status.Relays.Desired != 2 || len(b.pods()) != 2 || g.Status.Mode != v1.GuildRelayed {
					t.Fatalf("%s with %d relays, wanted %d", g.Status.Mode, len(b.pods()), *g.Status.Relays.Desired)
				}
				said := g.Status.Rebalance.BlockedReason + " " + reason(g.Status.Conditions, condBalanced)
				if said != "StaleReports !StaleReports" {
					t.Fatalf("blocked and Balanced say %s", said)
				}
			})
			if diff := cmp.Diff(rounds, b.rounds()); diff != "" {
				t.Errorf("rounds (-before +after):\n%s", diff)
			}
			silence(b, b.pods()[0].Name, false)
			g := b.until(2*time.Minute, b.relayed(2))
			if g.Status.Rebalance.BlockedReason != "" {
				t.Errorf("it is still blocked by %s", g.Status.Rebalance.BlockedReason)
			}
		})
	}
}

func TestRoundPausesWhileReportsAreMissing(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2), movesPerSecond(2))
	b.grow(150)
	was := b.until(2*time.Minute, func(g *v1.Guild) string {
		if r := g.Status.Rebalance; r == nil || value(r.Moved) < 20 {
			return "moves"
		}
		return ""
	}).Status.Rebalance
	b.silent = true
	is := b.until(20*time.Second, func(g *v1.Guild) string {
		if g.Status.Rebalance.BlockedReason != string(relayplan.StaleReports) {
			return "the round to pause"
		}
		return ""
	}).Status.Rebalance
	b.step()
	if is.Round != was.Round || is.PlanHash != was.PlanHash || value(is.Moved) < value(was.Moved) {
		t.Errorf("the status says of the round %+v, and said %+v", is, was)
	}
	if o := b.orders[len(b.orders)-1]; o.Round != was.Round || o.Orders[0].PerSecond != 0 {
		t.Errorf("the last order is %+v", o)
	}
	b.silent = false
	b.until(5*time.Minute, b.relayed(2))
	if diff := cmp.Diff(map[int]int{1: 150}, b.asks()); diff != "" {
		t.Errorf("how often sessions were told to leave (-want +got):\n%s", diff)
	}
}

func TestRelayOfAFormerGuildIsLeftAlone(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2))
	b.grow(100)
	b.until(time.Minute, b.relayed(2))
	foreign := b.pods()[0]
	base := foreign.DeepCopy()
	foreign.OwnerReferences[0].UID = "former"
	if err := b.client.Patch(t.Context(), foreign, client.MergeFrom(base)); err != nil {
		t.Fatal(err)
	}
	b.until(time.Minute, func(g *v1.Guild) string {
		if *g.Status.Relays.Ready < 2 {
			return "another in its stead"
		}
		return ""
	})
	pod := new(corev1.Pod)
	b.read(foreign.Name, pod)
	if pod.DeletionTimestamp != nil || !cmp.Equal(pod.OwnerReferences, foreign.OwnerReferences) || pod.Labels[labelDraining] != "" {
		t.Errorf("it was written to: %+v", pod.ObjectMeta)
	}
}

func TestNothingIsLeftOfTheRelaysOfADeletedGuild(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2), movesPerSecond(1))
	b.grow(150)
	g := b.until(time.Minute, func(*v1.Guild) string {
		if len(b.orders) == 0 {
			return "a round"
		}
		return ""
	})
	// In mid-round.
	if err := b.client.Delete(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	b.clock.Step(time.Second)
	if there, _ := b.reconcile(b.guilds, g); !there {
		t.Fatal("it went while its shard had it")
	}
	b.absent(relaysName(guildID), new(corev1.Service))
	b.absent(relaysName(guildID), new(policyv1.PodDisruptionBudget))
	b.absent(relayLinkName(guildID), new(corev1.Secret))
	for _, pod := range b.pods() {
		if pod.DeletionTimestamp == nil {
			t.Errorf("relay %s stays", pod.Name)
		}
	}
	b.past(g.DeletionTimestamp.Time)
	b.clock.Step(deletionDeadline)
	if there, _ := b.reconcile(b.guilds, g); there {
		t.Error("it is there after the deadline")
	}
	if r := b.guilds.relays; len(r.states) > 0 || len(r.budget.asks) > 0 {
		t.Errorf("%d guilds are remembered, and moves are set aside in %d namespaces", len(r.states), len(r.budget.asks))
	}
}

func TestNamespaceThatEndsGetsNoRelaysAnew(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(2))
	b.grow(100)
	g := b.until(time.Minute, b.relayed(2))
	if err := b.client.Delete(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: b.namespace}}); err != nil {
		t.Fatal(err)
	}
	made := len(b.made)
	for _, pod := range b.pods() {
		if err := b.client.Delete(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
	}
	b.during(10*time.Second, func(g *v1.Guild) {
		if got := reason(g.Status.Conditions, condProgressing); strings.HasPrefix(got, "!") {
			t.Errorf("Progressing is %s", got)
		}
	})
	if len(b.made) > made {
		t.Errorf("%d relays were made anew", len(b.made)-made)
	}
	if err := b.client.Delete(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	b.reconcile(b.guilds, g)
	b.past(g.DeletionTimestamp.Time)
	b.clock.Step(deletionDeadline)
	if there, _ := b.reconcile(b.guilds, g); there {
		t.Error("the Guild holds the namespace up")
	}
}

func TestBudgetYieldsWhenTheRelaysAreNotReadyForLong(t *testing.T) {
	t.Parallel()
	b := newRelayBench(t, byHand(3))
	b.grow(150)
	b.until(time.Minute, b.relayed(3))
	least := func() int {
		budget := new(policyv1.PodDisruptionBudget)
		b.read(relaysName(guildID), budget)
		return budget.Spec.MinAvailable.IntValue()
	}
	if n := least(); n != 2 {
		t.Fatalf("it keeps %d of 3 relays", n)
	}
	b.becomes, b.pace = always(corev1.PodUnknown), slowPace
	began := b.clock.Now()
	b.until(2*budgetYields, func(*v1.Guild) string {
		if least() > 0 {
			return "it to keep none"
		}
		return ""
	})
	if took := b.clock.Now().Sub(began); took < budgetYields {
		t.Errorf("it has yielded after %s", took)
	}
	b.becomes, b.pace = nil, planInterval
	b.until(10*time.Minute, b.relayed(3))
	if n := least(); n != 2 || b.size() != 150 {
		t.Errorf("it keeps %d of 3 relays with %d sessions", n, b.size())
	}
}
