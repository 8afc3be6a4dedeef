package guild

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"time"
	"unicode/utf8"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// User is who a token says its bearer is.
type User struct {
	ID            snowflake.ID `json:"id"`
	Username      string       `json:"username"`
	Discriminator string       `json:"discriminator"`
	GlobalName    *string      `json:"global_name"`
	Avatar        *string      `json:"avatar"`
	Bot           bool         `json:"bot"`
}

// NewUser makes the user object of a token's bearer.
func NewUser(id snowflake.ID, name string, bot bool) User {
	return User{ID: id, Username: name, Discriminator: "0", Bot: bot}
}

// Channel is a channel of the guild.
type Channel struct {
	ID       snowflake.ID
	Type     int
	Name     string
	Position int
	// Object is the channel object as clients see it.
	Object json.RawMessage
}

// Role is a role of the guild.
type Role struct {
	ID snowflake.ID
	// Object is the role object as clients see it.
	Object json.RawMessage
}

// member is a user in the guild. The zero value is of one who is not.
type member struct {
	object json.RawMessage // as clients see it, with user
	joined uint64          // last number of the record that let them in
	told   bool            // whether GUILD_CREATE for them was derived from it: somebody might have waited for it
}

// state is what the records of a guild's log add up to.
//
// Invariant: state is a pure function of the records applied so far, in order.
type state struct {
	name     string
	channels map[snowflake.ID]*Channel
	roles    map[snowflake.ID]*Role
	members  map[snowflake.ID]member

	// The parts of GUILD_CREATE that are the same for all, made when first asked for.
	shared []byte
}

func newState() *state {
	return &state{
		channels: map[snowflake.ID]*Channel{},
		roles:    map[snowflake.ID]*Role{},
		members:  map[snowflake.ID]member{},
	}
}

// birth is the body of a log's first record: the state that the guild starts with.
type birth struct {
	ID       snowflake.ID      `json:"id"`
	Name     string            `json:"name"`
	Channels []json.RawMessage `json:"channels"`
	Roles    []json.RawMessage `json:"roles"`
}

// channelRef, roleRef, memberRef are the parts of event bodies that are checked, and that the
// state is kept by.
type channelRef struct {
	ID         *snowflake.ID   `json:"id"`
	Type       *int            `json:"type"`
	Name       *string         `json:"name"`
	Position   int             `json:"position"`
	Overwrites json.RawMessage `json:"permission_overwrites"`
}

type roleRef struct {
	RoleID *snowflake.ID `json:"role_id"`
	Role   *struct {
		ID snowflake.ID `json:"id"`
	} `json:"role"`
}

type memberRef struct {
	User *struct {
		ID snowflake.ID `json:"id"`
	} `json:"user"`
	Roles    json.RawMessage `json:"roles"`
	JoinedAt *string         `json:"joined_at"`
}

// check says whether the state of guild id can take an event of type t with body data, a compact
// JSON object. What every client is told when it connects must not be what clients cannot read.
func check(id snowflake.ID, t string, data []byte) error {
	switch t {
	case "GUILD_UPDATE":
		var g struct {
			ID   *snowflake.ID `json:"id"`
			Name *string       `json:"name"`
		}
		if err := json.Unmarshal(data, &g); err != nil {
			return err
		}
		switch {
		case g.ID != nil && *g.ID != id:
			return fieldError("id", "expected this guild's id, "+id.String())
		case g.Name != nil && (*g.Name == "" || utf8.RuneCountInString(*g.Name) > 100):
			return fieldError("name", "expected 1 to 100 characters")
		}
	case "CHANNEL_CREATE", "CHANNEL_UPDATE":
		var c channelRef
		if err := json.Unmarshal(data, &c); err != nil {
			return err
		}
		switch {
		case c.ID == nil:
			return fieldError("id", "expected the channel's id, a snowflake")
		case c.Type == nil || !channelTypes[*c.Type]:
			return fieldError("type", "expected the type of a guild's channel: 0, 2, 4, 5, 13, 15 or 16")
		case c.Name == nil:
			return fieldError("name", "expected the channel's name")
		case c.Position < 0 || c.Position > maxPosition:
			return fieldError("position", fmt.Sprintf("expected 0 to %d", maxPosition))
		case len(c.Overwrites) > 0 && string(c.Overwrites) != "[]":
			return errOverwrites
		}
	case "CHANNEL_DELETE":
		var c channelRef
		if err := json.Unmarshal(data, &c); err != nil {
			return err
		}
		if c.ID == nil {
			return fieldError("id", "expected the channel's id, a snowflake")
		}
	case "GUILD_ROLE_CREATE", "GUILD_ROLE_UPDATE":
		var r roleRef
		if err := json.Unmarshal(data, &r); err != nil {
			return err
		}
		if r.Role == nil || r.Role.ID == 0 {
			return fieldError("role.id", "expected the role's id, a snowflake")
		}
	case "GUILD_ROLE_DELETE":
		var r roleRef
		if err := json.Unmarshal(data, &r); err != nil {
			return err
		}
		if r.RoleID == nil {
			return fieldError("role_id", "expected the role's id, a snowflake")
		}
	case "GUILD_MEMBER_ADD", "GUILD_MEMBER_UPDATE", "GUILD_MEMBER_REMOVE":
		var m memberRef
		if err := json.Unmarshal(data, &m); err != nil {
			return err
		}
		switch {
		case m.User == nil || m.User.ID == 0:
			return fieldError("user.id", "expected the member's user id, a snowflake")
		case len(m.Roles) > 0 && m.Roles[0] != '[':
			return fieldError("roles", "expected an array of role ids")
		case m.JoinedAt != nil && *m.JoinedAt == "":
			return fieldError("joined_at", "expected a timestamp or null")
		}
	}
	return nil
}

// channelTypes are those that stand in a guild's list of channels; libraries refuse others.
var channelTypes = map[int]bool{ChannelText: true, ChannelVoice: true, ChannelCategory: true, 5: true, 13: true, 15: true, 16: true}

// room says whether the guild can take the channels and roles that events with these bodies add.
func (s *state) room(events []Event, bodies [][]byte) error {
	channels, roles := len(s.channels), len(s.roles)
	for i, e := range events {
		switch e.Type {
		case "CHANNEL_CREATE", "CHANNEL_UPDATE":
			var c channelRef
			mustDecodeRaw(bodies[i], &c)
			if s.channels[*c.ID] == nil {
				channels++
			}
		case "GUILD_ROLE_CREATE", "GUILD_ROLE_UPDATE":
			var r roleRef
			mustDecodeRaw(bodies[i], &r)
			if s.roles[r.Role.ID] == nil {
				roles++
			}
		}
	}
	switch {
	case channels > len(s.channels) && channels > MaxChannels:
		return fieldError("d", fmt.Sprintf("the guild can have %d channels, this would make %d", MaxChannels, channels))
	case roles > len(s.roles) && roles > MaxRoles:
		return fieldError("d", fmt.Sprintf("the guild can have %d roles, this would make %d", MaxRoles, roles))
	}
	return nil
}

func fieldError(field, expected string) error {
	return &InvalidError{Field: field, Expected: expected}
}

// turnsMembership says whom a record that is applied next makes a member, or none any more; 0: nobody.
func (s *state) turnsMembership(r *guildlog.Record) snowflake.ID {
	if r.Type != "GUILD_MEMBER_ADD" && r.Type != "GUILD_MEMBER_REMOVE" {
		return 0
	}
	var ref memberRef
	mustDecode(r, &ref)
	if (s.members[ref.User.ID].object == nil) != (r.Type == "GUILD_MEMBER_ADD") {
		return 0
	}
	return ref.User.ID
}

// apply folds a record into the state. The record has passed check.
func (s *state) apply(r *guildlog.Record) {
	switch r.Type {
	case "GUILD_CREATE":
		var b birth
		mustDecode(r, &b)
		s.name = b.Name
		for _, c := range b.Channels {
			s.putChannel(c)
		}
		for _, object := range b.Roles {
			var role struct {
				ID snowflake.ID `json:"id"`
			}
			mustDecodeRaw(object, &role)
			s.roles[role.ID] = &Role{ID: role.ID, Object: object}
		}
	case "GUILD_UPDATE":
		var g struct {
			Name *string `json:"name"`
		}
		mustDecode(r, &g)
		if g.Name != nil {
			s.name = *g.Name
		}
	case "CHANNEL_CREATE", "CHANNEL_UPDATE":
		s.putChannel(r.Data)
	case "CHANNEL_DELETE":
		var c channelRef
		mustDecode(r, &c)
		delete(s.channels, *c.ID)
	case "GUILD_ROLE_CREATE", "GUILD_ROLE_UPDATE":
		var d struct {
			Role json.RawMessage `json:"role"`
		}
		var ref roleRef
		mustDecode(r, &d)
		mustDecode(r, &ref)
		s.roles[ref.Role.ID] = &Role{ID: ref.Role.ID, Object: d.Role}
	case "GUILD_ROLE_DELETE":
		var ref roleRef
		mustDecode(r, &ref)
		delete(s.roles, *ref.RoleID)
	case "GUILD_MEMBER_ADD":
		var m memberRef
		mustDecode(r, &m)
		was := s.members[m.User.ID]
		if was.object == nil {
			was.joined, was.told = r.End(), r.Reserved > 0
		}
		was.object = r.Data
		s.members[m.User.ID] = was
		return // members are not in the shared parts
	case "GUILD_MEMBER_UPDATE": // may lack fields that have not changed
		var m memberRef
		mustDecode(r, &m)
		if old := s.members[m.User.ID]; old.object != nil {
			var fields map[string]json.RawMessage
			mustDecodeRaw(old.object, &fields)
			mustDecode(r, &fields)
			old.object = encode(fields)
			s.members[m.User.ID] = old
		}
		return
	case "GUILD_MEMBER_REMOVE":
		var m memberRef
		mustDecode(r, &m)
		delete(s.members, m.User.ID)
		return
	default:
		return
	}
	s.shared = nil
}

func (s *state) putChannel(object []byte) {
	var ref channelRef
	mustDecodeRaw(object, &ref)
	s.channels[*ref.ID] = &Channel{
		ID: *ref.ID, Type: *ref.Type, Name: *ref.Name, Position: ref.Position, Object: object,
	}
}

// mustDecode decodes what check let pass: a failure is a bug, or a log that was tampered with.
func mustDecode(r *guildlog.Record, v any) {
	if err := json.Unmarshal(r.Data, v); err != nil {
		panic(fmt.Sprintf("guild: record %d, %s: %v", r.Seq, r.Type, err))
	}
}

func mustDecodeRaw(data []byte, v any) {
	if err := json.Unmarshal(data, v); err != nil {
		panic(fmt.Sprintf("guild: %v in %s", err, data))
	}
}

// sortedChannels are the channels by position, then id.
func (s *state) sortedChannels() []*Channel {
	list := make([]*Channel, 0, len(s.channels))
	for _, c := range s.channels {
		list = append(list, c)
	}
	sort.Slice(list, func(i, j int) bool {
		if list[i].Position != list[j].Position {
			return list[i].Position < list[j].Position
		}
		return list[i].ID < list[j].ID
	})
	return list
}

func (s *state) channelObjects() []json.RawMessage {
	objects := make([]json.RawMessage, 0, len(s.channels))
	for _, c := range s.sortedChannels() {
		objects = append(objects, c.Object)
	}
	return objects
}

func (s *state) roleObjects() []json.RawMessage {
	ids := make([]snowflake.ID, 0, len(s.roles))
	for id := range s.roles {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	objects := make([]json.RawMessage, 0, len(ids))
	for _, id := range ids {
		objects = append(objects, s.roles[id].Object)
	}
	return objects
}

// guildObject is the guild as clients see it, without channels and members. Fields and
// their types are the ones that all known client libraries accept.
type guildObject struct {
	ID                   snowflake.ID      `json:"id"`
	Name                 string            `json:"name"`
	Icon                 *string           `json:"icon"`
	Splash               *string           `json:"splash"`
	DiscoverySplash      *string           `json:"discovery_splash"`
	OwnerID              snowflake.ID      `json:"owner_id"`
	AFKChannelID         *string           `json:"afk_channel_id"`
	AFKTimeout           int               `json:"afk_timeout"`
	VerificationLevel    int               `json:"verification_level"`
	DefaultNotifications int               `json:"default_message_notifications"`
	ContentFilter        int               `json:"explicit_content_filter"`
	Roles                []json.RawMessage `json:"roles"`
	Emojis               []struct{}        `json:"emojis"`
	Stickers             []struct{}        `json:"stickers"`
	Features             []string          `json:"features"`
	MFALevel             int               `json:"mfa_level"`
	ApplicationID        *string           `json:"application_id"`
	SystemChannelID      *string           `json:"system_channel_id"`
	SystemChannelFlags   int               `json:"system_channel_flags"`
	RulesChannelID       *string           `json:"rules_channel_id"`
	VanityURLCode        *string           `json:"vanity_url_code"`
	Description          *string           `json:"description"`
	Banner               *string           `json:"banner"`
	PremiumTier          int               `json:"premium_tier"`
	PreferredLocale      string            `json:"preferred_locale"`
	PublicUpdatesChannel *string           `json:"public_updates_channel_id"`
	NSFWLevel            int               `json:"nsfw_level"`
	PremiumProgressBar   bool              `json:"premium_progress_bar_enabled"`
	SafetyAlertsChannel  *string           `json:"safety_alerts_channel_id"`
}

func (s *state) object(id snowflake.ID) guildObject {
	return guildObject{
		ID: id, Name: s.name, OwnerID: id, AFKTimeout: 300, Roles: s.roleObjects(),
		Emojis: []struct{}{}, Stickers: []struct{}{}, Features: []string{}, PreferredLocale: "en-US",
	}
}

// Body is GUILD_CREATE's body in two parts: the first is the same for all members and shared by
// their sessions, the second a member's own.
type Body struct{ Shared, Own []byte }

func (b Body) join() []byte { return append(append([]byte(nil), b.Shared...), b.Own...) }

// guildCreate is the body of GUILD_CREATE for one member: a session without the presence
// intent is told its own member alone
// (https://docs.discord.com/developers/events/gateway-events#guild-create).
func (s *state) guildCreate(id, user snowflake.ID) Body {
	member := s.members[user].object
	var ref memberRef
	mustDecodeRaw(member, &ref)
	own := make([]byte, 0, len(member)+128)
	own = append(own, `,"joined_at":`...)
	own = append(own, encode(ref.JoinedAt)...)
	own = append(own, `,"member_count":`...)
	own = strconv.AppendInt(own, int64(len(s.members)), 10)
	own = append(own, `,"members":[`...)
	own = append(own, member...)
	return Body{Shared: s.sharedParts(id), Own: append(own, "]}"...)}
}

// sharedParts is an open JSON object: what GUILD_CREATE has for every member alike.
func (s *state) sharedParts(id snowflake.ID) []byte {
	if s.shared != nil {
		return s.shared
	}
	s.shared = bytes.TrimSuffix(encode(struct {
		guildObject
		Unavailable bool              `json:"unavailable"`
		Large       bool              `json:"large"`
		Channels    []json.RawMessage `json:"channels"`
		Threads     []struct{}        `json:"threads"`
		Presences   []struct{}        `json:"presences"`
		VoiceStates []struct{}        `json:"voice_states"`
		Stages      []struct{}        `json:"stage_instances"`
		Events      []struct{}        `json:"guild_scheduled_events"`
		Sounds      []struct{}        `json:"soundboard_sounds"`
	}{
		guildObject: s.object(id), Large: true, Channels: s.channelObjects(),
		Threads: []struct{}{}, Presences: []struct{}{}, VoiceStates: []struct{}{},
		Stages: []struct{}{}, Events: []struct{}{}, Sounds: []struct{}{},
	}), []byte("}"))
	return s.shared
}

// memberObject is the member object of a user who joins now.
func memberObject(guild snowflake.ID, u User, now time.Time) []byte {
	return encode(struct {
		GuildID  snowflake.ID `json:"guild_id"`
		User     User         `json:"user"`
		Nick     *string      `json:"nick"`
		Avatar   *string      `json:"avatar"`
		Roles    []string     `json:"roles"`
		JoinedAt string       `json:"joined_at"`
		Deaf     bool         `json:"deaf"`
		Mute     bool         `json:"mute"`
		Flags    int          `json:"flags"`
		Pending  bool         `json:"pending"`
	}{GuildID: guild, User: u, Roles: []string{}, JoinedAt: timestamp(now)})
}

// everyoneRole is the role that all members have: its id is the guild's.
func everyoneRole(guild snowflake.ID) []byte {
	// VIEW_CHANNEL, SEND_MESSAGES, READ_MESSAGE_HISTORY, CONNECT, SPEAK, ADD_REACTIONS, EMBED_LINKS
	const permissions = 1<<10 | 1<<11 | 1<<16 | 1<<20 | 1<<21 | 1<<6 | 1<<14
	return encode(map[string]any{
		"id": guild, "name": "@everyone", "color": 0, "hoist": false, "icon": nil, "unicode_emoji": nil,
		"colors":   map[string]any{"primary_color": 0, "secondary_color": nil, "tertiary_color": nil},
		"position": 0, "permissions": strconv.Itoa(permissions), "managed": false, "mentionable": false, "flags": 0,
	})
}

// channelObject is a new channel as clients see it.
func channelObject(guild, id snowflake.ID, kind int, name string, position int, topic, parent *string) []byte {
	c := map[string]any{
		"id": id, "guild_id": guild, "type": kind, "name": name, "position": position,
		"permission_overwrites": []struct{}{}, "parent_id": parent, "flags": 0, "nsfw": false,
	}
	switch kind {
	case ChannelText:
		c["topic"], c["last_message_id"], c["rate_limit_per_user"] = topic, nil, 0
	case ChannelVoice:
		c["bitrate"], c["user_limit"], c["rtc_region"] = 64000, 0, nil
	}
	return encode(c)
}

// Channel types of the protocol.
const (
	ChannelText     = 0
	ChannelVoice    = 2
	ChannelCategory = 4
)

// encode is v as JSON without HTML escapes, on one line.
func encode(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil { // only for types that JSON does not know
		panic(err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

func timestamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000-07:00") }
