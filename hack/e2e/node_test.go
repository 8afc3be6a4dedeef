package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"guildhall.dev/guildhall/hack/load/generator"
)

// TestNodeIsLost cuts the power of a node that has some of a guild's relays. They are replaced on the node that is
// left, although Kubernetes can end none of them, and their sessions go on where they were.
func TestNodeIsLost(t *testing.T) {
	const lost, left = "node-2", "node-1"
	namespace := makeNamespace(t)
	tool := func(command string) {
		t.Helper()
		if err := cluster.Tool(t.Context(), command, lost); err != nil {
			t.Fatal(err)
		}
	}
	tool("join")
	t.Cleanup(func() {
		_ = cluster.Tool(context.Background(), "lose", lost) // unless the test has
		forgetNode(t, namespace, lost)
	})
	url := durableGuild(t, namespace)
	r := relayed{t, namespace}
	r.patch(`{"rebalance":{"maxMovesPerSecond":50,"minSkewSessions":1}}`)
	r.scale(3)
	r.is(3)
	if n := readyRelays(t, namespace, lost); n == 0 || n == 3 {
		t.Fatalf("%d of 3 relays are on %s", n, lost)
	}
	run := startLoad(t, namespace, url, func(o *generator.Options) {
		o.Sessions, o.Publishers, o.Rate, o.Durable = *sessions, *publishers, 20, true
		o.Settle = *patience // a client takes up to two heartbeats, of 45 s, to miss its relay
	})
	r.balanced()

	moved := run.Resumed()
	run.Disturb()
	began := time.Now()
	tool("lose")
	eventually(t, "3 relays on "+left, func() bool { return readyRelays(t, namespace, left) == 3 })
	t.Logf("3 relays on %s %v after the loss of %s", left, time.Since(began).Round(time.Second), lost)
	// Those that were lost are Terminating and stay so, until somebody who knows removes the node.
	eventually(t, "a status that says so", func() bool {
		s := r.status()
		return s.Mode == "Relayed" && s.Relays.Desired == 3 && s.Relays.Ready == 3
	})
	resumed := run.end()
	if resumed.Reidentified != 0 {
		t.Errorf("%d sessions identified anew", resumed.Reidentified)
	}
	if resumed.Resumed <= moved {
		t.Error("no session was on a relay that was lost")
	}
	t.Logf("all sessions are back %v after the loss", time.Since(began).Round(time.Second))
	forgetNode(t, namespace, lost)
	r.is(3)
}

// readyRelays is how many of the namespace's relays are ready on a node, and not being deleted.
func readyRelays(t *testing.T, namespace, node string) int {
	t.Helper()
	pods := kubectl(t, "-n", namespace, "get", "pods", "-l", "app.kubernetes.io/component=relay", "--field-selector=spec.nodeName="+node,
		"-o", `jsonpath={range .items[*]}{.metadata.deletionTimestamp}{.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}`)
	n := 0
	for line := range strings.Lines(pods) {
		if strings.TrimSpace(line) == "True" {
			n++
		}
	}
	return n
}

// forgetNode removes a node that was lost from the API, with the pods that no kubelet will end.
func forgetNode(t *testing.T, namespace, node string) {
	t.Helper()
	kubectl(t, "delete", "node", node, "--ignore-not-found")
	kubectl(t, "-n", namespace, "delete", "pods", "--field-selector=spec.nodeName="+node, "--grace-period=0", "--force")
}
