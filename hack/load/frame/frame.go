// Package frame takes gateway messages apart without decoding their bodies.
package frame

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
)

// Frame is a gateway message. Its slices point into the message.
type Frame struct {
	Op    int
	S     uint64 // 0 when null or absent
	Type  []byte // t; nil when null or absent
	Data  []byte // d as it stands; nil when absent
	hasOp bool
}

var errSyntax = errors.New("not a JSON object")

// Parse reads a message. It is strict about op, s and t, and looks at d only as far as it must
// to find its end.
func Parse(message []byte) (Frame, error) {
	var f Frame
	var bad error
	err := Fields(message, func(key, value []byte) {
		var err error
		switch string(key) {
		case "op":
			f.hasOp = true
			f.Op, err = strconv.Atoi(string(value))
			if err == nil && f.Op < 0 {
				err = errors.New("negative")
			}
		case "s":
			f.S = 0
			if !isNull(value) {
				f.S, err = strconv.ParseUint(string(value), 10, 53)
			}
		case "t":
			f.Type = nil
			if !isNull(value) {
				f.Type, err = text(value)
			}
		case "d":
			f.Data = value
		}
		if err != nil && bad == nil {
			bad = fmt.Errorf("field %s: %w", key, err)
		}
	})
	switch {
	case err != nil:
		return Frame{}, err
	case bad != nil:
		return Frame{}, bad
	case !f.hasOp:
		return Frame{}, errors.New("field op is missing")
	}
	return f, nil
}

// Fields calls field with each key of a JSON object and its value, as it stands. A key that
// comes twice is told twice.
func Fields(object []byte, field func(key, value []byte)) error {
	i := space(object, 0)
	if i >= len(object) || object[i] != '{' {
		return errSyntax
	}
	i = space(object, i+1)
	if i < len(object) && object[i] == '}' {
		return end(object, i+1)
	}
	for {
		start := i
		if i = str(object, i); i < 0 {
			return errSyntax
		}
		key, err := text(object[start:i])
		if err != nil {
			return errSyntax
		}
		i = space(object, i)
		if i >= len(object) || object[i] != ':' {
			return errSyntax
		}
		i = space(object, i+1)
		start = i
		if i = skip(object, i); i < 0 {
			return errSyntax
		}
		field(key, object[start:i])
		i = space(object, i)
		if i >= len(object) {
			return errSyntax
		}
		switch object[i] {
		case ',':
			i = space(object, i+1)
		case '}':
			return end(object, i+1)
		default:
			return errSyntax
		}
	}
}

func isNull(value []byte) bool { return string(value) == "null" }

// text is the content of a JSON string.
func text(value []byte) ([]byte, error) {
	if len(value) < 2 || value[0] != '"' || value[len(value)-1] != '"' {
		return nil, errors.New("not a string")
	}
	inner := value[1 : len(value)-1]
	if bytes.IndexByte(inner, '\\') < 0 {
		return inner, nil
	}
	var s string
	if err := json.Unmarshal(value, &s); err != nil {
		return nil, err
	}
	return []byte(s), nil
}

func end(b []byte, i int) error {
	if space(b, i) != len(b) {
		return errSyntax
	}
	return nil
}

func space(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\n' || b[i] == '\r' || b[i] == '\t') {
		i++
	}
	return i
}

// str is the index after the string that begins at i, or -1.
func str(b []byte, i int) int {
	if i >= len(b) || b[i] != '"' {
		return -1
	}
	for i++; ; i++ {
		quote := bytes.IndexByte(b[i:], '"')
		if quote < 0 {
			return -1
		}
		i += quote
		slashes := 0
		for b[i-slashes-1] == '\\' {
			slashes++
		}
		if slashes%2 == 0 {
			return i + 1
		}
	}
}

// skip is the index after the value that begins at i, or -1.
func skip(b []byte, i int) int {
	if i >= len(b) {
		return -1
	}
	switch b[i] {
	case '"':
		return str(b, i)
	case '{', '[':
		for depth := 0; i < len(b); {
			switch b[i] {
			case '"':
				if i = str(b, i); i < 0 {
					return -1
				}
				continue
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
			i++
		}
		return -1
	}
	start := i
	for i < len(b) {
		switch b[i] {
		case ',', '}', ']', ' ', '\n', '\r', '\t', '"', ':', '{', '[':
			if i == start {
				return -1
			}
			return i
		}
		i++
	}
	return -1
}
