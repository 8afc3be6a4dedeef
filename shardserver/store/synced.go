package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/wal"
)

// syncedName is the file that says how much of others is on disk: how many bytes of the manifest and of the
// newest write-ahead logs were synced. What these lack of it is damage, and no write that a crash has torn.
//
// It is written after each sync of one of them, before anybody is told of that, and is itself not synced until
// the end: it survives the process, and a power cut may leave an older one, which says less and nothing wrong.
// Two slots are written in turn, so that one of them is whole.
const (
	syncedName = "SYNCED"
	// syncedSlot is how far apart the slots are: a page, so that one write to the disk does not tear both.
	syncedSlot = 4096
	// syncedLogs is how many logs a slot has room for; Pebble has fewer that are not in tables yet.
	syncedLogs = 24
)

// extent is how many bytes of a file were synced.
type extent struct{ Number, Bytes uint64 }

// slot is what SYNCED says: its checksum and this.
type slot struct {
	Count    uint64 // of writes; the slot with the greater one counts
	Manifest extent
	Logs     [syncedLogs]extent // by number, unused ones first
}

// synced is the file while the store is open.
//
// Invariant: what slot says is true of the disk, for logs as long as the manifest needs them.
type synced struct {
	fs  vfs.FS
	dir string

	mu   sync.Mutex
	file vfs.File // nil: not made yet
	slot slot
	next extent // of a manifest that does not count yet
	buf  []byte
}

func (s *synced) path() string { return s.fs.PathJoin(s.dir, syncedName) }

// read reads the file, if there is one.
func (s *synced) read() error {
	f, err := s.fs.Open(s.path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	data, err := io.ReadAll(io.LimitReader(f, 2*syncedSlot))
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	for at := 0; at < len(data); at += syncedSlot {
		var found slot
		size := 4 + binary.Size(found)
		if len(data) < at+size {
			break
		}
		body := data[at+4 : at+size]
		if binary.BigEndian.Uint32(data[at:]) == crc32.Checksum(body, castagnoli) && decodeFixed(body, &found) == nil && found.Count > s.slot.Count {
			s.slot = found
		}
	}
	if s.slot.Count == 0 {
		return fmt.Errorf("%w: %s cannot be read: %d bytes, and neither half is whole", ErrCorrupt, s.path(), len(data))
	}
	return nil
}

// exists says whether the directory has the file.
func (s *synced) exists() bool { return s.slot.Count > 0 }

// open opens the file for writing, if there is one.
func (s *synced) open() (err error) {
	if s.exists() {
		s.file, err = s.fs.OpenReadWrite(s.path(), vfs.WriteCategoryUnspecified)
	}
	return err
}

// create makes the file.
func (s *synced) create() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	temporary := s.path() + ".new"
	f, err := s.fs.Create(temporary, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	s.slot.Count++
	data := append(s.encode(), make([]byte, 2*syncedSlot-len(s.buf))...)
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := s.fs.Rename(temporary, s.path()); err != nil {
		return err
	}
	dir, err := s.fs.OpenDir(s.dir)
	if err != nil {
		return err
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return err
	}
	return s.open()
}

// close syncs and closes the file.
func (s *synced) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return nil
	}
	err := errors.Join(s.file.Sync(), s.file.Close())
	s.file = nil
	return err
}

func (s *synced) encode() []byte {
	b := binary.BigEndian.AppendUint32(s.buf[:0], 0)
	b = binary.BigEndian.AppendUint64(b, s.slot.Count)
	b = binary.BigEndian.AppendUint64(b, s.slot.Manifest.Number)
	b = binary.BigEndian.AppendUint64(b, s.slot.Manifest.Bytes)
	for _, log := range s.slot.Logs {
		b = binary.BigEndian.AppendUint64(b, log.Number)
		b = binary.BigEndian.AppendUint64(b, log.Bytes)
	}
	binary.BigEndian.PutUint32(b, crc32.Checksum(b[4:], castagnoli))
	s.buf = b
	return b
}

// write writes the next slot. mu is held.
func (s *synced) write() error {
	if s.file == nil {
		return nil
	}
	s.slot.Count++
	_, err := s.file.WriteAt(s.encode(), int64(1-s.slot.Count%2)*syncedSlot)
	return err
}

// log notes what was synced of a log.
func (s *synced) log(of extent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	logs := s.slot.Logs[:]
	i := slices.IndexFunc(logs, func(e extent) bool { return e.Number == of.Number })
	if i < 0 { // a new one is the newest; the oldest, or an unused one, goes
		copy(logs, logs[1:])
		i = len(logs) - 1
	}
	logs[i] = of
	return s.write()
}

// manifest notes what was synced of a manifest. A new one does not count before current says so.
func (s *synced) manifest(of extent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if of.Number != s.slot.Manifest.Number {
		s.next = of
		return nil
	}
	s.slot.Manifest = of
	return s.write()
}

// current notes that a manifest counts from now on.
func (s *synced) current(number uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next.Number != number {
		return nil
	}
	s.slot.Manifest = s.next
	return s.write()
}

// fileSystem is that of the store, with files that tell synced of their syncs.
func (s *synced) fileSystem() vfs.FS { return &syncedFS{s.fs, s} }

type syncedFS struct {
	vfs.FS
	synced *synced
}

func (s *syncedFS) Unwrap() vfs.FS { return s.FS }

func (s *syncedFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.Create(name, category)
	return s.synced.follow(name, f), err
}

func (s *syncedFS) ReuseForWrite(old, name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.ReuseForWrite(old, name, category)
	return s.synced.follow(name, f), err
}

// follow returns f, the file of that name, which is written from its beginning.
func (s *synced) follow(name string, f vfs.File) vfs.File {
	if f == nil {
		return f
	}
	name = s.fs.PathBase(name)
	if number, _, ok := wal.ParseLogFilename(name); ok {
		return &syncedFile{File: f, note: s.log, extent: extent{Number: uint64(number)}}
	}
	if number, ok := manifestNumber(name); ok {
		return &syncedFile{File: f, note: s.manifest, extent: extent{Number: number}}
	}
	return f
}

func manifestNumber(name string) (uint64, bool) {
	digits, ok := strings.CutPrefix(name, "MANIFEST-")
	number, err := strconv.ParseUint(digits, 10, 64)
	return number, ok && err == nil
}

// syncedFile notes each of its syncs. As of any file, there is one call of Write or Sync at a time.
type syncedFile struct {
	vfs.File
	note   func(extent) error
	extent extent
}

func (f *syncedFile) Write(b []byte) (int, error) {
	n, err := f.File.Write(b)
	f.extent.Bytes += uint64(n) //nolint:gosec // not negative
	return n, err
}

func (f *syncedFile) Sync() error {
	if err := f.File.Sync(); err != nil {
		return err
	}
	return f.note(f.extent)
}

func (f *syncedFile) SyncData() error {
	if err := f.File.SyncData(); err != nil {
		return err
	}
	return f.note(f.extent)
}

// check fails with ErrCorrupt when a directory that was not opened yet lacks what was synced.
func (s *synced) check() error {
	if err := s.read(); err != nil {
		return err
	}
	d, err := pebble.Peek(s.dir, s.fs)
	if err != nil {
		return classify(err)
	}
	names, err := s.fs.List(s.dir)
	if err != nil {
		return err
	}
	var unflushed uint64
	if d.Exists {
		if unflushed, err = s.checkManifest(d.ManifestFilename); err != nil {
			return fmt.Errorf("%w: %s", err, d.ManifestFilename)
		}
	} else if i := slices.IndexFunc(names, func(name string) bool {
		return name == syncedName || strings.HasSuffix(name, ".sst")
	}); i >= 0 { // Pebble would start afresh and remove the tables
		return fmt.Errorf("%w: there is %s, but no marker.manifest", ErrCorrupt, s.fs.PathJoin(s.dir, names[i]))
	}
	logs := map[uint64]string{}
	newest := uint64(0)
	for _, name := range names {
		if number, _, ok := wal.ParseLogFilename(name); ok {
			logs[uint64(number)] = s.fs.PathJoin(s.dir, name)
			newest = max(newest, uint64(number))
		}
	}
	listed := slices.DeleteFunc(slices.Clone(s.slot.Logs[:]), func(e extent) bool { return e.Number < max(unflushed, 1) })
	if newest > 0 && !slices.ContainsFunc(listed, func(e extent) bool { return e.Number == newest }) {
		listed = append(listed, extent{Number: newest})
	}
	for _, log := range listed {
		name, ok := logs[log.Number]
		if !ok {
			return fmt.Errorf("%w: there is no %s, of which %d bytes were synced", ErrCorrupt,
				s.fs.PathJoin(s.dir, fmt.Sprintf("%06d.log", log.Number)), log.Bytes)
		}
		if err := s.scan(name, func(r io.Reader) error { return scanLog(r, log) }); err != nil {
			return fmt.Errorf("%w: %s", err, name)
		}
	}
	return nil
}

func (s *synced) scan(name string, check func(io.Reader) error) error {
	f, err := s.fs.Open(name, vfs.SequentialReadsOption)
	if err != nil {
		return classify(err)
	}
	return errors.Join(check(f), f.Close())
}

// checkManifest checks the manifest that counts, and returns the number of the first log that it needs.
func (s *synced) checkManifest(name string) (unflushed uint64, err error) {
	number, ok := manifestNumber(s.fs.PathBase(name))
	before := s.slot.Manifest
	if !ok || number < before.Number {
		return 0, fmt.Errorf("%w: the marker names a manifest that is older than MANIFEST-%06d, which counted", ErrCorrupt, before.Number)
	}
	least := uint64(0)
	if number == before.Number {
		least = before.Bytes
	}
	err = s.scan(name, func(r io.Reader) error {
		unflushed, err = scanManifest(r, least)
		return err
	})
	return unflushed, err
}
