package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"path"
	"strconv"
	"strings"
	"testing"
	"time"
)

// system runs one of the machine's tools and returns what it prints.
func system(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), *patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// partition drops everything between two pods until the function that it returns is called, or the test ends.
func partition(t *testing.T, a, b string) (heal func()) {
	t.Helper()
	const table = "ip guildhall-e2e"
	system(t, fmt.Sprintf(`
table %[1]s {
	chain forward {
		type filter hook forward priority filter - 1; policy accept;
		ip saddr %[2]s ip daddr %[3]s drop
		ip saddr %[3]s ip daddr %[2]s drop
	}
}
`, table, a, b), "nft", "-f", "-")
	healed := false
	heal = func() {
		if !healed {
			healed = true
			system(t, "delete table "+table, "nft", "-f", "-")
		}
	}
	t.Cleanup(heal)
	return heal
}

// slow bounds what a pod's process is sent, in bytes per second, until the function that it returns is called, or the
// test ends. What does not fit is dropped after a second in the queue.
func slow(t *testing.T, pid, rate int) (heal func()) {
	t.Helper()
	// "2: eth0@if17: ...": the other end of the pod's link is the node's 17th.
	_, index, ok := strings.Cut(system(t, "", "nsenter", "--net=/proc/"+strconv.Itoa(pid)+"/ns/net", "ip", "-o", "link", "show", "dev", "eth0"), "@if")
	index, _, _ = strings.Cut(index, ":")
	link := ""
	for line := range strings.Lines(system(t, "", "ip", "-o", "link")) {
		if rest, found := strings.CutPrefix(line, index+": "); found {
			link, _, _ = strings.Cut(rest, "@")
		}
	}
	if !ok || link == "" {
		t.Fatalf("no link of process %d", pid)
	}
	system(t, "", "tc", "qdisc", "add", "dev", link, "root", "tbf", "rate", strconv.Itoa(8*rate)+"bit", "burst", "8kb", "latency", "1s")
	healed := false
	heal = func() {
		if !healed {
			healed = true
			system(t, "", "tc", "qdisc", "del", "dev", link, "root")
		}
	}
	t.Cleanup(heal)
	return heal
}

// TestRelaysOnABadNetwork: a relay that is cut off from its shard, or can hardly be reached, keeps its sessions, and
// brings them up to date when it can. So do the relays while their shard is killed, or the Kubernetes API away. When
// all clients lose their connections at once, all of them resume.
func TestRelaysOnABadNetwork(t *testing.T) {
	namespace := makeNamespace(t)
	url := durableGuild(t, namespace)
	r := relayed{t, namespace}
	r.patch(`{"rebalance":{"minSkewSessions":1}}`)
	r.scale(2)
	r.is(2)
	// Clients do not come by way of the shard's pod.
	id := path.Base(url)
	direct := "ws://" + kubectl(t, "-n", namespace, "get", "service", "relay-"+id, "-o", "jsonpath={.spec.clusterIP}")
	r.patch(fmt.Sprintf(`{"gateway":{"publicURL":%q}}`, direct))
	eventually(t, "relays with the new address to be wanted", func() bool { return r.status().Relays.Updated < 2 })
	r.is(2)
	run := durableLoad(t, namespace, direct+"/g/"+id+"/")
	r.balanced()
	pods := "jsonpath={.items[0].metadata.name} {.items[0].status.podIP}"
	name, address, _ := strings.Cut(kubectl(t, "-n", namespace, "get", "pods", "-l", "app.kubernetes.io/component=relay", "-o", pods), " ")
	relay := findProcess("--namespace="+namespace, "--name="+name)
	if relay == nil {
		t.Fatalf("no process of relay %s", name)
	}
	// What happens closes no client's connection, and what was published meanwhile reaches all soon afterwards.
	unnoticed := func(what string, happens func()) {
		t.Helper()
		resumed := run.Resumed()
		happens()
		began := time.Now()
		last := run.Last()
		eventually(t, "all sessions to be up to date after "+what, func() bool { return run.Behind(last) == 0 })
		t.Logf("%s: all up to date %v later", what, time.Since(began).Round(time.Millisecond))
		if got := run.Resumed() - resumed; got != 0 {
			t.Errorf("%s: %d sessions had to resume", what, got)
		}
	}
	// The first one: the cluster's own parts take up to half a minute to find the API server again, and what is
	// started or deleted meanwhile has to wait for them.
	unnoticed("no API server", func() {
		if err := cluster.Tool(t.Context(), "stop", "kube-apiserver"); err != nil {
			t.Fatal(err)
		}
		run.during(20 * time.Second)
		if err := cluster.Tool(t.Context(), "start", "kube-apiserver"); err != nil {
			t.Fatal(err)
		}
	})
	unnoticed("a partition", func() {
		heal := partition(t, address, kubectl(t, "-n", namespace, "get", "pod", "shard-a-0", "-o", "jsonpath={.status.podIP}"))
		run.during(20 * time.Second) // the link is given up meanwhile
		heal()
	})
	unnoticed("a slow link", func() {
		heal := slow(t, relay.Pid, 4<<10)
		run.during(15 * time.Second)
		heal()
	})
	unnoticed("a killed shard", func() {
		kill(t, namespace, "shard-a")
		back, acknowledged := time.Now(), run.Acknowledged()
		eventually(t, "events to flow again", func() bool { return run.Acknowledged() > acknowledged })
		t.Logf("events flow %v after the pod's return", time.Since(back).Round(time.Millisecond))
	})
	resumed := run.Resumed()
	run.Disturb()
	for range *sessions {
		run.Cut()
	}
	eventually(t, "all to resume", func() bool { return run.Resumed() >= resumed+uint64(*sessions) }) //nolint:gosec // not negative
	run.endResumed()
}
