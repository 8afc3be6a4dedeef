package fanout

import (
	"io"
	"syscall"
	"unsafe"
)

const nonblocking = true

// writeOnce writes to a socket what it takes now. again: it takes nothing. Tests replace it.
//
// The scheduler is not told of the call, which does not block: telling it costs a tenth of a short write.
var writeOnce = func(fd uintptr, p []byte) (n int, again bool, err error) {
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
		switch {
		case errno == syscall.EINTR:
		case errno == syscall.EAGAIN:
			return 0, true, nil
		case errno != 0:
			return 0, false, errno
		case n == 0 && len(p) > 0:
			return 0, false, io.ErrUnexpectedEOF
		default:
			return int(n), false, nil
		}
	}
}
