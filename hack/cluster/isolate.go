package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

// Each node runs in process and mount namespaces of its own, like the nodes of
// other local clusters that live in containers; those that join in a network
// namespace as well. The kernel then guarantees what cleaning up could only
// attempt: when the first process of the namespace ends, every process that
// descends from it ends, containers and shims too, and with the last of them go
// the mounts and the pods' network namespaces.

// Commands of the daemon, not meant for users. They take the name of the node.
const (
	commandInit      = "init"      // the first process of the namespace
	commandSupervise = "supervise" // its child
)

// startDaemon starts the first process of a node, detached from the terminal.
func startDaemon(l layout, n node) (pid int, err error) {
	log, err := os.OpenFile(n.log("supervisor"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd := exec.Command(l.program(), commandInit, n.name)
	cmd.Dir = l.dir
	// Nothing else of the user's environment, such as a proxy, concerns the
	// cluster.
	cmd.Env = []string{runFolderEnv + "=" + l.dir, "PATH=" + os.Getenv("PATH"), "HOME=" + l.dir, "TMPDIR=" + l.path("tmp")}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:       true,
		Cloneflags:   syscall.CLONE_NEWPID,
		Unshareflags: syscall.CLONE_NEWNS, // which also makes all mounts private
	}
	if !n.first() {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNET
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("starting the supervisor: %w", err)
	}
	pid = cmd.Process.Pid // Release forgets it
	return pid, cmd.Process.Release()
}

// hiddenFolders are places that containerd, the kubelet and mount(8) write to
// whatever they are told. In a node's mount namespace they are folders of the
// node.
var hiddenFolders = []string{"/run/containerd", "/run/mount", "/var/lib/cni", "/var/lib/kubelet", "/var/log/containers"}

// kernelSettings are values that the kubelet insists on and would set for the
// whole machine. It is shown files that hold them already.
var kernelSettings = map[string]string{
	"/proc/sys/vm/overcommit_memory":      "1",
	"/proc/sys/vm/panic_on_oom":           "0",
	"/proc/sys/kernel/panic":              "10",
	"/proc/sys/kernel/panic_on_oops":      "1",
	"/proc/sys/kernel/keys/root_maxkeys":  "1000000",
	"/proc/sys/kernel/keys/root_maxbytes": "25000000",
}

// runInit is the first process of the namespace. It prepares the mounts, starts
// the supervisor, and then only collects the processes that lost their parents.
func runInit(l layout, n node) error {
	if os.Getpid() != 1 {
		return errors.New("this command is for the cluster itself")
	}
	if err := prepareMounts(n); err != nil {
		return err
	}
	if !n.first() {
		if err := createJoinedNetwork(context.Background(), l, n); err != nil {
			return err
		}
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-stop
		os.Exit(0)
	}()
	child, err := os.StartProcess(l.program(), []string{l.program(), commandSupervise, n.name}, &os.ProcAttr{
		Dir: l.dir, Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return err
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return err
		case pid == child.Pid:
			return fmt.Errorf("the supervisor ended with status %d", status.ExitStatus())
		}
	}
}

func prepareMounts(n node) error {
	// Pods may ask for mounts to travel, but never out of this namespace.
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED, ""); err != nil {
		return fmt.Errorf("sharing mounts: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	for setting, value := range kernelSettings {
		if _, err := os.Stat(setting); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		file := n.path(filepath.Join("sysctl", filepath.Base(setting)))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := bind(file, setting); err != nil {
			return err
		}
	}
	for _, folder := range hiddenFolders {
		own := n.path(filepath.Join("hidden", folder))
		if err := os.MkdirAll(own, 0o755); err != nil {
			return err
		}
		if err := bind(own, folder); err != nil {
			return err
		}
	}
	return nil
}

func bind(from, to string) error {
	if err := syscall.Mount(from, to, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s to %s: %w", from, to, err)
	}
	return nil
}

// createMountPoints makes those of the hidden folders that the machine lacks,
// and notes them first, for removeMountPoints.
func createMountPoints(l layout) error {
	for _, folder := range hiddenFolders {
		if _, err := os.Stat(folder); err == nil {
			continue
		}
		note, err := os.OpenFile(l.path("mountpoints"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(note, folder)
		if err := errors.Join(err, note.Close()); err != nil {
			return err
		}
		if err := os.Mkdir(folder, 0o755); err != nil {
			return err
		}
	}
	return nil
}

func removeMountPoints(l layout) error {
	note, err := os.ReadFile(l.path("mountpoints"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for folder := range strings.FieldsSeq(string(note)) {
		// A folder that is not empty has found another user since.
		if err := os.Remove(folder); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
			return err
		}
	}
	return err
}

func copyFile(from, to string, mode os.FileMode) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, mode)
}
