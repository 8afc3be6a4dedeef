package store

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/cockroachdb/pebble/v2"

	"guildhall.dev/guildhall/shardserver/guildlog"
)

// with calls use with an iterator over a range of keys.
func (s *Store) with(r span, use func(*pebble.Iterator) error) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: r.from, UpperBound: r.to})
	if err != nil {
		return classify(err)
	}
	if err := use(it); err != nil {
		return errors.Join(err, classify(it.Close()))
	}
	return classify(it.Close())
}

// iterate calls each with all keys of a range and their values, in order. Both are only good during the call.
func (s *Store) iterate(r span, each func(key, value []byte) error) error {
	return s.with(r, func(it *pebble.Iterator) error {
		for ok := it.First(); ok; ok = it.Next() {
			value, err := it.ValueAndErr()
			if err != nil {
				return classify(err)
			}
			if err := each(it.Key(), value); err != nil {
				return err
			}
		}
		return nil
	})
}

// apply writes a batch and closes it.
func (s *Store) apply(b *pebble.Batch, o *pebble.WriteOptions) (err error) {
	if err := s.Err(); err != nil {
		return err
	}
	defer func() {
		// Pebble panics when its log cannot be written. Its locks stay taken then, so that
		// other writes under way do not return; no later one comes that far.
		if r := recover(); r != nil {
			cause, ok := r.(error)
			if !ok {
				cause = fmt.Errorf("%v", r)
			}
			err = s.fail(cause)
		}
	}()
	if err := s.db.Apply(b, o); err != nil {
		return s.fail(err)
	}
	if err := s.Err(); err != nil {
		return err // a failed sync is no error of Apply: the logger is told
	}
	if o.Sync {
		s.promise(b)
	}
	return b.Close()
}

// fail makes all later writes fail and returns why they do.
func (s *Store) fail(cause error) error {
	s.failOnce.Do(func() {
		s.failure = fmt.Errorf("%w: %w", guildlog.ErrFailed, cause)
		close(s.failed)
		s.o.Logger.Error("the store failed, what is on disk is not known", "dir", s.dir, "error", cause)
	})
	return s.Err()
}

// Failed is closed when a write or sync has gone wrong. The process is to end then.
func (s *Store) Failed() <-chan struct{} { return s.failed }

// Err is the failure, which wraps guildlog.ErrFailed, or nil.
func (s *Store) Err() error {
	select {
	case <-s.failed:
		return s.failure
	default:
		return nil
	}
}

func (s *Store) listener() *pebble.EventListener {
	return &pebble.EventListener{
		BackgroundError: func(err error) {
			s.trouble.Store(&err)
			s.o.Logger.Error("the store's background work", "dir", s.dir, "error", err.Error())
			s.background.erred(err)
		},
		CompactionEnd: func(info pebble.CompactionInfo) { s.background.compacted(info.Err) },
		ManifestCreated: func(info pebble.ManifestCreateInfo) {
			if info.Err != nil {
				return
			}
			if err := s.synced.current(uint64(info.FileNum)); err != nil {
				s.fail(err) //nolint:errcheck // it is the error
			}
		},
		DataCorruption: func(info pebble.DataCorruptionInfo) {
			if s.background.tell(info.Path) {
				s.o.Logger.Error("the store is corrupt", "dir", s.dir, "file", info.Path, "error", info.Details.Error())
			}
		},
		DiskSlow: func(info pebble.DiskSlowInfo) {
			s.slow.Add(1)
			s.o.Logger.Warn("the disk is slow", "dir", s.dir, "detail", info.String())
		},
		WriteStallBegin: func(info pebble.WriteStallBeginInfo) {
			s.o.Logger.Warn("writes wait for the store's background work", "dir", s.dir, "reason", info.Reason)
			s.background.stalled(func(err error) {
				s.fail(err) //nolint:errcheck // it is the error
			})
		},
		WriteStallEnd: func() { s.background.resumed() },
	}
}

// logger is the store as Pebble's logger. To Pebble a call of Fatalf ends the process, and there is nothing
// else that tells of a failed sync.
type logger Store

func (l *logger) Infof(format string, args ...any) {
	l.o.Logger.Debug(fmt.Sprintf(format, args...), "dir", l.dir)
}

func (l *logger) Errorf(format string, args ...any) {
	l.o.Logger.Error(fmt.Sprintf(format, args...), "dir", l.dir)
}

func (l *logger) Fatalf(format string, args ...any) {
	cause := fmt.Errorf(format, args...)
	for _, a := range args {
		if err, ok := a.(error); ok {
			cause = err
		}
	}
	(*Store)(l).fail(cause) //nolint:errcheck // it is the error
}

// classify says what an error of Pebble means: one of the operating system is passed on, others are
// about what the files contain.
func classify(err error) error {
	if err == nil {
		return nil
	}
	// Some say in a detail which file they are about.
	for e := err; e != nil; e = errors.Unwrap(e) {
		if d, ok := e.(interface{ ErrorDetail() string }); ok {
			err = fmt.Errorf("%w (%s)", err, d.ErrorDetail())
			break
		}
	}
	var system syscall.Errno
	switch {
	case errors.As(err, &system) && system == syscall.ENOSPC:
		return fmt.Errorf("%w: %w", guildlog.ErrFull, err)
	case errors.As(err, &system) && system != syscall.ENOENT:
		return err
	case strings.Contains(err.Error(), "format major version"):
		return fmt.Errorf("%w: %w", ErrNewer, err)
	}
	return fmt.Errorf("%w: %w", ErrCorrupt, err)
}
