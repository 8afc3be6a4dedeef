package gateway

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"guildhall.dev/guildhall/shardserver/directory"
)

const dialTimeout = 2 * time.Second

// keepAlive finds out within 8 s that the other pod is gone and its network, too: nobody says so then, and the client
// would wait until it misses a heartbeat.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: time.Second, Count: 3}

var errNotUpgraded = errors.New("gateway: the other pod did not upgrade the connection")

// dial opens a WebSocket connection to the pod that holds a guild. The frames of both sides
// agree, so from here on bytes are copied as they are.
func (g *Gateway) dial(address, request string, deadline time.Time) (net.Conn, error) {
	timeout := min(dialTimeout, time.Until(deadline))
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn, err := g.o.Dial(ctx, &net.Dialer{KeepAliveConfig: keepAlive}, "tcp", address)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(dialTimeout))
	var key [16]byte
	rand.Read(key[:])
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n%s: 1\r\n\r\n",
		request, address, base64.StdEncoding.EncodeToString(key[:]), directory.ForwardedHeader)
	reader := bufio.NewReaderSize(conn, 1024)
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		conn.Close()
		return nil, err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusSwitchingProtocols {
		conn.Close()
		return nil, errNotUpgraded
	}
	conn.SetDeadline(time.Time{})
	if n := reader.Buffered(); n > 0 { // HELLO may have come along
		early, _ := reader.Peek(n)
		return &earlyConn{Conn: conn, early: append([]byte(nil), early...)}, nil
	}
	return conn, nil
}

// earlyConn is a connection of which some bytes have been read already.
type earlyConn struct {
	net.Conn
	early []byte
}

// splice is a pair of connections whose bytes are copied from one to the other.
type splice struct {
	client, holder net.Conn
	once           sync.Once
}

func (s *splice) close() {
	s.once.Do(func() {
		s.client.Close()
		s.holder.Close()
	})
}

// copySize and clientSize are what is copied at a time, to the client and from it.
const copySize, clientSize = 4 << 10, 512

// copyBytes copies until one side ends. Not as io.Copy does, by a pipe in the kernel: that takes two descriptors more for
// each direction, and the bytes are few.
func copyBytes(to, from net.Conn, size int) {
	_, _ = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, size))
}

// splice copies between the client and the pod that holds its guild until one side ends. early is what the client
// has sent already.
func (g *Gateway) splice(client, holder net.Conn, early []byte) {
	s := &splice{client: client, holder: holder}
	g.mu.Lock()
	g.spliced[s] = struct{}{}
	g.mu.Unlock()
	defer func() {
		s.close()
		g.mu.Lock()
		delete(g.spliced, s)
		g.mu.Unlock()
	}()
	if g.quitting() { // Drain may not have seen the splice
		return
	}
	if e, ok := holder.(*earlyConn); ok {
		holder = e.Conn
		if writeEarly(client, e.early) != nil {
			return
		}
	}
	if writeEarly(holder, early) != nil {
		return
	}
	go func() {
		copyBytes(holder, client, clientSize)
		s.close()
	}()
	copyBytes(client, holder, copySize)
}

// writeEarly writes what had been read before the copying began.
func writeEarly(to net.Conn, early []byte) error {
	if len(early) == 0 {
		return nil
	}
	to.SetWriteDeadline(time.Now().Add(dialTimeout))
	defer to.SetWriteDeadline(time.Time{})
	_, err := to.Write(early)
	return err
}
