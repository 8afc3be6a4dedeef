package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// upLimit bounds the whole start, after everything is built. The supervisor's
// own waits are shorter and say more.
const upLimit = 5 * time.Minute

func requireRoot(what string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root: it makes network links, mounts, cgroups and containers (\"assets\" works without)", what)
	}
	return nil
}

// up starts the cluster, or finds it running.
func up(ctx context.Context, l layout) (err error) {
	if err := requireRoot("up"); err != nil {
		return err
	}
	if found, err := foundUp(ctx, l); found || err != nil {
		return err
	}
	if err := ownBridge(l); err != nil {
		return err
	}
	assets, nodes, err := openCaches()
	if err != nil {
		return err
	}
	wanted := slices.Clone(requirements)
	if len(nodes.missing()) > 0 {
		wanted = append(wanted, buildRequirements...)
	}
	if err := installPackages(ctx, os.Stderr, wanted); err != nil {
		return err
	}
	for _, c := range []cache{assets, nodes} {
		if err := c.build(ctx, os.Stderr); err != nil {
			return err
		}
	}

	start := time.Now()
	unlock, err := lockMachine(ctx, os.Stderr)
	if err != nil {
		return err
	}
	defer unlock()
	if found, err := foundUp(ctx, l); found || err != nil {
		return err
	}
	if present, err := present(l); err != nil {
		return err
	} else if present {
		fmt.Fprintln(os.Stderr, "removing what is left of an earlier cluster")
		if err := remove(ctx, l); err != nil {
			return err
		}
	}
	if err := checkNetwork(ctx, l); err != nil {
		return err
	}

	launched := false
	defer func() {
		if err == nil {
			return
		}
		if launched && ctx.Err() == nil {
			err = fmt.Errorf("%w\nIt is left as it is, with its logs in %s; \"down\" removes it", err, l.path("logs"))
			return
		}
		fmt.Fprintln(os.Stderr, "removing the unfinished cluster")
		if err2 := remove(context.WithoutCancel(ctx), l); err2 != nil {
			err = fmt.Errorf("%w\nand removing it failed: %w", err, err2)
		}
	}()
	if err := prepare(ctx, l, assets, nodes); err != nil {
		return err
	}
	launched = true
	if _, err := startDaemon(l, l.node()); err != nil {
		return err
	}
	if err := waitUntilUp(ctx, l, l.node(), os.Stderr); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "the cluster is up after %.0fs\n", time.Since(start).Seconds())
	printHint(l)
	return nil
}

// foundUp is the short way of "up", with a cluster that has been up before. One
// that is not well is mended, not replaced: somebody's objects are in it.
func foundUp(ctx context.Context, l layout) (bool, error) {
	status, err := readStatus(ctx, l.node())
	if err != nil || !status.Ready {
		return false, nil //nolint:nilerr // whose state cannot be read is not up
	}
	for _, c := range status.Components {
		if c.State == stateStopped {
			fmt.Fprintf(os.Stderr, "starting %s\n", c.Name)
			if err := control(ctx, l, "start", c.Name); err != nil {
				return false, err
			}
		}
	}
	const limit = 30 * time.Second
	for deadline := time.Now().Add(limit); !status.healthy(); {
		if time.Now().After(deadline) {
			return false, fmt.Errorf("the cluster runs, but not all of it after %v: see \"status\" and %s; \"down\" and \"up\" make a new one", limit, l.path("logs"))
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
		if status, err = readStatus(ctx, l.node()); err != nil {
			return false, err
		}
	}
	fmt.Fprintln(os.Stderr, "the cluster is up already")
	printHint(l)
	return true, nil
}

// present reports whether there is anything to remove. The run folder alone
// does not tell: somebody may have removed it under a running cluster. What is
// there of it again is then the daemon's, and gets its marker back.
func present(l layout) (bool, error) {
	if err := ownBridge(l); err != nil || l.exists() {
		return l.exists(), err
	}
	pids, err := daemonPIDs(l, l.nodes()...)
	if err != nil {
		return false, err
	}
	if len(pids) == 0 {
		_, err := os.Stat(filepath.Join("/sys/class/net", bridgeName))
		return err == nil, nil
	}
	if _, err := os.Stat(l.dir); err != nil {
		return true, nil //nolint:nilerr // there is nothing left to mark
	}
	return true, l.mark()
}

func printHint(l layout) {
	fmt.Println(l.kubeconfig())
	fmt.Fprintf(os.Stderr, "use it with: export KUBECONFIG=%s PATH=$PATH:%s\n", l.kubeconfig(), l.path("bin"))
}

// prepare makes all that the daemon expects to find.
func prepare(ctx context.Context, l layout, caches ...cache) error {
	if err := l.create(); err != nil {
		return err
	}
	for _, c := range caches {
		for _, b := range c.binaries {
			if err := os.Symlink(filepath.Join(c.bin(), b.name), l.bin(b.name)); err != nil {
				return err
			}
		}
	}
	if err := writePKI(l); err != nil {
		return err
	}
	// The program that "go run" built is gone when it ends.
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := copyFile(self, l.program(), 0o755); err != nil {
		return err
	}
	if err := prepareNode(l, l.node()); err != nil {
		return err
	}
	err = writeImage(l.node().path("images.tar"), image{name: pauseImage, entrypoint: "/pause", user: "65535", binaries: []string{l.bin("pause")}})
	if err != nil {
		return err
	}
	if err := createMountPoints(l); err != nil {
		return err
	}
	return createNetwork(ctx, l, l.node())
}

// prepareNode makes a node's folders, configuration and cgroups.
func prepareNode(l layout, n node) error {
	for _, dir := range []string{n.dir, n.logs} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := writeNodeConfigs(l, n); err != nil {
		return err
	}
	return createCgroups(n)
}

// waitUntilUp follows the start of a node's daemon and shows its stages.
func waitUntilUp(ctx context.Context, l layout, n node, progress io.Writer) error {
	ctx, cancel := context.WithTimeoutCause(ctx, upLimit, fmt.Errorf("%s did not start within %v", n.name, upLimit))
	defer cancel()
	stage := ""
	for {
		status, err := readStatus(ctx, n)
		if err == nil && status.Stage != stage {
			stage = status.Stage
			fmt.Fprintln(progress, stage)
		}
		switch {
		case err == nil && status.Failure != "":
			return errors.New(status.Failure)
		case err == nil && status.Ready:
			return nil
		case err != nil && ctx.Err() == nil:
			if pids, err := daemonPIDs(l, n); err == nil && len(pids) == 0 {
				return fmt.Errorf("the supervisor has ended; the end of its log:\n%s", tail(n.log("supervisor")))
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// down ends the cluster, in whatever state it is.
func down(ctx context.Context, l layout, progress io.Writer) error {
	if err := requireRoot("down"); err != nil {
		return err
	}
	unlock, err := lockMachine(ctx, progress)
	if err != nil {
		return err
	}
	defer unlock()
	if present, err := present(l); err != nil {
		return err
	} else if !present {
		fmt.Fprintf(progress, "there is no cluster in %s\n", l.dir)
		return nil
	}
	// Half a removal is worse than a late one.
	if err := remove(context.WithoutCancel(ctx), l); err != nil {
		return fmt.Errorf("%w\nWhat is left is in %s and below %s; \"down\" can be repeated", err, l.dir, bridgeName)
	}
	fmt.Fprintln(progress, "the cluster is gone")
	return nil
}

// remove undoes prepare and ends the daemons. Each step does nothing when there
// is nothing to do, and the run folder goes last: while it exists, a next call
// does the rest. The caller has seen that the cluster is this run folder's.
func remove(ctx context.Context, l layout) error {
	if err := endDaemons(l, l.nodes()...); err != nil {
		return err
	}
	if err := removeNetwork(ctx, l, l.node()); err != nil {
		return err
	}
	if err := removeCgroups(cgroupName); err != nil {
		return err
	}
	if err := removeMountPoints(l); err != nil {
		return err
	}
	return removeRunFolder(l)
}

func removeRunFolder(l layout) error {
	// Mounts live in the daemon's namespace. If one were here all the same,
	// removing its content would be the worst that could happen.
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if strings.Contains(string(mounts), " "+l.dir+"/") {
		return fmt.Errorf("something is mounted below %s", l.dir)
	}
	if !l.exists() {
		return nil
	}
	// The marker goes last, so that a removal that is cut off can be repeated.
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.Name() != markerFile {
			if err := os.RemoveAll(filepath.Join(l.dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(l.dir)
}

// lockMachine keeps "up", "down", "join" and "lose" from running at the same time. An abstract
// socket leaves no file, and goes with its process.
func lockMachine(ctx context.Context, progress io.Writer) (unlock func(), err error) {
	limit := upLimit + time.Minute
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("another command did not end within %v", limit))
	defer cancel()
	for told := false; ; {
		listener, err := net.Listen("unix", "@guildhall-cluster")
		if err == nil {
			return func() { listener.Close() }, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, err
		}
		if !told {
			fmt.Fprintln(progress, "another command is at work, waiting for it")
			told = true
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
