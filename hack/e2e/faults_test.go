package e2e

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"guildhall.dev/guildhall/hack/load/generator"
)

// How much is done to shards; "make torture-cluster" asks for more.
var (
	kills      = flag.Int("kills", 3, "how often a shard's process is killed")
	deletions  = flag.Int("deletions", 2, "how often a shard's pod is deleted")
	successors = flag.Int("successors", 2, "how often a shard's pod gets a successor while it still runs")
	sessions   = flag.Int("sessions", 100, "sessions of the guild meanwhile")
	publishers = flag.Int("publishers", 8, "its publishers")
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

// durableLoad uses such a guild.
func durableLoad(t *testing.T, namespace, url string) *load {
	t.Helper()
	return startLoad(t, namespace, url, func(o *generator.Options) {
		o.Sessions, o.Publishers, o.Rate, o.Durable = *sessions, *publishers, 20, true
	})
}

// endResumed ends the load, in which no session may have started over.
func (l *load) endResumed() {
	l.t.Helper()
	if r := l.end(); r.Reidentified != 0 || r.Resumed < uint64(*sessions) { //nolint:gosec // not negative
		l.t.Errorf("%d sessions resumed and %d identified anew", r.Resumed, r.Reidentified)
	}
}

// kill kills a shard's process and waits until another one is ready.
func kill(t *testing.T, namespace, shard string) {
	t.Helper()
	process := shardProcess(t, namespace, shard)
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitReady(t, namespace, shard, process)
}

// awaitReady waits until the shard is ready with another process than the one before, which has gone.
func awaitReady(t *testing.T, namespace, shard string, before *os.Process) {
	t.Helper()
	eventually(t, "the process to end", func() bool { return errors.Is(before.Signal(syscall.Signal(0)), os.ErrProcessDone) })
	eventually(t, "another process", func() bool { return findShardProcess(namespace, shard) != nil })
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "pod/"+shard+"-0", "--timeout=2m")
}

// TestShardIsKilled kills a shard's container, and then its pod, again and again while the guild is in use: nothing
// that was acknowledged is lost, nothing comes twice, and no session starts over.
func TestShardIsKilled(t *testing.T) {
	namespace := makeNamespace(t)
	run := durableLoad(t, namespace, durableGuild(t, namespace))
	for range *kills {
		run.during(time.Second + rand.N(time.Second))
		run.Disturb()
		kill(t, namespace, "shard-a")
	}
	for range *deletions {
		run.during(time.Second + rand.N(time.Second))
		before := shardProcess(t, namespace, "shard-a")
		run.Disturb()
		kubectl(t, "-n", namespace, "delete", "pod", "shard-a-0", "--grace-period=0", "--force")
		awaitReady(t, namespace, "shard-a", before)
	}
	run.endResumed()
}

// TestSuccessor takes a node's kubelet away, and has the shard's pod replaced by another one while its process
// still runs: every other time it goes on serving, the others it is stopped, and continued when there may be a
// successor. What it has acknowledged is in the log that the successor serves.
func TestSuccessor(t *testing.T) {
	namespace := makeNamespace(t)
	run := durableLoad(t, namespace, durableGuild(t, namespace))
	for i := range *successors {
		run.during(time.Second + rand.N(time.Second))
		before := shardProcess(t, namespace, "shard-a")
		uid := podUID(t, namespace, "shard-a-0")
		run.Disturb()
		stopped := i%2 == 0
		if stopped {
			if err := before.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
		}
		if err := cluster.Tool(t.Context(), "stop", "kubelet"); err != nil {
			t.Fatal(err)
		}
		kubectl(t, "-n", namespace, "delete", "pod", "shard-a-0", "--grace-period=0", "--force")
		eventually(t, "a successor", func() bool {
			now := podUID(t, namespace, "shard-a-0")
			return now != "" && now != uid
		})
		run.during(rand.N(time.Second))
		if err := cluster.Tool(t.Context(), "start", "kubelet"); err != nil {
			t.Fatal(err)
		}
		if stopped {
			run.during(rand.N(3 * time.Second))
			if err := before.Signal(syscall.SIGCONT); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
		}
		awaitReady(t, namespace, "shard-a", before)
	}
	run.endResumed()
}

// podUID is empty when there is no such pod.
func podUID(t *testing.T, namespace, name string) string {
	t.Helper()
	return kubectl(t, "-n", namespace, "get", "pod", name, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}")
}

// TestLibrariesThroughKills: bots of two libraries go on by themselves when a shard's process is killed. discordgo gets
// everything once. So does discord.js, unless it tries to connect before the cluster knows that the process has
// gone: where it is refused it starts over, and gets nothing twice.
func TestLibrariesThroughKills(t *testing.T) {
	namespace := makeNamespace(t)
	apply(t, namespace, "{apiVersion: guildhall.dev/v1, kind: GuildShard, metadata: {name: shard-b}}") // holds clients
	url := durableGuild(t, namespace)
	issue := tokens(t, namespace)
	js := startJSBot(t, url, issue("js", false))
	js.afterReady()
	golang := startGoBot(t, url, issue("go", false))
	run := durableLoad(t, namespace, url)
	for i := range *kills {
		run.during(time.Second + rand.N(time.Second))
		run.Disturb()
		began := time.Now()
		kill(t, namespace, "shard-a")
		back := time.Since(began)
		eventually(t, "discordgo to resume", func() bool { return golang.resumes() > i })
		backGo := time.Since(began)
		eventually(t, "discord.js to be back", func() bool { return len(js.seen("resumed"))+len(js.seen("identified"))-1 > i })
		t.Logf("after the kill: ready again %v, discordgo resumed within %v, discord.js is back within %v", back.Round(time.Millisecond),
			backGo.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	}
	run.endResumed()
	want := run.Acknowledged()
	contents := func(events []jsEvent) (list []string) {
		for _, e := range events {
			list = append(list, e.Content)
		}
		return list
	}
	eventually(t, fmt.Sprintf("%d messages", want), func() bool { return len(golang.messages()) >= want })
	inGo := golang.messages()
	if once := slices.Compact(slices.Sorted(slices.Values(inGo))); len(once) != want || len(inGo) != want {
		t.Errorf("discordgo received %d messages, %d different ones, expected %d", len(inGo), len(once), want)
	}
	inOrder := func() (n int) { // how many of those that discord.js received are what discordgo received, in its order
		rest := inGo
		for _, content := range contents(js.seen("message")) {
			at := slices.Index(rest, content)
			if at < 0 {
				break
			}
			rest = rest[at+1:]
			n++
		}
		return n
	}
	over := len(js.seen("identified")) - 1
	t.Logf("discord.js resumed %d times and started over %d times", len(js.seen("resumed")), over)
	if over == 0 {
		eventually(t, fmt.Sprintf("%d messages", want), func() bool { return len(js.seen("message")) >= want })
	}
	if got := len(js.seen("message")); inOrder() != got || over == 0 && got != want {
		t.Errorf("discord.js received %d messages of %d, of which the first %d are in order", got, want, inOrder())
	}
}
