package generator

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"guildhall.dev/guildhall/hack/load/audit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// outcome is what a command printed and returned.
type outcome struct {
	status int
	stdout string
	stderr string
	report Report
}

func tokenFile(t *testing.T, token string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// runLoad runs "load run" and reads its report.
func runLoad(t *testing.T, ctx context.Context, args ...string) outcome { //nolint:revive // t comes first in tests
	t.Helper()
	var stdout, stderr bytes.Buffer
	status := Command(ctx, append([]string{"run"}, args...), &stdout, &stderr, false)
	o := outcome{status: status, stdout: stdout.String(), stderr: stderr.String()}
	o.report = lastLine(t, o.stdout)
	t.Logf("%d: %s%s", status, o.stdout, o.stderr)
	return o
}

func lastLine(t *testing.T, stdout string) (r Report) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(stdout, "\n"), "\n")
	d := json.NewDecoder(strings.NewReader(lines[len(lines)-1]))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		t.Fatalf("last line of %q: %v", stdout, err)
	}
	return r
}

// TestFaults proves that the audit sees a server that does something wrong once in a thousand
// deliveries, and finds nothing where nothing is wrong.
func TestFaults(t *testing.T) {
	for _, test := range []struct {
		fault fault
		count func(r Report) uint64
	}{
		{faultNone, nil},
		{faultDrop, func(r Report) uint64 { return r.Lost }},
		{faultDouble, func(r Report) uint64 { return r.Doubled }},
		{faultSwap, func(r Report) uint64 { return r.Reordered }},
		{faultCorrupt, func(r Report) uint64 { return r.Corrupted }},
		{faultNumber, func(r Report) uint64 { return r.Reordered + r.Doubled }},
	} {
		t.Run(string(test.fault), func(t *testing.T) {
			s := newServer(t, test.fault)
			args := []string{
				"--url", s.url(), "--token-file", tokenFile(t, "good"), "--sessions", "20", "--events", "1000",
				"--publishers", "4", "--spread",
			}
			if test.fault != faultNone {
				args = append(args, "--settle", "5s")
			}
			if test.fault == faultNone || test.fault == faultNumber {
				args = append(args, "--resumes", "20")
			}
			o := runLoad(t, t.Context(), args...)
			r := o.report
			if r.Sessions != 20 || r.Events != 1000 || r.Seconds <= 0 || r.P99 < r.P50 || r.P50 <= 0 {
				t.Errorf("report %+v", r)
			}
			if test.fault == faultNone {
				if o.status != exitClean || r.Audit != "clean" || r.Lost+r.Doubled+r.Reordered+r.Corrupted != 0 || r.Deliveries != 20000 || r.Resumed < 20 {
					t.Errorf("status %d, report %+v", o.status, r)
				}
				if len(r.Problems) > 0 {
					t.Errorf("problems %q", r.Problems)
				}
				return
			}
			if s.faults == 0 {
				t.Fatal("the server made no fault")
			}
			if o.status != exitFailed || r.Audit != "failed" || test.count(r) == 0 || len(r.Problems) == 0 {
				t.Errorf("status %d, report %+v", o.status, r)
			}
			if !strings.Contains(o.stderr, "problem: "+r.Problems[0]) {
				t.Errorf("stderr lacks the problems: %s", o.stderr)
			}
			// Each fault is counted, and counted once.
			want := Report{}
			switch n := uint64(s.faults); test.fault { //nolint:gosec // not negative
			case faultDrop:
				want.Lost = n
			case faultDouble:
				want.Doubled = n
			case faultSwap:
				want.Reordered = n
			case faultCorrupt:
				want.Corrupted = n
			default:
				return
			}
			got := Report{Lost: r.Lost, Doubled: r.Doubled, Reordered: r.Reordered, Corrupted: r.Corrupted}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("counts (-faults +report):\n%s", diff)
			}
		})
	}
}

// TestRough has a server that does all that the protocol allows: the audit stays clean.
func TestRough(t *testing.T) {
	s := newServer(t, faultNone)
	s.rough, s.quick = true, true
	o := runLoad(t, t.Context(), "--url", s.url(), "--token-file", tokenFile(t, "good"), "--sessions", "10", "--events", "1500",
		"--publishers", "3", "--batch", "5", "--rate", "2000", "--resumes", "10")
	r := o.report
	if o.status != exitClean || r.Audit != "clean" || r.Events != 1500 || r.Resumed <= 10 || r.Reidentified == 0 || r.Deliveries == 0 {
		t.Errorf("status %d, report %+v", o.status, r)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.beats == 0 {
		t.Error("no heartbeats")
	}
}

// TestCrashes has a server that crashes now and then, in the middle of a request: the audit is clean when
// nothing is forgotten, and sees each kind of thing that is.
func TestCrashes(t *testing.T) {
	for _, test := range []struct {
		fault fault
		args  []string
		found func(r Report) bool
	}{
		{faultNone, []string{"--durable"}, nil},
		{faultNone, []string{"--durable", "--again", "0.2", "--abandon", "1"}, nil},
		{faultSessions, nil, nil}, // as with a log in memory
		{faultSessions, []string{"--durable"}, func(r Report) bool { return r.Invalidated > 0 && r.Reidentified >= r.Invalidated }},
		{faultTail, []string{"--durable"}, func(r Report) bool { return r.Reordered > 0 && r.Lost > 0 }},
		{faultKeys, []string{"--durable"}, func(r Report) bool { return r.Doubled > 0 }},
		{faultRefused, []string{"--abandon", "1"}, func(r Report) bool { return r.Refuted > 0 && r.Reordered+r.Doubled+r.Lost == 0 }},
		{faultAnswer, []string{"--again", "1"}, func(r Report) bool { return r.Reordered > 0 }},
	} {
		t.Run(strings.Join(append([]string{string(test.fault)}, test.args...), " "), func(t *testing.T) {
			s := newServer(t, test.fault)
			if test.fault != faultRefused && test.fault != faultAnswer {
				s.crash = 200
			}
			o := runLoad(t, t.Context(), append([]string{
				"--url", s.url(), "--token-file", tokenFile(t, "good"), "--sessions", "10", "--events", "1000", "--publishers", "4", "--settle", "1s",
			}, test.args...)...)
			r := o.report
			if test.fault != faultNone && s.faults == 0 {
				t.Fatal("the server made no fault")
			}
			if test.found != nil {
				if o.status != exitFailed || r.Audit != AuditFailed || !test.found(r) || len(r.Problems) == 0 {
					t.Errorf("status %d, report %+v", o.status, r)
				}
				return
			}
			if o.status != exitClean || r.Audit != AuditClean || len(r.Problems) > 0 || r.Events != 1000 {
				t.Errorf("status %d, report %+v", o.status, r)
			}
			if test.fault == faultNone && (r.Reidentified > 0 || r.Resumed == 0 || r.ResumeP50 <= 0 || r.ResumeP99 < r.ResumeP50) {
				t.Errorf("sessions were not resumed: %+v", r)
			}
		})
	}
}

// TestSilence has a server that does not acknowledge a heartbeat: the client resumes.
func TestSilence(t *testing.T) {
	s := newServer(t, faultNone)
	s.quick, s.deaf = true, 1
	o := runLoad(t, t.Context(), "--url", s.url(), "--token-file", tokenFile(t, "good"), "--sessions", "1", "--events", "100", "--rate", "50")
	if r := o.report; o.status != exitClean || r.Resumed == 0 {
		t.Errorf("status %d, report %+v", o.status, r)
	}
}

// hook is a writer that tells of the first write.
type hook struct {
	mu    sync.Mutex
	b     bytes.Buffer
	write func()
}

func (h *hook) Write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.write != nil {
		h.write()
		h.write = nil
	}
	return h.b.Write(b)
}

func TestInterrupt(t *testing.T) {
	s := newServer(t, faultNone)
	ctx, cancel := context.WithCancel(t.Context())
	s.onEvent = func(n int) {
		if n > 20 {
			cancel()
		}
	}
	o := runLoad(t, ctx, "--url", s.url(), "--token-file", tokenFile(t, "good"), "--sessions", "3", "--events", "100000", "--rate", "500")
	if r := o.report; o.status != exitInterrupted || r.Audit != "interrupted" || r.Events < 10 || r.Lost+r.Doubled+r.Reordered+r.Corrupted != 0 {
		t.Errorf("status %d, report %+v", o.status, r)
	}
}

func TestHold(t *testing.T) {
	s := newServer(t, faultNone)
	ctx, cancel := context.WithCancel(t.Context())
	var held int
	stdout := &hook{write: func() {
		s.mu.Lock()
		held = len(s.conns)
		s.mu.Unlock()
		cancel()
	}}
	status := Command(ctx, []string{"run", "--url", s.url(), "--token-file", tokenFile(t, "good"), "--sessions", "3", "--events", "10", "--hold"}, stdout, &bytes.Buffer{}, true)
	if r := lastLine(t, stdout.b.String()); status != exitClean || r.Audit != "clean" || held != 3 {
		t.Errorf("status %d, %d held, report %+v", status, held, r)
	}
}

func TestTimeout(t *testing.T) {
	s := newServer(t, faultNone)
	o := runLoad(t, t.Context(), "--url", s.url(), "--token-file", tokenFile(t, "good"), "--sessions", "2", "--events", "100000", "--rate", "100", "--timeout", "1s")
	if r := o.report; o.status != exitFailed || r.Audit != "failed" || r.Error == "" || r.Lost != 0 {
		t.Errorf("status %d, report %+v", o.status, r)
	}
}

func TestErrors(t *testing.T) {
	s := newServer(t, faultNone)
	good, bad := tokenFile(t, "good"), tokenFile(t, "bad")
	gone := newServer(t, faultNone)
	gone.http.Close()
	t.Setenv("GUILDHALL_TOKEN", "")
	for _, test := range []struct {
		name string
		args []string
		want string
	}{
		{"no such flag", []string{"--frobnicate"}, "flags"},
		{"argument", []string{"x"}, "argument"},
		{"no URL", []string{"--token-file", good}, "--url"},
		{"wrong scheme", []string{"--url", "http://h/g/1/", "--token-file", good}, "--url"},
		{"no guild", []string{"--url", "ws://h/x/", "--token-file", good}, "--url"},
		{"no token", []string{"--url", s.url()}, "--token"},
		{"two sources", []string{"--url", s.url(), "--token", "x", "--token-file", good}, "--token"},
		{"no such file", []string{"--url", s.url(), "--token-file", good + "x"}, "no such file"},
		{"no keys", []string{"--url", s.url(), "--keys-dir", t.TempDir()}, "key set"},
		{"failing command", []string{"--url", s.url(), "--token-command", "exit 3"}, "status 3"},
		{"no sessions", []string{"--url", s.url(), "--token-file", good, "--sessions", "0"}, "--sessions"},
		{"more sessions than files", []string{"--url", s.url(), "--token-file", good, "--sessions", "999999999"}, "ulimit"},
		{"refused token", []string{"--url", s.url(), "--token-file", bad}, "4004"},
		{"publisher without the right", []string{"--url", s.url(), "--token-file", good, "--publish-token", "bad"}, "403"},
		{"not found", []string{"--url", s.url() + "x/", "--token-file", good}, "404"},
		{"nobody there", []string{"--url", gone.url(), "--token-file", good, "--connect-timeout", "300ms"}, "refused"},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := runLoad(t, t.Context(), test.args...)
			if o.status != exitUsage || o.report.Audit != "failed" || !strings.Contains(o.report.Error, test.want) {
				t.Errorf("status %d, report %+v, want %q", o.status, o.report, test.want)
			}
		})
	}
}

// TestReportLine holds on to the names in the report.
func TestReportLine(t *testing.T) {
	b, err := json.Marshal(Report{})
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(b, &fields); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"ack_p50_ms", "ack_p99_ms", "audit", "connect_seconds", "corrupted", "cpu_seconds", "deliveries", "doubled", "events", "invalidated", "lost", "p50_ms", "p99_ms",
		"refuted", "reidentified", "reordered", "resume_p50_ms", "resume_p99_ms", "resumed", "seconds", "sessions",
	}
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(fields))); diff != "" {
		t.Errorf("fields (-want +got):\n%s", diff)
	}
}

func TestTokenCommand(t *testing.T) {
	source, err := (&Tokens{Command: `echo "$LOAD_USER.$LOAD_NAME.$LOAD_PUBLISH"`}).source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got, err := source(t.Context(), 7, "joe", true)
	if err != nil || got != "7.joe.true" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestWatchAndPublish(t *testing.T) {
	s := newServer(t, faultNone)
	t.Setenv("GUILDHALL_TOKEN", "good")
	var sent outcome
	var wait sync.WaitGroup
	watched := &hook{write: func() { // READY is there; what follows is in the snapshot or after it
		wait.Go(func() {
			var stdout, stderr bytes.Buffer
			for range 2 { // the snapshot may have the first one
				sent.status = Command(t.Context(), []string{"publish", "--url", s.url(), "hello", "there"}, &stdout, &stderr, false)
			}
			sent.stdout, sent.stderr = stdout.String(), stderr.String()
		})
	}}
	var stderr bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	status := Command(ctx, []string{"watch", "--url", s.url(), "--count", "1", "--width", "60"}, watched, &stderr, false)
	wait.Wait()
	lines := strings.Split(watched.b.String(), "\n")
	if status != 0 || len(lines) != 4 || !strings.HasPrefix(lines[0], "s=1 READY {") || !strings.HasPrefix(lines[1], "s=") ||
		!strings.Contains(lines[2], ` MESSAGE_CREATE {"channel_id":"31","content":"hello there","id":"77"}`) {
		t.Errorf("watch: status %d, %q, %s", status, lines, &stderr)
	}
	if sent.status != 0 || !strings.Contains(sent.stdout, `"hello there"`) {
		t.Errorf("publish: %+v", sent)
	}
	for _, args := range [][]string{{}, {"x"}, {"publish", "--url", s.url()}, {"watch", "--url", s.url(), "--token", "bad"}} {
		if status := Command(t.Context(), args, &bytes.Buffer{}, &bytes.Buffer{}, false); status != exitUsage {
			t.Errorf("%q: status %d", args, status)
		}
	}
}

func TestContent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		run, size := rapid.Uint32().Draw(t, "run"), rapid.IntRange(0, 300).Draw(t, "size")
		e := audit.Event{Publisher: rapid.Uint32().Draw(t, "publisher"), Count: rapid.Uint32().Draw(t, "count")}
		now := time.Unix(0, rapid.Int64Range(1, 1<<62).Draw(t, "now"))
		text := content(run, e, now, size)
		if len(text) < size || len(text) > max(size, 90) {
			t.Fatalf("%d characters, not %d: %q", len(text), size, text)
		}
		body, err := json.Marshal(map[string]string{"a": "x", "content": text, "z": "y"})
		if err != nil {
			t.Fatal(err)
		}
		got, what := find(body)
		if want := (payload{run, e, now}); what != whole || got != want {
			t.Fatalf("%v %v in %s, want %v", got, what, body, want)
		}
		// Any change of a bit after the beginning shows.
		i := bytes.Index(body, []byte(magic)) + len(magic) + rapid.IntRange(0, len(text)-len(magic)-1).Draw(t, "at")
		body[i] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if _, what := find(body); what != damaged {
			t.Fatalf("%v in %s", what, body)
		}
	})
}

func TestHistogram(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h histogram
		values := rapid.SliceOfN(rapid.Int64Range(-5, 1<<40), 1, 50).Draw(t, "values")
		for i, v := range values {
			h.add(i, time.Duration(v))
		}
		slices.Sort(values)
		got := h.percentiles(0.5, 0.99, 1)
		for i, share := range []float64{0.5, 0.99, 1} {
			want := float64(max(values[max(int(share*float64(len(values))), 1)-1], 0))
			if d := float64(got[i]) - want; d > want/32+1 || d < -want/32-1 {
				t.Fatalf("share %v: got %d, want %v", share, got[i], want)
			}
		}
	})
	var h histogram
	if got := h.percentiles(0.5); got[0] != 0 {
		t.Errorf("empty: %v", got)
	}
	h.add(0, 1<<62)
}
