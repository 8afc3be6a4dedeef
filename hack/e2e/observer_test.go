package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// lookTime is how often an observer looks.
const lookTime = 500 * time.Millisecond

// observer watches where the sessions of the namespace's guild are, who is asked to leave, and how the pods fare.
type observer struct {
	t         *testing.T
	namespace string
	api       *kubernetes.Clientset

	mu       sync.Mutex
	uid      string           // of the guild
	shard    string           // that it is on
	rounds   map[int64]span   // when they were under way
	asked    map[string]int64 // how many sessions to leave, by endpoint and round
	relays   map[string]*seenRelay
	restarts map[string]int32 // by pod
	most     int              // relays that served at a time
	ready    time.Time        // when the last one became ready
	direct   int64            // sessions on the shard
}

// seenRelay is a relay's pod as of the last look.
type seenRelay struct {
	ready, draining bool
	sessions        int64
	// arrivals have come, before of them when it was not yet to go.
	arrivals, before float64
}

type span struct{ from, to time.Time }

// observe begins to watch.
func observe(t *testing.T, namespace string) *observer {
	t.Helper()
	o := &observer{
		t: t, namespace: namespace, api: api(t), rounds: map[int64]span{}, asked: map[string]int64{}, relays: map[string]*seenRelay{},
		restarts: map[string]int32{},
	}
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for _, look := range []func(context.Context) error{o.lookAtGuild, o.lookAtPods, o.lookAtShard} {
		group.Go(func() {
			tick := time.NewTicker(lookTime)
			defer tick.Stop()
			for {
				_ = look(ctx) // what is missed now the next look shows
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		group.Wait()
	})
	return o
}

// lookAtGuild takes in which round of moves is under way.
func (o *observer) lookAtGuild(ctx context.Context) error {
	raw, err := o.api.RESTClient().Get().AbsPath("/apis/guildhall.dev/v1/namespaces", o.namespace, "guilds/lobby").DoRaw(ctx)
	if err != nil {
		return err
	}
	var guild v1.Guild
	if err := json.Unmarshal(raw, &guild); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.uid, o.shard = string(guild.UID), guild.Status.Placement.ShardName
	if r := guild.Status.Rebalance; r != nil && r.StartedAt != nil {
		o.rounds[r.Round] = span{r.StartedAt.Time, time.Now()}
	}
	return nil
}

// lookAtPods takes in how they are. A relay's arrivals are asked for before its marks are: of those that come while it is on
// its way out none is missed, and a few from before may be counted.
func (o *observer) lookAtPods(ctx context.Context) error {
	arrivals := map[string]float64{}
	var mu sync.Mutex
	var group sync.WaitGroup
	o.mu.Lock()
	for name, relay := range o.relays {
		if !relay.ready {
			continue
		}
		group.Go(func() {
			if n, err := o.arrivals(ctx, name); err == nil {
				mu.Lock()
				defer mu.Unlock()
				arrivals[name] = n
			}
		})
	}
	o.mu.Unlock()
	group.Wait()
	pods, err := o.api.CoreV1().Pods(o.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	o.takePods(pods.Items, arrivals)
	return nil
}

// lookAtShard takes in where sessions are, and how many were asked to leave.
func (o *observer) lookAtShard(ctx context.Context) error {
	o.mu.Lock()
	shard := o.shard
	o.mu.Unlock()
	raw, err := o.admin(ctx, shard+"-0", report.Path)
	if err != nil {
		return err
	}
	var r report.Report
	if err := json.Unmarshal(raw, &r); err != nil {
		return err
	}
	o.takeReport(&r)
	return nil
}

// admin asks a pod's admin port.
func (o *observer) admin(ctx context.Context, pod, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return o.api.CoreV1().RESTClient().Get().Namespace(o.namespace).Resource("pods").Name(pod + ":9090").SubResource("proxy").Suffix(path).DoRaw(ctx)
}

// arrivals is how many connections have come to a pod.
func (o *observer) arrivals(ctx context.Context, pod string) (float64, error) {
	raw, err := o.admin(ctx, pod, "metrics")
	if err != nil {
		return 0, err
	}
	for lines := bufio.NewScanner(bytes.NewReader(raw)); lines.Scan(); {
		if value, found := strings.CutPrefix(lines.Text(), "guildhall_arrivals_total "); found {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, errors.New("no such metric")
}

func (o *observer) takePods(pods []corev1.Pod, arrivals map[string]float64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	was := map[*seenRelay]bool{} // ready
	for _, relay := range o.relays {
		was[relay], relay.ready = relay.ready, false
	}
	serve := 0
	for i := range pods {
		pod := &pods[i]
		for _, c := range pod.Status.ContainerStatuses {
			o.restarts[pod.Name] = max(o.restarts[pod.Name], c.RestartCount)
		}
		if pod.Labels["app.kubernetes.io/component"] != "relay" {
			continue
		}
		relay := o.relays[pod.Name]
		if relay == nil {
			relay = new(seenRelay)
			o.relays[pod.Name] = relay
		}
		_, marked := pod.Labels["guildhall.dev/draining"]
		relay.draining = marked || pod.DeletionTimestamp != nil
		if n, ok := arrivals[pod.Name]; ok {
			relay.arrivals = n
		}
		if !relay.draining {
			relay.before = relay.arrivals
		}
		relay.ready = slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
		if relay.ready && !was[relay] {
			o.ready = time.Now()
		}
		if relay.ready && !relay.draining {
			serve++
		}
	}
	o.most = max(o.most, serve)
}

func (o *observer) takeReport(r *report.Report) {
	o.mu.Lock()
	defer o.mu.Unlock()
	note := func(endpoint string, round, asked int64) {
		key := fmt.Sprint(endpoint, " ", round)
		o.asked[key] = max(o.asked[key], asked)
	}
	for _, g := range r.Guilds {
		if g.UID == o.uid {
			note("", g.Round, g.Asked)
			o.direct = g.Direct
		}
	}
	for _, relay := range o.relays {
		relay.sessions = 0
	}
	for _, relay := range r.Relays {
		if relay.GuildUID != o.uid {
			continue
		}
		note(relay.Name, relay.Round, relay.Asked)
		if seen := o.relays[relay.Name]; seen != nil && relay.Attached {
			seen.sessions = relay.Sessions
		}
	}
}

// spread is how many sessions the shard and its relays have, these in order, and by how many percent the last one is above
// the even share.
func (o *observer) spread() (direct int64, sessions []int64, skew float64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	sum := o.direct
	for _, relay := range o.relays {
		if relay.ready && !relay.draining {
			sessions = append(sessions, relay.sessions)
			sum += relay.sessions
		}
	}
	slices.Sort(sessions)
	if len(sessions) > 0 && sum > 0 {
		skew = 100 * (float64(slices.Max(sessions))*float64(len(sessions))/float64(sum) - 1)
	}
	return o.direct, sessions, skew
}

// balanced waits until the sessions lie evenly, and logs how they lie then or, if that is sooner, a minute after the last
// relay has become ready.
func (o *observer) balanced(r relayed) {
	o.t.Helper()
	logged := false
	show := func() {
		o.mu.Lock()
		since := time.Since(o.ready)
		o.mu.Unlock()
		direct, sessions, skew := o.spread()
		o.t.Logf("%v after the last relay was ready the shard has %d sessions, the relays %v, a skew of %.1f %%", since.Round(time.Second), direct, sessions, skew)
		logged = true
	}
	eventually(o.t, "an even spread", func() bool {
		if r.isBalanced() {
			return true
		}
		o.mu.Lock()
		late := time.Since(o.ready) > time.Minute
		o.mu.Unlock()
		if late && !logged {
			show()
		}
		return false
	})
	show()
}

// fine logs what has been seen, and fails the test if a pod had to be restarted, or a round has asked a session twice.
func (o *observer) fine(asked [][]time.Time) {
	o.t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	moved, astray := int64(0), 0.0
	for _, n := range o.asked {
		moved += n
	}
	for _, relay := range o.relays {
		if relay.draining {
			astray += relay.arrivals - relay.before
		}
	}
	twice := askedTwice(o.rounds, asked)
	o.t.Logf("%d relays at most; %d sessions were asked to leave in %d rounds, %d of them twice in one; at most %.0f have come to a relay that was to go",
		o.most, moved, len(o.rounds), twice, astray)
	probes := o.probes()
	o.t.Logf("probes that failed: %v", probes)
	for pod, n := range o.restarts {
		if n > 0 {
			o.t.Errorf("%s was restarted %d times", pod, n)
		}
	}
	if twice > 0 {
		o.t.Errorf("%d sessions were asked twice in one round", twice)
	}
}

// leaveTime is what sessions have that were asked to leave; then their connections are closed.
const leaveTime = 5 * time.Second

// askedTwice is how many sessions were asked to reconnect twice in the same round.
func askedTwice(rounds map[int64]span, asked [][]time.Time) (sessions int) {
	for _, times := range asked {
		for number, round := range rounds {
			end := round.to.Add(leaveTime)
			if next, ok := rounds[number+1]; ok && next.from.Before(end) {
				end = next.from
			}
			n := 0
			for _, at := range times {
				if !at.Before(round.from) && at.Before(end) {
					n++
				}
			}
			if n > 1 {
				sessions++
				break
			}
		}
	}
	return sessions
}

// probes counts the failures of probes that the namespace's events tell of, by probe and what it was told. While a server
// starts or ends, it says that it is not ready.
func (o *observer) probes() map[string]int32 {
	failed := map[string]int32{}
	events, err := o.api.CoreV1().Events(o.namespace).List(context.Background(), metav1.ListOptions{FieldSelector: "reason=Unhealthy"})
	if err != nil {
		o.t.Error(err)
		return nil
	}
	for i := range events.Items {
		e := &events.Items[i]
		probe, _, _ := strings.Cut(e.Message, " ")
		said := e.Message[strings.LastIndex(e.Message, ": ")+1:]
		failed[probe+":"+strings.TrimRight(said, " \n")] += max(e.Count, 1)
	}
	return failed
}
