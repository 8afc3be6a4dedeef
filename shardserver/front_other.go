//go:build !linux

package main

func deferAccept(uintptr) error { return nil }
