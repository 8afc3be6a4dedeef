package generator

import "syscall"

// bindLate lets the kernel choose the local port when the remote address is known, so that each
// local address has all ports for each remote one.
func bindLate(_, _ string, c syscall.RawConn) error {
	const bindAddressNoPort = 24
	var err error
	if e := c.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, bindAddressNoPort, 1) //nolint:gosec // a descriptor
	}); e != nil {
		return e
	}
	return err
}
