package main

import (
	"cmp"
	"context"
	"errors"
	"net"
	"sync"
	"syscall"

	"guildhall.dev/guildhall/shardserver/poll"
)

// places are for the connections that a process may have, one element for each.
type places chan struct{}

// errNoPlace: the process has all connections that it may have.
var errNoPlace = errors.New("no descriptor is left for another connection")

// dial connects if there is a place for the connection.
func (p places) dial(ctx context.Context, d *net.Dialer, network, address string) (net.Conn, error) {
	select {
	case p <- struct{}{}:
	default:
		return nil, errNoPlace
	}
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		<-p
		return nil, err
	}
	return &limitedConn{tcpConn: conn.(tcpConn), places: p}, nil
}

// sendBuffer bounds what the kernel keeps for a slow client, in bytes; Linux takes twice that. If 15,000 clients take nothing
// that is 2 GB, about all that the kernel of a machine with 24 GB gives TCP; a client 0.2 s away is still sent 300 KB in a second.
const sendBuffer = 64 << 10

// listenClients listens for clients. Connections beyond what descriptors allow wait in the kernel's queue: they are held,
// not refused.
func listenClients(address string, places places) (net.Listener, error) {
	var failed error
	config := net.ListenConfig{
		KeepAlive: -1, // heartbeats and the times of requests tell who is gone
		Control: func(_, _ string, raw syscall.RawConn) error { // what connections inherit need not be said for each
			return cmp.Or(raw.Control(func(fd uintptr) {
				failed = cmp.Or(syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, sendBuffer),
					syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1), deferAccept(fd))
			}), failed)
		},
	}
	ln, err := config.Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, err
	}
	if ln, err = poll.Listen(ln.(*net.TCPListener)); err != nil {
		return nil, err
	}
	return limitListener(ln, places), nil
}

// limitListener accepts connections of ln while there are places, which several listeners may share.
// Unlike a wrapper around net.Conn, its connections stay TCP connections to those who look:
// sessions write without blocking.
func limitListener(ln net.Listener, places places) net.Listener {
	return &limitedListener{Listener: ln, places: places, closed: make(chan struct{})}
}

type limitedListener struct {
	net.Listener
	places places
	once   sync.Once
	closed chan struct{}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.places <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.places
		return nil, err
	}
	return &limitedConn{tcpConn: conn.(tcpConn), places: l.places}, nil
}

func (l *limitedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// tcpConn is a TCP connection, as sessions need it: to write without waiting, and to end what is written.
type tcpConn interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

type limitedConn struct {
	tcpConn
	places places
}

// Close implements net.Conn. A connection is closed once, and gives back its place then.
func (c *limitedConn) Close() error {
	err := c.tcpConn.Close()
	if !errors.Is(err, net.ErrClosed) {
		<-c.places
	}
	return err
}
