package main

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

// shardserver is the binary that the tests mistreat.
var shardserver string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "torture-test-*")
	if err != nil {
		panic(err)
	}
	shardserver = filepath.Join(dir, "shardserver")
	goleak.VerifyTestMain(m, goleak.Cleanup(func(status int) {
		os.RemoveAll(dir)
		os.Exit(status)
	}))
}

// build makes the binary once.
func build(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts shard servers")
	}
	if _, err := os.Stat(shardserver); err == nil {
		return
	}
	if out, err := exec.Command("go", "build", "-o", shardserver, "../../shardserver").CombinedOutput(); err != nil {
		t.Fatalf("building the shard server: %v\n%s", err, out)
	}
}

// run runs the command on a small scale and reads its report.
func run(t *testing.T, args ...string) (int, report) {
	t.Helper()
	build(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	dir := filepath.Join(t.TempDir(), "run")
	status := command(ctx, append([]string{
		"--shardserver", shardserver, "--dir", dir, "--sessions", "100", "--publishers", "8", "--rate", "200", "--within", "400ms",
	}, args...), &stdout, &stderr, false)
	lines := strings.Split(strings.TrimSuffix(stdout.String(), "\n"), "\n")
	var r report
	d := json.NewDecoder(strings.NewReader(lines[len(lines)-1]))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		t.Fatalf("last line of %q: %v\n%s", &stdout, err, &stderr)
	}
	t.Logf("%d: %s", status, &stdout)
	if t.Failed() || status != exitClean {
		t.Logf("%s", &stderr)
	}
	if _, err := os.Stat(dir); (err == nil) != (status != exitClean) {
		t.Errorf("status %d, the directory: %v", status, err)
	}
	return status, r
}

// clean checks the report of a run in which all was well.
func clean(t *testing.T, status int, r report) {
	t.Helper()
	if status != exitClean || r.Audit != "clean" || r.Sessions != 100 || r.Reidentified != 0 || r.Deliveries != uint64(100*r.Events) {
		t.Errorf("status %d, report %+v", status, r)
	}
}

// TestKills kills a server under load: nothing that was acknowledged is lost, nothing comes twice.
func TestKills(t *testing.T) {
	status, r := run(t, "--kills", "10", "--terms", "1")
	clean(t, status, r)
	if r.Kills != 10 || r.EarlyKills != 1 || r.Terms != 1 || r.Events == 0 || r.Resumed < 100 || r.ResumeP50 <= 0 || r.RestartP50 <= 0 || r.RestartMax < r.RestartP50 {
		t.Errorf("report %+v", r)
	}
}

func TestStops(t *testing.T) {
	status, r := run(t, "--stops", "2", "--stop-time", "1s")
	clean(t, status, r)
	if r.Stops != 2 {
		t.Errorf("report %+v", r)
	}
}

// TestControls has servers that lose what they acknowledged: the audit sees it.
func TestControls(t *testing.T) {
	for _, control := range []string{controlMemory, controlRollback} {
		t.Run(control, func(t *testing.T) {
			status, r := run(t, "--kills", "2", "--control", control)
			if status != exitFailed || r.Audit != "failed" || r.Invalidated == 0 || r.Reordered == 0 || len(r.Problems) == 0 {
				t.Errorf("status %d, report %+v", status, r)
			}
		})
	}
}

// TestDisk takes the disk away.
func TestDisk(t *testing.T) {
	if syscall.Geteuid() != 0 {
		t.Skip("mounts a tmpfs, which needs root")
	}
	status, r := run(t, "--full", "1", "--read-only", "1", "--seed", "2")
	clean(t, status, r)
	if r.Full != 1 || r.ReadOnly != 1 || r.Statuses[507] == 0 {
		t.Errorf("report %+v", r)
	}
}

// TestDamages has the server refuse what is damaged, or serve all of the log.
func TestDamages(t *testing.T) {
	status, r := run(t, "--kills", "2", "--damages", "12")
	clean(t, status, r)
	sum := 0
	for fate, n := range r.Damaged {
		sum += n
		if fate == fateHole || fate == fateUnclear {
			t.Errorf("%d damaged copies: %s", n, fate)
		}
	}
	if r.Damages != 12 || sum != 12 {
		t.Errorf("report %+v", r)
	}
}

// TestInterrupt ends a run before its end.
func TestInterrupt(t *testing.T) {
	build(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	var stdout, stderr bytes.Buffer
	status := command(ctx, []string{"--shardserver", shardserver, "--dir", filepath.Join(t.TempDir(), "run"), "--sessions", "20", "--kills", "100000"}, &stdout, &stderr, false)
	if status != exitInterrupted || !strings.Contains(stdout.String(), `"audit":"interrupted"`) {
		t.Errorf("status %d: %s%s", status, &stdout, &stderr)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{},
		{"--frobnicate"},
		{"--shardserver", "x", "y"},
		{"--shardserver", "x", "--kills", "-1"},
		{"--shardserver", "x", "--control", "z"},
		{"--shardserver", "x", "--within", "1ms"},
		{"--shardserver", "x", "--control", "rollback"},
	} {
		if status := command(t.Context(), args, &bytes.Buffer{}, &bytes.Buffer{}, false); status != exitUsage {
			t.Errorf("%q: status %d", args, status)
		}
	}
	var stdout bytes.Buffer
	status := command(t.Context(), []string{"--shardserver", "/no/such/file", "--kills", "1", "--dir", t.TempDir()}, &stdout, &bytes.Buffer{}, false)
	if status != exitFailed || !strings.Contains(stdout.String(), "no such file") {
		t.Errorf("status %d: %s", status, &stdout)
	}
}

// TestPlan: everything that is asked for is done, and the same seed does it in the same order.
func TestPlan(t *testing.T) {
	o := options{kills: 25, terms: 2, stops: 3, full: 4, readOnly: 1}
	plan := o.plan(rand.New(rand.NewPCG(1, 0)))
	got := map[deed]int{}
	for _, d := range plan {
		got[d]++
	}
	if diff := cmp.Diff(map[deed]int{kill: 23, killEarly: 2, term: 2, stop: 3, full: 4, readOnly: 1}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !slices.Equal(plan, o.plan(rand.New(rand.NewPCG(1, 0)))) || slices.IsSorted(plan) {
		t.Errorf("plan %v", plan)
	}
}

// TestReportLine holds on to the names in the report.
func TestReportLine(t *testing.T) {
	b, err := json.Marshal(report{})
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(b, &fields); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kills", "audit", "lost", "doubled", "reordered", "invalidated", "resume_p50_ms", "resume_p99_ms", "restart_p50_ms", "restart_max_ms"} {
		if _, ok := fields[name]; !ok {
			t.Errorf("no %s among %v", name, slices.Sorted(maps.Keys(fields)))
		}
	}
}
