//go:build !linux

package poll

import "net"

// Listen returns ln: here Go's runtime watches all connections.
func Listen(ln *net.TCPListener) (net.Listener, error) { return ln, nil }
