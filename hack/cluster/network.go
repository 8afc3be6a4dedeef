package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// nftTables are all that the cluster puts into the packet filter: its own fence,
// kube-proxy's and the portmap plugin's.
var nftTables = []string{"ip guildhall-cluster", "ip kube-proxy", "ip6 kube-proxy", "ip cni_hostport", "ip6 cni_hostport"}

// fence keeps the cluster to itself: nothing goes from pods to other machines
// and nothing comes in, whatever forwarding the machine does otherwise.
const fence = `
table ip guildhall-cluster {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname %[1]q oifname != %[1]q reject
		iifname != %[1]q oifname %[1]q drop
	}
	chain input {
		type filter hook input priority filter; policy accept;
		iifname != { lo, %[1]q } ip daddr %[2]s drop
	}
}
`

// createNetwork makes the pod bridge with the node's address, in the network
// namespace of the caller.
func createNetwork(ctx context.Context, l layout, n node) error {
	bridgeSettings := filepath.Join("/proc/sys/net/ipv4/conf", bridgeName)
	commands := [][]string{
		// Pods on the bridge see each other through Services only if the
		// packet filter sees frames that stay on the bridge.
		{"ip", "link", "add", "name", bridgeName, "address", hardwareAddress(n), "type", "bridge", "nf_call_iptables", "1"},
		// The alias says whose bridge it is.
		{"ip", "link", "set", bridgeName, "alias", l.dir},
		{"ip", "address", "add", n.address.String(), "dev", bridgeName},
		{"ip", "link", "set", bridgeName, "up"},
		// An address of no Service must not leave by the default route.
		{"ip", "route", "add", serviceCIDR, "dev", bridgeName},
	}
	for _, c := range commands {
		if _, err := command(ctx, c...); err != nil {
			return err
		}
	}
	// From pod to Service to pod is forwarding, on this one interface.
	if err := os.WriteFile(filepath.Join(bridgeSettings, "forwarding"), []byte("1"), 0); err != nil {
		return err
	}
	err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", bridgeName, "disable_ipv6"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_, err = commandInput(ctx, fmt.Sprintf(fence, bridgeName, n.podCIDR()), "nft", "-f", "-")
	return err
}

// hardwareAddress of a node's bridge. A bridge that was not given one takes that
// of one of its ports, and others would lose it from sight when the port goes.
func hardwareAddress(n node) string {
	ip := n.address.Addr().As4()
	return net.HardwareAddr{2, 0, ip[0], ip[1], ip[2], ip[3]}.String()
}

// A node that joins hangs on the first one's bridge by a cable.
const uplink = "uplink" // the name of its end of it

func cable(n node) string { return "guildhall-" + strings.TrimPrefix(n.name, "node-") }

// plugIn lays the cable to a node, given by one of its processes.
func plugIn(ctx context.Context, n node, pid int) error {
	for _, c := range [][]string{
		{"ip", "link", "add", "name", cable(n), "master", bridgeName, "type", "veth", "peer", "name", uplink, "netns", strconv.Itoa(pid)},
		{"ip", "link", "set", cable(n), "up"},
	} {
		if _, err := command(ctx, c...); err != nil {
			return err
		}
	}
	return nil
}

// unplug takes it away, if it is there.
func unplug(ctx context.Context, n node) error {
	if _, err := os.Stat(filepath.Join("/sys/class/net", cable(n))); err != nil {
		return nil //nolint:nilerr // it went with the node
	}
	if _, err := command(ctx, "ip", "link", "delete", cable(n)); err != nil && !strings.Contains(err.Error(), "Cannot find device") {
		return err
	}
	return nil
}

// createJoinedNetwork does what createNetwork does in the network namespace of
// a node that joins, and takes the other end of the cable.
func createJoinedNetwork(ctx context.Context, l layout, n node) error {
	const limit = 10 * time.Second
	for deadline := time.Now().Add(limit); ; {
		if _, err := net.InterfaceByName(uplink); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no cable after %v", limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if _, err := command(ctx, "ip", "link", "set", "lo", "up"); err != nil {
		return err
	}
	if err := createNetwork(ctx, l, n); err != nil {
		return err
	}
	_, err := command(ctx, "ip", "link", "set", uplink, "master", bridgeName, "up")
	return err
}

// checkNetwork reports what would be in the way of a new cluster.
func checkNetwork(ctx context.Context, l layout) error {
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		if _, err := command(ctx, "modprobe", "br_netfilter"); err != nil {
			return fmt.Errorf("the kernel cannot filter bridged packets, which Services between pods need: %w", err)
		}
	}
	if err := ownBridge(l); err != nil {
		return err
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return err
	}
	ours := []netip.Prefix{l.node().address.Masked(), netip.MustParsePrefix(serviceCIDR)}
	for _, i := range interfaces {
		addresses, err := i.Addrs()
		if err != nil {
			return err
		}
		for _, address := range addresses {
			prefix, err := netip.ParsePrefix(address.String())
			if err != nil {
				continue
			}
			for _, own := range ours {
				if prefix.Overlaps(own) {
					return fmt.Errorf("the interface %s has the address %s, inside the cluster's range %s", i.Name, prefix, own)
				}
			}
		}
	}
	tables, err := command(ctx, "nft", "list", "tables")
	if err != nil {
		return err
	}
	for _, table := range nftTables {
		if strings.Contains(tables+"\n", "table "+table+"\n") {
			return fmt.Errorf("the packet filter already has a table %q: another Kubernetes node or CNI runs on this machine", table)
		}
	}
	return nil
}

// ownBridge fails if the machine's one cluster belongs to another run folder.
func ownBridge(l layout) error {
	alias, err := os.ReadFile(filepath.Join("/sys/class/net", bridgeName, "ifalias"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// A bridge without an alias is from a start that was cut off.
	if owner := strings.TrimSpace(string(alias)); owner != "" && owner != l.dir {
		return fmt.Errorf("a machine holds one cluster, and one runs already with the run folder %s; end it with %s=%s go run . down", owner, runFolderEnv, owner)
	}
	return nil
}

// removeNetwork is the reverse of createNetwork, and takes what kube-proxy and
// the CNI plugins made along.
func removeNetwork(ctx context.Context, l layout, n node) error {
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil //nolint:nilerr // "up" installs them before it makes a network
		}
	}
	tables, err := command(ctx, "nft", "list", "tables")
	if err != nil {
		return err
	}
	for _, table := range nftTables {
		if !strings.Contains(tables+"\n", "table "+table+"\n") {
			continue
		}
		if _, err := command(ctx, append([]string{"nft", "delete", "table"}, strings.Fields(table)...)...); err != nil {
			return err
		}
	}

	// The kernel removes the pods' ends of the links together with their
	// network namespaces, a moment after the last process.
	ports := func() []string {
		links, _ := filepath.Glob(filepath.Join("/sys/class/net", bridgeName, "brif", "*"))
		return links
	}
	deadline := time.Now().Add(10 * time.Second)
	for len(ports()) > 0 {
		for _, port := range ports() {
			// It may go by itself meanwhile; the loop sees to it.
			_, _ = command(ctx, "ip", "link", "delete", filepath.Base(port))
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("links of pods stay on %s: %v", bridgeName, ports())
		}
		time.Sleep(20 * time.Millisecond)
	}
	if _, err := os.Stat(filepath.Join("/sys/class/net", bridgeName)); err == nil {
		if _, err := command(ctx, "ip", "link", "delete", bridgeName); err != nil {
			return err
		}
	}

	// A connection that the next cluster makes must not match one of this
	// one. The tool fails when there is nothing to delete.
	for _, selector := range [][]string{{"--orig-src", n.podCIDR()}, {"--orig-dst", n.podCIDR()}, {"--orig-dst", serviceCIDR}} {
		_, _ = command(ctx, append([]string{"conntrack", "--delete"}, selector...)...)
	}
	return nil
}

// command runs one of the system's tools and returns what it printed.
func command(ctx context.Context, args ...string) (string, error) {
	return commandInput(ctx, "", args...)
}

func commandInput(ctx context.Context, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
