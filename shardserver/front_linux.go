package main

import "syscall"

// deferAccept has the kernel hold back connections until their first bytes have come, or for a second or so.
func deferAccept(fd uintptr) error {
	return syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, 1)
}
