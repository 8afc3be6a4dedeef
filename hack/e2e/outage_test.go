package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// loadRun is the load generator at work, in a process of its own.
type loadRun struct {
	t    *testing.T
	done chan struct{}
	out  bytes.Buffer
	err  error
}

type verdict struct {
	Audit                                                 string
	Sessions, Events, Lost, Doubled, Reordered, Corrupted int
	Resumed, Reidentified                                 int
	Error                                                 string
}

// startLoad audits sessions while events are published at a rate.
func startLoad(t *testing.T, namespace, url string, args ...string) *loadRun {
	t.Helper()
	load := filepath.Join(t.TempDir(), "load")
	ctx, cancel := context.WithCancel(context.Background())
	if err := cluster.Command(ctx, "go", "build", "-o", load, "./hack/load").Run(); err != nil {
		t.Fatal(err)
	}
	r := &loadRun{t: t, done: make(chan struct{})}
	c := cluster.Command(ctx, load, append([]string{
		"run", "--url", url, "--keys-secret", namespace + "/guildhall-keys", "--kubeconfig", cluster.Kubeconfig,
	}, args...)...)
	c.Stdout, c.Stderr = &r.out, os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.done)
		r.err = c.Wait()
	}()
	t.Cleanup(func() {
		cancel()
		<-r.done
	})
	return r
}

// verdict waits for the end of the run.
func (r *loadRun) verdict() (v verdict) {
	r.t.Helper()
	<-r.done
	var last string
	lines := bufio.NewScanner(&r.out)
	for lines.Scan() {
		last = lines.Text()
	}
	if err := json.Unmarshal([]byte(last), &v); err != nil {
		r.t.Fatalf("last line %q: %v", last, err)
	}
	if r.err != nil || v.Audit != "clean" {
		r.t.Fatalf("audit: %s", last)
	}
	r.t.Logf("audit: %s", last)
	return v
}

// undisturbed checks that no client lost its connection.
func (r *loadRun) undisturbed() {
	r.t.Helper()
	if v := r.verdict(); v.Resumed != 0 || v.Reidentified != 0 {
		r.t.Errorf("%d sessions resumed and %d identified anew, expected none", v.Resumed, v.Reidentified)
	}
}

// TestControlPlaneOutage takes the operator, and then the Kubernetes API for a minute, away from a
// guild in use: no client notices.
func TestControlPlaneOutage(t *testing.T) {
	namespace := makeNamespace(t)
	url := guildOn(t, namespace, "shard-a")
	ctx := context.Background()
	run := startLoad(t, namespace, url, "--sessions", "100", "--events", "1800", "--rate", "20", "--timeout", "5m")

	kubectl(t, "-n", "guildhall-system", "delete", "pod", "--all", "--wait=false", "--grace-period=0", "--force")
	if err := cluster.Tool(ctx, "stop", "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-time.After(time.Minute): // that long the API is away
	case <-run.done:
	}
	if err := cluster.Tool(ctx, "start", "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	run.undisturbed()
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
	startLoad(t, namespace, url, "--sessions", "20", "--events", "100").verdict()
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
