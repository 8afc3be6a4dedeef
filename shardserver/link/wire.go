// Package link ships a guild's log from the shard server that writes it to the relays that serve it: a
// WebSocket connection with binary messages, under TLS in which both ends prove who they are (package linkcert).
//
// The relay says what it has, and the shard goes on from there, or from a snapshot. Every message is a list
// of parts: a letter, the length, the content. Parts that are not known are skipped, so that either end may be a
// release ahead.
package link

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
)

// version of the link. An end that speaks this one speaks the one before it as well, once there is one.
const version = 1

const (
	// maxMessage bounds a message, in bytes: a batch of records, or the largest single one.
	maxMessage = 8 << 20
	// batchBytes is when a message gets no further parts.
	batchBytes = 256 << 10
	// maxList is how many sessions one list has; a shorter one is the last.
	maxList = 4096
)

// Parts that the shard sends.
const (
	partWelcome  = 'W' // welcome
	partRecord   = 'R' // number and record
	partVolatile = 'V' // the same of an event that is not logged
	partState    = 'S' // number, count of members, rows
	partAnswer   = 'A' // guild.Answer
	partEvict    = 'E' // guild.Evict
	partOrder    = 'O' // guild.Order
)

// Parts that the relay sends.
const (
	partFollow   = 'f' // follow, first
	partSessions = 's' // []guild.Attached, behind it: at most maxList, and the last one fewer
	partAttach   = 'a' // guild.Attachment
	partDetach   = 'd' // guild.Detachment
	partReport   = 'r' // report.Relay
)

// follow is what a relay begins with.
type follow struct {
	Version int `json:"version"`
	// Log and After are what it has; empty: nothing.
	Log   string `json:"log,omitempty"`
	After uint64 `json:"after,omitempty"`
}

// welcome is the shard's answer.
type welcome struct {
	Version int    `json:"version"`
	Log     string `json:"log"`
	Epoch   int64  `json:"epoch"`
	// Begin is the number that the records follow: the relay's own, or that of a history with a state behind it.
	Begin uint64 `json:"begin"`
}

// part appends a part to a message.
func part(message []byte, kind byte, content []byte) []byte {
	message = binary.AppendUvarint(append(message, kind), uint64(len(content)))
	return append(message, content...)
}

func jsonPart(message []byte, kind byte, v any) []byte {
	content, err := json.Marshal(v)
	if err != nil {
		panic(err) // only for types that JSON does not know
	}
	return part(message, kind, content)
}

// parts calls each with the parts of a message.
func parts(message []byte, each func(kind byte, content []byte) error) error {
	d := guildlog.Decoder{Rest: message}
	for len(d.Rest) > 0 {
		kind := d.Rest[0]
		d.Rest = d.Rest[1:]
		content := d.Bytes(d.Uvarint())
		if d.Err != nil {
			return fmt.Errorf("link: part %q: %w", kind, d.Err)
		}
		if err := each(kind, content); err != nil {
			return fmt.Errorf("link: part %q: %w", kind, err)
		}
	}
	return nil
}

func appendRecord(message []byte, kind byte, r *guildlog.Record, prev uint64) []byte {
	return part(message, kind, append(binary.AppendUvarint(nil, r.Seq), guildlog.EncodeRecord(r, prev)...))
}

func readRecord(content []byte) (r guildlog.Record, prev uint64, err error) {
	d := guildlog.Decoder{Rest: content}
	seq := d.Uvarint()
	if d.Err != nil {
		return r, 0, d.Err
	}
	return guildlog.DecodeRecord(seq, d.Rest)
}

func appendState(message []byte, s *guild.State) []byte {
	content := binary.AppendUvarint(nil, s.Seq)
	content = binary.AppendUvarint(content, uint64(s.Members))
	for _, row := range s.Rows {
		for _, field := range [][]byte{row.Key, row.Value} {
			content = append(binary.AppendUvarint(content, uint64(len(field))), field...)
		}
	}
	return part(message, partState, content)
}

func readState(content []byte) (s guild.State, err error) {
	d := guildlog.Decoder{Rest: content}
	s.Seq = d.Uvarint()
	s.Members = int(d.Uvarint())
	for len(d.Rest) > 0 && d.Err == nil {
		var row guildlog.Row
		row.Key = d.Bytes(d.Uvarint())
		row.Value = d.Bytes(d.Uvarint())
		s.Rows = append(s.Rows, row)
	}
	return s, d.Err
}

// appendItem appends what a feed passes; prev is the number of what came before it.
func appendItem(message []byte, item *guild.Item, prev uint64) []byte {
	for i := range item.Records {
		message = appendRecord(message, partRecord, &item.Records[i], prev)
		prev = item.Records[i].End()
	}
	if item.Volatile != nil {
		message = appendRecord(message, partVolatile, item.Volatile, item.Volatile.Seq-1)
	}
	switch m := item.Message.(type) {
	case guild.State:
		message = appendState(message, &m)
	case guild.Answer:
		message = jsonPart(message, partAnswer, m)
	case guild.Evict:
		message = jsonPart(message, partEvict, m)
	case guild.Order:
		message = jsonPart(message, partOrder, m)
	}
	return message
}

var (
	errVersion = errors.New("link: the other end speaks another version")
	errOrder   = errors.New("link: not expected here")
)
