package main

import (
	"os"
	"syscall"
)

// syncData brings what was written to a file to the disk.
func syncData(f *os.File) error { return syscall.Fdatasync(int(f.Fd())) }
