package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// cgroupMounts are the mounted hierarchies: several with version 1, one with 2.
func cgroupMounts() ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var mounts []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		before, after, _ := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		if kind, _, _ := strings.Cut(after, " "); (kind == "cgroup" || kind == "cgroup2") && len(fields) > 4 {
			mounts = append(mounts, fields[4])
		}
	}
	if len(mounts) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted; pods need one")
	}
	return mounts, nil
}

// createCgroups makes the root below which the node's kubelet keeps all pods.
func createCgroups(n node) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, mount := range mounts {
		for _, dir := range []string{filepath.Join(mount, cgroupName), filepath.Join(mount, n.cgroup())} {
			if err := createCgroup(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

func createCgroup(dir string) error {
	parent := filepath.Dir(dir)
	// In version 2 a cgroup has the controllers that its parent hands down.
	// Which of them can be is the kernel's choice, and which must be the
	// kubelet's, who says so.
	controllers, _ := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
	for controller := range strings.FieldsSeq(string(controllers)) {
		_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+controller), 0)
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// In version 1 a new cpuset is empty, and takes no process.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(parent, file))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), value, 0); err != nil {
			return err
		}
	}
	// Beside the machine's other processes pods count for as many processors as the node offers them, as they do on any node.
	for file, each := range map[string]int{"cpu.shares": 1024, "cpu.weight": 100} { // of version 1, of version 2
		path := filepath.Join(dir, file)
		if _, err := os.Stat(path); err != nil {
			continue
		}
		if err := os.WriteFile(path, []byte(strconv.Itoa(each*runtime.NumCPU())), 0); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroups removes a cgroup, with all below it, from every hierarchy.
func removeCgroups(name string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, mount := range mounts {
		dir := filepath.Join(mount, name)
		deadline := time.Now().Add(10 * time.Second)
		for {
			err := removeCgroup(dir)
			if err == nil {
				break
			}
			// The kernel lets go of a cgroup a moment after its last process.
			if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("removing the cgroup %s: %w", dir, err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return nil
}

// removeCgroup removes a tree from below: only whole folders can be removed,
// not the files in them.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeCgroup(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	return syscall.Rmdir(dir)
}
