package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// processAttributes are those of the server: it does not outlive its torturer, and Ctrl-C is not for it.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}

// disk is a small file system in memory.
type disk struct{ dir string }

// newDisk mounts one of so many bytes.
func newDisk(dir string, bytes int64) (*disk, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, fmt.Sprintf("size=%d", bytes)); err != nil {
		return nil, fmt.Errorf("mounting a tmpfs, which needs root: %w", err)
	}
	return &disk{dir}, nil
}

func (d *disk) close() error { return syscall.Unmount(d.dir, 0) }

// readOnly makes it read-only, or writable again.
func (d *disk) readOnly(is bool) error {
	flags := uintptr(syscall.MS_REMOUNT | syscall.MS_NOSUID | syscall.MS_NODEV)
	if is {
		flags |= syscall.MS_RDONLY
	}
	return os.NewSyscallError("remount", syscall.Mount("tmpfs", d.dir, "tmpfs", flags, ""))
}

func (d *disk) ballast() string { return filepath.Join(d.dir, "ballast") }

// fill leaves so many bytes free.
func (d *disk) fill(leave int64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &st); err != nil {
		return os.NewSyscallError("statfs", err)
	}
	f, err := os.OpenFile(d.ballast(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	// What the server writes meanwhile can take a part of it.
	for free := int64(st.Bavail)*st.Bsize - leave; free > 0; free = free * 9 / 10 { //nolint:gosec // a size
		err = syscall.Fallocate(int(f.Fd()), 0, 0, free) //nolint:gosec // a descriptor
		if !errors.Is(err, syscall.ENOSPC) {
			return os.NewSyscallError("fallocate", err)
		}
	}
	return nil
}

// drain takes back what fill took.
func (d *disk) drain() error { return os.Remove(d.ballast()) }
