package poll

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
)

// Poller watches sockets for something to read. Make one with New.
//
// Invariants:
//   - a socket stays the connection's own: its descriptor is watched, not duplicated, and closing
//     the connection ends the watch;
//   - a Handle's function is called once for Add and once for each Arm, in a goroutine that nothing else
//     waits for;
//   - an event of a descriptor that was closed and given to another connection meanwhile is not taken
//     for that one's: events carry the Handle's number, which is never used twice.
type Poller struct {
	file  *os.File // the epoll descriptor, itself polled by Go's runtime
	raw   syscall.RawConn
	done  chan struct{}
	turns chan *Handle // to a goroutine that has served others
	spare atomic.Int32 // of those
	mutex sync.Mutex
	next  uint64
	byID  map[uint64]*Handle
}

// maxSpare bounds the goroutines that wait for another Handle: their stacks have grown to what the functions
// take, which costs more than to start a goroutine.
const maxSpare = 16

// Handle is a watched connection.
type Handle struct {
	poller *Poller
	raw    syscall.RawConn
	id     uint64
	ready  func()
}

// New starts a Poller.
func New() (*Poller, error) {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("poll: %w", err)
	}
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("poll: %w", err)
	}
	p := &Poller{file: os.NewFile(uintptr(fd), "epoll"), done: make(chan struct{}), turns: make(chan *Handle), byID: map[uint64]*Handle{}}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		return nil, fmt.Errorf("poll: %w", err)
	}
	go p.run()
	return p, nil
}

// Close ends the Poller. Connections stay open, and are not told any more.
func (p *Poller) Close() error {
	err := p.file.Close()
	<-p.done
	return err
}

// Add watches a connection; ready is called when there is something to read, or the peer has
// closed, once, and again after each Arm. It may be called before Add returns. Add fails with ErrUnsupported for a connection that is not a socket.
func (p *Poller) Add(conn net.Conn, ready func()) (*Handle, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil, ErrUnsupported
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("poll: %w", err)
	}
	h := &Handle{poller: p, raw: raw, ready: ready}
	p.mutex.Lock()
	p.next++
	h.id = p.next
	p.byID[h.id] = h
	p.mutex.Unlock()
	if err := h.control(syscall.EPOLL_CTL_ADD); err != nil {
		h.Remove()
		return nil, err
	}
	return h, nil
}

// Arm asks for the next event. What can be read already is an event.
func (h *Handle) Arm() error {
	return h.control(syscall.EPOLL_CTL_MOD)
}

// Remove forgets a connection that is closed or about to be.
func (h *Handle) Remove() {
	h.poller.mutex.Lock()
	defer h.poller.mutex.Unlock()
	delete(h.poller.byID, h.id)
}

func (h *Handle) control(op int) error {
	var ctl, epoll error
	err := h.raw.Control(func(fd uintptr) {
		event := syscall.EpollEvent{Events: syscall.EPOLLIN | syscall.EPOLLRDHUP | syscall.EPOLLONESHOT, Fd: int32(h.id), Pad: int32(h.id >> 32)}
		epoll = h.poller.raw.Control(func(efd uintptr) {
			ctl = syscall.EpollCtl(int(efd), op, int(fd), &event)
		})
	})
	if err = cmp.Or(err, epoll, ctl); err != nil {
		return fmt.Errorf("poll: %w", err)
	}
	return nil
}

func (p *Poller) run() {
	defer close(p.done)
	var events [128]syscall.EpollEvent
	for {
		n := 0
		err := p.raw.Read(func(fd uintptr) bool {
			var err error
			n, err = syscall.EpollWait(int(fd), events[:], 0)
			return err != syscall.EINTR && n != 0
		})
		if err != nil || n < 0 {
			return // closed
		}
		for _, e := range events[:n] {
			p.mutex.Lock()
			h := p.byID[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]
			p.mutex.Unlock()
			if h == nil {
				continue
			}
			select {
			case p.turns <- h:
			default:
				go p.serve(h)
			}
		}
	}
}

// serve calls the functions of a Handle and of those that follow.
func (p *Poller) serve(h *Handle) {
	for {
		h.ready()
		if p.spare.Add(1) > maxSpare {
			p.spare.Add(-1)
			return
		}
		select {
		case h = <-p.turns:
			p.spare.Add(-1)
		case <-p.done:
			return
		}
	}
}

func readNow(conn net.Conn, p []byte) (n int, err error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0, ErrNothing
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var errno error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, errno = syscall.Read(int(fd), p)
			if errno != syscall.EINTR {
				return true
			}
		}
	})
	switch {
	case err != nil:
		return 0, err
	case errno == syscall.EAGAIN:
		return 0, ErrNothing
	case errno != nil:
		return 0, &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", errno)}
	case n == 0 && len(p) > 0:
		return 0, io.EOF
	}
	return n, nil
}
