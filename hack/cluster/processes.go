package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// daemonPIDs are the processes that run this run folder's program for one of the
// nodes. The rest of a node lives in their process namespace and ends with them.
func daemonPIDs(l layout, nodes ...node) ([]int, error) {
	var pids []int
	err := eachProcess(func(pid int, dir string) {
		// A process that has just ended has no command line.
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		args := strings.Split(string(cmdline), "\x00")
		if args[0] == l.program() && slices.ContainsFunc(nodes, func(n node) bool { return slices.Contains(args, n.name) }) {
			pids = append(pids, pid)
		}
	})
	return pids, err
}

func eachProcess(visit func(pid int, dir string)) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			visit(pid, filepath.Join("/proc", entry.Name()))
		}
	}
	return nil
}

// A process of the cluster, seen from the machine.
type process struct {
	pid      int
	innerPID int   // its number inside its node's process namespace
	memory   int64 // resident bytes
	dead     bool  // it waits only for its parent to take notice
}

// nodeProcesses are those in the daemon's process namespace, though not those
// in containers, which have namespaces below it.
func nodeProcesses(l layout, n node) ([]process, error) {
	namespaces, err := daemonNamespaces(l, n)
	if err != nil {
		return nil, err
	}
	return processesIn(namespaces)
}

func daemonNamespaces(l layout, nodes ...node) (map[string]bool, error) {
	pids, err := daemonPIDs(l, nodes...)
	if err != nil {
		return nil, err
	}
	namespaces := map[string]bool{}
	for _, pid := range pids {
		if namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err == nil {
			namespaces[namespace] = true
		}
	}
	return namespaces, nil
}

func processesIn(namespaces map[string]bool) ([]process, error) {
	var found []process
	err := eachProcess(func(pid int, dir string) {
		if namespace, err := os.Readlink(filepath.Join(dir, "ns", "pid")); err != nil || !namespaces[namespace] {
			return
		}
		if status, err := os.ReadFile(filepath.Join(dir, "status")); err == nil {
			p := parseProcessStatus(string(status))
			p.pid = pid
			found = append(found, p)
		}
	})
	return found, err
}

// parseProcessStatus reads what is needed from /proc/<pid>/status.
func parseProcessStatus(status string) (p process) {
	state, threads := "", 0
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		if len(fields) == 0 {
			continue
		}
		// The kernel writes numbers; an error leaves zero.
		switch key {
		case "State":
			state = fields[0]
		case "Threads":
			threads, _ = strconv.Atoi(fields[0])
		case "NSpid":
			p.innerPID, _ = strconv.Atoi(fields[len(fields)-1])
		case "VmRSS":
			p.memory, _ = strconv.ParseInt(fields[0], 10, 64)
			p.memory <<= 10
		}
	}
	p.dead = (state == "Z" || state == "X") && threads <= 1
	return p
}

// endDaemons kills the nodes' daemons, and waits until the kernel has ended
// everything in their namespaces.
func endDaemons(l layout, nodes ...node) error {
	namespaces, err := daemonNamespaces(l, nodes...)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		pids, err := daemonPIDs(l, nodes...)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("ending process %d: %w", pid, err)
			}
		}
		left, err := processesIn(namespaces)
		if err != nil {
			return err
		}
		alive := 0
		for _, p := range left {
			if !p.dead {
				alive++
			}
		}
		if len(pids) == 0 && alive == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes of the cluster do not end", alive)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
