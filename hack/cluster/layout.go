package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
)

const (
	defaultRunFolder = "/var/lib/guildhall-cluster"

	// runFolderEnv names the run folder, for users and for the daemon alike.
	runFolderEnv = "GUILDHALL_CLUSTER_DIR"

	// markerFile shows that a folder is a run folder, so that "down" never
	// removes anything else, whatever the environment says.
	markerFile = ".guildhall-cluster"
)

// Addresses and names of the one cluster that a machine can hold. Nothing
// listens on an address that other machines can reach.
const (
	bridgeName    = "guildhall0"
	clusterDomain = "cluster.local"
	firstNode     = "node-1" // it has the control plane and the volumes
	serviceCIDR   = "10.214.0.0/16"
	kubernetesIP  = "10.214.0.1"
	dnsIP         = "10.214.0.10"

	apiServerPort  = 6443
	etcdPort       = 12379 // not etcd's usual port, which a test control plane may hold
	etcdPeerPort   = 12380
	dnsPort        = 1053
	dnsReadyPort   = 1054
	pauseImage     = "docker.io/guildhall/pause:1"
	storageClass   = "standard"
	provisioner    = "guildhall.dev/local"
	cgroupName     = "guildhall-cluster"
	podsPerNode    = 200
	runtimeHandler = "runc"
)

// A node is one machine of the cluster. The first is in the network of the host,
// each other one in a network namespace of its own.
type node struct {
	name    string
	address netip.Prefix // of the pod bridge, which is also the node's address
	dir     string
	logs    string
}

func (n node) ip() string                  { return n.address.Addr().String() }
func (n node) first() bool                 { return n.name == firstNode }
func (n node) path(e string) string        { return filepath.Join(n.dir, e) }
func (n node) log(component string) string { return filepath.Join(n.logs, component+".log") }
func (n node) cgroup() string              { return filepath.Join(cgroupName, n.name) }
func (n node) kubelet() string             { return "kubelet-" + n.name } // its names in pki/
func (n node) containerdSocket() string    { return n.path("containerd.sock") }
func (n node) controlSocket() string       { return n.path("control.sock") }

// podCIDR is the network of all nodes' pods: they reach each other without a
// router between them. Each node gives away its own 254 addresses of it.
func (n node) podCIDR() string { return n.address.Masked().String() }

func (n node) podRange() (from, to string) {
	first, last := n.address.Addr().As4(), n.address.Addr().As4()
	first[3], last[3] = 2, 254
	return netip.AddrFrom4(first).String(), netip.AddrFrom4(last).String()
}

// A layout says where everything of a cluster lives.
type layout struct {
	dir string
}

func layoutFromEnvironment() (layout, error) {
	dir := os.Getenv(runFolderEnv)
	if dir == "" {
		dir = defaultRunFolder
	}
	dir, err := filepath.Abs(dir)
	return layout{dir: dir}, err
}

func (l layout) path(elements ...string) string {
	return filepath.Join(append([]string{l.dir}, elements...)...)
}

func (l layout) kubeconfig() string             { return l.path("kubeconfig") }
func (l layout) pki(name string) string         { return l.path("pki", name) }
func (l layout) clientConfig(who string) string { return l.path("pki", who+".kubeconfig") }
func (l layout) program() string                { return l.path("guildhall-cluster") }
func (l layout) volumes() string                { return l.path("volumes") }

// bin holds links to the cached binaries that this cluster runs, which may be
// older than those that the working tree asks for now.
func (l layout) bin(name string) string { return l.path("bin", name) }

// node is the first node.
func (l layout) node() node { return l.nodes()[0] }

// nodes are all that there can be; those after the first join and are lost.
func (l layout) nodes() []node {
	return []node{
		{firstNode, netip.MustParsePrefix("10.213.0.1/16"), l.path(firstNode), l.path("logs")},
		{"node-2", netip.MustParsePrefix("10.213.1.1/16"), l.path("node-2"), l.path("logs", "node-2")},
	}
}

func (l layout) nodeNamed(name string) (node, error) {
	for _, n := range l.nodes() {
		if n.name == name {
			return n, nil
		}
	}
	return node{}, fmt.Errorf("there is no node %q", name)
}

func (l layout) apiServerURL() string {
	return "https://" + net.JoinHostPort(l.node().ip(), strconv.Itoa(apiServerPort))
}

func (l layout) exists() bool {
	_, err := os.Stat(l.path(markerFile))
	return err == nil
}

func (l layout) mark() error { return os.WriteFile(l.path(markerFile), nil, 0o644) }

// create makes an empty run folder, and refuses one that holds something else.
func (l layout) create() error {
	// A Unix socket's path has room for 107 bytes, and the longest is below
	// the node's folder.
	if socket := l.node().path("containerd.sock.ttrpc"); len(socket) > 107 {
		return fmt.Errorf("the run folder %s is too long a path: %s does not fit a Unix socket's address; set %s", l.dir, socket, runFolderEnv)
	}
	if entries, err := os.ReadDir(l.dir); err == nil && len(entries) > 0 && !l.exists() {
		return fmt.Errorf("the run folder %s holds files that are not a cluster's; set %s to a folder of its own", l.dir, runFolderEnv)
	}
	// Pods run as other users and reach their volumes through this path.
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	if err := l.mark(); err != nil {
		return err
	}
	for dir, mode := range map[string]os.FileMode{
		l.path("pki"): 0o700, l.volumes(): 0o755, l.path("bin"): 0o755, l.path("tmp"): 0o700,
	} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return err
		}
	}
	return nil
}
