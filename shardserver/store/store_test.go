package store

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

const (
	guildA = snowflake.ID(100_000_000_000_000_001)
	guildB = snowflake.ID(100_000_000_000_000_002)
)

var (
	ownerA = Owner{Namespace: "team", Name: "a", UID: "uid-a"}
	ownerB = Owner{Namespace: "team", Name: "b", UID: "uid-b"}
	ample  = guildlog.Retention{Bytes: 1 << 30, Age: 1000 * time.Hour}
)

// clock is a clock that tests set.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.UnixMilli(1_700_000_000_000)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func options(fs vfs.FS) Options {
	return Options{Retention: ample, FS: fs, Now: newClock().Now, Logger: slog.New(slog.DiscardHandler)}
}

func mustOpen(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// open opens a store that is closed with the test.
func open(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s := mustOpen(t, dir, o)
	t.Cleanup(func() {
		if err := s.Close(); err != nil && s.Err() == nil {
			t.Error(err)
		}
	})
	return s
}

func birth(t testing.TB, s *Store, guild snowflake.ID, c guildlog.Commit) *Log {
	t.Helper()
	l, err := s.Birth(guild, ownerA, c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func commit(t testing.TB, l *Log, c guildlog.Commit) {
	t.Helper()
	if err := l.Commit(c); err != nil {
		t.Fatal(err)
	}
}

// record is a record whose body tells its number.
func record(seq uint64) guildlog.Record {
	return guildlog.Record{
		Seq: seq, Time: newClock().Now().UnixMilli(), Type: "MESSAGE_CREATE",
		Data: fmt.Appendf(nil, `{"content":"message %d"}`, seq),
	}
}

func records(first, last uint64) (list []guildlog.Record) {
	for seq := first; seq <= last; seq++ {
		list = append(list, record(seq))
	}
	return list
}

func readAll(t testing.TB, l *Log, seq uint64) (all []guildlog.Record) {
	t.Helper()
	for seq < l.Last() {
		list, err := l.Read(seq, 7)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, list...)
		seq = all[len(all)-1].End()
	}
	return all
}

func stateOf(t testing.TB, l *Log) map[string]string {
	t.Helper()
	rows := map[string]string{}
	if _, err := l.State(func(key, value []byte) error {
		rows[string(key)] = string(value)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return rows
}

func TestWhatWasWrittenIsThereAfterReopening(t *testing.T) {
	dir := t.TempDir()
	o := options(nil)
	s := mustOpen(t, dir, o)
	first := guildlog.Commit{
		Records: []guildlog.Record{
			{Seq: 2, Time: 5, Type: "GUILD_CREATE", Data: []byte(`{}`), Reserved: 3},
			{Seq: 9, Time: -1, Type: "", Data: []byte{}, Users: []snowflake.ID{1, 1 << 62}},
			{Seq: 10, Time: 6, Type: "X", Data: bytes.Repeat([]byte("x"), 3<<10), Users: []snowflake.ID{}},
		},
		Keys: []guildlog.Key{
			{Name: "key 1", Body: [32]byte{1, 2}, Numbers: []uint64{2, 9}, Answer: []byte("answer")},
			{Name: "key 2"},
		},
		State: []guildlog.Row{{Key: []byte("name"), Value: []byte("old")}, {Key: []byte("empty"), Value: []byte{}}, {Key: []byte("gone"), Value: []byte("x")}},
	}
	l := birth(t, s, guildA, first)
	commit(t, l, guildlog.Commit{State: []guildlog.Row{{Key: []byte("gone")}, {Key: []byte("name"), Value: []byte("new")}}})
	birth(t, s, guildB, guildlog.Commit{Records: records(2, 2)})
	if err := s.Assign(guildB, ownerB); err != nil {
		t.Fatal(err)
	}
	id := l.ID()
	check := func(l *Log) {
		t.Helper()
		if l.ID() != id || l.Epoch() != 1 || l.Last() != 10 || !l.Resumable(0) || !l.Resumable(10) || l.Resumable(11) {
			t.Errorf("log %s, epoch %d, ends at %d", l.ID(), l.Epoch(), l.Last())
		}
		if diff := cmp.Diff(first.Records, readAll(t, l, 0)); diff != "" {
			t.Error(diff)
		}
		for seq, want := range map[uint64]uint64{0: 2, 4: 2, 5: 9, 8: 9, 9: 10} {
			got, err := l.Read(seq, 1)
			if err != nil || len(got) != 1 || got[0].Seq != want {
				t.Errorf("reading behind %d: %v, %v; expected record %d", seq, got, err, want)
			}
		}
		for _, want := range first.Keys {
			got, found, err := l.Find(want.Name)
			if err != nil || !found {
				t.Errorf("key %q: %v, %v", want.Name, found, err)
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
		}
		if _, found, err := l.Find("key"); found || err != nil {
			t.Errorf("a key that never was: %v, %v", found, err)
		}
		if diff := cmp.Diff(map[string]string{"name": "new", "empty": ""}, stateOf(t, l)); diff != "" {
			t.Error(diff)
		}
		want := []Identity{{Owner: ownerA, Guild: guildA, Log: id, Epoch: 1}, {Owner: ownerB, Guild: guildB, Epoch: 1}}
		if diff := cmp.Diff(want, l.s.Inventory(), cmpopts.IgnoreFields(Identity{}, "Log")); diff != "" || l.s.Inventory()[0] != want[0] {
			t.Error(diff)
		}
	}
	check(l)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Read(0, 1); !errors.Is(err, ErrClosed) {
			t.Errorf("reading after closing: %v", err)
		}
		if err := l.Commit(guildlog.Commit{Records: records(11, 11)}); !errors.Is(err, ErrClosed) {
			t.Errorf("appending after closing: %v", err)
		}
		s = mustOpen(t, dir, o)
		var err error
		if l, err = s.Log(guildA, id); err != nil {
			t.Fatal(err)
		}
		if again, _ := s.Log(guildA, guildlog.ID{}); again != l {
			t.Error("a log was opened twice")
		}
		check(l)
		if err := s.db.Flush(); err != nil { // for the second time
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOnlyBirthMakesALog(t *testing.T) {
	s := open(t, "db", options(vfs.NewMem()))
	if _, err := s.Log(guildA, guildlog.ID{}); !errors.Is(err, ErrLogMissing) {
		t.Errorf("an empty disk: %v", err)
	}
	if _, err := s.Birth(guildA, ownerA, guildlog.Commit{}); err == nil {
		t.Error("a log was born without a record")
	}
	l := birth(t, s, guildA, guildlog.Commit{Records: records(2, 4), Keys: []guildlog.Key{{Name: "k"}}, State: []guildlog.Row{{Key: []byte("a"), Value: []byte("1")}}})
	if _, err := s.Log(guildA, guildlog.NewID(true)); !errors.Is(err, ErrLogMissing) {
		t.Errorf("another log than expected: %v", err)
	}
	if _, err := s.Birth(guildA, ownerA, guildlog.Commit{Records: records(2, 2)}); !errors.Is(err, ErrLogExists) {
		t.Errorf("a second birth: %v", err)
	}
	if _, err := s.Rebirth(guildA, ownerB, guildlog.ID{}, guildlog.Commit{Records: records(1, 1)}); err == nil || l.Commit(guildlog.Commit{Records: records(5, 5)}) != nil {
		t.Errorf("a rebirth with a number that cannot be ended the log: %v", err)
	}
	again, err := s.Rebirth(guildA, ownerB, guildlog.ID{}, guildlog.Commit{Records: records(2, 2), State: []guildlog.Row{{Key: []byte("b"), Value: []byte("2")}}})
	if err != nil {
		t.Fatal(err)
	}
	if again.ID() == l.ID() || again.Epoch() != 1 || again.Last() != 2 {
		t.Errorf("born again as %s at %d", again.ID(), again.Last())
	}
	if err := l.Commit(guildlog.Commit{Records: records(6, 6)}); !errors.Is(err, ErrLogMissing) {
		t.Errorf("the forgotten log takes records: %v", err)
	}
	if diff := cmp.Diff(records(2, 2), readAll(t, again, 0)); diff != "" {
		t.Error(diff)
	}
	if _, found, _ := again.Find("k"); found {
		t.Error("a key of the forgotten log is found")
	}
	if diff := cmp.Diff(map[string]string{"b": "2"}, stateOf(t, again)); diff != "" {
		t.Error(diff)
	}
}

func TestADeletedLogIsErased(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, options(nil))
	secret := record(2)
	secret.Data = []byte("the secret of guild A")
	l := birth(t, s, guildA, guildlog.Commit{
		Records: []guildlog.Record{secret}, Keys: []guildlog.Key{{Name: "k", Answer: secret.Data}},
		State: []guildlog.Row{{Key: []byte("row"), Value: secret.Data}},
	})
	other := birth(t, s, guildB, guildlog.Commit{Records: records(2, 2)})
	if err := s.db.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(guildA); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(guildA); !errors.Is(err, ErrLogMissing) {
		t.Errorf("deleting again: %v", err)
	}
	if _, err := l.Read(0, 1); !errors.Is(err, ErrLogMissing) {
		t.Errorf("reading the deleted log: %v", err)
	}
	if err := s.iterate(guildSpan(guildA), func(key, _ []byte) error { return fmt.Errorf("%q is left", key) }); err != nil {
		t.Error(err)
	}
	if len(s.Inventory()) != 1 || len(readAll(t, other, 0)) != 1 {
		t.Error("the other guild was touched")
	}
	// What Pebble does in the background.
	if err := s.db.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := s.db.Compact(t.Context(), []byte("a"), []byte("z"), false); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// Write-ahead logs are removed or written over, at the latest when they have been replayed.
	if err := mustOpen(t, dir, options(nil)).Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range glob(t, dir, "*") {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, secret.Data) {
			t.Errorf("%s still has the secret", name)
		}
	}
}

func glob(t testing.TB, dir, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestNumbersRise(t *testing.T) {
	l := birth(t, open(t, "db", options(vfs.NewMem())), guildA, guildlog.Commit{Records: records(2, 5)})
	for what, list := range map[string][]guildlog.Record{
		"the last one again":         records(5, 6),
		"one twice":                  {record(6), record(6)},
		"one that another reserved":  {{Seq: 6, Reserved: 2}, {Seq: 8}},
		"more reserved than is left": {{Seq: 6, Reserved: ^uint64(0)}},
	} {
		if err := l.Commit(guildlog.Commit{Records: list}); err == nil {
			t.Errorf("%s was taken", what)
		}
	}
	if l.Last() != 5 || len(readAll(t, l, 0)) != 4 {
		t.Errorf("the log ends at %d", l.Last())
	}
}

func TestKeysAreFoundForADay(t *testing.T) {
	c := newClock()
	fs := vfs.NewMem()
	o := options(fs)
	o.Now = c.Now
	s := mustOpen(t, "db", o)
	l := birth(t, s, guildA, guildlog.Commit{Records: records(2, 2)})
	found := func(name string) bool {
		_, found, err := l.Find(name)
		if err != nil {
			t.Error(err)
		}
		return found
	}
	// One each hour; from then on those of the last 24 hours are found, and no others.
	const day = 24
	name := func(hour int) string { return fmt.Sprint("key ", hour) }
	for hour := range 3 * day {
		commit(t, l, guildlog.Commit{Keys: []guildlog.Key{{Name: name(hour), Numbers: []uint64{uint64(hour)}}}})
		for earlier := range hour + 1 {
			if want := hour-earlier < day; found(name(earlier)) != want {
				t.Fatalf("after %d hours the key of %d hours is found: %v", hour, earlier, !want)
			}
		}
		c.Add(time.Hour)
	}
	kept := 0
	if err := s.iterate(span{l.key(tableKey), l.key(tableKey + 1)}, func(_, _ []byte) error { kept++; return nil }); err != nil {
		t.Error(err)
	}
	if kept > day+8 {
		t.Errorf("%d keys are on disk", kept)
	}
	// A clock that is set back, and a new process with it.
	c.Add(-50 * time.Hour)
	for range 2 {
		commit(t, l, guildlog.Commit{Keys: []guildlog.Key{{Name: "back", Numbers: []uint64{1}}}})
		if !found(name(3*day-1)) || !found("back") {
			t.Error("a key is not found with the clock set back")
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, "db", o)
		var err error
		if l, err = s.Log(guildA, l.ID()); err != nil {
			t.Fatal(err)
		}
	}
	// The newest answer counts.
	c.Add(50*time.Hour + day*time.Hour)
	if found(name(3*day - 1)) {
		t.Error("an old key is found")
	}
	commit(t, l, guildlog.Commit{Keys: []guildlog.Key{{Name: name(0), Numbers: []uint64{99}}}})
	if k, _, _ := l.Find(name(0)); len(k.Numbers) != 1 || k.Numbers[0] != 99 {
		t.Errorf("found %v", k)
	}
}

func TestReadIsBounded(t *testing.T) {
	l := birth(t, open(t, "db", options(vfs.NewMem())), guildA, guildlog.Commit{Records: records(2, 2)})
	for seq := uint64(3); seq < 20; seq++ {
		r := record(seq)
		r.Data = make([]byte, 300<<10)
		commit(t, l, guildlog.Commit{Records: []guildlog.Record{r}})
	}
	got, err := l.Read(2, 1000)
	if err != nil || len(got) != 4 {
		t.Errorf("%d records of 300 KiB at once, %v", len(got), err)
	}
	if n := len(readAll(t, l, 0)); n != 18 {
		t.Errorf("%d records in all", n)
	}
}

// TestManyGuildsShareSyncs shows group commit.
func TestManyGuildsShareSyncs(t *testing.T) {
	const guilds, each = 32, 20
	mem := vfs.NewMem()
	mem.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 1 << 40})
	s := open(t, "db", options(errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if slices.Contains(syncOps, op.Kind) && strings.HasSuffix(op.Path, ".log") {
			time.Sleep(2 * time.Millisecond) // as disks do
		}
		return nil
	}))))
	var logs [guilds]*Log
	for g := range logs {
		logs[g] = birth(t, s, guildA+snowflake.ID(g), guildlog.Commit{Records: records(2, 2)})
	}
	before, err := s.Stats()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, l := range logs {
		wg.Go(func() {
			for seq := uint64(3); seq < 3+each; seq++ {
				if err := l.Commit(guildlog.Commit{Records: records(seq, seq)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	st, err := s.Stats()
	if err != nil {
		t.Fatal(err)
	}
	commits, syncs := st.Commits-before.Commits, st.Syncs-before.Syncs
	t.Logf("%d commits, %d syncs of %.1f ms", commits, syncs, 1000*(st.SyncSeconds-before.SyncSeconds)/float64(syncs))
	if st.Commits != guilds*(each+1) || st.Records != guilds*(each+1) || syncs == 0 || syncs > commits/4 {
		t.Errorf("%d commits of %d records, %d syncs", st.Commits, st.Records, syncs)
	}
	if st.DiskUsed == 0 || st.DiskFree == 0 || st.Err != nil || st.Background != nil || len(st.SyncBuckets) == 0 {
		t.Errorf("%+v", st)
	}
}

func TestTheDirectoryIsLocked(t *testing.T) {
	dir := t.TempDir()
	if dir := os.Getenv("STORE_TEST_OPEN"); dir != "" { // the other process, see below
		_, err := Open(dir, options(nil))
		fmt.Println("locked:", errors.Is(err, ErrLocked))
		return
	}
	s := mustOpen(t, dir, options(nil))
	if _, err := Open(dir, options(nil)); !errors.Is(err, ErrLocked) {
		t.Errorf("opening it twice in one process: %v", err)
	}
	other := exec.Command(os.Args[0], "-test.run=^TestTheDirectoryIsLocked$", "-test.v")
	other.Env = append(os.Environ(), "STORE_TEST_OPEN="+dir)
	if out, err := other.CombinedOutput(); err != nil || !strings.Contains(string(out), "locked: true") {
		t.Errorf("opening it in another process: %v, %s", err, out)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir, options(nil))

	mem := vfs.NewMem()
	open(t, "db", options(mem))
	if _, err := Open("db", options(mem)); !errors.Is(err, ErrLocked) {
		t.Errorf("opening it twice in memory: %v", err)
	}
}

func TestANewerFormatIsRefused(t *testing.T) {
	fs := vfs.NewMem()
	s := mustOpen(t, "db", options(fs))
	if err := s.db.Set(formatKey, encodeFixed(uint32(formatVersion+1)), pebble.Sync); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open("db", options(fs)); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("opening: %v", err)
	}
}

func TestWhatIsKeptFree(t *testing.T) {
	for name, test := range map[string]struct {
		total, want uint64
	}{
		"of a large disk":                    {100 << 30, DefaultReserve},
		"of a small one":                     {64 << 20, 8 << 20},
		"where the file system does not say": {0, DefaultReserve},
	} {
		if got := keptFree(vfs.DiskUsage{TotalBytes: test.total}, DefaultReserve, reservePart); got != test.want {
			t.Errorf("%s: %d, expected %d", name, got, test.want)
		}
	}
}
