package protocol

import (
	"bytes"
	"encoding/json"

	"guildhall.dev/guildhall/shardserver/snowflake"
)

// WithoutContent is the body of a Content event as apps without MESSAGE_CONTENT are sent it: what users write is
// empty, and there is no poll. So it is in messages within the message: the one that it replies to, and those that
// it forwards. Fields that are missing stay so. readers are who gets the whole body all the same: who wrote it, and
// who is mentioned. bare is nil where it would be the same. data is a compact JSON object.
// Sources: https://docs.discord.com/developers/events/gateway#message-content-intent,
// https://docs.discord.com/developers/resources/message#message-object,
// https://docs.discord.com/developers/events/gateway-events#auto-moderation-action-execution.
func WithoutContent(data []byte) (bare []byte, readers []snowflake.ID) {
	c := cutter{in: data, out: make([]byte, 0, len(data))}
	c.message()
	if bytes.Equal(c.out, data) {
		return nil, nil
	}
	for _, users := range c.users {
		readers = append(readers, idsOf(users)...)
	}
	return c.out, readers
}

// idsOf are the ids of a user or a list of users, without those that are none.
func idsOf(users []byte) (ids []snowflake.ID) {
	list := make([]struct {
		ID string `json:"id"`
	}, 1)
	// What is not of its type is left out, and the rest is read.
	if bytes.HasPrefix(users, []byte("[")) {
		_ = json.Unmarshal(users, &list)
	} else {
		_ = json.Unmarshal(users, &list[0])
	}
	for _, u := range list {
		if id, err := snowflake.Parse(u.ID); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// cutter copies compact JSON without what users write. It goes through it once, however deep it is.
type cutter struct {
	in, out []byte
	users   [][]byte // who wrote the message, and who is mentioned in it
}

// message copies a message or a list of them, and as it is whatever else stands in the place of one.
func (c *cutter) message() {
	switch c.peek() {
	case '{':
		c.list(c.field)
	case '[':
		c.list(c.message)
	default:
		c.put(c.next())
	}
}

// field copies a field of a message.
func (c *cutter) field() {
	name := c.next()
	colon := c.take(1)
	key := unquoted(name)
	if string(key) == "poll" {
		c.next()
		return
	}
	c.put(name)
	c.put(colon)
	switch string(key) {
	case "content", "matched_content":
		c.next()
		c.put([]byte(`""`))
	case "embeds", "attachments", "components":
		c.next()
		c.put([]byte("[]"))
	case "referenced_message", "message_snapshots", "message":
		inner := cutter{in: c.in, out: c.out} // has users of its own
		inner.message()
		c.in, c.out = inner.in, inner.out
	case "author", "mentions":
		users := c.next()
		c.users = append(c.users, users)
		c.put(users)
	default:
		c.put(c.next())
	}
}

// list copies what stands in brackets, part by part. A part of which nothing is copied takes its comma along.
func (c *cutter) list(part func()) {
	c.put(c.take(1))
	first := len(c.out)
	for b := c.peek(); b != 0 && b != '}' && b != ']'; b = c.peek() {
		comma := len(c.out)
		if comma > first {
			c.put([]byte(","))
		}
		start := len(c.out)
		part()
		if len(c.out) == start {
			c.out = c.out[:comma]
		}
		if c.peek() == ',' {
			c.take(1)
		}
	}
	c.put(c.take(1))
}

func (c *cutter) put(part []byte) { c.out = append(c.out, part...) }

// peek is the next byte; 0: there is none.
func (c *cutter) peek() byte {
	if len(c.in) == 0 {
		return 0
	}
	return c.in[0]
}

// take takes n bytes, or as many as there are.
func (c *cutter) take(n int) []byte {
	n = min(n, len(c.in))
	part := c.in[:n]
	c.in = c.in[n:]
	return part
}

// next takes a value, or the name of a field. In what is no JSON it takes a byte at least.
func (c *cutter) next() []byte {
	depth, n := 0, 0
	for ; n < len(c.in); n++ {
		b := c.in[n]
		if depth == 0 && n > 0 && (b == ',' || b == ':' || b == '}' || b == ']') {
			break
		}
		switch b {
		case '"':
			for n++; n < len(c.in) && c.in[n] != '"'; n++ {
				if c.in[n] == '\\' {
					n++
				}
			}
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		}
	}
	return c.take(n)
}

// unquoted is the name of a field without quotes and escapes.
func unquoted(name []byte) []byte {
	if bytes.IndexByte(name, '\\') < 0 {
		return bytes.Trim(name, `"`)
	}
	var s string
	_ = json.Unmarshal(name, &s) // of JSON it is a string
	return []byte(s)
}
