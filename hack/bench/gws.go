package main

import (
	"net/http"
	"sync"

	"github.com/lxzan/gws"
)

// serveGWS is a broadcast loop over gws' Broadcaster, which frames an event once and writes in
// goroutines of a session's own as needed.
func serveGWS(e *endpoints) error {
	h := &gwsHub{sessions: map[*gws.Conn]struct{}{}}
	upgrader := gws.NewUpgrader(h, &gws.ServerOption{ReadBufferSize: 512})
	e.listen(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := upgrader.Upgrade(w, r)
		if err != nil {
			return
		}
		go conn.ReadLoop() // the request's goroutine ends, with all that net/http keeps for it
	}))
	return e.published(func(payload []byte) {
		if payload != nil {
			h.broadcast(payload)
		}
	})
}

type gwsHub struct {
	gws.BuiltinEventHandler
	mu       sync.Mutex
	sessions map[*gws.Conn]struct{}
}

func (h *gwsHub) OnOpen(c *gws.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sessions[c] = struct{}{}
}

func (h *gwsHub) OnClose(c *gws.Conn, _ error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.sessions, c)
}

func (h *gwsHub) broadcast(payload []byte) {
	b := gws.NewBroadcaster(gws.OpcodeText, payload)
	defer b.Close()
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.sessions {
		b.Broadcast(c) //nolint:errcheck // the client has gone, or is counted as missing
	}
}
