package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"guildhall.dev/guildhall/hack/load/generator"
)

// How large guilds on relays get; "make torture-relays" asks for more.
var (
	crowd         = flag.Int("crowd", 300, "sessions that a guild grows to")
	crowdRate     = flag.Float64("crowd-rate", 20, "events per second meanwhile")
	perRelay      = flag.Int("per-relay", 100, "sessions that a relay is planned to hold")
	operatorKills = flag.Int("operator-kills", 1, "how often the operator is killed in mid-round")
)

// relayed is what the status of the namespace's guild says of its relays.
type relayed struct {
	t         *testing.T
	namespace string
}

type relayStatus struct {
	Mode       string
	Relays     struct{ Desired, Replicas, Ready, Updated, Draining int }
	Rebalance  struct{ ToMove, Moved int }
	Conditions []struct{ Type, Status, Reason, Message string }
}

// status does without kubectl: asked every 200 ms, that would take a good part of the machine.
func (r relayed) status() relayStatus {
	r.t.Helper()
	raw, err := api(r.t).RESTClient().Get().AbsPath("/apis/guildhall.dev/v1/namespaces", r.namespace, "guilds/lobby").DoRaw(context.Background())
	var guild struct{ Status relayStatus }
	if err == nil {
		err = json.Unmarshal(raw, &guild)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return guild.Status
}

// patch changes the guild's spec.
func (r relayed) patch(spec string) {
	r.t.Helper()
	kubectl(r.t, "-n", r.namespace, "patch", "guild", "lobby", "--type=merge", "-p", `{"spec":`+spec+`}`)
}

// is waits until the guild has so many relays, all of them ready and made from the present spec, and nothing else.
func (r relayed) is(n int) {
	r.t.Helper()
	mode := "Relayed"
	if n == 0 {
		mode = "Direct"
	}
	eventually(r.t, fmt.Sprintf("%d relays", n), func() bool {
		s := r.status()
		return s.Mode == mode && s.Relays.Replicas == n && s.Relays.Ready == n && s.Relays.Updated == n && s.Relays.Draining == 0
	})
}

// atLeast waits until so many relays serve, and the guild has no more than it wants.
func (r relayed) atLeast(n int) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%d relays", n), func() bool {
		s := r.status()
		return s.Mode == "Relayed" && s.Relays.Ready >= n && s.Relays.Ready == s.Relays.Desired && s.Relays.Replicas == s.Relays.Ready
	})
}

// balanced waits until the sessions lie evenly on the relays.
func (r relayed) balanced() {
	r.t.Helper()
	began := time.Now()
	eventually(r.t, "an even spread", r.isBalanced)
	r.t.Logf("balanced after %v", time.Since(began).Round(time.Second))
}

func (r relayed) isBalanced() bool {
	for _, c := range r.status().Conditions {
		if c.Type == "Balanced" {
			return c.Status == "True"
		}
	}
	return false
}

// direct has clients go to the guild's own Service, which leads to its relays and, while there are none, to its shard:
// they do not come by way of a pod that copies what they are sent. It returns the guild's address there.
func (r relayed) direct(url string) string {
	r.t.Helper()
	id, address := path.Base(url), ""
	r.scale(1) // the Service is there from the first relay on
	eventually(r.t, "the guild's Service", func() bool {
		address = kubectl(r.t, "-n", r.namespace, "get", "service", "relay-"+id, "--ignore-not-found", "-o", "jsonpath={.spec.clusterIP}")
		return address != ""
	})
	base := "ws://" + address
	r.patch(fmt.Sprintf(`{"gateway":{"publicURL":%q}}`, base))
	r.scale(0)
	r.is(0)
	url, err := cluster.GuildURL(context.Background(), r.namespace, "lobby", base)
	if err != nil {
		r.t.Fatal(err)
	}
	return url
}

// scale has the guild have so many relays.
func (r relayed) scale(n int) {
	r.t.Helper()
	r.patch(fmt.Sprintf(`{"relays":{"mode":"Manual","replicas":%d}}`, n))
}

// killRelay deletes a relay's pod without giving it time.
func (r relayed) killRelay() {
	r.t.Helper()
	victim := kubectl(r.t, "-n", r.namespace, "get", "pods", "-l", "app.kubernetes.io/component=relay", "-o", "jsonpath={.items[0].metadata.name}")
	kubectl(r.t, "-n", r.namespace, "delete", "pod", victim, "--grace-period=0", "--force")
}

// pace logs how fast the load's sessions come back from moves, while the guild gets to where moved waits for.
func (l *load) pace(moved func()) {
	l.t.Helper()
	type mark struct {
		at time.Time
		n  uint64
	}
	before := l.Resumed()
	end, watched := make(chan struct{}), make(chan []mark)
	go func() {
		marks := []mark{{time.Now(), before}}
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case now := <-tick.C:
				if n := l.Resumed(); n > marks[len(marks)-1].n {
					marks = append(marks, mark{now, n})
				}
			case <-end:
				watched <- marks
				return
			}
		}
	}()
	moved()
	close(end)
	marks := <-watched
	last := marks[len(marks)-1]
	reached := func(share float64) mark { // of the moves
		for _, m := range marks {
			if float64(m.n-before) >= share*float64(last.n-before) {
				return m
			}
		}
		return last
	}
	from, to := reached(0.1), reached(0.9)
	l.t.Logf("%d resumes in %v; %.0f per second between a tenth and nine tenths", last.n-before, last.at.Sub(reached(1e-9).at).Round(10*time.Millisecond),
		float64(to.n-from.n)/to.at.Sub(from.at).Seconds())
}

// acks logs how long publishing takes meanwhile, and until a session has received what was published.
func acks(t *testing.T, namespace, url, when string, meanwhile func()) {
	t.Helper()
	probe := startLoad(t, namespace, url, func(o *generator.Options) {
		o.UserBase += 2_000_000
		o.Sessions, o.Rate, o.Durable = 1, 50, true
	})
	meanwhile()
	r := probe.end()
	t.Logf("%s: %d events acknowledged, p50 %v ms, p99 %v ms; received p50 %v ms, p99 %v ms", when, r.Events, r.AckP50, r.AckP99, r.P50, r.P99)
	probe.Close()
}

// TestPace has all sessions of a guild go to relays and back: it shows how long publishers wait meanwhile, and whether
// sessions move as fast as spec.rebalance.maxMovesPerSecond says.
func TestPace(t *testing.T) {
	namespace := makeNamespace(t)
	apply(t, namespace, "{apiVersion: guildhall.dev/v1, kind: GuildShard, metadata: {name: shard-b}}") // half of the front door
	url := durableGuild(t, namespace)
	r := relayed{t, namespace}
	perSecond := max(50, *crowd/15)
	r.patch(fmt.Sprintf(`{"rebalance":{"maxMovesPerSecond":%d}}`, perSecond))
	run := startLoad(t, namespace, url, func(o *generator.Options) {
		o.Sessions, o.Rate, o.Durable, o.ConnectTimeout = *crowd, 1, true, 5*time.Minute
	})
	calm := func() { run.during(10 * time.Second) }
	acks(t, namespace, url, "calm, on the shard", calm)
	acks(t, namespace, url, "on the way to relays", func() {
		r.scale(2)
		run.pace(func() {
			r.is(2)
			r.balanced()
		})
	})
	acks(t, namespace, url, "calm, on relays", calm)
	t.Logf("back, at %d per second:", perSecond)
	acks(t, namespace, url, "on the way back", func() {
		r.scale(0)
		run.pace(func() { r.is(0) })
	})
	if v := run.end(); v.Reidentified != 0 {
		t.Errorf("%d sessions identified anew", v.Reidentified)
	}
}

// TestRelays has a guild in use spread over relays, which come, go and die, as do their shard and the operator, and
// brings it back to its shard.
func TestRelays(t *testing.T) {
	namespace := makeNamespace(t)
	run := durableLoad(t, namespace, durableGuild(t, namespace))
	r := relayed{t, namespace}
	r.patch(`{"rebalance":{"maxMovesPerSecond":50,"minSkewSessions":1}}`)
	r.scale(2)
	r.is(2)
	for i := range *operatorKills {
		r.scale(3 - i%2)
		eventually(t, "a round of moves", func() bool { return r.status().Rebalance.ToMove > 0 })
		kubectl(t, "-n", "guildhall-system", "delete", "pod", "--all", "--wait=false", "--grace-period=0", "--force")
		r.is(3 - i%2)
	}
	relays := 3 - (*operatorKills+1)%2
	run.Disturb()
	r.killRelay()
	r.is(relays)
	run.Disturb()
	kill(t, namespace, "shard-a")
	r.scale(1)
	r.is(1)
	r.scale(0)
	r.is(0)
	run.endResumed()
}

// burst has four times as much published for ten seconds, and logs how long that takes, and all sessions to receive it. What
// publishes is a process of its own, which does not have to wait for its turn among the clients of this one.
func (l *load) burst(namespace, url string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), *patience)
	defer cancel()
	if err := cluster.Command(ctx, "go", "build", "-o", "build/load", "./hack/load").Run(); err != nil {
		l.t.Fatal(err)
	}
	began, before := time.Now(), l.Acknowledged()
	line, err := cluster.Command(ctx, "build/load", "run", "--url", url, "--keys-secret", namespace+"/guildhall-keys", "--durable",
		"--user-base", "903000000000000000", "--sessions", "1", "--connect-timeout", patience.String(), "--publishers", strconv.Itoa(*publishers),
		"--rate", fmt.Sprint(3**crowdRate), "--events", fmt.Sprint(int(30**crowdRate))).Text()
	if err != nil {
		l.t.Fatalf("publishing a burst: %v\n%s", err, line)
	}
	var burst generator.Report
	if err := json.Unmarshal([]byte(line), &burst); err != nil {
		l.t.Fatal(err)
	}
	events, last, published := l.Acknowledged()-before+burst.Events, l.Last(), time.Since(began)
	eventually(l.t, "all sessions to be up to date after a burst", func() bool { return l.Behind(last) == 0 })
	took := time.Since(began)
	l.t.Logf("a burst of %d events, published within %v (p50 %v ms, p99 %v ms), has reached all of %d sessions after %v: %.0f deliveries per second",
		events, published.Round(100*time.Millisecond), burst.AckP50, burst.AckP99, l.Live(), took.Round(100*time.Millisecond), float64(events*l.Live())/took.Seconds())
}

// TestCrowd has a guild grow until the operator spreads it over relays, kills one and rolls another image out while it is
// in use, and lets the guild shrink to where it began. The few who are there from the beginning to the end miss nothing,
// nor do the many.
func TestCrowd(t *testing.T) {
	const next = "guildhall.dev/guildhall:next"
	if err := cluster.Load(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	widenQueue(t)
	namespace := makeNamespace(t)
	apply(t, namespace, "{apiVersion: guildhall.dev/v1, kind: GuildShard, metadata: {name: shard-b}}") // half of the front door
	frontDoor := durableGuild(t, namespace)
	few := startLoad(t, namespace, frontDoor, func(o *generator.Options) { o.Sessions, o.Rate, o.Durable = 10, 1, true })
	r := relayed{t, namespace}
	url := r.direct(frontDoor)
	least := (*crowd + *perRelay - 1) / *perRelay
	r.patch(fmt.Sprintf(`{"relays":{"mode":"Auto","sessionsPerRelay":%d,"maxReplicas":%d,"stabilizationSeconds":{"down":10}},"rebalance":{"minSkewSessions":10}}`,
		*perRelay, least+2))
	o := observe(t, namespace)
	many := startLoad(t, namespace, url, func(o *generator.Options) {
		o.UserBase += 1_000_000
		o.Sessions, o.Publishers, o.Rate, o.Durable, o.ConnectTimeout = *crowd, *publishers, *crowdRate, true, 10*time.Minute
		o.ConnectRate = max(50, float64(*crowd)/30)
	})
	r.atLeast(least)
	o.balanced(r)
	many.burst(namespace, url)
	r.killRelay()
	r.atLeast(least)
	kubectl(t, "-n", namespace, "patch", "guildshard", "shard-a", "--type=merge", "-p", `{"spec":{"image":"`+next+`"}}`)
	eventually(t, "the roll-out to begin", func() bool { s := r.status(); return s.Relays.Updated < s.Relays.Replicas })
	eventually(t, "the roll-out to end", func() bool {
		s := r.status()
		return s.Mode == "Relayed" && s.Relays.Updated == s.Relays.Desired && s.Relays.Ready == s.Relays.Desired && s.Relays.Draining == 0
	})
	kubectl(t, "-n", namespace, "wait", "--for=condition=UpToDate", "guildshard/shard-a", "--timeout=2m")
	eventually(t, "the pods of the former image to be gone", func() bool {
		images := kubectl(t, "-n", namespace, "get", "pods", "-l", "guildhall.dev/shard!=shard-b", "-o", "jsonpath={.items[*].spec.containers[0].image}")
		return !slices.ContainsFunc(strings.Fields(images), func(image string) bool { return image != next })
	})
	o.balanced(r)
	v := many.end()
	if v.Reidentified != 0 {
		t.Errorf("of the many, %d sessions identified anew", v.Reidentified)
	}
	// To the relays, from one that died, from those that were replaced, and to even that out.
	if limit := uint64(6 * *crowd); v.Resumed > limit {
		t.Errorf("%d sessions have resumed %d times, expected at most %d", *crowd, v.Resumed, limit)
	}
	o.fine(many.Asked())
	many.Close()
	r.is(0)
	if v := few.end(); v.Reidentified != 0 {
		t.Errorf("of the few, %d sessions identified anew", v.Reidentified)
	}
}
