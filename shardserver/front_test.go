package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"
)

// upgradeRequest asks for a WebSocket at a path. more is further headers, each with its end of line.
func upgradeRequest(path, version, more string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: " + version + "\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" + more + "\r\n"
}

// TestFirstBytes: whatever a client begins with, and in however many pieces, it gets the answer that net/http and the
// gateway have for it.
func TestFirstBytes(t *testing.T) {
	r := start(t, testConfig(t, "shard-a", guildID))
	gateway := "/g/" + guildID + "/"
	upgrade := upgradeRequest(gateway, "13", "")
	masked := "\x81\x80\x00\x00\x00\x00" // an empty message
	for name, test := range map[string]struct {
		pieces []string
		status int
		then   string // what comes behind the answer
	}{
		"an upgrade":                           {[]string{upgrade}, 101, "heartbeat_interval"},
		"an upgrade in two pieces":             {[]string{upgrade[:40], upgrade[40:]}, 101, "heartbeat_interval"},
		"an upgrade with a long header":        {[]string{upgradeRequest(gateway, "13", "Cookie: "+strings.Repeat("c", 3000)+"\r\n")}, 101, "heartbeat_interval"},
		"an upgrade with a message behind it":  {[]string{upgrade + masked}, 101, "heartbeat_interval"},
		"an upgrade without a host":            {[]string{strings.Replace(upgrade, "Host: example.com\r\n", "", 1)}, 400, "missing required Host"},
		"an upgrade to another version":        {[]string{upgradeRequest(gateway, "12", "")}, 400, ""},
		"an upgrade to an encoding not spoken": {[]string{upgradeRequest(gateway+"?encoding=etf", "13", "")}, 400, "expected json"},
		"an upgrade elsewhere":                 {[]string{upgradeRequest("/", "13", "")}, 404, "expected /g/"},
		"an upgrade of a POST":                 {[]string{strings.Replace(upgrade, "GET", "POST", 1)}, 405, ""},
		"no upgrade":                           {[]string{"GET " + gateway + "api/v10/gateway HTTP/1.1\r\nHost: h\r\n\r\n"}, 200, "ws://"},
		"a request and another":                {[]string{"GET / HTTP/1.1\r\nHost: h\r\n\r\n" + upgrade}, 404, "expected /g/"},
		"a body":                               {[]string{"POST " + gateway + "api/v10/guilds/" + guildID + "/events HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{", "}"}, 401, ""},
		"no HTTP":                              {[]string{"hello\r\n\r\n"}, 400, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", r.address())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			for i, piece := range test.pieces {
				if i > 0 {
					time.Sleep(20 * time.Millisecond) // so that they arrive apart
				}
				if _, err := io.WriteString(conn, piece); err != nil {
					t.Fatal(err)
				}
			}
			in := bufio.NewReader(conn)
			response, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			if response.StatusCode != test.status {
				t.Errorf("status %d, want %d", response.StatusCode, test.status)
			}
			rest := io.Reader(response.Body)
			if response.StatusCode == http.StatusSwitchingProtocols {
				rest = in
			}
			var got strings.Builder
			for !strings.Contains(got.String(), test.then) {
				if _, err := io.CopyN(&got, rest, 1); err != nil {
					t.Fatalf("%v after %q, want %q", err, got.String(), test.then)
				}
			}
		})
	}
}

// TestUpgradesAreServedAtOnce: what net/http gets to see is the rest.
func TestUpgradesAreServedAtOnce(t *testing.T) {
	ln, err := listenClients("127.0.0.1:0", make(places, 8))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served := make(chan net.Conn, 1)
	f := &front{ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			http.Error(w, "no", http.StatusNotFound)
			return
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
		}
		served <- conn
	})}
	rest := make(chan net.Conn)
	go func() {
		for {
			conn, err := f.Accept()
			if err != nil {
				close(rest)
				return
			}
			rest <- conn
		}
	}()
	for i, path := range []string{"/yes", "/no", "/yes"} {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		request := upgradeRequest(path, "13", fmt.Sprintf("X-Number: %d\r\n", i))
		io.WriteString(conn, request)
		select {
		case conn := <-served:
			conn.Close()
			if path != "/yes" {
				t.Errorf("%s: upgraded", path)
			}
		case conn := <-rest:
			got := make([]byte, len(request))
			conn.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != request {
				t.Errorf("%s: net/http gets %q: %v", path, got, err)
			}
			if path != "/no" && runtime.GOOS == "linux" {
				t.Errorf("%s: left to net/http", path)
			}
			conn.Close()
		case <-time.After(patience):
			t.Fatalf("%s: not accepted", path)
		}
	}
}
