package gateway

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/token"
)

func TestHeldUntilTheGuildIsThere(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{unplaced: true})
	c := w.dial(query)
	eventually(t, "the client is held", func() bool { return w.gateway.Held() == 1 })
	w.place("a", false)
	c.op(protocol.OpHello)
	c.identify(user(1), allEvents)
	if w.gateway.Held() != 0 {
		t.Error("still held")
	}
}

func TestHeldForALimitedTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{unplaced: true, hold: 50 * time.Millisecond})
	w.dial(query).closed(protocol.CloseUnknownError)
	eventually(t, "the connection is forgotten", func() bool { return w.gateway.Connections() == 0 })
}

func TestHeldClientsThatGoAwayAreForgotten(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{unplaced: true, hold: 300 * time.Millisecond})
	c := w.dial(query)
	eventually(t, "the client is held", func() bool { return w.gateway.Held() == 1 })
	c.cut()
}

func TestALimitedNumberIsHeld(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{unplaced: true})
	w.gateway.maxHeld = 8 // a quarter of them for guilds that are not placed
	w.dial(query)
	w.dial(query)
	eventually(t, "both are held", func() bool { return w.gateway.Held() == 2 })
	_, response, err := websocket.DefaultDialer.Dial(strings.Replace(w.server.URL, "http", "ws", 1)+"/g/"+guildID.String()+"/", nil)
	if err == nil || response.StatusCode != http.StatusServiceUnavailable {
		t.Fatal(err, response)
	}
}

func TestHeldWhileTheServerIsFull(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{shard: v1.GuildShardSpec{Capacity: v1.ShardCapacity{Sessions: 1}}})
	first := w.enter(user(1))
	second := w.dial(query)
	eventually(t, "the second is held", func() bool { return w.gateway.Held() == 1 })
	first.cut()
	second.op(protocol.OpHello)
	second.identify(user(2), allEvents)
	if n := w.gateway.Sessions(); n != 1 {
		t.Errorf("%d sessions", n)
	}
}

// TestAFullShardLetsSessionsComeBack: they take over from connections that are dead, but not missed yet.
func TestAFullShardLetsSessionsComeBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{hold: 2 * time.Second, shard: v1.GuildShardSpec{Capacity: v1.ShardCapacity{Sessions: 1}}})
	sealed := w.keys.Seal(token.Session{Log: w.guild().LogID(), Base: 2, User: user(2), Random: 7})
	old := w.enter(user(1))
	missed := w.say("missed")
	back := old.resume(user(1), missed-1)
	back.at(missed, "MESSAGE_CREATE")
	back.dispatch("RESUMED")
	eventually(t, "the old connection ends", func() bool { return w.gateway.Connections() == 1 && w.gateway.Sessions() == 1 })
	for name, ask := range map[string]func(c *client){
		"another one":        func(c *client) { c.send(fmt.Sprintf(`{"op":2,"d":{"token":%q,"intents":0}}`, w.token(user(2)))) },
		"a session long ago": func(c *client) { c.sendResume(user(2), sealed, 2) },
	} {
		c := w.connect()
		ask(c)
		if m, err := c.receive(); !websocket.IsCloseError(err, protocol.CloseUnknownError) {
			t.Errorf("%s: %v %v", name, m, err)
		}
	}
	eventually(t, "the others are gone", func() bool { return w.gateway.extra.Load() == 0 })
}

func TestDrain(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{membersOnly: true, times: func(d *times) { d.reconnect = 500 * time.Millisecond }})
	w.join(user(1))
	w.join(user(2))
	session, resumed, waiting := w.enter(user(1)), w.enter(user(2)), w.connect()
	resumed.cut()
	seq := w.say("missed")
	session.hears("missed")
	resumed = resumed.resume(user(2), resumed.seq) // op 7 must not overtake RESUMED

	var drained sync.WaitGroup
	drained.Go(func() { w.gateway.Drain(context.Background()) })
	session.op(protocol.OpReconnect)
	resumed.hears("missed")
	resumed.at(seq, "RESUMED")
	late := w.dial(query) // is held, not served
	// A session that obeys comes back, too early: it is held as well.
	session.hangUp(4200)
	w.dial(query).closed(protocol.CloseUnknownError)

	waiting.closed(protocol.CloseUnknownError) // without op 7: it has no session
	late.closed(protocol.CloseUnknownError)
	for {
		m, err := resumed.receive()
		if websocket.IsCloseError(err, protocol.CloseUnknownError) {
			break
		}
		if err != nil || m.Op != protocol.OpReconnect {
			t.Fatal(err, m)
		}
	}
	drained.Wait()
	if n := w.gateway.Connections() + w.gateway.Sessions() + w.gateway.Held(); n != 0 {
		t.Errorf("%d connections left", n)
	}
	w.dial(query).closed(protocol.CloseUnknownError)
}

func TestDrainWithoutConnectionsIsQuick(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{times: func(d *times) { d.reconnect = time.Hour }})
	w.gateway.Drain(context.Background())
}

func TestDrainEndsWithItsContext(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{times: func(d *times) { d.reconnect = time.Hour }})
	c := w.enter(user(1))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	w.gateway.Drain(ctx)
	if m, err := c.receive(); err == nil && m.Op != protocol.OpReconnect {
		t.Errorf("%s", m)
	}
	eventually(t, "the connection is gone", func() bool { return w.gateway.Connections() == 0 })
}

// TestIdentifyWhileDraining: sessions that start as the server stops are closed too, and none
// is told to reconnect before its first dispatch.
func TestIdentifyWhileDraining(t *testing.T) {
	t.Parallel()
	for range 5 {
		w := newWorld(t, setup{times: func(d *times) { d.reconnect = time.Millisecond }})
		clients := make([]*client, 20)
		for i := range clients {
			clients[i] = w.connect()
		}
		var group sync.WaitGroup
		for i, c := range clients {
			group.Go(func() {
				c.ws.WriteMessage(websocket.TextMessage, []byte(`{"op":2,"d":{"token":"`+w.token(user(i))+`","intents":1}}`))
				dispatched := false
				for {
					m, err := c.receive()
					if err != nil {
						if !websocket.IsCloseError(err, protocol.CloseUnknownError) {
							t.Error(err)
						}
						return
					}
					if m.Op == protocol.OpReconnect && !dispatched {
						t.Error("op 7 before the first dispatch")
					}
					dispatched = dispatched || m.Op == protocol.OpDispatch
				}
			})
		}
		w.gateway.Drain(context.Background())
		group.Wait()
	}
}

var stranger = guild.NewUser(user(99), "stranger", false)

func TestTheGuildMovesAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{hold: 100 * time.Millisecond, remote: "127.0.0.1:1"})
	c := w.enter(user(1))
	g := w.guild()
	w.place("b", false)
	c.op(protocol.OpReconnect)
	c.closed(protocol.CloseUnknownError)
	if _, _, err := g.Join(context.Background(), stranger); err == nil {
		t.Error("the guild still takes commands")
	}
	w.dial(query).closed(protocol.CloseUnknownError) // nobody is at home there

	w.place("a", false) // it comes back, as another log
	n := w.connect()
	n.sendResume(user(1), c.session, c.seq)
	n.op(protocol.OpInvalidSession)
}

func TestTheGuildIsDeleted(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	stop := make(chan struct{})
	var publishing sync.WaitGroup
	publishing.Go(func() { // the numbers must not fall back in the end
		for {
			select {
			case <-stop:
				return
			default:
			}
			if place, _ := w.directory.Find(guildID); place.Guild != nil {
				place.Guild.Join(context.Background(), stranger)
				place.Guild.Leave(context.Background(), stranger.ID)
			}
		}
	})
	g := guildOn("a", false)
	g.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	w.directory.Apply(g)
	close(stop)
	publishing.Wait()
	for {
		m := c.next()
		if *m.T == "GUILD_DELETE" {
			if strings.Contains(m.raw, "unavailable") {
				t.Errorf("%s", m)
			}
			break
		}
	}
	c.closed(protocol.CloseUnknownError)
}

// freeAddress is one where nobody listens yet.
func freeAddress(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func TestSpliced(t *testing.T) {
	t.Parallel()
	holder := newWorld(t, setup{})
	front := newWorld(t, setup{unplaced: true, remote: strings.TrimPrefix(holder.server.URL, "http://")})
	front.keys = holder.keys
	front.place("b", false)
	holder.t = t

	c := front.connect()
	c.identify(user(1), allEvents)
	c.dispatch("GUILD_CREATE")
	if front.gateway.Spliced() != 1 || front.gateway.Sessions() != 0 || holder.gateway.Sessions() != 1 {
		t.Errorf("spliced %d, sessions %d and %d", front.gateway.Spliced(), front.gateway.Sessions(), holder.gateway.Sessions())
	}
	for range 50 {
		holder.say(strings.Repeat("across", 1000))
		c.hears(strings.Repeat("across", 1000))
	}
	c.hangUp(4901)
	eventually(t, "the holder has noticed", func() bool { return holder.gateway.Connections() == 0 })

	t.Run("the holder closes", func(t *testing.T) {
		c := front.connect()
		c.t = t
		c.send(`{"op":99}`)
		c.gone(func() { c.closed(protocol.CloseNotAuthenticated); c.ws.Close() })
	})
	t.Run("the front drains", func(t *testing.T) {
		c := front.enter(user(2))
		c.t = t
		front.gateway.times.reconnect = 0
		front.gateway.Drain(context.Background())
		if _, err := c.receive(); err == nil {
			t.Error("the connection lives on")
		}
		eventually(t, "the holder has noticed", func() bool { return holder.gateway.Connections() == 0 })
	})
}

func TestNeverSplicedTwice(t *testing.T) {
	t.Parallel()
	// Both believe that the other one holds the guild.
	addressA := freeAddress(t)
	b := newWorld(t, setup{unplaced: true, hold: 300 * time.Millisecond, remote: addressA})
	a := newWorld(t, setup{unplaced: true, hold: 2 * time.Second, remote: strings.TrimPrefix(b.server.URL, "http://")})
	ln, err := net.Listen("tcp", addressA)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: a.server.Config.Handler}
	go server.Serve(ln)
	defer server.Close()
	a.place("b", false)
	b.place("b", false)

	c := a.dial(query)
	c.closed(protocol.CloseUnknownError) // b held it, and gave up
	if n := a.gateway.Connections(); n > 1 {
		t.Errorf("%d connections on one front", n)
	}
}

func TestHeldWhileTheHolderIsAway(t *testing.T) {
	t.Parallel()
	address := freeAddress(t)
	holder := newWorld(t, setup{})
	front := newWorld(t, setup{unplaced: true, remote: address})
	front.keys = holder.keys
	front.place("b", false)
	c := front.dial(query)
	eventually(t, "the client is held", func() bool { return front.gateway.Held() == 1 })

	ln, err := net.Listen("tcp", address) // it is back
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: holder.server.Config.Handler}
	go server.Serve(ln)
	defer server.Close()
	c.op(protocol.OpHello)
	c.identify(user(1), allEvents)
}

func TestAHolderThatDoesNotSpeakIsAskedAgain(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"it refuses":               "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
		"it closes":                "",
		"it speaks something else": "220 mail ready\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			asked := make(chan struct{}, 100)
			go func() {
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					conn.Write([]byte(answer))
					conn.Close()
					asked <- struct{}{}
				}
			}()
			front := newWorld(t, setup{unplaced: true, hold: 600 * time.Millisecond, remote: ln.Addr().String()})
			front.place("b", false)
			c := front.dial(query)
			<-asked
			<-asked
			c.closed(protocol.CloseUnknownError)
		})
	}
}

// TestForgive: a pause of the process is not counted against clients.
func TestForgive(t *testing.T) {
	g := New(Options{})
	waits, free := &connection{gateway: g}, &connection{gateway: g}
	waits.expires.Store(1000)
	g.conns[waits], g.conns[free] = struct{}{}, struct{}{}
	g.forgive(500)
	if waits.expires.Load() != 1500 || free.expires.Load() != 0 {
		t.Errorf("%d and %d", waits.expires.Load(), free.expires.Load())
	}
}
