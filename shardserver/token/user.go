package token

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"guildhall.dev/guildhall/shardserver/snowflake"
)

// maxTokenSize bounds what Verify reads.
const maxTokenSize = 1024

// MaxNameLength is the longest user name, in bytes.
const MaxNameLength = 100

// Errors of Verify.
var (
	ErrMalformed  = errors.New("token: malformed")
	ErrUnknownKey = errors.New("token: made with a key that is not in the key set")
	ErrSignature  = errors.New("token: wrong signature")
	ErrExpired    = errors.New("token: expired")
)

// Claims is what a user token says of its bearer.
type Claims struct {
	// User is the bearer's id.
	User snowflake.ID
	// Name is the bearer's user name.
	Name string
	// Bot marks the user as a bot.
	Bot bool
	// Publish lets the bearer act for the guild's backend: publish any event, add and
	// remove members, create and delete channels.
	Publish bool
	// Expires ends the token's validity; never when zero. To the second.
	Expires time.Time
}

type claimsJSON struct {
	Key     string `json:"k"`
	Name    string `json:"n"`
	Bot     bool   `json:"b,omitempty"`
	Publish bool   `json:"p,omitempty"`
	Expires int64  `json:"e,omitempty"`
	Issued  int64  `json:"i"`
}

// Issue makes a user token with the current key. Its form is the one that client libraries
// know: base64url(user id).base64url(claims).base64url(signature), without padding.
func (k *Keys) Issue(c Claims) (string, error) {
	if _, err := snowflake.Parse(c.User.String()); err != nil {
		return "", fmt.Errorf("token: user id: %w", err)
	}
	if c.Name == "" || len(c.Name) > MaxNameLength || !utf8.ValidString(c.Name) {
		return "", fmt.Errorf("token: the user name must have 1 to %d bytes of UTF-8, got %q", MaxNameLength, c.Name)
	}
	body := claimsJSON{Key: k.current.id, Name: c.Name, Bot: c.Bot, Publish: c.Publish, Issued: time.Now().Unix()}
	if !c.Expires.IsZero() {
		body.Expires = max(1, c.Expires.Unix()) // 0 is never
	}
	encoded, err := json.Marshal(body)
	if err != nil {
		return "", err
	}
	b64 := base64.RawURLEncoding
	signed := b64.EncodeToString([]byte(c.User.String())) + "." + b64.EncodeToString(encoded)
	return signed + "." + b64.EncodeToString(k.current.sign(signed)), nil
}

// Verify checks a user token and returns what it says. A prefix "Bot " or "Bearer " is
// accepted: some libraries send it when they identify.
func (k *Keys) Verify(token string, now time.Time) (Claims, error) {
	token = strings.TrimPrefix(strings.TrimPrefix(token, "Bot "), "Bearer ")
	if len(token) > maxTokenSize {
		return Claims{}, ErrMalformed
	}
	signed, signature, ok := cutLast(token, '.')
	user, claims, ok2 := strings.Cut(signed, ".")
	if !ok || !ok2 {
		return Claims{}, ErrMalformed
	}
	rawUser, err1 := decode(user)
	rawClaims, err2 := decode(claims)
	rawSignature, err3 := decode(signature)
	if err1 != nil || err2 != nil || err3 != nil {
		return Claims{}, ErrMalformed
	}
	var body claimsJSON
	if err := json.Unmarshal(rawClaims, &body); err != nil {
		return Claims{}, ErrMalformed
	}
	key := k.byID(body.Key)
	if key == nil {
		return Claims{}, ErrUnknownKey
	}
	if !hmac.Equal(rawSignature, key.sign(signed)) {
		return Claims{}, ErrSignature
	}
	id, err := snowflake.Parse(string(rawUser))
	if err != nil {
		return Claims{}, ErrMalformed
	}
	c := Claims{User: id, Name: body.Name, Bot: body.Bot, Publish: body.Publish}
	if body.Expires != 0 {
		c.Expires = time.Unix(body.Expires, 0)
		if !now.Before(c.Expires) {
			return Claims{}, ErrExpired
		}
	}
	return c, nil
}

func (k *key) sign(s string) []byte {
	mac := hmac.New(sha256.New, k.signing)
	mac.Write([]byte(s))
	return mac.Sum(nil)
}

func cutLast(s string, sep byte) (before, after string, found bool) {
	if i := strings.LastIndexByte(s, sep); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return s, "", false
}
