package rest

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"guildhall.dev/guildhall/shardserver/directory"
)

// sink is a connection that takes everything.
type sink struct{ net.Conn }

func (*sink) Write(p []byte) (int, error)      { return len(p), nil }
func (*sink) Close() error                     { return nil }
func (*sink) SetReadDeadline(time.Time) error  { return nil }
func (*sink) SetWriteDeadline(time.Time) error { return nil }

// front is a server that forwards everything to address.
func front(t *testing.T, address string, hold time.Duration) (*httptest.Server, *http.Client) {
	t.Helper()
	f := newForwarder(hold, slog.New(slog.DiscardHandler))
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { f.serve(w, r, address) }))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	server.Start()
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		server.Close()
		f.transport.CloseIdleConnections()
	})
	return server, client
}

func TestForwarded(t *testing.T) {
	holder := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.Header.Get(directory.ForwardedHeader) != "1" || r.Header.Get("Authorization") != "Bot x" || r.URL.RequestURI() != "/g/1/api/v10/x?y=%20z" || string(body) != "body" {
			t.Errorf("%s %q %v", r.RequestURI, body, r.Header)
		}
		w.Header().Set("Retry-After", "7")
		writeJSON(w, http.StatusTeapot, map[string]int{"code": 5})
	}))
	defer holder.Close()
	server, client := front(t, strings.TrimPrefix(holder.URL, "http://"), time.Second)
	r, _ := http.NewRequest(http.MethodPost, server.URL+"/g/1/api/v10/x?y=%20z", strings.NewReader("body"))
	r.Header.Set("Authorization", "Bot x")
	r.Header.Set(directory.ForwardedHeader, "from outside")
	response, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	if response.StatusCode != http.StatusTeapot || string(body) != `{"code":5}` || response.Header.Get("Content-Type") != "application/json" || response.Header.Get("Retry-After") != "7" {
		t.Errorf("%d %s %v", response.StatusCode, body, response.Header)
	}
}

func TestForwardedToNobody(t *testing.T) {
	server, client := front(t, "127.0.0.1:1", 300*time.Millisecond)
	started := time.Now()
	response, err := client.Post(server.URL, "application/json", strings.NewReader(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusServiceUnavailable || response.Header.Get("Retry-After") == "" {
		t.Errorf("%d %v", response.StatusCode, response.Header)
	}
	if took := time.Since(started); took < 300*time.Millisecond {
		t.Errorf("not held: %s", took)
	}
}

func TestForwardedToOneThatComesBack(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	server, client := front(t, address, 30*time.Second)
	done := make(chan int, 1)
	go func() {
		response, err := client.Post(server.URL, "application/json", strings.NewReader(`{}`))
		if err != nil {
			t.Error(err)
			done <- 0
			return
		}
		response.Body.Close()
		done <- response.StatusCode
	}()
	if ln, err = net.Listen("tcp", address); err != nil {
		t.Fatal(err)
	}
	holder := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) })}
	go holder.Serve(ln)
	defer holder.Close()
	if status := <-done; status != 204 {
		t.Errorf("status %d", status)
	}
}

// TestTheHolderDies: it may have carried the request out, so the client gets no answer at all.
func TestTheHolderDies(t *testing.T) {
	for name, dies := range map[string]func(w http.ResponseWriter, r *http.Request){
		"before it has read the body": func(http.ResponseWriter, *http.Request) {},
		"when it has read the body":   func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) },
		"within its answer": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("{"))
			http.NewResponseController(w).Flush()
		},
	} {
		t.Run(name, func(t *testing.T) {
			var requests atomic.Int32
			holder := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				dies(w, r)
				panic(http.ErrAbortHandler)
			}))
			defer holder.Close()
			server, client := front(t, strings.TrimPrefix(holder.URL, "http://"), time.Second)
			response, err := client.Post(server.URL, "application/json", strings.NewReader(`{"t":"X","d":{}}`))
			if err == nil {
				_, err = io.ReadAll(response.Body)
				response.Body.Close()
				if response.StatusCode >= 500 {
					t.Errorf("status %d", response.StatusCode)
				}
			}
			if err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Error("expected the connection to be cut, got", err)
			}
			if n := requests.Load(); n != 1 {
				t.Errorf("%d requests", n)
			}
		})
	}
}
