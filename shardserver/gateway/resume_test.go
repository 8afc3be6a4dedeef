package gateway

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/token"
)

func TestResume(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	first := w.say("one")
	c.hears("one")
	c.cut()
	second := w.say("two")
	w.publish("TYPING_START", `{"user_id":"1"}`) // not replayed
	third := w.say("three")

	n := c.resume(user(1), first)
	n.at(second, "MESSAGE_CREATE")
	n.at(third, "MESSAGE_CREATE")
	if m := n.at(third, "RESUMED"); string(m.D) != "{}" {
		t.Errorf("RESUMED %s", m)
	}
	n.at(w.say("live"), "MESSAGE_CREATE")
	n.cut()

	n = c.resume(user(1), third+1)
	n.at(third+1, "RESUMED")
	n.cut()

	for _, before := range []string{"0", "null", `1`} { // of the session's base
		n = w.connect()
		n.send(fmt.Sprintf(`{"op":6,"d":{"token":%q,"session_id":%q,"seq":%s}}`, w.token(user(1)), c.session, before))
		n.at(third+1, "GUILD_CREATE")
		n.at(third+1, "RESUMED")
		n.at(w.say("live"), "MESSAGE_CREATE")
		third++
		n.cut()
	}
}

func TestResumeKeepsIntents(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.connect()
	c.identify(user(1), protocol.IntentGuildMessages)
	c.cut()
	w.publish("CHANNEL_PINS_UPDATE", `{}`)
	seq := w.say("seen")
	n := c.resume(user(1), 1)
	n.at(seq, "RESUMED") // from before the base, and without a guild
	w.publish("CHANNEL_PINS_UPDATE", `{}`)
	w.say("seen too")
	n.hears("seen too")
}

func TestRefusedResumes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	last := w.say("last")
	seal := func(s token.Session) string { return w.keys.Seal(s) }
	for name, test := range map[string]struct {
		session, seq string
		code         int // 0: op 9
	}{
		"a session id of nobody":      {"none", "3", 0},
		"another user's session":      {seal(token.Session{Log: w.guild().LogID(), Base: 2, User: user(9), Intents: 1}), "3", 0},
		"a session of another log":    {seal(token.Session{Log: guildlog.NewID(false), Base: 2, User: user(1), Intents: 1}), "3", 0},
		"a number of another log":     {seal(token.Session{Log: guildlog.NewID(false), Base: 2, User: user(1), Intents: 1}), "99999", 0},
		"a number beyond the last":    {c.session, fmt.Sprint(last + 1), protocol.CloseInvalidSeq},
		"a negative number":           {c.session, "-1", protocol.CloseInvalidSeq},
		"a number that is a fraction": {c.session, "1.5", protocol.CloseInvalidSeq},
		"a number in words":           {c.session, `"three"`, protocol.CloseInvalidSeq},
	} {
		t.Run(name, func(t *testing.T) {
			n := w.connect()
			n.t = t
			n.send(fmt.Sprintf(`{"op":6,"d":{"token":%q,"session_id":%q,"seq":%s}}`, w.token(user(1)), test.session, test.seq))
			if test.code != 0 {
				n.closed(test.code)
				return
			}
			if m := n.op(protocol.OpInvalidSession); string(m.D) != "false" {
				t.Errorf("op 9 %s", m)
			}
			n.identify(user(1), allEvents) // on the same socket
			n.at(last, "GUILD_CREATE")
			n.cut()
		})
	}
	t.Run("a bad token", func(t *testing.T) {
		n := w.connect()
		n.t = t
		n.send(fmt.Sprintf(`{"op":6,"d":{"token":"x","session_id":%q,"seq":3}}`, c.session))
		n.closed(protocol.CloseAuthenticationFailed)
	})
}

func TestResumeBehindDroppedHistory(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{shard: v1.GuildShardSpec{Retention: &v1.ShardRetention{Bytes: quantity("2000")}}})
	c := w.enter(user(1))
	from := c.seq
	c.cut()
	for range 20 {
		w.say(strings.Repeat("long ", 50))
	}
	n := c.resume(user(1), from)
	n.op(protocol.OpInvalidSession)
	n.identify(user(1), allEvents)
	n.dispatch("GUILD_CREATE")
}

func TestRetentionChangesWithTheShard(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	from := c.seq
	c.cut()
	for range 20 {
		w.say(strings.Repeat("long ", 50))
	}
	n := c.resume(user(1), from)
	for range 20 {
		n.dispatch("MESSAGE_CREATE")
	}
	n.dispatch("RESUMED")
	n.cut()
	w.directory.ApplyShard(&v1.GuildShard{Spec: v1.GuildShardSpec{Retention: &v1.ShardRetention{
		Bytes: quantity("2000"), Age: &metav1.Duration{Duration: time.Hour},
	}}})
	c.resume(user(1), from).op(protocol.OpInvalidSession)
}

func TestTheNewestConnectionTakesOver(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	c := w.enter(user(1))
	for range 3 { // half-dead ones: they do not read, and nobody closed them
		c = c.resume(user(1), c.seq)
		c.dispatch("RESUMED")
	}
	w.say("to the newest")
	c.hears("to the newest")
	eventually(t, "the older ones are gone", func() bool { return w.gateway.Connections() == 1 })
	if counts := w.guild().Counts(); counts.Sessions != 1 || counts.Online != 1 {
		t.Errorf("%+v", counts)
	}
	w.enter(user(1)) // a session of its own, which is counted a moment after it has got its guild
	eventually(t, "two sessions of one user", func() bool {
		counts := w.guild().Counts()
		return counts.Sessions == 2 && counts.Online == 1
	})
}

func TestGuildOfMembersOnly(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{membersOnly: true})
	c := w.connect()
	if m := c.identify(user(1), allEvents); !strings.Contains(m.raw, `"guilds":[]`) {
		t.Errorf("a stranger sees a guild: %s", m)
	}
	w.say("not for strangers")
	w.publish("GUILDHALL_INVITE", `{}`, user(1))
	c.dispatch("GUILDHALL_INVITE")

	seq := w.join(user(1))
	created := c.at(seq, "GUILD_CREATE")
	if !strings.Contains(created.raw, `"unavailable":false`) || !strings.Contains(created.raw, `"member_count":1`) {
		t.Errorf("%s", created)
	}
	noNullArrays(t, created)
	w.say("welcome")
	c.hears("welcome")
	w.join(user(1)) // is a member already
	w.say("again")
	c.hears("again")

	seq = w.leave(user(1))
	if m := c.at(seq, "GUILD_DELETE"); string(m.D) != `{"id":"`+guildID.String()+`"}` {
		t.Errorf("%s", m)
	}
	w.say("among us")
	c.send(`{"op":1,"d":null}`)
	c.op(protocol.OpHeartbeatACK)
	c.at(w.join(user(1)), "GUILD_CREATE")
	w.say("back")
	c.hears("back")
}

func TestOthersHearOfMembers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{membersOnly: true})
	w.join(user(1))
	c := w.enter(user(1))
	// The last number of each is of what user 2 alone is told.
	c.at(w.join(user(2))-1, "GUILD_MEMBER_ADD")
	c.at(w.leave(user(2))-1, "GUILD_MEMBER_REMOVE")
}

func TestAnOpenGuildIsJoinedByConnecting(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	a := w.enter(user(1))
	w.enter(user(2)).cut()
	if m := a.dispatch("GUILD_MEMBER_ADD"); !strings.Contains(m.raw, user(2).String()) {
		t.Errorf("%s", m)
	}
	before := w.guild().Counts()
	w.enter(user(2)) // no second time
	if after := w.guild().Counts(); after.LastSeq != before.LastSeq || after.Members != 2 {
		t.Errorf("%+v, then %+v", before, after)
	}
}

// TestResumeAcrossMembership: what happened to a user's membership while the connection was
// down is replayed where it happened.
func TestResumeAcrossMembership(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		member bool // at the cut
		away   func(w *world) (expect func(c *client))
	}{
		"a join": {false, func(w *world) func(c *client) {
			w.say("before")
			join := w.join(user(1))
			after := w.say("after")
			return func(c *client) {
				c.at(join, "GUILD_CREATE")
				c.at(after, "MESSAGE_CREATE")
				c.at(after, "RESUMED")
			}
		}},
		"a leave": {true, func(w *world) func(c *client) {
			before := w.say("before")
			leave := w.leave(user(1))
			after := w.say("after")
			return func(c *client) {
				c.at(before, "MESSAGE_CREATE")
				c.at(leave, "GUILD_DELETE")
				c.at(after, "RESUMED")
			}
		}},
		"a leave and a join": {true, func(w *world) func(c *client) {
			before := w.say("before")
			leave := w.leave(user(1))
			w.say("between")
			join := w.join(user(1))
			after := w.say("after")
			return func(c *client) {
				c.at(before, "MESSAGE_CREATE")
				c.at(leave, "GUILD_DELETE")
				c.at(join, "GUILD_CREATE")
				c.at(after, "MESSAGE_CREATE")
				c.at(after, "RESUMED")
			}
		}},
		"a join and a leave": {false, func(w *world) func(c *client) {
			join := w.join(user(1))
			between := w.say("between")
			leave := w.leave(user(1))
			after := w.say("after")
			return func(c *client) {
				c.at(join, "GUILD_CREATE")
				c.at(between, "MESSAGE_CREATE")
				c.at(leave, "GUILD_DELETE")
				c.at(after, "RESUMED")
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, setup{membersOnly: true})
			if test.member {
				w.join(user(1))
			}
			c := w.connect()
			c.identify(user(1), allEvents)
			from := *c.identified(test.member)
			c.cut()
			expect := test.away(w)
			for range 2 { // the same, however often
				n := c.resume(user(1), from)
				expect(n)
				n.cut()
			}
			n := c.resume(user(1), w.guild().Counts().LastSeq)
			n.dispatch("RESUMED")
			live := w.say("live")
			w.publish("GUILDHALL_MARK", `{}`, user(1))
			if _, err := w.guild().Member(user(1)); err == nil {
				n.at(live, "MESSAGE_CREATE")
			}
			n.at(live+1, "GUILDHALL_MARK") // and nothing else before it
		})
	}
}

// identified takes the guild of a member and returns the number to resume from.
func (c *client) identified(member bool) *uint64 {
	c.t.Helper()
	if member {
		return c.dispatch("GUILD_CREATE").Seq
	}
	seq := c.seq + 1 // the base
	return &seq
}

func TestSlowClientIsCutAndMayResume(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{shard: v1.GuildShardSpec{Retention: &v1.ShardRetention{Bytes: quantity("4Mi")}}})
	slow, quick := w.enter(user(1)), w.enter(user(2))
	slow.ws.NetConn().(*net.TCPConn).SetReadBuffer(256 << 10)
	slow.dispatch("GUILD_MEMBER_ADD")
	content := strings.Repeat("x", 200<<10)
	eventually(t, "the slow one is cut", func() bool {
		w.say(content)
		quick.hears(content)
		return w.core.Stats().Overruns > 0
	})
	for {
		if _, err := slow.receive(); err != nil {
			break
		}
	}
	slow.resume(user(1), slow.seq).op(protocol.OpInvalidSession)
}
