package e2e

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// durableGuild makes a guild on a shard whose logs are on disk.
func durableGuild(t *testing.T, namespace string) (url string) {
	t.Helper()
	apply(t, namespace, "{apiVersion: guildhall.dev/v1, kind: GuildShard, metadata: {name: shard-a}, spec: {storage: {size: 64Mi}}}")
	url = guildAt(t, namespace, "shard-a")
	if got := kubectl(t, "-n", namespace, "get", "guildshard", "shard-a", "-o", `jsonpath={.status.conditions[?(@.type=="Durable")].reason}`); got != "OnDisk" {
		t.Fatalf("Durable has reason %s", got)
	}
	return url
}

// kill kills a process and waits until another one is ready.
func kill(t *testing.T, namespace, shard string) {
	t.Helper()
	process := shardProcess(t, namespace, shard)
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitRestart(t, namespace, shard, process)
}

func awaitRestart(t *testing.T, namespace, shard string, before *os.Process) {
	t.Helper()
	eventually(t, "another process", func() bool {
		now := findShardProcess(namespace, shard)
		return now != nil && now.Pid != before.Pid
	})
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "pod/"+shard+"-0", "--timeout=2m")
}

// TestShardIsKilled kills a shard's container, and then its pod, again and again while the guild is in use: nothing
// that was acknowledged is lost, nothing comes twice, and no session starts over.
func TestShardIsKilled(t *testing.T) {
	namespace := makeNamespace(t)
	url := durableGuild(t, namespace)
	run := startLoad(t, namespace, url, "--sessions", "100", "--events", "1600", "--rate", "20", "--publishers", "8", "--durable", "--timeout", "5m")
	for range 3 {
		time.Sleep(2 * time.Second) // of use
		kill(t, namespace, "shard-a")
	}
	for range 2 {
		time.Sleep(2 * time.Second)
		before := shardProcess(t, namespace, "shard-a")
		kubectl(t, "-n", namespace, "delete", "pod", "shard-a-0", "--grace-period=0", "--force")
		awaitRestart(t, namespace, "shard-a", before)
	}
	if v := run.verdict(); v.Reidentified != 0 || v.Resumed < 100 {
		t.Errorf("%d sessions resumed and %d identified anew", v.Resumed, v.Reidentified)
	}
}

// TestRelays has a guild in use spread over relays, which come, go and die, and brings it back to its shard.
func TestRelays(t *testing.T) {
	namespace := makeNamespace(t)
	url := durableGuild(t, namespace)
	run := startLoad(t, namespace, url, "--sessions", "200", "--events", "2400", "--rate", "20", "--publishers", "4", "--durable", "--timeout", "6m")
	status := func(path string) string {
		t.Helper()
		return kubectl(t, "-n", namespace, "get", "guild", "lobby", "-o", "jsonpath={.status."+path+"}")
	}
	relays := func(n int) {
		t.Helper()
		kubectl(t, "-n", namespace, "patch", "guild", "lobby", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"relays":{"mode":"Manual","replicas":%d}}}`, n))
		mode := "Relayed"
		if n == 0 {
			mode = "Direct"
		}
		eventually(t, fmt.Sprintf("%d relays", n), func() bool {
			return status("mode") == mode && status("relays.replicas") == fmt.Sprint(n) && status("relays.ready") == fmt.Sprint(n)
		})
	}
	relays(2)
	relays(3)
	victim := kubectl(t, "-n", namespace, "get", "pods", "-l", "app.kubernetes.io/component=relay", "-o", "jsonpath={.items[0].metadata.name}")
	kubectl(t, "-n", namespace, "delete", "pod", victim, "--grace-period=0", "--force")
	relays(3)
	kill(t, namespace, "shard-a")
	relays(1)
	relays(0)
	if v := run.verdict(); v.Reidentified != 0 || v.Resumed < 200 {
		t.Errorf("%d sessions resumed and %d identified anew", v.Resumed, v.Reidentified)
	}
}
