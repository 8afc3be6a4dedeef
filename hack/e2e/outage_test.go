package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"guildhall.dev/guildhall/hack/load/generator"
)

// TestControlPlaneOutage takes the operator, and then the Kubernetes API for a minute, away from a
// guild in use: no client notices.
func TestControlPlaneOutage(t *testing.T) {
	namespace := makeNamespace(t)
	url := guildOn(t, namespace, "shard-a")
	ctx := context.Background()
	run := startLoad(t, namespace, url, func(o *generator.Options) { o.Rate = 20 })

	kubectl(t, "-n", "guildhall-system", "delete", "pod", "--all", "--wait=false", "--grace-period=0", "--force")
	if err := cluster.Tool(ctx, "stop", "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	run.during(time.Minute) // that long the API is away
	if err := cluster.Tool(ctx, "start", "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	if r := run.end(); r.Resumed != 0 || r.Reidentified != 0 {
		t.Errorf("%d sessions resumed and %d identified anew, expected none", r.Resumed, r.Reidentified)
	}
	if err := cluster.WaitForOperator(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the guild to be ready", func() bool {
		return kubectl(t, "-n", namespace, "get", "guild", "lobby", "-o", `jsonpath={.status.conditions[?(@.type=="LoadFresh")].status}`) == "True"
	})
}

// TestShardRestartWithoutOperator restarts a shard's pod while no operator runs: it serves its guilds again.
func TestShardRestartWithoutOperator(t *testing.T) {
	namespace := makeNamespace(t)
	url := guildOn(t, namespace, "shard-a")
	scale := func(replicas string) {
		t.Helper()
		kubectl(t, "-n", "guildhall-system", "scale", "deployment/guildhall-controller-manager", "--replicas="+replicas)
	}
	scale("0")
	defer func() {
		scale("1")
		if err := cluster.WaitForOperator(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	kubectl(t, "-n", "guildhall-system", "wait", "--for=delete", "pod", "--all", "--timeout=60s")
	kubectl(t, "-n", namespace, "delete", "pod", "shard-a-0")
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "pod/shard-a-0", "--timeout=2m")
	startLoad(t, namespace, url, func(o *generator.Options) { o.Events = 100 }).end()
}

// TestReasons shows what kubectl says of a guild that cannot be served.
func TestReasons(t *testing.T) {
	namespace := makeNamespace(t)
	apply(t, namespace, "{apiVersion: guildhall.dev/v1, kind: Guild, metadata: {name: lobby}}")
	reason := func(kind, name string) string {
		return kubectl(t, "-n", namespace, "get", kind, name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].reason}`)
	}
	eventually(t, "NoShard", func() bool { return reason("guild", "lobby") == "NoShard" })
	apply(t, namespace, "{apiVersion: guildhall.dev/v1, kind: GuildShard, metadata: {name: shard-a}, spec: {image: 'guildhall.dev/none:1', availability: Cordoned}}")
	eventually(t, "ShardsCordoned", func() bool { return reason("guild", "lobby") == "ShardsCordoned" })
	eventually(t, "ImageNotFound", func() bool { return reason("guildshard", "shard-a") == "ImageNotFound" })
	kubectl(t, "-n", namespace, "patch", "guildshard", "shard-a", "--type=merge", "-p", `{"spec":{"availability":"Active"}}`)
	eventually(t, "ShardNotReady", func() bool { return reason("guild", "lobby") == "ShardNotReady" })
	if out := kubectl(t, "-n", namespace, "describe", "guild", "lobby"); !strings.Contains(out, "ImagePull") {
		t.Errorf("kubectl describe does not tell that the image cannot be pulled:\n%s", out)
	}
	// A correct image is rolled out although the pod was never ready.
	kubectl(t, "-n", namespace, "patch", "guildshard", "shard-a", "--type=json", "-p", `[{"op":"remove","path":"/spec/image"}]`)
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "guild/lobby", "--timeout=2m")
}

// TestDeletion deletes things in ways that tend to hang.
func TestDeletion(t *testing.T) {
	namespace := makeNamespace(t)
	guildOn(t, namespace, "shard-a")
	apply(t, namespace, "{apiVersion: guildhall.dev/v1, kind: GuildShard, metadata: {name: shard-b}, spec: {storage: {size: 64Mi, whenDeleted: Delete}}}")
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "guildshard/shard-b", "--timeout=2m")
	kubectl(t, "-n", namespace, "delete", "guildshard", "shard-b", "--cascade=foreground", "--timeout=60s")
	began := time.Now()
	kubectl(t, "delete", "namespace", namespace, "--timeout=60s")
	t.Logf("namespace with everything in it gone after %v", time.Since(began).Round(time.Millisecond))
}
