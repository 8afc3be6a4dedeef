//go:build !linux

package main

import (
	"errors"
	"syscall"
)

func processAttributes() *syscall.SysProcAttr { return nil }

type disk struct{}

var errNoDisk = errors.New("--full and --read-only are for Linux")

func newDisk(string, int64) (*disk, error) { return nil, errNoDisk }

func (d *disk) close() error        { return errNoDisk }
func (d *disk) readOnly(bool) error { return errNoDisk }
func (d *disk) fill(int64) error    { return errNoDisk }
func (d *disk) drain() error        { return errNoDisk }
