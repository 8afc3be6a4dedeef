package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
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

// widenQueue has the machine's network hold what relays send thousands of sessions at once until the test ends. All of it
// passes one queue for each processor, of 1,000 packets unless somebody says otherwise, and what does not fit is lost: the
// clients, on the same processors, get it when it is sent again.
func widenQueue(t *testing.T) {
	t.Helper()
	const setting, wide = "/proc/sys/net/core/netdev_max_backlog", "30000"
	before, err := os.ReadFile(setting)
	if err == nil {
		err = os.WriteFile(setting, []byte(wide), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(setting, before, 0); err != nil {
			t.Error(err)
		}
	})
}

// guildBeside makes another guild, on a shard of its own, and returns its URL at that shard's Service.
func guildBeside(t *testing.T, namespace, shard string) (url string) {
	t.Helper()
	apply(t, namespace, `
apiVersion: guildhall.dev/v1
kind: Guild
metadata: {name: beside}
spec:
  access: {join: Open}
  placement: {shardName: `+shard+`}
  bootstrap: {channels: [{name: general, type: Text}]}
`)
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "guild/beside", "--timeout=2m")
	return fmt.Sprintf("ws://%s/g/%s/", kubectl(t, "-n", namespace, "get", "service", shard, "-o", "jsonpath={.spec.clusterIP}"),
		kubectl(t, "-n", namespace, "get", "guild", "beside", "-o", "jsonpath={.status.id}"))
}

// TestRelaysOnABadNetwork: a relay that is cut off from its shard, or can hardly be reached, keeps its sessions, and
// brings them up to date when it can. So do the relays while their shard is killed, or the Kubernetes API away. When
// all clients lose their connections at once, all of them resume.
func TestRelaysOnABadNetwork(t *testing.T) {
	namespace := makeNamespace(t)
	apply(t, namespace, "{apiVersion: guildhall.dev/v1, kind: GuildShard, metadata: {name: shard-b}}")
	url := durableGuild(t, namespace)
	other := guildBeside(t, namespace, "shard-b")
	r := relayed{t, namespace}
	url = r.direct(url)
	r.patch(`{"rebalance":{"mode":"Disabled"}}`) // who resumes has lost a connection
	r.scale(2)
	r.is(2)
	run := durableLoad(t, namespace, url)
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
	const calm = 5 * time.Second
	acks(t, namespace, other, "a guild on another shard, calm", func() { run.during(calm) })
	unnoticed("a killed shard", func() {
		acks(t, namespace, other, "a guild on another shard, meanwhile", func() {
			began := time.Now()
			kill(t, namespace, "shard-a")
			back, acknowledged := time.Now(), run.Acknowledged()
			eventually(t, "events to flow again", func() bool { return run.Acknowledged() > acknowledged })
			t.Logf("events flow %v after the pod's return", time.Since(back).Round(time.Millisecond))
			run.during(calm - time.Since(began))
		})
	})
	resumed := run.Resumed()
	run.Disturb()
	for range *sessions {
		run.Cut()
	}
	eventually(t, "all to resume", func() bool { return run.Resumed() >= resumed+uint64(*sessions) }) //nolint:gosec // not negative
	run.endResumed()
}
