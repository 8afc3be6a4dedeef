package controllers

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
)

func TestAGuildIsSpreadOverRelaysAndComesBack(t *testing.T) {
	w, c := relayWorld(t, 300, manual(2), brisk())
	w.operate()
	g := c.relayed(v1.GuildRelayed, 2)
	service := get[corev1.Service](w, relaysName(g.Status.ID))
	if service.Spec.Selector[labelComponent] != componentRelay || service.Spec.Selector[labelAccepting] != "true" {
		t.Errorf("the Service selects %v", service.Spec.Selector)
	}
	if budget := get[policyv1.PodDisruptionBudget](w, relaysName(g.Status.ID)); budget.Spec.MinAvailable.IntValue() != 1 {
		t.Errorf("the budget keeps %s of 2 relays", budget.Spec.MinAvailable)
	}
	if secret := get[corev1.Secret](w, relayLinkName(g.Status.ID)); len(secret.Data["tls.crt"]) == 0 || len(secret.Data["ca.crt"]) == 0 {
		t.Error("the relays have no certificate")
	}
	c.set(func(c *crowd) { c.floor = 2 })
	w.scale("lobby", 3)
	c.relayed(v1.GuildRelayed, 3)
	c.set(func(c *crowd) { c.floor = 1 })
	w.scale("lobby", 1)
	c.relayed(v1.GuildRelayed, 1)
	c.set(func(c *crowd) { c.floor = 0 })
	w.scale("lobby", 0)
	g = c.relayed(v1.GuildDirect, 0)
	w.gone(&policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: relaysName(g.Status.ID)}})
	eventually(t, 30*time.Second, func() string {
		g := w.guild("lobby")
		if got := reason(g.Status.Conditions, condProgressing) + " " + reason(g.Status.Conditions, condBalanced); got != "!Steady NoRelays" {
			return "a guild at rest; it is " + got
		}
		return ""
	})
}

func TestRelaysFollowTheLoad(t *testing.T) {
	relays := v1.GuildRelays{SessionsPerRelay: 100, MaxReplicas: 4, StabilizationSeconds: &v1.RelayStabilization{Up: 1, Down: 1}}
	w, c := relayWorld(t, 20, relays, brisk())
	w.operate()
	w.guildIs("lobby", reasonServing)
	c.relayed(v1.GuildDirect, 0)
	wanted := func() int { return int(*w.guild("lobby").Status.Relays.Desired) }
	c.set(func(c *crowd) { c.want = 230 })
	eventually(t, time.Minute, func() string {
		if n := wanted(); n < 3 {
			return fmt.Sprintf("3 relays for 230 sessions of 100 each; it is %d", n)
		}
		return ""
	})
	c.relayed(v1.GuildRelayed, wanted())
	c.set(func(c *crowd) { c.want = 5000 })
	c.relayed(v1.GuildRelayed, 4) // no more than maxReplicas
	c.set(func(c *crowd) { c.want = 0 })
	c.relayed(v1.GuildDirect, 0)
}

func TestARelayThatIsGoneIsReplaced(t *testing.T) {
	w, c := relayWorld(t, 100, manual(2), brisk())
	w.operate()
	c.relayed(v1.GuildRelayed, 2)
	names := func() (names []string) {
		c.set(func(c *crowd) { names = slices.Sorted(maps.Keys(c.relays)) })
		return names
	}
	before := names()
	victim := get[corev1.Pod](w, before[0])
	if err := w.client.Delete(context.Background(), victim); err != nil {
		t.Fatal(err)
	}
	w.gone(victim)
	c.relayed(v1.GuildRelayed, 2)
	// One that has failed goes, and another comes.
	failed := get[corev1.Pod](w, before[1])
	running := client.MergeFrom(failed.DeepCopy())
	failed.Status.Phase = corev1.PodFailed
	if err := w.client.Status().Patch(context.Background(), failed, running); err != nil { // others write this pod, too
		t.Fatal(err)
	}
	w.gone(failed)
	c.relayed(v1.GuildRelayed, 2)
	eventually(t, time.Minute, func() string {
		for _, name := range names() {
			if slices.Contains(before, name) {
				return "relay " + name + " to go"
			}
		}
		return ""
	})
	c.relayed(v1.GuildRelayed, 2)
}

// A pod on a node that is lost is never done with being deleted.
func TestARelayThatCannotEndIsReplaced(t *testing.T) {
	w, c := relayWorld(t, 100, manual(2), brisk())
	w.operate()
	c.relayed(v1.GuildRelayed, 2)
	var lost string
	c.set(func(c *crowd) { lost = slices.Min(slices.Collect(maps.Keys(c.relays))) })
	finalizers := func(of ...string) {
		t.Helper()
		pod := get[corev1.Pod](w, lost)
		before := client.MergeFrom(pod.DeepCopy())
		pod.Finalizers = of
		if err := w.client.Patch(context.Background(), pod, before); err != nil {
			t.Fatal(err)
		}
	}
	finalizers("test.guildhall.dev/node-is-lost")
	if err := w.client.Delete(context.Background(), get[corev1.Pod](w, lost)); err != nil {
		t.Fatal(err)
	}
	is := func(mode v1.GuildMode, ready int32) {
		t.Helper()
		eventually(t, time.Minute, func() string {
			g := w.guild("lobby")
			if s := g.Status.Relays; g.Status.Mode != mode || s == nil || s.Ready == nil || s.Draining == nil ||
				*s.Ready != ready || *s.Draining != 1 {
				return fmt.Sprintf("mode %s with %d relays, besides the lost one; it is %s with %+v", mode, ready, g.Status.Mode, s)
			}
			return ""
		})
	}
	is(v1.GuildRelayed, 2)
	c.set(func(c *crowd) { c.floor = 0 })
	w.scale("lobby", 0)
	is(v1.GuildDirect, 0)
	finalizers()
	c.relayed(v1.GuildDirect, 0)
}

func TestRelaysThatCannotBeMade(t *testing.T) {
	w, c := relayWorld(t, 100, manual(0), brisk())
	w.operate()
	w.guildIs("lobby", reasonServing)
	quota := &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: "few"},
		Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("1")}},
	}
	w.create(quota)
	quota.Status.Hard = quota.Spec.Hard // by the quota controller, which a bare API server lacks
	quota.Status.Used = quota.Spec.Hard // by the shard's pod
	if err := w.client.Status().Update(context.Background(), quota); err != nil {
		t.Fatal(err)
	}
	w.scale("lobby", 2)
	progressing := func(want string) {
		t.Helper()
		eventually(t, time.Minute, func() string {
			if got := reason(w.guild("lobby").Status.Conditions, condProgressing); got != want {
				return fmt.Sprintf("Progressing to be %s; it is %s", want, got)
			}
			return ""
		})
	}
	progressing("!" + reasonQuotaExceeded)
	if err := w.client.Delete(context.Background(), quota); err != nil {
		t.Fatal(err)
	}
	// Those that never get ready are said to, and the guild is served all the while.
	c.set(func(c *crowd) { c.trouble = "ErrImagePull" })
	progressing(string(v1.GuildPromoting))
	eventually(t, time.Minute, func() string {
		if got := message(w.guild("lobby").Status.Conditions, condProgressing); !strings.Contains(got, "0 of 2") || !strings.Contains(got, "ErrImagePull") {
			return "what is wrong with the relays; it says " + got
		}
		return ""
	})
	w.guildIs("lobby", reasonServing)
	c.set(func(c *crowd) {
		if c.on[""] != 100 {
			t.Errorf("%d sessions on the shard, expected all 100", c.on[""])
		}
	})
}

func TestARollOutReplacesRelaysOneAfterTheOther(t *testing.T) {
	w, c := relayWorld(t, 200, manual(2), brisk())
	w.operate()
	c.relayed(v1.GuildRelayed, 2)
	var before []string
	c.set(func(c *crowd) {
		c.floor = 2
		before = slices.Sorted(maps.Keys(c.relays))
	})
	update(w, "shard-a", func(s *v1.GuildShard) {
		s.Spec.RelayTemplate = &v1.PodTemplate{Env: []corev1.EnvVar{{Name: "NEW", Value: "1"}}}
	})
	eventually(t, 2*time.Minute, func() string {
		left := ""
		c.set(func(c *crowd) {
			for _, name := range before {
				if c.relays[name] != nil {
					left = "relay " + name + " to be replaced"
				}
			}
		})
		return left
	})
	c.relayed(v1.GuildRelayed, 2)
	c.set(func(c *crowd) {
		for name, pod := range c.relays {
			if env := pod.Spec.Containers[0].Env; !slices.ContainsFunc(env, func(e corev1.EnvVar) bool { return e.Name == "NEW" }) {
				t.Errorf("relay %s was made from the old template: %v", name, env)
			}
		}
	})
}

func TestMovesWaitForApproval(t *testing.T) {
	rebalance := brisk()
	rebalance.Mode = v1.RebalanceApprove
	w, c := relayWorld(t, 300, manual(2), rebalance)
	w.operate()
	c.relayed(v1.GuildRelayed, 2)
	var round int64
	skew := func() {
		c.set(func(c *crowd) {
			round = c.round
			names := slices.Sorted(maps.Keys(c.relays))
			c.on[names[0]], c.on[names[1]] = 250, 50
		})
	}
	skew()
	var hash string
	eventually(t, 2*time.Minute, func() string {
		g := w.guild("lobby")
		if r := g.Status.Rebalance; r == nil || r.PlanHash == "" || reason(g.Status.Conditions, condBalanced) != "!AwaitingApproval" {
			return fmt.Sprintf("a plan that waits for approval; there is %+v", r)
		} else if hash = r.PlanHash; r.Summary == "" {
			return "a summary of the plan"
		}
		return ""
	})
	update(w, "lobby", func(g *v1.Guild) { g.Annotations = map[string]string{v1.AnnotationApprove: "0123456789abcdef"} })
	time.Sleep(3 * planInterval) // time to do what must not be done
	c.set(func(c *crowd) {
		if c.round != round {
			t.Errorf("round %d was ordered without approval", c.round)
		}
	})
	update(w, "lobby", func(g *v1.Guild) { g.Annotations[v1.AnnotationApprove] = hash })
	c.awaitRound(round)
	eventually(t, time.Minute, func() string {
		uneven := ""
		c.set(func(c *crowd) {
			for name, n := range c.on {
				if n > 200 {
					uneven = fmt.Sprintf("%s to have fewer than %d sessions", name, n)
				}
			}
		})
		return uneven
	})
}

func TestAnOperatorThatStopsInMidRound(t *testing.T) {
	w, c := relayWorld(t, 400, manual(2), &v1.GuildRebalance{MaxMovesPerSecond: 50, MinSkewSessions: 1})
	stop := w.operate()
	for i := range 2 {
		round := int64(0)
		c.set(func(c *crowd) { round = c.round })
		c.awaitRound(round)
		stop()
		c.set(func(c *crowd) { round = c.round })
		stop = w.operate()
		eventually(t, time.Minute, func() string {
			done := false
			c.set(func(c *crowd) { done = c.on[""] == 0 || c.round > round })
			if !done {
				return fmt.Sprintf("round %d to be carried out, or another one to begin", round)
			}
			return ""
		})
		c.set(func(c *crowd) {
			for name, o := range c.orders {
				if !o.All && o.asked > o.Leave {
					t.Errorf("%d of %d were asked to leave %q", o.asked, o.Leave, name)
				}
			}
		})
		w.scale("lobby", int32(3+i))
	}
	c.relayed(v1.GuildRelayed, 4)
}

func TestOldReportsMoveNobody(t *testing.T) {
	w, c := relayWorld(t, 200, manual(2), brisk())
	w.operate()
	c.relayed(v1.GuildRelayed, 2)
	var silent string
	c.set(func(c *crowd) {
		silent = slices.Sorted(maps.Keys(c.relays))[0]
		c.stopped[silent] = true
		c.floor = 2
	})
	eventually(t, time.Minute, func() string {
		if got := reason(w.guild("lobby").Status.Conditions, condBalanced); got != "!StaleReports" {
			return "Balanced to be unknown; it is " + got
		}
		return ""
	})
	w.scale("lobby", 1)
	time.Sleep(3 * planInterval) // time to do what must not be done; floor says if it is
	c.set(func(c *crowd) {
		delete(c.stopped, silent)
		c.floor = 1
	})
	c.relayed(v1.GuildRelayed, 1)
}

func TestAGuildWithRelaysIsDeleted(t *testing.T) {
	w, c := relayWorld(t, 100, manual(2), brisk())
	w.operate()
	g := c.relayed(v1.GuildRelayed, 2)
	if err := w.client.Delete(context.Background(), w.guild("lobby")); err != nil {
		t.Fatal(err)
	}
	w.gone(g)
	for _, obj := range []client.Object{new(corev1.Service), new(policyv1.PodDisruptionBudget)} {
		obj.SetNamespace(w.namespace)
		obj.SetName(relaysName(g.Status.ID))
		w.gone(obj)
	}
	w.gone(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: relayLinkName(g.Status.ID)}})
	eventually(t, time.Minute, func() string {
		left := 0
		c.set(func(c *crowd) { left = len(c.relays) })
		if left > 0 {
			return fmt.Sprintf("%d relays to go", left)
		}
		return ""
	})
}

func TestARelayWithoutOwnerIsAdopted(t *testing.T) {
	w, c := relayWorld(t, 100, manual(1), brisk())
	w.operate()
	c.relayed(v1.GuildRelayed, 1)
	var name string
	c.set(func(c *crowd) { name = slices.Sorted(maps.Keys(c.relays))[0] })
	update(w, name, func(p *corev1.Pod) { p.OwnerReferences = nil })
	eventually(t, 30*time.Second, func() string {
		if owner := metav1.GetControllerOf(get[corev1.Pod](w, name)); owner == nil || owner.Name != "lobby" {
			return "the relay to have its owner again"
		}
		return ""
	})
	c.relayed(v1.GuildRelayed, 1)
}
