// Package store keeps the logs of one shard's guilds on disk: one Pebble database in one directory,
// with one writer.
//
// What a caller can rely on:
//   - What a write has returned for without an error is on disk, and was on disk before anything
//     here showed it: Read, Last, Find and State know nothing that a power cut could take back.
//   - A write is all there or not at all, after any crash: records, idempotency keys and state rows
//     of one Commit, the identity and first records of a birth.
//   - A log has no hole. Each record holds the end of the one before it, and Read follows that chain
//     from the number that it was asked for to the last one it returns.
//   - A directory that lacks a log never starts one by itself: only Birth and Rebirth make logs.
//
// What happens when something is wrong:
//
//	a crash, a power cut    writes that had not returned are there whole or not at all; the last bytes
//	                        of the write-ahead log may be torn, and are cut off by Open
//	another process         Open fails with ErrLocked
//	a newer format          Open fails with ErrNewer
//	a damaged file          Open fails with ErrCorrupt, which names the file: write-ahead logs and the manifest
//	                        have to be readable as far as they were synced. Only where a power cut came
//	                        before, damage to what was written last can look like what that has torn
//	a damaged table         is found when that part is read, and fails with ErrCorrupt: the opening of the log,
//	                        or Read. Background work that comes upon it rests for a minute before it tries
//	                        again; where writes wait for it for two, they fail with guildlog.ErrFailed
//	a log that disagrees    Log fails with ErrCorrupt when head, newest and oldest record do not agree
//	the wrong disk          Log fails with ErrLogMissing
//	a read-only directory   Open fails with the system's error
//	a failed write or sync  the write returns guildlog.ErrFailed, and so does every later one: what is on disk is
//	                        not known any more, and only the next Open finds out. Failed tells it at once; the
//	                        process is to end without answering. Writes under way may never return, and
//	                        Pebble may end the process itself
//	a disk without room     Open fails with ErrFull when less than 64 MiB, the reserve, or a sixteenth of it is free
//	a full disk             with less than Options.Reserve free, Room fails with guildlog.ErrFull before anything is
//	                        written; reading goes on, and so does retention, which makes room again
//	a slow disk             writes wait; Stats counts writes that take longer than 5 s
package store

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
	dto "github.com/prometheus/client_model/go"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// Errors of the store, for errors.Is, besides guildlog's.
var (
	// ErrLocked: another process, or another Store of this one, has the directory open.
	ErrLocked = errors.New("store: the directory is in use")
	// ErrNewer: the directory was written by a newer version of this program.
	ErrNewer = errors.New("store: written by a newer version")
	// ErrCorrupt: what is on disk cannot be what was written.
	ErrCorrupt = errors.New("store: corrupt")
	// ErrLogMissing: the directory does not have the log.
	ErrLogMissing = errors.New("store: no such log")
	// ErrLogExists: the guild has a log.
	ErrLogExists = errors.New("store: the guild has a log")
	// ErrClosed: the store was closed. Nothing was written.
	ErrClosed = errors.New("store: closed")
)

const (
	// DefaultReserve is how much of the disk is kept free; of a small one, no more than a part of reservePart.
	DefaultReserve = 256 << 20
	reservePart    = 8
	// DefaultCache is the memory for blocks read from disk.
	DefaultCache = 32 << 20
	// memtable bounds what Open has to replay, and with it how long it takes.
	memtable = 16 << 20
	// openRoom is what Open needs to be free: what it replays it writes to tables, and Pebble tries that without end.
	openRoom = 4 * memtable
)

// Options of a store. The zero value is good but for Retention.
type Options struct {
	// Retention of logs until their Retain is called.
	Retention guildlog.Retention
	// Reserve, in bytes, is how much of the disk is kept free: Room fails below it, writes fail
	// below half of it. 0: DefaultReserve. Without a say of the file system nothing is ever full.
	Reserve uint64
	// Cache, in bytes, is the memory for blocks read from disk. 0: DefaultCache.
	Cache int64
	// FS is the file system; that of the operating system when nil.
	FS vfs.FS
	// Now is the clock for age and idempotency keys, time.Now when nil. It need not be right: the
	// order of a log does not depend on it, and keys do not come back when it is set back.
	Now func() time.Time
	// Logger is told of what Pebble does; slog.Default when nil.
	Logger *slog.Logger
}

// Owner is the Guild object that a log belongs to.
type Owner struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
}

// Identity says whose log it is, and who may append to it: the owner of Epoch.
type Identity struct {
	Owner
	Guild snowflake.ID
	Log   guildlog.ID
	Epoch int64
	// Instead is the log that was given up for this one; zero: none.
	Instead guildlog.ID
}

// Store is the open directory of a shard. Its methods may be called by several goroutines.
//
// Invariants:
//   - identities is what the disk has.
//   - A guild has at most one Log here, so that there is one writer for each.
//   - Once failed is closed, no write succeeds.
type Store struct {
	db   *pebble.DB
	lock *pebble.Lock
	fs   vfs.FS
	dir  string
	o    Options

	// life is held for reading while db is used, so that Close waits.
	life   sync.RWMutex
	closed bool

	mu         sync.Mutex
	identities map[snowflake.ID]Identity
	logs       map[snowflake.ID]*Log

	failOnce sync.Once
	failed   chan struct{}
	failure  error // set before failed is closed

	synced *synced
	// promised is the sequence number of Pebble's before which everything is on disk.
	promised atomic.Uint64

	commits, records, slow atomic.Uint64
	background             *background
	trouble                atomic.Pointer[error] // the last of what is done in the background
}

// Open opens the store in a directory, or makes one there. It reads the inventory, but no logs.
func Open(dir string, o Options) (*Store, error) {
	if o.Reserve == 0 {
		o.Reserve = DefaultReserve
	}
	if o.Cache == 0 {
		o.Cache = DefaultCache
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	s := &Store{
		fs: o.FS, dir: dir, o: o, failed: make(chan struct{}), background: newBackground(),
		identities: map[snowflake.ID]Identity{}, logs: map[snowflake.ID]*Log{},
	}
	if s.fs == nil {
		s.fs = vfs.Default
	}
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("opening the store in %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) open() (err error) {
	if err := s.fs.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if s.lock, err = pebble.LockDirectory(s.dir, s.fs); err != nil {
		if file := (*fs.PathError)(nil); errors.As(err, &file) {
			return err
		}
		return fmt.Errorf("%w: %w", ErrLocked, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.lock.Close())
		}
	}()
	if err := s.room(min(openRoom, s.o.Reserve), 2*reservePart); err != nil {
		return err
	}
	s.synced = &synced{fs: s.fs, dir: s.dir}
	if err := s.synced.check(); err != nil {
		return err
	}
	existed := s.synced.exists()
	if err := s.synced.open(); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.synced.close())
		}
	}()
	cache := pebble.NewCache(s.o.Cache)
	defer cache.Unref()
	o := &pebble.Options{
		FS: s.synced.fileSystem(), Lock: s.lock, Logger: (*logger)(s), EventListener: s.listener(), Cache: cache,
		// Its log says which bytes were synced, so that damage can be told from a torn end.
		FormatMajorVersion: pebble.FormatValueSeparation,
		MemTableSize:       memtable,
		// The space of what retention and Delete remove is to come back although nothing more is written.
		FlushDelayDeleteRange: 10 * time.Second,
	}
	for i := range o.Levels {
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10) // keys are mostly looked up in vain
	}
	o.Experimental.CompactionScheduler = s.background
	if s.o.FS == nil {
		o.WithFSDefaults() // tells of slow writes
	}
	if s.db, err = pebble.Open(s.dir, o); err != nil {
		return classify(err)
	}
	if err = s.load(existed); err != nil {
		return errors.Join(err, s.closeDB())
	}
	return nil
}

// load reads the format's version and the inventory. A directory that did not have the file SYNCED gets it,
// unless it once had.
func (s *Store) load(existed bool) error {
	if err := s.iterate(inventory, func(key, value []byte) error {
		guild, ok := identityGuild(key)
		var r identityRecord
		if err := json.Unmarshal(value, &r); err != nil || !ok || len(r.Log) != len(guildlog.ID{}) {
			return fmt.Errorf("%w: identity %x is %q", ErrCorrupt, key, value)
		}
		s.identities[guild] = r.identity(guild)
		return nil
	}); err != nil {
		return err
	}
	version, hasVersion, err := s.setting(formatKey)
	switch {
	case err != nil:
		return err
	case version > formatVersion:
		return fmt.Errorf("%w: format %d, this one knows formats up to %d", ErrNewer, version, formatVersion)
	case !hasVersion && len(s.identities) > 0:
		return fmt.Errorf("%w: there are logs, but no format version", ErrCorrupt)
	}
	_, hadSynced, err := s.setting(syncedKey)
	switch {
	case err != nil:
		return err
	case hadSynced && !existed:
		return fmt.Errorf("%w: there is no %s any more, so that nobody knows what is missing", ErrCorrupt, s.synced.path())
	case hadSynced && hasVersion:
		return nil
	}
	if !existed {
		if err := s.synced.create(); err != nil {
			return classify(err)
		}
	}
	b := s.newBatch()
	if !hasVersion {
		set(b, formatKey, encodeFixed(uint32(formatVersion)))
	}
	set(b, syncedKey, encodeFixed(uint32(1)))
	return s.apply(b, pebble.Sync)
}

// setting reads one of the numbers about the whole directory.
func (s *Store) setting(key []byte) (n uint32, found bool, err error) {
	value, closer, err := s.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, classify(err)
	}
	defer closer.Close()
	if err := decodeFixed(value, &n); err != nil {
		return 0, false, fmt.Errorf("%w: setting %q: %w", ErrCorrupt, key, err)
	}
	return n, true, nil
}

// Close closes the store when nobody uses it any more. After a failure there is nothing that could be
// closed in order, and Close returns it.
func (s *Store) Close() error {
	if err := s.Err(); err != nil {
		return err
	}
	s.life.Lock()
	defer s.life.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	return errors.Join(s.closeDB(), s.synced.close(), s.lock.Close())
}

func (s *Store) closeDB() error {
	close(s.background.stop)
	return s.db.Close()
}

// enter is called before db is used; after nil, leave has to be called.
func (s *Store) enter() error {
	s.life.RLock()
	if s.closed {
		s.life.RUnlock()
		return ErrClosed
	}
	return nil
}

func (s *Store) leave() { s.life.RUnlock() }

// Inventory returns the identities of all logs, by guild id.
func (s *Store) Inventory() []Identity {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Values(s.identities), func(a, b Identity) int { return cmp.Compare(a.Guild, b.Guild) })
}

// Identity returns the identity of a guild's log, if there is one.
func (s *Store) Identity(guild snowflake.ID) (id Identity, found bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, found = s.identities[guild]
	return id, found
}

// Log opens the log of a guild, which must be the expected one; the zero ID expects any. It fails with
// ErrLogMissing, or with ErrCorrupt. A second call returns the same Log.
func (s *Store) Log(guild snowflake.ID, expected guildlog.ID) (*Log, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.identities[guild]
	switch {
	case !ok:
		return nil, fmt.Errorf("%w: %s has no log of guild %s", ErrLogMissing, s.dir, guild)
	case expected != guildlog.ID{} && expected != id.Log:
		return nil, fmt.Errorf("%w: %s has log %s of guild %s, expected %s", ErrLogMissing, s.dir, id.Log, guild, expected)
	}
	l := s.logs[guild]
	if l == nil {
		l = s.newLog(id)
		if err := l.load(); err != nil {
			return nil, fmt.Errorf("opening the log of guild %s: %w", guild, err)
		}
		s.logs[guild] = l
	}
	return l, nil
}

// Birth makes the log of a guild that has none, with a new ID and epoch 1, and its first records. It
// fails with ErrLogExists, guildlog.ErrFull or guildlog.ErrFailed.
func (s *Store) Birth(guild snowflake.ID, owner Owner, first guildlog.Commit) (*Log, error) {
	return s.birth(Identity{Owner: owner, Guild: guild}, first, false)
}

// Rebirth is Birth for a guild whose log instead is given up, wherever it is. A log of the guild that the
// directory has is forgotten in the same write: a Log of it fails with ErrLogMissing.
func (s *Store) Rebirth(guild snowflake.ID, owner Owner, instead guildlog.ID, first guildlog.Commit) (*Log, error) {
	return s.birth(Identity{Owner: owner, Guild: guild, Instead: instead}, first, true)
}

func (s *Store) birth(id Identity, first guildlog.Commit, again bool) (*Log, error) {
	guild := id.Guild
	if len(first.Records) == 0 {
		return nil, errors.New("store: a log is born with at least one record")
	}
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	_, exists := s.identities[guild]
	if exists && !again {
		return nil, fmt.Errorf("%w: guild %s", ErrLogExists, guild)
	}
	if err := s.room(s.o.Reserve, reservePart); err != nil {
		return nil, err
	}
	id.Log, id.Epoch = guildlog.NewID(true), 1
	l := s.newLog(id)
	b := s.newBatch()
	if exists {
		remove(b, guildSpan(guild))
	}
	set(b, identityKey(guild), id.encode())
	h := l.head
	if err := l.stage(b, &h, first); err != nil {
		return nil, err
	}
	s.end(guild)
	if err := s.apply(b, pebble.Sync); err != nil {
		return nil, err
	}
	l.publish(h)
	s.commits.Add(1)
	s.records.Add(uint64(len(first.Records)))
	l.drop()
	s.identities[guild], s.logs[guild] = id, l
	return l, nil
}

// Assign gives the log of a guild to another Guild object. It fails with ErrLogMissing or guildlog.ErrFailed.
func (s *Store) Assign(guild snowflake.ID, owner Owner) error {
	return s.change(guild, func(b *pebble.Batch, id Identity) {
		id.Owner = owner
		set(b, identityKey(guild), id.encode())
		s.identities[guild] = id
	})
}

// Delete erases a guild's log. It is gone when Delete returns; its space on disk comes back soon after.
// It fails with ErrLogMissing or guildlog.ErrFailed.
func (s *Store) Delete(guild snowflake.ID) error {
	return s.change(guild, func(b *pebble.Batch, _ Identity) {
		s.end(guild)
		remove(b, guildSpan(guild))
		unset(b, identityKey(guild))
		delete(s.identities, guild)
	})
}

func (s *Store) change(guild snowflake.ID, stage func(*pebble.Batch, Identity)) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.identities[guild]
	if !ok {
		return fmt.Errorf("%w: %s has no log of guild %s", ErrLogMissing, s.dir, guild)
	}
	b := s.newBatch()
	stage(b, id)
	return s.apply(b, pebble.Sync)
}

// end makes the open Log of a guild refuse everything. mu is held.
func (s *Store) end(guild snowflake.ID) {
	if l := s.logs[guild]; l != nil {
		l.end()
		delete(s.logs, guild)
	}
}

// Room says whether the store takes writes: guildlog.ErrFull when less than the reserve is free, guildlog.ErrFailed, or
// nil. Who has asked before it makes a write is not refused by the write: that has half of the reserve.
func (s *Store) Room() error {
	if err := s.Err(); err != nil {
		return err
	}
	return s.room(s.o.Reserve, reservePart)
}

// room says whether so much is free, or of a small disk so large a part of it.
func (s *Store) room(reserve, part uint64) error {
	usage, err := s.fs.GetDiskUsage(s.dir)
	if err == nil && usage.AvailBytes < keptFree(usage, reserve, part) {
		return fmt.Errorf("%w: %d bytes are free, %d are kept free", guildlog.ErrFull, usage.AvailBytes, keptFree(usage, reserve, part))
	}
	return nil
}

func keptFree(usage vfs.DiskUsage, reserve, part uint64) uint64 {
	if usage.TotalBytes > 0 {
		reserve = min(reserve, usage.TotalBytes/part)
	}
	return reserve
}

// Stats are the numbers of a store since it was opened.
type Stats struct {
	// Commits and Records written.
	Commits, Records uint64
	// Syncs of the write-ahead log: how many, how long they took in all, and how many took at most so
	// many seconds: what prometheus.NewConstHistogram takes.
	Syncs       uint64
	SyncSeconds float64
	SyncBuckets map[float64]uint64
	// SlowWrites counts writes to a file that took longer than 5 s.
	SlowWrites uint64
	// DiskUsed is the size of the store's files in bytes. DiskFree is what is left on the disk, 0 when
	// the file system does not say.
	DiskUsed, DiskFree uint64
	// Full: Room fails with guildlog.ErrFull.
	Full bool
	// Err is the failure that ended all writing. Background is the last error of work in the
	// background, which is tried again.
	Err, Background error
}

// Stats returns the numbers, or ErrClosed.
func (s *Store) Stats() (Stats, error) {
	if err := s.enter(); err != nil {
		return Stats{}, err
	}
	defer s.leave()
	st := Stats{
		Commits: s.commits.Load(), Records: s.records.Load(), SlowWrites: s.slow.Load(),
		SyncBuckets: map[float64]uint64{}, Err: s.Err(),
	}
	if err := s.trouble.Load(); err != nil {
		st.Background = *err
	}
	if usage, err := s.fs.GetDiskUsage(s.dir); err == nil {
		st.DiskFree, st.Full = usage.AvailBytes, usage.AvailBytes < keptFree(usage, s.o.Reserve, reservePart)
	}
	m := s.db.Metrics()
	st.DiskUsed = m.DiskSpaceUsage()
	var d dto.Metric
	if h := m.LogWriter.FsyncLatency; h != nil && h.Write(&d) == nil { // in nanoseconds
		st.Syncs, st.SyncSeconds = d.Histogram.GetSampleCount(), d.Histogram.GetSampleSum()/1e9
		for _, b := range d.Histogram.GetBucket() {
			st.SyncBuckets[b.GetUpperBound()/1e9] = b.GetCumulativeCount()
		}
	}
	return st, nil
}
