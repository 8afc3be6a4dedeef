package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// formatVersion counts changes of what is below, for the worse of older programs.
const formatVersion = 1

// The keys of the database. Numbers in keys have 8 bytes, most significant first, so that keys sort
// by them.
//
//	v                                  the format's version
//	s                                  there, if the directory has a file SYNCED; older programs do not care
//	i guild                            the identity, JSON
//	g guild h                          the head
//	g guild r number                   a record, by its own number
//	g guild b number                   the summary of a block of records, by the last number of the block
//	g guild k period name              an idempotency key, by the period of time that it came in
//	g guild s key                      a row of the guild's state
const (
	tableHead   = 'h'
	tableRecord = 'r'
	tableBlock  = 'b'
	tableKey    = 'k'
	tableState  = 's'
)

var (
	formatKey = []byte("v")
	syncedKey = []byte("s")
	inventory = span{[]byte("i"), []byte("j")}
)

// span is a range of keys: from its first one to before its last one.
type span struct{ from, to []byte }

func number(key []byte, n uint64) []byte { return binary.BigEndian.AppendUint64(key, n) }

func identityKey(guild snowflake.ID) []byte { return number([]byte("i"), uint64(guild)) }

func identityGuild(key []byte) (guild snowflake.ID, ok bool) {
	if len(key) != 9 {
		return 0, false
	}
	return snowflake.ID(binary.BigEndian.Uint64(key[1:])), true
}

func guildSpan(guild snowflake.ID) span {
	return span{number([]byte("g"), uint64(guild)), number([]byte("g"), uint64(guild)+1)}
}

// key is a key of a table of the log's guild.
func (l *Log) key(table byte) []byte {
	return append(number(append(make([]byte, 0, 32), 'g'), uint64(l.id.Guild)), table)
}

func (l *Log) numbered(table byte, n uint64) []byte { return number(l.key(table), n) }

// between is the span of a table's keys from number first to number last.
func (l *Log) between(table byte, first, last uint64) span {
	return span{l.numbered(table, first), l.numbered(table, last+1)}
}

// lastNumber is the number that a key ends with.
func lastNumber(key []byte) uint64 { return binary.BigEndian.Uint64(key[len(key)-8:]) }

// identityRecord is an Identity on disk. Steps of a hand-off will be further fields, with another
// format version.
type identityRecord struct {
	Owner
	Log     []byte `json:"log"`
	Epoch   int64  `json:"epoch"`
	Instead []byte `json:"instead,omitempty"`
}

func (r *identityRecord) identity(guild snowflake.ID) Identity {
	id := Identity{Owner: r.Owner, Guild: guild, Epoch: r.Epoch}
	copy(id.Log[:], r.Log)
	copy(id.Instead[:], r.Instead)
	return id
}

func (id *Identity) encode() []byte {
	r := identityRecord{Owner: id.Owner, Log: id.Log[:], Epoch: id.Epoch}
	if id.Instead != (guildlog.ID{}) {
		r.Instead = id.Instead[:]
	}
	value, err := json.Marshal(r)
	if err != nil {
		panic(err) // only for types that JSON does not know
	}
	return value
}

// head is what a log adds up to. It is written with every change of the log.
type head struct {
	// Log is the log's ID, as in its identity.
	Log guildlog.ID
	// Last is the last number of the newest record, Dropped that of the newest dropped one.
	Last, Dropped uint64
	// Bytes is the size of all records kept.
	Bytes int64
	// Newest is the block that the newest record belongs to, which has no summary of its own yet.
	Newest block
	// OldestTo is To of the oldest block that has a summary, if there is one.
	OldestTo int64
	// Clock is the latest time that was seen, in Unix milliseconds.
	Clock int64
}

// block is the summary of some records that follow each other. Retention drops whole blocks.
type block struct {
	// End is the last number of its last record.
	End uint64
	// Bytes is the size of its records.
	Bytes int64
	// From and To are the least and the greatest time of its records.
	From, To int64
}

func encodeFixed(v any) []byte {
	value, err := binary.Append(nil, binary.BigEndian, v)
	if err != nil {
		panic(err) // only for types without a fixed size
	}
	return value
}

func decodeFixed(value []byte, v any) error {
	if len(value) != binary.Size(v) {
		return fmt.Errorf("%d bytes, expected %d", len(value), binary.Size(v))
	}
	_, err := binary.Decode(value, binary.BigEndian, v)
	return err
}

func encodeKey(k *guildlog.Key, at int64) []byte {
	value := binary.AppendVarint(nil, at)
	value = append(value, k.Body[:]...)
	value = binary.AppendUvarint(value, uint64(len(k.Numbers)))
	last := uint64(0)
	for _, n := range k.Numbers { // mostly one after the other, and then a byte each
		value = binary.AppendVarint(value, int64(n-last))
		last = n
	}
	return append(value, k.Answer...)
}

func decodeKey(name string, value []byte) (k guildlog.Key, at int64, err error) {
	d := guildlog.Decoder{Rest: value}
	k.Name = name
	at = d.Varint()
	copy(k.Body[:], d.Bytes(uint64(len(k.Body))))
	if n := d.Uvarint(); n > 0 && n <= uint64(len(value)) {
		k.Numbers = make([]uint64, n)
		last := uint64(0)
		for i := range k.Numbers {
			last += uint64(d.Varint())
			k.Numbers[i] = last
		}
	}
	k.Answer = bytes.Clone(d.Rest)
	return k, at, d.Err
}

// Idempotency keys are stored by the period that they came in, so that all of a period are dropped
// with one range deletion.
const period = 8 * time.Hour

func periodOf(at int64) uint64 { return uint64(max(0, at)) / uint64(period.Milliseconds()) }

func (l *Log) idempotencyKey(period uint64, name string) []byte {
	return append(l.numbered(tableKey, period), name...)
}

// set, unset and remove stage a change of the database. On a batch that is not indexed, they cannot fail.
func set(b *pebble.Batch, key, value []byte) { must(b.Set(key, value, nil)) }

func unset(b *pebble.Batch, key []byte) { must(b.Delete(key, nil)) }

func remove(b *pebble.Batch, r span) { must(b.DeleteRange(r.from, r.to, nil)) }

func must(err error) {
	if err != nil {
		panic(err)
	}
}
