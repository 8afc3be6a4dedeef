//go:build !linux

package generator

import "syscall"

func bindLate(_, _ string, _ syscall.RawConn) error { return nil }
