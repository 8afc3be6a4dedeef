// Package e2e tests Guildhall as its users run it: on a Kubernetes cluster, deployed from an
// image, with the client libraries that people use.
package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"guildhall.dev/guildhall/hack/local"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

// patience bounds each wait of a test.
var patience = flag.Duration("patience", 2*time.Minute, "how long a test waits for something")

// cluster is what all tests run on.
var cluster *local.Cluster

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		fmt.Println("=====================================================================")
		fmt.Println("END-TO-END TESTS SKIPPED: they start a Kubernetes node on this machine,")
		fmt.Println("which needs Linux and root. Nothing of the deployed product was tested.")
		fmt.Println("=====================================================================")
		return 0
	}
	ctx := context.Background()
	cluster = &local.Cluster{Root: filepath.Join("..", ".."), Log: os.Stderr}
	err := cluster.Up(ctx)
	if err == nil {
		err = cluster.Deploy(ctx)
	}
	status := 1
	if err == nil {
		status = m.Run()
	}
	if down := cluster.Down(ctx); err == nil {
		err = down
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "end-to-end tests:", err)
		return 1
	}
	return status
}

// kubectl runs kubectl and returns what it prints.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), *patience)
	defer cancel()
	out, err := cluster.Kubectl(ctx, args...).Text()
	if err != nil {
		t.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

// api is a client of the cluster.
func api(t *testing.T) *kubernetes.Clientset {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", cluster.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// apply applies a manifest.
func apply(t *testing.T, namespace, manifest string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), *patience)
	defer cancel()
	c := cluster.Kubectl(ctx, "-n", namespace, "apply", "-f", "-")
	c.Stdin = strings.NewReader(manifest)
	if err := c.Run(); err != nil {
		t.Fatalf("applying: %v\n%s", err, manifest)
	}
}

// makeNamespace makes a namespace for the test, enforcing the restricted Pod Security Standard.
func makeNamespace(t *testing.T) string {
	t.Helper()
	name := "e2e-" + strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(strings.TrimPrefix(t.Name(), "Test")))
	if len(name) > 40 {
		name = strings.TrimRight(name[:40], "-")
	}
	kubectl(t, "create", "namespace", name)
	kubectl(t, "label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("state:\n%s", kubectl(t, "-n", name, "get", "guilds,guildshards,pods,services,events", "-o", "wide"))
			t.Logf("operator:\n%s", kubectl(t, "-n", "guildhall-system", "logs", "deployment/guildhall-controller-manager", "--tail=30"))
		}
		kubectl(t, "delete", "namespace", name, "--ignore-not-found", "--timeout=60s")
	})
	return name
}

// guildOn applies shards and an open guild and returns the guild's URL behind the front door.
func guildOn(t *testing.T, namespace string, shards ...string) (url string) {
	t.Helper()
	var manifest strings.Builder
	for _, s := range shards {
		fmt.Fprintf(&manifest, "apiVersion: guildhall.dev/v1\nkind: GuildShard\nmetadata: {name: %s}\n---\n", s)
	}
	apply(t, namespace, manifest.String())
	return guildAt(t, namespace, shards[0])
}

// guildAt waits for the namespace's shards, applies an open guild on one of them and returns the guild's URL behind the front door.
func guildAt(t *testing.T, namespace, shard string) (url string) {
	t.Helper()
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "guildshards", "--all", "--timeout=2m")
	applied := time.Now()
	apply(t, namespace, `
apiVersion: guildhall.dev/v1
kind: Guild
metadata: {name: lobby}
spec:
  displayName: Lobby
  access: {join: Open}
  placement: {shardName: `+shard+`}
  bootstrap: {channels: [{name: general, type: Text}, {name: Lounge, type: Voice}]}
`)
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "guild/lobby", "--timeout=2m")
	t.Logf("guild ready %v after apply", time.Since(applied).Round(time.Millisecond))
	base, err := cluster.OpenFrontDoor(context.Background(), namespace)
	if err != nil {
		t.Fatal(err)
	}
	if url, err = cluster.GuildURL(context.Background(), namespace, "lobby", base); err != nil {
		t.Fatal(err)
	}
	return url
}

// tokens issues tokens with the namespace's keys.
func tokens(t *testing.T, namespace string) func(name string, publish bool) string {
	t.Helper()
	var secret struct{ Data map[string][]byte }
	if err := json.Unmarshal([]byte(kubectl(t, "-n", namespace, "get", "secret", "guildhall-keys", "-o", "json")), &secret); err != nil {
		t.Fatal(err)
	}
	keys, err := token.ParseKeys(string(secret.Data[token.CurrentKey]), string(secret.Data[token.PreviousKey]))
	if err != nil {
		t.Fatal(err)
	}
	var ids snowflake.Source
	return func(name string, publish bool) string {
		issued, err := keys.Issue(token.Claims{User: ids.Next(), Name: name, Bot: true, Publish: publish})
		if err != nil {
			t.Fatal(err)
		}
		return issued
	}
}

// eventually waits until the condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(*patience)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v: %s", *patience, what)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// restBase is a guild's REST address without version.
func restBase(url string) string { return "http" + strings.TrimPrefix(url, "ws") + "api" }

// shardProcess is the process of a shard server on this machine's own node.
func shardProcess(t *testing.T, namespace, shard string) *os.Process {
	t.Helper()
	process := findShardProcess(namespace, shard)
	if process == nil {
		t.Fatalf("no process of shard %s in namespace %s", shard, namespace)
	}
	return process
}

// findShardProcess returns nil when there is none.
func findShardProcess(namespace, shard string) *os.Process {
	return findProcess("--namespace="+namespace, "--shard-name="+shard)
}

// findProcess finds the process of a shard server or relay by its arguments; nil when there is none.
func findProcess(wanted ...string) *os.Process {
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range entries {
		cmdline, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(cmdline), "\x00")
		missing := func(arg string) bool { return !slices.Contains(args, arg) }
		if strings.HasSuffix(args[0], "/shardserver") && !slices.ContainsFunc(wanted, missing) {
			if pid, err := strconv.Atoi(strings.Split(path, "/")[2]); err == nil {
				process, _ := os.FindProcess(pid) // on Unix it always finds one
				return process
			}
		}
	}
	return nil
}
