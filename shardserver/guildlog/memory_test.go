package guildlog

import (
	"errors"
	"math"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"guildhall.dev/guildhall/shardserver/snowflake"
)

// TestMemoryIsLikeASlice compares the log with a slice of all records ever appended, of which
// the newest are kept:
//   - kept is what no bound of the retention has dropped, and at least the newest record;
//   - numbers that do not rise are refused, and then nothing is appended;
//   - Read gives what is behind a number, up to a limit, or says that some of it was dropped;
//   - Resumable says whether Read from there gives all.
func TestMemoryIsLikeASlice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.UnixMilli(1_700_000_000_000)
		retention := Retention{Bytes: rapid.Int64Range(0, 1000).Draw(t, "bytes"), Age: time.Minute}
		log := NewMemory(retention, func() time.Time { return now })
		var all []Record
		kept := 0 // index of the oldest record kept
		last := func() uint64 {
			if len(all) == 0 {
				return 0
			}
			return all[len(all)-1].End()
		}
		// drop is retention, once more and simply.
		drop := func() {
			for kept < len(all)-1 {
				var bytes int64
				for i := range all[kept:] {
					bytes += all[kept+i].size()
				}
				if bytes <= retention.Bytes && now.UnixMilli()-all[kept].Time <= retention.Age.Milliseconds() {
					break
				}
				kept++
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"append": func(t *rapid.T) {
				var records []Record
				seq, rising := last(), true
				for range rapid.IntRange(0, 4).Draw(t, "records") {
					step := rapid.SampledFrom([]uint64{1, 1, 1, 2, 5, 0}).Draw(t, "step")
					rising = rising && step > 0 && seq+step >= First
					seq += step
					r := Record{Seq: seq, Time: now.UnixMilli(), Type: "MESSAGE_CREATE", Data: make([]byte, rapid.IntRange(0, 200).Draw(t, "size"))}
					if step == 5 {
						r.Users = []snowflake.ID{1, 2}
						r.Reserved = 3
						seq += 3
					}
					records = append(records, r)
				}
				if err := log.Commit(Commit{Records: records}); (err == nil) != rising {
					t.Fatalf("appending: %v, numbers rise: %v", err, rising)
				}
				if rising {
					all = append(all, records...)
					drop()
				}
			},
			"wait": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(0, 40).Draw(t, "seconds")) * time.Second)
			},
			"retain": func(t *rapid.T) {
				retention.Bytes = rapid.Int64Range(0, 2000).Draw(t, "bytes")
				retention.Age = time.Duration(rapid.IntRange(0, 90).Draw(t, "seconds")) * time.Second
				log.Retain(retention)
				drop()
			},
			"read": func(t *rapid.T) {
				seq := rapid.Uint64Range(0, last()+2).Draw(t, "seq")
				limit := rapid.SampledFrom([]int{0, 1, 3, math.MaxInt}).Draw(t, "limit")
				var want []Record
				whole := true
				for i, r := range all {
					if r.End() > seq {
						whole = whole && i >= kept
						if len(want) < limit {
							want = append(want, r)
						}
					}
				}
				got, err := log.Read(seq, limit)
				if whole != (err == nil) || !whole && !errors.Is(err, ErrDropped) {
					t.Fatalf("reading behind %d: %v, kept: %v", seq, err, whole)
				}
				if whole && (len(got) != len(want) || len(want) > 0 && !reflect.DeepEqual(got, want)) {
					t.Fatalf("reading behind %d: %v, expected %v", seq, got, want)
				}
				if want := whole && seq <= last(); log.Resumable(seq) != want {
					t.Fatalf("resumable from %d: %v", seq, !want)
				}
			},
			"": func(t *rapid.T) {
				if log.Last() != last() {
					t.Fatalf("last number %d, expected %d", log.Last(), last())
				}
			},
		})
	})
}

func TestLogsHaveIDsOfTheirOwn(t *testing.T) {
	a, b := NewMemory(Retention{}, time.Now), NewMemory(Retention{}, time.Now)
	if a.ID() == b.ID() || a.ID() == (ID{}) || a.ID().Durable() || a.Epoch() != 1 {
		t.Errorf("ids %s and %s, epoch %d", a.ID(), b.ID(), a.Epoch())
	}
}

func TestRecordsStartAtTwoAndAreTheReadersOwn(t *testing.T) {
	log := NewMemory(Retention{Bytes: 1 << 20, Age: time.Hour}, time.Now)
	if err := log.Commit(Commit{Records: []Record{{Seq: 1}}}); err == nil {
		t.Error("number 1 was accepted, the least is 2")
	}
	now := time.Now().UnixMilli()
	if err := log.Commit(Commit{Records: []Record{{Seq: 2, Time: now}, {Seq: 4, Time: now}}}); err != nil {
		t.Fatal(err)
	}
	got, err := log.Read(0, 10)
	if err != nil {
		t.Fatal(err)
	}
	got[0].Seq = 99
	if again, _ := log.Read(0, 10); again[0].Seq != 2 {
		t.Error("what a reader does with its records changed the log")
	}
}

func TestIDs(t *testing.T) {
	for range 20 {
		for _, durable := range []bool{false, true} {
			id := NewID(durable)
			if again, err := ParseID(id.String()); err != nil || again != id || id.Durable() != durable {
				t.Errorf("%s: %s %v", id, again, err)
			}
		}
	}
	for _, bad := range []string{"", "0", "zz", NewID(true).String() + "00", NewID(true).String()[:30]} {
		if id, err := ParseID(bad); err == nil {
			t.Errorf("%q is %s", bad, id)
		}
	}
}
