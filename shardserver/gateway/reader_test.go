package gateway

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"guildhall.dev/guildhall/shardserver/protocol"
)

const (
	final        = 0x80
	continuation = 0x0
	text         = 0x1
	ping         = 0x9
)

// frame is a client's frame, masked with zeros.
func frame(first byte, payload string) []byte {
	b := []byte{first}
	if len(payload) < 126 {
		b = append(b, 0x80|byte(len(payload)))
	} else {
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(len(payload)))
	}
	return append(append(b, 0, 0, 0, 0), payload...)
}

// masked is a client's frame of a short payload, masked with a key.
func masked(first byte, payload, key string) []byte {
	b := append([]byte{first, 0x80 | byte(len(payload))}, key...)
	for i := range len(payload) {
		b = append(b, payload[i]^key[i%4])
	}
	return b
}

func (c *client) write(parts ...[]byte) {
	c.t.Helper()
	if _, err := c.ws.NetConn().Write(bytes.Join(parts, nil)); err != nil {
		c.t.Fatal(err)
	}
}

const heartbeat = `{"op":1,"d":null}`

// TestFramesInAnyPieces: what a client sends is the same to the server however it is cut.
func TestFramesInAnyPieces(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for name, test := range map[string]struct {
		sent         []byte
		pongs, beats int
	}{
		"one message":                      {frame(final|text, heartbeat), 0, 1},
		"masked":                           {masked(final|text, heartbeat, "abcd"), 0, 1},
		"with spaces":                      {frame(final|text, `{ "op": 1, "d": 5 }`), 0, 1},
		"with another order":               {frame(final|text, `{"d":5,"op":1}`), 0, 1},
		"several at once":                  {bytes.Repeat(frame(final|text, heartbeat), 20), 0, 20},
		"in fragments":                     {bytes.Join([][]byte{frame(text, heartbeat[:5]), frame(continuation, heartbeat[5:9]), frame(final|continuation, heartbeat[9:])}, nil), 0, 1},
		"a ping between fragments":         {bytes.Join([][]byte{frame(text, heartbeat[:5]), frame(final|ping, "x"), frame(final|continuation, heartbeat[5:])}, nil), 1, 1},
		"pings and messages":               {bytes.Repeat(append(frame(final|ping, "x"), frame(final|text, heartbeat)...), 5), 5, 5},
		"a ping, and then nothing":         {frame(final|ping, "x"), 1, 0},
		"a message larger than the buffer": {frame(final|text, heartbeat+strings.Repeat(" ", protocol.MaxClientPayload-len(heartbeat))), 0, 1},
	} {
		for _, step := range []int{len(test.sent), 7} {
			if step < len(test.sent) && len(test.sent) > 1000 {
				step = 1000
			}
			t.Run(fmt.Sprintf("%s, %d bytes at a time", name, step), func(t *testing.T) {
				c := w.connect()
				c.t = t
				pongs := 0
				c.ws.SetPongHandler(func(string) error { pongs++; return nil })
				for rest := test.sent; len(rest) > 0; rest = rest[min(step, len(rest)):] {
					c.write(rest[:min(step, len(rest))])
				}
				c.write(frame(final|text, heartbeat)) // its answer is behind all pongs
				for range test.beats + 1 {
					c.op(protocol.OpHeartbeatACK)
				}
				if pongs != test.pongs {
					t.Errorf("%d pongs, expected %d", pongs, test.pongs)
				}
				c.identify(user(1), allEvents)
			})
		}
	}
}

func TestHalfAMessage(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{times: func(d *times) { d.message = 100 * time.Millisecond }})
	for name, half := range map[string][]byte{
		"the header":      {final | text},
		"of the payload":  frame(final|text, heartbeat)[:12],
		"of a fragmented": frame(text, heartbeat[:5]),
		"of a ping":       frame(final|ping, "x")[:3],
	} {
		t.Run(name, func(t *testing.T) {
			c := w.connect()
			c.t = t
			c.write(half)
			c.closed(protocol.CloseSessionTimeout)
		})
	}
	t.Run("has no deadline once it is whole", func(t *testing.T) {
		c := w.connect()
		c.t = t
		whole := frame(final|text, heartbeat)
		c.write(whole[:10])
		time.Sleep(20 * time.Millisecond) // so that the server waits for the rest
		c.write(whole[10:])
		c.op(protocol.OpHeartbeatACK)
		time.Sleep(150 * time.Millisecond) // past the deadline that it had
		c.write(whole)
		c.op(protocol.OpHeartbeatACK)
	})
}

func TestALimitedNumberOfHalfMessages(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	w.gateway.maxHalfSent = 2
	slow := []*client{w.connect(), w.connect()}
	for _, c := range slow {
		c.write(frame(final|text, heartbeat)[:9])
	}
	eventually(t, "two wait for the rest of a message", func() bool { return w.gateway.halfSent.Load() == 2 })
	c := w.connect()
	c.write(frame(final|text, heartbeat)[:9])
	c.closed(protocol.CloseSessionTimeout)
	for _, c := range slow {
		c.write(frame(final|text, heartbeat)[9:])
		c.op(protocol.OpHeartbeatACK)
	}
}

// TestEarlyMessages: a client that identifies before it has the answer to its upgrade is served, too.
func TestEarlyMessages(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	conn, err := net.Dial("tcp", w.server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request := "GET /g/" + guildID.String() + "/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
	if _, err := conn.Write(append([]byte(request), frame(final|text, heartbeat)...)); err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	in := bufio.NewReader(conn)
	response, err := http.ReadResponse(in, nil)
	if err != nil || response.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", response, err)
	}
	var got []byte
	for !bytes.Contains(got, []byte(`"op":11`)) {
		b, err := in.ReadByte()
		if err != nil {
			t.Fatalf("%v after %q", err, got)
		}
		got = append(got, b)
	}
	if !bytes.Contains(got, []byte(`"op":10`)) {
		t.Errorf("no HELLO before the answer: %q", got)
	}
}

func TestIdleSessionsTakeNoGoroutine(t *testing.T) {
	w := newWorld(t, setup{})
	if w.gateway.o.Poller == nil {
		t.Skip("without a poller they do")
	}
	w.enter(user(0))
	const sessions = 50
	before := runtime.NumGoroutine()
	for i := range sessions {
		w.enter(user(1 + i))
	}
	eventually(t, "goroutines end", func() bool { return runtime.NumGoroutine() < before+sessions/2 })
}

// TestClosesThatCross: both sides close at the same time.
func TestClosesThatCross(t *testing.T) {
	t.Parallel()
	w := newWorld(t, setup{})
	for range 20 {
		c := w.connect()
		c.write(frame(final|text, `{"op":99}`), frame(final|0x8, "\x03\xe8"))
		c.closed(protocol.CloseNotAuthenticated)
	}
}
