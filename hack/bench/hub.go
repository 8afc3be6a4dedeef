package main

import (
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// serveHub is the chat example of gorilla/websocket, as most Go servers begin: two goroutines and
// a channel per session. Of what the example does it leaves out nothing but the chat; it has small
// buffers, a pool of write buffers, and prepared messages, so that an event is framed once.
func serveHub(e *endpoints) error {
	h := &hub{sessions: map[*hubSession]struct{}{}}
	upgrader := websocket.Upgrader{ReadBufferSize: 512, WriteBufferSize: 512, WriteBufferPool: &sync.Pool{}}
	e.listen(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		s := &hubSession{conn: conn, send: make(chan *websocket.PreparedMessage, 256)}
		h.mu.Lock()
		h.sessions[s] = struct{}{}
		h.mu.Unlock()
		go s.write()
		go s.read(h)
	}))
	return e.published(func(payload []byte) {
		if payload == nil {
			return
		}
		m, err := websocket.NewPreparedMessage(websocket.TextMessage, payload)
		if err != nil {
			panic(err)
		}
		h.broadcast(m)
	})
}

// serveUpgrades is net/http with gorilla's Upgrader and nothing else: each handler waits until its
// client is gone.
func serveUpgrades(e *endpoints) error {
	upgrader := websocket.Upgrader{ReadBufferSize: 512, WriteBufferSize: 512, WriteBufferPool: &sync.Pool{}}
	e.listen(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer conn.Close()
		conn.ReadMessage() //nolint:errcheck // every outcome ends it
	}))
	return e.published(func([]byte) {})
}

type hub struct {
	mu       sync.Mutex
	sessions map[*hubSession]struct{}
}

func (h *hub) broadcast(m *websocket.PreparedMessage) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.sessions {
		select {
		case s.send <- m:
		default: // cannot be: the publisher's window is smaller
			os.Exit(1)
		}
	}
}

type hubSession struct {
	conn *websocket.Conn
	send chan *websocket.PreparedMessage
}

// The times of the chat example.
const (
	hubWriteWait  = 10 * time.Second
	hubPongWait   = 60 * time.Second
	hubPingPeriod = hubPongWait * 9 / 10
)

func (s *hubSession) read(h *hub) {
	defer func() {
		h.mu.Lock()
		delete(h.sessions, s)
		h.mu.Unlock()
		close(s.send)
	}()
	s.conn.SetReadLimit(512)
	s.conn.SetReadDeadline(time.Now().Add(hubPongWait))
	s.conn.SetPongHandler(func(string) error { return s.conn.SetReadDeadline(time.Now().Add(hubPongWait)) })
	for {
		if _, _, err := s.conn.ReadMessage(); err != nil {
			return
		}
	}
}

func (s *hubSession) write() {
	ping := time.NewTicker(hubPingPeriod)
	defer ping.Stop()
	defer s.conn.Close()
	for {
		var err error
		select {
		case m, ok := <-s.send:
			if !ok {
				return
			}
			s.conn.SetWriteDeadline(time.Now().Add(hubWriteWait))
			err = s.conn.WritePreparedMessage(m)
		case <-ping.C:
			s.conn.SetWriteDeadline(time.Now().Add(hubWriteWait))
			err = s.conn.WriteMessage(websocket.PingMessage, nil)
		}
		if err != nil {
			return
		}
	}
}
