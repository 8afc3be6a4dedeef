package rest

import (
	"encoding/json"
	"net/http"

	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

// Session starts that GET /gateway/bot allows: libraries ask before they connect, and
// refuse to when one of the figures is 0.
const (
	sessionStarts  = 1_000_000
	startsReset    = 24 * 60 * 60 * 1000 // ms
	maxConcurrency = 16
)

func (h *Handler) gateway(r *request) (int, any, error) {
	return http.StatusOK, map[string]string{"url": h.o.Directory.Addresses(r.object).Direct}, nil
}

func (h *Handler) gatewayBot(r *request) (int, any, error) {
	return http.StatusOK, map[string]any{
		"url":    h.o.Directory.Addresses(r.object).Direct,
		"shards": 1,
		"session_start_limit": map[string]int{
			"total": sessionStarts, "remaining": sessionStarts, "reset_after": startsReset, "max_concurrency": maxConcurrency,
		},
	}, nil
}

func userOf(c *token.Claims) guild.User { return guild.NewUser(c.User, c.Name, c.Bot) }

func (h *Handler) ownUser(r *request) (int, any, error) {
	return http.StatusOK, userOf(r.bearer), nil
}

func (h *Handler) ownGuilds(r *request) (int, any, error) {
	list := []json.RawMessage{}
	if _, err := r.guild.Member(r.bearer.User); err == nil {
		list = append(list, r.guild.Object())
	}
	return http.StatusOK, list, nil
}

func (h *Handler) ownApplication(r *request) (int, any, error) {
	user := userOf(r.bearer)
	return http.StatusOK, map[string]any{
		"id": user.ID, "name": user.Username, "icon": nil, "description": "", "bot_public": false,
		"bot_require_code_grant": false, "verify_key": "", "flags": 0, "owner": user,
	}, nil
}

// mayRead says whether the bearer may see the guild: members and backends may.
func (r *request) mayRead() error {
	if r.bearer.Publish {
		return nil
	}
	if _, err := r.guild.Member(r.bearer.User); err != nil {
		return guild.ErrNotMember
	}
	return nil
}

func (h *Handler) getGuild(r *request) (int, any, error) {
	if err := r.guildID(); err != nil {
		return 0, nil, err
	}
	if err := r.mayRead(); err != nil {
		return 0, nil, err
	}
	return http.StatusOK, r.guild.Object(), nil
}

func (h *Handler) getChannels(r *request) (int, any, error) {
	if err := r.guildID(); err != nil {
		return 0, nil, err
	}
	if err := r.mayRead(); err != nil {
		return 0, nil, err
	}
	return http.StatusOK, r.guild.Channels(), nil
}

func (h *Handler) createChannel(r *request) (int, any, error) {
	if err := r.guildID(); err != nil {
		return 0, nil, err
	}
	if !r.bearer.Publish {
		return 0, nil, errBackendOnly
	}
	var n guild.NewChannel
	if err := decode(r, &n); err != nil {
		return 0, nil, err
	}
	object, err := r.guild.CreateChannel(r.Context(), n)
	return http.StatusCreated, object, err
}

func (h *Handler) getChannel(r *request) (int, any, error) {
	id, err := r.channelID()
	if err != nil {
		return 0, nil, err
	}
	if err := r.mayRead(); err != nil {
		return 0, nil, err
	}
	object, err := r.guild.Channel(id)
	return http.StatusOK, object, notFound(err, errUnknownChannel)
}

func (h *Handler) deleteChannel(r *request) (int, any, error) {
	id, err := r.channelID()
	if err != nil {
		return 0, nil, err
	}
	if !r.bearer.Publish {
		return 0, nil, errBackendOnly
	}
	object, err := r.guild.DeleteChannel(r.Context(), id)
	return http.StatusOK, object, notFound(err, errUnknownChannel)
}

// memberID is the user of the route; "@me" is the bearer. Others are for backends.
func (r *request) memberID() (snowflake.ID, error) {
	name := r.PathValue("user")
	if name == "@me" {
		return r.bearer.User, nil
	}
	id, err := snowflake.Parse(name)
	if err != nil {
		return 0, invalid("user", err.Error())
	}
	if id != r.bearer.User && !r.bearer.Publish {
		return 0, errBackendOnly
	}
	return id, nil
}

func (h *Handler) getMember(r *request) (int, any, error) {
	if err := r.guildID(); err != nil {
		return 0, nil, err
	}
	id, err := r.memberID()
	if err != nil {
		return 0, nil, err
	}
	object, err := r.guild.Member(id)
	return http.StatusOK, object, notFound(err, errUnknownMember)
}

// newMember names a member whom a backend adds.
type newMember struct {
	Username string `json:"username"`
	Bot      bool   `json:"bot"`
}

// addMember joins the bearer in an open guild, or anyone when a backend asks. 201: joined; 204: was a member.
func (h *Handler) addMember(r *request) (int, any, error) {
	if err := r.guildID(); err != nil {
		return 0, nil, err
	}
	id, err := r.memberID()
	if err != nil {
		return 0, nil, err
	}
	user := userOf(r.bearer)
	if id != r.bearer.User {
		var n newMember
		if err := decode(r, &n); err != nil {
			return 0, nil, err
		}
		if n.Username == "" || len(n.Username) > token.MaxNameLength {
			return 0, nil, invalid("username", "expected the user's name, 1 to 100 bytes")
		}
		user = guild.NewUser(id, n.Username, n.Bot)
	} else if !r.bearer.Publish && !r.guild.Open() {
		return 0, nil, &apiError{http.StatusForbidden, 50001, "Missing Access: a backend adds the members of this guild"}
	}
	member, joined, err := r.guild.Join(r.Context(), user)
	if err != nil || joined {
		return http.StatusCreated, member, err
	}
	return http.StatusNoContent, nil, nil
}

func (h *Handler) removeMember(r *request) (int, any, error) {
	if err := r.guildID(); err != nil {
		return 0, nil, err
	}
	id, err := r.memberID()
	if err != nil {
		return 0, nil, err
	}
	return http.StatusNoContent, nil, notFound(r.guild.Leave(r.Context(), id), errUnknownMember)
}

func (h *Handler) leave(r *request) (int, any, error) {
	if err := r.guildID(); err != nil {
		return 0, nil, err
	}
	return http.StatusNoContent, nil, notFound(r.guild.Leave(r.Context(), r.bearer.User), errUnknownMember)
}

func (h *Handler) sendMessage(r *request) (int, any, error) {
	id, err := r.channelID()
	if err != nil {
		return 0, nil, err
	}
	var n guild.NewMessage
	if err := decode(r, &n); err != nil {
		return 0, nil, err
	}
	object, err := r.guild.SendMessage(r.Context(), id, userOf(r.bearer), r.bearer.Publish, n)
	return http.StatusOK, object, notFound(err, errUnknownChannel)
}

// publication is what a backend publishes: one event, or a batch, which is appended whole or not at all.
type publication struct {
	Type   string          `json:"t"`
	Data   json.RawMessage `json:"d"`
	Users  []snowflake.ID  `json:"users"`
	Events []guild.Event   `json:"events"`
}

// number is the place of a published event.
type number struct {
	Seq uint64 `json:"s"`
}

func (h *Handler) publish(r *request) (int, any, error) {
	if err := r.guildID(); err != nil {
		return 0, nil, err
	}
	if !r.bearer.Publish {
		return 0, nil, errBackendOnly
	}
	var p publication
	if err := decode(r, &p); err != nil {
		return 0, nil, err
	}
	single := p.Events == nil
	events := p.Events
	switch {
	case single:
		events = []guild.Event{{Type: p.Type, Data: p.Data, Users: p.Users}}
	case p.Type != "" || p.Data != nil || p.Users != nil:
		return 0, nil, invalid("events", "expected either events, or t, d and users")
	}
	numbers, err := r.guild.Publish(r.Context(), r.Header.Get("Idempotency-Key"), events)
	if err != nil {
		return 0, nil, err
	}
	if single {
		return http.StatusOK, number{numbers[0]}, nil
	}
	list := make([]number, len(numbers))
	for i, n := range numbers {
		list[i].Seq = n
	}
	return http.StatusOK, map[string]any{"s": numbers[0], "events": list}, nil
}
