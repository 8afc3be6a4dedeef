// Package guildlog is the log that a guild is: numbered records, appended by one writer and
// read from any number that is still kept.
//
// Invariants:
//   - Numbers rise strictly; a record may leave numbers unused or reserve some behind its own, none is used
//     twice in a log.
//   - What Commit has returned for without an error is as durable as the log promises, and its records stay
//     readable until retention drops them. Nothing that reads shows it earlier. Retention drops the
//     oldest records only, so what is kept has no hole.
//   - A commit is all there or not at all.
//   - A log born anew has another ID.
package guildlog

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"guildhall.dev/guildhall/shardserver/snowflake"
)

// ID names a log. It is made at random at the log's birth, but for its first bit, which says that the
// log is on disk: of one in memory nobody asks where it has gone.
type ID [16]byte

// NewID makes the ID of a log, on disk or in memory.
func NewID(durable bool) (id ID) {
	rand.Read(id[:])
	id[0] &= 0x7f
	if durable {
		id[0] |= 0x80
	}
	return id
}

// ParseID reads what String writes.
func ParseID(s string) (id ID, err error) {
	if len(s) != 2*len(id) {
		err = hex.ErrLength
	} else {
		_, err = hex.Decode(id[:], []byte(s))
	}
	if err != nil {
		return ID{}, fmt.Errorf("guildlog: expected %d hexadecimal digits, got %q", 2*len(id), s)
	}
	return id, nil
}

// Durable says that the log is on disk.
func (id ID) Durable() bool { return id[0]&0x80 != 0 }

// String is the ID in hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// First is the least number that a record may have. READY of a session that starts from
// record S has number S-1, and client libraries need a number of at least 1 there.
const First = 2

// KeyLifetime is how long an idempotency key is found.
const KeyLifetime = 24 * time.Hour

// Errors of logs, for errors.Is.
var (
	// ErrDropped: a record that was asked for has been dropped by retention.
	ErrDropped = errors.New("guildlog: dropped by retention")
	// ErrFull: there is no room for more. Nothing was written.
	ErrFull = errors.New("guildlog: the disk is full")
	// ErrFailed: a write went wrong. What is on disk is not known, and nothing is written any more.
	ErrFailed = errors.New("guildlog: failed")
)

// Record is one dispatch of a guild.
type Record struct {
	// Seq is the record's number, "s" of the dispatch.
	Seq uint64
	// Time is when it was appended, in Unix milliseconds.
	Time int64
	// Type is the dispatch's event name, "t".
	Type string
	// Data is the dispatch's body, "d": a JSON object. It must not be changed.
	Data []byte
	// Reserved is how many numbers right behind Seq belong to the record, too: those of
	// dispatches that are derived from it.
	Reserved uint64
	// Users limits the record to those users' sessions; nil: all.
	Users []snowflake.ID
}

// End is the last of the record's numbers.
func (r *Record) End() uint64 { return r.Seq + r.Reserved }

// size is what a record counts for retention by bytes, with its index entry.
func (r *Record) size() int64 { return int64(len(r.Data)) + int64(8*len(r.Users)) + 64 }

// Retention bounds what a log keeps. Records go when either bound is passed, the newest record stays.
type Retention struct {
	Bytes int64
	Age   time.Duration
}

// Commit is what is written as one: all of it or nothing.
type Commit struct {
	// Records to append; their numbers follow the log's last one.
	Records []Record
	// Keys to remember from now on.
	Keys []Key
	// State is what changes of the guild's state, in this order.
	State []Row
}

// Key is an idempotency key, and what it was answered with.
type Key struct {
	// Name of the key, not empty; those of a guild are all different.
	Name string
	// Body is the hash of the request that came with the key.
	Body [32]byte
	// Numbers and Answer are the answer.
	Numbers []uint64
	Answer  []byte
}

// Row is a part of a guild's state. To the log both are mere bytes.
type Row struct {
	Key []byte
	// Value is nil for a row that goes.
	Value []byte
}

// Log is a guild's log.
type Log interface {
	// ID and Epoch name the log and count its owners, from 1.
	ID() ID
	Epoch() int64
	// Last is the last number of the newest record, 0 when there is none.
	Last() uint64
	// Resumable says whether every record after number seq is still kept.
	Resumable(seq uint64) bool
	// Room says whether there is room for a commit: it fails with ErrFull or ErrFailed.
	Room() error
	// Commit writes and returns when everything is durable. After ErrFailed what is on disk is not
	// known; after any other error nothing was written.
	Commit(Commit) error
	// Find looks an idempotency key up. It is found for KeyLifetime, in memory perhaps for less.
	Find(name string) (k Key, found bool, err error)
	// State calls each with the rows of the state that are kept, and returns the number that they are
	// as of: the records behind it have yet to be applied. Key and value are only good during the call.
	State(each func(key, value []byte) error) (seq uint64, err error)
	// Read returns up to limit records that end above number seq, oldest first, or ErrDropped.
	Read(seq uint64, limit int) ([]Record, error)
	// Retain sets the retention.
	Retain(Retention)
}

func checkOrder(last uint64, records []Record) error {
	for i := range records {
		if records[i].Seq <= last || records[i].Seq < First {
			return fmt.Errorf("guildlog: number %d does not follow %d", records[i].Seq, last)
		}
		last = records[i].End()
	}
	return nil
}
