package guild

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testID snowflake.ID = 1100000000000000001

func userID(n int) snowflake.ID { return snowflake.ID(200000000000000000 + uint64(n)) }

var retention = guildlog.Retention{Bytes: 16 << 20, Age: time.Hour}

// onEveryLog runs a test with logs in memory, and with logs on disk.
func onEveryLog(t *testing.T, test func(t *testing.T, log guildlog.Log)) {
	t.Run("in memory", func(t *testing.T) { test(t, guildlog.NewMemory(retention, time.Now)) })
	t.Run("on disk", func(t *testing.T) { test(t, onDisk(t, store.Options{})) })
}

// onDisk makes a log that is born with nothing but the birth of a guild of the test's.
func onDisk(t testing.TB, o store.Options) *store.Log {
	t.Helper()
	o.Retention, o.Logger = retention, slog.New(slog.DiscardHandler)
	s, err := store.Open(t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	log, err := s.Birth(testID, store.Owner{}, Birth(Config{ID: testID, Name: "hall"}))
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// open opens a guild on that log, a new one when nil, until the test ends.
func open(t testing.TB, log guildlog.Log, edit func(*Config)) *Guild {
	t.Helper()
	if log == nil {
		log = guildlog.NewMemory(retention, time.Now)
	}
	core := fanout.New(fanout.Options{Workers: 1})
	c := Config{
		ID: testID, Name: "hall", Retention: retention, Log: log, Core: core, IDs: &snowflake.Source{}, Logger: slog.New(slog.DiscardHandler),
	}
	if edit != nil {
		edit(&c)
	}
	if log.Last() == 0 {
		if err := log.Commit(Birth(c)); err != nil {
			t.Fatal(err)
		}
	}
	g, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.Close(bye)
		core.Stop()
	})
	return g
}

func bye(uint64) []byte { return protocol.CloseFrame(protocol.CloseUnknownError, "bye") }

func event(kind, body string) Event { return Event{Type: kind, Data: json.RawMessage(body)} }

// TestStateIsAFunctionOfTheLog: a guild that is opened on the log of another one is the same.
func TestStateIsAFunctionOfTheLog(t *testing.T) { onEveryLog(t, testStateIsAFunctionOfTheLog) }

func testStateIsAFunctionOfTheLog(t *testing.T, log guildlog.Log) {
	ctx := context.Background()
	g := open(t, log, func(c *Config) {
		c.Channels = []BootstrapChannel{{Name: "a", Type: ChannelText}, {Name: "b", Type: ChannelCategory}}
	})
	for i := range 20 {
		if _, _, err := g.Join(ctx, NewUser(userID(i), "u", i%2 == 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Leave(ctx, userID(3)); err != nil {
		t.Fatal(err)
	}
	for _, e := range []Event{
		event("CHANNEL_CREATE", `{"id":"1100000000000000007","type":2,"name":"v","position":4}`),
		event("CHANNEL_CREATE", `{"id":"1100000000000000008","type":0,"name":"w"}`),
		event("CHANNEL_UPDATE", `{"id":"1100000000000000008","type":0,"name":"x"}`),
		event("CHANNEL_DELETE", `{"id":"1100000000000000007"}`),
		event("GUILD_ROLE_CREATE", `{"role":{"id":"1100000000000000009","name":"r"}}`),
		event("GUILD_MEMBER_UPDATE", `{"user":{"id":"200000000000000001"},"nick":"n"}`),
		event("MESSAGE_CREATE", `{"content":"x"}`),
	} {
		if _, err := g.Publish(ctx, "", []Event{e}); err != nil {
			t.Fatal(e.Type, err)
		}
	}
	again := open(t, log, func(c *Config) { c.Name = g.state.layout.name })
	if a, b := picture(g), picture(again); a != b {
		t.Errorf("\n%s\nand from its log\n%s", a, b)
	}
	renamed := open(t, log, func(c *Config) { c.Name = "other" })
	if _, err := renamed.Publish(ctx, "", []Event{event("X", `{}`)}); err != nil {
		t.Fatal(err)
	}
	renamed.rename()
	if name := renamed.state.layout.name; name != "other" || log.Last() != renamed.Counts().LastSeq {
		t.Errorf("name %s", name)
	}
}

func picture(g *Guild) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return string(g.state.guildCreate(g.id, userID(1)).join()) + fmt.Sprint(len(g.state.members), string(g.state.members[userID(2)].object))
}

// blocking is a log whose Commit waits.
type blocking struct {
	guildlog.Log
	gate chan struct{}
}

func (b *blocking) Commit(c guildlog.Commit) error {
	<-b.gate
	return b.Log.Commit(c)
}

func TestTooMuchWaitsForTheLog(t *testing.T) {
	log := &blocking{guildlog.NewMemory(retention, time.Now), make(chan struct{}, 1)}
	log.gate <- struct{}{} // the birth
	g := open(t, log, nil)
	ctx, cancel := context.WithCancel(context.Background())
	results := make(chan error, 2*(maxPending+maxBatch))
	var group sync.WaitGroup
	for range cap(results) {
		group.Go(func() {
			_, err := g.Publish(ctx, "", []Event{event("X", `{}`)})
			results <- err
		})
	}
	// The actor has its batch, the queue is full, the others wait: until they give up.
	for deadline := time.Now().Add(20 * time.Second); len(g.commands) < maxPending; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the queue does not fill")
		}
	}
	cancel()
	if err := <-results; !errors.Is(err, ErrBusy) {
		t.Fatal(err)
	}
	close(log.gate)
	group.Wait()
	close(results)
	done := uint64(0)
	for err := range results {
		switch {
		case err == nil:
			done++
		case !errors.Is(err, ErrBusy):
			t.Error(err)
		}
	}
	if got := g.Counts().LastSeq - guildlog.First; got != done || done < maxPending {
		t.Errorf("%d events appended, %d requests carried out", got, done)
	}
}

// TestCloseWhilePublishing: each event was either appended and answered, or refused.
func TestCloseWhilePublishing(t *testing.T) {
	for range 20 {
		g := open(t, nil, nil)
		var group sync.WaitGroup
		var mu sync.Mutex
		var highest, answered uint64
		for range 8 {
			group.Go(func() {
				for {
					numbers, err := g.Publish(context.Background(), "", []Event{event("X", `{}`)})
					if err != nil {
						if !errors.Is(err, ErrClosed) {
							t.Error(err)
						}
						return
					}
					mu.Lock()
					answered++
					highest = max(highest, numbers[0])
					mu.Unlock()
				}
			})
		}
		var last uint64
		g.Close(func(seq uint64) []byte { last = seq; return bye(seq) })
		group.Wait()
		if g.Counts().LastSeq != last || highest > last || answered != last-guildlog.First {
			t.Fatalf("closed at %d, log at %d, %d answered up to %d", last, g.Counts().LastSeq, answered, highest)
		}
		g.Close(bye) // a second time
	}
}

func TestNumbersOfABatch(t *testing.T) {
	g := open(t, nil, nil)
	numbers, err := g.Publish(context.Background(), "", []Event{event("TYPING_START", `{}`), event("X", `{}`), event("TYPING_START", `{}`), event("X", `{}`)})
	if want := []uint64{2, 3, 3, 4}; err != nil || fmt.Sprint(numbers) != fmt.Sprint(want) {
		t.Errorf("%v %v", numbers, err)
	}
}

func TestKeysAreForgotten(t *testing.T) {
	for name, newLog := range map[string]func(t *testing.T, now func() time.Time) guildlog.Log{
		"in memory": func(_ *testing.T, now func() time.Time) guildlog.Log { return guildlog.NewMemory(retention, now) },
		"on disk":   func(t *testing.T, now func() time.Time) guildlog.Log { return onDisk(t, store.Options{Now: now}) },
	} {
		t.Run(name, func(t *testing.T) {
			var later atomic.Int64
			now := func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
			g := open(t, newLog(t, now), func(c *Config) { c.Now = now })
			publish := func(key, body string) uint64 {
				t.Helper()
				numbers, err := g.Publish(context.Background(), key, []Event{event("X", body)})
				if err != nil {
					t.Fatal(err)
				}
				return numbers[0]
			}
			first := publish("k", `{"n":1}`)
			later.Add(int64(guildlog.KeyLifetime - time.Minute))
			if again := publish("k", `{"n":1}`); again != first {
				t.Errorf("%d, and then %d", first, again)
			}
			if _, err := g.Publish(context.Background(), "k", []Event{event("X", `{"n":2}`)}); !errors.Is(err, ErrKeyReused) {
				t.Errorf("another body: %v", err)
			}
			later.Add(int64(time.Minute))
			if again := publish("k", `{"n":2}`); again == first {
				t.Error("a key older than a day is still known")
			}
		})
	}
}

// TestOneKeyInOneBatch: requests with the same key that come together are one.
func TestOneKeyInOneBatch(t *testing.T) {
	log := &blocking{guildlog.NewMemory(retention, time.Now), make(chan struct{}, 4)}
	log.gate <- struct{}{} // the birth
	g := open(t, log, nil)
	numbers := make(chan uint64, 20)
	var group sync.WaitGroup
	for range cap(numbers) {
		group.Go(func() {
			n, err := g.Publish(context.Background(), "k", []Event{event("X", `{}`)})
			if err != nil {
				t.Error(err)
				return
			}
			numbers <- n[0]
		})
	}
	close(log.gate)
	group.Wait()
	close(numbers)
	for n := range numbers {
		if n != guildlog.First+1 {
			t.Errorf("number %d", n)
		}
	}
}

// TestFullDisk: what would write is refused, everything else goes on, and when there is room again, all of it.
func TestFullDisk(t *testing.T) {
	disk := &disk{FS: vfs.NewMem()}
	g := open(t, onDisk(t, store.Options{FS: disk}), nil)
	publish := func(key, name, body string) error {
		_, err := g.Publish(context.Background(), key, []Event{event(name, body)})
		return err
	}
	if err := publish("k", "X", `{}`); err != nil {
		t.Fatal(err)
	}
	last := g.Counts().LastSeq
	disk.full.Store(true)
	for name, test := range map[string]struct {
		err  error
		want error
	}{
		"an event":                {publish("", "X", `{}`), ErrFull},
		"a join":                  {join(g, 1), ErrFull},
		"a key that is known":     {publish("k", "X", `{}`), nil},
		"a key with another body": {publish("k", "X", `{"n":2}`), ErrKeyReused},
		"what keeps nothing":      {publish("", "TYPING_START", `{}`), nil},
		"what is refused anyway":  {g.Leave(context.Background(), userID(2)), ErrNotFound},
	} {
		if !errors.Is(test.err, test.want) {
			t.Errorf("%s: %v, expected %v", name, test.err, test.want)
		}
	}
	if c := g.Counts(); c.LastSeq != last || c.Members != 0 {
		t.Errorf("%+v, expected nothing behind %d", c, last)
	}
	disk.full.Store(false)
	if err := errors.Join(join(g, 1), publish("", "X", `{}`)); err != nil {
		t.Error(err)
	}
	if c := g.Counts(); c.LastSeq != last+3 || c.Members != 1 {
		t.Errorf("%+v, expected a join and an event behind %d", c, last)
	}
}

// failing is a log that fails, from when it is told to.
type failing struct {
	guildlog.Log
	fail atomic.Bool
}

func (f *failing) Commit(c guildlog.Commit) error {
	if f.fail.Load() {
		return fmt.Errorf("%w: the disk is on fire", guildlog.ErrFailed)
	}
	return f.Log.Commit(c)
}

// TestFailedLog: what the disk may not have is neither answered nor shown, and nothing follows it.
func TestFailedLog(t *testing.T) {
	log := &failing{Log: guildlog.NewMemory(retention, time.Now)}
	g := open(t, log, nil)
	last := g.Counts().LastSeq
	log.fail.Store(true)
	if err := join(g, 1); !errors.Is(err, ErrUncertain) {
		t.Errorf("%v", err)
	}
	if c := g.Counts(); c.LastSeq != last || c.Members != 0 {
		t.Errorf("shown: %+v", c)
	}
	log.fail.Store(false)
	if err := join(g, 2); !errors.Is(err, ErrClosed) {
		t.Errorf("and then: %v", err)
	}
}

// TestNothingIsShownBeforeItIsDurable: while the log writes, readers go on with what was before.
func TestNothingIsShownBeforeItIsDurable(t *testing.T) {
	log := &blocking{guildlog.NewMemory(retention, time.Now), make(chan struct{}, 1)}
	log.gate <- struct{}{} // the birth
	var core *fanout.Core
	g := open(t, log, func(c *Config) { core = c.Core })
	done := make(chan error, 1)
	go func() { done <- join(g, 1) }()
	log.gate <- struct{}{} // taken by the join's commit, or lies there for it
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	before := g.Counts()
	go func() { done <- join(g, 2) }()
	c := newHearer(t, core, 1)
	if err := g.Identify(context.Background(), c.client, func(s Snapshot) {
		if s.Base != before.LastSeq {
			t.Errorf("a snapshot at %d, the last durable number is %d", s.Base, before.LastSeq)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if now := g.Counts(); now.LastSeq != before.LastSeq || now.Members != 1 {
		t.Errorf("%+v, and nothing was durable since %+v", now, before)
	}
	log.gate <- struct{}{}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	c.hears(fmt.Sprint("GUILD_MEMBER_ADD ", before.LastSeq+1))
}

func join(g *Guild, user int) error {
	_, _, err := g.Join(context.Background(), NewUser(userID(user), "u", false))
	return err
}

// disk can be full.
type disk struct {
	vfs.FS
	full atomic.Bool
}

func (d *disk) GetDiskUsage(string) (vfs.DiskUsage, error) {
	if d.full.Load() {
		return vfs.DiskUsage{AvailBytes: 1 << 20}, nil
	}
	return vfs.DiskUsage{AvailBytes: 1 << 40}, nil
}

func TestUsersWhoMayComeBackAreBounded(t *testing.T) {
	var r registry
	r.init()
	for i := range maxAway + 100 {
		r.left(userID(i))
	}
	if len(r.away) > maxAway {
		t.Errorf("%d", len(r.away))
	}
	if !r.joined(userID(maxAway+99)) || r.joined(userID(maxAway+99)) {
		t.Error("the last one was forgotten, or remembered behind the join")
	}
}

// TestOneMemberManySessions: what a user's sessions see follows the user.
func TestOneMemberManySessions(t *testing.T) {
	var core *fanout.Core
	g := open(t, nil, func(c *Config) { core = c.Core })
	var clients []Client
	for i := range 3 {
		server, peer := net.Pipe()
		go func() {
			buffer := make([]byte, 1024)
			for {
				if _, err := peer.Read(buffer); err != nil {
					return
				}
			}
		}()
		c := Client{Session: core.NewSession(server, func(error) {}), User: NewUser(userID(1), "u", false), Random: uint64(i)}
		defer c.Session.End(nil)
		if err := g.Identify(context.Background(), c, func(s Snapshot) {
			if s.Guild != nil {
				t.Error("a stranger sees the guild")
			}
		}); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	if c := g.Counts(); c.Sessions != 3 || c.Online != 1 {
		t.Errorf("%+v", c)
	}
	for _, c := range clients {
		g.Detach(c.Session, c.User.ID, c.Random)
		g.Detach(c.Session, c.User.ID, c.Random) // nothing more happens
	}
	if c := g.Counts(); c.Sessions != 0 || c.Online != 0 {
		t.Errorf("%+v", c)
	}
}

func TestGuildCreateGrowsWithTheGuild(t *testing.T) {
	g := open(t, nil, nil)
	ctx := context.Background()
	if _, _, err := g.Join(ctx, NewUser(userID(1), `a "quoted" <name>`, false)); err != nil {
		t.Fatal(err)
	}
	before := picture(g)
	if _, err := g.CreateChannel(ctx, NewChannel{Name: "new"}); err != nil {
		t.Fatal(err)
	}
	after := picture(g)
	if strings.Contains(before, `"new"`) || !strings.Contains(after, `"new"`) || !strings.Contains(after, `a \"quoted\" <name>`) {
		t.Errorf("%s\n%s", before, after)
	}
}
