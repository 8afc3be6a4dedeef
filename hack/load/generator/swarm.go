package generator

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"guildhall.dev/guildhall/hack/load/audit"
	"guildhall.dev/guildhall/hack/load/frame"
)

const (
	dialsAtOnce = 128
	beaters     = 4
	beatStep    = 250 * time.Millisecond
	spreadOver  = 64 // loopback addresses
)

// swarm is all clients of a run and what they share.
type swarm struct {
	guild   *guild
	auditor *audit.Auditor
	intents uint64
	runID   uint32
	spread  bool
	observe func(frame.Frame) // sees every frame of every client; may be nil

	dialer  *websocket.Dialer
	dials   chan struct{} // slots for dials at once
	buffers sync.Pool
	clients []*client

	latency      histogram
	away         histogram                 // from the loss of a session's connection to its RESUMED
	disturbed    atomic.Pointer[time.Time] // the latest disturbance; nil: none
	live         atomic.Int64              // clients in a session that has its snapshot
	resumed      atomic.Uint64
	reidentified atomic.Uint64
	channel      atomic.Pointer[string] // first text channel; nil until a GUILD_CREATE came
	lastError    atomic.Pointer[error]  // why a connection ended last
	change       chan struct{}
	failed       func(error) // told of the end of a client that nothing helps

	ctx    context.Context // of all goroutines of the swarm
	cancel context.CancelFunc
	wait   sync.WaitGroup
}

func newSwarm(g *guild, auditor *audit.Auditor, intents uint64, spread bool) *swarm {
	return &swarm{
		guild:   g,
		auditor: auditor,
		intents: intents,
		runID:   rand.Uint32(), //nolint:gosec // tells runs apart
		spread:  spread,
		dialer: &websocket.Dialer{
			HandshakeTimeout: 30 * time.Second,
			TLSClientConfig:  g.tls,
			ReadBufferSize:   2048,
			WriteBufferSize:  512,
			WriteBufferPool:  new(sync.Pool),
		},
		dials:   make(chan struct{}, dialsAtOnce),
		buffers: sync.Pool{New: func() any { b := make([]byte, 0, 2048); return &b }},
		change:  make(chan struct{}, 1),
		failed:  func(error) {},
	}
}

func (s *swarm) fail(err error) { s.failed(err) }

// changed tells whoever waits that a client has become live.
func (s *swarm) changed() {
	select {
	case s.change <- struct{}{}:
	default:
	}
}

// prepare makes the clients; they live as long as ctx.
func (s *swarm) prepare(ctx context.Context, names, tokens []string) {
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.clients = make([]*client, len(tokens))
	for i := range tokens {
		s.clients[i] = &client{swarm: s, index: i, name: names[i], token: tokens[i]}
	}
}

// connect starts the clients, at most rate a second.
func (s *swarm) connect(rate float64) {
	s.wait.Go(func() {
		begin := time.Now()
		for i, c := range s.clients {
			if sleep(s.ctx, time.Until(begin.Add(time.Duration(float64(i)/rate*float64(time.Second))))) != nil {
				return
			}
			s.wait.Go(func() { c.run(s.ctx) })
		}
	})
	for i := range min(beaters, len(s.clients)) {
		s.wait.Go(func() { s.beat(i) })
	}
}

// beat sends the heartbeats of every so manieth client.
func (s *swarm) beat(first int) {
	t := time.NewTicker(beatStep)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case now := <-t.C:
			for i := first; i < len(s.clients); i += beaters {
				s.clients[i].tick(now)
			}
		}
	}
}

// stop lets all clients leave and ends their goroutines.
func (s *swarm) stop() {
	deadline := time.Now().Add(writeTimeout)
	for _, c := range s.clients {
		c.leave(deadline)
	}
	s.cancel()
	s.wait.Wait()
	s.guild.http.CloseIdleConnections()
}

// behind is how many clients are not in a session or did not yet come to a number, and the sum of all their
// last numbers. It asks the audit only where nothing else says no: a client that is busy would keep it waiting.
func (s *swarm) behind(number uint64) (clients int, sum uint64) {
	for _, c := range s.clients {
		session, last := c.session.Load(), c.seq.Load()
		sum += last
		if session == nil || last < number || !c.live.Load() {
			clients++
		} else if pos, _ := session.Position(); pos < number {
			clients++
		}
	}
	return clients, sum
}

// cut breaks a client off at random; false when none is live.
func (s *swarm) cut() bool {
	offset := rand.IntN(len(s.clients)) //nolint:gosec // any will do
	for i := range s.clients {
		if s.clients[(offset+i)%len(s.clients)].cut() {
			return true
		}
	}
	return false
}

// local is the address from which a client dials, nil for any.
func (s *swarm) local(client int, address string) *net.TCPAddr {
	if !s.spread || !loopback(address) {
		return nil
	}
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+client%spreadOver))} //nolint:gosec // small
}

// why is the reason for which connections ended last, in words.
func (s *swarm) why() string {
	if err := s.lastError.Load(); err != nil {
		return fmt.Sprintf("; the last connection ended with: %v", *err)
	}
	return ""
}
