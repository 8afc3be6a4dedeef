package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/wal"
)

// Damage at the end of the newest write-ahead log looks like writes that a power cut has torn, and Pebble cuts
// both off. But what had been synced is damage, and then there is more missing than a power cut takes: numbers
// would be given a second time. So each batch begins with a promise, the sequence number up to which all
// batches had been synced when it was made, and before Pebble opens the directory, checkTail compares what
// can be read from the start of the newest log with the promises behind the place where that ends.
//
// Pebble's format (package record): blocks of 32 KiB, in them chunks with a header of
//
//	checksum 4, length of the payload 2, type 1, log number 4, synced offset 8
//
// and a payload that is a batch, or the first, a middle or the last part of one. A batch begins with
//
//	sequence number 8, count 4, kind of the first entry 1, its length 1, the promise 8
const (
	walBlock   = 32 << 10
	walHeader  = 19
	walPromise = 8 + 4 + 1 + 1 + 8
	// Types of chunks.
	walFull, walFirst, walLast = 9, 10, 12
	// walTrailer is the type of what ends a log that was closed, under the next log's number.
	walTrailer = 5
	// logData is the kind of entry that is in the log alone.
	logData = 3
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// newBatch makes a batch that begins with the promise.
func (s *Store) newBatch() *pebble.Batch {
	b := s.db.NewBatch()
	must(b.LogData(binary.LittleEndian.AppendUint64(nil, s.synced.Load()), nil))
	return b
}

// promise notes that a batch, and so all before it, were synced.
func (s *Store) promise(b *pebble.Batch) {
	end := uint64(b.SeqNum()) + uint64(b.Count())
	for synced := s.synced.Load(); end > synced && !s.synced.CompareAndSwap(synced, end); {
		synced = s.synced.Load()
	}
}

// checkTail fails with ErrCorrupt when the newest write-ahead log of a directory lacks what was synced.
func checkTail(fs vfs.FS, dir string) error {
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	name, newest := "", wal.NumWAL(0)
	for _, n := range names {
		if num, _, ok := wal.ParseLogFilename(n); ok && num >= newest {
			name, newest = n, num
		}
	}
	if name == "" {
		return nil
	}
	name = fs.PathJoin(dir, name)
	f, err := fs.Open(name, vfs.SequentialReadsOption)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := scanTail(f, uint32(newest)); err != nil {
		return fmt.Errorf("%w: %s", err, name)
	}
	return nil
}

func scanTail(r io.Reader, log uint32) error {
	var (
		buf     [walBlock]byte
		start   uint64 // offset of buf in the file
		end     uint64 // sequence number behind the last whole batch before damage
		partial uint64 // the same of the batch that is being read
		damage  uint64
		damaged bool
	)
	for {
		n, err := io.ReadFull(r, buf[:])
		if n == 0 && errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		for i := 0; i+walHeader <= n; {
			kind, synced, payload := chunk(buf[i:n], log)
			switch {
			case payload == nil && !damaged:
				if buf[i+6] == walTrailer && binary.LittleEndian.Uint32(buf[i+7:]) == log+1 {
					return nil
				}
				damaged, damage = true, start+uint64(i)
				continue
			case payload == nil: // a chunk may begin at any byte
				i++
				continue
			}
			i += walHeader + len(payload)
			promised := uint64(0)
			if (kind == walFull || kind == walFirst) && len(payload) >= walPromise {
				partial = binary.LittleEndian.Uint64(payload) + uint64(binary.LittleEndian.Uint32(payload[8:]))
				if payload[12] == logData && payload[13] == 8 {
					promised = binary.LittleEndian.Uint64(payload[14:])
				}
			}
			switch {
			case damaged && (synced > damage || end > 0 && promised > end):
				return fmt.Errorf("%w: byte %d and what follows was synced and cannot be read", ErrCorrupt, damage)
			case !damaged && (kind == walFull || kind == walLast):
				end = partial
			}
		}
		start += uint64(n)
	}
}

// chunk reads the chunk that b begins with; payload is nil if there is none of that log.
func chunk(b []byte, log uint32) (kind byte, synced uint64, payload []byte) {
	if len(b) < walHeader || b[6] < walFull || b[6] > walLast || binary.LittleEndian.Uint32(b[7:]) != log {
		return 0, 0, nil
	}
	end := walHeader + int(binary.LittleEndian.Uint16(b[4:]))
	if end > len(b) {
		return 0, 0, nil
	}
	sum := crc32.Checksum(b[6:end], castagnoli)
	if (sum>>15|sum<<17)+0xa282ead8 != binary.LittleEndian.Uint32(b) {
		return 0, 0, nil
	}
	return b[6], binary.LittleEndian.Uint64(b[11:]), b[walHeader:end]
}
