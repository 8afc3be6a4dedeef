package guild

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// Limits of what is published.
const (
	// MaxEventSize is the largest body of an event, in bytes.
	MaxEventSize = 256 << 10
	// MaxBatch is the largest number of events of one batch.
	MaxBatch = 1000
	// MaxContent is the longest content of a message, in characters.
	MaxContent = 2000
	// MaxChannels and MaxRoles are the largest numbers of channels and roles of a guild.
	MaxChannels = 500
	MaxRoles    = 250
	// MaxTopic is the longest topic of a channel, in characters.
	MaxTopic = 1024
	// MaxEmbeds and MaxComponents are the most embeds and components of a message.
	MaxEmbeds     = 10
	MaxComponents = 40
	// MaxKey is the longest idempotency key, in bytes.
	MaxKey = 128
)

// Event is an event that a backend publishes.
type Event struct {
	// Type is the event's name, such as MESSAGE_CREATE; upper case with underscores.
	Type string `json:"t"`
	// Data is the event's body, a JSON object. guild_id is added where it is missing.
	Data json.RawMessage `json:"d"`
	// Users limits the event to those users' sessions; all when absent.
	Users []snowflake.ID `json:"users,omitempty"`
}

// maxPosition keeps channel positions within what all clients read.
const maxPosition = 1<<16 - 1

var errOverwrites = fieldError("permission_overwrites", "expected none: every member sees every channel in this version")

var eventName = regexp.MustCompile(`^[A-Z][A-Z0-9_]{0,63}$`)

// Publish appends events, all or none, and returns the number of each once they are durable. A
// volatile event is answered with the last number. The same key with the same events is
// answered with the same numbers for 24 hours and appends nothing.
func (g *Guild) Publish(ctx context.Context, key string, events []Event) ([]uint64, error) {
	if len(events) == 0 || len(events) > MaxBatch {
		return nil, fieldError("events", fmt.Sprintf("expected 1 to %d events, got %d", MaxBatch, len(events)))
	}
	if len(key) > MaxKey {
		return nil, fieldError("Idempotency-Key", fmt.Sprintf("expected at most %d bytes, got %d", MaxKey, len(key)))
	}
	bodies, size := make([][]byte, len(events)), 0
	digest := sha256.New()
	for i, e := range events {
		body, err := g.prepare(e)
		if err != nil {
			if len(events) > 1 {
				err = prefixField(fmt.Sprintf("events[%d].", i), err)
			}
			return nil, err
		}
		bodies[i] = body
		size += len(body)
		fmt.Fprintf(digest, "%s %d %v ", e.Type, len(body), e.Users)
		digest.Write(body)
	}
	if key != "" {
		key = "key " + key // apart from the keys of messages
	}
	var numbers []uint64
	err := g.do(ctx, size, func(t *tx) error {
		known, found, err := t.find(key, [32]byte(digest.Sum(nil)))
		if err != nil {
			return err
		}
		if found {
			numbers = known.Numbers
			return nil
		}
		if err := t.state.layout.room(events, bodies); err != nil {
			return err
		}
		numbers = make([]uint64, len(events))
		for i, e := range events {
			numbers[i] = t.emit(e.Type, bodies[i], e.Users)
		}
		t.remember(guildlog.Key{Name: key, Body: [32]byte(digest.Sum(nil)), Numbers: numbers})
		return nil
	})
	return numbers, err
}

// prepare checks an event and brings its body into the form that emit expects.
func (g *Guild) prepare(e Event) ([]byte, error) {
	if !eventName.MatchString(e.Type) {
		return nil, fieldError("t", "expected the name of an event: upper-case letters, digits and underscores, at most 64")
	}
	if protocol.EventOf(e.Type).Reserved {
		return nil, fieldError("t", e.Type+" is made by the server alone")
	}
	if len(e.Data) > MaxEventSize {
		return nil, fieldError("d", fmt.Sprintf("expected at most %d bytes, got %d", MaxEventSize, len(e.Data)))
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(e.Data, &fields); err != nil || fields == nil || !utf8.Valid(e.Data) {
		return nil, fieldError("d", "expected a JSON object")
	}
	if e.Users != nil && len(e.Users) == 0 {
		return nil, fieldError("users", "expected at least one user id, or no such field for all")
	}
	var body bytes.Buffer
	body.Grow(len(e.Data) + 40)
	if err := json.Compact(&body, e.Data); err != nil {
		return nil, fieldError("d", "expected a JSON object")
	}
	out := body.Bytes()
	if _, ok := fields["guild_id"]; !ok && e.Type != "GUILD_UPDATE" {
		out = append(make([]byte, 0, len(out)+40), `{"guild_id":"`...)
		out = append(out, g.id.String()...)
		out = append(out, '"')
		if len(fields) > 0 {
			out = append(out, ',')
		}
		out = append(out, body.Bytes()[1:]...)
	} else if ok && string(fields["guild_id"]) != `"`+g.id.String()+`"` {
		return nil, fieldError("d.guild_id", "expected this guild's id, "+g.id.String())
	}
	if err := check(g.id, e.Type, out); err != nil {
		return nil, prefixField("d.", err)
	}
	return out, nil
}

// prefixField puts a prefix before the field that an error names.
func prefixField(prefix string, err error) error {
	var invalid *InvalidError
	var wrong *json.UnmarshalTypeError
	switch {
	case errors.As(err, &invalid):
		return fieldError(prefix+invalid.Field, invalid.Expected)
	case errors.As(err, &wrong) && wrong.Field != "" && snowflake.Is(wrong.Type):
		return fieldError(prefix+wrong.Field, "expected a snowflake, 17 to 19 digits in a string, got a "+wrong.Value)
	case errors.As(err, &wrong) && wrong.Field != "":
		return fieldError(prefix+wrong.Field, "not a "+wrong.Value)
	}
	return fieldError(strings.TrimSuffix(prefix, "."), err.Error())
}

// Join makes a user a member. It returns the member object, and whether the user was none before.
func (g *Guild) Join(ctx context.Context, u User) (member json.RawMessage, joined bool, err error) {
	err = g.do(ctx, 0, func(t *tx) error {
		if member = t.state.member(u.ID).object; member != nil {
			return nil
		}
		joined = true
		t.turn(t.record("GUILD_MEMBER_ADD", memberObject(g.id, u, g.now()), nil), turn{u.ID, true})
		member = t.state.member(u.ID).object
		return nil
	})
	return member, joined, err
}

// Leave ends a membership, or fails with ErrNotFound.
func (g *Guild) Leave(ctx context.Context, user snowflake.ID) error {
	return g.do(ctx, 0, func(t *tx) error {
		member := t.state.member(user).object
		if member == nil {
			return ErrNotFound
		}
		t.emit("GUILD_MEMBER_REMOVE", encode(map[string]any{"guild_id": g.id, "user": userOf(member)}), nil)
		return nil
	})
}

// Member returns a member object, or ErrNotFound.
func (g *Guild) Member(user snowflake.ID) (json.RawMessage, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if m := g.state.members[user].object; m != nil {
		return m, nil
	}
	return nil, ErrNotFound
}

// Object returns the guild object, and Channels the channel objects in their order.
func (g *Guild) Object() json.RawMessage {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return encode(g.state.layout.object(g.id))
}

// Channels returns the channel objects in their order.
func (g *Guild) Channels() []json.RawMessage {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.state.layout.channelObjects()
}

// Channel returns a channel object, or ErrNotFound.
func (g *Guild) Channel(id snowflake.ID) (json.RawMessage, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if c := g.state.layout.channels[id]; c != nil {
		return c.Object, nil
	}
	return nil, ErrNotFound
}

// NewChannel is a request for a channel.
type NewChannel struct {
	Name       string            `json:"name"`
	Type       int               `json:"type"`
	Topic      *string           `json:"topic"`
	Position   *int              `json:"position"`
	ParentID   *string           `json:"parent_id"`
	Overwrites []json.RawMessage `json:"permission_overwrites"`
}

// CreateChannel makes a channel and returns its object.
func (g *Guild) CreateChannel(ctx context.Context, n NewChannel) (object json.RawMessage, err error) {
	switch {
	case n.Name == "" || utf8.RuneCountInString(n.Name) > 100:
		return nil, fieldError("name", "expected 1 to 100 characters")
	case n.Type != ChannelText && n.Type != ChannelVoice && n.Type != ChannelCategory:
		return nil, fieldError("type", "expected 0 (text), 2 (voice) or 4 (category)")
	case n.Topic != nil && utf8.RuneCountInString(*n.Topic) > MaxTopic:
		return nil, fieldError("topic", fmt.Sprintf("expected at most %d characters", MaxTopic))
	case n.Position != nil && (*n.Position < 0 || *n.Position > maxPosition):
		return nil, fieldError("position", fmt.Sprintf("expected 0 to %d", maxPosition))
	case len(n.Overwrites) > 0:
		return nil, errOverwrites
	}
	err = g.do(ctx, 0, func(t *tx) error {
		if len(t.state.layout.channels) >= MaxChannels {
			return fieldError("name", fmt.Sprintf("the guild has %d channels, the most there can be", MaxChannels))
		}
		if n.ParentID != nil {
			parent, err := snowflake.Parse(*n.ParentID)
			if err != nil || t.state.layout.channels[parent] == nil || t.state.layout.channels[parent].Type != ChannelCategory {
				return fieldError("parent_id", "expected the id of a category of this guild")
			}
		}
		position := 0
		for _, c := range t.state.layout.channels {
			position = max(position, c.Position+1)
		}
		if n.Position != nil {
			position = *n.Position
		}
		object = channelObject(g.id, g.ids.Next(), n.Type, n.Name, position, n.Topic, n.ParentID)
		t.emit("CHANNEL_CREATE", object, nil)
		return nil
	})
	return object, err
}

// DeleteChannel deletes a channel and returns what it was, or fails with ErrNotFound.
func (g *Guild) DeleteChannel(ctx context.Context, id snowflake.ID) (object json.RawMessage, err error) {
	err = g.do(ctx, 0, func(t *tx) error {
		c := t.state.layout.channels[id]
		if c == nil {
			return ErrNotFound
		}
		object = c.Object
		t.emit("CHANNEL_DELETE", object, nil)
		return nil
	})
	return object, err
}

// Reference is the message that a message replies to.
type Reference struct {
	Type      int           `json:"type"`
	MessageID *snowflake.ID `json:"message_id,omitempty"`
	ChannelID *snowflake.ID `json:"channel_id,omitempty"`
	GuildID   *snowflake.ID `json:"guild_id,omitempty"`
}

// Message types and flags of the protocol.
const (
	messageDefault = 0
	messageReply   = 19
	// SUPPRESS_EMBEDS, SUPPRESS_NOTIFICATIONS and IS_COMPONENTS_V2: those that a sender may set.
	messageFlags = 1<<2 | 1<<12 | 1<<15
)

// NewMessage is a request to send a message.
type NewMessage struct {
	Content      string            `json:"content"`
	TTS          bool              `json:"tts"`
	Embeds       []json.RawMessage `json:"embeds"`
	Components   []json.RawMessage `json:"components"`
	Nonce        json.RawMessage   `json:"nonce"`
	EnforceNonce bool              `json:"enforce_nonce"`
	Reference    *Reference        `json:"message_reference"`
	Flags        int64             `json:"flags"`
	Attachments  []json.RawMessage `json:"attachments"`
	StickerIDs   []string          `json:"sticker_ids"`
	Poll         json.RawMessage   `json:"poll"`
	Allowed      *AllowedMentions  `json:"allowed_mentions"`
}

// message is a message object. GuildID and Member are in the dispatch alone.
type message struct {
	ID              snowflake.ID      `json:"id"`
	Type            int               `json:"type"`
	ChannelID       snowflake.ID      `json:"channel_id"`
	Author          User              `json:"author"`
	Content         string            `json:"content"`
	Timestamp       string            `json:"timestamp"`
	Edited          *string           `json:"edited_timestamp"`
	TTS             bool              `json:"tts"`
	MentionEveryone bool              `json:"mention_everyone"`
	Mentions        []json.RawMessage `json:"mentions"`
	MentionRoles    []struct{}        `json:"mention_roles"`
	Attachments     []struct{}        `json:"attachments"`
	Embeds          []json.RawMessage `json:"embeds"`
	Components      []json.RawMessage `json:"components"`
	Pinned          bool              `json:"pinned"`
	Flags           int64             `json:"flags"`
	Nonce           string            `json:"nonce,omitempty"`
	Reference       *Reference        `json:"message_reference,omitempty"`
	GuildID         snowflake.ID      `json:"guild_id,omitzero"`
	Member          json.RawMessage   `json:"member,omitempty"`
}

// SendMessage sends a message of a member, or of a backend, to a channel and returns the message object.
func (g *Guild) SendMessage(ctx context.Context, channel snowflake.ID, author User, backend bool, n NewMessage) (json.RawMessage, error) {
	if err := n.check(author.Bot || backend); err != nil {
		return nil, err
	}
	nonce, err := nonceString(n.Nonce)
	if err != nil {
		return nil, err
	}
	var key string
	if n.EnforceNonce && nonce != "" {
		key = fmt.Sprintf("nonce %s %s %s", author.ID, channel, nonce)
	}
	var answer json.RawMessage
	err = g.do(ctx, 0, func(t *tx) error {
		c := t.state.layout.channels[channel]
		member := t.state.member(author.ID).object
		switch {
		case c == nil:
			return ErrNotFound
		case c.Type != ChannelText:
			return fieldError("channel", "expected a text channel")
		case member == nil && !backend:
			return ErrNotMember
		}
		known, found, err := t.find(key, [32]byte{})
		if err != nil || found {
			answer = known.Answer
			return err
		}
		now := g.now()
		m := message{
			ID: g.ids.Next(), Type: messageDefault, ChannelID: channel, Author: author, Content: n.Content, Timestamp: timestamp(now),
			TTS: n.TTS, Mentions: t.state.mentions(mentioned(n.Content, n.Allowed)), MentionRoles: []struct{}{}, Attachments: []struct{}{},
			Embeds: orEmpty(n.Embeds), Components: orEmpty(n.Components), Flags: n.Flags & messageFlags, Nonce: nonce,
		}
		if n.Reference != nil {
			m.Type = messageReply
			m.Reference = &Reference{MessageID: n.Reference.MessageID, ChannelID: &channel, GuildID: &g.id}
		}
		answer = encode(m)
		m.GuildID = g.id
		if member != nil {
			m.Member = withoutUser(member)
		}
		body := encode(m)
		if len(body) > MaxEventSize {
			return fieldError("embeds", fmt.Sprintf("expected a message of at most %d bytes", MaxEventSize))
		}
		seq := t.emit("MESSAGE_CREATE", body, nil)
		t.remember(guildlog.Key{Name: key, Numbers: []uint64{seq}, Answer: answer})
		return nil
	})
	return answer, err
}

// check says whether a message can be sent. What other clients are sent as it is, they must be able
// to read: so embeds and components are for senders that know what they do, as with Discord.
func (n *NewMessage) check(trusted bool) error {
	switch {
	case len(n.Attachments) > 0:
		return fieldError("attachments", "expected none: files are not supported in this version")
	case len(n.StickerIDs) > 0:
		return fieldError("sticker_ids", "expected none: stickers are not supported in this version")
	case len(n.Poll) > 0 && string(n.Poll) != "null":
		return fieldError("poll", "expected none: polls are not supported in this version")
	case n.Content == "" && len(n.Embeds) == 0 && len(n.Components) == 0:
		return fieldError("content", "expected content, embeds or components")
	case utf8.RuneCountInString(n.Content) > MaxContent:
		return fieldError("content", fmt.Sprintf("expected at most %d characters", MaxContent))
	case n.Reference != nil && (n.Reference.Type != 0 || n.Reference.MessageID == nil):
		return fieldError("message_reference", "expected the message_id that this replies to, and no other type")
	}
	for _, list := range []struct {
		field   string
		objects []json.RawMessage
		limit   int
	}{{"embeds", n.Embeds, MaxEmbeds}, {"components", n.Components, MaxComponents}} {
		switch {
		case len(list.objects) > 0 && !trusted:
			return fieldError(list.field, "expected none: only bots and backends send them")
		case len(list.objects) > list.limit:
			return fieldError(list.field, fmt.Sprintf("expected at most %d", list.limit))
		}
		for i, object := range list.objects {
			if object[0] != '{' || !utf8.Valid(object) {
				return fieldError(fmt.Sprintf("%s[%d]", list.field, i), "expected an object")
			}
		}
	}
	return n.Allowed.check()
}

func orEmpty(list []json.RawMessage) []json.RawMessage {
	if list == nil {
		return []json.RawMessage{}
	}
	return list
}

// nonceString reads a nonce, which clients send as a string or a number and read as a string.
func nonceString(raw json.RawMessage) (string, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return "", nil
	}
	var s string
	var n json.Number
	if json.Unmarshal(raw, &s) != nil {
		if json.Unmarshal(raw, &n) != nil {
			return "", fieldError("nonce", "expected a string or a number")
		}
		s = n.String()
	}
	if utf8.RuneCountInString(s) > 25 {
		return "", fieldError("nonce", "expected at most 25 characters")
	}
	return s, nil
}

// userOf is the user object of a member object.
func userOf(member json.RawMessage) json.RawMessage {
	var m struct {
		User json.RawMessage `json:"user"`
	}
	mustDecodeRaw(member, &m)
	return m.User
}

// withoutUser is a member object as messages carry it.
func withoutUser(member json.RawMessage) json.RawMessage {
	var fields map[string]json.RawMessage
	mustDecodeRaw(member, &fields)
	delete(fields, "user")
	delete(fields, "guild_id")
	return encode(fields)
}
