package linkcert

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"
)

type world struct {
	t         *testing.T
	authority *Authority
	ca        []byte
}

func newWorld(t *testing.T) *world {
	pair, err := NewAuthority("ns", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a, err := ParseAuthority(pair)
	if err != nil {
		t.Fatal(err)
	}
	return &world{t, a, pair.Cert}
}

func (w *world) issue(dir string, id Identity, at time.Time) {
	w.t.Helper()
	p, err := w.authority.Issue(id, at)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := Write(dir, p, w.ca); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) files(id Identity, at time.Time) *Files {
	w.t.Helper()
	dir := w.t.TempDir()
	w.issue(dir, id, at)
	f, err := Load(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	return f
}

// meeting is how a handshake ended on either side, and who the client was to the server.
type meeting struct {
	peer           Identity
	client, server error
}

func meet(t *testing.T, client, server *tls.Config) (m meeting) {
	t.Helper()
	a, b := net.Pipe()
	deadline := time.Now().Add(20 * time.Second)
	a.SetDeadline(deadline)
	b.SetDeadline(deadline)
	served := make(chan meeting)
	go func() {
		var m meeting
		s := tls.Server(b, server)
		if m.server = s.Handshake(); m.server == nil {
			m.peer, m.server = PeerOf(s.ConnectionState())
			_, _ = s.Write([]byte{1})
		}
		b.Close()
		served <- m
	}()
	c := tls.Client(a, client)
	err := c.Handshake()
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 1)) // the server's verdict comes after the client's handshake
	}
	a.Close()
	m = <-served
	m.client = err
	return m
}

func TestWhoMayMeet(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	now := time.Now()
	shard, relay := Identity{Namespace: "ns", Shard: "a"}, Identity{Namespace: "ns", Guild: "1"}
	server := w.files(shard, now).Server()
	if m := meet(t, w.files(relay, now).Client(), server); m.client != nil || m.server != nil || m.peer != relay {
		t.Fatal(m)
	}
	for name, client := range map[string]*Files{
		"a shard":                      w.files(Identity{Namespace: "ns", Shard: "b"}, now),
		"a relay of another namespace": w.files(Identity{Namespace: "other", Guild: "1"}, now),
		"a relay of another authority": other.files(relay, now),
		"an expired relay":             w.files(relay, now.Add(-Lifetime-2*skew)),
	} {
		if m := meet(t, client.Client(), server); m.server == nil {
			t.Errorf("%s was let in", name)
		}
	}
	if m := meet(t, &tls.Config{InsecureSkipVerify: true}, server); m.server == nil {
		t.Error("a client without certificate was let in")
	}
	for name, not := range map[string]*Files{
		"a relay": w.files(relay, now), "a shard of another authority": other.files(shard, now),
		"a shard of another namespace": w.files(Identity{Namespace: "other", Shard: "a"}, now),
	} {
		if m := meet(t, w.files(relay, now).Client(), not.config(func(Identity, Identity) bool { return true })); m.client == nil {
			t.Errorf("%s was taken for the shard", name)
		}
	}
}

func TestRotationWithoutRestart(t *testing.T) {
	w := newWorld(t)
	now := time.Now()
	shard, relay := Identity{Namespace: "ns", Shard: "a"}, Identity{Namespace: "ns", Guild: "1"}
	f, client := w.files(shard, now), w.files(relay, now)
	config := f.Server()
	next := newWorld(t)
	both := append(append([]byte(nil), w.ca...), next.ca...)
	w.ca, next.ca = both, both
	w.issue(client.dir, relay, now)
	next.issue(f.dir, shard, now)
	if m := meet(t, client.Client(), config); m.client != nil || m.server != nil {
		t.Error(m)
	}
}

func TestDue(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	now := time.Now()
	id := Identity{Namespace: "ns", Shard: "a"}
	p, err := w.authority.Issue(id, now)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		pair Pair
		id   Identity
		by   *Authority
		at   time.Time
		want bool
	}{
		"new":                  {p, id, w.authority, now, false},
		"half its life":        {p, id, w.authority, now.Add(Lifetime / 2), false},
		"most of its life":     {p, id, w.authority, now.Add(Lifetime * 3 / 4), true},
		"of the future":        {p, id, w.authority, now.Add(-2 * skew), true},
		"of somebody else":     {p, Identity{Namespace: "ns", Guild: "1"}, w.authority, now, true},
		"of another authority": {p, id, other.authority, now, true},
		"broken":               {Pair{Cert: p.Cert}, id, w.authority, now, true},
		"whoever":              {p, Identity{}, nil, now, false},
	} {
		if got := Due(test.pair, test.id, test.by, test.at); got != test.want {
			t.Errorf("%s: due %v", name, got)
		}
	}
}

func TestBrokenFiles(t *testing.T) {
	if _, err := Load(t.TempDir()); err == nil {
		t.Error("an empty directory")
	}
	w := newWorld(t)
	dir := t.TempDir()
	p, err := w.authority.Issue(Identity{Namespace: "ns", Shard: "a"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, files := range map[string][2][]byte{"no authority": {p.Cert, nil}, "no certificate": {nil, w.ca}} {
		if err := Write(dir, Pair{files[0], p.Key}, files[1]); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); err == nil {
			t.Error(name)
		}
	}
}
