package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/directory"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	guildID  snowflake.ID = 1100000000000000001
	member   snowflake.ID = 200000000000000001
	stranger snowflake.ID = 200000000000000002
	backend  snowflake.ID = 200000000000000003
	robot    snowflake.ID = 200000000000000004
)

// world is a handler with one guild, with one member, a bot, and one channel.
type world struct {
	t         testing.TB
	keys      *token.Keys
	core      *fanout.Core
	directory *directory.Directory
	handler   *Handler
	channel   string
}

func newWorld(t testing.TB, join v1.JoinPolicy) *world {
	t.Helper()
	keys, err := token.ParseKeys(token.GenerateKey(), "")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, keys: keys, core: fanout.New(fanout.Options{Workers: 1})}
	logger := slog.New(slog.DiscardHandler)
	w.directory = directory.New(directory.Options{
		ShardName: "a", ShardUID: "uid", Core: w.core, Logger: logger, Load: func() report.Load { return report.Load{} },
		PodAddress: func(string) string { return "127.0.0.1:1" },
	})
	w.handler = New(Options{Directory: w.directory, Keys: func() *token.Keys { return keys }, Logger: logger, HoldTime: 100 * time.Millisecond})
	t.Cleanup(func() {
		w.directory.Stop()
		w.core.Stop()
	})
	w.directory.Apply(guildOn("a", join))
	w.directory.SetSynced()
	if join == v1.JoinMembersOnly {
		w.call("PUT", "/guilds/"+guildID.String()+"/members/"+member.String(), backend, `{"username":"mia"}`).is(201)
	} else {
		w.call("PUT", "/guilds/"+guildID.String()+"/members/@me", member, "").is(201)
	}
	w.call("PUT", "/guilds/"+guildID.String()+"/members/"+robot.String(), backend, `{"username":"bot","bot":true}`).is(201)
	var channels []struct{ ID string }
	w.call("GET", "/guilds/"+guildID.String()+"/channels", member, "").is(200).decode(&channels)
	w.channel = channels[0].ID
	return w
}

func guildOn(shard string, join v1.JoinPolicy) *v1.Guild {
	g := &v1.Guild{ObjectMeta: metav1.ObjectMeta{Name: "hall", Namespace: "ns", UID: "uid-hall"}}
	g.Spec.Access.Join = join
	g.Status.ID = guildID.String()
	g.Status.Placement = &v1.GuildPlacementStatus{ShardName: shard, ShardUID: "uid"}
	return g
}

func (w *world) token(id snowflake.ID) string {
	w.t.Helper()
	issued, err := w.keys.Issue(token.Claims{User: id, Name: fmt.Sprint("user", id%10), Bot: id == robot, Publish: id == backend})
	if err != nil {
		w.t.Fatal(err)
	}
	return issued
}

func (w *world) seq() uint64 {
	w.t.Helper()
	place, _ := w.directory.Find(guildID)
	return place.Guild.Counts().LastSeq
}

// answer of a call.
type answer struct {
	*httptest.ResponseRecorder
	t    testing.TB
	what string
}

func (w *world) request(method, route string, as snowflake.ID, body string) *http.Request {
	r := httptest.NewRequest(method, "/g/"+guildID.String()+"/api/v10"+route, strings.NewReader(body))
	if as != 0 {
		r.Header.Set("Authorization", "Bot "+w.token(as))
	}
	return r
}

func (w *world) do(r *http.Request) *answer {
	recorder := httptest.NewRecorder()
	_, route, _ := strings.Cut(r.URL.Path, "/api/v10")
	w.handler.Serve(recorder, r, guildID, route)
	return &answer{ResponseRecorder: recorder, t: w.t, what: r.Method + " " + route}
}

func (w *world) call(method, route string, as snowflake.ID, body string) *answer {
	return w.do(w.request(method, route, as, body))
}

// is checks status and form of the answer.
func (a *answer) is(status int) *answer {
	a.t.Helper()
	if a.Code != status {
		a.t.Fatalf("%s: %d instead of %d: %s", a.what, a.Code, status, a.Body)
	}
	if status == http.StatusNoContent {
		if a.Body.Len() > 0 {
			a.t.Errorf("%s: a body with 204: %s", a.what, a.Body)
		}
		return a
	}
	if kind := a.Header()["Content-Type"]; len(kind) != 1 || kind[0] != "application/json" {
		a.t.Errorf("%s: Content-Type %q", a.what, kind)
	}
	if !json.Valid(a.Body.Bytes()) {
		a.t.Errorf("%s: no JSON: %s", a.what, a.Body)
	}
	if status < 400 || status == http.StatusTooManyRequests {
		return a
	}
	var e struct {
		Code    *int
		Message string
	}
	a.decode(&e)
	if e.Code == nil || e.Message == "" {
		a.t.Errorf("%s: error without code or message: %s", a.what, a.Body)
	}
	if status == http.StatusServiceUnavailable && a.Header().Get("Retry-After") == "" {
		a.t.Errorf("%s: 503 without Retry-After", a.what)
	}
	return a
}

func (a *answer) decode(v any) {
	a.t.Helper()
	if err := json.Unmarshal(a.Body.Bytes(), v); err != nil {
		a.t.Fatalf("%s: %v in %s", a.what, err, a.Body)
	}
}

func (a *answer) has(texts ...string) *answer {
	a.t.Helper()
	for _, text := range texts {
		if !strings.Contains(a.Body.String(), text) {
			a.t.Errorf("%s: %q is not in %s", a.what, text, a.Body)
		}
	}
	return a
}

const guildRoute = "/guilds/1100000000000000001"

func TestRoutes(t *testing.T) {
	w := newWorld(t, v1.JoinMembersOnly)
	messages := "/channels/" + w.channel + "/messages"
	const otherGuild = "/guilds/1100000000000000002"
	for name, test := range map[string]struct {
		route  string
		as     snowflake.ID
		body   string
		status int
		has    []string
	}{
		"the gateway, without a token":          {"GET /gateway", 0, "", 200, []string{`{"url":"ws://a.ns.svc/g/1100000000000000001/"}`}},
		"the gateway of a bot":                  {"GET /gateway/bot", robot, "", 200, []string{`"shards":1`, `"remaining":1000000`, `"max_concurrency":16`, `"url":"ws://a.ns.svc/g/`}},
		"the gateway of a bot without a token":  {"GET /gateway/bot", 0, "", 401, nil},
		"oneself":                               {"GET /users/@me", member, "", 200, []string{`"id":"200000000000000001"`, `"discriminator":"0"`, `"avatar":null`}},
		"oneself without a token":               {"GET /users/@me", 0, "", 401, []string{"401: Unauthorized"}},
		"one's guilds":                          {"GET /users/@me/guilds", member, "", 200, []string{`[{"id":"1100000000000000001"`}},
		"a stranger's guilds":                   {"GET /users/@me/guilds", stranger, "", 200, []string{`[]`}},
		"the application":                       {"GET /applications/@me", robot, "", 200, []string{`"owner":{"id"`, `"verify_key":""`, `"flags":0`}},
		"the application by its old name":       {"GET /oauth2/applications/@me", robot, "", 200, []string{`"bot_require_code_grant":false`}},
		"the guild":                             {"GET " + guildRoute, member, "", 200, []string{`"name":"hall"`, `"emojis":[]`}},
		"the guild, for the backend":            {"GET " + guildRoute, backend, "", 200, nil},
		"the guild, for strangers":              {"GET " + guildRoute, stranger, "", 403, []string{`50001`}},
		"another guild":                         {"GET " + otherGuild, member, "", 404, []string{`10004`, "1100000000000000001"}},
		"a guild that is none":                  {"GET /guilds/x", member, "", 404, nil},
		"another guild's channels":              {"GET " + otherGuild + "/channels", member, "", 404, nil},
		"channels, for strangers":               {"GET " + guildRoute + "/channels", stranger, "", 403, nil},
		"a channel":                             {"GET /channels/" + w.channel, member, "", 200, []string{`"name":"general"`, `"permission_overwrites":[]`}},
		"a channel, for strangers":              {"GET /channels/" + w.channel, stranger, "", 403, nil},
		"an unknown channel":                    {"GET /channels/1100000000000000009", member, "", 404, []string{`10003`}},
		"a channel that is none":                {"GET /channels/x", member, "", 404, []string{`10003`}},
		"a new channel":                         {"POST " + guildRoute + "/channels", backend, `{"name":"news","topic":null}`, 201, []string{`"type":0`, `"guild_id":"1100000000000000001"`}},
		"a new channel, by a member":            {"POST " + guildRoute + "/channels", member, `{"name":"news"}`, 403, []string{`50013`}},
		"a new channel of another guild":        {"POST " + otherGuild + "/channels", backend, `{"name":"news"}`, 404, nil},
		"a channel without a name":              {"POST " + guildRoute + "/channels", backend, `{}`, 400, []string{"name: expected"}},
		"a channel of a strange type":           {"POST " + guildRoute + "/channels", backend, `{"name":"x","type":99}`, 400, []string{"type: expected"}},
		"a channel with overwrites":             {"POST " + guildRoute + "/channels", backend, `{"name":"x","permission_overwrites":[{}]}`, 400, []string{"permission_overwrites: expected"}},
		"a channel with a long topic":           {"POST " + guildRoute + "/channels", backend, `{"name":"x","topic":"` + strings.Repeat("x", 1025) + `"}`, 400, []string{"topic: expected"}},
		"a channel at a negative position":      {"POST " + guildRoute + "/channels", backend, `{"name":"x","position":-1}`, 400, []string{"position: expected"}},
		"a channel in what is no category":      {"POST " + guildRoute + "/channels", backend, `{"name":"x","parent_id":"` + w.channel + `"}`, 400, []string{"parent_id: expected"}},
		"a channel whose name is a number":      {"POST " + guildRoute + "/channels", backend, `{"name":5}`, 400, []string{"name: expected a string, got a number"}},
		"to delete an unknown channel":          {"DELETE /channels/1100000000000000009", backend, "", 404, nil},
		"to delete a channel that is none":      {"DELETE /channels/x", backend, "", 404, nil},
		"to delete a channel, by a member":      {"DELETE /channels/" + w.channel, member, "", 403, nil},
		"a member, for oneself":                 {"GET " + guildRoute + "/members/@me", member, "", 200, []string{`"joined_at":"`, `"roles":[]`}},
		"another member":                        {"GET " + guildRoute + "/members/" + robot.String(), member, "", 403, nil},
		"a member, for the backend":             {"GET " + guildRoute + "/members/" + member.String(), backend, "", 200, []string{`"mia"`}},
		"an unknown member":                     {"GET " + guildRoute + "/members/" + stranger.String(), backend, "", 404, []string{`10007`}},
		"a member that is none":                 {"GET " + guildRoute + "/members/x", backend, "", 400, []string{"user: "}},
		"a member of another guild":             {"GET " + otherGuild + "/members/@me", member, "", 404, nil},
		"to join, with members only":            {"PUT " + guildRoute + "/members/@me", stranger, "", 403, []string{`50001`}},
		"to add a member, by a member":          {"PUT " + guildRoute + "/members/" + stranger.String(), member, `{"username":"x"}`, 403, nil},
		"to add a member who is one":            {"PUT " + guildRoute + "/members/" + member.String(), backend, `{"username":"x"}`, 204, nil},
		"to add a member without a name":        {"PUT " + guildRoute + "/members/" + stranger.String(), backend, `{}`, 400, []string{"username: expected"}},
		"to add a member with a long name":      {"PUT " + guildRoute + "/members/" + stranger.String(), backend, `{"username":"` + strings.Repeat("x", 101) + `"}`, 400, []string{"username: expected"}},
		"to add a member to another guild":      {"PUT " + otherGuild + "/members/@me", backend, ``, 404, nil},
		"to remove a stranger":                  {"DELETE " + guildRoute + "/members/" + stranger.String(), backend, "", 404, []string{`10007`}},
		"to remove somebody, by a member":       {"DELETE " + guildRoute + "/members/" + robot.String(), member, "", 403, nil},
		"to remove somebody from another guild": {"DELETE " + otherGuild + "/members/@me", backend, "", 404, nil},
		"to leave without having been there":    {"DELETE /users/@me/guilds/1100000000000000001", stranger, "", 404, nil},
		"to leave another guild":                {"DELETE /users/@me/guilds/1100000000000000002", member, "", 404, nil},
		"a message":                             {"POST " + messages, member, `{"content":"hi","tts":false,"allowed_mentions":{"parse":[]},"embeds":null,"sticker_ids":[],"message_reference":null}`, 200, []string{`"content":"hi"`, `"embeds":[]`, `"mentions":[]`, `"edited_timestamp":null`, `"flags":0`}},
		"a message that mentions members":       {"POST " + messages, member, `{"content":"<@` + robot.String() + `> <@` + stranger.String() + `>"}`, 200, []string{`"mentions":[{"id":"` + robot.String() + `","username"`, `}],"mention_roles":[]`}},
		"a message that may mention a number":   {"POST " + messages, member, `{"content":"x","allowed_mentions":{"users":["5"]}}`, 400, []string{"allowed_mentions.users: expected a snowflake, in a string, got a string that is none"}},
		"a message that may mention it twice":   {"POST " + messages, member, `{"content":"x","allowed_mentions":{"parse":["users"],"users":["` + robot.String() + `"]}}`, 400, []string{"allowed_mentions.users: expected none"}},
		"a message of the backend":              {"POST " + messages, backend, `{"content":"hi"}`, 200, nil},
		"a message of a stranger":               {"POST " + messages, stranger, `{"content":"hi"}`, 403, []string{`50001`}},
		"a message without a token":             {"POST " + messages, 0, `{"content":"hi"}`, 401, nil},
		"a message to nowhere":                  {"POST /channels/1100000000000000009/messages", member, `{"content":"hi"}`, 404, []string{`10003`}},
		"a message to what is no channel":       {"POST /channels/x/messages", member, `{"content":"hi"}`, 404, []string{`10003`}},
		"an empty message":                      {"POST " + messages, member, `{}`, 400, []string{"content: expected"}},
		"a null message":                        {"POST " + messages, member, `null`, 400, []string{"content: expected"}},
		"a long message":                        {"POST " + messages, member, `{"content":"` + strings.Repeat("ä", 2001) + `"}`, 400, []string{"content: expected"}},
		"the longest message":                   {"POST " + messages, member, `{"content":"` + strings.Repeat("ä", 2000) + `"}`, 200, nil},
		"a message that is a number":            {"POST " + messages, member, `{"content":5}`, 400, []string{"content: expected a string, got a number"}},
		"a message that is an array":            {"POST " + messages, member, `[]`, 400, []string{"body: expected"}},
		"a message that is no JSON":             {"POST " + messages, member, `{"content":`, 400, []string{"body: expected"}},
		"a message that is nothing":             {"POST " + messages, member, ``, 400, []string{"body: expected"}},
		"a message that is no UTF-8":            {"POST " + messages, robot, "{\"content\":\"x\",\"embeds\":[{\"title\":\"\xff\"}]}", 400, []string{"body: expected UTF-8"}},
		"a message with a file":                 {"POST " + messages, member, `{"content":"x","attachments":[{}]}`, 400, []string{"attachments: expected"}},
		"a message with a sticker":              {"POST " + messages, member, `{"content":"x","sticker_ids":["1"]}`, 400, []string{"sticker_ids: expected"}},
		"a message with a poll":                 {"POST " + messages, member, `{"content":"x","poll":{}}`, 400, []string{"poll: expected"}},
		"a bot's embeds":                        {"POST " + messages, robot, `{"embeds":[{"title":"x"}],"components":[{"type":1}]}`, 200, []string{`"embeds":[{"title":"x"}]`, `"components":[{"type":1}]`}},
		"a bot's null embed":                    {"POST " + messages, robot, `{"embeds":[null]}`, 400, []string{"embeds[0]: expected an object"}},
		"a bot's embed that is a number":        {"POST " + messages, robot, `{"content":"x","components":[{},5]}`, 400, []string{"components[1]: expected an object"}},
		"a user's embeds":                       {"POST " + messages, member, `{"embeds":[{"title":"x"}]}`, 400, []string{"embeds: expected none"}},
		"too many embeds":                       {"POST " + messages, robot, `{"embeds":[{},{},{},{},{},{},{},{},{},{},{}]}`, 400, []string{"embeds: expected at most 10"}},
		"a reply":                               {"POST " + messages, member, `{"content":"x","message_reference":{"message_id":"1100000000000000005","fail_if_not_exists":true}}`, 200, []string{`"type":19`, `"message_id":"1100000000000000005"`, `"channel_id":"` + w.channel}},
		"a reply to a number":                   {"POST " + messages, member, `{"content":"x","message_reference":{"message_id":5}}`, 400, []string{"message_reference.message_id: expected a snowflake, in a string, got a number"}},
		"a reply to nothing":                    {"POST " + messages, member, `{"content":"x","message_reference":{}}`, 400, []string{"message_reference: expected"}},
		"flags that senders may not set":        {"POST " + messages, member, `{"content":"x","flags":-1}`, 200, []string{`"flags":36868`}},
		"a nonce in words":                      {"POST " + messages, member, `{"content":"x","nonce":"abc"}`, 200, []string{`"nonce":"abc"`}},
		"a nonce that is a number":              {"POST " + messages, member, `{"content":"x","nonce":123456789012345678}`, 200, []string{`"nonce":"123456789012345678"`}},
		"a nonce that is a boolean":             {"POST " + messages, member, `{"content":"x","nonce":true}`, 400, []string{"nonce: expected"}},
		"a long nonce":                          {"POST " + messages, member, `{"content":"x","nonce":"` + strings.Repeat("x", 26) + `"}`, 400, []string{"nonce: expected"}},
		"events, by a member":                   {"POST " + guildRoute + "/events", member, `{"t":"X","d":{}}`, 403, []string{`50013`}},
		"events of another guild":               {"POST " + otherGuild + "/events", backend, `{"t":"X","d":{}}`, 404, nil},
		"no such route":                         {"GET /nothing", member, "", 404, []string{"no such route: GET"}},
		"a route with another method":           {"POST /gateway", member, "", 404, []string{"no such route: POST"}},
		"a route with two slashes":              {"GET //gateway", 0, "", 404, []string{"no such route"}},
		"a route that goes up":                  {"GET /users/../gateway", 0, "", 404, []string{"no such route"}},
		"a route that ends in a slash":          {"GET /gateway/", 0, "", 404, []string{"no such route"}},
	} {
		t.Run(name, func(t *testing.T) {
			method, route, _ := strings.Cut(test.route, " ")
			a := w.call(method, route, test.as, test.body)
			a.t = t
			a.is(test.status).has(test.has...)
		})
	}
}

func TestPublishedEvents(t *testing.T) {
	w := newWorld(t, v1.JoinMembersOnly)
	huge := `{"x":"` + strings.Repeat("x", guild.MaxEventSize) + `"}`
	many := strings.TrimSuffix(strings.Repeat(`{"t":"X","d":{}},`, guild.MaxBatch+1), ",")
	for name, test := range map[string]struct {
		body   string
		status int
		has    string
	}{
		"an event":                          {`{"t":"MESSAGE_CREATE","d":{"content":"x"}}`, 200, `{"s":`},
		"an event with the guild's id":      {`{"t":"MESSAGE_CREATE","d":{"guild_id":"1100000000000000001"}}`, 200, `{"s":`},
		"an event for named users":          {`{"t":"MESSAGE_CREATE","d":{},"users":["200000000000000001"]}`, 200, ""},
		"an event of another guild":         {`{"t":"MESSAGE_CREATE","d":{"guild_id":"1100000000000000002"}}`, 400, "d.guild_id: expected"},
		"a guild id that is a number":       {`{"t":"MESSAGE_CREATE","d":{"guild_id":1100000000000000001}}`, 400, "d.guild_id: expected"},
		"a null guild id":                   {`{"t":"MESSAGE_CREATE","d":{"guild_id":null}}`, 400, "d.guild_id: expected"},
		"nothing":                           {`{}`, 400, "t: expected"},
		"null":                              {`null`, 400, "t: expected"},
		"no name":                           {`{"d":{}}`, 400, "t: expected"},
		"a name in lower case":              {`{"t":"message_create","d":{}}`, 400, "t: expected"},
		"a name that would break the frame": {`{"t":"X\",\"s\":1","d":{}}`, 400, "t: expected"},
		"a name that is a number":           {`{"t":5,"d":{}}`, 400, "Body: t: expected a string"},
		"READY":                             {`{"t":"READY","d":{}}`, 400, "t: READY is made by the server alone"},
		"RESUMED":                           {`{"t":"RESUMED","d":{}}`, 400, "t: RESUMED"},
		"GUILD_CREATE":                      {`{"t":"GUILD_CREATE","d":{}}`, 400, "t: GUILD_CREATE"},
		"GUILD_DELETE":                      {`{"t":"GUILD_DELETE","d":{}}`, 400, "t: GUILD_DELETE"},
		"the no-op":                         {`{"t":"GUILDHALL_POSITION","d":{}}`, 400, "t: GUILDHALL_POSITION"},
		"no body":                           {`{"t":"X"}`, 400, "d: expected"},
		"a null body":                       {`{"t":"X","d":null}`, 400, "d: expected"},
		"a body that is an array":           {`{"t":"X","d":[]}`, 400, "d: expected"},
		"a huge body":                       {`{"t":"X","d":` + huge + `}`, 400, "d: expected at most"},
		"no users":                          {`{"t":"X","d":{},"users":[]}`, 400, "users: expected"},
		"users that are numbers":            {`{"t":"X","d":{},"users":[1]}`, 400, "Body: users: expected a snowflake"},
		"a batch":                           {`{"events":[{"t":"X","d":{}},{"t":"TYPING_START","d":{}}]}`, 200, `"events":[{"s":`},
		"an empty batch":                    {`{"events":[]}`, 400, "events: expected 1 to 1000"},
		"a batch that is too long":          {`{"events":[` + many + `]}`, 400, "events: expected 1 to 1000"},
		"a batch and an event":              {`{"t":"X","d":{},"events":[{"t":"X","d":{}}]}`, 400, "events: expected either"},
		"a batch with a fault":              {`{"events":[{"t":"X","d":{}},{"t":"X","d":5}]}`, 400, "events[1].d: expected"},
		"a batch that is an object":         {`{"events":{}}`, 400, "events: expected an array"},
		"a channel":                         {`{"t":"CHANNEL_CREATE","d":{"id":"1100000000000000007","type":0,"name":"c"}}`, 200, ""},
		"a channel with overwrites":         {`{"t":"CHANNEL_CREATE","d":{"id":"1100000000000000007","type":0,"name":"c","permission_overwrites":[{}]}}`, 400, "d.permission_overwrites: expected"},
		"a channel with null overwrites":    {`{"t":"CHANNEL_UPDATE","d":{"id":"1100000000000000007","type":0,"name":"c","permission_overwrites":null}}`, 400, "d.permission_overwrites: expected"},
		"a channel with empty overwrites":   {`{"t":"CHANNEL_UPDATE","d":{"id":"1100000000000000007","type":0,"name":"c","permission_overwrites": [ ]}}`, 200, ""},
		"a channel without an id":           {`{"t":"CHANNEL_CREATE","d":{"type":0,"name":"c"}}`, 400, "d.id: expected"},
		"a channel whose id is a number":    {`{"t":"CHANNEL_CREATE","d":{"id":7,"type":0,"name":"c"}}`, 400, "d.id: expected a snowflake, 17 to 19 digits in a string, got a number"},
		"a channel without a type":          {`{"t":"CHANNEL_CREATE","d":{"id":"1100000000000000007","name":"c"}}`, 400, "d.type: expected"},
		"a channel of an unknown type":      {`{"t":"CHANNEL_CREATE","d":{"id":"1100000000000000007","type":77,"name":"c"}}`, 400, "d.type: expected"},
		"a channel without a name":          {`{"t":"CHANNEL_CREATE","d":{"id":"1100000000000000007","type":0}}`, 400, "d.name: expected"},
		"a deleted channel without an id":   {`{"t":"CHANNEL_DELETE","d":{}}`, 400, "d.id: expected"},
		"a role":                            {`{"t":"GUILD_ROLE_CREATE","d":{"role":{"id":"1100000000000000008","name":"r"}}}`, 200, ""},
		"a role without an id":              {`{"t":"GUILD_ROLE_UPDATE","d":{"role":{}}}`, 400, "d.role.id: expected"},
		"a deleted role without an id":      {`{"t":"GUILD_ROLE_DELETE","d":{}}`, 400, "d.role_id: expected"},
		"a member":                          {`{"t":"GUILD_MEMBER_ADD","d":{"user":{"id":"200000000000000077"},"roles":[]}}`, 200, ""},
		"a member who is nobody":            {`{"t":"GUILD_MEMBER_ADD","d":{"user":null}}`, 400, "d.user.id: expected"},
		"a member with null roles":          {`{"t":"GUILD_MEMBER_ADD","d":{"user":{"id":"200000000000000078"},"roles":null}}`, 400, "d.roles: expected"},
		"a member who joined at 5":          {`{"t":"GUILD_MEMBER_ADD","d":{"user":{"id":"200000000000000078"},"joined_at":5}}`, 400, "d.joined_at: not a number"},
		"a new name of the guild":           {`{"t":"GUILD_UPDATE","d":{"id":"1100000000000000001","name":"new"}}`, 200, ""},
		"a member whose id is no snowflake": {`{"t":"GUILD_MEMBER_ADD","d":{"user":{"id":"5"}}}`, 400, "d.user.id: expected a snowflake, 17 to 19 digits in a string, got a string that is none"},
		"a guild whose name is a number":    {`{"t":"GUILD_UPDATE","d":{"name":5}}`, 400, "d.name: not a number"},
		"a guild without a name":            {`{"t":"GUILD_UPDATE","d":{"name":""}}`, 400, "d.name: expected"},
		"an update of another guild":        {`{"t":"GUILD_UPDATE","d":{"id":"1100000000000000002"}}`, 400, "d.id: expected"},
	} {
		t.Run(name, func(t *testing.T) {
			before := w.seq()
			a := w.call("POST", guildRoute+"/events", backend, test.body)
			a.t = t
			a.is(test.status).has(test.has)
			if after := w.seq(); (after == before) != (test.status != 200) {
				t.Errorf("%d, and the log went from %d to %d", test.status, before, after)
			}
		})
	}
}

func TestPublishedStateIsWhatClientsSee(t *testing.T) {
	w := newWorld(t, v1.JoinMembersOnly)
	publish := func(kind, d string) {
		t.Helper()
		w.call("POST", guildRoute+"/events", backend, `{"t":"`+kind+`","d":`+d+`}`).is(200)
	}
	publish("CHANNEL_CREATE", `{"id":"1100000000000000007","type":2,"name":"voice","position":9}`)
	w.call("GET", guildRoute+"/channels", member, "").is(200).has(`"name":"voice"`)
	publish("CHANNEL_DELETE", `{"id":"1100000000000000007"}`)
	w.call("GET", "/channels/1100000000000000007", member, "").is(404)
	publish("GUILD_ROLE_CREATE", `{"role":{"id":"1100000000000000008","name":"mods"}}`)
	publish("GUILD_UPDATE", `{"name":"great hall"}`)
	w.call("GET", guildRoute, member, "").is(200).has(`"mods"`, `"great hall"`)
	publish("GUILD_ROLE_DELETE", `{"role_id":"1100000000000000008"}`)
	// An update may lack what has not changed, and makes nobody a member.
	publish("GUILD_MEMBER_UPDATE", `{"user":{"id":"200000000000000001","username":"mia2"},"nick":"M"}`)
	w.call("GET", guildRoute+"/members/@me", member, "").is(200).has(`"nick":"M"`, `"mia2"`, `"joined_at":"`, `"roles":[]`)
	publish("GUILD_MEMBER_UPDATE", `{"user":{"id":"200000000000000002"},"roles":[]}`)
	w.call("GET", guildRoute+"/members/@me", stranger, "").is(404)
}

func TestIdempotencyKeys(t *testing.T) {
	w := newWorld(t, v1.JoinMembersOnly)
	publish := func(key, body string) *answer {
		t.Helper()
		r := w.request("POST", guildRoute+"/events", backend, body)
		r.Header.Set("Idempotency-Key", key)
		return w.do(r)
	}
	const one, two = `{"events":[{"t":"X","d":{"n":1}},{"t":"X","d":{"n":2}}]}`, `{"t":"X","d":{"n":3}}`
	first := publish("k", one).is(200).Body.String()
	last := w.seq()
	for range 3 {
		if again := publish("k", one).is(200).Body.String(); again != first {
			t.Errorf("%s, and then %s", first, again)
		}
	}
	publish("k", two).is(422).has("Idempotency-Key")
	publish(strings.Repeat("k", 129), one).is(400).has("Idempotency-Key")
	if w.seq() != last {
		t.Error("something was appended")
	}
	publish("K", two).is(200)
	publish("", two).is(200)
	publish("", two).is(200) // no key: at least once
	if w.seq() != last+3 {
		t.Errorf("the log went from %d to %d", last, w.seq())
	}
	publish("faulty", `{"events":[{"t":"X","d":{}},{"t":"X","d":5}]}`).is(400)
	publish("faulty", two).is(200) // a refused request uses no key
}

func TestIdempotencyUnderConcurrency(t *testing.T) {
	w := newWorld(t, v1.JoinMembersOnly)
	before := w.seq()
	const keys, tries = 20, 8
	answers := make([][]string, keys)
	var mu sync.Mutex
	var group sync.WaitGroup
	for key := range keys {
		for range tries {
			group.Go(func() {
				r := w.request("POST", guildRoute+"/events", backend, fmt.Sprintf(`{"t":"X","d":{"n":%d}}`, key))
				r.Header.Set("Idempotency-Key", fmt.Sprint("key", key))
				a := w.do(r)
				mu.Lock()
				defer mu.Unlock()
				answers[key] = append(answers[key], a.Body.String())
			})
		}
	}
	group.Wait()
	seen := map[string]bool{}
	for key, list := range answers {
		slices.Sort(list)
		if len(slices.Compact(list)) != 1 || seen[list[0]] {
			t.Errorf("key %d was answered %v", key, list)
		}
		seen[list[0]] = true
	}
	if w.seq() != before+keys {
		t.Errorf("%d events appended", w.seq()-before)
	}
}

func TestEnforcedNonce(t *testing.T) {
	w := newWorld(t, v1.JoinMembersOnly)
	messages := "/channels/" + w.channel + "/messages"
	send := func(as snowflake.ID, body string) string {
		t.Helper()
		return w.call("POST", messages, as, body).is(200).Body.String()
	}
	first := send(member, `{"content":"x","nonce":"n","enforce_nonce":true}`)
	if again := send(member, `{"content":"x","nonce":"n","enforce_nonce":true}`); again != first {
		t.Errorf("%s, and then %s", first, again)
	}
	for _, other := range []string{
		send(robot, `{"content":"x","nonce":"n","enforce_nonce":true}`),
		send(member, `{"content":"x","nonce":"m","enforce_nonce":true}`),
		send(member, `{"content":"x","nonce":"n"}`),
	} {
		if other == first {
			t.Error("a message of its own was taken for a repetition")
		}
	}
	// The key of a publisher is another thing than a nonce.
	r := w.request("POST", guildRoute+"/events", backend, `{"t":"X","d":{}}`)
	r.Header.Set("Idempotency-Key", fmt.Sprintf("nonce %s %s q", member, w.channel))
	w.do(r).is(200)
	if m := send(member, `{"content":"x","nonce":"q","enforce_nonce":true}`); !strings.HasPrefix(m, `{"id":`) {
		t.Errorf("answer %s", m)
	}
}

func TestMembership(t *testing.T) {
	w := newWorld(t, v1.JoinOpen)
	w.call("PUT", guildRoute+"/members/@me", stranger, "").is(201).has(`"joined_at":`)
	w.call("PUT", guildRoute+"/members/"+stranger.String(), stranger, "").is(204)
	w.call("GET", guildRoute, stranger, "").is(200)
	w.call("DELETE", "/users/@me/guilds/"+guildID.String(), stranger, "").is(204)
	w.call("GET", guildRoute, stranger, "").is(403)
	w.call("PUT", guildRoute+"/members/"+stranger.String(), backend, `{"username":"x"}`).is(201)
	w.call("DELETE", guildRoute+"/members/"+stranger.String(), backend, "").is(204)
	w.call("DELETE", guildRoute+"/members/@me", member, "").is(204)
}

func TestChannelsAreLimited(t *testing.T) {
	w := newWorld(t, v1.JoinOpen)
	var events []string
	for i := range guild.MaxChannels - 1 { // one is there
		events = append(events, fmt.Sprintf(`{"t":"CHANNEL_CREATE","d":{"id":"11000000000000%05d","type":0,"name":"c"}}`, i+10))
	}
	batch := `{"events":[` + strings.Join(events, ",") + `]}`
	w.call("POST", guildRoute+"/events", backend, batch).is(200)
	w.call("POST", guildRoute+"/events", backend, batch).is(200) // none of them is new
	w.call("POST", guildRoute+"/channels", backend, `{"name":"one more"}`).is(400).has("500 channels")
	before := w.seq()
	w.call("POST", guildRoute+"/events", backend,
		`{"events":[{"t":"X","d":{}},{"t":"CHANNEL_UPDATE","d":{"id":"1100000000000099999","type":0,"name":"c"}}]}`).is(400).has("501")
	if w.seq() != before {
		t.Error("a part of the batch was appended")
	}
}

func TestBodies(t *testing.T) {
	w := newWorld(t, v1.JoinOpen)
	messages := "/channels/" + w.channel + "/messages"
	t.Run("too large", func(t *testing.T) {
		w.call("POST", messages, member, `{"content":"`+strings.Repeat("x", maxBody)+`"}`).is(413).has("40005")
	})
	t.Run("multipart", func(t *testing.T) {
		r := w.request("POST", messages, member, "--x--")
		r.Header.Set("Content-Type", "multipart/form-data; boundary=x")
		w.do(r).is(400).has("Content-Type: expected application/json")
	})
	t.Run("cut short", func(t *testing.T) {
		r := w.request("POST", messages, member, "")
		r.Body = io.NopCloser(io.MultiReader(strings.NewReader(`{"content":`), failing{io.ErrUnexpectedEOF}))
		w.do(r).is(400).has("body: ")
	})
	t.Run("too slow", func(t *testing.T) {
		r := w.request("POST", messages, member, "")
		r.Body = io.NopCloser(failing{timeout{}})
		w.do(r).is(408)
	})
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

type timeout struct{}

func (timeout) Error() string   { return "i/o timeout" }
func (timeout) Timeout() bool   { return true }
func (timeout) Temporary() bool { return true }

func TestErrors(t *testing.T) {
	for name, test := range map[string]struct {
		err    error
		status int
	}{
		"too much waits for the log": {guild.ErrBusy, 429},
		"the guild is stopped":       {guild.ErrClosed, 503},
		"no member":                  {guild.ErrNotMember, 403},
		"a key that was used":        {guild.ErrKeyReused, 422},
		"the disk is full":           {guild.ErrFull, 507},
		"anything else":              {errors.New("?"), 500},
	} {
		t.Run(name, func(t *testing.T) {
			recorder := httptest.NewRecorder()
			writeError(recorder, fmt.Errorf("wrapped: %w", test.err))
			a := (&answer{ResponseRecorder: recorder, t: t, what: name}).is(test.status)
			if test.status != 429 {
				return
			}
			a.has(`"retry_after":1`, `"global":false`, `"message":"`)
			if a.Header().Get("Retry-After") != "1" || a.Header().Get("Via") == "" {
				t.Errorf("headers %v", maps.Collect(maps.All(a.Header())))
			}
		})
	}
}

// TestNoAnswerIsBetterThanAWrongOne: when nobody knows whether something was appended, the connection is closed.
func TestNoAnswerIsBetterThanAWrongOne(t *testing.T) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { writeError(w, guild.ErrUncertain) }))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.Start()
	defer s.Close()
	if response, err := s.Client().Get(s.URL); err == nil {
		response.Body.Close()
		t.Errorf("%s", response.Status)
	}
}

func TestGuildsThatAreNotThere(t *testing.T) {
	w := newWorld(t, v1.JoinOpen)
	other := func(id snowflake.ID, header string) *answer {
		recorder := httptest.NewRecorder()
		r := w.request("GET", "/gateway", 0, "")
		r.Header.Set(directory.ForwardedHeader, header)
		w.handler.Serve(recorder, r, id, "/gateway")
		return &answer{ResponseRecorder: recorder, t: t, what: "GET /gateway"}
	}
	const unknown snowflake.ID = 1100000000000000042
	t.Run("a guild that nobody knows", func(t *testing.T) { other(unknown, "").is(404).has("10004") })
	t.Run("one that the pod which forwarded knows", func(t *testing.T) { other(unknown, "1").is(503) })
	t.Run("one that appears meanwhile", func(t *testing.T) {
		w.handler.o.HoldTime = time.Minute
		defer func() { w.handler.o.HoldTime = 100 * time.Millisecond }()
		var group sync.WaitGroup
		group.Go(func() { other(unknown, "1").is(200) })
		g := guildOn("a", v1.JoinOpen)
		g.UID, g.Status.ID = "uid-2", unknown.String()
		w.directory.Apply(g)
		group.Wait()
	})
	t.Run("one of another pod, forwarded by mistake", func(t *testing.T) {
		w.directory.Apply(guildOn("b", v1.JoinOpen))
		other(guildID, "1").is(503)
	})
	t.Run("one of another pod, which is away", func(t *testing.T) { other(guildID, "").is(503).has("nothing was appended") })
	t.Run("more wait than may", func(t *testing.T) {
		for range maxWaiting {
			w.handler.waiting <- struct{}{}
		}
		w.handler.o.HoldTime = time.Hour
		other(guildID, "1").is(503)
	})
	t.Run("any, once the server has stopped", func(t *testing.T) {
		w.directory.Apply(guildOn("a", v1.JoinOpen))
		w.handler.o.HoldTime = time.Hour
		w.directory.Stop()
		other(guildID, "").is(503)
		w.call("POST", guildRoute+"/events", backend, `{"t":"X","d":{}}`).is(503)
	})
}

// FuzzPublish: whatever a backend publishes, the guild lives on, and what it hands out is JSON.
func FuzzPublish(f *testing.F) {
	for _, seed := range []string{
		`{"t":"MESSAGE_CREATE","d":{"content":"x"}}`, `{"events":[{"t":"X","d":{}},{"t":"TYPING_START","d":{}}]}`,
		`{"t":"CHANNEL_CREATE","d":{"id":"1100000000000000007","type":0,"name":"c","permission_overwrites":[]}}`,
		`{"t":"CHANNEL_DELETE","d":{"id":"1100000000000000007"}}`, `{"t":"GUILD_UPDATE","d":{"name":5}}`,
		`{"t":"GUILD_ROLE_CREATE","d":{"role":{"id":"1100000000000000008"}}}`, `{"t":"GUILD_ROLE_DELETE","d":{"role_id":"1100000000000000008"}}`,
		`{"t":"GUILD_MEMBER_ADD","d":{"user":{"id":"200000000000000002"},"joined_at":null,"roles":[]}}`,
		`{"t":"GUILD_MEMBER_UPDATE","d":{"user":{"id":"200000000000000001"},"joined_at":""}}`,
		`{"t":"GUILD_MEMBER_REMOVE","d":{"user":{"id":"200000000000000001"}},"users":["200000000000000001"]}`,
		`{"t":"X","d":{"guild_id":"1100000000000000001","guild_id":5}}`, "{\"t\":\"X\",\"d\":{\"\xff\":1}}",
	} {
		f.Add([]byte(seed), "key")
	}
	f.Fuzz(func(t *testing.T, body []byte, key string) {
		w := newWorld(t, v1.JoinMembersOnly)
		before := w.seq()
		for range 2 {
			r := w.request("POST", guildRoute+"/events", backend, string(body))
			r.Header["Idempotency-Key"] = []string{key}
			a := w.do(r)
			switch a.Code {
			case 200, 400:
				a.is(a.Code)
			default:
				t.Fatalf("%d on %q", a.Code, body)
			}
			if a.Code == 400 && w.seq() != before {
				t.Fatalf("refused, and something was appended: %s", a.Body)
			}
		}
		w.call("GET", guildRoute, backend, "").is(200)
		w.call("GET", guildRoute+"/channels", backend, "").is(200)
		place, _ := w.directory.Find(guildID)
		for _, id := range []snowflake.ID{member, stranger} {
			place.Guild.Join(context.Background(), guild.NewUser(id, "x", false))
			var client sink
			session := w.core.NewSession(&client, func(error) {})
			err := place.Guild.Identify(context.Background(), guild.Client{Session: session, User: guild.NewUser(id, "x", false)}, func(s guild.Snapshot) {
				body := slices.Concat(s.Guild.Shared, s.Guild.Own)
				if !json.Valid(body) || bytes.Contains(body, []byte(`"joined_at":""`)) {
					t.Errorf("GUILD_CREATE %s", body)
				}
			})
			if err != nil {
				t.Error(err)
			}
			session.End(nil)
		}
	})
}
