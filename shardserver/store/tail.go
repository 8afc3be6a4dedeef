package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"guildhall.dev/guildhall/shardserver/guildlog"
)

// Damage at the end of the newest write-ahead log, and anywhere in the manifest, looks like writes that a power cut
// has torn, and Pebble cuts off what follows. But what had been synced is damage, and then there is more missing
// than a power cut takes: numbers would be given a second time. Before Pebble opens the directory, both are
// read and compared with what is known to have been synced. The file SYNCED tells that. Should it be older than
// the log, after a power cut, then there is what follows the damage: each batch begins with a promise, the
// sequence number up to which all batches had been synced when it was made, and each record of the manifest is
// synced before the next one is written.
//
// Pebble's format (package record): blocks of 32 KiB, in them chunks with a header of
//
//	checksum 4, length of the payload 2, type 1
//
// in logs followed by
//
//	log number 4
//
// and, but for the first log of all, by
//
//	synced offset 8
//
// and a payload that is a record, or the first, a middle or the last part of one; zeros where a header has no
// room at the end of a block. A record of a log is a batch, which begins with
//
//	sequence number 8, count 4, kind of the first entry 1, its length 1, the promise 8
//
// One of the manifest is a list of fields, of which the first ones are the name of the order of keys, sometimes, and
// the number of the first log that is not in tables yet, unless that has not changed.
const (
	blockSize      = 32 << 10
	manifestHeader = 7
	logHeader      = manifestHeader + 4
	syncedHeader   = logHeader + 8
	// Types of chunks; those of logs are so much greater, without and with the synced offset.
	chunkFull, chunkFirst, chunkMiddle, chunkLast = 1, 2, 3, 4
	chunkLog, chunkSynced                         = 4, 8
	// trailerType is that of what ends a log that was closed: a header with no checksum and the next log's number.
	trailerType = chunkLog + chunkFull
	promiseSize = 8 + 4 + 1 + 1 + 8
	// logData is the kind of entry that is in the log alone.
	logData = 3
	// Fields of the manifest, and how much of a record is kept for them.
	fieldOrder, fieldLog, fieldsSize = 1, 2, 128
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// newBatch makes a batch that begins with the promise.
func (s *Store) newBatch() *pebble.Batch {
	b := s.db.NewBatch()
	must(b.LogData(binary.LittleEndian.AppendUint64(nil, s.promised.Load()), nil))
	return b
}

// promise notes that a batch, and so all before it, were synced.
func (s *Store) promise(b *pebble.Batch) {
	end := uint64(b.SeqNum()) + uint64(b.Count())
	for synced := s.promised.Load(); end > synced && !s.promised.CompareAndSwap(synced, end); {
		synced = s.promised.Load()
	}
}

// scanLog fails with ErrCorrupt when a write-ahead log lacks what was synced.
func scanLog(r io.Reader, log extent) error {
	var (
		end     uint64 // sequence number behind the last whole batch before damage
		partial uint64 // the same of the batch that is being read
	)
	return scan(r, logHeader, log, func(c chunk, damage uint64, damaged bool) error {
		promised := uint64(0)
		if (c.kind == chunkFull || c.kind == chunkFirst) && len(c.payload) >= promiseSize {
			partial = binary.LittleEndian.Uint64(c.payload) + uint64(binary.LittleEndian.Uint32(c.payload[8:]))
			if c.payload[12] == logData && c.payload[13] == 8 {
				promised = binary.LittleEndian.Uint64(c.payload[14:])
			}
		}
		switch {
		case damaged && (c.synced > damage || end > 0 && promised > end):
			return lost(damage)
		case !damaged && (c.kind == chunkFull || c.kind == chunkLast):
			end = partial
		}
		return nil
	})
}

// scanManifest returns the number of the first log that is not in tables yet. It fails with ErrCorrupt when the
// manifest lacks what was synced, which are at least so many bytes.
func scanManifest(r io.Reader, synced uint64) (unflushed uint64, err error) {
	var fields []byte
	return unflushed, scan(r, manifestHeader, extent{Bytes: synced}, func(c chunk, damage uint64, damaged bool) error {
		begins, ends := c.kind == chunkFull || c.kind == chunkFirst, c.kind == chunkFull || c.kind == chunkLast
		if damaged {
			if begins { // parts of a record that is torn do not say so
				return lost(damage)
			}
			return nil
		}
		if begins {
			fields = fields[:0]
		}
		fields = append(fields, c.payload[:min(len(c.payload), fieldsSize-len(fields))]...)
		if ends {
			d := guildlog.Decoder{Rest: fields}
			field := d.Uvarint()
			if field == fieldOrder {
				d.Bytes(d.Uvarint())
				field = d.Uvarint()
			}
			if number := d.Uvarint(); field == fieldLog && d.Err == nil {
				unflushed = number
			}
		}
		return nil
	})
}

func lost(damage uint64) error {
	return fmt.Errorf("%w: byte %d and what follows was synced and cannot be read", ErrCorrupt, damage)
}

// chunk is one of a log or a manifest.
type chunk struct {
	kind    byte
	synced  uint64 // in logs: the offset up to which it was synced when the chunk was made
	payload []byte
}

// scan calls each with all chunks of a file, also with those behind damage, which begins at a byte. It fails
// with ErrCorrupt when that is before the end of what was synced.
func scan(r io.Reader, header int, synced extent, each func(c chunk, damage uint64, damaged bool) error) error {
	var (
		buf     [blockSize]byte
		start   uint64 // offset of buf in the file
		end     uint64 // where damage begins, or else the next chunk
		damaged bool
	)
	room := header // what is left of a block that gets no further chunk
	if header == logHeader {
		room = syncedHeader
	}
	for n := blockSize; n == blockSize; start += uint64(n) { //nolint:gosec // not negative
		var err error
		if n, err = io.ReadFull(r, buf[:]); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			return err
		}
		for i := 0; i < n; {
			rest := buf[i:n]
			c, size := readChunk(rest, header, synced.Number)
			ended := !damaged && header != manifestHeader && isTrailer(rest, synced.Number)
			switch {
			case ended:
				size = logHeader
			case n == blockSize && len(rest) < room && isZero(rest):
				size = len(rest)
			case size == 0: // a chunk may begin at any byte
				damaged, size = true, 1
			default:
				if err := each(c, end, damaged); err != nil {
					return err
				}
			}
			i += size
			if !damaged {
				end = start + uint64(i) //nolint:gosec // not negative
			}
			if end < synced.Bytes && (damaged || ended) {
				return lost(end)
			}
			if ended {
				return nil
			}
		}
	}
	if end < synced.Bytes {
		return lost(end)
	}
	return nil
}

// readChunk reads the chunk that b begins with; size is 0 if there is none of that log.
func readChunk(b []byte, header int, log uint64) (c chunk, size int) {
	if len(b) < header {
		return c, 0
	}
	c.kind = b[6]
	if header != manifestHeader {
		if c.kind > chunkSynced {
			c.kind -= chunkSynced - chunkLog
			header = syncedHeader
		}
		c.kind -= chunkLog
		if len(b) < header || binary.LittleEndian.Uint32(b[7:]) != uint32(log) { //nolint:gosec // so is the one in the file
			return c, 0
		}
	}
	size = header + int(binary.LittleEndian.Uint16(b[4:]))
	if c.kind < chunkFull || c.kind > chunkLast || size > len(b) {
		return c, 0
	}
	sum := crc32.Checksum(b[6:size], castagnoli)
	if (sum>>15|sum<<17)+0xa282ead8 != binary.LittleEndian.Uint32(b) {
		return c, 0
	}
	if header == syncedHeader {
		c.synced = binary.LittleEndian.Uint64(b[logHeader:])
	}
	c.payload = b[header:size]
	return c, size
}

func isTrailer(b []byte, log uint64) bool {
	return len(b) >= logHeader && isZero(b[:6]) && b[6] == trailerType && binary.LittleEndian.Uint32(b[7:]) == uint32(log)+1 //nolint:gosec // as above
}

func isZero(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) }
