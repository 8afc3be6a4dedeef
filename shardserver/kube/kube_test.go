package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	v1 "guildhall.dev/guildhall/api/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// api is as much of a Kubernetes API as the feed needs: lists and watches.
type api struct {
	t *testing.T

	mu      sync.Mutex
	changed chan struct{}
	version int
	objects map[string]any // by resource and name
	events  []event
	lists   int
	broken  bool
}

type event struct {
	version  int
	resource string
	Type     string `json:"type"`
	Object   any    `json:"object"`
}

func newAPI(t *testing.T) *api {
	return &api{t: t, changed: make(chan struct{}), version: 1, objects: map[string]any{}}
}

// set makes or changes an object; nil deletes it.
func (a *api) set(resource, name string, object metav1.Object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	kind := "MODIFIED"
	old, known := a.objects[resource+"/"+name]
	if object == nil {
		delete(a.objects, resource+"/"+name)
		a.events = append(a.events, event{a.version, resource, "DELETED", old})
	} else {
		if !known {
			kind = "ADDED"
		}
		object.SetResourceVersion(strconv.Itoa(a.version))
		a.objects[resource+"/"+name] = object
		a.events = append(a.events, event{a.version, resource, kind, object})
	}
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *api) setBroken(broken bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.broken = broken
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resource, ok := strings.CutPrefix(r.URL.Path, "/apis/guildhall.dev/v1/namespaces/ns/")
	if !ok {
		a.t.Errorf("unexpected request %s", r.URL)
	}
	if selector := r.URL.Query().Get("fieldSelector"); (resource == "guildshards") != (selector == "metadata.name=a") {
		a.t.Errorf("%s with selector %q", resource, selector)
	}
	a.mu.Lock()
	broken := a.broken
	a.mu.Unlock()
	if broken {
		http.Error(w, "away", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if r.URL.Query().Get("watch") == "" {
		a.list(w, resource)
		return
	}
	if r.URL.Query().Get("sendInitialEvents") != "" { // as an older API server answers
		w.WriteHeader(http.StatusUnprocessableEntity)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`)
		return
	}
	a.watch(w, r, resource)
}

func (a *api) list(w http.ResponseWriter, resource string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lists++
	items := []any{}
	for key, o := range a.objects {
		if strings.HasPrefix(key, resource+"/") {
			items = append(items, o)
		}
	}
	kind := map[string]string{"guilds": "GuildList", "guildshards": "GuildShardList"}[resource]
	json.NewEncoder(w).Encode(map[string]any{
		"kind": kind, "apiVersion": "guildhall.dev/v1", "metadata": map[string]string{"resourceVersion": strconv.Itoa(a.version)}, "items": items,
	})
}

func (a *api) watch(w http.ResponseWriter, r *http.Request, resource string) {
	since, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	http.NewResponseController(w).Flush()
	for {
		a.mu.Lock()
		changed, broken := a.changed, a.broken
		for _, e := range a.events {
			if e.version > since && e.resource == resource {
				json.NewEncoder(w).Encode(e)
				since = e.version
			}
		}
		a.mu.Unlock()
		if broken {
			return
		}
		http.NewResponseController(w).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// target notes what it is told.
type target struct {
	mu   sync.Mutex
	told []string
	more chan struct{}
}

func (g *target) note(format string, args ...any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.told = append(g.told, fmt.Sprintf(format, args...))
	select {
	case g.more <- struct{}{}:
	default:
	}
}

func (g *target) ApplyShard(s *v1.GuildShard) {
	g.note("shard %s with %d", s.Name, s.Spec.Capacity.Sessions)
}

func (g *target) Apply(o *v1.Guild) {
	g.note("guild %s %q fields %d", o.UID, o.Spec.DisplayName, len(o.ManagedFields))
}
func (g *target) SetSynced() { g.note("synced") }

// expect waits until the target has been told this much, and nothing else.
func (g *target) expect(t *testing.T, want ...string) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		g.mu.Lock()
		told := strings.Join(g.told, "\n")
		n := len(g.told)
		g.mu.Unlock()
		if n >= len(want) {
			if told != strings.Join(want, "\n") {
				t.Fatalf("told\n%s\nexpected\n%s", told, strings.Join(want, "\n"))
			}
			g.mu.Lock()
			g.told = nil
			g.mu.Unlock()
			return
		}
		select {
		case <-g.more:
		case <-timeout:
			t.Fatalf("told only\n%s", told)
		}
	}
}

func guild(name, display string) *v1.Guild {
	g := &v1.Guild{TypeMeta: metav1.TypeMeta{Kind: "Guild", APIVersion: "guildhall.dev/v1"}}
	g.Name, g.Namespace, g.UID, g.Spec.DisplayName = name, "ns", types.UID("uid-"+name), display
	g.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "x"}}
	return g
}

func shard(sessions int32) *v1.GuildShard {
	s := &v1.GuildShard{TypeMeta: metav1.TypeMeta{Kind: "GuildShard", APIVersion: "guildhall.dev/v1"}}
	s.Name, s.Namespace, s.Spec.Capacity.Sessions = "a", "ns", sessions
	return s
}

// feed runs until the test ends.
func feed(t *testing.T, host string) *target {
	t.Helper()
	g := &target{more: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	transport := &http.Transport{}
	go func() {
		ended <- Feed(ctx, &rest.Config{Host: host, Transport: transport}, "ns", "a", g)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		transport.CloseIdleConnections()
	})
	return g
}

func TestFeed(t *testing.T) {
	a := newAPI(t)
	server := httptest.NewServer(a)
	t.Cleanup(server.Close) // when the feed has ended
	a.set("guildshards", "a", shard(1))
	a.set("guilds", "one", guild("one", "1"))
	g := feed(t, server.URL)
	g.expect(t, "shard a with 1", `guild uid-one "1" fields 0`, "synced")

	a.set("guilds", "two", guild("two", "2"))
	g.expect(t, `guild uid-two "2" fields 0`)
	a.set("guilds", "one", guild("one", "3"))
	g.expect(t, `guild uid-one "3" fields 0`)
	a.set("guildshards", "a", shard(2))
	g.expect(t, "shard a with 2")
	a.set("guilds", "one", nil) // says nothing
	a.set("guilds", "two", guild("two", "4"))
	g.expect(t, `guild uid-two "4" fields 0`)
}

func TestFeedWithoutAShard(t *testing.T) {
	a := newAPI(t)
	server := httptest.NewServer(a)
	t.Cleanup(server.Close) // when the feed has ended
	g := feed(t, server.URL)
	g.expect(t, "synced")
}

func TestFeedWhileTheAPIIsAway(t *testing.T) {
	t.Run("at the start, nobody listens", func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		g := feed(t, "http://"+ln.Addr().String())
		a := newAPI(t)
		a.set("guilds", "one", guild("one", "1"))
		if ln, err = net.Listen("tcp", ln.Addr().String()); err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: a}
		go server.Serve(ln)
		t.Cleanup(func() { server.Close() })
		g.expect(t, `guild uid-one "1" fields 0`, "synced")
	})
	t.Run("at the start, and later", func(t *testing.T) {
		a := newAPI(t)
		a.setBroken(true)
		server := httptest.NewServer(a)
		t.Cleanup(server.Close)
		g := feed(t, server.URL)
		a.set("guilds", "one", guild("one", "1"))
		a.setBroken(false)
		g.expect(t, `guild uid-one "1" fields 0`, "synced")
		a.setBroken(true)
		a.set("guilds", "one", nil)
		a.set("guilds", "two", guild("two", "2"))
		a.setBroken(false)
		g.expect(t, `guild uid-two "2" fields 0`) // and no second "synced"
	})
}

func TestFeedThatEndsWhileTheAPIIsAway(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	g := &target{more: make(chan struct{}, 1)}
	if err := Feed(ctx, &rest.Config{Host: "http://127.0.0.1:1"}, "ns", "a", g); err != nil || len(g.told) > 0 {
		t.Error(err, g.told)
	}
}

func TestAConfigThatCannotWork(t *testing.T) {
	config := &rest.Config{Host: "http://127.0.0.1:1", TLSClientConfig: rest.TLSClientConfig{CAFile: "nowhere"}}
	if err := Feed(context.Background(), config, "ns", "a", &target{}); err == nil {
		t.Error("no error")
	}
}
