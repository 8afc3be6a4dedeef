package generator

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

const testGuild = "1100000000000000001"

// fault is what a test server does wrong, once in a thousand deliveries.
type fault string

const (
	faultNone    fault = "none"
	faultDrop    fault = "drop"
	faultDouble  fault = "double"
	faultSwap    fault = "swap"
	faultCorrupt fault = "corrupt"
	faultNumber  fault = "wrong number on resume" // once per resume

	// Faults at a crash.
	faultSessions fault = "sessions forgotten"
	faultTail     fault = "end of the log forgotten"
	faultKeys     fault = "idempotency keys forgotten"
	// Faults of answers, once in a hundred requests.
	faultRefused fault = "refused, but appended"
	faultAnswer  fault = "another number for the same key"
)

// server is a small guild: one log, sessions that are positions in it, REST.
type server struct {
	t     *testing.T
	http  *httptest.Server
	fault fault
	rough bool // asks to reconnect, invalidates sessions, breaks REST connections; all within the protocol
	quick bool // asks for quick heartbeats
	crash int  // after so many requests it crashes each time; 0: never

	mu         sync.Mutex
	grown      *sync.Cond
	random     *rand.Rand
	log        []entry
	number     uint64
	answers    map[string][]uint64 // by idempotency key
	bases      map[string]uint64   // of sessions, by id
	conns      map[*peer]bool
	identified int
	requests   int
	deliveries int
	next       int // delivery that gets the next fault
	faults     int
	beats      int
	deaf       int // heartbeats that it does not acknowledge
	onEvent    func(events int)
	wait       sync.WaitGroup
}

// entry is a record of the log.
type entry struct {
	number uint64
	kind   string
	body   string
}

func (e entry) frame(number uint64) []byte {
	return fmt.Appendf(nil, `{"t":%q,"s":%d,"op":0,"d":%s}`, e.kind, number, e.body)
}

// peer is a connection.
type peer struct {
	conn   *websocket.Conn
	mu     sync.Mutex // of writes
	auth   chan inbound
	closed bool // under server.mu
}

type inbound struct {
	Op int `json:"op"`
	D  struct {
		Token     string `json:"token"`
		SessionID string `json:"session_id"`
		Seq       uint64 `json:"seq"`
	} `json:"d"`
}

func newServer(t *testing.T, f fault) *server {
	s := &server{
		t: t, fault: f, random: rand.New(rand.NewPCG(1, 2)), number: 2, next: 500,
		answers: map[string][]uint64{}, bases: map[string]uint64{}, conns: map[*peer]bool{}, onEvent: func(int) {},
	}
	s.grown = sync.NewCond(&s.mu)
	mux := http.NewServeMux()
	base := "/g/" + testGuild + "/"
	mux.HandleFunc("GET "+base+"{$}", s.gateway)
	mux.HandleFunc("POST "+base+"api/v10/guilds/"+testGuild+"/events", s.events)
	mux.HandleFunc("GET "+base+"api/v10/guilds/"+testGuild+"/channels", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, testChannels)
	})
	mux.HandleFunc("POST "+base+"api/v10/channels/31/messages", s.messages)
	s.http = httptest.NewServer(mux)
	t.Cleanup(s.close)
	return s
}

const testChannels = `[{"id":"30","type":4,"name":"area"},{"id":"31","type":0,"name":"general"}]`

func (s *server) url() string {
	return strings.Replace(s.http.URL, "http", "ws", 1) + "/g/" + testGuild + "/"
}

func (s *server) close() {
	s.mu.Lock()
	for p := range s.conns {
		p.conn.Close()
	}
	s.mu.Unlock()
	s.wait.Wait()
	s.http.Close()
}

// append adds records, with a hole or a record of another kind before some. s.mu is held.
func (s *server) append(kind string, bodies ...string) (numbers []uint64) {
	for _, body := range bodies {
		s.number++
		switch s.random.IntN(60) {
		case 0:
			s.number++ // filtered
		case 1:
			s.log = append(s.log, entry{s.number, "CHANNEL_UPDATE", `{"id":"31","type":0}`})
			s.number++
		}
		s.log = append(s.log, entry{s.number, kind, body})
		numbers = append(numbers, s.number)
	}
	s.grown.Broadcast()
	s.onEvent(len(s.log))
	return numbers
}

func (s *server) events(w http.ResponseWriter, r *http.Request) {
	var single struct {
		T      string          `json:"t"`
		D      json.RawMessage `json:"d"`
		Events []struct {
			T string          `json:"t"`
			D json.RawMessage `json:"d"`
		} `json:"events"`
	}
	if err := json.NewDecoder(r.Body).Decode(&single); err != nil || !strings.HasPrefix(r.Header.Get("Authorization"), "Bot good") {
		http.Error(w, "no", http.StatusForbidden)
		return
	}
	bodies := []string{string(single.D)}
	if single.Events != nil {
		bodies = nil
		for _, e := range single.Events {
			single.T = e.T
			bodies = append(bodies, string(e.D))
		}
	}
	s.mu.Lock()
	s.requests++
	if s.rough && s.requests%37 == 0 {
		s.mu.Unlock()
		w.Header().Set("Retry-After", "0.01")
		http.Error(w, "not now", http.StatusServiceUnavailable)
		return
	}
	key := r.Header.Get("Idempotency-Key")
	numbers, ok := s.answers[key]
	if !ok {
		numbers = s.append(single.T, bodies...)
		s.answers[key] = numbers
	}
	if ok && s.fault == faultAnswer && s.requests%100 == 0 {
		numbers = []uint64{numbers[0] + 1}
		s.faults++
	}
	if !ok && s.fault == faultRefused && s.requests%100 == 0 {
		s.faults++
		s.mu.Unlock()
		http.Error(w, "not now", http.StatusServiceUnavailable)
		return
	}
	broken := s.rough && s.requests%41 == 0
	if s.crash > 0 && s.requests%s.crash == 0 {
		s.crashed()
		broken = true
	}
	s.mu.Unlock()
	if broken {
		panic(http.ErrAbortHandler)
	}
	answer := map[string]any{"s": numbers[0]}
	if single.Events != nil {
		var events []map[string]uint64
		for _, n := range numbers {
			events = append(events, map[string]uint64{"s": n})
		}
		answer["events"] = events
	}
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		s.t.Error(err)
	}
}

// crashed is what a crash leaves: no connections, and no more than the fault allows. s.mu is held.
func (s *server) crashed() {
	for p := range s.conns {
		p.conn.Close()
	}
	switch s.fault {
	case faultSessions:
		clear(s.bases)
	case faultTail:
		s.log = s.log[:len(s.log)-5]
		s.number = s.log[len(s.log)-1].number
	case faultKeys:
		clear(s.answers)
	default:
		return
	}
	s.faults++
}

func (s *server) messages(w http.ResponseWriter, r *http.Request) {
	var message map[string]any
	if err := json.NewDecoder(r.Body).Decode(&message); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	message["id"], message["channel_id"] = "77", "31"
	b, _ := json.Marshal(message)
	s.mu.Lock()
	s.append("MESSAGE_CREATE", string(b))
	s.mu.Unlock()
	w.Write(b)
}

func (s *server) gateway(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("v") != "10" || r.URL.Query().Get("encoding") != "json" {
		http.Error(w, "no such version", http.StatusBadRequest)
		return
	}
	upgrader := websocket.Upgrader{}
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	p := &peer{conn: conn, auth: make(chan inbound, 1)}
	s.mu.Lock()
	s.conns[p] = true
	s.wait.Add(2)
	s.mu.Unlock()
	defer s.wait.Done()
	defer conn.Close()
	interval := 45000
	if s.quick {
		interval = 300
	}
	p.send(fmt.Appendf(nil, `{"op":10,"s":null,"t":null,"d":{"heartbeat_interval":%d}}`, interval))
	go s.read(p)
	for s.session(p) {
		p.send([]byte(`{"op":9,"d":false,"s":null,"t":null}`))
	}
}

func (p *peer) send(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.conn.WriteMessage(websocket.TextMessage, b)
}

// read takes what the client sends, until the connection ends.
func (s *server) read(p *peer) {
	defer s.wait.Done()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, p)
		p.closed = true
		close(p.auth)
		s.grown.Broadcast()
	}()
	for {
		_, b, err := p.conn.ReadMessage()
		if err != nil {
			return
		}
		if bytes.HasPrefix(b, []byte(`{"op":1,`)) {
			s.mu.Lock()
			s.beats++
			deaf := s.deaf >= s.beats
			s.mu.Unlock()
			if !deaf {
				p.send([]byte(`{"op":11}`))
			}
			continue
		}
		var in inbound
		if err := json.Unmarshal(b, &in); err != nil {
			s.t.Errorf("client sent %q: %v", b, err)
			return
		}
		p.auth <- in
	}
}

// session serves one session; it comes back with true to invalidate it.
func (s *server) session(p *peer) bool {
	in, ok := <-p.auth
	if !ok {
		return false
	}
	if !strings.HasPrefix(in.D.Token, "good") {
		_ = p.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(4004, "no"), time.Now().Add(time.Second))
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	cursor := len(s.log)
	position := s.number
	id := in.D.SessionID
	base, known := s.bases[id]
	switch {
	case in.Op == 6 && !known:
		return true
	case in.Op == 6 && in.D.Seq > s.number:
		_ = p.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(4007, "no"), time.Now().Add(time.Second))
		return false
	case in.Op == 6 && in.D.Seq >= base:
		position = in.D.Seq
		cursor = 0
		for cursor < len(s.log) && s.log[cursor].number <= position {
			cursor++
		}
		shift := uint64(0)
		if s.fault == faultNumber {
			shift = 1
			s.faults++
		}
		for ; cursor < len(s.log); cursor++ {
			position = s.log[cursor].number
			s.out(p, s.log[cursor].frame(position+shift))
		}
		s.out(p, fmt.Appendf(nil, `{"op":0,"t":"RESUMED","s":%d,"d":{}}`, position+shift))
	default:
		if in.Op == 2 {
			s.identified++
			id = "session-" + strconv.Itoa(s.identified)
			s.out(p, fmt.Appendf(nil, `{"op":0,"t":"READY","s":%d,"d":{"v":10,"session_id":%q,"resume_gateway_url":%q,"guilds":[{"id":%q,"unavailable":true}]}}`,
				position-1, id, s.url(), testGuild))
		}
		s.bases[id] = position
		s.out(p, fmt.Appendf(nil, `{"op":0,"t":"GUILD_CREATE","s":%d,"d":{"id":%q,"name":"test","channels":%s}}`, position, testGuild, testChannels))
	}
	for {
		for cursor == len(s.log) && !p.closed {
			s.grown.Wait()
		}
		if p.closed {
			return false
		}
		s.deliveries++
		if s.rough {
			switch {
			case s.deliveries%2003 == 0:
				s.out(p, []byte(`{"op":7,"d":null,"s":null,"t":null}`))
			case s.deliveries%5003 == 0:
				delete(s.bases, id)
				return true
			case s.deliveries%101 == 0:
				s.out(p, fmt.Appendf(nil, `{"op":0,"t":"TYPING_START","s":%d,"d":{"user_id":"1"}}`, position))
			}
		}
		e := s.log[cursor]
		b := e.frame(e.number)
		if s.deliveries >= s.next && e.kind == "MESSAGE_CREATE" && s.spoil(p, cursor, b) {
			s.next += 1000
			s.faults++
			if s.fault == faultSwap {
				cursor++
			}
		} else {
			s.out(p, b)
		}
		position = s.log[cursor].number
		cursor++
	}
}

// spoil delivers a record wrongly; false when this fault is not possible now.
func (s *server) spoil(p *peer, cursor int, b []byte) bool {
	switch s.fault {
	case faultDrop:
		return true
	case faultDouble:
		s.out(p, b)
		s.out(p, b)
		return true
	case faultSwap:
		if cursor+1 == len(s.log) {
			return false
		}
		e := s.log[cursor+1]
		s.out(p, e.frame(e.number))
		s.out(p, b)
		return true
	case faultCorrupt:
		i := bytes.Index(b, []byte(magic)) + len(magic) + s.random.IntN(60)
		b[i] ^= 1
		s.out(p, b)
		return true
	}
	return false
}

// out sends with s.mu unlocked meanwhile.
func (s *server) out(p *peer, b []byte) {
	s.mu.Unlock()
	defer s.mu.Lock()
	p.send(b)
}
