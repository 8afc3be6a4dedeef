package guild

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/store"
)

// hearer is a client that resumes or identifies, and what it is sent.
type hearer struct {
	t      testing.TB
	client Client
	reader *bufio.Reader
}

func newHearer(t testing.TB, core *fanout.Core, user int) *hearer {
	server, peer := net.Pipe()
	s := core.NewSession(server, func(error) {})
	t.Cleanup(func() { s.End(nil); peer.Close() })
	peer.SetReadDeadline(time.Now().Add(20 * time.Second))
	return &hearer{t, Client{
		Session: s, User: NewUser(userID(user), "u", false), Random: uint64(user), Intents: 1<<26 - 1,
	}, bufio.NewReader(peer)}
}

// dispatch is what a client is sent.
type dispatch struct {
	Type string          `json:"t"`
	Seq  uint64          `json:"s"`
	Data json.RawMessage `json:"d"`
}

func (d dispatch) String() string { return fmt.Sprint(d.Type, " ", d.Seq) }

// next is the next dispatch.
func (h *hearer) next() (d dispatch) {
	h.t.Helper()
	head := make([]byte, 10)
	read := func(p []byte) {
		h.t.Helper()
		if _, err := io.ReadFull(h.reader, p); err != nil {
			h.t.Fatal(err)
		}
	}
	read(head[:2])
	size := uint64(head[1])
	switch size {
	case 126:
		read(head[2:4])
		size = uint64(binary.BigEndian.Uint16(head[2:]))
	case 127:
		read(head[2:10])
		size = binary.BigEndian.Uint64(head[2:])
	}
	payload := make([]byte, size)
	read(payload)
	if err := json.Unmarshal(payload, &d); err != nil {
		h.t.Fatal(err)
	}
	return d
}

func (h *hearer) hears(want ...string) {
	h.t.Helper()
	for _, w := range want {
		if got := h.next().String(); got != w {
			h.t.Fatalf("heard %s, expected %s", got, w)
		}
	}
}

// hall is a guild whose stream has passed on far beyond its window, with the number where a
// certain thing happened further back.
type hall struct {
	*Guild
	t    *testing.T
	core *fanout.Core
	log  guildlog.Log
}

func newHall(t *testing.T, log guildlog.Log) *hall {
	h := &hall{t: t, log: log}
	h.open()
	return h
}

func (h *hall) open() {
	r := guildlog.Retention{Bytes: 1 << 30, Age: time.Hour}
	h.log.Retain(r)
	h.Guild = open(h.t, h.log, func(c *Config) { c.Retention, h.core = r, c.Core })
}

func (h *hall) join(n int) (last uint64) {
	if _, _, err := h.Join(context.Background(), NewUser(userID(n), "u", false)); err != nil {
		h.t.Fatal(err)
	}
	return h.Counts().LastSeq
}

func (h *hall) leave(n int) (last uint64) {
	if err := h.Leave(context.Background(), userID(n)); err != nil {
		h.t.Fatal(err)
	}
	return h.Counts().LastSeq
}

func (h *hall) publish(body string) uint64 {
	numbers, err := h.Publish(context.Background(), "", []Event{event("MESSAGE_CREATE", body)})
	if err != nil {
		h.t.Fatal(err)
	}
	return numbers[0]
}

// passOn publishes more than the stream's window holds.
func (h *hall) passOn() (names []string) {
	long := `{"content":"` + strings.Repeat("x", 200<<10) + `"}`
	for range windowBytes/(200<<10) + 2 {
		names = append(names, fmt.Sprint("MESSAGE_CREATE ", h.publish(long)))
	}
	return names
}

// resume resumes as a user from a number.
func (h *hall) resume(user int, seq uint64) (c *hearer, fresh bool, err error) {
	c = newHearer(h.t, h.core, user)
	err = h.Resume(context.Background(), c.client, Resumption{Log: h.log.ID(), Base: guildlog.First, Seq: seq}, func(s Snapshot) {
		fresh = true
		if s.Base != h.Counts().LastSeq || s.Guild == nil {
			h.t.Errorf("a snapshot at %d", s.Base)
		}
	})
	return c, fresh, err
}

func (h *hall) resumed(last uint64) string { return fmt.Sprint("RESUMED ", last) }

// TestTheClockJumps: however the clock goes, what is published is numbered and heard in order, and a resume either gets
// all that followed or is told that it cannot.
func TestTheClockJumps(t *testing.T) {
	for name, newLog := range map[string]func(t *testing.T, now func() time.Time) guildlog.Log{
		"in memory": func(_ *testing.T, now func() time.Time) guildlog.Log { return guildlog.NewMemory(retention, now) },
		"on disk":   func(t *testing.T, now func() time.Time) guildlog.Log { return onDisk(t, store.Options{Now: now}) },
	} {
		t.Run(name, func(t *testing.T) {
			var offset atomic.Int64
			now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
			log := newLog(t, now)
			h := &hall{t: t, log: log}
			h.Guild = open(t, log, func(c *Config) { c.Now, h.core = now, c.Core })
			base := h.join(1)
			live := newHearer(t, h.core, 1)
			if err := h.Identify(context.Background(), live.client, func(Snapshot) {}); err != nil {
				t.Fatal(err)
			}
			random := rand.New(rand.NewPCG(1, 2))
			kept := 0
			for i := range 300 {
				jumps := []time.Duration{0, 0, 0, time.Second, -time.Second, 50 * time.Minute, -50 * time.Minute, 30 * time.Hour, -30 * time.Hour}
				offset.Add(int64(jumps[random.IntN(len(jumps))]))
				key := fmt.Sprint("key ", i)
				first, err := h.Publish(context.Background(), key, []Event{event("MESSAGE_CREATE", `{}`)})
				if err != nil {
					t.Fatal(err)
				}
				last := base + uint64(i) + 1
				if again, err := h.Publish(context.Background(), key, []Event{event("MESSAGE_CREATE", `{}`)}); err != nil || again[0] != first[0] || again[0] != last {
					t.Fatalf("%v, then %v, %v, expected %d", first, again, err, last)
				}
				live.hears(fmt.Sprint("MESSAGE_CREATE ", last))
				from := base + random.Uint64N(last-base)
				other := newHearer(t, h.core, 1)
				other.client.Random = 99
				err = h.Resume(context.Background(), other.client, Resumption{Log: log.ID(), Base: base, Seq: from}, func(Snapshot) {
					t.Error("started afresh")
				})
				switch {
				case err == nil:
					kept++
					for n := from + 1; n <= last; n++ {
						other.hears(fmt.Sprint("MESSAGE_CREATE ", n))
					}
					other.hears(h.resumed(last))
				case !errors.Is(err, ErrNotResumable):
					t.Fatal(err)
				}
				other.client.Session.End(nil)
			}
			if kept < 30 {
				t.Errorf("%d resumes of 300 were possible", kept)
			}
		})
	}
}

// TestResumeBeyondTheWindow: what the stream does not keep is made anew of the log.
func TestResumeBeyondTheWindow(t *testing.T) { onEveryLog(t, testResumeBeyondTheWindow) }

func testResumeBeyondTheWindow(t *testing.T, log guildlog.Log) {
	h := newHall(t, log)
	since := h.join(1)
	h.join(2)
	h.leave(2)
	other := []string{
		fmt.Sprint("GUILD_MEMBER_ADD ", since+1), fmt.Sprint("GUILD_MEMBER_REMOVE ", since+3),
	}
	passed := h.passOn()
	last := h.Counts().LastSeq
	want := slices.Concat(other, passed, []string{h.resumed(last)})
	if h.stream.Holds(since) {
		t.Fatal("still in the window")
	}
	for range 3 {
		c, fresh, err := h.resume(1, since)
		if err != nil || fresh {
			t.Fatal(fresh, err)
		}
		c.hears(want...)
	}
	c, _, err := h.resume(1, since+1)
	if err != nil {
		t.Fatal(err)
	}
	c.hears(want[1:]...)
	live := h.publish(`{"content":"live"}`)
	c.hears(fmt.Sprint("MESSAGE_CREATE ", live))

	h.Close(bye)
	h.open() // by another process, say: its window has nothing
	c, fresh, err := h.resume(1, live-1)
	if err != nil || fresh {
		t.Fatal(fresh, err)
	}
	c.hears(fmt.Sprint("MESSAGE_CREATE ", live), h.resumed(live))
}

func TestResumeBeyondTheWindowAcrossMembership(t *testing.T) {
	for name, test := range map[string]struct {
		before, away, near func(h *hall)
		fresh              bool
		err                error
	}{
		"who joined since starts afresh": {
			away: func(h *hall) { h.join(1) }, fresh: true,
		},
		"who left and joined since starts afresh": {
			before: func(h *hall) { h.join(1) }, away: func(h *hall) { h.leave(1); h.join(1) }, fresh: true,
		},
		"who joined a moment ago starts afresh": {
			near: func(h *hall) { h.join(1) }, fresh: true,
		},
		"who left since is not resumed": {
			before: func(h *hall) { h.join(1) }, away: func(h *hall) { h.leave(1) }, err: ErrNotResumable,
		},
		"who left a moment ago is not resumed": {
			before: func(h *hall) { h.join(1) }, near: func(h *hall) { h.leave(1) }, err: ErrNotResumable,
		},
		"who never was a member is not resumed": {err: ErrNotResumable},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHall(t, guildlog.NewMemory(retention, time.Now))
			act := func(f func(*hall)) {
				if f != nil {
					f(h)
				}
			}
			act(test.before)
			from := h.publish(`{}`)
			act(test.away)
			h.passOn()
			act(test.near)
			c, fresh, err := h.resume(1, from)
			if fresh != test.fresh || !errors.Is(err, test.err) {
				t.Fatalf("fresh: %v, %v", fresh, err)
			}
			if err == nil {
				c.hears(h.resumed(h.Counts().LastSeq))
			}
		})
	}
}

// TestResumeWithinARecord: what is derived from a record has a number of its own.
func TestResumeWithinARecord(t *testing.T) { onEveryLog(t, testResumeWithinARecord) }

func testResumeWithinARecord(t *testing.T, log guildlog.Log) {
	h := newHall(t, log)
	out := newHearer(t, h.core, 1)
	if err := h.Identify(context.Background(), out.client, func(Snapshot) {}); err != nil {
		t.Fatal(err)
	}
	join := h.join(1) // of a user with a session: its GUILD_CREATE is in the stream
	out.hears(fmt.Sprint("GUILD_CREATE ", join))
	leave := h.leave(1)
	out.hears(fmt.Sprint("GUILD_DELETE ", leave))
	if join != guildlog.First+2 || leave != join+2 {
		t.Fatalf("joined up to %d, left up to %d", join, leave)
	}
	records, err := h.log.Read(join-1, 1)
	if err != nil || records[0].Seq != join-1 || records[0].Reserved != 1 {
		t.Fatalf("%+v %v", records, err)
	}
	create, remove := fmt.Sprint("GUILD_CREATE ", join), fmt.Sprint("GUILD_DELETE ", leave)
	for seq, want := range map[uint64][]string{
		join - 2: {create, remove}, join - 1: {create, remove},
		join: {remove}, leave - 1: {remove}, leave: {},
	} {
		c, fresh, err := h.resume(1, seq)
		if err != nil || fresh {
			t.Fatal(seq, fresh, err)
		}
		c.hears(append(want, h.resumed(leave))...)
	}
}

// TestAJoinThatNobodyReckonedWith: its GUILD_CREATE was not made, so who comes back starts afresh.
func TestAJoinThatNobodyReckonedWith(t *testing.T) {
	h := newHall(t, guildlog.NewMemory(retention, time.Now))
	from := h.publish(`{}`)
	h.join(1)
	if _, fresh, err := h.resume(1, from); !fresh || err != nil {
		t.Fatal(fresh, err)
	}
}

// TestFramesMadeAnewAreTheSame: for every kind of record the history's frames are the stream's.
func TestFramesMadeAnewAreTheSame(t *testing.T) {
	for _, r := range []guildlog.Record{
		{Seq: 2, Type: "MESSAGE_CREATE", Data: []byte(`{"content":"x"}`)},
		{Seq: 2, Type: "MESSAGE_CREATE", Data: []byte(`{"content":"x"}`), Users: []snowflake.ID{userID(9), userID(5), userID(9)}},
		{Seq: 2, Type: "MESSAGE_UPDATE", Data: []byte(`{"content":"x","mentions":[{"id":"200000000000000009"},{"id":"200000000000000005"}],"author":{"id":"200000000000000007"}}`)},
		{Seq: 2, Type: "MESSAGE_CREATE", Data: []byte(`{"content":"","author":{"id":"200000000000000007"}}`)},
		{Seq: 2, Type: "AUTO_MODERATION_ACTION_EXECUTION", Data: []byte(`{"content":"x","matched_content":"x"}`)},
		{Seq: 2, Type: "GUILD_MEMBER_REMOVE", Data: []byte(`{"user":{"id":"200000000000000005"}}`), Reserved: 1},
		{Seq: 2, Type: "GUILD_MEMBER_REMOVE", Data: []byte(`{"user":{"id":"200000000000000005"}}`), Reserved: 1, Users: []snowflake.ID{userID(5), userID(9)}},
	} {
		log := guildlog.NewMemory(retention, time.Now)
		r.Time = time.Now().UnixMilli()
		if err := log.Commit(guildlog.Commit{Records: []guildlog.Record{r}}); err != nil {
			t.Fatal(err)
		}
		h := &history{guild: testID, log: log}
		frames, err := h.Frames(0)
		if err != nil {
			t.Fatal(err)
		}
		var turns turn
		if r.Reserved > 0 {
			turns = turnOf(&r)
		}
		live := []*fanout.Frame{frame(&r, turns)}
		if r.Reserved > 0 {
			live = append(live, derived(testID, r.End(), turns, nil))
		}
		if a, b := fmt.Sprintf("%+v", deref(live)), fmt.Sprintf("%+v", deref(frames)); a != b {
			t.Errorf("%s: live\n%s\nanew\n%s", r.Type, a, b)
		}
		for _, f := range frames {
			if p := f.Personal; !slices.IsSortedFunc(p, func(a, b fanout.Personal) int { return cmp.Compare(a.Owner, b.Owner) }) {
				t.Errorf("%v", p)
			}
		}
		rest, err := h.Frames(r.Seq)
		if r.Reserved > 0 && (err != nil || len(rest) != 1 || rest[0].Seq != r.End()) {
			t.Errorf("behind %d: %v %v", r.Seq, rest, err)
		}
	}
	if (&view{intents: protocol.IntentGuilds, member: true}).Pick(&fanout.Frame{Tag: protocol.EventOf("MESSAGE_CREATE"), Wire: []byte{1}}) != nil {
		t.Error("an event that the intents do not ask for")
	}
}

func deref(frames []*fanout.Frame) (list []fanout.Frame) {
	for _, f := range frames {
		list = append(list, *f)
	}
	return list
}

// BenchmarkReplay has sessions come back at the same time behind 50,000 events of 256 bytes that only the disk has, and
// that none of them is to see.
func BenchmarkReplay(b *testing.B) {
	const events, batch = 50_000, 100
	r := guildlog.Retention{Bytes: 1 << 30, Age: time.Hour}
	log := onDisk(b, store.Options{})
	log.Retain(r)
	var core *fanout.Core
	again := func() *Guild { return open(b, log, func(c *Config) { c.Retention, core = r, c.Core }) }
	g := again()
	if _, _, err := g.Join(b.Context(), NewUser(userID(1), "u", false)); err != nil {
		b.Fatal(err)
	}
	from := g.Counts().LastSeq
	message := event("MESSAGE_CREATE", `{"content":"`+strings.Repeat("x", 256-len(`{"content":""}`))+`"}`)
	for range events / batch {
		if _, err := g.Publish(b.Context(), "", slices.Repeat([]Event{message}, batch)); err != nil {
			b.Fatal(err)
		}
	}
	last := g.Counts().LastSeq
	g.Close(bye)
	g = again() // its window has nothing
	for _, sessions := range []int{1, 10, 100} {
		b.Run(fmt.Sprint(sessions), func(b *testing.B) {
			for range b.N {
				var all sync.WaitGroup
				for i := range sessions {
					h := newHearer(b, core, 1)
					h.client.Intents, h.client.Random = protocol.IntentGuilds, uint64(i)
					if err := g.Resume(b.Context(), h.client, Resumption{Log: log.ID(), Base: guildlog.First, Seq: from}, func(Snapshot) { b.Error("afresh") }); err != nil {
						b.Fatal(err)
					}
					all.Go(func() {
						h.hears(fmt.Sprint("RESUMED ", last))
						h.client.Session.End(nil)
					})
				}
				all.Wait()
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(last-from)*1000, "µs/1000events")
		})
	}
}
