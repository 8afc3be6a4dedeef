package directory

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/store"
)

// shard is a shard server's directory on a disk, process after process.
type shard struct {
	*Directory
	t    *testing.T
	disk vfs.FS
	end  func()
}

func newShard(t *testing.T) *shard {
	s := &shard{t: t, disk: vfs.NewMem()}
	s.start()
	t.Cleanup(func() { s.end() })
	return s
}

func (s *shard) start() {
	logger := slog.New(slog.DiscardHandler)
	disk, err := store.Open("data", store.Options{
		FS: s.disk, Logger: logger, Retention: guildlog.Retention{Bytes: 1 << 10, Age: time.Hour}, // until the GuildShard's is known
	})
	if err != nil {
		s.t.Fatal(err)
	}
	core := fanout.New(fanout.Options{Workers: 1})
	s.Directory = New(Options{
		ShardName: "a", ShardUID: "uid-a", Core: core, Store: disk, Logger: logger,
		PodAddress: func(shard string) string { return "pod-of-" + shard },
		Load:       func() report.Load { return report.Load{} },
	})
	s.end = func() {
		s.Stop()
		core.Stop()
		if err := disk.Close(); err != nil {
			s.t.Error(err)
		}
	}
}

func (s *shard) restart() {
	s.end()
	s.start()
}

func (s *shard) publish(n int) {
	s.t.Helper()
	place, _ := s.Find(idOf(n))
	if place.Guild == nil {
		s.t.Fatalf("guild %d is not here: %+v", n, s.reported(n))
	}
	if _, err := place.Guild.Publish(context.Background(), "", []guild.Event{{Type: "X", Data: json.RawMessage(`{}`)}}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *shard) reported(n int) report.Guild {
	for _, g := range s.Report("", 0).Guilds {
		if g.ID == idOf(n).String() {
			return g
		}
	}
	return report.Guild{}
}

// known is Guild n as it is once its status has the log.
func (s *shard) known(n int) *v1.Guild {
	g := object(n, "a")
	r := s.reported(n)
	g.Status.Placement.LogID, g.Status.Placement.Epoch = r.LogID, r.Epoch
	return g
}

func TestALogOutlivesTheProcess(t *testing.T) {
	s := newShard(t)
	s.Apply(object(1, "a"))
	s.publish(1)
	before := s.reported(1)
	known := s.known(1)
	for name, g := range map[string]*v1.Guild{
		"with its status":               known,
		"before the status had the log": object(1, "a"),
		"made anew under another uid":   func() *v1.Guild { g := object(1, "a"); g.UID = "uid-1-again"; return g }(),
		"after a time with logs in memory": func() *v1.Guild {
			g := object(1, "a")
			g.Status.Placement.LogID = guildlog.NewID(false).String()
			return g
		}(),
	} {
		s.restart()
		if stored := s.reported(1); stored.State != report.Stored || stored.LogID != before.LogID || stored.Epoch != 1 {
			t.Errorf("%s: stored %+v", name, stored)
		}
		s.Apply(g)
		after := s.reported(1)
		if after.LogID != before.LogID || after.LastSeq != before.LastSeq || after.State != report.Serving || after.UID != string(g.UID) {
			t.Errorf("%s: %+v, before %+v", name, after, before)
		}
	}
	if r := s.Report("", 0); !r.Durable || r.DiskFull || len(r.Guilds) != 1 {
		t.Errorf("%+v", r)
	}
}

// TestRetentionOfTheGuildShard: it alone counts, also while a log is opened.
func TestRetentionOfTheGuildShard(t *testing.T) {
	s := newShard(t)
	s.Apply(object(1, "a"))
	for range 200 {
		s.publish(1)
	}
	s.restart()
	s.Apply(object(1, "a"))
	s.publish(1)
	log, err := s.o.Store.Log(idOf(1), guildlog.ID{})
	if err != nil || !log.Resumable(guildlog.First) {
		t.Errorf("what the retention keeps was dropped, %v", err)
	}
}

func TestAMissingLogIsNotBornAnew(t *testing.T) {
	s := newShard(t)
	g := object(1, "a")
	lost := guildlog.NewID(true)
	g.Status.Placement.LogID = lost.String()
	s.Apply(g)
	if r := s.reported(1); r.State != report.LogMissing || r.Message == "" || r.LogID != "" {
		t.Errorf("%+v", r)
	}
	s.restart()
	s.Apply(g)
	if r := s.reported(1); r.State != report.LogMissing {
		t.Errorf("after a restart: %+v", r)
	}
	for _, not := range []string{"", "true", guildlog.NewID(true).String()} {
		g = g.DeepCopy()
		g.Annotations = map[string]string{v1.AnnotationTakeOver: not}
		s.Apply(g)
		if r := s.reported(1); r.State != report.LogMissing {
			t.Errorf("given up by %q: %+v", not, r)
		}
	}
	g = g.DeepCopy()
	g.Annotations = map[string]string{v1.AnnotationTakeOver: lost.String()}
	s.Apply(g)
	born := s.reported(1)
	if born.State != report.Serving || born.LogID == lost.String() {
		t.Fatalf("%+v", born)
	}
	s.publish(1)
	s.restart() // the status still has the log that was given up
	s.Apply(g)
	if r := s.reported(1); r.LogID != born.LogID || r.LastSeq != born.LastSeq+1 {
		t.Errorf("given up twice: %+v, before %+v", r, born)
	}
}

func TestTakeOverOfALogThatIsThere(t *testing.T) {
	s := newShard(t)
	s.Apply(object(1, "a"))
	s.publish(1)
	g := s.known(1)
	s.restart()
	g.Annotations = map[string]string{v1.AnnotationTakeOver: g.Status.Placement.LogID}
	s.Apply(g)
	if r := s.reported(1); r.LogID == g.Status.Placement.LogID || r.LastSeq != guildlog.First {
		t.Errorf("%+v", r)
	}
}

func TestDeletion(t *testing.T) {
	for name, test := range map[string]struct {
		policy  v1.DeletionPolicy
		restart bool
		want    report.State
	}{
		"the log stays":                      {v1.DeletionRetain, false, report.Stored},
		"the log stays when nothing is said": {"", false, report.Stored},
		"the log is erased":                  {v1.DeletionDelete, false, ""},
		"the log is erased by a process that has not known the guild": {v1.DeletionDelete, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShard(t)
			s.Apply(object(1, "a"))
			s.Apply(object(2, "a"))
			if test.restart {
				s.restart()
			}
			g := object(1, "a")
			g.Spec.DeletionPolicy = test.policy
			s.Apply(deleted(g))
			if r := s.reported(1); r.State != test.want {
				t.Errorf("%+v", r)
			}
			s.restart()
			if r := s.reported(1); r.State != test.want {
				t.Errorf("after a restart: %+v", r)
			}
			if r := s.reported(2); r.State != report.Stored {
				t.Errorf("another guild: %+v", r)
			}
		})
	}
}

// TestOneGuildALog: while a Guild that was made anew is served, the one before it is not.
func TestOneGuildALog(t *testing.T) {
	s := newShard(t)
	s.Apply(object(1, "a"))
	before, _ := s.Find(idOf(1))
	again := object(1, "a")
	again.UID = "uid-1-again"
	s.Apply(again)
	s.publish(1)
	if _, err := before.Guild.Publish(context.Background(), "", []guild.Event{{Type: "X", Data: json.RawMessage(`{}`)}}); !errors.Is(err, guild.ErrClosed) {
		t.Errorf("the former one: %v", err)
	}
	s.Apply(deleted(object(1, "a")))
	s.publish(1)
}

func TestWrongStatus(t *testing.T) {
	s := newShard(t)
	g := object(1, "a")
	g.Status.Placement.LogID = "xyz"
	s.Apply(g)
	if r := s.reported(1); r.State != report.Failed || r.Message == "" {
		t.Errorf("%+v", r)
	}
}
