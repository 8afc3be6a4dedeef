// Package token makes and checks what clients prove themselves with: user tokens, which
// a namespace's keys sign, and session ids, which they seal.
package token

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

const secretSize = 32

// File names of a key set in a directory; also the entries of the Secret guildhall-keys.
const (
	CurrentKey  = "current"
	PreviousKey = "previous"
)

var keyIDPattern = regexp.MustCompile(`^[0-9a-f]{1,8}$`)

// Keys is a namespace's key set: the current key, which makes tokens and session ids, and
// perhaps the previous one, which is still accepted.
type Keys struct {
	current  key
	previous *key
}

type key struct {
	id      string
	signing []byte      // HMAC-SHA256 of user tokens
	sealing cipher.AEAD // AES-256-GCM of session ids
}

// GenerateKey makes a key at random, in the form "<key id>.<32 bytes, base64url>".
func GenerateKey() string {
	var id [4]byte
	var secret [secretSize]byte
	rand.Read(id[:])
	rand.Read(secret[:])
	return fmt.Sprintf("%x.%s", id, base64.RawURLEncoding.EncodeToString(secret[:]))
}

// ParseKeys reads a key set; previous may be empty.
func ParseKeys(current, previous string) (*Keys, error) {
	c, err := parseKey(current)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", CurrentKey, err)
	}
	keys := &Keys{current: *c}
	if strings.TrimSpace(previous) == "" {
		return keys, nil
	}
	if keys.previous, err = parseKey(previous); err != nil {
		return nil, fmt.Errorf("key %q: %w", PreviousKey, err)
	}
	if keys.previous.id == keys.current.id {
		return nil, fmt.Errorf("keys %q and %q have the same id %q", CurrentKey, PreviousKey, keys.current.id)
	}
	return keys, nil
}

// LoadKeys reads a key set from the files "current" and, if it exists, "previous" of dir.
func LoadKeys(dir string) (*Keys, error) {
	current, err := os.ReadFile(filepath.Join(dir, CurrentKey))
	if err != nil {
		return nil, fmt.Errorf("reading the key set: %w", err)
	}
	previous, err := os.ReadFile(filepath.Join(dir, PreviousKey))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("reading the key set: %w", err)
	}
	return ParseKeys(string(current), string(previous))
}

func parseKey(s string) (*key, error) {
	id, encoded, ok := strings.Cut(strings.TrimSpace(s), ".")
	if !ok || !keyIDPattern.MatchString(id) {
		return nil, errors.New("expected <key id>.<secret> with a key id of 1 to 8 lower-case hexadecimal digits")
	}
	secret, err := decode(encoded)
	if err != nil || len(secret) != secretSize {
		return nil, fmt.Errorf("expected a secret of %d bytes in base64url without padding", secretSize)
	}
	return &key{
		id:      id,
		signing: derive(secret, "guildhall user token v1"),
		sealing: newGCM(derive(secret, "guildhall session id v1")),
	}, nil
}

func newGCM(secret []byte) cipher.AEAD {
	block, err := aes.NewCipher(secret)
	if err != nil { // only for impossible key lengths
		panic(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

func derive(secret []byte, purpose string) []byte {
	k, err := hkdf.Key(sha256.New, secret, nil, purpose, secretSize)
	if err != nil { // only for impossible lengths
		panic(err)
	}
	return k
}

// decode reads base64url without padding. Each value has one form only: no line breaks, no bits
// to spare, so that whoever changes a token makes another one, not the same in other letters.
func decode(s string) ([]byte, error) {
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err == nil && base64.RawURLEncoding.EncodeToString(b) != s {
		err = errors.New("not in canonical form")
	}
	return b, err
}

// byID finds the key of that id, nil when there is none.
func (k *Keys) byID(id string) *key {
	switch {
	case id == k.current.id:
		return &k.current
	case k.previous != nil && id == k.previous.id:
		return k.previous
	}
	return nil
}
