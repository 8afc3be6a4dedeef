package generator

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"strconv"
	"time"

	"guildhall.dev/guildhall/hack/load/audit"
)

// magic begins the content of every event that a generator publishes:
//
//	guildhall-load <run> <publisher> <count> <sent> <padding> <checksum>
//
// run is 8 hexadecimal digits that tell generators apart, sent the Unix time in nanoseconds,
// checksum the CRC-32C of all before it in 8 hexadecimal digits. No character of it is escaped
// in JSON, so it is found in a frame without decoding it.
const magic = "guildhall-load "

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"

// content makes the text of an event, of size characters or as few as it needs.
func content(run uint32, e audit.Event, sent time.Time, size int) string {
	b := fmt.Appendf(make([]byte, 0, max(size, 96)), "%s%08x %d %d %d ", magic, run, e.Publisher, e.Count, sent.UnixNano())
	state := uint64(e.Publisher)<<32 | uint64(e.Count)
	for len(b)+9 < size {
		state = state*6364136223846793005 + 1442695040888963407
		b = append(b, letters[state>>58])
	}
	b = append(b, ' ')
	return string(checksum(b, b))
}

// checksum appends that of text.
func checksum(to, text []byte) []byte {
	sum := crc32.Checksum(text, castagnoli)
	for shift := 28; shift >= 0; shift -= 4 {
		to = append(to, "0123456789abcdef"[sum>>shift&15])
	}
	return to
}

// payload is what a body tells of itself.
type payload struct {
	run   uint32
	event audit.Event
	sent  time.Time
}

type found int

const (
	foreign found = iota // no content of a generator
	damaged              // one with a wrong checksum
	whole
)

// find looks for a generator's content in a body.
func find(body []byte) (payload, found) {
	start := bytes.Index(body, []byte(magic))
	if start < 0 {
		return payload{}, foreign
	}
	text := body[start:]
	end := bytes.IndexByte(text, '"')
	if end < len(magic)+8 {
		return payload{}, damaged
	}
	text = text[:end]
	var sum [8]byte
	if !bytes.Equal(checksum(sum[:0], text[:len(text)-8]), text[len(text)-8:]) {
		return payload{}, damaged
	}
	rest := text[len(magic):]
	var numbers [4]uint64
	for i := range numbers {
		word, after, ok := bytes.Cut(rest, []byte(" "))
		base, bits := 10, 32
		switch i {
		case 0:
			base = 16
		case 3:
			bits = 63
		}
		n, err := strconv.ParseUint(string(word), base, bits)
		if !ok || err != nil {
			return payload{}, damaged
		}
		numbers[i], rest = n, after
	}
	return payload{
		run:   uint32(numbers[0]),                                                    //nolint:gosec // parsed with 32 bits
		event: audit.Event{Publisher: uint32(numbers[1]), Count: uint32(numbers[2])}, //nolint:gosec // parsed with 32 bits
		sent:  time.Unix(0, int64(numbers[3])),                                       //nolint:gosec // parsed with 63 bits
	}, whole
}
