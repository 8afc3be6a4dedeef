package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/goleak"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/directory"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/poll"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

// poller of the worlds; nil: a goroutine per connection reads.
var poller *poll.Poller

// TestMain runs the tests twice: with a poller, where the system has one, and without.
func TestMain(m *testing.M) { goleak.VerifyTestMain(bothWays{m}) }

type bothWays struct{ *testing.M }

func (b bothWays) Run() int {
	var err error
	if poller, err = poll.New(); err == nil {
		code := b.M.Run()
		poller.Close()
		if code != 0 {
			return code
		}
		fmt.Println("again, with a goroutine per connection")
	}
	poller = nil
	return b.M.Run()
}

const (
	guildID   snowflake.ID = 1100000000000000001
	allEvents              = 1<<26 - 1
	patience               = 20 * time.Second // what a test waits for what must come
)

// world is a gateway over real sockets, with one guild unless a test asks for none.
type world struct {
	t         *testing.T
	keys      *token.Keys
	core      *fanout.Core
	directory *directory.Directory
	gateway   *Gateway
	server    *httptest.Server
}

// setup of a world.
type setup struct {
	times       func(*times)
	hold        time.Duration
	membersOnly bool
	unplaced    bool
	remote      string // address of another pod
	shard       v1.GuildShardSpec
}

func newWorld(t *testing.T, s setup) *world {
	t.Helper()
	keys, err := token.ParseKeys(token.GenerateKey(), "")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, keys: keys}
	w.core = fanout.New(fanout.Options{
		Noop:    protocol.Noop,
		Overrun: func() []byte { return protocol.CloseFrame(protocol.CloseUnknownError, "fell too far behind") },
	})
	w.directory = newDirectory(w.core, s.remote)
	w.gateway = New(Options{
		Directory: w.directory, Core: w.core, Poller: poller, Keys: func() *token.Keys { return w.keys }, HoldTime: s.hold,
	})
	if s.times != nil {
		s.times(&w.gateway.times)
	}
	w.server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		id, err := snowflake.Parse(strings.Trim(strings.TrimPrefix(r.URL.Path, "/g/"), "/"))
		if err != nil {
			http.NotFound(rw, r)
			return
		}
		w.gateway.Serve(rw, r, id)
	}))
	t.Cleanup(func() {
		if !w.gateway.quitting() {
			w.gateway.times.reconnect = 0
			w.gateway.Drain(context.Background())
		}
		w.directory.Stop()
		w.server.Close()
		w.core.Stop()
	})
	w.directory.ApplyShard(&v1.GuildShard{ObjectMeta: metav1.ObjectMeta{Name: "a", UID: "uid-a"}, Spec: s.shard})
	if !s.unplaced {
		w.place("a", s.membersOnly)
	}
	w.directory.SetSynced()
	return w
}

func newDirectory(core *fanout.Core, remote string) *directory.Directory {
	return directory.New(directory.Options{
		ShardName: "a", ShardUID: "uid-a", Core: core, Logger: slog.New(slog.DiscardHandler),
		Load:       func() report.Load { return report.Load{} },
		PodAddress: func(string) string { return remote },
	})
}

// place applies the guild as placed on a shard.
func (w *world) place(shard string, membersOnly bool) *v1.Guild {
	g := guildOn(shard, membersOnly)
	w.directory.Apply(g)
	return g
}

func guildOn(shard string, membersOnly bool) *v1.Guild {
	g := &v1.Guild{ObjectMeta: metav1.ObjectMeta{Name: "hall", Namespace: "ns", UID: types.UID("uid-hall")}}
	g.Spec.Access.Join = v1.JoinOpen
	if membersOnly {
		g.Spec.Access.Join = v1.JoinMembersOnly
	}
	g.Status.ID = guildID.String()
	g.Status.Placement = &v1.GuildPlacementStatus{ShardName: shard, ShardUID: "uid-" + shard}
	return g
}

func (w *world) guild() *guild.Guild {
	w.t.Helper()
	place, _ := w.directory.Find(guildID)
	if place.Guild == nil {
		w.t.Fatal("the guild is not here")
	}
	return place.Guild
}

func user(n int) snowflake.ID { return snowflake.ID(200000000000000000 + uint64(n)) }

// bot is the id of a user whose token says that it is a bot.
func bot(n int) snowflake.ID { return firstBot + snowflake.ID(n) }

const firstBot snowflake.ID = 300000000000000000

func (w *world) token(id snowflake.ID) string {
	w.t.Helper()
	issued, err := w.keys.Issue(token.Claims{User: id, Name: fmt.Sprint("user", id), Bot: id >= firstBot})
	if err != nil {
		w.t.Fatal(err)
	}
	return issued
}

// publish appends an event and returns its number.
func (w *world) publish(kind, body string, users ...snowflake.ID) uint64 {
	w.t.Helper()
	numbers, err := w.guild().Publish(context.Background(), "", []guild.Event{{Type: kind, Data: json.RawMessage(body), Users: users}})
	if err != nil {
		w.t.Fatal(err)
	}
	return numbers[0]
}

// say publishes a message with that content.
func (w *world) say(content string) uint64 {
	w.t.Helper()
	return w.publish("MESSAGE_CREATE", fmt.Sprintf(`{"content":%q}`, content))
}

func (w *world) join(id snowflake.ID) uint64 {
	w.t.Helper()
	if _, _, err := w.guild().Join(context.Background(), guild.NewUser(id, "joiner", false)); err != nil {
		w.t.Fatal(err)
	}
	return w.guild().Counts().LastSeq
}

func (w *world) leave(id snowflake.ID) uint64 {
	w.t.Helper()
	if err := w.guild().Leave(context.Background(), id); err != nil {
		w.t.Fatal(err)
	}
	return w.guild().Counts().LastSeq
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("not in time:", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// message is what a client receives.
type message struct {
	Op  int             `json:"op"`
	T   *string         `json:"t"`
	Seq *uint64         `json:"s"`
	D   json.RawMessage `json:"d"`
	raw string
}

func (m message) String() string { return m.raw }

// client is a real WebSocket client.
type client struct {
	t       *testing.T
	w       *world
	ws      *websocket.Conn
	session string
	seq     uint64
}

const query = "?v=10&encoding=json"

func (w *world) dial(query string) *client {
	w.t.Helper()
	ws, response, err := websocket.DefaultDialer.Dial(strings.Replace(w.server.URL, "http", "ws", 1)+"/g/"+guildID.String()+"/"+query, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	response.Body.Close()
	w.t.Cleanup(func() { ws.Close() })
	return &client{t: w.t, w: w, ws: ws}
}

// connect dials and takes HELLO.
func (w *world) connect() *client {
	w.t.Helper()
	c := w.dial(query)
	c.op(protocol.OpHello)
	return c
}

// enter connects and identifies with all intents, and takes READY and GUILD_CREATE.
func (w *world) enter(id snowflake.ID) *client {
	w.t.Helper()
	c := w.connect()
	c.identify(id, allEvents)
	c.dispatch("GUILD_CREATE")
	return c
}

func (c *client) send(raw string) {
	c.t.Helper()
	if err := c.ws.WriteMessage(websocket.TextMessage, []byte(raw)); err != nil {
		c.t.Fatal(err)
	}
}

// identify identifies and takes READY.
func (c *client) identify(id snowflake.ID, intents uint64) message {
	c.t.Helper()
	c.send(fmt.Sprintf(`{"op":2,"d":{"token":%q,"intents":%d,"properties":{}}}`, c.w.token(id), intents))
	return c.ready()
}

func (c *client) ready() message {
	c.t.Helper()
	m := c.dispatch("READY")
	var d struct {
		SessionID string `json:"session_id"`
	}
	c.decode(m, &d)
	c.session = d.SessionID
	return m
}

// resume connects anew and resumes from number seq.
func (c *client) resume(id snowflake.ID, seq uint64) *client {
	c.t.Helper()
	n := c.w.connect()
	n.session = c.session
	n.sendResume(id, c.session, seq)
	return n
}

func (c *client) sendResume(id snowflake.ID, session string, seq uint64) {
	c.t.Helper()
	c.send(fmt.Sprintf(`{"op":6,"d":{"token":%q,"session_id":%q,"seq":%d}}`, c.w.token(id), session, seq))
}

func (c *client) decode(m message, v any) {
	c.t.Helper()
	if err := json.Unmarshal(m.D, v); err != nil {
		c.t.Fatalf("%v in %s", err, m)
	}
}

// receive takes the next message.
func (c *client) receive() (message, error) {
	c.ws.SetReadDeadline(time.Now().Add(patience))
	kind, payload, err := c.ws.ReadMessage()
	if err != nil {
		return message{}, err
	}
	m := message{raw: string(payload)}
	if err := json.Unmarshal(payload, &m); err != nil || kind != websocket.TextMessage {
		return m, fmt.Errorf("%w in message of type %d: %s", err, kind, payload)
	}
	return m, nil
}

func (c *client) next() message {
	c.t.Helper()
	m, err := c.receive()
	if err != nil {
		c.t.Fatal(err)
	}
	if m.Op == protocol.OpDispatch {
		if m.Seq == nil || *m.Seq < c.seq {
			c.t.Fatalf("the number fell behind %d: %s", c.seq, m)
		}
		c.seq = *m.Seq
	} else if m.Seq != nil || m.T != nil {
		c.t.Fatalf("s and t belong to dispatches: %s", m)
	}
	return m
}

// op takes the next message, which must be of that opcode.
func (c *client) op(op int) message {
	c.t.Helper()
	m := c.next()
	if m.Op != op {
		c.t.Fatalf("expected op %d, got %s", op, m)
	}
	return m
}

// dispatch takes the next message, which must be that event.
func (c *client) dispatch(event string) message {
	c.t.Helper()
	m := c.op(protocol.OpDispatch)
	if m.T == nil || *m.T != event {
		c.t.Fatalf("expected %s, got %s", event, m)
	}
	return m
}

// at takes the next message, which must be that event with that number.
func (c *client) at(seq uint64, event string) message {
	c.t.Helper()
	m := c.dispatch(event)
	if *m.Seq != seq {
		c.t.Fatalf("expected %s at %d, got %s", event, seq, m)
	}
	return m
}

// hears takes the next message, which must be a MESSAGE_CREATE with that content.
func (c *client) hears(content string) message {
	c.t.Helper()
	m := c.dispatch("MESSAGE_CREATE")
	var d struct {
		Content string `json:"content"`
	}
	c.decode(m, &d)
	if d.Content != content {
		c.t.Fatalf("expected message %q, got %s", content, m)
	}
	return m
}

// closed takes the close message, and nothing before it.
func (c *client) closed(code int) {
	c.t.Helper()
	m, err := c.receive()
	var closed *websocket.CloseError
	if !errors.As(err, &closed) || closed.Code != code {
		c.t.Fatalf("expected close %d, got %v %v", code, err, m)
	}
	if code >= 4000 && code < 4100 && closed.Text == "" {
		c.t.Errorf("close %d has no reason", code)
	}
}

// hangUp closes with a code and waits until the server has answered and let go.
func (c *client) hangUp(code int) {
	c.t.Helper()
	c.gone(func() {
		payload := websocket.FormatCloseMessage(code, "")
		if err := c.ws.WriteControl(websocket.CloseMessage, payload, time.Now().Add(patience)); err != nil {
			c.t.Fatal(err)
		}
		c.closed(code)
	})
}

// cut drops the socket and waits until the server has noticed.
func (c *client) cut() {
	c.t.Helper()
	c.gone(func() { c.ws.Close() })
}

func (c *client) gone(how func()) {
	c.t.Helper()
	before := c.w.gateway.Connections()
	how()
	eventually(c.t, "the server forgets a connection", func() bool { return c.w.gateway.Connections() < before })
}

func quantity(s string) *resource.Quantity {
	q := resource.MustParse(s)
	return &q
}
