package guildlog

import (
	"bytes"
	"encoding/binary"
	"errors"

	"guildhall.dev/guildhall/shardserver/snowflake"
)

// EncodeRecord writes a record, but for its number. prev is the end of the record before it, so that a reader
// knows whether one is missing.
func EncodeRecord(r *Record, prev uint64) []byte {
	value := make([]byte, 0, len(r.Data)+len(r.Type)+9*len(r.Users)+32)
	value = binary.AppendUvarint(value, r.Seq-prev)
	value = binary.AppendUvarint(value, r.Reserved)
	value = binary.AppendVarint(value, r.Time)
	value = binary.AppendUvarint(value, uint64(len(r.Type)))
	value = append(value, r.Type...)
	if r.Users == nil {
		value = append(value, 0)
	} else {
		value = binary.AppendUvarint(value, uint64(len(r.Users))+1)
		for _, u := range r.Users {
			value = binary.AppendUvarint(value, uint64(u))
		}
	}
	return append(value, r.Data...)
}

// DecodeRecord reads the record of number seq, and the end of the one before it; it does not keep value.
func DecodeRecord(seq uint64, value []byte) (r Record, prev uint64, err error) {
	d := Decoder{Rest: value}
	r.Seq, prev = seq, seq-d.Uvarint()
	r.Reserved = d.Uvarint()
	r.Time = d.Varint()
	r.Type = string(d.Bytes(d.Uvarint()))
	if n := d.Uvarint(); n > 0 && n <= uint64(len(value)) {
		r.Users = make([]snowflake.ID, n-1)
		for i := range r.Users {
			r.Users[i] = snowflake.ID(d.Uvarint())
		}
	}
	r.Data = bytes.Clone(d.Rest)
	if d.Err == nil && prev >= seq {
		d.Err = errors.New("a record before it that is none")
	}
	return r, prev, d.Err
}

// Decoder takes values from the front of Rest. After an error they are zero.
type Decoder struct {
	Rest []byte
	Err  error
}

var errShort = errors.New("too short")

// Uvarint takes a number.
func (d *Decoder) Uvarint() uint64 {
	v, n := binary.Uvarint(d.Rest)
	return v * d.skip(n)
}

// Varint takes a number with a sign.
func (d *Decoder) Varint() int64 {
	v, n := binary.Varint(d.Rest)
	return v * int64(d.skip(n))
}

// skip returns 1, or 0 after an error.
func (d *Decoder) skip(n int) uint64 {
	if n <= 0 || d.Err != nil {
		d.Err, d.Rest = errShort, nil
		return 0
	}
	d.Rest = d.Rest[n:]
	return 1
}

// Bytes takes n bytes, which are those of Rest.
func (d *Decoder) Bytes(n uint64) []byte {
	if n > uint64(len(d.Rest)) {
		d.Err, d.Rest = errShort, nil
		return nil
	}
	v := d.Rest[:n]
	d.Rest = d.Rest[n:]
	return v
}
