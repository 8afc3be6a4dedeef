//go:build unix && !linux

package fanout

import (
	"io"
	"syscall"
)

const nonblocking = true

// writeOnce writes to a socket what it takes now. again: it takes nothing. Tests replace it.
var writeOnce = func(fd uintptr, p []byte) (n int, again bool, err error) {
	for {
		n, err := syscall.Write(int(fd), p)
		switch {
		case err == syscall.EINTR:
		case err == syscall.EAGAIN:
			return 0, true, nil
		case err != nil:
			return 0, false, err
		case n == 0 && len(p) > 0:
			return 0, false, io.ErrUnexpectedEOF
		default:
			return n, false, nil
		}
	}
}
