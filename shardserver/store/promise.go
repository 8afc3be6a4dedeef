package store

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	chunked "github.com/cockroachdb/pebble/v2/record"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Where the end of Pebble's newest write-ahead log or manifest is damaged or gone, what is left looks as if a power cut
// had torn it, and Pebble goes on with that. But what was acknowledged has to be there. So a file beside
// them has a promise. It is not synced itself: after the crash of a process it is the last one, after
// a power cut it may be an older one, which says less.
const (
	promiseFile = "SYNCED"
	promiseSize = 8 + 8 + 4 // with a checksum
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// promised is what a directory has to have.
type promised struct {
	// batches with sequence numbers of Pebble's below it were synced.
	batches uint64
	// logs with numbers below it were done with, by a manifest that was synced.
	logs uint64
}

// promise is the file.
type promise struct {
	mu   sync.Mutex
	file vfs.File // nil: not yet open
	promised
}

// readPromise reads the file of a directory; found is false when there is none.
func readPromise(disk vfs.FS, dir string) (p promised, found bool, err error) {
	name := disk.PathJoin(dir, promiseFile)
	f, err := disk.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return p, false, nil
	}
	if err != nil {
		return p, false, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, promiseSize+1))
	if err != nil {
		return p, false, err
	}
	if len(b) != promiseSize || crc32.Checksum(b[:16], castagnoli) != binary.LittleEndian.Uint32(b[16:]) {
		return p, false, fmt.Errorf("%w: %s is %x", ErrCorrupt, name, b)
	}
	return promised{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}, true, nil
}

// open opens the file, or makes one, and writes the promise from then on.
func (p *promise) open(disk vfs.FS, dir string, found bool) error {
	f, err := disk.OpenReadWrite(disk.PathJoin(dir, promiseFile), vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.file = f
	if err := p.write(); err != nil || found {
		return err
	}
	return errors.Join(f.Sync(), syncDir(disk, dir))
}

func (p *promise) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.file == nil {
		return nil
	}
	err := p.file.Close()
	p.file = nil
	return err
}

func syncDir(disk vfs.FS, dir string) error {
	d, err := disk.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// write writes the file. mu is held.
func (p *promise) write() error {
	if p.file == nil {
		return nil
	}
	b := binary.LittleEndian.AppendUint64(make([]byte, 0, promiseSize), p.batches)
	b = binary.LittleEndian.AppendUint64(b, p.logs)
	_, err := p.file.WriteAt(binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)), 0)
	return err
}

// synced notes that a batch, and so all before it, were synced.
func (p *promise) synced(b *pebble.Batch) error {
	end := uint64(b.SeqNum()) + uint64(b.Count())
	p.mu.Lock()
	defer p.mu.Unlock()
	if end <= p.batches {
		return nil
	}
	p.batches = end
	return p.write()
}

// doneWith notes that Pebble has removed a write-ahead log, or makes another one of it.
func (p *promise) doneWith(log uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if log >= p.logs {
		p.logs = log + 1
		_ = p.write() // the next one says so, too
	}
}

// next is the sequence number that the next batch gets.
func next(db *pebble.DB) (uint64, error) {
	b := db.NewBatch()
	// Something that is in the write-ahead log alone takes no number.
	err := errors.Join(b.LogData([]byte("opened"), nil), db.Apply(b, pebble.NoSync))
	n := uint64(b.SeqNum())
	return n, errors.Join(err, b.Close())
}

// checkManifest fails with ErrCorrupt where a manifest asks for a write-ahead log that it was done with.
func checkManifest(disk vfs.FS, manifest string, p promised) error {
	f, err := disk.Open(manifest, vfs.SequentialReadsOption)
	if err != nil {
		return classify(err)
	}
	defer f.Close()
	oldest, err := oldestLog(f)
	if err == nil && oldest < p.logs {
		err = fmt.Errorf("%w: the end of %s is damaged or gone: what can be read of it begins with %06d.log, and by %s it begins with %06d.log or a later one",
			ErrCorrupt, manifest, oldest, promiseFile, p.logs)
	}
	return err
}

// oldestLog is the number of the oldest write-ahead log that a manifest needs, by its last edit that can be read; 0: none.
// An edit is a list of tags with what belongs to each; the log is among the first (Pebble's manifest.VersionEdit).
func oldestLog(manifest io.Reader) (oldest uint64, err error) {
	const tagComparator, tagLog, tagNextFile, tagLastSequence, tagPreviousLog = 1, 2, 3, 4, 9
	edits := chunked.NewReader(manifest, 0)
	for {
		edit, err := edits.Next()
		if errors.Is(err, io.EOF) || chunked.IsInvalidRecord(err) {
			return oldest, nil
		}
		if err != nil {
			return 0, err
		}
		r := bufio.NewReader(edit)
	tags:
		for {
			tag, err := binary.ReadUvarint(r)
			if err != nil {
				break
			}
			value, err := binary.ReadUvarint(r)
			if err != nil {
				break
			}
			switch tag {
			case tagLog:
				oldest = value
			case tagNextFile, tagLastSequence, tagPreviousLog:
			case tagComparator: // value is the length of its name
				if _, err := r.Discard(int(min(value, 1<<10))); err != nil { //nolint:gosec // small
					break tags
				}
			default:
				break tags
			}
		}
	}
}
