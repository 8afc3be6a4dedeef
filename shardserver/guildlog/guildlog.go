// Package guildlog is the log that a guild is: numbered records, appended by one writer and
// read from any number that is still kept.
//
// Invariants:
//   - Numbers rise strictly; a record may leave numbers unused or reserve some behind its own, none is used
//     twice in a log.
//   - A record that Append has returned for is as durable as the log promises, and stays
//     readable until retention drops it. Retention drops the oldest records only, so
//     what is kept has no hole.
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

// ID names a log. It is made at random at the log's birth.
type ID [16]byte

// NewID makes an ID.
func NewID() (id ID) {
	rand.Read(id[:])
	return id
}

// String is the ID in hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// First is the least number that a record may have. READY of a session that starts from
// record S has number S-1, and client libraries need a number of at least 1 there.
const First = 2

// ErrDropped: a record that was asked for has been dropped by retention.
var ErrDropped = errors.New("guildlog: dropped by retention")

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

// Log is a guild's log.
type Log interface {
	// ID and Epoch name the log and count its owners, from 1.
	ID() ID
	Epoch() int64
	// Last is the last number of the newest record, 0 when there is none.
	Last() uint64
	// Resumable says whether every record after number seq is still kept.
	Resumable(seq uint64) bool
	// Append adds records whose numbers follow Last and returns when they are durable. After an
	// error nothing may be appended any more: what is on disk is not known.
	Append(records []Record) error
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
