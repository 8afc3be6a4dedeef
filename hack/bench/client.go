package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// window is how many events are under way at most: published, and not yet received by every session.
	window = 32
	// payloadSize is that of an event, a JSON object, unless a system has its own.
	payloadSize = 256
	// marker is in every event and in nothing else; its number and the time follow it, 16 hexadecimal digits each.
	marker = `"bench":"`

	sourceAddresses = 64
	dialers         = 64
	readBuffer      = 256 << 10
	drainTime       = 30 * time.Second
	beatPeriod      = 40 * time.Second
)

// clientConfig is the first line that a client process is told.
type clientConfig struct {
	System    string `json:"system"`
	Sessions  int    `json:"sessions"`
	Address   string `json:"address"`             // of the server
	Publisher string `json:"publisher,omitempty"` // where events go; empty: Address, by REST
	Key       string `json:"key,omitempty"`       // for tokens
	Guild     int    `json:"guild,omitempty"`     // id of the first one; 0: none
	Guilds    int    `json:"guilds"`              // ids from Guild on; sessions and events go round them, one session each if several
	Payload   int    `json:"payload"`             // bytes of an event
	Follow    bool   `json:"follow,omitempty"`    // another process publishes
}

// phase is each further line: publish for so long, then wait until all has arrived.
type phase struct {
	Rate   float64       `json:"rate"` // events per second; 0: as the window allows
	Length time.Duration `json:"length"`
	// Stuck sessions, the last ones, read nothing from now on. Those that were stuck and are so no
	// longer first receive all that they missed.
	Stuck int `json:"stuck"`
	// Cut: instead, cut all connections and come back. An event that is published meanwhile has to
	// reach every session that resumes. Before it there was no event.
	Cut bool `json:"cut"`
	// Follow: instead, receive what another process publishes, up to that event, within Length.
	Follow uint64 `json:"follow,omitempty"`
}

// answer is what a client process says to each line.
type answer struct {
	Error      string  `json:"error,omitempty"`
	Deliveries int     `json:"deliveries"`
	Bytes      int     `json:"bytes"`   // received
	Seconds    float64 `json:"seconds"` // from the first publish to the last receipt, or until all are connected
	P50        float64 `json:"p50"`     // milliseconds from publish to receipt
	P99        float64 `json:"p99"`
}

// clientCommand is the process of sessions and publisher.
func clientCommand(in io.Reader, out io.Writer) error {
	// All work is one thread's, which allocates next to nothing.
	debug.SetGCPercent(1000)
	runtime.LockOSThread()
	lines := bufio.NewReader(in)
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return err
	}
	c := &client{buffer: make([]byte, readBuffer)}
	if err := json.Unmarshal(line, &c.config); err != nil {
		return err
	}
	encoder := json.NewEncoder(out)
	connected, err := c.start()
	if err != nil {
		return errors.Join(err, encoder.Encode(answer{Error: err.Error()}))
	}
	if err := encoder.Encode(connected); err != nil {
		return err
	}
	phases := make(chan phase)
	go func() {
		for {
			line, err := lines.ReadBytes('\n')
			if err != nil {
				os.Exit(0) // the parent has all it wants, or is gone
			}
			var p phase
			if err := json.Unmarshal(line, &p); err != nil {
				os.Exit(1)
			}
			phases <- p
		}
	}()
	for {
		select {
		case p := <-phases:
			do := c.run
			switch {
			case p.Cut:
				do = c.cut
			case p.Follow > 0:
				do = c.follow
			}
			a, err := do(p)
			if err != nil {
				a.Error = err.Error()
			}
			if err := encoder.Encode(a); err != nil {
				return err
			}
		default:
			if err := c.step(20 * time.Millisecond); err != nil {
				return errors.Join(err, encoder.Encode(answer{Error: err.Error()}))
			}
		}
	}
}

// client is all sessions of a run, and the publisher.
type client struct {
	config  clientConfig
	dialect dialect
	epoll   int
	// sessions by number; the publisher's connection has the number after the last.
	sessions  []session
	readers   int // the first so many read and are counted; the others are stuck
	publisher int
	outgoing  []byte
	buffer    []byte
	events    [512]unix.EpollEvent

	published, done uint64 // events published, and received by all
	received        [window]int
	followed        int // events received that another process has published
	bytes           int
	latency         histogram

	beat     []byte
	beats    int
	nextBeat time.Time
}

// session is a connection: what it expects next, and the part of a frame that came so far.
type session struct {
	fd   int
	next uint64
	rest []byte
	id   string // for a resume, with the number of the last dispatch
	last uint64
}

// The machine's monotonic clock, which all processes share, at a time that is cheap to measure from.
var start, startClock = time.Now(), func() uint64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err)
	}
	return uint64(t.Nano()) //nolint:gosec // not negative
}()

// clock is nanoseconds that all processes agree on.
func clock() uint64 { return startClock + uint64(time.Since(start)) } //nolint:gosec // not negative

func (c *client) start() (answer, error) {
	s, err := systemNamed(c.config.System)
	if err != nil {
		return answer{}, err
	}
	c.dialect = s.dialect
	if c.dialect.heartbeat != "" {
		c.beat = maskedFrame(0x1, []byte(c.dialect.heartbeat))
	}
	if c.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return answer{}, err
	}
	c.sessions = make([]session, c.config.Sessions)
	c.readers = len(c.sessions)
	for i := range c.sessions {
		c.sessions[i].next = uint64(1 + i%c.config.Guilds) //nolint:gosec // not negative
	}
	if c.config.Follow {
		return c.connect(c.dialect.steps)
	}
	to := c.config.Publisher
	if to == "" {
		to = c.config.Address
	}
	address, err := socketAddress(to)
	if err != nil {
		return answer{}, err
	}
	if c.publisher, err = dial(len(c.sessions), address); err != nil {
		return answer{}, err
	}
	if err := c.watch(len(c.sessions), c.publisher); err != nil {
		return answer{}, err
	}
	return c.connect(c.dialect.steps)
}

// connect brings all sessions to where they receive events.
func (c *client) connect(steps []step) (answer, error) {
	began := time.Now()
	server, err := socketAddress(c.config.Address)
	if err != nil {
		return answer{}, err
	}
	var turn atomic.Int64
	var failure atomic.Pointer[error]
	var group sync.WaitGroup
	for range dialers {
		group.Go(func() {
			for failure.Load() == nil {
				i := int(turn.Add(1)) - 1
				if i >= len(c.sessions) {
					return
				}
				if err := c.open(i, server, steps); err != nil {
					err = fmt.Errorf("session %d of %d: %w", i, len(c.sessions), err)
					failure.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	group.Wait()
	if err := failure.Load(); err != nil {
		return answer{}, *err
	}
	seconds := time.Since(began).Seconds()
	for i := range c.sessions {
		s := &c.sessions[i]
		if err := errors.Join(c.take(i, s.rest), c.watch(i, s.fd)); err != nil {
			return answer{}, err
		}
	}
	c.nextBeat = time.Now()
	return answer{Seconds: seconds}, nil
}

// watch tells epoll of the connection with number i, which does not block from now on.
func (c *client) watch(i, fd int) error {
	return errors.Join(unix.SetNonblock(fd, true),
		unix.EpollCtl(c.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)})) //nolint:gosec // small
}

func socketAddress(address string) (*unix.SockaddrInet4, error) {
	a, err := net.ResolveTCPAddr("tcp4", address)
	if err != nil {
		return nil, err
	}
	return &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(a.IP.To4())}, nil
}

// dial opens a connection from an address of the i-th client's own.
func dial(i int, to *unix.SockaddrInet4) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	patience := unix.NsecToTimeval((20 * time.Second).Nanoseconds())
	from := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, byte(2 + i%sourceAddresses)}}
	return fd, errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.Bind(fd, from),
		unix.Connect(fd, to),
	)
}

// open brings session i to where it receives events. What it received already is in its rest.
func (c *client) open(i int, server *unix.SockaddrInet4, steps []step) error {
	s := &c.sessions[i]
	s.rest = s.rest[:0]
	var err error
	if s.fd, err = dial(i, server); err != nil {
		return err
	}
	path := c.dialect.path
	if c.config.Guild != 0 {
		path = fmt.Sprintf("/g/%d%s", c.config.Guild+i%c.config.Guilds, path)
	}
	request := "GET " + path + " HTTP/1.1\r\nHost: " + c.config.Address + "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	if _, err := unix.Write(s.fd, []byte(request)); err != nil {
		return err
	}
	var buffer []byte
	more := func() error {
		var b [4096]byte
		n, err := unix.Read(s.fd, b[:])
		if errors.Is(err, unix.EINTR) {
			return nil
		}
		if err != nil || n == 0 {
			return fmt.Errorf("connecting: read %q, then: %w", buffer, errors.Join(err, io.ErrUnexpectedEOF))
		}
		buffer = append(buffer, b[:n]...)
		return nil
	}
	end := -1
	for end < 0 {
		if err := more(); err != nil {
			return err
		}
		end = bytes.Index(buffer, []byte("\r\n\r\n"))
	}
	if !bytes.HasPrefix(buffer, []byte("HTTP/1.1 101 ")) {
		return fmt.Errorf("upgrade refused: %q", buffer)
	}
	buffer = buffer[end+4:]
	for _, step := range steps {
		for found := step.await == ""; !found; {
			_, payload, size := parseFrame(buffer)
			if size == 0 {
				if err := more(); err != nil {
					return err
				}
				continue
			}
			found = bytes.Contains(payload, []byte(step.await))
			if bytes.Contains(payload, markerBytes) {
				s.rest = append(s.rest, buffer[:size]...)
			}
			if c.dialect.resume != nil {
				s.note(payload)
			}
			buffer = buffer[size:]
		}
		if step.send != nil {
			if _, err := unix.Write(s.fd, maskedFrame(0x1, []byte(step.send(c, i)))); err != nil {
				return err
			}
		}
	}
	s.rest = append(s.rest, buffer...)
	return nil
}

// note keeps what a resume will need.
func (s *session) note(payload []byte) {
	var m struct {
		Seq  uint64 `json:"s"`
		Data struct {
			SessionID string `json:"session_id"`
		} `json:"d"`
	}
	if json.Unmarshal(payload, &m) == nil && m.Seq > 0 {
		s.last, s.id = m.Seq, cmp.Or(m.Data.SessionID, s.id)
	}
}

// cut cuts all connections and comes back.
func (c *client) cut(phase) (answer, error) {
	for i := range c.sessions {
		unix.Close(c.sessions[i].fd)
	}
	steps := c.dialect.steps
	if c.dialect.resume != nil {
		steps = c.dialect.resume
		c.compose()
		if err := c.send(); err != nil {
			return answer{}, err
		}
	}
	a, err := c.connect(steps)
	if err != nil {
		return a, err
	}
	return a, c.stepUntil(func() bool { return c.done == c.published })
}

// stick has all sessions but the first n read nothing. Those below n that were stuck receive what they missed.
func (c *client) stick(n int) error {
	for i := n; i < c.readers; i++ {
		if err := unix.EpollCtl(c.epoll, unix.EPOLL_CTL_DEL, c.sessions[i].fd, nil); err != nil {
			return err
		}
	}
	for i := c.readers; i < n; i++ {
		if err := c.watch(i, c.sessions[i].fd); err != nil {
			return err
		}
	}
	for i := c.readers; i < n; i++ {
		if err := c.stepUntil(func() bool { return c.sessions[i].next > c.published }); err != nil {
			return err
		}
	}
	c.readers = n
	return nil
}

// stepUntil takes what arrives until ready, when no more is published.
func (c *client) stepUntil(ready func() bool) error {
	for end := time.Now().Add(drainTime); !ready(); {
		if time.Now().After(end) {
			return fmt.Errorf("events up to %d have not reached every session within %s", c.published, drainTime)
		}
		if err := c.step(20 * time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// follow receives what another process publishes.
func (c *client) follow(p phase) (answer, error) {
	c.latency, c.bytes = histogram{}, 0
	began, first := time.Now(), c.followed
	want := int(p.Follow) * len(c.sessions) //nolint:gosec // small
	for c.followed < want {
		if time.Since(began) > p.Length {
			return answer{}, fmt.Errorf("%d of %d deliveries are missing after %s", want-c.followed, want, p.Length)
		}
		if err := c.step(100 * time.Millisecond); err != nil {
			return answer{}, err
		}
	}
	return answer{
		Deliveries: c.followed - first, Bytes: c.bytes, Seconds: time.Since(began).Seconds(),
		P50: c.latency.quantile(0.5), P99: c.latency.quantile(0.99),
	}, nil
}

// run carries out a phase.
func (c *client) run(p phase) (answer, error) {
	if err := c.stick(len(c.sessions) - p.Stuck); err != nil {
		return answer{}, err
	}
	c.latency, c.bytes = histogram{}, 0
	began := time.Now()
	end := began.Add(p.Length)
	first := c.published
	due := began
	finished := false
	for {
		now := time.Now()
		wait := 100 * time.Millisecond
		switch {
		case now.Before(end):
			for c.published-c.done < window && (p.Rate == 0 || !now.Before(due)) {
				c.compose()
				if p.Rate > 0 {
					due = due.Add(time.Duration(float64(time.Second) / p.Rate))
				}
			}
			if p.Rate > 0 {
				wait = max(min(due.Sub(now), wait), 0)
			}
		case c.published == c.done:
			deliveries := int(c.published-first) * c.receivers() //nolint:gosec // small
			return answer{
				Deliveries: deliveries, Bytes: c.bytes, Seconds: now.Sub(began).Seconds(),
				P50: c.latency.quantile(0.5), P99: c.latency.quantile(0.99),
			}, nil
		case !finished:
			finished = true
			if c.config.Publisher != "" {
				c.outgoing = append(c.outgoing, 0, 0, 0, 0)
			}
		case now.After(end.Add(drainTime)):
			return answer{}, fmt.Errorf("event %d of %d has not reached every session within %s", c.done+1, c.published, drainTime)
		}
		if err := c.send(); err != nil {
			return answer{}, err
		}
		if err := c.step(wait); err != nil {
			return answer{}, err
		}
	}
}

// receivers is how many sessions an event goes to.
func (c *client) receivers() int { return c.readers / c.config.Guilds }

var padding = bytes.Repeat([]byte("x"), 2*payloadSize)

// compose adds the next event to what goes to the server.
func (c *client) compose() {
	c.published++
	var event [2 * payloadSize]byte
	b := appendEvent(event[:0], c.published, c.config.Payload)
	if c.config.Publisher == "" {
		c.outgoing = appendPublish(c.outgoing, &c.config, int(c.published-1)%c.config.Guilds, b) //nolint:gosec // small
		return
	}
	c.outgoing = binary.BigEndian.AppendUint32(c.outgoing, uint32(len(b))) //nolint:gosec // small
	c.outgoing = append(c.outgoing, b...)
}

// appendEvent adds an event of so many bytes, published now.
func appendEvent(b []byte, number uint64, size int) []byte {
	const head, mid, tail = "{" + marker, `","pad":"`, `"}`
	b = append(b, head...)
	b = appendHex(b, number)
	b = appendHex(b, clock())
	b = append(b, mid...)
	b = append(b, padding[:size-len(b)-len(tail)]...)
	return append(b, tail...)
}

func (c *client) send() error {
	for len(c.outgoing) > 0 {
		n, err := unix.Write(c.publisher, c.outgoing)
		switch {
		case errors.Is(err, unix.EAGAIN):
			unix.Poll([]unix.PollFd{{Fd: int32(c.publisher), Events: unix.POLLOUT}}, 1000) //nolint:errcheck,gosec // tried again anyhow
		case err != nil:
			return fmt.Errorf("publishing: %w", err)
		default:
			c.outgoing = c.outgoing[n:]
		}
	}
	c.outgoing = c.outgoing[:0]
	return nil
}

// step takes what has arrived, or waits for it.
func (c *client) step(wait time.Duration) error {
	n, err := unix.EpollWait(c.epoll, c.events[:], int(wait.Milliseconds()))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return err
	}
	for _, e := range c.events[:max(n, 0)] {
		if int(e.Fd) == len(c.sessions) {
			err = c.readPublisher()
		} else {
			err = c.read(int(e.Fd))
		}
		if err != nil {
			return err
		}
	}
	if c.beat == nil {
		return nil
	}
	for now := time.Now(); !now.Before(c.nextBeat); c.beats++ {
		c.nextBeat = c.nextBeat.Add(beatPeriod / time.Duration(len(c.sessions)))
		if _, err := unix.Write(c.sessions[c.beats%len(c.sessions)].fd, c.beat); err != nil {
			return fmt.Errorf("heartbeat: %w", err)
		}
	}
	return nil
}

// readPublisher sees to it that no publish call is refused.
func (c *client) readPublisher() error {
	n, err := unix.Read(c.publisher, c.buffer)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil || n == 0:
		return fmt.Errorf("the publisher's connection has ended: %w", errors.Join(err, io.EOF))
	}
	// An answer that is read in two parts can escape this; its event is missing then.
	ok, all := bytes.Count(c.buffer[:n], []byte("HTTP/1.1 200")), bytes.Count(c.buffer[:n], []byte("HTTP/1.1 "))
	if ok < all {
		return fmt.Errorf("publish refused: %q", c.buffer[:min(n, 2000)])
	}
	return nil
}

func (c *client) read(i int) error {
	s := &c.sessions[i]
	kept := copy(c.buffer, s.rest)
	// The socket does not block, so the scheduler need not know of the call.
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(s.fd), uintptr(unsafe.Pointer(&c.buffer[kept])), uintptr(len(c.buffer)-kept))
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return nil
	case errno != 0:
		return fmt.Errorf("session %d has ended: %w", i, errno)
	case n == 0:
		return fmt.Errorf("session %d has ended: %w", i, io.EOF)
	}
	c.bytes += int(n)                        //nolint:gosec // small
	return c.take(i, c.buffer[:kept+int(n)]) //nolint:gosec // small
}

// take takes the frames of session i off b, and keeps the rest.
func (c *client) take(i int, b []byte) error {
	s := &c.sessions[i]
	now := clock()
	for {
		opcode, payload, size := parseFrame(b)
		if size == 0 {
			break
		}
		b = b[size:]
		switch opcode {
		case 0x1, 0x2:
			if err := c.message(i, payload, now); err != nil {
				return fmt.Errorf("session %d: %w", i, err)
			}
		case 0x8:
			return fmt.Errorf("session %d was closed: %q", i, payload)
		case 0x9:
			if _, err := unix.Write(s.fd, maskedFrame(0xa, payload)); err != nil {
				return err
			}
		}
	}
	s.rest = append(s.rest[:0], b...)
	return nil
}

var markerBytes = []byte(marker)

// message checks the events of a message, of which there may be several, or none.
func (c *client) message(i int, payload []byte, now uint64) error {
	s := &c.sessions[i]
	for {
		at := bytes.Index(payload, markerBytes)
		if at < 0 {
			return nil
		}
		if payload = payload[at+len(marker):]; len(payload) < 32 {
			return fmt.Errorf("event cut off: %q", payload)
		}
		seq, sent := parseHex(payload[:16]), parseHex(payload[16:32])
		if seq != s.next || seq > c.published && !c.config.Follow {
			return fmt.Errorf("expected event %d of %d, got %d", s.next, c.published, seq)
		}
		s.next += uint64(c.config.Guilds) //nolint:gosec // not negative
		if i >= c.readers {
			continue
		}
		c.latency.add(now - sent)
		if c.config.Follow {
			c.followed++
			continue
		}
		count := &c.received[seq%window]
		if *count++; *count == c.receivers() {
			*count = 0
			c.done++
		}
	}
}

// parseFrame takes the first frame off b; size is 0 when it is not there in full.
func parseFrame(b []byte) (opcode byte, payload []byte, size int) {
	if len(b) < 2 {
		return 0, nil, 0
	}
	head, n := 2, int(b[1])
	switch {
	case n == 126 && len(b) >= 4:
		head, n = 4, int(binary.BigEndian.Uint16(b[2:]))
	case n == 127 && len(b) >= 10:
		head, n = 10, int(binary.BigEndian.Uint64(b[2:])) //nolint:gosec // the server is ours
	case n >= 126:
		return 0, nil, 0
	}
	if len(b) < head+n {
		return 0, nil, 0
	}
	return b[0] & 0xf, b[head : head+n], head + n
}

// maskedFrame is a client's frame, with a mask of zeros.
func maskedFrame(opcode byte, payload []byte) []byte {
	b := []byte{0x80 | opcode}
	if len(payload) < 126 {
		b = append(b, 0x80|byte(len(payload)))
	} else {
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(len(payload))) //nolint:gosec // small
	}
	return append(append(b, 0, 0, 0, 0), payload...)
}

func appendHex(b []byte, v uint64) []byte {
	const digits = "0123456789abcdef"
	for shift := 60; shift >= 0; shift -= 4 {
		b = append(b, digits[v>>shift&0xf])
	}
	return b
}

func parseHex(b []byte) (v uint64) {
	for _, d := range b {
		if d -= '0'; d > 9 {
			d -= 'a' - '0' - 10
		}
		v = v<<4 | uint64(d&0xf)
	}
	return v
}
