package main

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // RFC 6455 says so
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/textproto"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// serveFloor is the least that a server can do: one finished frame, and one write(2) for each
// session, in turn. With k above 1 it waits for k events and writes their frames at once; a k between
// two whole numbers is both of them by turns, so that it is the mean. It has no goroutine and no state
// per session but the descriptor.
func serveFloor(k float64) func(*endpoints) error {
	return func(e *endpoints) error {
		f := &floor{}
		go func() {
			fmt.Fprintln(os.Stderr, f.accept(e))
			os.Exit(1)
		}()
		var frames []byte
		waiting, batch := 0, 1
		return e.published(func(payload []byte) {
			if payload != nil {
				frames = append(append(frames, frameHeader(len(payload))...), payload...)
				waiting++
			}
			if waiting == batchSize(k, batch) || payload == nil && waiting > 0 {
				f.deliver(frames)
				frames, waiting = frames[:0], 0
				batch++
			}
		})
	}
}

// batchSize is the number of events in the n-th batch, from 1 on.
func batchSize(k float64, n int) int { return int(float64(n)*k) - int(float64(n-1)*k) }

type floor struct {
	mu  sync.Mutex
	fds []int
}

func (f *floor) deliver(b []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fd := range f.fds {
		for rest := b; len(rest) > 0; {
			// The socket does not block, so the scheduler need not know of the call.
			n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&rest[0])), uintptr(len(rest)))
			switch errno {
			case 0:
				rest = rest[n:]
			case unix.EAGAIN:
				unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 1000) //nolint:errcheck // tried again anyhow
			case unix.EINTR:
			default: // the client has gone
				rest = nil
			}
		}
	}
}

// accept upgrades connections, one after another. Nobody reads from them any more: the clients say nothing.
func (f *floor) accept(e *endpoints) error {
	file, err := e.sessions.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		return err
	}
	defer file.Close()
	listener := int(file.Fd()) // blocking from here on
	buffer := make([]byte, 4096)
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if err := upgrade(fd, buffer); err != nil {
			return err
		}
		f.mu.Lock()
		f.fds = append(f.fds, fd)
		f.mu.Unlock()
	}
}

// upgrade reads the request and answers it (RFC 6455, section 4.2.2).
func upgrade(fd int, buffer []byte) error {
	n := 0
	for !bytes.Contains(buffer[:n], []byte("\r\n\r\n")) {
		if n == len(buffer) {
			return errors.New("request too large")
		}
		m, err := unix.Read(fd, buffer[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || m == 0 {
			return fmt.Errorf("reading the request: %w", errors.Join(err, errors.New("no upgrade")))
		}
		n += m
	}
	key := ""
	for line := range bytes.Lines(buffer[:n]) {
		if name, value, ok := bytes.Cut(line, []byte(":")); ok && textproto.CanonicalMIMEHeaderKey(string(name)) == "Sec-Websocket-Key" {
			key = string(bytes.TrimSpace(value))
		}
	}
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // RFC 6455 says so
	answer := "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " +
		base64.StdEncoding.EncodeToString(sum[:]) + "\r\n\r\n"
	if _, err := unix.Write(fd, []byte(answer)); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	return unix.SetNonblock(fd, true)
}

// frameHeader is that of a final, unmasked text frame with n bytes of payload.
func frameHeader(n int) []byte {
	if n < 126 {
		return []byte{0x81, byte(n)}
	}
	return binary.BigEndian.AppendUint16([]byte{0x81, 126}, uint16(n)) //nolint:gosec // events are below 64 KiB
}
