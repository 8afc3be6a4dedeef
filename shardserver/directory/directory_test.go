package directory

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newDirectory(t *testing.T) *Directory {
	t.Helper()
	core := fanout.New(fanout.Options{Workers: 1})
	d := New(Options{
		ShardName: "a", ShardUID: "uid-a", Version: "test", Core: core, Logger: slog.New(slog.DiscardHandler),
		PodAddress:   func(shard string) string { return "pod-of-" + shard },
		RelayAddress: func(snowflake.ID) string { return "relays" },
		Load:         func() report.Load { return report.Load{CPUMilli: 7} },
	})
	t.Cleanup(func() {
		d.Stop()
		core.Stop()
	})
	return d
}

func idOf(n int) snowflake.ID { return snowflake.ID(1100000000000000000 + uint64(n)) }

// object is Guild n, placed on a shard unless that is empty.
func object(n int, shard string) *v1.Guild {
	g := &v1.Guild{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("hall-", n), Namespace: "ns", UID: types.UID(fmt.Sprint("uid-", n))}}
	g.Status.ID = idOf(n).String()
	if shard != "" {
		g.Status.Placement = &v1.GuildPlacementStatus{ShardName: shard, ShardUID: "uid-" + shard}
	}
	return g
}

func deleted(g *v1.Guild) *v1.Guild {
	g.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	return g
}

// where says where guild 1 is: "here", the address of a pod, "known" or "unknown".
func where(d *Directory) string {
	place, _ := d.Find(idOf(1))
	switch {
	case place.Guild != nil:
		return "here"
	case place.Remote != "":
		return place.Remote
	case place.Object != nil:
		return "known"
	}
	return "unknown"
}

func TestApply(t *testing.T) {
	otherUID := object(1, "a")
	otherUID.Status.Placement.ShardUID = "uid-of-another-a"
	lost := object(1, "")
	lost.Status = v1.GuildStatus{}
	broken := object(1, "a")
	broken.Status.ID = "x"
	recreated := object(1, "a")
	recreated.UID = "uid-1-again"
	for name, test := range map[string]struct {
		states []*v1.Guild
		want   string
	}{
		"not placed yet":                        {[]*v1.Guild{object(1, "")}, "unknown"},
		"placed here":                           {[]*v1.Guild{object(1, "a")}, "here"},
		"placed here later":                     {[]*v1.Guild{object(1, ""), object(1, "a")}, "here"},
		"placed elsewhere":                      {[]*v1.Guild{object(1, "b")}, "pod-of-b"},
		"moved away":                            {[]*v1.Guild{object(1, "a"), object(1, "b")}, "pod-of-b"},
		"moved here":                            {[]*v1.Guild{object(1, "b"), object(1, "a")}, "here"},
		"placed on a former shard of this name": {[]*v1.Guild{otherUID}, "known"},
		"deleted":                               {[]*v1.Guild{object(1, "a"), deleted(object(1, "a"))}, "unknown"},
		"deleted elsewhere":                     {[]*v1.Guild{object(1, "b"), deleted(object(1, "b"))}, "unknown"},
		"deleted before it was seen":            {[]*v1.Guild{deleted(object(1, "a"))}, "unknown"},
		"deleted, without its status":           {[]*v1.Guild{object(1, "a"), deleted(object(1, ""))}, "unknown"},
		"its status was lost":                   {[]*v1.Guild{object(1, "a"), lost}, "here"},
		"its status was lost, elsewhere":        {[]*v1.Guild{object(1, "b"), lost}, "pod-of-b"},
		"its status was lost, and it moved":     {[]*v1.Guild{object(1, "a"), lost, object(1, "b")}, "pod-of-b"},
		"its id is none":                        {[]*v1.Guild{broken}, "unknown"},
		"its id is none now":                    {[]*v1.Guild{object(1, "a"), broken}, "here"},
		"made anew while the old one goes":      {[]*v1.Guild{object(1, "a"), recreated, deleted(object(1, "a"))}, "here"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirectory(t)
			for _, state := range test.states {
				d.Apply(state.DeepCopy())
			}
			if got := where(d); got != test.want {
				t.Errorf("%s, expected %s", got, test.want)
			}
			if guilds := d.Holding(); (guilds > 0) != (test.want == "here") {
				t.Errorf("holds %d guilds", guilds)
			}
			if len(test.states) > 1 && test.want == "here" && test.states[0].Status.Placement != nil && test.states[0].Status.Placement.ShardName == "a" {
				place, _ := d.Find(idOf(1))
				if place.Guild.Counts().LastSeq == 0 {
					t.Error("an empty log")
				}
			}
		})
	}
}

func TestRelays(t *testing.T) {
	d := newDirectory(t)
	for _, shard := range []string{"a", "b"} {
		for mode, want := range map[v1.GuildMode]string{v1.GuildDirect: "", v1.GuildRelayed: "relays", "": ""} {
			g := object(1, shard)
			g.Status.Mode = mode
			_, changed := d.Find(idOf(1))
			before, _ := d.Find(idOf(1))
			d.Apply(g)
			place, _ := d.Find(idOf(1))
			if place.Relays != want || place.Guild != nil != (shard == "a") || place.Remote != "" != (shard == "b") {
				t.Errorf("on %s, %s: %+v", shard, mode, place)
			}
			select {
			case <-changed:
			default:
				if before.Relays != place.Relays {
					t.Errorf("on %s, %s: not told", shard, mode)
				}
			}
		}
	}
}

func TestAGuildThatStaysKeepsItsLog(t *testing.T) {
	d := newDirectory(t)
	d.Apply(object(1, "a"))
	before, _ := d.Find(idOf(1))
	lost := object(1, "")
	lost.Status = v1.GuildStatus{}
	d.Apply(lost)
	d.Apply(object(1, "a"))
	if after, _ := d.Find(idOf(1)); after.Guild != before.Guild {
		t.Error("the guild was opened anew")
	}
}

func TestStoppedGuildsTakeNoCommands(t *testing.T) {
	for name, end := range map[string]func(d *Directory){
		"moved":   func(d *Directory) { d.Apply(object(1, "b")) },
		"deleted": func(d *Directory) { d.Apply(deleted(object(1, "a"))) },
		"stopped": func(d *Directory) { d.Stop() },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirectory(t)
			d.Apply(object(1, "a"))
			place, _ := d.Find(idOf(1))
			end(d)
			if _, err := place.Guild.Publish(context.Background(), "", []guild.Event{{Type: "X", Data: json.RawMessage(`{}`)}}); err != guild.ErrClosed {
				t.Error(err)
			}
			if name == "stopped" {
				d.Apply(object(1, "a"))
				d.Apply(object(2, "a"))
				if guilds := d.Holding(); guilds != 0 || !d.Stopped() {
					t.Error("a guild was opened behind the end")
				}
			}
		})
	}
}

func TestChangesOfTheSpec(t *testing.T) {
	d := newDirectory(t)
	g := object(1, "a")
	g.Spec.DisplayName = "first"
	d.Apply(g)
	place, _ := d.Find(idOf(1))
	name := func() string {
		var o struct{ Name string }
		if err := json.Unmarshal(place.Guild.Object(), &o); err != nil {
			t.Fatal(err)
		}
		return o.Name
	}
	if name() != "first" || place.Guild.Open() {
		t.Errorf("name %s, open %v", name(), place.Guild.Open())
	}
	for i := range 50 {
		g = g.DeepCopy()
		g.Spec.DisplayName, g.Spec.Access.Join = fmt.Sprint("name ", i), v1.JoinOpen
		d.Apply(g)
	}
	eventually(t, "the last name counts", func() bool { return name() == "name 49" })
	if !place.Guild.Open() {
		t.Error("not open")
	}
	// A name that the backend gives stays until the resource asks for another.
	if _, err := place.Guild.Publish(context.Background(), "", []guild.Event{{Type: "GUILD_UPDATE", Data: json.RawMessage(`{"name":"by the backend"}`)}}); err != nil {
		t.Fatal(err)
	}
	last := place.Guild.Counts().LastSeq
	for range 10 {
		d.Apply(g.DeepCopy())
	}
	if name() != "by the backend" || place.Guild.Counts().LastSeq != last {
		t.Errorf("name %q at %d, was at %d", name(), place.Guild.Counts().LastSeq, last)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not in time:", what)
		}
	}
}

func TestBootstrapChannels(t *testing.T) {
	d := newDirectory(t)
	g := object(1, "a")
	g.Spec.Bootstrap = &v1.GuildBootstrap{Channels: []v1.BootstrapChannel{
		{Name: "talk", Type: v1.ChannelVoice}, {Name: "all", Type: v1.ChannelCategory}, {Name: "text", Type: v1.ChannelText},
	}}
	d.Apply(g)
	place, _ := d.Find(idOf(1))
	var got []string
	for _, c := range place.Guild.Channels() {
		var o struct {
			Name string
			Type int
		}
		json.Unmarshal(c, &o)
		got = append(got, fmt.Sprint(o.Name, o.Type))
	}
	if strings.Join(got, " ") != "talk2 all4 text0" {
		t.Error(got)
	}
}

func TestChangedIsToldWhereItMatters(t *testing.T) {
	d := newDirectory(t)
	for _, step := range []struct {
		name  string
		apply func()
		told  bool
	}{
		{"a guild without a place", func() { d.Apply(object(1, "")) }, false},
		{"a place", func() { d.Apply(object(1, "b")) }, true},
		{"something else of it", func() { d.Apply(object(1, "b")) }, false},
		{"another place", func() { d.Apply(object(1, "a")) }, true},
		{"something else of a guild that is here", func() { d.Apply(object(1, "a")) }, false},
		{"the GuildShard", func() { d.ApplyShard(&v1.GuildShard{}) }, true},
		{"that everything is known", d.SetSynced, true},
		{"its deletion", func() { d.Apply(deleted(object(1, "a"))) }, true},
		{"its deletion again", func() { d.Apply(deleted(object(1, "a"))) }, false},
		{"the end", d.Stop, true},
	} {
		_, changed := d.Find(idOf(1))
		step.apply()
		told := false
		select {
		case <-changed:
			told = true
		default:
		}
		if told != step.told {
			t.Errorf("%s: told %v", step.name, told)
		}
	}
}

func TestFindWhileApplying(t *testing.T) {
	d := newDirectory(t)
	stop := make(chan struct{})
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if place, _ := d.Find(idOf(1)); place.Object != nil {
					_ = d.Addresses(place.Object).Gateway
				}
				d.Report("", 0)
				d.Holding()
				d.Reconnect()
			}
		})
	}
	for i := range 200 {
		switch i % 4 {
		case 0, 1:
			d.Apply(object(1, "a"))
		case 2:
			d.Apply(object(1, "b"))
		case 3:
			d.Apply(deleted(object(1, "a")))
		}
		d.ApplyShard(&v1.GuildShard{})
	}
	close(stop)
	group.Wait()
}

func TestReport(t *testing.T) {
	d := newDirectory(t)
	full := d.Report("", 0)
	if !full.Complete || full.BootID == "" || full.ShardName != "a" || full.ShardUID != "uid-a" || full.Version != "test" || full.Load.CPUMilli != 7 || full.Guilds == nil {
		t.Errorf("%+v", full)
	}
	d.Apply(object(1, "a"))
	d.Apply(object(2, "a"))
	d.Apply(object(3, "b")) // not ours
	d.Apply(object(4, ""))

	first := d.Report(full.BootID, full.Revision)
	if first.Complete || len(first.Guilds) != 2 || first.Guilds[0].UID != "uid-1" || first.Guilds[1].UID != "uid-2" {
		t.Fatalf("%+v", first)
	}
	if g := first.Guilds[0]; g.State != report.Serving || len(g.LogID) != 32 || g.Epoch != 1 || g.Namespace != "ns" || g.Name != "hall-1" || g.ID != idOf(1).String() || g.LastSeq < 2 {
		t.Errorf("%+v", g)
	}
	if again := d.Report(first.BootID, first.Revision); again.Complete || len(again.Guilds) != 0 || len(again.Gone) != 0 || again.Revision != first.Revision {
		t.Errorf("%+v", again)
	}

	place, _ := d.Find(idOf(1))
	if _, _, err := place.Guild.Join(context.Background(), guild.NewUser(200000000000000005, "x", false)); err != nil {
		t.Fatal(err)
	}
	d.Apply(deleted(object(2, "a")))
	second := d.Report(first.BootID, first.Revision)
	if len(second.Guilds) != 1 || second.Guilds[0].Members != 1 || strings.Join(second.Gone, " ") != "uid-2" {
		t.Errorf("%+v", second)
	}
	for name, of := range map[string]struct {
		boot  string
		since int64
	}{
		"another process": {"x", second.Revision}, "a number of the future": {second.BootID, second.Revision + 1},
	} {
		if r := d.Report(of.boot, of.since); !r.Complete || len(r.Guilds) != 1 || len(r.Gone) != 0 {
			t.Errorf("%s: %+v", name, r)
		}
	}
	d.Apply(object(1, "b"))
	if r := d.Report(second.BootID, second.Revision); strings.Join(r.Gone, " ") != "uid-1" {
		t.Errorf("%+v", r)
	}
}

func TestReportForgetsWhatIsLongGone(t *testing.T) {
	r := newReporter()
	r.update(map[string]report.Guild{})
	start := r.revision
	now := map[string]report.Guild{}
	for i := range maxGone + 10 {
		now[fmt.Sprint(i)] = report.Guild{UID: fmt.Sprint(i)}
	}
	r.update(now)
	r.update(map[string]report.Guild{})
	if len(r.gone) != maxGone || r.goneFrom <= start || r.goneFrom >= r.revision {
		t.Errorf("%d gone from %d, at %d", len(r.gone), r.goneFrom, r.revision)
	}
}
