package link

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/linkcert"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

const (
	// Path of a link, with the guild's id behind it; query parameter name is the relay's.
	Path = "/link/v1/"

	// silence is how long an end may be silent before the link is given up; pingTime is how often each says something.
	silence  = 15 * time.Second
	pingTime = 4 * time.Second
	// dialTime bounds the wait for a shard that may be at another address by now; writeTime bounds one write.
	dialTime  = 2 * time.Second
	writeTime = 10 * time.Second
	// rememberTime is how long the sessions of a relay whose link is down count as connected.
	rememberTime = time.Minute
	// maxLinks bounds the links of a shard server, maxAttaching the sessions of a link that are let in at a time.
	maxLinks     = 2048
	maxAttaching = 256
	maxName      = 253
)

// ServerOptions of a Server.
type ServerOptions struct {
	// Guild finds a guild that this process writes.
	Guild  func(id snowflake.ID) *guild.Guild
	Logger *slog.Logger
}

// Server is the shard's end of links.
type Server struct {
	o        ServerOptions
	upgrader websocket.Upgrader

	mu     sync.Mutex
	relays map[key]*relay
	closed bool
}

type key struct {
	guild snowflake.ID
	name  string
}

// relay is one that has a link, or had one a moment ago.
type relay struct {
	feed    *guild.Feed
	conn    *websocket.Conn // nil: the link is down
	account report.Relay
	heard   time.Time // when the account came
	forget  *time.Timer
}

// NewServer makes a Server.
func NewServer(o ServerOptions) *Server {
	return &Server{
		o: o, relays: map[key]*relay{},
		upgrader: websocket.Upgrader{ReadBufferSize: 16 << 10, WriteBufferSize: 64 << 10, HandshakeTimeout: writeTime},
	}
}

// ServeHTTP takes a link: GET /link/v1/<guild id>?name=<relay>.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rest, _ := strings.CutPrefix(r.URL.Path, Path)
	id, err := snowflake.Parse(rest)
	name := r.URL.Query().Get("name")
	switch {
	case err != nil:
		http.Error(w, Path+"<guild id>: "+err.Error(), http.StatusNotFound)
		return
	case name == "" || len(name) > maxName:
		http.Error(w, "name: expected the relay's name", http.StatusBadRequest)
		return
	case r.TLS == nil:
		http.Error(w, "expected TLS", http.StatusForbidden)
		return
	}
	if peer, err := linkcert.PeerOf(*r.TLS); err != nil || peer.Guild != id.String() {
		http.Error(w, "the certificate is not of a relay of this guild", http.StatusForbidden)
		return
	}
	g := s.o.Guild(id)
	if g == nil {
		http.Error(w, "the guild is not here now", http.StatusServiceUnavailable)
		return
	}
	conn, err := s.upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // the upgrader has answered
	}
	defer conn.Close()
	conn.SetReadLimit(maxMessage)
	if err := s.serve(r.Context(), conn, g, key{id, name}); err != nil {
		s.o.Logger.Info("link ended", "guild", id, "relay", name, "error", err)
	}
}

// serve feeds a relay until the link ends.
func (s *Server) serve(ctx context.Context, conn *websocket.Conn, g *guild.Guild, k key) error {
	message, err := receive(conn)
	if err != nil {
		return err
	}
	var first follow
	if err := parts(message, func(kind byte, content []byte) error {
		if kind != partFollow {
			return errOrder
		}
		return json.Unmarshal(content, &first)
	}); err != nil {
		return err
	}
	if first.Version < version {
		return fmt.Errorf("%w: %d", errVersion, first.Version)
	}
	log, _ := guildlog.ParseID(first.Log) // none: it has nothing
	feed, begin := g.NewFeed(log, first.After)
	defer feed.Close()
	if err := s.enter(k, feed, conn); err != nil {
		return err
	}
	defer s.leave(k, feed)
	s.o.Logger.Info("relay follows", "guild", k.guild, "relay", k.name, "behind", begin)

	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	defer conn.Close()
	group.Go(func() {
		hello := jsonPart(nil, partWelcome, welcome{Version: version, Log: g.LogID().String(), Epoch: g.Epoch(), Begin: begin})
		err := send(ctx, conn, feed, hello, begin)
		if err != nil && ctx.Err() == nil {
			s.o.Logger.Info("link ended", "guild", k.guild, "relay", k.name, "error", err)
		}
		conn.Close()
	})
	attaching := make(chan struct{}, maxAttaching)
	for {
		message, err := receive(conn)
		if err != nil {
			return err
		}
		if err := parts(message, func(kind byte, content []byte) error {
			switch kind {
			case partSessions:
				var list []guild.Attached
				if err := json.Unmarshal(content, &list); err != nil {
					return err
				}
				feed.Reattach(list)
				if len(list) < maxList {
					s.forgetFormer(k, feed)
				}
			case partAttach:
				var a guild.Attachment
				if err := json.Unmarshal(content, &a); err != nil {
					return err
				}
				attaching <- struct{}{}
				group.Go(func() {
					feed.Attach(ctx, a)
					<-attaching
				})
			case partDetach:
				var d guild.Detachment
				if err := json.Unmarshal(content, &d); err != nil {
					return err
				}
				feed.Detach(d)
			case partReport:
				var account report.Relay
				if err := json.Unmarshal(content, &account); err != nil {
					return err
				}
				s.hear(k, feed, account)
			}
			return nil
		}); err != nil {
			return err
		}
	}
}

// send sends what the feed has.
func send(ctx context.Context, conn *websocket.Conn, feed *guild.Feed, message []byte, prev uint64) error {
	ping := time.NewTicker(pingTime)
	defer ping.Stop()
	go func() { // control messages may be written by another goroutine
		for {
			select {
			case <-ctx.Done():
				return
			case <-ping.C:
				_ = conn.WriteControl(websocket.PingMessage, nil, time.Now().Add(writeTime))
			}
		}
	}()
	for {
		if len(message) > 0 {
			conn.SetWriteDeadline(time.Now().Add(writeTime))
			if err := conn.WriteMessage(websocket.BinaryMessage, message); err != nil {
				return err
			}
			message = message[:0]
		}
		items, err := feed.Next(ctx)
		if err != nil {
			return err
		}
		for i := range items {
			// A batch may be as large as what a feed keeps: it goes in several messages.
			if len(message) > batchBytes {
				conn.SetWriteDeadline(time.Now().Add(writeTime))
				if err := conn.WriteMessage(websocket.BinaryMessage, message); err != nil {
					return err
				}
				message = message[:0]
			}
			message = appendItem(message, &items[i], prev)
			if n := len(items[i].Records); n > 0 {
				prev = items[i].Records[n-1].End()
			}
		}
	}
}

// receive waits for a message of the other end.
func receive(conn *websocket.Conn) ([]byte, error) {
	conn.SetReadDeadline(time.Now().Add(silence))
	kind, message, err := conn.ReadMessage()
	if err == nil && kind != websocket.BinaryMessage {
		err = errors.New("link: expected a binary message")
	}
	return message, err
}

// enter makes a feed the one of its relay. A link that the relay had before is ended.
func (s *Server) enter(k key, feed *guild.Feed, conn *websocket.Conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.relays[k]
	switch {
	case s.closed:
		return errors.New("link: stopping")
	case old == nil && len(s.relays) >= maxLinks:
		return errors.New("link: too many relays")
	case old != nil && old.conn != nil:
		old.conn.Close()
	}
	r := &relay{feed: feed, conn: conn}
	if old != nil {
		// Its sessions count until the relay has said which it still has.
		r.account, r.heard = old.account, old.heard
		if old.forget != nil {
			old.forget.Stop()
		}
		r.forget = time.AfterFunc(rememberTime, old.feed.Forget)
	}
	s.relays[k] = r
	return nil
}

// forgetFormer forgets what is left of the relay's sessions of before.
func (s *Server) forgetFormer(k key, feed *guild.Feed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.relays[k]; r != nil && r.feed == feed && r.forget != nil {
		r.forget.Reset(0)
	}
}

// leave notes that a link is down.
func (s *Server) leave(k key, feed *guild.Feed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.relays[k]
	if r == nil || r.feed != feed {
		return
	}
	r.conn = nil
	r.forget = time.AfterFunc(rememberTime, func() {
		feed.Forget()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.relays[k] == r {
			delete(s.relays, k)
		}
	})
}

func (s *Server) hear(k key, feed *guild.Feed, account report.Relay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.relays[k]; r != nil && r.feed == feed {
		r.account, r.heard = account, time.Now()
	}
}

// Relays are all that follow a guild, or did a moment ago.
func (s *Server) Relays(uidOf func(snowflake.ID) string) (list []report.Relay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, r := range s.relays {
		account := r.account
		account.GuildUID, account.Name = uidOf(k.guild), k.name
		account.Attached, account.AgeMillis = r.conn != nil, time.Since(r.heard).Milliseconds()
		if r.heard.IsZero() {
			account.AgeMillis = rememberTime.Milliseconds()
		}
		list = append(list, account)
	}
	return list
}

// Order hands an order on to a relay. It fails when the relay has no link.
func (s *Server) Order(id snowflake.ID, name string, o guild.Order) error {
	s.mu.Lock()
	r := s.relays[key{id, name}]
	s.mu.Unlock()
	if r == nil || r.conn == nil {
		return fmt.Errorf("link: relay %s has no link", name)
	}
	r.feed.Tell(o)
	return nil
}

// Close ends all links, and takes no more.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, r := range s.relays {
		if r.conn != nil {
			r.conn.Close()
		}
		if r.forget != nil {
			r.forget.Stop()
		}
	}
}
