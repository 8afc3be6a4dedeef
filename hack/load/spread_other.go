//go:build !linux

package main

import "syscall"

func bindLate(_, _ string, _ syscall.RawConn) error { return nil }
