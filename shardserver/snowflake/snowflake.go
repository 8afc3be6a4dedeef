// Package snowflake makes and reads the 64-bit ids of the gateway protocol: 42 bits of
// milliseconds since 2015-01-01T00:00Z and 22 bits that keep ids of one millisecond apart
// (https://docs.discord.com/developers/reference, "Snowflakes").
package snowflake

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"sync"
	"time"
)

// ID is a snowflake. In JSON it is a string of decimal digits.
type ID uint64

// Epoch is the first millisecond that a snowflake can hold, in Unix milliseconds.
const Epoch = 1420070400000

const lowBits = 22

// Parse reads a snowflake of 17 to 19 decimal digits: the client libraries look for
// ids of that length.
func Parse(s string) (ID, error) {
	if len(s) < 17 || len(s) > 19 || s[0] == '0' {
		return 0, fmt.Errorf("%q is not a snowflake: expected 17 to 19 decimal digits without a leading zero", s)
	}
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a snowflake: expected 17 to 19 decimal digits without a leading zero", s)
	}
	return ID(v), nil
}

// String is the id in decimal digits.
func (id ID) String() string { return strconv.FormatUint(uint64(id), 10) }

// MarshalText makes the id a string in JSON, also as the key of a map.
func (id ID) MarshalText() ([]byte, error) { return strconv.AppendUint(nil, uint64(id), 10), nil }

// UnmarshalText is Parse, but for the error, which is the one to which encoding/json adds the field.
func (id *ID) UnmarshalText(text []byte) (err error) {
	if *id, err = Parse(string(text)); err != nil {
		return &json.UnmarshalTypeError{Value: "string that is none", Type: reflect.TypeFor[ID]()}
	}
	return nil
}

// Is says whether values of a type are IDs, or point to one. encoding/json names either in its errors.
func Is(t reflect.Type) bool {
	return t == reflect.TypeFor[ID]() || t == reflect.TypeFor[*ID]()
}

// Time is when the id was made, to the millisecond.
func (id ID) Time() time.Time { return time.UnixMilli(int64(id>>lowBits) + Epoch) }

// Source makes ids that rise strictly. Its zero value is ready; it may be used by several
// goroutines.
type Source struct {
	// Now is the clock, time.Now when nil.
	Now func() time.Time

	mu   sync.Mutex
	last ID
}

// Next makes an id. When the clock stands or falls back, ids go on from the last one.
func (s *Source) Next() ID {
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	id := ID(max(0, now().UnixMilli()-Epoch)) << lowBits
	s.mu.Lock()
	defer s.mu.Unlock()
	if id <= s.last {
		id = s.last + 1
	}
	s.last = id
	return id
}
