// Package protocol has the facts of the Discord Gateway protocol, version 10, that a server
// needs: opcodes, close codes, intents, and how messages are encoded.
// Source: https://docs.discord.com/developers/events/gateway and
// https://docs.discord.com/developers/topics/opcodes-and-status-codes.
package protocol

import (
	"encoding/binary"
	"encoding/json"
	"slices"
	"strconv"
)

// Gateway opcodes.
const (
	OpDispatch            = 0
	OpHeartbeat           = 1
	OpIdentify            = 2
	OpPresenceUpdate      = 3
	OpVoiceStateUpdate    = 4
	OpResume              = 6
	OpReconnect           = 7
	OpRequestGuildMembers = 8
	OpInvalidSession      = 9
	OpHello               = 10
	OpHeartbeatACK        = 11
	OpGuildSubscriptions  = 14
	OpSoundboardSounds    = 31
	OpBulkSubscriptions   = 37
	OpChannelInfo         = 43
)

// Close codes. Behind the resumable ones a client may resume its session.
const (
	CloseUnknownError         = 4000 // resumable
	CloseUnknownOpcode        = 4001 // resumable
	CloseDecodeError          = 4002 // resumable
	CloseNotAuthenticated     = 4003
	CloseAuthenticationFailed = 4004 // do not reconnect
	CloseAlreadyAuthenticated = 4005
	CloseInvalidSeq           = 4007
	CloseRateLimited          = 4008
	CloseSessionTimeout       = 4009 // resumable
	CloseInvalidShard         = 4010 // do not reconnect
	CloseInvalidVersion       = 4012 // do not reconnect
	CloseInvalidIntents       = 4013 // do not reconnect
)

// Limits of what a client sends.
const (
	// MaxClientPayload is the largest message, in bytes: user clients may send 15 KiB,
	// bots are told 4,096 bytes but the larger bound serves both.
	MaxClientPayload = 15 << 10
	// MaxClientMessages is how many messages a connection may send per window of 60 seconds.
	MaxClientMessages = 120
)

// NoopEvent is a dispatch without meaning. It moves a session's number when its view lets nothing else through.
const NoopEvent = "GUILDHALL_POSITION"

// Message is what a client sends.
type Message struct {
	Op   int             `json:"op"`
	Data json.RawMessage `json:"d"`
}

// textFrame is a WebSocket frame (RFC 6455, section 5.2): final, text, unmasked, with room
// for a payload of n bytes behind its header.
func textFrame(n int) []byte { return frameHeader(0x81, n, n) }

// frameHeader is the header of a frame with n bytes of payload, with room behind it.
func frameHeader(first byte, n, room int) []byte {
	switch {
	case n < 126:
		return append(make([]byte, 0, 2+room), first, byte(n))
	case n < 1<<16:
		return binary.BigEndian.AppendUint16(append(make([]byte, 0, 4+room), first, 126), uint16(n))
	default:
		return binary.BigEndian.AppendUint64(append(make([]byte, 0, 10+room), first, 127), uint64(n))
	}
}

// TextFrame is payload as a WebSocket text message.
func TextFrame(payload []byte) []byte { return append(textFrame(len(payload)), payload...) }

// PongFrame answers a WebSocket ping.
func PongFrame(payload []byte) []byte {
	return append(frameHeader(0x8a, len(payload), len(payload)), payload...)
}

// CloseFrame is a WebSocket close message. The reason is cut at 123 bytes, the most that fits.
func CloseFrame(code int, reason string) []byte {
	if len(reason) > 123 {
		reason = reason[:123]
	}
	frame := frameHeader(0x88, 2+len(reason), 2+len(reason))
	return append(binary.BigEndian.AppendUint16(frame, uint16(code)), reason...)
}

// Dispatch is a dispatch of event t with number seq and body data, a JSON value, as a frame.
// body is where data stands in it.
func Dispatch(t string, seq uint64, data []byte) (frame, body []byte) {
	const head, mid, tail = `{"t":"`, `","s":`, `,"op":0,"d":`
	var digits [20]byte
	s := strconv.AppendUint(digits[:0], seq, 10)
	frame = textFrame(len(head) + len(t) + len(mid) + len(s) + len(tail) + len(data) + 1)
	frame = append(frame, head...)
	frame = append(frame, t...)
	frame = append(frame, mid...)
	frame = append(frame, s...)
	frame = append(frame, tail...)
	start := len(frame)
	frame = append(frame, data...)
	body = frame[start:len(frame):len(frame)]
	return append(frame, '}'), body
}

// DispatchParts is a dispatch whose body is shared and own joined, as a frame in three parts: head,
// shared as it is, and tail.
func DispatchParts(t string, seq uint64, shared, own []byte) (head, tail []byte) {
	opening := `{"t":"` + t + `","s":` + strconv.FormatUint(seq, 10) + `,"op":0,"d":`
	n := len(opening) + len(shared) + len(own) + 1
	return append(frameHeader(0x81, n, len(opening)), opening...), append(slices.Clip(own), '}')
}

// Noop is a no-op dispatch with number seq, as a frame.
func Noop(seq uint64) []byte {
	frame, _ := Dispatch(NoopEvent, seq, []byte("{}"))
	return frame
}

// Resumed is the dispatch that ends a replay, at number seq, as a frame. Its body
// is an object: discord.py writes into it.
func Resumed(seq uint64) []byte {
	frame, _ := Dispatch("RESUMED", seq, []byte("{}"))
	return frame
}

// Control is a message of opcode op with body data, a JSON value, as a frame.
func Control(op int, data string) []byte {
	return TextFrame([]byte(`{"t":null,"s":null,"op":` + strconv.Itoa(op) + `,"d":` + data + `}`))
}

// Hello is the server's first message. interval is in milliseconds.
func Hello(interval int) []byte {
	return Control(OpHello, `{"heartbeat_interval":`+strconv.Itoa(interval)+`}`)
}

// Messages that are always the same.
var (
	HeartbeatACK   = Control(OpHeartbeatACK, "null")
	Reconnect      = Control(OpReconnect, "null")
	InvalidSession = Control(OpInvalidSession, "false")
)
