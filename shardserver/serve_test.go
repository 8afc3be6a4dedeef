package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/goleak"

	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/store"
	"guildhall.dev/guildhall/shardserver/token"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(failingDisk); dir != "" {
		serveOnFailingDisk(dir)
	}
	goleak.VerifyTestMain(m)
}

const (
	guildID  = "1100000000000000001"
	patience = 30 * time.Second
)

// running is a shard server that runs from a file.
type running struct {
	*server
	t      *testing.T
	client *http.Client
	stop   context.CancelFunc
	ended  chan error
}

func testConfig(t *testing.T, shard, id string) config {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "guild.yaml")
	manifest := fmt.Sprintf(`
apiVersion: guildhall.dev/v1
kind: GuildShard
metadata: {name: %s, namespace: ns}
---
apiVersion: guildhall.dev/v1
kind: Guild
metadata: {name: hall-%s, namespace: ns}
spec: {id: %q, access: {join: Open}}
`, shard, shard, id)
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	c := serverIn(dir)
	c.data = ""
	return c
}

// serverIn is the config of a server whose files are in a folder.
func serverIn(dir string) config {
	return config{
		file: filepath.Join(dir, "guild.yaml"), keysDir: filepath.Join(dir, "keys"), data: filepath.Join(dir, "data"),
		listen: "127.0.0.1:0", listenTLS: "127.0.0.1:0", adminListen: "127.0.0.1:0",
		resolvePod: func(string) string { return "127.0.0.1:1" }, logger: slog.New(slog.DiscardHandler),
	}
}

// start runs a server until the test ends.
func start(t *testing.T, c config) *running {
	t.Helper()
	s, err := newServer(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{server: s, t: t, client: &http.Client{Transport: &http.Transport{}}, stop: cancel, ended: make(chan error, 1)}
	go func() {
		r.ended <- s.run(ctx)
		close(r.ended)
	}()
	t.Cleanup(func() {
		cancel()
		r.client.CloseIdleConnections()
		select {
		case <-r.ended:
		case <-time.After(patience):
			t.Error("the server does not end")
		}
	})
	eventually(t, "the server is ready", func() bool { return r.server.ready() == nil })
	return r
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not in time:", what)
		}
	}
}

func (r *running) token(user int, publish bool) string {
	r.t.Helper()
	issued, err := r.keys.Load().Issue(token.Claims{User: snowflake.ID(200000000000000000 + uint64(user)), Name: fmt.Sprint("user", user), Publish: publish})
	if err != nil {
		r.t.Fatal(err)
	}
	return issued
}

func (r *running) address() string { return r.listeners.plain.Addr().String() }

func (r *running) get(url string) (int, string) {
	r.t.Helper()
	response, err := r.client.Get(url)
	if err != nil {
		r.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

func (r *running) admin(path string) (int, string) {
	r.t.Helper()
	return r.get("http://" + r.listeners.admin.Addr().String() + path)
}

// publish asks for events to be published.
func (r *running) publish(id, body string) (int, string, error) {
	r.t.Helper()
	return r.publishKey(id, "", body)
}

func (r *running) publishKey(id, key, body string) (int, string, error) {
	r.t.Helper()
	request, err := http.NewRequest(http.MethodPost, "http://"+r.address()+"/g/"+id+"/api/v10/guilds/"+id+"/events", strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bot "+r.token(999, true))
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
	}
	response, err := r.client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	return response.StatusCode, string(answer), err
}

func (r *running) dial(id string) *websocket.Conn {
	r.t.Helper()
	ws, response, err := websocket.DefaultDialer.Dial("ws://"+r.address()+"/g/"+id+"/?v=10&encoding=json", nil)
	if err != nil {
		r.t.Fatal(err)
	}
	response.Body.Close()
	r.t.Cleanup(func() { ws.Close() })
	return ws
}

type message struct {
	Op int             `json:"op"`
	T  string          `json:"t"`
	S  uint64          `json:"s"`
	D  json.RawMessage `json:"d"`
}

func receive(ws *websocket.Conn) (m message, err error) {
	ws.SetReadDeadline(time.Now().Add(patience))
	err = ws.ReadJSON(&m)
	return m, err
}

// expect takes messages, which must be those ops or events, and returns the last.
func expect(t *testing.T, ws *websocket.Conn, kinds ...any) (m message) {
	t.Helper()
	for _, kind := range kinds {
		var err error
		if m, err = receive(ws); err != nil {
			t.Fatalf("expected %v: %v", kind, err)
		}
		if m.Op != kind && m.T != kind {
			t.Fatalf("expected %v, got %+v", kind, m)
		}
	}
	return m
}

func identify(t *testing.T, ws *websocket.Conn, token string) {
	t.Helper()
	if err := ws.WriteJSON(map[string]any{"op": 2, "d": map[string]any{"token": token, "intents": protocol.IntentGuilds | protocol.IntentGuildMessages}}); err != nil {
		t.Fatal(err)
	}
}

// TestEndToEnd: many clients hear what a backend publishes, in order, and are let go in an
// orderly way as the process is told to end.
func TestEndToEnd(t *testing.T) {
	t.Parallel()
	r := start(t, testConfig(t, "a", guildID))
	const clients, events = 50, 40
	heard := make(chan struct{}, clients*events)
	var group sync.WaitGroup
	for i := range clients {
		ws := r.dial(guildID)
		expect(t, ws, protocol.OpHello)
		identify(t, ws, r.token(i, false))
		expect(t, ws, "READY", "GUILD_CREATE")
		group.Go(func() {
			var last uint64
			next, reconnect := 0, false
			for {
				m, err := receive(ws)
				switch {
				case err != nil:
					if !reconnect || next != events || !websocket.IsCloseError(err, protocol.CloseUnknownError) {
						t.Errorf("client %d ended after %d events, asked to reconnect: %v, with %v", i, next, reconnect, err)
					}
					return
				case m.Op == protocol.OpReconnect:
					reconnect = true
				case m.T == "MESSAGE_CREATE":
					if m.S <= last || !strings.Contains(string(m.D), fmt.Sprintf(`"n":%d,`, next)) && !strings.Contains(string(m.D), fmt.Sprintf(`"n":%d}`, next)) {
						t.Errorf("client %d: event %d is %s at %d", i, next, m.D, m.S)
					}
					last = m.S
					next++
					heard <- struct{}{}
				}
			}
		})
	}
	for n := range events {
		if status, answer, err := r.publish(guildID, fmt.Sprintf(`{"t":"MESSAGE_CREATE","d":{"n":%d}}`, n)); status != 200 {
			t.Fatal(status, answer, err)
		}
	}
	for range clients * events {
		<-heard
	}

	if status, body := r.admin("/readyz"); status != 200 || body != "ok\n" {
		t.Errorf("ready: %d %s", status, body)
	}
	if status, _ := r.admin("/healthz"); status != 200 {
		t.Errorf("health: %d", status)
	}
	if _, body := r.admin("/metrics"); !strings.Contains(body, "guildhall_sessions 50\n") || !strings.Contains(body, "guildhall_guilds 1\n") {
		t.Errorf("metrics: %s", body)
	}
	_, body := r.admin(report.Path)
	var account report.Report
	if err := json.Unmarshal([]byte(body), &account); err != nil {
		t.Fatal(err)
	}
	if !account.Complete || len(account.Guilds) != 1 || account.Guilds[0].Sessions != clients || account.Guilds[0].Members != clients || account.Load.Sessions != clients {
		t.Errorf("report %s", body)
	}
	if status, _ := r.admin(report.Path + "?since=x"); status != 400 {
		t.Errorf("report since x: %d", status)
	}

	started := time.Now()
	r.stop()
	eventually(t, "the server is not ready any more", func() bool { return r.server.draining.Load() })
	if status, body := r.admin("/readyz"); status != 503 {
		t.Errorf("ready while stopping: %d %s", status, body)
	}
	eventually(t, "the guilds are stopped", r.directory.Stopped)
	// The port may be closed already; an answer must be 503.
	if status, answer, err := r.publish(guildID, `{"t":"X","d":{}}`); err == nil && status != 503 {
		t.Errorf("publish after the end: %d %s", status, answer)
	}
	if err := <-r.ended; err != nil {
		t.Error(err)
	}
	if took := time.Since(started); took > shutdownTimeout/2 {
		t.Errorf("the end took %s", took)
	}
	group.Wait()
}

// TestRestartOnDisk: after an end, orderly or not, sessions go on where they were, on the same numbers, and
// a publisher that asks again is answered as before.
func TestRestartOnDisk(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "a", guildID)
	c.data = filepath.Join(t.TempDir(), "data")
	c.die = func(err error) { t.Error(err) }
	first := start(t, c)
	ws := first.dial(guildID)
	expect(t, ws, protocol.OpHello)
	identify(t, ws, first.token(1, false))
	var ready struct {
		SessionID string `json:"session_id"`
	}
	if err := json.Unmarshal(expect(t, ws, "READY").D, &ready); err != nil {
		t.Fatal(err)
	}
	seen := expect(t, ws, "GUILD_CREATE").S
	const keyed = `{"t":"MESSAGE_CREATE","d":{"n":1}}`
	status, answer, err := first.publishKey(guildID, "key", keyed)
	if status != 200 {
		t.Fatal(status, answer, err)
	}
	first.stop()
	if err := <-first.ended; err != nil {
		t.Fatal(err)
	}

	second := start(t, c)
	if status, again, err := second.publishKey(guildID, "key", keyed); status != 200 || again != answer {
		t.Errorf("%d %s %v, before %s", status, again, err, answer)
	}
	if status, answer, err := second.publishKey(guildID, "key", `{"t":"MESSAGE_CREATE","d":{"n":2}}`); status != 422 {
		t.Error(status, answer, err)
	}
	ws = second.dial(guildID)
	expect(t, ws, protocol.OpHello)
	if err := ws.WriteJSON(map[string]any{"op": 6, "d": map[string]any{"token": second.token(1, false), "session_id": ready.SessionID, "seq": seen}}); err != nil {
		t.Fatal(err)
	}
	if m := expect(t, ws, "MESSAGE_CREATE"); m.S != seen+1 {
		t.Errorf("%+v, expected %d", m, seen+1)
	}
	expect(t, ws, "RESUMED")
	if _, body := second.admin("/metrics"); !strings.Contains(body, "guildhall_store_records_total 0\n") || !strings.Contains(body, "guildhall_store_disk_full 0\n") {
		t.Error(body)
	}
	if _, body := second.admin(report.Path); !strings.Contains(body, `"durable":true`) {
		t.Error(body)
	}
}

// TestOneProcessADirectory: a second process waits for the first one's end.
func TestOneProcessADirectory(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "a", guildID)
	c.data = filepath.Join(t.TempDir(), "data")
	first := start(t, c)
	started := make(chan error, 1)
	go func() {
		s, err := newServer(context.Background(), c)
		if err == nil {
			ended, cancel := context.WithCancel(context.Background())
			cancel()
			err = s.run(ended)
		}
		started <- err
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := newServer(ctx, c); !errors.Is(err, store.ErrLocked) {
		t.Errorf("a third process, which gives up: %v", err)
	}
	first.stop()
	if err := <-started; err != nil {
		t.Error(err)
	}
}

// TestRelay: sessions on a relay hear what is published, REST goes through to the shard, a restart of the shard closes no
// socket, and when the relay ends its sessions are asked to leave and can go on at the shard.
func TestRelay(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := run(context.Background(), []string{"linkcerts", "--dir", dir, "--namespace", "ns", "--shard", "a", "--guild", guildID}, io.Discard); err != nil {
		t.Fatal(err)
	}
	c := testConfig(t, "a", guildID)
	c.data = filepath.Join(t.TempDir(), "data")
	c.linkListen, c.linkDir = "127.0.0.1:0", filepath.Join(dir, "shard")
	shard := start(t, c)
	c.linkListen, c.listen = shard.listeners.links.Addr().String(), shard.address() // where the next one is found
	relay := start(t, config{
		keysDir: c.keysDir, listen: "127.0.0.1:0", adminListen: "127.0.0.1:0", linkDir: filepath.Join(dir, "relay"),
		logger: slog.New(slog.DiscardHandler),
		relay: &relayConfig{
			guild: 1100000000000000001, guildUID: "uid", name: "r", shardAddress: c.linkListen, restAddress: shard.address(),
			gatewayURL: "ws://relays.example/g/" + guildID + "/", sessions: 100, drain: 2 * time.Second,
		},
	})
	ws := relay.dial(guildID)
	expect(t, ws, protocol.OpHello)
	identify(t, ws, relay.token(1, false))
	var ready struct {
		SessionID string `json:"session_id"`
		URL       string `json:"resume_gateway_url"`
	}
	if err := json.Unmarshal(expect(t, ws, "READY").D, &ready); err != nil || ready.URL != "ws://relays.example/g/"+guildID+"/" {
		t.Fatal(ready, err)
	}
	expect(t, ws, "GUILD_CREATE")
	publish := func(n int) uint64 {
		t.Helper()
		if status, answer, err := relay.publish(guildID, fmt.Sprintf(`{"t":"MESSAGE_CREATE","d":{"n":%d}}`, n)); status != 200 {
			t.Fatal(status, answer, err)
		}
		return expect(t, ws, "MESSAGE_CREATE").S
	}
	publish(1)
	eventually(t, "the shard reports the relay", func() bool {
		_, body := shard.admin(report.Path)
		var account report.Report
		return json.Unmarshal([]byte(body), &account) == nil && len(account.Relays) == 1 && account.Relays[0].Sessions == 1 &&
			account.Relays[0].Attached && account.Guilds[0].Sessions == 1 && account.Guilds[0].Direct == 0
	})

	shard.stop()
	if err := <-shard.ended; err != nil {
		t.Fatal(err)
	}
	shard = start(t, c)
	eventually(t, "the link is up again", func() bool {
		_, body := shard.admin(report.Path)
		return strings.Contains(body, `"attached":true`)
	})
	last := publish(2)

	uid := string(shard.alone.Guilds[0].UID)
	order := func(term, round int64, name string) (status int) {
		t.Helper()
		body := fmt.Sprintf(`{"guildUID":%q,"term":%d,"round":%d,"orders":[{"relay":%q,"leave":1,"perSecond":10}]}`, uid, term, round, name)
		response, err := shard.client.Post("http://"+shard.listeners.admin.Addr().String()+report.OrdersPath, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return response.StatusCode
	}
	for _, step := range []struct {
		what        string
		term, round int64
		relay       string
		want        int
	}{
		{"for the shard's own sessions", 5, 2, "", 204},
		{"of an older round", 5, 1, "", 409},
		{"of an older term", 4, 3, "", 409},
		{"for a relay that has no link", 5, 3, "none", 503},
		{"for the relay", 6, 3, "r", 204},
	} {
		if got := order(step.term, step.round, step.relay); got != step.want {
			t.Errorf("an order %s: %d", step.what, got)
		}
	}
	expect(t, ws, protocol.OpReconnect) // by the order
	relay.stop()
	expect(t, ws, protocol.OpReconnect) // since the relay ends
	if status, _ := relay.admin("/readyz"); status != 503 {
		t.Errorf("ready while it ends: %d", status)
	}
	ws.Close()
	if err := <-relay.ended; err != nil {
		t.Error(err)
	}
	ws = shard.dial(guildID)
	expect(t, ws, protocol.OpHello)
	if err := ws.WriteJSON(map[string]any{"op": 6, "d": map[string]any{"token": shard.token(1, false), "session_id": ready.SessionID, "seq": last}}); err != nil {
		t.Fatal(err)
	}
	if m := expect(t, ws, "RESUMED"); m.S != last {
		t.Errorf("%+v, expected %d", m, last)
	}
}

// TestClientsSockets: what every connection of a client has the listener says once.
func TestClientsSockets(t *testing.T) {
	ln, err := listenClients("127.0.0.1:0", make(places, 1))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	io.WriteString(client, "first bytes")
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, option := range []struct {
		name                  string
		level, option, lo, hi int
	}{
		{"TCP_NODELAY", syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1, 1},
		{"SO_KEEPALIVE", syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 0, 0},
		{"SO_SNDBUF", syscall.SOL_SOCKET, syscall.SO_SNDBUF, sendBuffer, 2 * sendBuffer}, // Linux counts its own part, too
	} {
		var value int
		var failed error
		if err := raw.Control(func(fd uintptr) { value, failed = syscall.GetsockoptInt(int(fd), option.level, option.option) }); err != nil || failed != nil {
			t.Fatal(err, failed)
		}
		if value < option.lo || value > option.hi {
			t.Errorf("%s is %d, want %d to %d", option.name, value, option.lo, option.hi)
		}
	}
}

func TestLimitedListener(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	limited := limitListener(ln, make(chan struct{}, 1))
	accepted := make(chan net.Conn)
	failed := make(chan error)
	go func() {
		for {
			conn, err := limited.Accept()
			if err != nil {
				failed <- err
				return
			}
			accepted <- conn
		}
	}()
	for range 2 {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	first := <-accepted
	select {
	case <-accepted:
		t.Fatal("more than one connection")
	case <-time.After(50 * time.Millisecond):
	}
	// A session writes without blocking to what is a system connection.
	for _, ok := range []bool{is[syscall.Conn](first), is[interface{ CloseWrite() error }](first)} {
		if !ok {
			t.Errorf("%T hides that it is a TCP connection", first)
		}
	}
	first.Close()
	first.Close() // gives back one place only
	second := <-accepted
	limited.Close()
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	second.Close()
}

func is[T any](v any) bool {
	_, ok := v.(T)
	return ok
}

func TestRoutesOfThePort(t *testing.T) {
	t.Parallel()
	r := start(t, testConfig(t, "a", guildID))
	for name, test := range map[string]struct {
		path   string
		status int
		has    string
	}{
		"version 10":                {"/g/" + guildID + "/api/v10/gateway", 200, `{"url":"ws://127.0.0.1:`},
		"version 9":                 {"/g/" + guildID + "/api/v9/gateway", 200, `{"url":"ws://127.0.0.1:`},
		"another version":           {"/g/" + guildID + "/api/v8/gateway", 404, "expected"},
		"no guild":                  {"/", 404, "expected"},
		"a guild that is none":      {"/g/x/api/v10/gateway", 404, "snowflake"},
		"a guild nobody knows":      {"/g/1100000000000000009/api/v10/gateway", 404, "10004"},
		"a gateway without upgrade": {"/g/" + guildID + "/", 400, ""},
	} {
		t.Run(name, func(t *testing.T) {
			status, body := r.get("http://" + r.address() + test.path)
			if status != test.status || !strings.Contains(body, test.has) {
				t.Errorf("%d %s", status, body)
			}
		})
	}
}

// pair starts a server and another one in front of it.
func pair(t *testing.T, hold time.Duration) (front, holder *running) {
	t.Helper()
	holder = start(t, testConfig(t, "b", guildID))
	c := testConfig(t, "a", "1100000000000000002")
	c.keysDir, c.holdTime = holder.keysDir, hold
	c.resolvePod = func(shard string) string {
		if shard != "b" {
			t.Errorf("asked for the pod of %q", shard)
		}
		return holder.address()
	}
	front = start(t, c)
	front.directory.Apply(holder.alone.Guilds[0])
	return front, holder
}

func TestFrontDoor(t *testing.T) {
	t.Parallel()
	front, holder := pair(t, time.Second)
	ws := front.dial(guildID)
	expect(t, ws, protocol.OpHello)
	identify(t, ws, front.token(1, false))
	expect(t, ws, "READY", "GUILD_CREATE")
	status, answer, err := front.publish(guildID, `{"t":"MESSAGE_CREATE","d":{}}`)
	if err != nil || status != 200 {
		t.Fatal(status, answer, err)
	}
	if m := expect(t, ws, "MESSAGE_CREATE"); answer != fmt.Sprintf(`{"s":%d}`, m.S) {
		t.Errorf("%+v was answered %s", m, answer)
	}
	if status, body := front.get("http://" + front.address() + "/g/" + guildID + "/api/v10/gateway"); status != 200 ||
		!strings.Contains(body, holder.address()) {
		t.Errorf("%d %s", status, body)
	}

	// The holder ends: its session is told to come back, and held here until it gives up.
	holder.stop()
	expect(t, ws, protocol.OpReconnect)
	if _, err := receive(ws); !websocket.IsCloseError(err, protocol.CloseUnknownError) {
		t.Error(err)
	}
	<-holder.ended
	// A request on a connection that the holder left open gets no answer: it may have been carried out.
	eventually(t, "the connection to the holder is given up", func() bool {
		status, _ := front.get("http://" + front.address() + "/g/" + guildID + "/api/v10/gateway")
		return status == 503
	})
	started := time.Now()
	if status, answer, err = front.publish(guildID, `{"t":"MESSAGE_CREATE","d":{}}`); err != nil || status != 503 {
		t.Errorf("with the holder away: %d %s %v", status, answer, err)
	}
	if took := time.Since(started); took < time.Second {
		t.Errorf("was held for %s", took)
	}
	if _, err := receive(front.dial(guildID)); !websocket.IsCloseError(err, protocol.CloseUnknownError) {
		t.Error(err)
	}
}

func TestFrontDoorWhileTheHolderRestarts(t *testing.T) {
	t.Parallel()
	front, holder := pair(t, patience)
	holder.stop()
	<-holder.ended
	ws := front.dial(guildID)
	eventually(t, "the client is held", func() bool { return front.gateway.Held() == 1 })
	c := testConfig(t, "b", guildID)
	c.keysDir, c.listen = holder.keysDir, holder.address()
	start(t, c)
	expect(t, ws, protocol.OpHello)
	identify(t, ws, front.token(1, false))
	expect(t, ws, "READY", "GUILD_CREATE")
	front.stop() // with a forwarded connection
	if _, err := receive(ws); err == nil {
		t.Error("the connection lives on")
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "a", guildID)
	c.tlsDir = t.TempDir()
	writeCertificate(t, c.tlsDir, 1)
	r := start(t, c)
	serial := func() int64 {
		t.Helper()
		conn, err := tls.Dial("tcp", r.listeners.tls.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	if n := serial(); n != 1 {
		t.Errorf("certificate %d", n)
	}
	dialer := websocket.Dialer{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	ws, response, err := dialer.Dial("wss://"+r.listeners.tls.Addr().String()+"/g/"+guildID+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	response.Body.Close()
	expect(t, ws, protocol.OpHello)
	identify(t, ws, r.token(1, false))
	expect(t, ws, "READY", "GUILD_CREATE")

	writeCertificate(t, c.tlsDir, 2)
	later := time.Now().Add(time.Hour)
	if err := os.Chtimes(filepath.Join(c.tlsDir, "tls.crt"), later, later); err != nil {
		t.Fatal(err)
	}
	if n := serial(); n != 2 {
		t.Errorf("certificate %d after the change", n)
	}
	os.Remove(filepath.Join(c.tlsDir, "tls.crt"))
	if n := serial(); n != 2 {
		t.Errorf("certificate %d while the file is away", n)
	}
}

func writeCertificate(t *testing.T, dir string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{{127, 0, 0, 1}}}
	crt, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"tls.crt": {Type: "CERTIFICATE", Bytes: crt}, "tls.key": {Type: "PRIVATE KEY", Bytes: secret},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFailedStarts(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free := func() string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return ln.Addr().String()
	}
	for name, test := range map[string]struct {
		spoil func(c *config)
		has   string
	}{
		"the port is taken":          {func(c *config) { c.listen = taken.Addr().String() }, "--listen: "},
		"the admin port is taken":    {func(c *config) { c.adminListen = taken.Addr().String() }, "--admin-listen: "},
		"the TLS port is taken":      {func(c *config) { c.tlsDir, c.listenTLS = "TLS", taken.Addr().String() }, "--listen-tls: "},
		"there is no certificate":    {func(c *config) { c.tlsDir = "nowhere" }, "--tls-dir: "},
		"the file is not there":      {func(c *config) { c.file = "nowhere" }, "nowhere"},
		"the key set cannot be made": {func(c *config) { c.keysDir = os.DevNull + "/x" }, "making a key set"},
		"the key set is broken":      {func(c *config) { breakKeys(t, c.keysDir) }, "key \"current\""},
	} {
		t.Run(name, func(t *testing.T) {
			c := testConfig(t, "a", guildID)
			c.listen, c.adminListen = free(), free()
			test.spoil(&c)
			if c.tlsDir == "TLS" {
				c.tlsDir = t.TempDir()
				writeCertificate(t, c.tlsDir, 1)
			}
			err := serve(context.Background(), c)
			if err == nil || !strings.Contains(err.Error(), test.has) {
				t.Fatal(err)
			}
			for _, address := range []string{c.listen, c.adminListen} {
				if address == taken.Addr().String() {
					continue
				}
				ln, err := net.Listen("tcp", address)
				if err != nil {
					t.Error("a port was left open:", err)
					continue
				}
				ln.Close()
			}
		})
	}
}

func breakKeys(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, token.CurrentKey), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAFailedPartEndsTheServer(t *testing.T) {
	s, err := newServer(context.Background(), testConfig(t, "a", guildID))
	if err != nil {
		t.Fatal(err)
	}
	s.listeners.admin.Close()
	if err := s.run(context.Background()); err == nil || !strings.HasPrefix(err.Error(), "admin: ") {
		t.Error(err)
	}
}

// TestWithoutTheKubernetesAPI: a server whose API is away starts, and holds its clients.
func TestWithoutTheKubernetesAPI(t *testing.T) {
	dir := t.TempDir()
	kubeconfig := filepath.Join(dir, "config")
	if err := os.WriteFile(kubeconfig, []byte(`
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: c}}]
current-context: c
`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", kubeconfig)
	c := testConfig(t, "a", guildID)
	c.file, c.namespace, c.shardName, c.shardUID, c.holdTime = "", "ns", "a", "uid", 300*time.Millisecond
	if err := makeKeys(c.keysDir); err != nil {
		t.Fatal(err)
	}
	s, err := newServer(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.run(ctx) }()
	r := &running{server: s, t: t, client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	if status, body := r.admin("/readyz"); status != 503 || !strings.Contains(body, "not known yet") {
		t.Errorf("ready: %d %s", status, body)
	}
	if status, _ := r.admin("/healthz"); status != 200 {
		t.Errorf("health: %d", status)
	}
	if _, err := receive(r.dial(guildID)); !websocket.IsCloseError(err, protocol.CloseUnknownError) {
		t.Error(err)
	}
	if status, _ := r.get("http://" + r.address() + "/g/" + guildID + "/api/v10/gateway"); status != 503 {
		t.Errorf("REST: %d", status)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestSlowRequestsEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for time-outs")
	}
	t.Parallel()
	r := start(t, testConfig(t, "a", guildID))
	for name, address := range map[string]string{"the gateway's port": r.address(), "the admin port": r.listeners.admin.Addr().String()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			io.WriteString(conn, "GET /g/"+guildID+"/ HTTP/1.1\r\nHost: x\r\n") // and never the end
			conn.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.ReadAll(conn); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCommands(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	ctx := context.Background()
	var out bytes.Buffer
	must := func(args ...string) string {
		t.Helper()
		out.Reset()
		if err := run(ctx, args, &out); err != nil {
			t.Fatal(args, err)
		}
		return strings.TrimSpace(out.String())
	}
	must("keygen", "--keys-dir", dir)
	before, err := os.ReadFile(filepath.Join(dir, token.CurrentKey))
	if err != nil {
		t.Fatal(err)
	}
	must("keygen", "--keys-dir", dir)
	if after, _ := os.ReadFile(filepath.Join(dir, token.CurrentKey)); !bytes.Equal(before, after) {
		t.Error("the key was made anew")
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	keys, err := token.LoadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	claims, err := keys.Verify(must("token", "--keys-dir", dir, "--user", "200000000000000001", "--name", "n", "--bot", "--publish", "--lifetime", "1h"), time.Now())
	if err != nil || claims.User != 200000000000000001 || claims.Name != "n" || !claims.Bot || !claims.Publish || claims.Expires.IsZero() {
		t.Errorf("%+v %v", claims, err)
	}
	if claims, err = keys.Verify(must("token", "--keys-dir", dir), time.Now()); err != nil || claims.User == 0 || claims.Bot || claims.Publish || !claims.Expires.IsZero() {
		t.Errorf("%+v %v", claims, err)
	}
	if got := must("version"); got != version {
		t.Errorf("version %q", got)
	}
	if got := must("help"); !strings.Contains(got, "serve") {
		t.Errorf("help %q", got)
	}
	for name, args := range map[string][]string{
		"no command":             {},
		"an unknown command":     {"fly"},
		"an unknown flag":        {"token", "--fly"},
		"an argument":            {"token", "--keys-dir", dir, "x"},
		"a user that is none":    {"token", "--keys-dir", dir, "--user", "1"},
		"a negative lifetime":    {"token", "--keys-dir", dir, "--lifetime", "-1h"},
		"a nameless user":        {"token", "--keys-dir", dir, "--name", ""},
		"no keys":                {"token", "--keys-dir", dir + "x"},
		"nothing to serve":       {"serve"},
		"half of what is needed": {"serve", "--namespace", "ns"},
		"two kinds of service":   {"serve", "--file", "x", "--namespace", "ns"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := run(ctx, args, io.Discard); err == nil {
				t.Error("no error")
			}
		})
	}
}

// TestDialledConnectionsHavePlaces: connections to other pods count as those of clients do.
func TestDialledConnectionsHavePlaces(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p := make(places, 1)
	dial := func() (net.Conn, error) { return p.dial(t.Context(), new(net.Dialer), "tcp", ln.Addr().String()) }
	first, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dial(); !errors.Is(err, errNoPlace) {
		t.Errorf("a second one: %v", err)
	}
	first.Close()
	if _, err := p.dial(t.Context(), new(net.Dialer), "tcp", "127.0.0.1:1"); err == nil || errors.Is(err, errNoPlace) {
		t.Errorf("to nobody: %v", err)
	}
	second, err := dial()
	if err != nil {
		t.Fatal("the place has not come back:", err)
	}
	second.Close()
}
