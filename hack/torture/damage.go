package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/hack/load/frame"
	"guildhall.dev/guildhall/shardserver/token"
)

// Fates of a damaged copy.
const (
	fateRefused  = "refused"  // the server did not start, or does not serve the guild
	fateReading  = "reading"  // it serves, but does not give the log to a session that asks for all of it
	fateHarmless = "harmless" // it serves the whole log
	fateHole     = "hole"     // it serves another log than there was: that must not be
	fateUnclear  = "unclear"  // it does not serve, and does not say why: nor must that
)

// errHole is fateHole, and says where; errUnclear is fateUnclear.
var (
	errHole    = errors.New("the server serves a log with a hole")
	errUnclear = errors.New("the server does not give a clear reason")
)

// damage starts the server on damaged copies of its directory.
func (t *tormentor) damage(ctx context.Context) error {
	t.load.Close()
	if err := t.shard.kill(); err != nil {
		return err
	}
	data := t.shard.data
	t.shard.data = filepath.Join(t.dir, "damaged")
	defer func() { t.shard.data = data }()
	t.report.Damaged = map[string]int{}
	var whole []dispatch
	for i := range t.damages + 1 {
		if err := errors.Join(os.RemoveAll(t.shard.data), os.CopyFS(t.shard.data, os.DirFS(data))); err != nil {
			return err
		}
		what := "nothing damaged"
		if i > 0 {
			var err error
			if what, err = t.spoil(t.shard.data); err != nil {
				return err
			}
			t.report.Damages++
		}
		fate, log, err := t.fate(ctx, whole)
		switch {
		case i > 0 && (errors.Is(err, errHole) || errors.Is(err, errUnclear)):
			fate = fateHole
			if errors.Is(err, errUnclear) {
				fate = fateUnclear
			}
			kept := fmt.Sprintf("%s-%d", t.shard.data, i)
			t.report.Problems = append(t.report.Problems, fmt.Sprintf("%s: %v (%s)", what, err, kept))
			if err := os.Rename(t.shard.data, kept); err != nil {
				return err
			}
		case err != nil:
			return fmt.Errorf("%s: %w", what, err)
		case i > 0:
		case fate != fateHarmless:
			return fmt.Errorf("%s, but the server is %s: %s", what, fate, t.shard.tail.text())
		default:
			whole = log
			if n := t.load.Acknowledged(); len(whole) < n {
				return fmt.Errorf("the log has %d records of %d that were acknowledged", len(whole), n)
			}
		}
		if i > 0 {
			t.report.Damaged[fate]++
			fmt.Fprintf(t.stderr, "%s: %s\n", what, fate)
		}
	}
	if n := t.report.Damaged[fateHole] + t.report.Damaged[fateUnclear]; n > 0 {
		return fmt.Errorf("%d of %d damaged copies are not handled by a rule", n, t.damages)
	}
	return nil
}

// fate starts the server, reads the log and compares it with the whole one, if that is known.
func (t *tormentor) fate(ctx context.Context, whole []dispatch) (fate string, log []dispatch, err error) {
	if err := t.shard.start(); err != nil {
		return "", nil, err
	}
	defer t.shard.gone()
	if _, err := t.shard.serving(ctx); err != nil {
		if _, ok := errors.AsType[*refusal](err); ok {
			if !t.shard.tail.says("corrupt") && !t.shard.tail.says("store: ") {
				return "", nil, fmt.Errorf("%w: %w", errUnclear, err)
			}
			return fateRefused, nil, nil
		}
		return "", nil, err
	}
	log, err = t.probe.read(ctx, t.shard.url())
	switch {
	case ctx.Err() != nil:
		return "", nil, context.Cause(ctx)
	case errors.Is(err, errNotResumed):
		// It has to have been the disk. What the server says of it can be on its way.
		for begun := time.Now(); !t.shard.tail.says("corrupt") && time.Since(begun) < 2*time.Second; {
			time.Sleep(5 * time.Millisecond)
		}
		if !t.shard.tail.says("corrupt") {
			return "", nil, fmt.Errorf("%w: %w; %s", errUnclear, err, t.shard.tail.text())
		}
		return fateReading, nil, nil
	case err != nil:
		return "", nil, err
	case whole != nil && !slices.Equal(log, whole):
		return "", nil, fmt.Errorf("%w: it has %d records of %d", errHole, len(log), len(whole))
	}
	return fateHarmless, log, nil
}

// fileKinds are the kinds of files that a store has: write-ahead logs, tables, what tells which tables there
// are, what tells which of these counts, settings, and what has to be there.
const fileKinds = "log,sst,MANIFEST,marker,OPTIONS,SYNCED"

// kindOf a file: MANIFEST-000017 and marker.manifest.000002.MANIFEST-000017 begin with it, 000016.sst ends with it.
func kindOf(name string) string {
	if ext := strings.TrimPrefix(filepath.Ext(name), "."); ext == "log" || ext == "sst" {
		return ext
	}
	return name[:strings.IndexAny(name+".", "-.")]
}

// spoil damages one file of a directory.
func (t *tormentor) spoil(dir string) (what string, err error) {
	kinds := map[string][]string{}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || entry.Name() == "LOCK" {
			return err
		}
		kind := kindOf(entry.Name())
		kinds[kind] = append(kinds[kind], path)
		return nil
	})
	if err != nil {
		return "", err
	}
	names := make([]string, 0, len(kinds))
	for kind := range strings.SplitSeq(t.damageTo, ",") {
		if kinds[kind] != nil {
			names = append(names, kind)
		}
	}
	if len(names) == 0 {
		return "", fmt.Errorf("--damage-to: no files of %s among %v", t.damageTo, slices.Sorted(maps.Keys(kinds)))
	}
	files := kinds[names[t.random.IntN(len(names))]]
	path := files[t.random.IntN(len(files))]
	name := filepath.Base(path)
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	if len(b) == 0 || t.random.IntN(5) == 0 {
		return "removed " + name, os.Remove(path)
	}
	at := t.random.IntN(len(b))
	switch t.random.IntN(3) {
	case 0:
		what = fmt.Sprintf("truncated %s at %d of %d", name, at, len(b))
		b = b[:at]
	case 1:
		what = fmt.Sprintf("changed byte %d of %d of %s", at, len(b), name)
		b[at] ^= byte(1 + t.random.IntN(255)) //nolint:gosec // small
	default:
		end := min(at+4096, len(b))
		what = fmt.Sprintf("zeroed bytes %d to %d of %d of %s", at, end, len(b), name)
		clear(b[at:end])
	}
	return what, os.WriteFile(path, b, 0o600)
}

// probe is a session from the log's beginning, with which all of the log can be read.
type probe struct {
	token, session string
	base           uint64
}

// dispatch is what of a dispatch is compared.
type dispatch struct {
	number uint64
	hash   uint64 // of type and body
}

var (
	errNotResumed = errors.New("the session is not resumed")
	seed          = maphash.MakeSeed()
)

const probeUser = 800000000000000000

// newProbe starts the session.
func newProbe(ctx context.Context, url, keysDir string) (*probe, error) {
	keys, err := token.LoadKeys(keysDir)
	if err != nil {
		return nil, err
	}
	p := &probe{}
	if p.token, err = keys.Issue(token.Claims{User: probeUser, Name: "probe"}); err != nil {
		return nil, err
	}
	const intents = 1<<0 | 1<<9 | 1<<15 // as the load's
	hello := map[string]any{"op": 2, "d": map[string]any{
		"token": p.token, "intents": intents, "properties": map[string]string{"os": "linux", "browser": "torture", "device": "torture"},
	}}
	err = p.connect(ctx, url, hello, func(f frame.Frame) (bool, error) {
		switch string(f.Type) {
		case "READY":
			var ready struct {
				SessionID string `json:"session_id"`
			}
			err := json.Unmarshal(f.Data, &ready)
			p.session = ready.SessionID
			return false, err
		case "GUILD_CREATE":
			p.base = f.S
			return true, nil
		}
		return false, nil
	})
	if err != nil {
		return nil, fmt.Errorf("starting a session: %w", err)
	}
	return p, nil
}

// read reads the log from the session's beginning. It fails with errNotResumed if the server does not let it.
func (p *probe) read(ctx context.Context, url string) (log []dispatch, err error) {
	resume := map[string]any{"op": 6, "d": map[string]any{"token": p.token, "session_id": p.session, "seq": p.base}}
	last := p.base
	err = p.connect(ctx, url, resume, func(f frame.Frame) (bool, error) {
		switch {
		case f.Op == 9:
			return false, errNotResumed
		case f.Op != 0:
			return false, nil
		case string(f.Type) == "RESUMED":
			return true, nil
		case f.S <= last:
			return false, fmt.Errorf("%w: number %d after %d", errHole, f.S, last)
		}
		last = f.S
		log = append(log, dispatch{f.S, maphash.Bytes(seed, f.Data) ^ maphash.Bytes(seed, f.Type)})
		return false, nil
	})
	if closed := (*websocket.CloseError)(nil); errors.As(err, &closed) {
		err = fmt.Errorf("%w: %w", errNotResumed, err)
	}
	return log, err
}

// connect makes a connection, sends the first message after HELLO, and calls receive with all that comes
// until that is done. The connection is cut then, so that the session stays.
func (p *probe) connect(ctx context.Context, url string, first any, receive func(frame.Frame) (done bool, err error)) error {
	conn, resp, err := websocket.DefaultDialer.DialContext(ctx, url+"?v=10&encoding=json", nil)
	if err != nil {
		return err
	}
	resp.Body.Close()
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	for {
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		_, b, err := conn.ReadMessage()
		if err != nil {
			return err
		}
		f, err := frame.Parse(b)
		if err != nil {
			return err
		}
		if f.Op == 10 {
			if err := conn.WriteJSON(first); err != nil {
				return err
			}
		}
		if done, err := receive(f); done || err != nil {
			return err
		}
	}
}
