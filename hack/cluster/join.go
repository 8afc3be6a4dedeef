package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// join adds a node to the running cluster. It is as empty as a new machine, also
// if it is one that was lost.
func join(ctx context.Context, l layout, name string) error {
	n, unlock, err := otherNode(ctx, l, "join", name)
	if err != nil {
		return err
	}
	defer unlock()
	if status, err := readStatus(ctx, l.node()); err != nil {
		return err
	} else if !status.Ready {
		return errors.New("the cluster is not up yet")
	}
	if status, err := readStatus(ctx, n); err == nil && status.Ready {
		fmt.Fprintf(os.Stderr, "%s has joined already\n", n.name)
		return nil
	}
	start := time.Now()
	if err := removeNode(ctx, l, n); err != nil {
		return err
	}
	if err := renew(l, n); err != nil {
		return err
	}
	if err := exportImages(ctx, l, l.node(), n.path("images.tar")); err != nil {
		return err
	}
	pid, err := startDaemon(l, n)
	if err == nil {
		err = plugIn(ctx, n, pid)
	}
	if err == nil {
		err = waitUntilUp(ctx, l, n, os.Stderr)
	}
	if err != nil {
		return fmt.Errorf("%w\nThe logs of %s are in %s; \"lose\" removes it", err, n.name, n.logs)
	}
	fmt.Fprintf(os.Stderr, "%s has joined after %.0fs\n", n.name, time.Since(start).Seconds())
	return nil
}

// renew empties a node, but for the note of the address that it gave away last:
// to others the earlier ones are still those of pods that were lost, for up to a
// minute, and pods that got the same would not be found.
func renew(l layout, n node) error {
	file := n.path("ipam/guildhall/last_reserved_ip.0")
	last, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.RemoveAll(n.dir); err != nil {
		return err
	}
	if err := prepareNode(l, n); err != nil || last == nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, last, 0o644)
}

// lose ends a node as a power cut does. Kubernetes is not told.
func lose(ctx context.Context, l layout, name string) error {
	n, unlock, err := otherNode(ctx, l, "lose", name)
	if err != nil {
		return err
	}
	defer unlock()
	if pids, err := daemonPIDs(l, n); err != nil {
		return err
	} else if len(pids) == 0 {
		return fmt.Errorf("%s has not joined", n.name)
	}
	return removeNode(context.WithoutCancel(ctx), l, n)
}

// otherNode is a node that can join and be lost. Nothing else is done to the
// cluster until unlock.
func otherNode(ctx context.Context, l layout, what, name string) (n node, unlock func(), err error) {
	if err := requireRoot(what); err != nil {
		return n, nil, err
	}
	if n, err = l.nodeNamed(name); err != nil {
		return n, nil, err
	}
	if n.first() {
		return n, nil, fmt.Errorf("%s is the cluster itself", n.name)
	}
	unlock, err = lockMachine(ctx, os.Stderr)
	return n, unlock, err
}

// removeNode ends a node, if it runs, and leaves nothing of it but its folders.
func removeNode(ctx context.Context, l layout, n node) error {
	// First, or the kernel would say goodbye for the processes that it ends: a
	// machine without power closes no connection.
	if err := unplug(ctx, n); err != nil {
		return err
	}
	if err := endDaemons(l, n); err != nil {
		return err
	}
	return removeCgroups(n.cgroup())
}
