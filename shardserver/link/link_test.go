package link

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/linkcert"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	guildID  snowflake.ID = 1100000000000000001
	patience              = 30 * time.Second
)

var retention = guildlog.Retention{Bytes: 64 << 20, Age: time.Hour}

func userID(n int) snowflake.ID { return snowflake.ID(200000000000000000 + uint64(n)) }

func user(n int) guild.User { return guild.NewUser(userID(n), fmt.Sprint("u", n), false) }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not in time:", what)
		}
	}
}

// hall is a guild with the shard's end of links, behind a listener that can cut connections.
type hall struct {
	t      *testing.T
	core   *fanout.Core
	guild  *guild.Guild
	server *Server
	certs  *certs
	listen *cutter
}

type certs struct{ shard, relay, other *linkcert.Files }

func newCerts(t *testing.T) *certs {
	pair, err := linkcert.NewAuthority("ns", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	authority, err := linkcert.ParseAuthority(pair)
	if err != nil {
		t.Fatal(err)
	}
	files := func(id linkcert.Identity) *linkcert.Files {
		p, err := authority.Issue(id, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := linkcert.Write(dir, p, pair.Cert); err != nil {
			t.Fatal(err)
		}
		f, err := linkcert.Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	return &certs{
		files(linkcert.Identity{Namespace: "ns", Shard: "a"}), files(linkcert.Identity{Namespace: "ns", Guild: guildID.String()}),
		files(linkcert.Identity{Namespace: "ns", Guild: "1"}),
	}
}

// cutter is a listener whose connections can be cut.
type cutter struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
}

func (c *cutter) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.mu.Lock()
		c.conns = append(c.conns, conn)
		c.mu.Unlock()
	}
	return conn, err
}

func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = nil
}

func newHall(t *testing.T, open bool) *hall {
	h := &hall{t: t, certs: newCerts(t)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.listen = &cutter{Listener: l}
	h.start(guildlog.NewMemory(retention, time.Now), open)
	h.server = NewServer(ServerOptions{Guild: func(id snowflake.ID) *guild.Guild {
		if id == guildID {
			return h.guild
		}
		return nil
	}, Logger: slog.New(slog.DiscardHandler)})
	s := &http.Server{Handler: h.server, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(tls.NewListener(h.listen, h.certs.shard.Server()))
	}()
	t.Cleanup(func() {
		h.server.Close()
		s.Close()
		h.listen.cut()
		<-done
		h.guild.Close(bye)
		h.core.Stop()
	})
	return h
}

func bye(uint64) []byte { return protocol.CloseFrame(protocol.CloseUnknownError, "bye") }

func (h *hall) start(log guildlog.Log, open bool) {
	h.core = fanout.New(fanout.Options{Workers: 1, Noop: protocol.Noop})
	c := guild.Config{
		ID: guildID, Name: "hall", Open: open, Retention: retention, Log: log, Core: h.core, IDs: &snowflake.Source{},
		Logger: slog.New(slog.DiscardHandler),
	}
	if log.Last() == 0 {
		if err := log.Commit(guild.Birth(c)); err != nil {
			h.t.Fatal(err)
		}
	}
	var err error
	if h.guild, err = guild.Open(c); err != nil {
		h.t.Fatal(err)
	}
}

func (h *hall) publish(name, body string, users ...snowflake.ID) uint64 {
	h.t.Helper()
	numbers, err := h.guild.Publish(context.Background(), "", []guild.Event{{Type: name, Data: json.RawMessage(body), Users: users}})
	if err != nil {
		h.t.Fatal(err)
	}
	return numbers[0]
}

// house is a relay.
type house struct {
	*Client
	t    *testing.T
	core *fanout.Core
	mu   sync.Mutex
	now  *guild.Guild
	end  func()
}

func (h *hall) relay(name string) *house {
	r := &house{t: h.t, core: fanout.New(fanout.Options{Workers: 1, Noop: protocol.Noop})}
	r.Client = NewClient(ClientOptions{
		Address: h.listen.Addr().String(), Name: name, TLS: h.certs.relay.Client(), Logger: slog.New(slog.DiscardHandler),
		Guild: guild.Config{ID: guildID, Core: r.core, Logger: slog.New(slog.DiscardHandler)},
		Changed: func(g *guild.Guild) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.now = g
		},
		Report: func() report.Relay {
			a := report.Relay{Version: "test"}
			if g := r.get(); g != nil {
				a.Sessions = int64(g.Counts().Sessions)
				round, asked := g.Moved()
				a.Round, a.Asked = round, int64(asked)
			}
			return a
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	var once sync.Once
	r.end = func() {
		once.Do(func() {
			cancel()
			<-done
			if g := r.get(); g != nil {
				g.Close(bye)
			}
			r.core.Stop()
		})
	}
	h.t.Cleanup(r.end)
	eventually(h.t, "the relay has the guild", func() bool { return r.get() != nil })
	return r
}

func (r *house) get() *guild.Guild {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now
}

// caughtUp waits until the relay has everything.
func (h *hall) caughtUp(r *house) {
	h.t.Helper()
	eventually(h.t, "the relay has everything", func() bool { return r.get().Counts().LastSeq == h.guild.Counts().LastSeq })
}

// client is a session that writes down what it hears.
type client struct {
	guild.Client
	t     *testing.T
	mu    sync.Mutex
	heard []string
	ended chan struct{}
}

func newClient(t *testing.T, core *fanout.Core, n int) *client {
	server, peer := net.Pipe()
	c := &client{t: t, ended: make(chan struct{})}
	session := core.NewSession(server, func(error) { close(c.ended) })
	c.Client = guild.Client{Session: session, User: user(n), Random: rand.Uint64(), Intents: 1<<26 - 1}
	go c.listen(peer)
	t.Cleanup(func() {
		session.End(nil)
		peer.Close()
		<-c.ended
	})
	return c
}

func (c *client) listen(peer net.Conn) {
	reader := bufio.NewReader(peer)
	for {
		head := make([]byte, 2)
		if _, err := io.ReadFull(reader, head); err != nil {
			return
		}
		size := uint64(head[1])
		wide := make([]byte, 8)
		switch size {
		case 126:
			if _, err := io.ReadFull(reader, wide[:2]); err != nil {
				return
			}
			size = uint64(binary.BigEndian.Uint16(wide))
		case 127:
			if _, err := io.ReadFull(reader, wide); err != nil {
				return
			}
			size = binary.BigEndian.Uint64(wide)
		}
		payload := make([]byte, size)
		if _, err := io.ReadFull(reader, payload); err != nil {
			return
		}
		var m struct {
			Op int
			T  string
			S  uint64
			D  json.RawMessage
		}
		if head[0]&0xf != 1 || json.Unmarshal(payload, &m) != nil || m.T == "GUILDHALL_NOOP" {
			continue
		}
		c.mu.Lock()
		c.heard = append(c.heard, fmt.Sprintf("%d %s %d %s", m.Op, m.T, m.S, m.D))
		c.mu.Unlock()
	}
}

func (c *client) all() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.heard)
}

// has waits until something was heard.
func (c *client) has(what string) {
	c.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		heard := c.all()
		if slices.ContainsFunc(heard, func(h string) bool { return strings.Contains(h, what) }) {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%q was not heard, but\n%s", what, strings.Join(heard, "\n"))
		}
	}
}

func (c *client) identify(g *guild.Guild) (base uint64, in bool) {
	c.t.Helper()
	if err := g.Identify(context.Background(), c.Client, func(s guild.Snapshot) { base, in = s.Base, s.Guild != nil }); err != nil {
		c.t.Fatal(err)
	}
	return base, in
}

// TestARelayIsLikeTheShard: sessions on a relay hear what those on the shard hear, byte for byte, while links are cut.
func TestARelayIsLikeTheShard(t *testing.T) {
	h := newHall(t, false)
	for range 20 {
		h.publish("MESSAGE_CREATE", `{"content":"before"}`)
	}
	if _, _, err := h.guild.Join(context.Background(), user(1)); err != nil {
		t.Fatal(err)
	}
	r := h.relay("r")
	h.caughtUp(r)
	there, here := newClient(t, r.core, 1), newClient(t, h.core, 1)
	if base, in := there.identify(r.get()); !in || base != h.guild.Counts().LastSeq {
		t.Fatalf("base %d, in the guild: %v", base, in)
	}
	here.identify(h.guild)
	// outsiders, of whom one comes in and leaves again
	outsideThere, outsideHere := newClient(t, r.core, 2), newClient(t, h.core, 2)
	if _, in := outsideThere.identify(r.get()); in {
		t.Fatal("user 2 is no member")
	}
	outsideHere.identify(h.guild)
	ctx := context.Background()
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 400 {
		switch random.IntN(12) {
		case 0:
			h.publish("TYPING_START", fmt.Sprintf(`{"n":%d}`, i))
		case 1:
			h.publish("SECRET", fmt.Sprintf(`{"n":%d}`, i), userID(1))
		case 2:
			_, _, _ = h.guild.Join(ctx, user(2))
		case 3:
			_ = h.guild.Leave(ctx, userID(2))
		case 4:
			_, _, _ = h.guild.Join(ctx, user(100+i))
		case 5:
			h.publish("CHANNEL_UPDATE", fmt.Sprintf(`{"id":"1100000000000000007","type":0,"name":"c%d"}`, i))
		case 6:
			if i%3 == 0 {
				h.listen.cut()
			}
		default:
			h.publish("MESSAGE_CREATE", fmt.Sprintf(`{"content":"%d"}`, i))
		}
	}
	h.publish("MESSAGE_CREATE", `{"content":"the end"}`)
	h.caughtUp(r)
	_ = h.guild.Leave(ctx, userID(2))
	if _, _, err := h.guild.Join(ctx, user(2)); err != nil {
		t.Fatal(err)
	}
	h.publish("MESSAGE_CREATE", `{"content":"the very end"}`)
	for _, pair := range [][2]*client{{there, here}, {outsideThere, outsideHere}} {
		pair[0].has("the very end")
		pair[1].has("the very end")
		// Typing may be lost with a link.
		logged := func(heard []string) []string {
			return slices.DeleteFunc(heard, func(s string) bool { return strings.Contains(s, "TYPING_START") })
		}
		a, b := logged(pair[0].all()), logged(pair[1].all())
		if !slices.Equal(a, b) {
			t.Errorf("on the relay\n%s\non the shard\n%s", strings.Join(a, "\n"), strings.Join(b, "\n"))
		}
	}
	if a, b := r.get().Counts(), h.guild.Counts(); a.Members != b.Members || a.LastSeq != b.LastSeq {
		t.Errorf("on the relay %+v, on the shard %+v", a, b)
	}
	eventually(t, "the shard knows of the relay's sessions", func() bool {
		c := h.guild.Counts()
		return c.Sessions == 4 && c.Online == 2 && c.Direct == 2
	})
}

// TestResumeOnAnother: a session goes on on another relay, or on the shard, where it was; the old connection ends.
func TestResumeOnAnother(t *testing.T) {
	h := newHall(t, true)
	a, b := h.relay("a"), h.relay("b")
	c := newClient(t, a.core, 1)
	base, in := c.identify(a.get())
	if !in {
		t.Fatal("not let in")
	}
	var seqs []uint64
	for i := range 5 {
		seqs = append(seqs, h.publish("MESSAGE_CREATE", fmt.Sprintf(`{"content":"m%d"}`, i)))
	}
	c.has("m4")
	last := c
	for name, to := range map[string]struct {
		core  *fanout.Core
		guild *guild.Guild
	}{"another relay": {b.core, b.get()}, "the shard": {h.core, h.guild}, "the first relay": {a.core, a.get()}} {
		eventually(t, "everything is there", func() bool { return to.guild.Counts().LastSeq == h.guild.Counts().LastSeq })
		next := newClient(t, to.core, 1)
		next.Random = c.Random
		if err := to.guild.Resume(context.Background(), next.Client, guild.Resumption{Log: h.guild.LogID(), Base: base, Seq: seqs[1]}, func(guild.Snapshot) {
			t.Errorf("%s: started afresh", name)
		}); err != nil {
			t.Fatal(name, err)
		}
		next.has("RESUMED")
		var want []string
		for _, heard := range c.all() {
			for _, seq := range seqs[2:] {
				if strings.Contains(heard, fmt.Sprintf(" MESSAGE_CREATE %d ", seq)) {
					want = append(want, heard)
				}
			}
		}
		if heard := next.all(); !slices.Equal(heard[:len(heard)-1], want) {
			t.Errorf("%s: heard %q, expected %q", name, heard, want)
		}
		select {
		case <-last.ended:
		case <-time.After(patience):
			t.Fatal(name, "the old connection is still there")
		}
		last = next
	}
	if c := h.guild.Counts(); c.Sessions != 1 {
		t.Errorf("%+v", c)
	}
}

// TestContentOnARelay: an app without MESSAGE_CONTENT reads on a relay what it reads on the shard, live and when it
// resumes on the other one.
func TestContentOnARelay(t *testing.T) {
	h := newHall(t, true)
	r := h.relay("r")
	app := func(core *fanout.Core, n int) *client {
		c := newClient(t, core, n)
		c.User.Bot = true
		c.Intents &^= protocol.IntentMessageContent
		return c
	}
	there, here := app(r.core, 1), app(h.core, 2)
	there.identify(r.get())
	base, _ := here.identify(h.guild)
	h.caughtUp(r)
	for i := range 40 {
		author, mentioned := userID(i%3), userID(i%5)
		h.publish("MESSAGE_CREATE", fmt.Sprintf(`{"content":"m%d","author":{"id":"%s"},"mentions":[{"id":"%s"}]}`, i, author, mentioned))
	}
	last := h.publish("MESSAGE_UPDATE", `{"id":"7","content":"now"}`)
	for _, c := range []*client{there, here} {
		c.has(fmt.Sprintf("MESSAGE_UPDATE %d ", last))
		for i := range 40 {
			reads := i%3 == int(c.User.ID-userID(0)) || i%5 == int(c.User.ID-userID(0))
			got := slices.ContainsFunc(c.all(), func(s string) bool { return strings.Contains(s, fmt.Sprintf(`"content":"m%d"`, i)) })
			if got != reads {
				t.Errorf("user %d has read message %d: %v", c.User.ID, i, got)
			}
		}
	}
	elsewhere, back := app(h.core, 1), app(r.core, 2)
	for c, to := range map[*client]struct {
		guild *guild.Guild
		was   *client
	}{elsewhere: {h.guild, there}, back: {r.get(), here}} {
		c.Random = to.was.Random
		if err := to.guild.Resume(context.Background(), c.Client, guild.Resumption{Log: h.guild.LogID(), Base: base, Seq: base}, func(guild.Snapshot) {
			t.Error("started afresh")
		}); err != nil {
			t.Fatal(err)
		}
		c.has("RESUMED")
		behind := func(heard []string) []string {
			return slices.DeleteFunc(heard, func(s string) bool {
				var op, seq uint64
				var name string
				fmt.Sscan(s, &op, &name, &seq)
				return seq <= base || name == "RESUMED"
			})
		}
		if got, want := behind(c.all()), behind(to.was.all()); !slices.Equal(got, want) {
			t.Errorf("user %d:\n%s\nwas sent\n%s", c.User.ID, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestAFollowerThatFallsBehind reads the log until it has caught up, and misses nothing.
func TestAFollowerThatFallsBehind(t *testing.T) {
	h := newHall(t, true)
	feed, begin := h.guild.NewFeed(h.guild.LogID(), h.guild.Counts().LastSeq)
	defer feed.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	next := begin + 1
	take := func(until uint64) {
		t.Helper()
		for next <= until {
			items, err := feed.Next(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, item := range items {
				for _, r := range item.Records {
					if r.Seq != next {
						t.Fatalf("record %d, expected %d", r.Seq, next)
					}
					next = r.End() + 1
				}
			}
		}
	}
	take(h.publish("X", `{}`))
	long := `{"x":"` + strings.Repeat("x", 200<<10) + `"}`
	for range 3 {
		for range 60 { // more than a feed keeps
			h.publish("X", long)
		}
		feed.Tell(guild.Order{Round: 1})
		take(h.publish("X", `{}`))
		take(h.publish("X", `{}`))
	}
}

// TestAnotherLog: when the shard has begun another log, the relay does, too, and its sessions end.
func TestAnotherLog(t *testing.T) {
	h := newHall(t, true)
	r := h.relay("r")
	c := newClient(t, r.core, 1)
	c.identify(r.get())
	before, old := r.get(), h.guild
	oldCore := h.core
	h.start(guildlog.NewMemory(retention, time.Now), true)
	old.Close(bye)
	oldCore.Stop()
	h.listen.cut()
	eventually(t, "another guild", func() bool { return r.get() != before })
	if r.get().LogID() != h.guild.LogID() {
		t.Error("the log is another one")
	}
	<-c.ended
	again := newClient(t, r.core, 1)
	if err := r.get().Resume(context.Background(), again.Client, guild.Resumption{Log: before.LogID(), Seq: 2}, nil); err != guild.ErrNotResumable {
		t.Error(err)
	}
	if _, in := again.identify(r.get()); !in {
		t.Error("not let in")
	}
}

func TestOrdersAndReports(t *testing.T) {
	h := newHall(t, true)
	r := h.relay("r")
	var clients []*client
	for n := range 10 {
		c := newClient(t, r.core, n)
		c.identify(r.get())
		clients = append(clients, c)
	}
	uid := func(snowflake.ID) string { return "uid" }
	eventually(t, "a report", func() bool {
		l := h.server.Relays(uid)
		return len(l) == 1 && l[0].Attached && l[0].Sessions == 10 && l[0].AgeMillis < 5000 && l[0].GuildUID == "uid" && l[0].Name == "r"
	})
	asked := func() (n int) {
		for _, c := range clients {
			if slices.ContainsFunc(c.all(), func(s string) bool { return strings.HasPrefix(s, "7 ") }) {
				n++
			}
		}
		return n
	}
	time.Sleep(2 * time.Millisecond) // sessions of the round's own millisecond are not asked
	if err := h.server.Order(guildID, "r", guild.Order{Round: 1, Leave: 4, PerSecond: 1000}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "four are asked", func() bool { return asked() == 4 })
	if err := h.server.Order(guildID, "r", guild.Order{Round: 1, Leave: 4, PerSecond: 1000}); err != nil {
		t.Fatal(err)
	}
	if err := h.server.Order(guildID, "r", guild.Order{Round: 0, Leave: 9, PerSecond: 1000}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the report says so", func() bool {
		l := h.server.Relays(uid)
		return l[0].Round == 1 && l[0].Asked == 4
	})
	if n := asked(); n != 4 {
		t.Errorf("%d were asked", n)
	}
	if err := h.server.Order(guildID, "r", guild.Order{Round: 2, All: true, PerSecond: 1000}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all are asked", func() bool { return asked() == 10 })
	if err := h.server.Order(guildID, "none", guild.Order{Round: 2, All: true, PerSecond: 1000}); err == nil {
		t.Error("an order for a relay that does not exist")
	}
	r.end()
	eventually(t, "the link is down", func() bool { return !h.server.Relays(uid)[0].Attached })
}

// TestTheNewestConnectionStays: a session has come back elsewhere while a relay had no link, and the relay did not notice.
func TestTheNewestConnectionStays(t *testing.T) {
	h := newHall(t, true)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	follow := func() *guild.Feed {
		feed, _ := h.guild.NewFeed(h.guild.LogID(), h.guild.Counts().LastSeq)
		t.Cleanup(feed.Close)
		return feed
	}
	evicted := func(feed *guild.Feed) (list []guild.Evict) {
		t.Helper()
		feed.Tell(guild.Order{})
		for {
			items, err := feed.Next(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, item := range items {
				switch m := item.Message.(type) {
				case guild.Evict:
					list = append(list, m)
				case guild.Order:
					return list
				}
			}
		}
	}
	a, b := follow(), follow()
	a.Attach(ctx, guild.Attachment{User: user(1), Random: 7, Nonce: 1})
	a.Close()
	b.Attach(ctx, guild.Attachment{User: user(1), Random: 7, Nonce: 2})
	// The relay's link comes up again.
	again := follow()
	again.Reattach([]guild.Attached{{Random: 7, User: userID(1), Nonce: 1, Age: 60_000}, {Random: 8, User: userID(2), Nonce: 3, Age: 60_000}})
	a.Forget()
	if got, want := evicted(again), []guild.Evict{{Random: 7, Nonce: 1}}; !slices.Equal(got, want) {
		t.Errorf("on the relay %v are ended, expected %v", got, want)
	}
	if got := evicted(b); got != nil {
		t.Errorf("elsewhere %v are ended", got)
	}
	// The other one's link, too: it has the newer connection.
	b.Close()
	former := b
	b = follow()
	b.Reattach([]guild.Attached{{Random: 7, User: userID(1), Nonce: 2, Age: 10}})
	former.Forget()
	if got := append(evicted(again), evicted(b)...); got != nil {
		t.Errorf("%v are ended", got)
	}
	if c := h.guild.Counts(); c.Sessions != 2 || c.Online != 2 {
		t.Errorf("%+v", c)
	}
}

// TestLeavingWhileTheLinkComesUp: whoever leaves then is not counted for ever.
func TestLeavingWhileTheLinkComesUp(t *testing.T) {
	h := newHall(t, true)
	r := h.relay("r")
	for range 4 {
		var clients []*client
		for n := range 10 {
			c := newClient(t, r.core, n)
			c.identify(r.get())
			clients = append(clients, c)
		}
		h.listen.cut()
		for _, c := range clients {
			c.Session.End(nil)
			<-c.ended
			r.get().Detach(c.Session, c.User.ID, c.Random)
		}
		eventually(t, "nobody is left", func() bool { return h.guild.Counts().Sessions == 0 })
	}
}

func TestADrainIsNotCalledOff(t *testing.T) {
	h := newHall(t, true)
	c := newClient(t, h.core, 1)
	c.identify(h.guild)
	if !h.guild.Move(guild.Order{Round: 1, All: true}) {
		t.Error("an order was not taken")
	}
	h.guild.Drain(1000)
	if h.guild.Move(guild.Order{Round: 2, PerSecond: 1000}) {
		t.Error("an order was taken behind a drain")
	}
	c.has("7 ")
	if !h.guild.Draining() {
		t.Error("does not drain")
	}
}

func TestWhoIsNotLetIn(t *testing.T) {
	h := newHall(t, true)
	dial := func(files *linkcert.Files, path string) string {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: files.Client()}}
		defer client.CloseIdleConnections()
		response, err := client.Get("https://" + h.listen.Addr().String() + path)
		if err != nil {
			return "refused"
		}
		defer response.Body.Close()
		return response.Status[:3]
	}
	for name, test := range map[string]struct {
		files *linkcert.Files
		path  string
		want  string
	}{
		"a relay of another guild": {h.certs.other, Path + guildID.String() + "?name=x", "403"},
		"a shard":                  {h.certs.shard, Path + guildID.String() + "?name=x", "refused"},
		"without a name":           {h.certs.relay, Path + guildID.String(), "400"},
		"of no guild":              {h.certs.relay, Path + "x?name=x", "404"},
	} {
		if got := dial(test.files, test.path); got != test.want {
			t.Errorf("%s: %s, expected %s", name, got, test.want)
		}
	}
}

// FuzzParts: whatever comes over a link, it is read or refused.
func FuzzParts(f *testing.F) {
	f.Add(appendState(appendRecord(nil, partRecord, &guildlog.Record{Seq: 5, Type: "X", Data: []byte("{}"), Users: []snowflake.ID{1}}, 3),
		&guild.State{Seq: 5, Members: 2, Rows: []guildlog.Row{{Key: []byte("n"), Value: []byte("v")}}}))
	f.Add([]byte{partRecord, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, message []byte) {
		_ = parts(message, func(kind byte, content []byte) error {
			switch kind {
			case partRecord:
				r, prev, err := readRecord(content)
				if err == nil && r.Seq <= prev {
					t.Errorf("record %d follows %d", r.Seq, prev)
				}
			case partState:
				s, err := readState(content)
				if err != nil {
					return err
				}
				again, err := readState(appendState(nil, &s)[stateHead(&s):])
				if err != nil || len(again.Rows) != len(s.Rows) || again.Seq != s.Seq || again.Members != s.Members {
					t.Errorf("%+v is %+v when written, %v", s, again, err)
				}
			}
			return nil
		})
	})
}

// stateHead is the size of a part's letter and length.
func stateHead(s *guild.State) int {
	var content []byte
	_ = parts(appendState(nil, s), func(_ byte, c []byte) error { content = c; return nil })
	return len(appendState(nil, s)) - len(content)
}
