package main

import (
	"net"
	"sync"
)

// limitListener accepts connections of ln while there are places, which several listeners may share.
// Unlike a wrapper around net.Conn, its connections stay TCP connections to those who look:
// sessions write without blocking, and forwarded bytes are moved by the kernel.
func limitListener(ln net.Listener, places chan struct{}) net.Listener {
	return &limitedListener{Listener: ln, places: places, closed: make(chan struct{})}
}

type limitedListener struct {
	net.Listener
	places chan struct{} // one element per connection
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
	return &limitedConn{TCPConn: conn.(*net.TCPConn), places: l.places}, nil
}

func (l *limitedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitedConn struct {
	*net.TCPConn
	once   sync.Once
	places chan struct{}
}

func (c *limitedConn) Close() error {
	defer c.once.Do(func() { <-c.places })
	return c.TCPConn.Close()
}
