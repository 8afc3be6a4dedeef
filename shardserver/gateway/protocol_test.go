package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

func TestHello(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.dial(query)
	var d struct {
		Interval int `json:"heartbeat_interval"`
	}
	c.decode(c.op(protocol.OpHello), &d)
	if d.Interval < 40_000 || d.Interval > 45_000 {
		t.Errorf("heartbeat interval %d", d.Interval)
	}
}

func TestRefusedUpgrades(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for name, query := range map[string]string{
		"an encoding that is not spoken":   "?v=10&encoding=etf",
		"a compression that is not spoken": "?v=10&encoding=json&compress=zlib-stream",
	} {
		t.Run(name, func(t *testing.T) {
			_, response, err := websocket.DefaultDialer.Dial(strings.Replace(w.server.URL, "http", "ws", 1)+"/g/"+guildID.String()+"/"+query, nil)
			if err == nil || response.StatusCode != 400 {
				t.Fatal(err, response)
			}
			body, _ := io.ReadAll(response.Body)
			if !strings.Contains(string(body), "expected") {
				t.Errorf("answer %q says not what was expected", body)
			}
		})
	}
}

func TestVersions(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for name, test := range map[string]struct {
		query string
		code  int
	}{
		"version 10":                 {"?v=10&encoding=json", 0},
		"version 9":                  {"?v=9&encoding=json", 0},
		"no query at all":            {"", 0},
		"keys in alphabetical order": {"?encoding=json&v=9", 0},
		"version 8":                  {"?v=8", protocol.CloseInvalidVersion},
		"a version that is none":     {"?v=ten", protocol.CloseInvalidVersion},
	} {
		t.Run(name, func(t *testing.T) {
			c := w.dial(test.query)
			c.t = t
			if test.code != 0 {
				c.closed(test.code)
				return
			}
			c.op(protocol.OpHello)
			c.identify(user(1), allEvents)
		})
	}
}

func TestIdentify(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	good, bot := w.token(user(1)), "Bot "+w.token(user(1))
	for name, test := range map[string]struct {
		d    string // of op 2; TOKEN and BOT stand for tokens
		code int    // of the close, or 0
	}{
		"the least":                {`{"token":TOKEN,"intents":513,"properties":{"os":"linux","browser":"b","device":"d"}}`, 0},
		"a token with Bot":         {`{"token":BOT,"intents":513}`, 0},
		"compress as a string":     {`{"token":BOT,"intents":513,"compress":"zstd-stream"}`, 0},
		"compress as a boolean":    {`{"token":BOT,"intents":513,"compress":true}`, 0},
		"old names of properties":  {`{"token":BOT,"intents":513,"properties":{"$os":"linux","$referer":""}}`, 0},
		"null activities":          {`{"token":BOT,"intents":513,"presence":{"activities":null,"status":"offline","since":null,"afk":false}}`, 0},
		"a game, an empty status":  {`{"token":BOT,"intents":513,"presence":{"game":{"name":"x","type":0},"status":"","since":0}}`, 0},
		"unknown keys":             {`{"token":TOKEN,"intents":513,"v":10,"client_state":{"guild_versions":{}},"capabilities":16381,"large_threshold":250}`, 0},
		"odd capabilities":         {`{"token":TOKEN,"intents":513,"capabilities":"all"}`, 0},
		"a null shard":             {`{"token":TOKEN,"intents":513,"shard":null}`, 0},
		"the only shard":           {`{"token":TOKEN,"intents":513,"shard":[0,1]}`, 0},
		"no intents":               {`{"token":TOKEN}`, protocol.CloseInvalidIntents},
		"intents 0":                {`{"token":TOKEN,"intents":0}`, 0},
		"unknown intents":          {`{"token":TOKEN,"intents":67108864}`, protocol.CloseInvalidIntents},
		"negative intents":         {`{"token":TOKEN,"intents":-1}`, protocol.CloseInvalidIntents},
		"broken intents":           {`{"token":TOKEN,"intents":1.5}`, protocol.CloseInvalidIntents},
		"intents as a string":      {`{"token":TOKEN,"intents":"513"}`, protocol.CloseInvalidIntents},
		"a foreign token":          {`{"token":"MQ.e30.AAAA","intents":513}`, protocol.CloseAuthenticationFailed},
		"no token":                 {`{"intents":513}`, protocol.CloseAuthenticationFailed},
		"a null token":             {`{"token":null,"intents":513}`, protocol.CloseAuthenticationFailed},
		"a token that is a number": {`{"token":5,"intents":513}`, protocol.CloseDecodeError},
		"a shard beyond the count": {`{"token":TOKEN,"intents":513,"shard":[1,1]}`, protocol.CloseInvalidShard},
		"a shard of no count":      {`{"token":TOKEN,"intents":513,"shard":[0]}`, protocol.CloseInvalidShard},
		"a negative shard":         {`{"token":TOKEN,"intents":513,"shard":[-1,2]}`, protocol.CloseInvalidShard},
		"a shard in words":         {`{"token":TOKEN,"intents":513,"shard":"first"}`, protocol.CloseInvalidShard},
		"null":                     {`null`, protocol.CloseAuthenticationFailed},
		"an array":                 {`[]`, protocol.CloseDecodeError},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := w.connect()
			c.t = t
			c.send(`{"op":2,"d":` + strings.NewReplacer("TOKEN", quote(good), "BOT", quote(bot)).Replace(test.d) + `}`)
			if test.code != 0 {
				c.closed(test.code)
				return
			}
			c.ready()
		})
	}
}

func quote(s string) string { return fmt.Sprintf("%q", s) }

func TestRefusedMessages(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for name, test := range map[string]struct {
		identified bool
		kind       int
		raw        string
		code       int
	}{
		"a presence before op 2":     {false, websocket.TextMessage, `{"op":3,"d":{}}`, protocol.CloseNotAuthenticated},
		"members before op 2":        {false, websocket.TextMessage, `{"op":8,"d":{}}`, protocol.CloseNotAuthenticated},
		"an unknown op before op 2":  {false, websocket.TextMessage, `{"op":99}`, protocol.CloseNotAuthenticated},
		"null before op 2":           {false, websocket.TextMessage, `null`, protocol.CloseNotAuthenticated},
		"an unknown op":              {true, websocket.TextMessage, `{"op":99,"d":null}`, protocol.CloseUnknownOpcode},
		"a dispatch":                 {true, websocket.TextMessage, `{"op":0,"d":{}}`, protocol.CloseUnknownOpcode},
		"a second identify":          {true, websocket.TextMessage, `{"op":2,"d":{}}`, protocol.CloseAlreadyAuthenticated},
		"a resume of a live session": {true, websocket.TextMessage, `{"op":6,"d":{}}`, protocol.CloseAlreadyAuthenticated},
		"no JSON":                    {false, websocket.TextMessage, `hello`, protocol.CloseDecodeError},
		"nothing":                    {false, websocket.TextMessage, ``, protocol.CloseDecodeError},
		"an op in words":             {false, websocket.TextMessage, `{"op":"2"}`, protocol.CloseDecodeError},
		"an identify without d":      {false, websocket.TextMessage, `{"op":2}`, protocol.CloseDecodeError},
		"a binary message":           {true, websocket.BinaryMessage, `{"op":1,"d":null}`, protocol.CloseDecodeError},
		"a message beyond the limit": {true, websocket.TextMessage, `{"op":3,"d":"` + strings.Repeat("x", protocol.MaxClientPayload) + `"}`, protocol.CloseDecodeError},
		"a message far beyond it":    {true, websocket.TextMessage, strings.Repeat("x", 1<<20), protocol.CloseDecodeError},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := w.connect()
			c.t = t
			if test.identified {
				c.identify(user(1), 0)
			}
			if err := c.ws.WriteMessage(test.kind, []byte(test.raw)); err != nil {
				t.Fatal(err)
			}
			c.closed(test.code)
		})
	}
}

func TestNotTheWebSocketProtocol(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.connect()
	// An unmasked frame with all reserved bits: the reader gives up.
	if _, err := c.ws.NetConn().Write([]byte{0xf1, 0x02, '{', '}'}); err != nil {
		t.Fatal(err)
	}
	c.closed(websocket.CloseProtocolError)
}

func TestKnownOpsWithoutEffect(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	for _, op := range []int{3, 4, 8, 14, 31, 37, 43} {
		c.send(fmt.Sprintf(`{"op":%d,"d":{"guild_id":["%s"]}}`, op, guildID))
	}
	w.say("after them")
	c.hears("after them")
}

func TestRateLimit(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for name, send := range map[string]func(c *client){
		"of messages": func(c *client) { c.send(`{"op":1,"d":null}`) },
		"of pings": func(c *client) {
			if err := c.ws.WriteControl(websocket.PingMessage, nil, time.Now().Add(patience)); err != nil {
				c.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := w.connect()
			c.t = t
			for range protocol.MaxClientMessages {
				send(c)
			}
			if name == "of messages" {
				for range protocol.MaxClientMessages {
					c.op(protocol.OpHeartbeatACK)
				}
			}
			send(c)
			c.closed(protocol.CloseRateLimited)
		})
	}
}

func TestHeartbeats(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.connect()
	for _, d := range []string{`null`, `0`, `7`} {
		c.send(`{"op":1,"d":` + d + `}`)
		c.op(protocol.OpHeartbeatACK)
	}
	c.send(`{"op":1}`)
	c.op(protocol.OpHeartbeatACK)
	c.identify(user(1), allEvents)
	c.send(`{"op":1,"d":2}`)
	c.dispatch("GUILD_CREATE")
	c.op(protocol.OpHeartbeatACK)
}

func TestPings(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	pongs := make(chan string, 1)
	c.ws.SetPongHandler(func(data string) error { pongs <- data; return nil })
	if err := c.ws.WriteControl(websocket.PingMessage, []byte("are you there"), time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	c.send(`{"op":1,"d":null}`)
	c.op(protocol.OpHeartbeatACK) // the pong comes before it
	if got := <-pongs; got != "are you there" {
		t.Errorf("pong %q", got)
	}
}

func TestReadyAndGuildCreate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for name, test := range map[string]struct{ query, shard string }{
		"version 10":         {"?v=10&encoding=json", ""},
		"version 9, sharded": {"?v=9&encoding=json", `,"shard":[0,1]`},
	} {
		t.Run(name, func(t *testing.T) {
			c := w.dial(test.query)
			c.t = t
			c.op(protocol.OpHello)
			c.send(fmt.Sprintf(`{"op":2,"d":{"token":%q,"intents":513%s}}`, w.token(user(1)), test.shard))
			ready, create := c.ready(), c.dispatch("GUILD_CREATE")
			if *create.Seq < 2 || *ready.Seq != *create.Seq-1 || *create.Seq != w.guild().Counts().LastSeq {
				t.Errorf("READY at %d, GUILD_CREATE at %d, the guild at %d", *ready.Seq, *create.Seq, w.guild().Counts().LastSeq)
			}
			noNullArrays(t, ready)
			noNullArrays(t, create)
			var r struct {
				V      int
				User   struct{ ID, Username, Discriminator string }
				Guilds []struct {
					ID          string
					Unavailable *bool
				}
				PrivateChannels  []any  `json:"private_channels"`
				SessionID        string `json:"session_id"`
				ResumeGatewayURL string `json:"resume_gateway_url"`
				Shard            []int
				Application      struct {
					ID    string
					Flags *int
				}
			}
			c.decode(ready, &r)
			if fmt.Sprint(r.V) != strings.TrimSuffix(test.query[3:5], "&") || r.User.ID != user(1).String() || r.User.Discriminator != "0" ||
				len(r.Guilds) != 1 || r.Guilds[0].ID != guildID.String() || r.Guilds[0].Unavailable == nil || !*r.Guilds[0].Unavailable ||
				r.PrivateChannels == nil || r.SessionID == "" || len(r.SessionID) > token.MaxSessionIDSize ||
				r.ResumeGatewayURL != "ws://guildhall-gateway.ns.svc/g/"+guildID.String()+"/" ||
				(len(r.Shard) == 2) != (test.shard != "") || r.Application.ID == "" || r.Application.Flags == nil {
				t.Errorf("READY %s", ready)
			}
			var g struct {
				ID, Name    string
				Unavailable *bool
				JoinedAt    string `json:"joined_at"`
				MemberCount int    `json:"member_count"`
				Roles       []struct {
					ID, Permissions string
					Colors          map[string]any
				}
				Channels []struct {
					ID, Name   string
					Type       int
					Overwrites []any `json:"permission_overwrites"`
				}
				Members []struct {
					User struct{ ID string }
				}
			}
			c.decode(create, &g)
			if g.ID != guildID.String() || g.Name != "hall" || g.Unavailable == nil || *g.Unavailable || g.MemberCount != 1 ||
				len(g.Roles) != 1 || g.Roles[0].ID != guildID.String() || g.Roles[0].Permissions == "" || g.Roles[0].Colors == nil ||
				len(g.Channels) != 1 || g.Channels[0].Name != "general" || g.Channels[0].Overwrites == nil ||
				len(g.Members) != 1 || g.Members[0].User.ID != user(1).String() {
				t.Errorf("GUILD_CREATE %s", create)
			}
			if _, err := time.Parse(time.RFC3339, g.JoinedAt); err != nil {
				t.Error(err)
			}
		})
	}
}

// noNullArrays checks that what libraries read as an array, an object or a bit field is never null.
func noNullArrays(t *testing.T, m message) {
	t.Helper()
	may := map[string]bool{ // be null
		"icon": true, "splash": true, "discovery_splash": true, "afk_channel_id": true, "application_id": true,
		"system_channel_id": true, "rules_channel_id": true, "vanity_url_code": true, "description": true, "banner": true,
		"public_updates_channel_id": true, "safety_alerts_channel_id": true, "global_name": true, "avatar": true,
		"email": true, "nick": true, "unicode_emoji": true, "secondary_color": true, "tertiary_color": true,
		"parent_id": true, "topic": true, "last_message_id": true, "rtc_region": true,
	}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for key, e := range v {
				if e == nil && !may[key] {
					t.Errorf("null at %s.%s", path, key)
				}
				walk(path+"."+key, e)
			}
		case []any:
			for _, e := range v {
				walk(path+"[]", e)
			}
		}
	}
	var d any
	if err := json.Unmarshal(m.D, &d); err != nil {
		t.Fatal(err)
	}
	walk("", d)
}

func TestDispatchesComeInOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	a, b := w.enter(user(1)), w.enter(user(2))
	a.at(w.guild().Counts().LastSeq-1, "GUILD_MEMBER_ADD") // of the other, with a number for what only they are told
	for i := range 300 {
		seq := w.say(fmt.Sprint("m", i))
		if i%2 == 0 {
			w.publish("TYPING_START", `{"user_id":"1"}`)
		}
		for _, c := range []*client{a, b} {
			if m := c.hears(fmt.Sprint("m", i)); *m.Seq != seq {
				t.Fatalf("message %d at %d, was published at %d", i, *m.Seq, seq)
			}
			if i%2 == 0 {
				c.at(seq, "TYPING_START")
			}
		}
	}
}

func TestIntentsFilter(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for name, test := range map[string]struct {
		intents uint64
		sees    []string
	}{
		"none":                {0, []string{"GUILDHALL_TEST"}},
		"guilds":              {protocol.IntentGuilds, []string{"CHANNEL_PINS_UPDATE", "GUILDHALL_TEST"}},
		"messages":            {protocol.IntentGuildMessages, []string{"MESSAGE_CREATE", "GUILDHALL_TEST"}},
		"messages and typing": {protocol.IntentGuildMessages | protocol.IntentGuildMessageTyping, []string{"MESSAGE_CREATE", "TYPING_START", "GUILDHALL_TEST"}},
		"all":                 {allEvents, []string{"CHANNEL_PINS_UPDATE", "MESSAGE_CREATE", "TYPING_START", "GUILDHALL_TEST"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := w.connect()
			c.t = t
			c.identify(user(1), test.intents)
			if test.intents&protocol.IntentGuilds != 0 {
				c.dispatch("GUILD_CREATE")
			}
			for _, kind := range []string{"CHANNEL_PINS_UPDATE", "MESSAGE_CREATE", "TYPING_START", "GUILDHALL_TEST"} {
				w.publish(kind, `{}`)
			}
			for _, kind := range test.sees {
				c.dispatch(kind)
			}
		})
	}
}

// TestMessageContent: whom a message is withheld from, live and when they resume.
func TestMessageContent(t *testing.T) {
	t.Parallel()
	const allButContent = allEvents &^ protocol.IntentMessageContent
	const plain, mention, own, secret = "among us", "@bot", "from the bot", "to the bot alone"
	for name, test := range map[string]struct {
		id      snowflake.ID
		intents uint64
		reads   []string
	}{
		"a bot with the intent reads everything":                     {bot(1), allEvents, []string{plain, mention, own, secret}},
		"a bot without reads what is its own or meant for it":        {bot(1), allButContent, []string{"", mention, own, secret}},
		"another bot without reads nothing":                          {bot(2), allButContent, []string{"", "", ""}},
		"a user reads everything, whatever intents they name":        {user(1), allButContent, []string{plain, mention, own}},
		"who did not ask for messages is sent what is for them":      {bot(1), protocol.IntentMessageContent, []string{secret}},
		"messages without the intent for their content are messages": {bot(2), protocol.IntentGuildMessages, []string{"", "", ""}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, setup{membersOnly: true})
			w.join(test.id)
			c := w.connect()
			c.identify(test.id, test.intents)
			if test.intents&protocol.IntentGuilds != 0 {
				c.dispatch("GUILD_CREATE")
			}
			from := w.say("")
			if test.intents&protocol.IntentGuildMessages != 0 {
				c.hears("")
			}
			w.say(plain)
			w.publish("MESSAGE_CREATE", fmt.Sprintf(`{"content":%q,"mentions":[{"id":"%s"}]}`, mention, bot(1)))
			general := guildID + 1
			if _, err := w.guild().SendMessage(t.Context(), general, guild.NewUser(bot(1), "bot", true), true, guild.NewMessage{Content: own}); err != nil {
				t.Fatal(err)
			}
			last := w.publish("MESSAGE_CREATE", fmt.Sprintf(`{"content":%q}`, secret), bot(1))
			for _, content := range test.reads {
				c.hears(content)
			}
			c.cut()
			for range 2 {
				n := c.resume(test.id, from)
				for _, content := range test.reads {
					n.hears(content)
				}
				n.at(last, "RESUMED")
				n.cut()
			}
		})
	}
}

func TestEventsForNamedUsers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	a, b := w.enter(user(1)), w.enter(user(2))
	a.dispatch("GUILD_MEMBER_ADD")
	w.publish("GUILDHALL_SECRET", `{}`, user(2))
	w.say("to all")
	a.hears("to all")
	b.dispatch("GUILDHALL_SECRET")
	b.hears("to all")
}

func TestAShardThatTheGuildDoesNotBelongTo(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	other := (uint64(guildID>>22) + 1) % 2
	w.enter(user(1)).cut()
	c := w.connect()
	c.send(fmt.Sprintf(`{"op":2,"d":{"token":%q,"intents":%d,"shard":[%d,2]}}`, w.token(user(1)), allEvents, other))
	ready := c.ready()
	if !strings.Contains(ready.raw, `"guilds":[]`) {
		t.Errorf("the guild is in READY: %s", ready)
	}
	w.say("not for that shard")
	c.cut()
	seq := w.say("nor this")
	c = c.resume(user(1), seq-1)
	c.at(seq, "RESUMED")
	w.publish("GUILDHALL_SECRET", `{}`, user(1)) // nor this
	w.gateway.times.reconnect = 0
	go w.gateway.Drain(context.Background())
	c.closed(protocol.CloseUnknownError)
	eventually(t, "the connections are gone", func() bool { return w.gateway.Connections() == 0 })
}

func TestClosing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for name, code := range map[string]int{
		"the client's own end":         websocket.CloseNormalClosure,
		"going away":                   websocket.CloseGoingAway,
		"discord.js resumes":           4200,
		"disgo and discordgo, on op 7": websocket.CloseServiceRestart,
	} {
		t.Run(name, func(t *testing.T) {
			c := w.enter(user(1))
			c.t = t
			c.hangUp(code)
			if _, err := c.ws.NetConn().Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("the server keeps the socket: %v", err)
			}
			if n := w.guild().Counts().Sessions; n != 0 {
				t.Errorf("%d sessions left", n)
			}
			seq := w.say("meanwhile")
			n := c.resume(user(1), c.seq)
			n.hears("meanwhile")
			n.at(seq, "RESUMED")
			n.cut()
		})
	}
}

func TestClosingWithoutACode(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	c.gone(func() {
		if err := c.ws.WriteControl(websocket.CloseMessage, nil, time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		c.closed(websocket.CloseNormalClosure)
	})
}

func TestTheServersCloseWaitsForTheReply(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	replied := false
	c.ws.SetCloseHandler(func(code int, _ string) error {
		if n := w.gateway.Connections(); n != 1 {
			t.Errorf("the server did not wait: %d connections", n)
		}
		replied = true
		return c.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""), time.Now().Add(patience))
	})
	c.send(`{"op":99}`)
	started := time.Now()
	c.closed(protocol.CloseUnknownOpcode)
	if _, err := c.ws.NetConn().Read(make([]byte, 1)); err != io.EOF || !replied {
		t.Errorf("the socket was not closed behind the reply: %v", err)
	}
	if took := time.Since(started); took > time.Second {
		t.Errorf("the reply was not noticed: closed after %s", took)
	}
}

func TestTheServersCloseDoesNotWaitForEver(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	c.ws.SetCloseHandler(func(int, string) error { return nil }) // no reply
	c.gone(func() {
		c.send(`{"op":99}`)
		c.closed(protocol.CloseUnknownOpcode)
	})
}

func TestSilentClients(t *testing.T) {
	t.Parallel()
	short := func(d *times) {
		d.interval, d.spread, d.grace, d.identify = 100*time.Millisecond, 1, 200*time.Millisecond, 300*time.Millisecond
	}
	for name, test := range map[string]func(w *world) *client{
		"one that does not identify": func(w *world) *client { return w.connect() },
		"one that beats but does not identify": func(w *world) *client {
			c := w.connect()
			c.send(`{"op":1,"d":null}`)
			c.op(protocol.OpHeartbeatACK)
			return c
		},
		"a session without heartbeats": func(w *world) *client { return w.enter(user(1)) },
		"a session that sends other things": func(w *world) *client {
			c := w.enter(user(1))
			c.send(`{"op":3,"d":{}}`)
			return c
		},
		"one that was told to start over": func(w *world) *client {
			c := w.connect()
			c.sendResume(user(1), "none", 3)
			c.op(protocol.OpInvalidSession)
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, setup{times: short})
			c := test(w)
			c.gone(func() { c.closed(protocol.CloseSessionTimeout) })
		})
	}
}

func TestASessionThatBeatsStays(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{times: func(d *times) {
		d.interval, d.spread, d.grace = 20*time.Millisecond, 1, 2*time.Second
	}})
	c := w.enter(user(1))
	beat := time.NewTicker(20 * time.Millisecond)
	defer beat.Stop()
	for range 110 { // for longer than interval and grace
		<-beat.C
		c.send(`{"op":1,"d":null}`)
		c.op(protocol.OpHeartbeatACK)
	}
	w.say("still here")
	c.hears("still here")
}

// FuzzHandle: whatever a client sends, the connection goes on or ends with a documented code.
func FuzzHandle(f *testing.F) {
	keys, err := token.ParseKeys(token.GenerateKey(), "")
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{
		`{"op":1,"d":null}`, `{"op":2,"d":{"token":"TOKEN","intents":513,"shard":[0,1]}}`, `{"op":2,"d":{"token":"TOKEN","intents":-1}}`,
		`{"op":6,"d":{"token":"TOKEN","session_id":"SESSION","seq":3}}`, `{"op":6,"d":{"token":"TOKEN","session_id":"x","seq":null}}`,
		`{"op":6,"d":{"token":"TOKEN","session_id":"SESSION","seq":18446744073709551615}}`, `{"op":3,"d":{"activities":null}}`,
		`{"op":8,"d":{"guild_id":["1"]}}`, `{"op":1e400}`, `{"op":2,"op":6,"d":[]}`, `[]`, `null`, `{`, "\xff", `{"op":99}`, `{"OP":2,"D":{}}`,
	} {
		f.Add([]byte(seed), []byte(seed))
	}
	codes := map[int]bool{
		protocol.CloseUnknownError: true, protocol.CloseUnknownOpcode: true, protocol.CloseDecodeError: true,
		protocol.CloseNotAuthenticated: true, protocol.CloseAuthenticationFailed: true, protocol.CloseAlreadyAuthenticated: true,
		protocol.CloseInvalidSeq: true, protocol.CloseInvalidShard: true, protocol.CloseInvalidIntents: true,
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		w := newFuzzWorld(keys)
		defer w.core.Stop()
		defer w.directory.Stop()
		server, peer := net.Pipe()
		go io.Copy(io.Discard, peer)
		defer peer.Close()
		session := w.core.NewSession(server, func(error) {})
		defer session.End(nil)
		place, _ := w.directory.Find(guildID)
		c := &connection{
			gateway: w.gateway, conn: server, id: guildID, guild: place.Guild, interval: time.Minute,
		}
		c.session.Store(session)
		issued, _ := keys.Issue(token.Claims{User: user(1), Name: "fuzz"})
		sealed := keys.Seal(token.Session{Log: place.Guild.LogID(), Base: 2, User: user(1), Intents: allEvents})
		for _, payload := range [][]byte{first, second} {
			payload = []byte(strings.NewReplacer("TOKEN", issued, "SESSION", sealed).Replace(string(payload)))
			err := c.handle(payload)
			if err == nil {
				continue
			}
			closing, ok := err.(*closeError)
			if !ok || !codes[closing.code] || closing.reason == "" {
				t.Fatalf("%v on %q", err, payload)
			}
			break
		}
		if c.attached {
			place.Guild.Detach(c.session.Load(), c.user, c.random)
		}
		if _, err := place.Guild.Publish(context.Background(), "", []guild.Event{{Type: "X", Data: json.RawMessage(`{}`)}}); err != nil {
			t.Fatal(err)
		}
	})
}

func newFuzzWorld(keys *token.Keys) *world {
	w := &world{keys: keys, core: fanout.New(fanout.Options{Workers: 1})}
	w.directory = newDirectory(w.core, "")
	w.gateway = New(Options{Directory: w.directory, Core: w.core, Keys: func() *token.Keys { return keys }})
	w.directory.Apply(guildOn("a", false))
	return w
}
