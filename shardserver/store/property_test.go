package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// modelLog is what a log should have: everything ever written to it, in memory.
type modelLog struct {
	id        guildlog.ID
	records   []guildlog.Record
	keys      map[string]modelKey
	state     map[string]string
	retention guildlog.Retention
	// overdue is the end of the newest record that an exact retention would have dropped at some time.
	overdue uint64
	// largest is the size of the largest block that there can be.
	largest int64
}

type modelKey struct {
	guildlog.Key
	at time.Time
}

func (m *modelLog) last() uint64 {
	if len(m.records) == 0 {
		return 0
	}
	return m.records[len(m.records)-1].End()
}

// bytes is the size of the records behind a number.
func (m *modelLog) bytes(behind uint64) (sum int64) {
	prev := uint64(0)
	for i := range m.records {
		r := &m.records[i]
		if r.Seq > behind {
			sum += int64(1 + 8 + 1 + 8 + len(guildlog.EncodeRecord(r, prev)))
		}
		prev = r.End()
	}
	return sum
}

// TestStoreIsLikeMaps runs random operations on a store and on a model of maps and slices, and closes it
// and cuts its power in between. All that was acknowledged is there, and nothing else. Of a write that
// was under way as the power went, all or nothing is there.
func TestStoreIsLikeMaps(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var (
			c     = newClock()
			fs    = vfs.NewCrashableMem()
			o     = options(fs)
			model = map[snowflake.ID]*modelLog{}
			// touched are the guilds that an operation was about; all when it is empty.
			touched = map[snowflake.ID]bool{}
			guilds  = rapid.SampledFrom([]snowflake.ID{guildA, guildB, guildB + 1})
			rng     = rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		)
		o.Now = c.Now
		o.Retention = guildlog.Retention{Bytes: 4000, Age: time.Hour}
		s, err := Open("db", o)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { s.Close() }()

		logOf := func(guild snowflake.ID) *Log {
			m := model[guild]
			l, err := s.Log(guild, guildlog.ID{})
			if m == nil && errors.Is(err, ErrLogMissing) {
				return nil
			}
			if m == nil || err != nil || l.ID() != m.id {
				t.Fatalf("opening the log of guild %s: %v", guild, err)
			}
			if l.retention != m.retention { // the store does not keep it
				m.retention = l.retention
			}
			return l
		}
		drawGuild := func(t *rapid.T) snowflake.ID {
			guild := guilds.Draw(t, "guild")
			touched[guild] = true
			return guild
		}
		// drawCommit draws a commit for a log that ends at last.
		drawCommit := func(t *rapid.T, last uint64, least int) (c1 guildlog.Commit) {
			for range rapid.IntRange(least, 4).Draw(t, "records") {
				r := guildlog.Record{
					Seq: last + rapid.SampledFrom([]uint64{1, 1, 1, 2, 300}).Draw(t, "step"), Time: c.Now().UnixMilli(),
					Type: "MESSAGE_CREATE", Data: make([]byte, rapid.SampledFrom([]int{0, 10, 100, 1000}).Draw(t, "size")),
					Reserved: rapid.SampledFrom([]uint64{0, 0, 0, 1, 5}).Draw(t, "reserved"),
				}
				r.Seq = max(r.Seq, guildlog.First)
				if rapid.Bool().Draw(t, "private") {
					r.Users = []snowflake.ID{guildA}
				}
				for i := range r.Data {
					r.Data[i] = byte(rng.Uint32())
				}
				c1.Records = append(c1.Records, r)
				last = r.End()
			}
			name := rapid.SampledFrom([]string{"", "a", "b", "c"})
			if n := name.Draw(t, "key"); n != "" {
				c1.Keys = append(c1.Keys, guildlog.Key{Name: n, Numbers: []uint64{last}, Body: [32]byte{byte(last)}, Answer: []byte(fmt.Sprint(last))})
			}
			if n := name.Draw(t, "row"); n != "" {
				row := guildlog.Row{Key: []byte(n)}
				if rapid.Bool().Draw(t, "value") {
					row.Value = []byte(fmt.Sprint(last))
				}
				c1.State = append(c1.State, row)
			}
			return c1
		}
		// done notes what a commit has changed.
		done := func(m *modelLog, c1 guildlog.Commit) {
			m.records = append(m.records, c1.Records...)
			for _, k := range c1.Keys {
				m.keys[k.Name] = modelKey{k, c.Now()}
			}
			for _, row := range c1.State {
				if row.Value == nil {
					delete(m.state, string(row.Key))
				} else {
					m.state[string(row.Key)] = string(row.Value)
				}
			}
		}
		// retain notes what retention may have dropped by now.
		retain := func(m *modelLog) {
			m.largest = max(m.largest, m.retention.Bytes/slack+1100)
			cutoff := c.Now().Add(-m.retention.Age).UnixMilli()
			for i := range m.records[:len(m.records)-1] {
				r := &m.records[i]
				// Whole blocks go for the bytes, so the record that is one too many can take others with it.
				if r.Time < cutoff || m.bytes(r.Seq-1)+m.largest > m.retention.Bytes {
					m.overdue = max(m.overdue, r.End())
				}
			}
		}
		reopen := func(next *vfs.MemFS) {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			fs, o.FS = next, next
			if s, err = Open("db", o); err != nil {
				t.Fatal(err)
			}
			for guild := range model {
				l := logOf(guild)
				if l.retention != model[guild].retention {
					t.Fatal("not the default retention")
				}
				l.Retain(l.retention) // who opens a log says what it is to keep
				retain(model[guild])
			}
		}
		cut := func(t *rapid.T) *vfs.MemFS {
			return fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rapid.SampledFrom([]int{0, 50, 100}).Draw(t, "unsynced"), RNG: rng})
		}
		t.Repeat(map[string]func(*rapid.T){
			"birth": func(t *rapid.T) {
				guild := drawGuild(t)
				c1 := drawCommit(t, 0, 1)
				again := rapid.Bool().Draw(t, "again")
				born, err := s.birth(Identity{Owner: ownerA, Guild: guild}, c1, again)
				if model[guild] != nil && !again {
					if !errors.Is(err, ErrLogExists) {
						t.Fatalf("a second birth: %v", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				m := &modelLog{id: born.ID(), keys: map[string]modelKey{}, state: map[string]string{}, retention: o.Retention}
				model[guild] = m
				done(m, c1)
				retain(m)
			},
			"commit": func(t *rapid.T) {
				guild := drawGuild(t)
				if l := logOf(guild); l != nil {
					c1 := drawCommit(t, l.Last(), 0)
					if err := l.Commit(c1); err != nil {
						t.Fatal(err)
					}
					done(model[guild], c1)
					retain(model[guild])
				}
			},
			"retain": func(t *rapid.T) {
				guild := drawGuild(t)
				if l := logOf(guild); l != nil {
					m := model[guild]
					m.retention.Bytes = rapid.SampledFrom([]int64{0, 1000, 8000}).Draw(t, "bytes")
					m.retention.Age = rapid.SampledFrom([]time.Duration{0, time.Minute, time.Hour}).Draw(t, "age")
					l.Retain(m.retention)
					retain(m)
				}
			},
			"delete": func(t *rapid.T) {
				guild := drawGuild(t)
				if err := s.Delete(guild); (err == nil) != (model[guild] != nil) {
					t.Fatal(err)
				}
				delete(model, guild)
			},
			"wait": func(t *rapid.T) {
				c.Add(rapid.SampledFrom([]time.Duration{time.Second, 5 * time.Minute, 2 * time.Hour, 13 * time.Hour}).Draw(t, "time"))
			},
			"flush": func(t *rapid.T) {
				if err := s.db.Flush(); err != nil {
					t.Fatal(err)
				}
			},
			"reopen":    func(*rapid.T) { reopen(fs) },
			"power cut": func(t *rapid.T) { reopen(cut(t)) },
			"power cut in a commit": func(t *rapid.T) {
				guild := drawGuild(t)
				l := logOf(guild)
				if l == nil {
					return
				}
				c1 := drawCommit(t, l.Last(), 1)
				committed := make(chan error)
				go func() { committed <- l.Commit(c1) }()
				for range rapid.IntRange(0, 30).Draw(t, "delay") {
					time.Sleep(time.Microsecond)
				}
				next := cut(t)
				if err := <-committed; err != nil {
					t.Fatal(err)
				}
				m := model[guild]
				without := *m
				without.keys, without.state = maps.Clone(m.keys), maps.Clone(m.state)
				done(m, c1)
				retain(m)
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				fs, o.FS = next, next
				if s, err = Open("db", o); err != nil {
					t.Fatal(err)
				}
				if logOf(guild).Last() == without.last() { // it was not acknowledged at the cut
					without.overdue = m.overdue
					model[guild] = &without
				}
				reopen(fs)
				clear(touched)
			},
			"": func(t *rapid.T) {
				if n := len(s.Inventory()); n != len(model) {
					t.Fatalf("%d logs, expected %d", n, len(model))
				}
				for guild, m := range model {
					if l := logOf(guild); touched[guild] || len(touched) == 0 {
						checkLog(t, l, m, c.Now())
					}
				}
				clear(touched)
			},
		})
	})
}

func checkLog(t *rapid.T, l *Log, m *modelLog, now time.Time) {
	if l.Last() != m.last() || l.dropped > m.overdue || !l.Resumable(l.dropped) || !l.Resumable(l.Last()) {
		t.Fatalf("the log ends at %d and was dropped up to %d, expected %d and at most %d", l.Last(), l.dropped, m.last(), m.overdue)
	}
	// Bytes are kept within their bound, unless all that is left is in the newest block.
	if h := l.head; h.Bytes != m.bytes(l.dropped) || h.Bytes > l.retention.Bytes && h.Bytes != h.Newest.Bytes {
		t.Fatalf("%d bytes are kept by the head, %d are there, the bound is %d", h.Bytes, m.bytes(l.dropped), l.retention.Bytes)
	}
	var want []guildlog.Record
	for _, r := range m.records {
		if r.Seq > l.dropped {
			want = append(want, r)
		}
	}
	var got []guildlog.Record
	for seq := l.dropped; seq < l.Last(); {
		list, err := l.Read(seq, 3)
		if err != nil || len(list) == 0 {
			t.Fatalf("reading behind %d: %d records, %v", seq, len(list), err)
		}
		got = append(got, list...)
		seq = list[len(list)-1].End()
	}
	if diff := diffRecords(want, got); diff != "" {
		t.Fatal(diff)
	}
	if _, err := l.Read(l.dropped-1, 1); l.dropped > 0 && !errors.Is(err, guildlog.ErrDropped) {
		t.Fatalf("reading what was dropped: %v", err)
	}
	for _, name := range []string{"a", "b", "c"} {
		k, found, err := l.Find(name)
		want, ok := m.keys[name]
		ok = ok && now.Sub(want.at) < guildlog.KeyLifetime
		if err != nil || found != ok || found && cmp.Diff(want.Key, k) != "" {
			t.Fatalf("key %s: %v, %v, %v, expected %v, %v", name, k, found, err, want, ok)
		}
	}
	state := map[string]string{}
	if _, err := l.State(func(key, value []byte) error {
		state[string(key)] = string(value)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(m.state, state); diff != "" {
		t.Fatal(diff)
	}
}

// diffRecords is cmp.Diff, which takes long for many records that are equal.
func diffRecords(want, got []guildlog.Record) string {
	if slices.EqualFunc(want, got, func(a, b guildlog.Record) bool {
		return a.Seq == b.Seq && a.Time == b.Time && a.Type == b.Type && a.Reserved == b.Reserved &&
			bytes.Equal(a.Data, b.Data) && slices.Equal(a.Users, b.Users)
	}) {
		return ""
	}
	return cmp.Diff(want, got)
}

// TestPowerCutsUnderLoad cuts the power while several guilds are written to, again and again, and goes on
// with what is left. Bodies, keys and rows tell their numbers.
func TestPowerCutsUnderLoad(t *testing.T) {
	t.Parallel()
	const guilds, rounds = 8, 20
	rng := rand.New(rand.NewPCG(7, 7))
	fs := vfs.NewCrashableMem()
	var acked, seen [guilds]atomic.Uint64
	for g := range acked {
		acked[g].Store(1)
	}
	for round := range rounds {
		s := mustOpen(t, "db", options(fs))
		var logs [guilds]*Log
		for g := range logs {
			guild := guildA + snowflake.ID(g)
			l, err := s.Log(guild, guildlog.ID{})
			if errors.Is(err, ErrLogMissing) && acked[g].Load() == 1 {
				l, err = s.Birth(guild, ownerA, numbered(guild, 2, 2))
			}
			if err != nil {
				t.Fatal(err)
			}
			logs[g] = l
			if l.Last() < acked[g].Load() {
				t.Fatalf("round %d: guild %d ends at %d, %d was acknowledged", round, g, l.Last(), acked[g].Load())
			}
			checkNumbered(t, l, guild)
			acked[g].Store(l.Last())
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for g, l := range logs {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					next := l.Last() + 1
					if err := l.Commit(numbered(guildA+snowflake.ID(g), next, next+next%3)); err != nil {
						t.Error(err)
						return
					}
					acked[g].Store(l.Last())
				}
			})
		}
		for g, l := range logs { // what a reader has seen stays, too
			wg.Go(func() {
				for seq := l.Last(); ; {
					select {
					case <-stop:
						return
					default:
					}
					list, err := l.Read(seq, 100)
					if err != nil {
						t.Error(err)
						return
					}
					for i := range list {
						seq = list[i].End()
						seen[g].Store(seq)
					}
					runtime.Gosched()
				}
			})
		}
		time.Sleep(time.Duration(rng.IntN(4000)) * time.Microsecond)
		if round%5 == 4 {
			if _, err := s.db.AsyncFlush(); err != nil {
				t.Fatal(err)
			}
		}
		var before [guilds]uint64
		for g := range acked {
			before[g] = max(acked[g].Load(), seen[g].Load())
		}
		next := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		close(stop)
		wg.Wait()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		fs = next
		for g := range acked {
			acked[g].Store(before[g])
			seen[g].Store(0)
		}
	}
}

// TestReadersBesideRetention reads while records are appended and dropped: a reader gets what follows its
// position without a hole, or is told that some of it was dropped.
func TestReadersBesideRetention(t *testing.T) {
	t.Parallel()
	const last = 1500
	o := options(vfs.NewMem())
	o.Retention.Bytes = 2000
	l := birth(t, open(t, "db", o), guildA, guildlog.Commit{Records: records(2, 2)})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			dropped := 0
			for seq := uint64(1); seq < last; {
				list, err := l.Read(seq, 5)
				if errors.Is(err, guildlog.ErrDropped) {
					dropped++
					seq = max(16, l.Last()) - 15 // where records are about to go
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if diff := diffRecords(records(seq+1, seq+uint64(len(list))), list); diff != "" {
					t.Error(diff)
					return
				}
				seq += uint64(len(list))
				runtime.Gosched()
			}
			t.Logf("too late %d times", dropped)
		})
	}
	for seq := l.Last() + 1; seq <= last; seq++ {
		commit(t, l, guildlog.Commit{Records: records(seq, seq)})
	}
	wg.Wait()
	if l.Resumable(last - 100) {
		t.Error("nothing was dropped")
	}
}

// numbered is a commit of records first to last, with a key for each and a row that says last.
func numbered(guild snowflake.ID, first, last uint64) (c guildlog.Commit) {
	for seq := first; seq <= last; seq++ {
		r := record(seq)
		r.Data = append(r.Data, guild.String()...)
		c.Records = append(c.Records, r)
		c.Keys = append(c.Keys, guildlog.Key{Name: fmt.Sprint("key ", seq), Numbers: []uint64{seq}})
	}
	c.State = []guildlog.Row{{Key: []byte("last"), Value: binary.AppendUvarint(nil, last)}}
	return c
}

func checkNumbered(t *testing.T, l *Log, guild snowflake.ID) {
	t.Helper()
	var got, want []guildlog.Record
	for seq := uint64(0); seq < l.Last(); seq = got[len(got)-1].End() {
		list, err := l.Read(seq, 1000)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, list...)
	}
	want = numbered(guild, 2, l.Last()).Records
	if diff := diffRecords(want, got); diff != "" {
		t.Fatal(diff)
	}
	for seq := max(2, l.Last()-10); seq <= l.Last()+5; seq++ {
		k, found, err := l.Find(fmt.Sprint("key ", seq))
		if err != nil || found != (seq <= l.Last()) || found && k.Numbers[0] != seq {
			t.Fatalf("key of record %d of %d: %v, %v, %v", seq, l.Last(), k, found, err)
		}
	}
	if row := stateOf(t, l)["last"]; row != string(binary.AppendUvarint(nil, l.Last())) {
		t.Fatalf("the state is not of record %d", l.Last())
	}
}
