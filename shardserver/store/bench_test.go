package store

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

var (
	benchDir     = flag.String("store.dir", "", "directory for benchmarks, on the disk to be measured")
	benchRecords = flag.Int("store.records", 1_000_000, "records of 1,000 guilds in BenchmarkOpen; the directory must be new for another number")
)

func directory(b *testing.B) string {
	if *benchDir == "" {
		return b.TempDir()
	}
	dir := filepath.Join(*benchDir, filepath.Base(b.Name()))
	if err := os.RemoveAll(dir); err != nil {
		b.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// event is a record of the usual size, 250 bytes.
func event(seq uint64) guildlog.Record {
	const body = `{"guild_id":"1024000000000000000","channel_id":"1024000000000000001","id":"%d","author":{"id":"1024000000000000002","username":"publisher"},"content":"a message of the usual length, with a few words in it","timestamp":"2026-01-01T00:00:00Z"}`
	return guildlog.Record{Seq: seq, Time: time.Now().UnixMilli(), Type: "MESSAGE_CREATE", Data: fmt.Appendf(nil, body, 1024000000000000000+seq)}
}

// publish has 64 publishers share b.N calls of write.
func publish(b *testing.B, write func(publisher int) error) {
	const publishers = 64
	work := make(chan struct{}, publishers)
	var wg sync.WaitGroup
	for p := range publishers {
		wg.Go(func() {
			for range work {
				if err := write(p); err != nil {
					b.Error(err)
				}
			}
		})
	}
	b.ResetTimer()
	for range b.N {
		work <- struct{}{}
	}
	close(work)
	wg.Wait()
	b.StopTimer()
}

// BenchmarkAppend has 64 publishers append one record each to their own guild, or all to one guild as its
// actor does: everything that waits in one batch.
func BenchmarkAppend(b *testing.B) {
	o := options(nil)
	o.Now = time.Now
	report := func(b *testing.B, s *Store, before Stats) {
		after, err := s.Stats()
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(b.N)/float64(after.Syncs-before.Syncs), "records/fsync")
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
	}
	b.Run("64guilds", func(b *testing.B) {
		s := open(b, directory(b), o)
		var logs []*Log
		for p := range 64 {
			logs = append(logs, birth(b, s, guildA+snowflake.ID(p), guildlog.Commit{Records: records(2, 2)}))
		}
		before, _ := s.Stats()
		publish(b, func(p int) error {
			return logs[p].Commit(guildlog.Commit{Records: []guildlog.Record{event(logs[p].Last() + 1)}})
		})
		report(b, s, before)
	})
	b.Run("1guild", func(b *testing.B) {
		s := open(b, directory(b), o)
		l := birth(b, s, guildA, guildlog.Commit{Records: records(2, 2)})
		before, _ := s.Stats()
		actor := newActor(func(n int) error {
			list := make([]guildlog.Record, n)
			for i := range list {
				list[i] = event(l.Last() + 1 + uint64(i))
			}
			return l.Commit(guildlog.Commit{Records: list})
		})
		defer actor.close()
		publish(b, actor.do)
		report(b, s, before)
	})
}

// BenchmarkBareFsync is the disk alone: a loop that appends all that waits to a file and syncs it.
func BenchmarkBareFsync(b *testing.B) {
	f, err := os.Create(filepath.Join(directory(b), "file"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	value, syncs := event(2).Data, 0
	actor := newActor(func(n int) error {
		syncs++
		buf := make([]byte, 0, n*len(value))
		for range n {
			buf = append(buf, value...)
		}
		if _, err := f.Write(buf); err != nil {
			return err
		}
		return f.Sync()
	})
	defer actor.close()
	publish(b, actor.do)
	b.ReportMetric(float64(b.N)/float64(syncs), "records/fsync")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
}

// actor gathers what waits and writes it in one go, as a guild's actor does.
type actor struct{ waiting chan chan error }

func newActor(write func(n int) error) *actor {
	a := &actor{waiting: make(chan chan error, 64)}
	go func() {
		for first := range a.waiting {
			batch := []chan error{first}
			runtime.Gosched()
			for more := true; more; {
				select {
				case next, ok := <-a.waiting:
					if more = ok; ok {
						batch = append(batch, next)
					}
				default:
					more = false
				}
			}
			err := write(len(batch))
			for _, done := range batch {
				done <- err
			}
		}
	}()
	return a
}

func (a *actor) do(int) error {
	done := make(chan error, 1)
	a.waiting <- done
	return <-done
}

func (a *actor) close() { close(a.waiting) }

// BenchmarkOpen opens a store of 1,000 guilds that was killed, and all of their logs.
func BenchmarkOpen(b *testing.B) {
	const guilds = 1000
	dir := filepath.Join(*benchDir, "open")
	if *benchDir == "" {
		dir = b.TempDir()
	}
	o := options(nil)
	o.Now = time.Now
	if _, err := os.Stat(dir + "/killed"); err != nil {
		fill(b, dir, o, guilds, *benchRecords)
	}
	for b.Loop() {
		b.StopTimer()
		copied := filepath.Join(b.TempDir(), "copy")
		link(b, dir+"/killed", copied)
		b.StartTimer()
		s := mustOpen(b, copied, o)
		for g := range guilds {
			l, err := s.Log(guildA+snowflake.ID(g), guildlog.ID{})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := l.State(func(_, _ []byte) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// fill writes records, and copies what a process leaves behind that is killed then.
func fill(b *testing.B, dir string, o Options, guilds, records int) {
	s := mustOpen(b, dir+"/live", o)
	var wg sync.WaitGroup
	const workers = 8
	for w := range workers {
		wg.Go(func() {
			for n := 0; n < records/guilds; n += 100 {
				for g := w; g < guilds; g += workers {
					guild := guildA + snowflake.ID(g)
					c := guildlog.Commit{}
					for i := range 100 {
						c.Records = append(c.Records, event(uint64(2+n+i)))
					}
					for i := range 10 {
						c.State = append(c.State, guildlog.Row{Key: fmt.Appendf(nil, "member %d", i), Value: event(2).Data})
					}
					l, err := s.Log(guild, guildlog.ID{})
					if err != nil {
						_, err = s.Birth(guild, ownerA, c)
					} else {
						err = l.Commit(c)
					}
					if err != nil {
						b.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	b.Logf("%s", s.db.Metrics())
	// A checkpoint has the write-ahead log as it is.
	if err := s.db.Checkpoint(dir+"/killed", pebble.WithFlushedWAL()); err != nil {
		b.Fatal(err)
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
}

// link copies a directory; tables, which nobody changes, are linked.
func link(b *testing.B, from, to string) {
	if err := os.MkdirAll(to, 0o700); err != nil {
		b.Fatal(err)
	}
	for _, name := range glob(b, from, "*") {
		target := filepath.Join(to, filepath.Base(name))
		var err error
		if filepath.Ext(name) == ".sst" {
			err = vfs.LinkOrCopy(vfs.Default, name, target)
		} else {
			err = vfs.Copy(vfs.Default, name, target)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
