package guild

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"

	"guildhall.dev/guildhall/shardserver/snowflake"
)

// maxAllowed is how many users a message can name that it may mention.
const maxAllowed = 100

// AllowedMentions says which mentions in a message's content count; all do where there is none.
// Source: https://docs.discord.com/developers/resources/message#allowed-mentions-object.
type AllowedMentions struct {
	// Parse has "users" where all users that are mentioned count.
	Parse []string       `json:"parse"`
	Users []snowflake.ID `json:"users"`
}

func (a *AllowedMentions) check() error {
	switch {
	case a == nil:
		return nil
	case len(a.Users) > maxAllowed:
		return fieldError("allowed_mentions.users", fmt.Sprintf("expected at most %d", maxAllowed))
	case len(a.Users) > 0 && slices.Contains(a.Parse, "users"):
		return fieldError("allowed_mentions.users", "expected none beside users in parse, which means all")
	}
	return nil
}

func (a *AllowedMentions) allows(user snowflake.ID) bool {
	return a == nil || slices.Contains(a.Parse, "users") || slices.Contains(a.Users, user)
}

// mention finds the mentions of users; what stands in code, which mentions nobody, it finds without a user.
// Source: https://docs.discord.com/developers/reference#message-formatting.
var mention = regexp.MustCompile("(?s)```.*?```|``.*?``|`[^`]*`|<@!?([0-9]{1,20})>")

// mentioned are the users that content mentions, in order, each once.
func mentioned(content string, allowed *AllowedMentions) (users []snowflake.ID) {
	for _, match := range mention.FindAllStringSubmatch(content, -1) {
		id, err := snowflake.Parse(match[1])
		if err == nil && allowed.allows(id) && !slices.Contains(users, id) {
			users = append(users, id)
		}
	}
	return users
}

// mentions are the user objects of those that are members.
func (s *staged) mentions(users []snowflake.ID) []json.RawMessage {
	objects := []json.RawMessage{}
	for _, id := range users {
		if object := s.member(id).object; object != nil {
			objects = append(objects, userOf(object))
		}
	}
	return objects
}
