package controllers

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/types"

	"guildhall.dev/guildhall/shardserver/report"
)

var (
	shardKey = types.NamespacedName{Namespace: "ns", Name: "shard-a"}
	shardA   = shardRef{"shard-a", "uid-a"}
)

func TestValidateReport(t *testing.T) {
	valid := func() *report.Report {
		return &report.Report{BootID: "b", ShardName: "shard-a", ShardUID: "uid-a", Guilds: []report.Guild{
			{UID: "u", Namespace: "ns", Name: "lobby", ID: guildID, LogID: "log", Epoch: 1},
		}}
	}
	for name, tc := range map[string]struct {
		change func(*report.Report)
		want   string
	}{
		"a good one":                             {func(*report.Report) {}, ""},
		"of a shard made anew":                   {func(r *report.Report) { r.ShardUID = "other" }, "not of"},
		"of another shard":                       {func(r *report.Report) { r.ShardName = "shard-b" }, "not of"},
		"without boot id":                        {func(r *report.Report) { r.BootID = "" }, "bootID"},
		"with a guild of another namespace":      {func(r *report.Report) { r.Guilds[0].Namespace = "theirs" }, "namespace"},
		"with a guild without uid":               {func(r *report.Report) { r.Guilds[0].UID = "" }, "uid"},
		"with an id that is none":                {func(r *report.Report) { r.Guilds[0].ID = "12" }, "snowflake"},
		"with a log id that no status can hold":  {func(r *report.Report) { r.Guilds[0].LogID = strings.Repeat("x", 65) }, "log"},
		"with more guilds than a shard can hold": {func(r *report.Report) { r.Guilds = make([]report.Guild, maxGuilds+1) }, "more than"},
		"with negative counts":                   {func(r *report.Report) { r.Guilds[0].Members = -1 }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := valid()
			tc.change(r)
			err := validateReport(r, "ns", shardA)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("the error is %v, want one with %q", err, tc.want)
			}
			if err == nil && r.Guilds[0].Members < 0 {
				t.Error("a negative count came through")
			}
		})
	}
}

func TestFetchIsBounded(t *testing.T) {
	for name, serve := range map[string]http.HandlerFunc{
		"a body without end": func(w http.ResponseWriter, _ *http.Request) {
			chunk := []byte(strings.Repeat(" ", 1<<20))
			for range 20 {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		},
		"an error":    func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusTeapot) },
		"a redirect":  func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
		"not a thing": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) },
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(serve)
			defer srv.Close()
			p := newPoller(nil, newInventory(), nil, func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, srv.Listener.Addr().String())
			})
			if _, err := p.fetch(t.Context(), shardKey, &target{shard: shardA, podIP: "10.0.0.1"}); err == nil {
				t.Error("it was taken for a report")
			}
		})
	}
}

func TestInventory(t *testing.T) {
	lobby := report.Guild{UID: "1", Namespace: "ns", Name: "lobby", ID: guildID, State: report.Serving, LogID: "l", Epoch: 1, Members: 1000}
	bar := report.Guild{UID: "2", Namespace: "ns", Name: "bar", ID: "223456789012345678", State: report.Opening}
	with := func(g report.Guild, change func(*report.Guild)) report.Guild { change(&g); return g }
	complete := func(boot string, guilds ...report.Guild) *report.Report {
		return &report.Report{BootID: boot, Revision: 5, Complete: true, Guilds: guilds}
	}
	for name, tc := range map[string]struct {
		before *report.Report
		report *report.Report
		want   []string // guilds with news
		held   []string
		news   news
	}{
		"the first report is news of all": {
			nil, complete("b", lobby, bar),
			[]string{"bar", "lobby"},
			[]string{"1", "2"},
			news{shard: true, process: true, identities: true},
		},
		"the same again is no news": {complete("b", lobby), complete("b", lobby), nil, []string{"1"}, news{}},
		"counts that rounding hides are no news": {
			complete("b", lobby),
			&report.Report{BootID: "b", Guilds: []report.Guild{with(lobby, func(g *report.Guild) { g.Members, g.LastSeq = 1003, 9 })}}, nil,
			[]string{"1"},
			news{},
		},
		"a change is news of that guild alone": {
			complete("b", lobby, bar),
			&report.Report{BootID: "b", Guilds: []report.Guild{with(bar, func(g *report.Guild) { g.State = report.Serving })}},
			[]string{"bar"},
			[]string{"1", "2"},
			news{},
		},
		"a dropped guild is gone": {
			complete("b", lobby, bar), &report.Report{BootID: "b", Gone: []string{"1"}},
			[]string{"lobby"},
			[]string{"2"},
			news{identities: true},
		},
		"a complete report drops what it lacks": {
			complete("b", lobby, bar), complete("b", bar),
			[]string{"lobby"},
			[]string{"2"},
			news{identities: true},
		},
		"another process starts afresh": {
			complete("b", lobby), complete("c"),
			[]string{"lobby"},
			nil,
			news{shard: true, process: true, identities: true},
		},
		"changes of another process are not mixed in": {complete("b", lobby), &report.Report{BootID: "c", Guilds: []report.Guild{bar}}, nil, []string{"1"}, news{}},
	} {
		t.Run(name, func(t *testing.T) {
			inv := newInventory()
			inv.listen(shardKey, shardA.uid, noon)
			if tc.before != nil {
				inv.take(shardKey, shardA.uid, tc.before, noon, noon)
			}
			n := inv.take(shardKey, shardA.uid, tc.report, noon, noon.Add(time.Second))
			var names, held []string
			for _, g := range n.guilds {
				names = append(names, g.Name)
			}
			slices.Sort(names)
			for uid := range inv.shards[shardKey].guilds {
				held = append(held, string(uid))
			}
			slices.Sort(held)
			n.guilds = nil
			if diff := cmp.Diff([][]string{tc.want, tc.held}, [][]string{names, held}); diff != "" {
				t.Errorf("news and inventory (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.news, n, cmp.AllowUnexported(news{})); diff != "" {
				t.Errorf("news (-want +got):\n%s", diff)
			}
		})
	}
}

func TestFreshness(t *testing.T) {
	inv := newInventory()
	at := func(s int) time.Time { return noon.Add(time.Duration(s) * time.Second) }
	inv.listen(shardKey, shardA.uid, noon)
	for _, tc := range []struct {
		second int
		heard  bool
		want   freshness
		told   int
	}{
		{second: 0, want: awaited},
		{second: 9, want: awaited},
		{second: 10, want: stale, told: 1},
		{second: 11, want: stale},
		{second: 12, heard: true, want: fresh},
		{second: 21, want: fresh},
		{second: 22, want: stale, told: 1},
	} {
		if tc.heard {
			if n := inv.take(shardKey, shardA.uid, &report.Report{BootID: "b", Complete: true}, at(tc.second), at(tc.second)); !n.process {
				t.Error("a shard that is heard again is no news")
			}
		}
		if got := inv.shard(shardKey, shardA.uid, at(tc.second)).freshness; got != tc.want {
			t.Errorf("after %d s it is %d, want %d", tc.second, got, tc.want)
		}
		if got := len(inv.aged(at(tc.second))); got != tc.told {
			t.Errorf("after %d s %d shards are told, want %d", tc.second, got, tc.told)
		}
	}
	if inv.shard(shardKey, "other", noon).complete {
		t.Error("a shard made anew inherits a record")
	}
}
