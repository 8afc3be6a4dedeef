package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/google/go-cmp/cmp"

	"guildhall.dev/guildhall/shardserver/guildlog"
)

// faults is a file system on which some operations fail while it is on.
type faults struct {
	on   atomic.Bool
	err  error
	file string // what the names of its files contain
	ops  []errorfs.OpKind
}

func (f *faults) wrap(fs vfs.FS) vfs.FS {
	return errorfs.Wrap(fs, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if !f.on.Load() || !strings.Contains(op.Path, f.file) {
			return nil
		}
		if slices.Contains(f.ops, op.Kind) {
			return f.err
		}
		return nil
	}))
}

var (
	syncOps  = []errorfs.OpKind{errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo}
	writeOps = []errorfs.OpKind{errorfs.OpFileWrite, errorfs.OpFileWriteAt}
)

func TestAfterAFailureNothingIsAcknowledged(t *testing.T) {
	for name, f := range map[string]*faults{
		"a sync of the log fails":          {err: syscall.EIO, file: ".log", ops: syncOps},
		"a write to the log fails":         {err: syscall.EIO, file: ".log", ops: writeOps},
		"a write to the log finds no room": {err: syscall.ENOSPC, file: ".log", ops: writeOps},
		"the manifest cannot be written":   {err: syscall.EIO, file: "MANIFEST", ops: writeOps},
	} {
		t.Run(name, func(t *testing.T) {
			mem := vfs.NewCrashableMem()
			s := open(t, "db", options(f.wrap(mem)))
			a := birth(t, s, guildA, guildlog.Commit{Records: records(2, 9)})
			b := birth(t, s, guildB, guildlog.Commit{Records: records(2, 9)})
			f.on.Store(true)
			if f.file == "MANIFEST" { // written in the background
				flushed, err := s.db.AsyncFlush()
				if err != nil {
					t.Fatal(err)
				}
				select {
				case <-flushed:
				case <-s.Failed():
				}
				<-s.Failed()
			}
			if err := a.Commit(guildlog.Commit{Records: records(10, 10)}); !errors.Is(err, guildlog.ErrFailed) || !errors.Is(err, f.err) || errors.Is(err, guildlog.ErrFull) {
				t.Errorf("appending: %v", err)
			}
			f.on.Store(false)
			select {
			case <-s.Failed():
			default:
				t.Error("nobody was told")
			}
			for what, err := range map[string]error{
				"appending again":      a.Commit(guildlog.Commit{Records: records(10, 10)}),
				"appending to another": b.Commit(guildlog.Commit{Records: records(10, 10)}),
				"assigning":            s.Assign(guildA, ownerB),
				"deleting":             s.Delete(guildB),
				"asking for room":      s.Room(),
				"closing":              s.Close(),
			} {
				if !errors.Is(err, guildlog.ErrFailed) || !errors.Is(err, f.err) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if a.Last() != 9 || len(readAll(t, a, 0)) != 8 {
				t.Error("what was not acknowledged can be read")
			}
			if st, err := s.Stats(); err != nil || !errors.Is(st.Err, guildlog.ErrFailed) {
				t.Errorf("stats: %v, %v", st.Err, err)
			}
			// The next process finds what was acknowledged, and at most once what was not.
			for percent := range 3 {
				cfg := vfs.CrashCloneCfg{UnsyncedDataPercent: 50 * percent, RNG: rand.New(rand.NewPCG(1, uint64(percent)))}
				s := open(t, "db", options(mem.CrashClone(cfg)))
				l, err := s.Log(guildA, a.ID())
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(records(2, l.Last()), readAll(t, l, 0)); diff != "" || l.Last() != 9 && l.Last() != 10 {
					t.Errorf("the log ends at %d: %s", l.Last(), diff)
				}
				commit(t, l, guildlog.Commit{Records: records(11, 11)})
			}
		})
	}
}

func TestAFullDiskTakesNothingAndIsRead(t *testing.T) {
	mem := vfs.NewMem()
	c := newClock()
	o := options(mem)
	o.Reserve, o.Now = 1000, c.Now
	o.Retention.Bytes = 1600 // so that a block takes 100
	s := open(t, "db", o)
	l := birth(t, s, guildA, guildlog.Commit{Records: records(2, 9)})
	free := func(bytes uint64) { mem.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: bytes, TotalBytes: 1 << 20}) }

	free(999)
	if err := s.Room(); !errors.Is(err, guildlog.ErrFull) {
		t.Errorf("room with less than the reserve: %v", err)
	}
	if _, err := s.Birth(guildB, ownerB, guildlog.Commit{Records: records(2, 2)}); !errors.Is(err, guildlog.ErrFull) {
		t.Errorf("a birth with less than the reserve: %v", err)
	}
	commit(t, l, guildlog.Commit{Records: records(10, 10)}) // asked before the reserve was touched
	free(499)
	if err := l.Commit(guildlog.Commit{Records: records(11, 11)}); !errors.Is(err, guildlog.ErrFull) || errors.Is(err, guildlog.ErrFailed) {
		t.Errorf("appending with less than half of the reserve: %v", err)
	}
	if st, _ := s.Stats(); !st.Full || st.DiskFree != 499 {
		t.Errorf("stats: %+v", st)
	}
	if diff := cmp.Diff(records(2, 10), readAll(t, l, 0)); diff != "" {
		t.Error(diff)
	}
	l.Retain(guildlog.Retention{})
	if l.Resumable(0) {
		t.Error("a full disk keeps what retention drops")
	}
	free(1000)
	if err := s.Room(); err != nil {
		t.Error(err)
	}
	commit(t, l, guildlog.Commit{Records: records(11, 11)})
}

func TestADirectoryThatCannotBeWrittenIsNotOpened(t *testing.T) {
	mem := vfs.NewMem()
	s := mustOpen(t, "db", options(mem))
	birth(t, s, guildA, guildlog.Commit{Records: records(2, 9)})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{"read-only": syscall.EROFS, "forbidden": syscall.EACCES, "full": syscall.ENOSPC} {
		t.Run(name, func(t *testing.T) {
			fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
				if op.Kind.ReadOrWrite() == errorfs.OpIsWrite && op.Kind != errorfs.OpMkdirAll && op.Kind != errorfs.OpLock && op.Kind != errorfs.OpFileClose {
					return &os.PathError{Op: "write", Path: op.Path, Err: err}
				}
				return nil
			}))
			_, got := Open("db", options(fs))
			if !errors.Is(got, err) || errors.Is(got, ErrCorrupt) || errors.Is(got, ErrLocked) || errors.Is(got, guildlog.ErrFull) != (name == "full") {
				t.Errorf("opening: %v", got)
			}
		})
	}
	l, err := open(t, "db", options(mem)).Log(guildA, guildlog.ID{})
	if err != nil || len(readAll(t, l, 0)) != 8 {
		t.Errorf("it harmed the log: %v", err)
	}
}

// newest is the last of the files that match.
func newest(t *testing.T, dir, pattern string) string {
	t.Helper()
	names := glob(t, dir, pattern)
	if len(names) == 0 {
		t.Fatalf("no %s", pattern)
	}
	return names[len(names)-1]
}

func edit(t *testing.T, name string, change func(data []byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, change(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

// flip changes a byte of the last place that has text.
func flip(t *testing.T, text string) func([]byte) []byte {
	return func(data []byte) []byte {
		i := bytes.LastIndex(data, []byte(text))
		if i < 0 {
			t.Fatalf("no %q", text)
		}
		data[i] ^= 1
		return data
	}
}

// TestDamagedFiles damages a copy of a directory as a crash leaves it: two thirds of the records are in
// a table, the others in the write-ahead log.
func TestDamagedFiles(t *testing.T) {
	const last = 300
	dir := t.TempDir()
	s := open(t, dir, options(nil))
	l := birth(t, s, guildA, guildlog.Commit{Records: records(2, 2)})
	var before []byte // what SYNCED was before the last commit
	for seq := uint64(3); seq <= last; seq++ {
		switch seq {
		case last * 2 / 3:
			if err := s.db.Flush(); err != nil {
				t.Fatal(err)
			}
		case last:
			var err error
			if before, err = os.ReadFile(filepath.Join(dir, syncedName)); err != nil {
				t.Fatal(err)
			}
		}
		commit(t, l, guildlog.Commit{Records: records(seq, seq)})
	}
	// of applies a change to the newest file of a pattern.
	of := func(pattern string, change func([]byte) []byte) func(*testing.T, string) string {
		return func(t *testing.T, dir string) string {
			name := newest(t, dir, pattern)
			edit(t, name, change)
			return name
		}
	}
	gone := func(pattern string) func(*testing.T, string) string {
		return func(t *testing.T, dir string) string {
			name := newest(t, dir, pattern)
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
			return name
		}
	}
	crashed := os.DirFS(dir)
	for name, test := range map[string]struct {
		damage func(t *testing.T, dir string) (file string)
		// found: when the directory is opened, or when all of the log is read; neither: not at all.
		atOpen, atRead bool
		last           uint64
	}{
		"nothing": {
			damage: func(*testing.T, string) string { return "" },
			last:   last,
		},
		"a torn end of the write-ahead log": {
			damage: of("*.log", func(data []byte) []byte { return append(data, data[:50]...) }),
			last:   last,
		},
		"a torn end of the write-ahead log, and the power was cut before more was known to be synced": {
			damage: func(t *testing.T, dir string) string {
				edit(t, filepath.Join(dir, syncedName), func([]byte) []byte { return before })
				return of("*.log", func(data []byte) []byte { return data[:bytes.LastIndex(data, []byte("message 300"))] })(t, dir)
			},
			last: last - 1,
		},
		"a write-ahead log that is cut within what was synced": {
			damage: of("*.log", func(data []byte) []byte { return data[:bytes.LastIndex(data, []byte("message 300"))] }),
			atOpen: true,
		},
		"a write-ahead log that is cut between records": {
			damage: of("*.log", func(data []byte) []byte {
				end := bytes.LastIndex(data, []byte("message 250"))
				for size := end; ; end-- { // where a record begins
					if c, n := readChunk(data[end:], logHeader, uint64(binary.LittleEndian.Uint32(data[7:]))); n > size-end && c.kind == chunkFull {
						return data[:end]
					}
				}
			}),
			atOpen: true,
		},
		"an empty write-ahead log": {damage: of("*.log", func([]byte) []byte { return nil }), atOpen: true},
		"no write-ahead log":       {damage: gone("*.log"), atOpen: true},
		"a changed byte in the last record of the write-ahead log": {
			damage: of("*.log", flip(t, "message 300")),
			atOpen: true,
		},
		"a changed byte in the last record of the manifest": {
			damage: of("MANIFEST-*", func(data []byte) []byte { data[len(data)-1] ^= 1; return data }),
			atOpen: true,
		},
		"a manifest without its last byte": {
			damage: of("MANIFEST-*", func(data []byte) []byte { return data[:len(data)-1] }),
			atOpen: true,
		},
		"a manifest without its last record": {
			damage: of("MANIFEST-*", func(data []byte) []byte {
				end := 0
				for {
					_, n := readChunk(data[end:], manifestHeader, 0)
					if end+n == len(data) {
						return data[:end]
					}
					end += n
				}
			}),
			atOpen: true,
		},
		"an empty manifest": {damage: of("MANIFEST-*", func([]byte) []byte { return nil }), atOpen: true},
		"a torn end of the manifest": {
			damage: of("MANIFEST-*", func(data []byte) []byte { return append(data, data[:20]...) }),
			last:   last,
		},
		"an older manifest": {
			damage: func(t *testing.T, dir string) string {
				marker := newest(t, dir, "marker.manifest.*")
				if err := os.Rename(marker, filepath.Join(dir, "marker.manifest.000099.MANIFEST-000000")); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(newest(t, dir, "MANIFEST-*"), filepath.Join(dir, "MANIFEST-000000")); err != nil {
					t.Fatal(err)
				}
				return "MANIFEST-000000"
			},
			atOpen: true,
		},
		"no word of what was synced": {damage: gone(syncedName), atOpen: true},
		"no readable word of what was synced": {
			damage: of(syncedName, func(data []byte) []byte { return make([]byte, len(data)) }),
			atOpen: true,
		},
		"a last word of what was synced that cannot be read": {
			damage: of(syncedName, func(data []byte) []byte { data[len(data)/2+10] ^= 1; return data }),
			last:   last,
		},
		"a first word of what was synced that cannot be read": {
			damage: of(syncedName, func(data []byte) []byte { data[10] ^= 1; return data }),
			last:   last,
		},
		"a changed byte in the write-ahead log": {
			damage: func(t *testing.T, dir string) string {
				name := newest(t, dir, "*.log")
				edit(t, name, flip(t, "message 250"))
				return name
			},
			atOpen: true,
		},
		"a changed byte in the first batch of the write-ahead log": {
			damage: func(t *testing.T, dir string) string {
				name := newest(t, dir, "*.log")
				edit(t, name, flip(t, "message 200"))
				return name
			},
			atOpen: true,
		},
		"zeros in the write-ahead log": {
			damage: func(t *testing.T, dir string) string {
				name := newest(t, dir, "*.log")
				edit(t, name, func(data []byte) []byte {
					clear(data[2048:4096])
					return data
				})
				return name
			},
			atOpen: true,
		},
		"a table that is cut short": {
			damage: func(t *testing.T, dir string) string {
				name := newest(t, dir, "*.sst")
				edit(t, name, func(data []byte) []byte { return data[:len(data)-1] })
				return name
			},
			atOpen: true,
		},
		"a table that is gone": {
			damage: func(t *testing.T, dir string) string {
				name := newest(t, dir, "*.sst")
				if err := os.Remove(name); err != nil {
					t.Fatal(err)
				}
				return name
			},
			atOpen: true,
		},
		"a changed byte in a table": {
			damage: func(t *testing.T, dir string) string {
				name := newest(t, dir, "*.sst")
				edit(t, name, func(data []byte) []byte { data[100] ^= 1; return data })
				return name
			},
			atRead: true,
		},
		"a changed byte in the manifest": {
			damage: func(t *testing.T, dir string) string {
				name := newest(t, dir, "MANIFEST-*")
				edit(t, name, func(data []byte) []byte { data[20] ^= 1; return data })
				return name
			},
			atOpen: true,
		},
		"no manifest": {
			damage: func(t *testing.T, dir string) string {
				name := newest(t, dir, "MANIFEST-*")
				if err := os.Remove(name); err != nil {
					t.Fatal(err)
				}
				return name
			},
			atOpen: true,
		},
		"no word of which manifest it is": {
			damage: func(t *testing.T, dir string) string {
				if err := os.Remove(newest(t, dir, "marker.manifest.*")); err != nil {
					t.Fatal(err)
				}
				return "marker.manifest"
			},
			atOpen: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "copy")
			if err := os.CopyFS(dir, crashed); err != nil {
				t.Fatal(err)
			}
			file := filepath.Base(test.damage(t, dir))
			for range 2 { // it stays so
				s, err := Open(dir, options(nil))
				if test.atOpen {
					if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), strings.TrimSuffix(file, ".sst")) || !strings.Contains(err.Error(), dir) {
						t.Fatalf("opening, with %s damaged: %v", file, err)
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				var all []guildlog.Record
				l, err := s.Log(guildA, l.ID())
				if err == nil {
					for seq := uint64(0); seq < l.Last() && err == nil; {
						var list []guildlog.Record
						if list, err = l.Read(seq, 50); err == nil {
							all = append(all, list...)
							seq = all[len(all)-1].End()
						}
					}
				}
				if test.atRead {
					if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), strings.TrimSuffix(file, ".sst")) {
						t.Errorf("reading, with %s damaged: %v", file, err)
					}
				} else if diff := cmp.Diff(records(2, test.last), all); diff != "" || err != nil {
					t.Errorf("reading: %v, %s", err, diff)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestAnyDamageIsFound: whatever happens to a file of a store, it is not opened, or cannot be read, or
// everything is there that was acknowledged.
func TestAnyDamageIsFound(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, options(nil))
	l := birth(t, s, guildA, guildlog.Commit{Records: records(2, 2)})
	value := func(seq uint64) []byte { return fmt.Appendf(nil, "as of %d", seq) }
	const last, rows = 400, 7
	for seq := uint64(3); seq <= last; seq++ {
		commit(t, l, guildlog.Commit{
			Records: records(seq, seq),
			Keys:    []guildlog.Key{{Name: fmt.Sprint("key ", seq), Numbers: []uint64{seq}}},
			State:   []guildlog.Row{{Key: []byte{'r', byte(seq % rows)}, Value: value(seq)}},
		})
		if seq%130 == 0 {
			if err := s.db.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	crashed := os.DirFS(dir)
	whole := func(t *testing.T, s *Store) error {
		l, err := s.Log(guildA, l.ID())
		if err != nil {
			return err
		}
		seq := uint64(1)
		for seq < l.Last() {
			list, err := l.Read(seq, 50)
			if err != nil {
				return err
			}
			for _, r := range list {
				if diff := cmp.Diff(records(seq+1, seq+1)[0], r); diff != "" {
					t.Fatal(diff)
				}
				seq = r.End()
			}
		}
		if seq != last {
			t.Errorf("the log ends at %d, expected %d", seq, last)
		}
		for seq := uint64(3); seq <= last; seq++ {
			k, found, err := l.Find(fmt.Sprint("key ", seq))
			if err != nil {
				return err
			}
			if !found || k.Numbers[0] != seq {
				t.Errorf("key %d is %v", seq, k)
			}
		}
		found := 0
		_, err = l.State(func(key, got []byte) error {
			found++
			for seq := uint64(last); ; seq-- {
				if byte(seq%rows) == key[1] {
					if !bytes.Equal(got, value(seq)) {
						t.Errorf("row %d is %s, expected %s", key[1], got, value(seq))
					}
					return nil
				}
			}
		})
		if err == nil && found != rows {
			t.Errorf("%d rows, expected %d", found, rows)
		}
		return err
	}
	fates := map[string]int{}
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		dir := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(dir, crashed); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool { return e.Name() == "LOCK" })
		name := filepath.Join(dir, entries[random.IntN(len(entries))].Name())
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		damage := "removed"
		if at := random.IntN(len(data) + 1); at == len(data) || random.IntN(5) == 0 {
			err = os.Remove(name)
		} else {
			switch random.IntN(3) {
			case 0:
				damage, data = fmt.Sprintf("cut off at %d of", at), data[:at]
			case 1:
				damage = fmt.Sprintf("changed byte %d of", at)
				data[at] ^= byte(1 + random.IntN(255))
			default:
				damage = fmt.Sprintf("overwritten from %d of", at)
				for i := at; i < min(at+4096, len(data)); i++ {
					data[i] = byte(random.Uint32())
				}
			}
			err = os.WriteFile(name, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Run(fmt.Sprintf("%s %s (%d bytes)", damage, filepath.Base(name), len(data)), func(t *testing.T) {
			s, err := Open(dir, options(nil))
			if err != nil {
				fates["not opened"]++
				return
			}
			if err = whole(t, s); err != nil {
				fates["not read"]++
			} else {
				fates["harmless"]++
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	if fates["not opened"] < 50 || fates["harmless"] == 0 {
		t.Errorf("fates: %v", fates)
	}
}

func TestALogThatDisagreesIsNotServed(t *testing.T) {
	for name, test := range map[string]struct {
		damage func(b *pebble.Batch, l *Log)
		atRead bool
	}{
		"the newest record is missing": {damage: func(b *pebble.Batch, l *Log) { unset(b, l.numbered(tableRecord, 9)) }},
		"the oldest record is missing": {damage: func(b *pebble.Batch, l *Log) { unset(b, l.numbered(tableRecord, 2)) }},
		"all records are missing": {damage: func(b *pebble.Batch, l *Log) {
			remove(b, l.between(tableRecord, 0, 100))
		}},
		"a record in the middle is missing": {damage: func(b *pebble.Batch, l *Log) { unset(b, l.numbered(tableRecord, 5)) }, atRead: true},
		"a record is cut short":             {damage: func(b *pebble.Batch, l *Log) { set(b, l.numbered(tableRecord, 5), []byte{1, 0}) }, atRead: true},
		"a record too many": {damage: func(b *pebble.Batch, l *Log) {
			r := record(10)
			set(b, l.numbered(tableRecord, 10), guildlog.EncodeRecord(&r, 9))
		}},
		"the head is missing":   {damage: func(b *pebble.Batch, l *Log) { unset(b, l.key(tableHead)) }},
		"the head is cut short": {damage: func(b *pebble.Batch, l *Log) { set(b, l.key(tableHead), []byte("short")) }},
		"the head is of another log": {damage: func(b *pebble.Batch, l *Log) {
			h := l.head
			h.Log = guildlog.NewID(true)
			set(b, l.key(tableHead), encodeFixed(&h))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			mem := vfs.NewMem()
			s := mustOpen(t, "db", options(mem))
			l := birth(t, s, guildA, guildlog.Commit{Records: records(2, 9)})
			birth(t, s, guildB, guildlog.Commit{Records: records(2, 9)})
			b := s.newBatch()
			test.damage(b, l)
			if err := s.apply(b, pebble.Sync); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, "db", options(mem))
			l, err := s.Log(guildA, guildlog.ID{})
			if test.atRead && err == nil {
				_, err = l.Read(0, 100)
			}
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), guildA.String()) {
				t.Errorf("opening and reading: %v", err)
			}
			if l, err := s.Log(guildB, guildlog.ID{}); err != nil || len(readAll(t, l, 0)) != 8 {
				t.Errorf("the other guild suffers: %v", err)
			}
		})
	}
}

// TestOlderProgramsComeAndGo has a program write to the directory that knows nothing of the file SYNCED: before
// there is one, and between two that do.
func TestOlderProgramsComeAndGo(t *testing.T) {
	mem := vfs.NewCrashableMem()
	s := mustOpen(t, "db", options(mem))
	l := birth(t, s, guildA, guildlog.Commit{Records: records(2, 9)})
	// older is that program. It leaves everything in the write-ahead log, or in tables.
	older := func(flush bool, change func(b *pebble.Batch)) {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		db, err := pebble.Open("db", &pebble.Options{FS: mem, FormatMajorVersion: pebble.FormatValueSeparation, Logger: (*logger)(s)})
		if err != nil {
			t.Fatal(err)
		}
		b := db.NewBatch()
		change(b)
		if err := b.Commit(pebble.Sync); err != nil {
			t.Fatal(err)
		}
		if flush {
			if err := db.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	again := func() {
		t.Helper()
		s = mustOpen(t, "db", options(mem))
		var err error
		if l, err = s.Log(guildA, guildlog.ID{}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(records(2, l.Last()), readAll(t, l, 0)); diff != "" {
			t.Fatal(diff)
		}
	}
	older(false, func(b *pebble.Batch) { unset(b, syncedKey) })
	if err := mem.Remove("db/" + syncedName); err != nil {
		t.Fatal(err)
	}
	again()
	if _, err := mem.Stat("db/" + syncedName); err != nil {
		t.Errorf("a directory without the file does not get it: %v", err)
	}
	for i := range 6 {
		last := l.Last()
		commit(t, l, guildlog.Commit{Records: records(last+1, last+1)})
		if i%3 == 0 {
			if err := s.db.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		older(i%2 == 0, func(b *pebble.Batch) { set(b, []byte("x"), nil) })
		again()
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := mem.Remove("db/" + syncedName); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := Open("db", options(mem)); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), syncedName) {
			t.Errorf("opening a directory that had the file: %v", err)
		}
	}
}

// TestBackgroundWorkRestsAtACorruptTable: it is not tried again without a pause, what is whole can be read and
// written, and when so much was written that writes have to wait for it, the store fails.
func TestBackgroundWorkRestsAtACorruptTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := vfs.NewMem()
		errs := &countErrors{}
		o := options(mem)
		o.Logger = slog.New(errs)
		s := mustOpen(t, "db", o)
		l := birth(t, s, guildA, guildlog.Commit{Records: records(2, 9)})
		flush := func(s *Store) {
			t.Helper()
			if err := s.db.Flush(); err != nil {
				t.Error(err)
			}
		}
		flush(s)
		commit(t, l, guildlog.Commit{Records: records(10, 100)})
		flush(s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		repair := flipInMem(t, mem, 100)

		s = mustOpen(t, "db", o)
		var err error
		if l, err = s.Log(guildA, guildlog.ID{}); err == nil {
			_, err = l.Read(0, 100)
		}
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("reading what is corrupt: %v", err)
		}
		b := birth(t, s, guildB, guildlog.Commit{Records: records(2, 2)})
		var wg sync.WaitGroup
		begun, last := time.Now(), uint64(2)
		for ; s.Err() == nil && last < 1000; last++ {
			if err := b.Commit(guildlog.Commit{Records: records(last+1, last+1)}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(records(2, last+1), readAll(t, b, 0)); diff != "" {
				t.Fatal(diff)
			}
			flushed := make(chan struct{})
			wg.Go(func() {
				defer close(flushed)
				flush(s)
			})
			select {
			case <-flushed:
			case <-s.Failed():
			}
		}
		if err := s.Err(); !errors.Is(err, ErrCorrupt) || !errors.Is(err, guildlog.ErrFailed) {
			t.Errorf("it fails with %v", err)
		}
		took := time.Since(begun)
		if n := errs.n.Load(); took < stallTime || n < 2 || n > 4*int64(2+took/rest) {
			t.Errorf("%d errors in %v", n, took)
		}
		repair()
		wg.Wait() // for what waits for the next try
		if err := errors.Join(s.closeDB(), s.synced.close(), s.lock.Close()); err != nil {
			t.Error(err)
		}
		s = open(t, "db", o)
		if l, err = s.Log(guildA, guildlog.ID{}); err != nil || len(readAll(t, l, 0)) != 99 {
			t.Errorf("the repaired log: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * rest) // its timers
	})
}

// TestStatisticsRestAtACorruptTable: what gathers them is held up, what compacts is not, which holds Pebble's lock.
func TestStatisticsRestAtACorruptTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newBackground()
		took := func(err error) time.Duration {
			begun := time.Now()
			w.erred(err)
			return time.Since(begun)
		}
		corrupt, other := fmt.Errorf("one: %w", pebble.ErrCorruption), fmt.Errorf("another: %w", pebble.ErrCorruption)
		w.compacted(corrupt)
		if a, b, c := took(corrupt), took(other), took(errors.New("not corrupt")); a != 0 || b != rest || c != 0 {
			t.Errorf("a compaction waits %v, statistics %v, other work %v", a, b, c)
		}
		close(w.stop)
		if d := took(other); d != 0 {
			t.Errorf("as the store closes, statistics wait %v", d)
		}
	})
}

// flipInMem changes a byte of the newest table, also for those who have it open, until repair.
func flipInMem(t *testing.T, fs vfs.FS, at int64) (repair func()) {
	t.Helper()
	names, err := fs.List("db")
	if err != nil {
		t.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return !strings.HasSuffix(name, ".sst") })
	flip := func() {
		f, err := fs.OpenReadWrite("db/"+slices.Max(names), vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		var b [1]byte
		_, err = f.ReadAt(b[:], at)
		b[0] ^= 1
		_, err2 := f.WriteAt(b[:], at)
		if err := errors.Join(err, err2, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	flip()
	return flip
}

// countErrors is a handler that counts.
type countErrors struct{ n atomic.Int64 }

func (*countErrors) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelError }

func (c *countErrors) Handle(context.Context, slog.Record) error {
	c.n.Add(1)
	return nil
}
func (c *countErrors) WithAttrs([]slog.Attr) slog.Handler { return c }
func (c *countErrors) WithGroup(string) slog.Handler      { return c }
