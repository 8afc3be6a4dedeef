//go:build !unix

package fanout

import "errors"

// nonblocking: sockets are only written to with writes that wait.
const nonblocking = false

var writeOnce = func(uintptr, []byte) (n int, again bool, err error) {
	return 0, false, errors.ErrUnsupported
}
