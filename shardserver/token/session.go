package token

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"strings"
	"time"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// MaxSessionIDSize is the longest session id, in characters.
const MaxSessionIDSize = 200

// ErrSession: a session id that these keys did not seal.
var ErrSession = errors.New("token: not a session id of this key set")

// Session is what a session id holds, sealed: any pod that has the keys and the log can
// resume the session.
type Session struct {
	// Log is the log that the session follows.
	Log guildlog.ID
	// Base is the number of the snapshot that the session started from.
	Base uint64
	// User is whose session it is.
	User snowflake.ID
	// Random tells the user's sessions apart.
	Random uint64
	// Intents and Capabilities as the client identified.
	Intents      uint64
	Capabilities uint64
	// Issued is when the session started, to the second.
	Issued time.Time
}

const (
	sessionVersion   = 1
	sessionPlainSize = 1 + 16 + 8 + 8 + 8 + 8 + 8 + 4
)

// Seal makes the session id: "<key id>.<base64url(nonce and AES-256-GCM ciphertext)>".
func (k *Keys) Seal(s Session) string {
	plain := make([]byte, 0, sessionPlainSize)
	plain = append(plain, sessionVersion)
	plain = append(plain, s.Log[:]...)
	plain = binary.BigEndian.AppendUint64(plain, s.Base)
	plain = binary.BigEndian.AppendUint64(plain, uint64(s.User))
	plain = binary.BigEndian.AppendUint64(plain, s.Random)
	plain = binary.BigEndian.AppendUint64(plain, s.Intents)
	plain = binary.BigEndian.AppendUint64(plain, s.Capabilities)
	plain = binary.BigEndian.AppendUint32(plain, uint32(s.Issued.Unix()))

	aead := k.current.sealing
	nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+len(plain)+aead.Overhead())
	rand.Read(nonce)
	sealed := aead.Seal(nonce, nonce, plain, []byte(k.current.id))
	return k.current.id + "." + base64.RawURLEncoding.EncodeToString(sealed)
}

// Open reads a session id. It says nothing of the bearer: compare User with a valid token's.
func (k *Keys) Open(id string) (Session, error) {
	if len(id) > MaxSessionIDSize {
		return Session{}, ErrSession
	}
	keyID, encoded, _ := strings.Cut(id, ".")
	key := k.byID(keyID)
	if key == nil {
		return Session{}, ErrSession
	}
	sealed, err := decode(encoded)
	aead := key.sealing
	if err != nil || len(sealed) < aead.NonceSize() {
		return Session{}, ErrSession
	}
	plain, err := aead.Open(nil, sealed[:aead.NonceSize()], sealed[aead.NonceSize():], []byte(keyID))
	if err != nil || len(plain) != sessionPlainSize || plain[0] != sessionVersion {
		return Session{}, ErrSession
	}
	var s Session
	plain = plain[1+copy(s.Log[:], plain[1:]):]
	s.Base = binary.BigEndian.Uint64(plain)
	s.User = snowflake.ID(binary.BigEndian.Uint64(plain[8:]))
	s.Random = binary.BigEndian.Uint64(plain[16:])
	s.Intents = binary.BigEndian.Uint64(plain[24:])
	s.Capabilities = binary.BigEndian.Uint64(plain[32:])
	s.Issued = time.Unix(int64(binary.BigEndian.Uint32(plain[40:])), 0)
	return s, nil
}
