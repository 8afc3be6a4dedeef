//go:build !linux

package poll

import "net"

// Poller cannot be had on this system.
type Poller struct{}

// Handle is a watched connection.
type Handle struct{}

// New fails with ErrUnsupported.
func New() (*Poller, error) { return nil, ErrUnsupported }

// Close does nothing.
func (*Poller) Close() error { return nil }

// Add fails with ErrUnsupported.
func (*Poller) Add(net.Conn, func()) (*Handle, error) { return nil, ErrUnsupported }

// Arm fails with ErrUnsupported.
func (*Handle) Arm() error { return ErrUnsupported }

// Remove does nothing.
func (*Handle) Remove() {}

func readNow(net.Conn, []byte) (int, error) { return 0, ErrNothing }
