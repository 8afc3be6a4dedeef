package guild

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"sync"
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
	told   bool            // whether the stream has GUILD_CREATE for them behind it: somebody might have waited for it
}

// layout is what every member sees of a guild alike. It is not changed, but replaced.
type layout struct {
	name     string
	channels map[snowflake.ID]*Channel
	roles    map[snowflake.ID]*Role

	once   sync.Once
	shared []byte // what GUILD_CREATE has of it, made when first asked for
}

// state is what the records of a guild's log add up to.
//
// Invariant: but for told, state is a pure function of the records applied so far, in order. A guild that follows
// another has only those members that keeps says yes to; the others count all the same.
type state struct {
	layout  *layout
	members map[snowflake.ID]member
	count   int                     // of members
	keeps   func(snowflake.ID) bool // nil: all
}

func newState() *state {
	return &state{
		layout:  &layout{channels: map[snowflake.ID]*Channel{}, roles: map[snowflake.ID]*Role{}},
		members: map[snowflake.ID]member{},
	}
}

// staged is a state with records applied that it does not have yet. The state itself is only
// read, until merge.
type staged struct {
	below   *state
	layout  *layout
	members map[snowflake.ID]member // those that differ
	joined  int                     // how many more there are in all
	rows    []guildlog.Row          // what differs, for the log
}

func (s *state) stage() staged { return staged{below: s, layout: s.layout} }

// merge brings the state below up to date.
func (s *staged) merge() {
	s.below.layout = s.layout
	s.below.count += s.joined
	for id, m := range s.members {
		if m.object == nil {
			delete(s.below.members, id)
		} else {
			s.below.members[id] = m
		}
	}
}

func (s *staged) member(id snowflake.ID) member {
	if m, ok := s.members[id]; ok {
		return m
	}
	return s.below.members[id]
}

func (s *staged) setMember(id snowflake.ID, m member) {
	if s.below.keeps != nil && s.member(id).object == nil && !s.below.keeps(id) {
		return
	}
	if s.members == nil {
		s.members = map[snowflake.ID]member{}
	}
	s.members[id] = m
	var value []byte
	if m.object != nil {
		value = append(binary.AppendUvarint(nil, m.joined), m.object...)
	}
	s.put(rowMember, id, value)
}

// tell notes that the stream has GUILD_CREATE for a member behind their join.
func (s *staged) tell(id snowflake.ID) {
	m := s.members[id]
	m.told = true
	s.members[id] = m
}

// relayout replaces the layout by a copy, which may be changed until the transaction ends.
func (s *staged) relayout() *layout {
	l := s.layout
	s.layout = &layout{name: l.name, channels: maps.Clone(l.channels), roles: maps.Clone(l.roles)}
	return s.layout
}

// The rows of the state: a table's letter, and the id in 8 bytes. The name has id 0; a member's value
// begins with the number of their join.
const (
	rowName    = 'n'
	rowChannel = 'c'
	rowRole    = 'r'
	rowMember  = 'm'
)

func (s *staged) put(table byte, id snowflake.ID, value []byte) {
	s.rows = append(s.rows, guildlog.Row{Key: binary.BigEndian.AppendUint64([]byte{table}, uint64(id)), Value: value})
}

// rows are those of the layout.
func (l *layout) rows() []guildlog.Row {
	s := staged{layout: l}
	s.put(rowName, 0, []byte(l.name))
	for id, c := range l.channels {
		s.put(rowChannel, id, c.Object)
	}
	for id, r := range l.roles {
		s.put(rowRole, id, r.Object)
	}
	return s.rows
}

// load reads the state that a log keeps, and applies the records behind it.
func (s *state) load(log guildlog.Log) error {
	seq, err := log.State(s.loadRow)
	if err != nil {
		return err
	}
	for seq < log.Last() {
		records, err := log.Read(seq, 1024)
		if err != nil {
			return err
		}
		t := s.stage()
		for i := range records {
			t.apply(&records[i], turn{})
			seq = records[i].End()
		}
		t.merge()
	}
	return nil
}

func (s *state) loadRow(key, value []byte) error {
	bad := fmt.Errorf("guild: unknown row %q of the state", key)
	if len(key) != 9 {
		return bad
	}
	id := snowflake.ID(binary.BigEndian.Uint64(key[1:]))
	value = bytes.Clone(value)
	switch key[0] {
	case rowName:
		s.layout.name = string(value)
	case rowChannel:
		s.layout.channels[id] = channelOf(value)
	case rowRole:
		s.layout.roles[id] = &Role{ID: id, Object: value}
	case rowMember:
		joined, n := binary.Uvarint(value)
		if n <= 0 {
			return bad
		}
		s.members[id] = member{object: value[n:], joined: joined}
		s.count++
	default:
		return bad
	}
	return nil
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
func (l *layout) room(events []Event, bodies [][]byte) error {
	channels, roles := len(l.channels), len(l.roles)
	for i, e := range events {
		switch e.Type {
		case "CHANNEL_CREATE", "CHANNEL_UPDATE":
			var c channelRef
			mustDecodeRaw(bodies[i], &c)
			if l.channels[*c.ID] == nil {
				channels++
			}
		case "GUILD_ROLE_CREATE", "GUILD_ROLE_UPDATE":
			var r roleRef
			mustDecodeRaw(bodies[i], &r)
			if l.roles[r.Role.ID] == nil {
				roles++
			}
		}
	}
	switch {
	case channels > len(l.channels) && channels > MaxChannels:
		return fieldError("d", fmt.Sprintf("the guild can have %d channels, this would make %d", MaxChannels, channels))
	case roles > len(l.roles) && roles > MaxRoles:
		return fieldError("d", fmt.Sprintf("the guild can have %d roles, this would make %d", MaxRoles, roles))
	}
	return nil
}

func fieldError(field, expected string) error {
	return &InvalidError{Field: field, Expected: expected}
}

// turn says whom a record that is applied next makes a member, or none any more; nobody for user 0.
func (s *staged) turn(r *guildlog.Record) (t turn) {
	if r.Type != "GUILD_MEMBER_ADD" && r.Type != "GUILD_MEMBER_REMOVE" {
		return t
	}
	t = turnOf(r)
	if s.member(t.user).object == nil != t.joins {
		return turn{}
	}
	return t
}

// apply folds a record into the state. The record has passed check. turns is what it does to a membership, if
// that has been decoded.
func (s *staged) apply(r *guildlog.Record, turns turn) {
	switch r.Type {
	case "GUILD_CREATE":
		var b birth
		mustDecode(r, &b)
		l := s.relayout()
		s.rename(l, b.Name)
		for _, c := range b.Channels {
			s.putChannel(l, c)
		}
		for _, object := range b.Roles {
			var role struct {
				ID snowflake.ID `json:"id"`
			}
			mustDecodeRaw(object, &role)
			s.putRole(l, role.ID, object)
		}
	case "GUILD_UPDATE":
		var g struct {
			Name *string `json:"name"`
		}
		mustDecode(r, &g)
		if g.Name != nil {
			s.rename(s.relayout(), *g.Name)
		}
	case "CHANNEL_CREATE", "CHANNEL_UPDATE":
		s.putChannel(s.relayout(), r.Data)
	case "CHANNEL_DELETE":
		var c channelRef
		mustDecode(r, &c)
		delete(s.relayout().channels, *c.ID)
		s.put(rowChannel, *c.ID, nil)
	case "GUILD_ROLE_CREATE", "GUILD_ROLE_UPDATE":
		var d struct {
			Role json.RawMessage `json:"role"`
		}
		var ref roleRef
		mustDecode(r, &d)
		mustDecode(r, &ref)
		s.putRole(s.relayout(), ref.Role.ID, d.Role)
	case "GUILD_ROLE_DELETE":
		var ref roleRef
		mustDecode(r, &ref)
		delete(s.relayout().roles, *ref.RoleID)
		s.put(rowRole, *ref.RoleID, nil)
	case "GUILD_MEMBER_ADD":
		if turns.user == 0 {
			turns = turnOf(r)
		}
		m := s.member(turns.user)
		if m.object == nil {
			m.joined = r.End()
		}
		m.object = r.Data
		s.setMember(turns.user, m)
		if r.Reserved > 0 {
			s.joined++
		}
	case "GUILD_MEMBER_UPDATE": // may lack fields that have not changed
		var ref memberRef
		mustDecode(r, &ref)
		if m := s.member(ref.User.ID); m.object != nil {
			var fields map[string]json.RawMessage
			mustDecodeRaw(m.object, &fields)
			mustDecode(r, &fields)
			m.object = encode(fields)
			s.setMember(ref.User.ID, m)
		}
	case "GUILD_MEMBER_REMOVE":
		if turns.user == 0 {
			turns = turnOf(r)
		}
		s.setMember(turns.user, member{})
		if r.Reserved > 0 {
			s.joined--
		}
	}
}

func (s *staged) rename(l *layout, name string) {
	l.name = name
	s.put(rowName, 0, []byte(name))
}

func (s *staged) putChannel(l *layout, object []byte) {
	c := channelOf(object)
	l.channels[c.ID] = c
	s.put(rowChannel, c.ID, object)
}

func (s *staged) putRole(l *layout, id snowflake.ID, object []byte) {
	l.roles[id] = &Role{ID: id, Object: object}
	s.put(rowRole, id, object)
}

func channelOf(object []byte) *Channel {
	var ref channelRef
	mustDecodeRaw(object, &ref)
	return &Channel{ID: *ref.ID, Type: *ref.Type, Name: *ref.Name, Position: ref.Position, Object: object}
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
func (l *layout) sortedChannels() []*Channel {
	list := make([]*Channel, 0, len(l.channels))
	for _, c := range l.channels {
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

func (l *layout) channelObjects() []json.RawMessage {
	objects := make([]json.RawMessage, 0, len(l.channels))
	for _, c := range l.sortedChannels() {
		objects = append(objects, c.Object)
	}
	return objects
}

func (l *layout) roleObjects() []json.RawMessage {
	ids := make([]snowflake.ID, 0, len(l.roles))
	for id := range l.roles {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	objects := make([]json.RawMessage, 0, len(ids))
	for _, id := range ids {
		objects = append(objects, l.roles[id].Object)
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

func (l *layout) object(id snowflake.ID) guildObject {
	return guildObject{
		ID: id, Name: l.name, OwnerID: id, AFKTimeout: 300, Roles: l.roleObjects(),
		Emojis: []struct{}{}, Stickers: []struct{}{}, Features: []string{}, PreferredLocale: "en-US",
	}
}

// Body is GUILD_CREATE's body in two parts: the first is the same for all members and shared by
// their sessions, the second a member's own.
type Body struct{ Shared, Own []byte }

func (b Body) join() []byte { return append(append([]byte(nil), b.Shared...), b.Own...) }

func (s *state) guildCreate(id, user snowflake.ID) Body {
	return guildCreate(id, s.layout, s.members[user], s.count)
}

func (s *staged) guildCreate(id, user snowflake.ID) Body {
	return guildCreate(id, s.layout, s.member(user), s.below.count+s.joined)
}

// guildCreate is the body of GUILD_CREATE for one member: a session without the presence
// intent is told its own member alone
// (https://docs.discord.com/developers/events/gateway-events#guild-create).
func guildCreate(id snowflake.ID, l *layout, m member, members int) Body {
	joined := struct {
		At json.RawMessage `json:"joined_at"`
	}{json.RawMessage("null")}
	mustDecodeRaw(m.object, &joined)
	own := make([]byte, 0, len(m.object)+128)
	own = append(own, `,"joined_at":`...)
	own = append(own, joined.At...)
	own = append(own, `,"member_count":`...)
	own = strconv.AppendInt(own, int64(members), 10)
	own = append(own, `,"members":[`...)
	own = append(own, m.object...)
	return Body{Shared: l.sharedParts(id), Own: append(own, "]}"...)}
}

// sharedParts is an open JSON object: what GUILD_CREATE has for every member alike.
func (l *layout) sharedParts(id snowflake.ID) []byte {
	l.once.Do(func() {
		l.shared = bytes.TrimSuffix(encode(struct {
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
			guildObject: l.object(id), Large: true, Channels: l.channelObjects(),
			Threads: []struct{}{}, Presences: []struct{}{}, VoiceStates: []struct{}{},
			Stages: []struct{}{}, Events: []struct{}{}, Sounds: []struct{}{},
		}), []byte("}"))
	})
	return l.shared
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
