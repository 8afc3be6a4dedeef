package guild

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// allButContent is every intent but MESSAGE_CONTENT.
const allButContent = 1<<26 - 1 - protocol.IntentMessageContent

// app makes a hearer's user a bot, with those intents.
func (h *hearer) app(intents uint64) *hearer {
	h.client.User.Bot, h.client.Intents = true, intents
	return h
}

func TestWhoReadsContent(t *testing.T) {
	const (
		one   = `{"id":"200000000000000001"}` // the app without MESSAGE_CONTENT
		other = `{"id":"200000000000000009"}`
		whole = "whole"
	)
	for name, test := range map[string]struct {
		kind, body string
		users      []snowflake.ID
		want       string // of the app, or whole
	}{
		"an app without the intent is told that there is a message, and not what it says": {
			kind: "MESSAGE_CREATE",
			body: `{"id":"7","author":` + other + `,"content":"hi","embeds":[{"title":"a"}],"attachments":[{"id":"8"}],"components":[{"type":1}],"poll":{"answers":[]},"mentions":[]}`,
			want: `{"id":"7","author":` + other + `,"content":"","embeds":[],"attachments":[],"components":[],"mentions":[]}`,
		},
		"nor what it says now": {
			kind: "MESSAGE_UPDATE", body: `{"id":"7","embeds":[{"title":"a"}]}`, want: `{"id":"7","embeds":[]}`,
		},
		"nor what it replies to": {
			kind: "MESSAGE_CREATE",
			body: `{"content":"hi","author":` + other + `,"referenced_message":{"content":"ho","author":` + one + `}}`,
			want: `{"content":"","author":` + other + `,"referenced_message":{"content":"","author":` + one + `}}`,
		},
		"nor what it forwards": {
			kind: "MESSAGE_CREATE",
			body: `{"content":"","message_snapshots":[{"message":{"content":"ho","mentions":[` + one + `]}}]}`,
			want: `{"content":"","message_snapshots":[{"message":{"content":"","mentions":[` + one + `]}}]}`,
		},
		"nor what a rule has found": {
			kind: "AUTO_MODERATION_ACTION_EXECUTION",
			body: `{"user_id":"200000000000000001","content":"hi","matched_keyword":"h*","matched_content":"h"}`,
			want: `{"user_id":"200000000000000001","content":"","matched_keyword":"h*","matched_content":""}`,
		},
		"who wrote it may read it":    {kind: "MESSAGE_CREATE", body: `{"content":"hi","author":` + one + `}`, want: whole},
		"who is mentioned may":        {kind: "MESSAGE_CREATE", body: `{"content":"hi","author":` + other + `,"mentions":[` + other + `,` + one + `]}`, want: whole},
		"and may when it has changed": {kind: "MESSAGE_UPDATE", body: `{"content":"hi","mentions":[` + one + `]}`, want: whole},
		"who is mentioned may read what it replies to": {
			kind: "MESSAGE_CREATE", body: `{"content":"hi","mentions":[` + one + `],"referenced_message":{"content":"ho"}}`, want: whole,
		},
		"who is sent it alone may": {
			kind: "MESSAGE_CREATE", body: `{"content":"hi","author":` + other + `}`, users: []snowflake.ID{userID(1), userID(2), userID(3)}, want: whole,
		},
		"where nothing is written there is nothing to keep back": {kind: "MESSAGE_CREATE", body: `{"id":"7","content":""}`, want: whole},
		"odd mentions are of nobody":                             {kind: "MESSAGE_CREATE", body: `{"content":"hi","author":null,"mentions":{"id":1}}`, want: `{"content":"","author":null,"mentions":{"id":1}}`},
		"what an event of another name says is for all":          {kind: "GUILDHALL_NEWS", body: `{"content":"hi","embeds":[1],"poll":1}`, want: whole},
		"so is what a message once said, in an event of the log": {kind: "MESSAGE_DELETE", body: `{"id":"7","content":"hi"}`, want: whole},
	} {
		t.Run(name, func(t *testing.T) {
			var core *fanout.Core
			g := open(t, nil, func(c *Config) { core, c.Open = c.Core, true })
			without := newHearer(t, core, 1).app(allButContent)
			with := newHearer(t, core, 2).app(allButContent | protocol.IntentMessageContent)
			user := newHearer(t, core, 3)
			user.client.Intents = allButContent
			for _, h := range []*hearer{without, with, user} {
				if err := g.Identify(t.Context(), h.client, func(Snapshot) {}); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := g.Publish(t.Context(), "", []Event{{Type: test.kind, Data: []byte(test.body), Users: test.users}}); err != nil {
				t.Fatal(err)
			}
			want := test.body
			if test.want != whole {
				want = test.want
			}
			for h, want := range map[*hearer]string{without: want, with: test.body, user: test.body} {
				d := h.next()
				for d.Type == "GUILD_MEMBER_ADD" {
					d = h.next()
				}
				want = `{"guild_id":"` + testID.String() + `",` + want[1:]
				if d.Type != test.kind || string(d.Data) != want {
					t.Errorf("user %d: %s %s\nexpected %s", h.client.Random, d, d.Data, want)
				}
			}
		})
	}
}

// TestSentMessagesAreReadByTheirAuthor: what comes by SendMessage is as what is published.
func TestSentMessagesAreReadByTheirAuthor(t *testing.T) {
	var core *fanout.Core
	g := open(t, nil, func(c *Config) { core, c.Open = c.Core, true })
	author, mentioned, other := newHearer(t, core, 1).app(allButContent), newHearer(t, core, 2).app(allButContent), newHearer(t, core, 3).app(allButContent)
	hearers := []*hearer{author, mentioned, other}
	for _, h := range hearers {
		if err := g.Identify(t.Context(), h.client, func(Snapshot) {}); err != nil {
			t.Fatal(err)
		}
	}
	content := "hi <@" + userID(2).String() + ">"
	if _, err := g.SendMessage(t.Context(), testID+1, author.client.User, false, NewMessage{Content: content}); err != nil {
		t.Fatal(err)
	}
	for _, h := range hearers {
		d := h.next()
		for d.Type == "GUILD_MEMBER_ADD" { // of those that identified later
			d = h.next()
		}
		var m struct {
			Content  string
			Mentions []User
		}
		if err := json.Unmarshal(d.Data, &m); err != nil {
			t.Fatal(err)
		}
		want := content
		if h == other {
			want = ""
		}
		if m.Content != want {
			t.Errorf("user %d reads %q, want %q", h.client.Random, m.Content, want)
		}
		if diff := cmp.Diff([]User{mentioned.client.User}, m.Mentions); diff != "" {
			t.Errorf("user %d: mentions (-want +got):\n%s", h.client.Random, diff)
		}
	}
}

func TestMentions(t *testing.T) {
	const a, b = "<@200000000000000001>", "<@!200000000000000002>"
	one, two := userID(1), userID(2)
	for name, test := range map[string]struct {
		content string
		allowed *AllowedMentions
		want    []snowflake.ID
	}{
		"nobody is mentioned":                          {content: "hi @everyone, at 5 < 6 > 4 <@> <@1> <#200000000000000001> <@&200000000000000001>"},
		"users are, in both ways of writing it":        {content: "hi " + a + b, want: []snowflake.ID{one, two}},
		"each once, in order":                          {content: b + a + b, want: []snowflake.ID{two, one}},
		"in code nobody is":                            {content: "`" + a + "` ``" + a + "`` ```\n" + a + "\n``` " + b, want: []snowflake.ID{two}},
		"a single backquote is none":                   {content: "it`s " + a, want: []snowflake.ID{one}},
		"an id that is too long is of nobody":          {content: "<@99999999999999999999>"},
		"the sender allows none":                       {content: a, allowed: &AllowedMentions{}},
		"the sender allows roles":                      {content: a, allowed: &AllowedMentions{Parse: []string{"roles"}}},
		"the sender allows users":                      {content: a + b, allowed: &AllowedMentions{Parse: []string{"everyone", "users"}}, want: []snowflake.ID{one, two}},
		"the sender allows one, and one not mentioned": {content: a + b, allowed: &AllowedMentions{Users: []snowflake.ID{two, 5}}, want: []snowflake.ID{two}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, mentioned(test.content, test.allowed)); diff != "" {
				t.Errorf("mentions (-want +got):\n%s", diff)
			}
		})
	}
}

// TestContentIsReplayedAsItWasSent: whoever resumes is sent what was sent live, byte for byte: of the stream's window, of
// the log, and by another process.
func TestContentIsReplayedAsItWasSent(t *testing.T) { onEveryLog(t, testContentIsReplayedAsItWasSent) }

func testContentIsReplayedAsItWasSent(t *testing.T, log guildlog.Log) {
	h := newHall(t, log)
	base := uint64(0)
	for n := range 5 {
		base = h.join(n)
	}
	client := func(n int) *hearer {
		c := newHearer(t, h.core, n)
		switch n {
		case 0, 1, 2, 5:
			c.app(allButContent)
		case 3:
			c.app(allButContent | protocol.IntentMessageContent)
		case 4:
			c.client.Intents = allButContent
		}
		return c
	}
	const mayJoin = 5 // comes and goes
	live := make([]*hearer, mayJoin+1)
	for n := range live {
		live[n] = client(n)
		if err := h.Identify(context.Background(), live[n].client, func(Snapshot) {}); err != nil {
			t.Fatal(err)
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	anybody := func() string { return fmt.Sprintf(`{"id":"%s"}`, userID(random.IntN(7))) }
	for i := range 120 {
		kinds := []string{"MESSAGE_CREATE", "MESSAGE_CREATE", "MESSAGE_UPDATE", "AUTO_MODERATION_ACTION_EXECUTION", "X"}
		e := event(kinds[random.IntN(len(kinds))], fmt.Sprintf(`{"id":"7","content":"%d","matched_content":"%d","author":%s,"mentions":[%s,%s],"poll":%d}`,
			i, i, anybody(), anybody(), anybody(), i))
		if random.IntN(8) == 0 {
			e.Users = []snowflake.ID{userID(random.IntN(7)), userID(random.IntN(7))}
		}
		if _, err := h.Publish(context.Background(), "", []Event{e}); err != nil {
			t.Fatal(err)
		}
		switch i % 40 {
		case 10:
			h.join(mayJoin)
		case 30:
			h.leave(mayJoin)
		}
	}
	mark := Event{Type: "MARK", Data: []byte(`{}`)}
	for n := range live {
		mark.Users = append(mark.Users, userID(n))
	}
	numbers, err := h.Publish(context.Background(), "", []Event{mark})
	if err != nil {
		t.Fatal(err)
	}
	last := numbers[0]
	sent := make([][]string, len(live))
	hear := func(c *hearer, until string) (heard []string) {
		for {
			d := c.next()
			heard = append(heard, fmt.Sprintf("%s %s", d, d.Data))
			if d.Type == until {
				return heard
			}
		}
	}
	for n, c := range live {
		sent[n] = hear(c, "MARK")
	}
	blank := func(s string) bool { return strings.Contains(s, `"content":""`) }
	for n, bare := range []bool{true, true, true, false, false, true} {
		if slices.ContainsFunc(sent[n], blank) != bare {
			t.Errorf("user %d was sent messages without content: %v", n, !bare)
		}
	}

	resumed := func(how string, users []int) {
		t.Helper()
		for _, n := range users {
			for range 4 {
				from := base + random.Uint64N(last-base)
				c := client(n)
				c.client.Random = 1000 + random.Uint64N(1000)
				if err := h.Resume(context.Background(), c.client, Resumption{Log: h.log.ID(), Base: guildlog.First, Seq: from}, func(Snapshot) {
					t.Error("started afresh")
				}); err != nil {
					t.Fatal(err)
				}
				want := slices.DeleteFunc(slices.Clone(sent[n]), func(s string) bool { return seqOf(s) <= from })
				want = append(want, h.resumed(last)+" {}")
				if got := hear(c, "RESUMED"); !slices.Equal(got, want) {
					t.Errorf("%s, user %d behind %d:\n%s\nlive\n%s", how, n, from, strings.Join(got, "\n"), strings.Join(want, "\n"))
				}
				c.client.Session.End(nil)
			}
		}
	}
	everybody := []int{0, 1, 2, 3, 4}
	resumed("of the window", append(everybody, mayJoin))
	h.Close(bye)
	h.open() // by another process, say: its window has nothing
	resumed("of the log", everybody)
}

// seqOf is the number of a dispatch that was written down.
func seqOf(heard string) (seq uint64) {
	if _, err := fmt.Sscan(strings.Fields(heard)[1], &seq); err != nil {
		panic(err)
	}
	return seq
}

// TestOneVariantForAll: however many views there are, a message without content is encoded once, and not at all where
// nothing is written.
func TestOneVariantForAll(t *testing.T) {
	made := func(kind, body string) *fanout.Frame {
		return frame(&guildlog.Record{Seq: 2, Time: time.Now().UnixMilli(), Type: kind, Data: []byte(body)}, turn{})
	}
	f := made("MESSAGE_CREATE", `{"content":"hi","author":{"id":"200000000000000001"}}`)
	for _, intents := range []uint64{allButContent, protocol.IntentGuildMessages, protocol.IntentGuildMessages | protocol.IntentGuilds} {
		if got := viewOf(intents, true).Pick(f); &got[0] != &f.Variants[0][0] {
			t.Errorf("intents %b: %s", intents, got)
		}
	}
	if len(f.Variants) != 1 || len(f.Personal) != 1 || &f.Personal[0].Wire[0] != &f.Wire[0] {
		t.Errorf("%+v", f)
	}
	if viewOf(protocol.IntentMessageContent, true).Pick(f) != nil {
		t.Error("a message for those who did not ask for messages")
	}
	for kind, body := range map[string]string{"MESSAGE_CREATE": `{"content":"","embeds":[]}`, "X": `{"content":"hi"}`} {
		if f := made(kind, body); f.Variants != nil || f.Personal != nil {
			t.Errorf("%s %s: %+v", kind, body, f)
		}
	}
}

// BenchmarkFrame makes the frame of an event as Discord's are.
func BenchmarkFrame(b *testing.B) {
	const body = `{"guild_id":"1100000000000000001","id":"1200000000000000001","type":0,"channel_id":"1100000000000000002",` +
		`"author":{"id":"200000000000000001","username":"ada","discriminator":"0","global_name":"Ada","avatar":null,"bot":false},` +
		`"content":"Some forty characters that somebody has written, and some more.","timestamp":"2026-11-24T15:31:31.000000+00:00",` +
		`"edited_timestamp":null,"tts":false,"mention_everyone":false,"mentions":[],"mention_roles":[],"attachments":[],"embeds":[],` +
		`"components":[],"pinned":false,"flags":0,"member":{"nick":null,"avatar":null,"roles":[],"joined_at":"2026-11-24T15:31:31.000000+00:00"}}`
	for _, kind := range []string{"MESSAGE_CREATE", "GUILDHALL_NEWS"} {
		b.Run(kind, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				frame(&guildlog.Record{Seq: 2, Type: kind, Data: []byte(body)}, turn{})
			}
		})
	}
}
