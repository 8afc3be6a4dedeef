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
	"testing"
	"time"

	"go.uber.org/goleak"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testID snowflake.ID = 1100000000000000001

func userID(n int) snowflake.ID { return snowflake.ID(200000000000000000 + uint64(n)) }

var retention = guildlog.Retention{Bytes: 16 << 20, Age: time.Hour}

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
func TestStateIsAFunctionOfTheLog(t *testing.T) {
	ctx := context.Background()
	log := guildlog.NewMemory(retention, time.Now)
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
	again := open(t, log, func(c *Config) { c.Name = g.state.name })
	if a, b := picture(g), picture(again); a != b {
		t.Errorf("\n%s\nand from its log\n%s", a, b)
	}
	renamed := open(t, log, func(c *Config) { c.Name = "other" })
	if renamed.state.name != "other" || log.Last() != renamed.Counts().LastSeq {
		t.Errorf("name %s", renamed.state.name)
	}
}

func picture(g *Guild) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return string(g.state.guildCreate(g.id, userID(1)).join()) + fmt.Sprint(len(g.state.members), string(g.state.members[userID(2)].object))
}

// blocking is a log whose Append waits.
type blocking struct {
	guildlog.Log
	gate chan struct{}
}

func (b *blocking) Append(records []guildlog.Record) error {
	<-b.gate
	return b.Log.Append(records)
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
	now := time.Now()
	g := open(t, nil, func(c *Config) { c.Now = func() time.Time { return now } })
	publish := func(key, body string) uint64 {
		t.Helper()
		numbers, err := g.Publish(context.Background(), key, []Event{event("X", body)})
		if err != nil {
			t.Fatal(err)
		}
		return numbers[0]
	}
	first := publish("k", `{"n":1}`)
	now = now.Add(keyLifetime - time.Second)
	if again := publish("k", `{"n":1}`); again != first {
		t.Errorf("%d, and then %d", first, again)
	}
	now = now.Add(time.Second)
	if again := publish("k", `{"n":2}`); again == first {
		t.Error("a key older than a day is still known")
	}
}

func TestKeyTableIsBounded(t *testing.T) {
	now := time.Now()
	for name, test := range map[string]struct {
		answer int
		keys   int
	}{
		"by number": {0, maxKeys + 500},
		"by bytes":  {maxKeyBytes / 100, 500},
	} {
		t.Run(name, func(t *testing.T) {
			var table keyTable
			for i := range test.keys {
				table.put(fmt.Sprint(i), [32]byte{}, nil, make([]byte, test.answer), now)
			}
			bytes := 0
			for key, e := range table.entries {
				bytes += e.size(key)
			}
			if len(table.entries) > maxKeys || table.bytes > maxKeyBytes || bytes != table.bytes || len(table.order) != len(table.entries) {
				t.Errorf("%d entries, %d of %d bytes, %d in order", len(table.entries), table.bytes, bytes, len(table.order))
			}
			if _, found, _ := table.find(fmt.Sprint(test.keys-1), [32]byte{}, now); !found {
				t.Error("the newest key was forgotten")
			}
			if _, found, _ := table.find("0", [32]byte{}, now); found {
				t.Error("the oldest key is still there")
			}
		})
	}
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
		g.Detach(c)
		g.Detach(c) // nothing more happens
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
