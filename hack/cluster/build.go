package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// A binary is one program of the cluster, built from a Go module that pins it.
// Every upstream project has a nested module of its own below modules/, because
// their dependencies contradict each other.
type binary struct {
	name string
	dir  string // the module, relative to this folder
	pkg  string
	cgo  bool
	tags string
}

// assetBinaries are what a test control plane needs, the most wanted first.
var assetBinaries = []binary{
	{name: "etcd", dir: "modules/etcd", pkg: "go.etcd.io/etcd/server/v3"},
	{name: "kube-apiserver", dir: "modules/kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-apiserver"},
	{name: "kubectl", dir: "modules/kubernetes", pkg: "k8s.io/kubernetes/cmd/kubectl"},
	{name: "kube-controller-manager", dir: "modules/kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-controller-manager"},
	{name: "kube-scheduler", dir: "modules/kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-scheduler"},
}

// nodeBinaries are what a node needs besides. The CNI plugins live among the
// other programs: their names do not clash.
var nodeBinaries = []binary{
	{name: "kubelet", dir: "modules/kubernetes", pkg: "k8s.io/kubernetes/cmd/kubelet"},
	{name: "kube-proxy", dir: "modules/kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-proxy"},
	{name: "containerd", dir: "modules/containerd", pkg: "github.com/containerd/containerd/v2/cmd/containerd", tags: containerdTags},
	{name: "containerd-shim-runc-v2", dir: "modules/containerd", pkg: "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", tags: containerdTags},
	{name: "ctr", dir: "modules/containerd", pkg: "github.com/containerd/containerd/v2/cmd/ctr", tags: containerdTags},
	// runc enters namespaces from C, before the Go runtime starts its threads.
	{name: "runc", dir: "modules/runc", pkg: "github.com/opencontainers/runc", cgo: true, tags: "seccomp"},
	{name: "bridge", dir: "modules/cni", pkg: "github.com/containernetworking/plugins/plugins/main/bridge"},
	{name: "loopback", dir: "modules/cni", pkg: "github.com/containernetworking/plugins/plugins/main/loopback"},
	{name: "host-local", dir: "modules/cni", pkg: "github.com/containernetworking/plugins/plugins/ipam/host-local"},
	{name: "portmap", dir: "modules/cni", pkg: "github.com/containernetworking/plugins/plugins/meta/portmap"},
	{name: "coredns", dir: "modules/coredns", pkg: "."},
	{name: "pause", dir: ".", pkg: "./pause"},
}

// containerdTags leaves out the snapshotters that need C libraries or kernel
// features nobody asked for.
const containerdTags = "no_btrfs no_devmapper no_zfs"

// kubernetesVersion is stamped into the Kubernetes programs, which cannot learn
// it from the module they are built in. A unit test compares it with go.mod.
const kubernetesVersion = "v1.37.2"

func linkerFlags() string {
	major, minor, _ := strings.Cut(strings.TrimPrefix(kubernetesVersion, "v"), ".")
	minor, _, _ = strings.Cut(minor, ".")
	var flags strings.Builder
	flags.WriteString("-s -w")
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		for _, set := range [][2]string{
			{"gitVersion", kubernetesVersion},
			{"gitMajor", major},
			{"gitMinor", minor},
			{"gitTreeState", "clean"},
		} {
			fmt.Fprintf(&flags, " -X %s.%s=%s", pkg, set[0], set[1])
		}
	}
	return flags.String()
}

// A cache keeps a group of built binaries outside the tree, in a folder named
// after all that decides what they are. The control plane has its own, which
// does not change with the node's programs.
type cache struct {
	source   string // this folder, with the nested modules
	dir      string // <cache>/guildhall/<key>
	binaries []binary
}

func (c cache) bin() string { return filepath.Join(c.dir, "bin") }

func openCaches() (assets, node cache, err error) {
	if assets, err = openCache("control-plane", assetBinaries); err != nil {
		return assets, node, err
	}
	node, err = openCache("node", nodeBinaries)
	return assets, node, err
}

func openCache(group string, binaries []binary) (cache, error) {
	source, err := sourceFolder()
	if err != nil {
		return cache{}, err
	}
	root := os.Getenv("GUILDHALL_CACHE")
	if root == "" {
		if root, err = os.UserCacheDir(); err != nil {
			return cache{}, fmt.Errorf("no cache folder: %w; set GUILDHALL_CACHE", err)
		}
	}
	key, err := cacheKey(source, binaries)
	if err != nil {
		return cache{}, err
	}
	dir, err := filepath.Abs(filepath.Join(root, "guildhall", group+"-"+key))
	return cache{source: source, dir: dir, binaries: binaries}, err
}

// sourceFolder finds hack/cluster from the working directory: the program is
// meant for "go run", and go:embed cannot carry nested modules.
func sourceFolder() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		for _, candidate := range []string{dir, filepath.Join(dir, "hack", "cluster")} {
			if _, err := os.Stat(filepath.Join(candidate, "modules", "kubernetes", "go.mod")); err == nil {
				return candidate, nil
			}
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not inside the Guildhall repository, whose hack/cluster folder says what to build", wd)
		}
	}
}

// cacheKey hashes the modules and the recipe, so that a new version of anything
// gets a folder of its own and an old checkout keeps finding its own.
func cacheKey(source string, binaries []binary) (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.GOOS, runtime.GOARCH, linkerFlags(), binaries)
	for _, b := range binaries {
		patterns := []string{filepath.Join(b.dir, "go.*")}
		if strings.HasPrefix(b.pkg, ".") {
			patterns = append(patterns, filepath.Join(b.dir, b.pkg, "*.go"))
		}
		for _, pattern := range patterns {
			files, err := filepath.Glob(filepath.Join(source, pattern))
			if err != nil {
				return "", err
			}
			for _, file := range files {
				content, err := os.ReadFile(file)
				if err != nil {
					return "", err
				}
				fmt.Fprintln(sum, filepath.Base(file), len(content))
				sum.Write(content)
			}
		}
	}
	return kubernetesVersion + "-" + hex.EncodeToString(sum.Sum(nil)[:6]), nil
}

func (c cache) missing() []binary {
	var missing []binary
	for _, b := range c.binaries {
		if _, err := os.Stat(filepath.Join(c.bin(), b.name)); err != nil {
			missing = append(missing, b)
		}
	}
	return missing
}

// build makes what is missing. A lock keeps concurrent callers from doing the
// same work twice, and a rename keeps half a binary from ever being seen.
func (c cache) build(ctx context.Context, progress io.Writer) error {
	if len(c.missing()) == 0 {
		return nil
	}
	if err := os.MkdirAll(c.bin(), 0o755); err != nil {
		return err
	}
	unlock, err := lockFile(ctx, progress, filepath.Join(c.dir, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	missing := c.missing()
	for i, b := range missing {
		fmt.Fprintf(progress, "building %s (%d/%d) ...", b.name, i+1, len(missing))
		start := time.Now()
		if err := c.buildOne(ctx, b); err != nil {
			fmt.Fprintln(progress)
			return err
		}
		fmt.Fprintf(progress, " %.0fs\n", time.Since(start).Seconds())
	}
	return nil
}

func (c cache) buildOne(ctx context.Context, b binary) error {
	temporary := filepath.Join(c.bin(), ".building-"+b.name)
	defer os.Remove(temporary)
	cmd := exec.CommandContext(ctx, "go", "build", "-mod=readonly", "-trimpath", "-buildvcs=false",
		"-tags", b.tags, "-ldflags", linkerFlags(), "-o", temporary, b.pkg)
	cmd.Dir = filepath.Join(c.source, b.dir)
	cgo := "0"
	if b.cgo {
		cgo = "1"
	}
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOWORK=off", "GOFLAGS=", "GOOS="+runtime.GOOS, "GOARCH="+runtime.GOARCH)
	// Ctrl-C ends the compilers too, not only the go command.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	if output, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("building %s: interrupted", b.name)
		}
		return fmt.Errorf("building %s in %s: %w\n%s", b.name, b.dir, err, output)
	}
	return os.Rename(temporary, filepath.Join(c.bin(), b.name))
}

// lockLimit is more than a first build takes on a small machine.
const lockLimit = 30 * time.Minute

// lockFile takes an advisory lock, which the kernel drops when the holder dies.
func lockFile(ctx context.Context, progress io.Writer, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lockLimit, fmt.Errorf("another build has held %s for %v", path, lockLimit))
	defer cancel()
	for told := false; ; {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		if !told {
			fmt.Fprintf(progress, "another build holds %s, waiting for it\n", path)
			told = true
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
