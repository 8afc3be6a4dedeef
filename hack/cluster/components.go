package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A component is a program that the supervisor keeps running.
type component struct {
	name  string
	args  []string                    // the first is a binary's name
	env   []string                    // besides the daemon's own
	needs []string                    // components of its node to be ready before the first start
	ready func(context.Context) error // a probe, nil when it is ready
}

// imagesImported is what a kubelet needs besides components: to the first pod an
// image that is on its way is one that nobody has.
const imagesImported = "images"

// Users of the API server that need rights of their own, see manifests.go.
const (
	kubeletClientUser = "kube-apiserver-kubelet-client"
	dnsUser           = "system:coredns"
)

// components are those of a node, in the order of their start.
func components(l layout, n node) []component {
	if !n.first() {
		return nodeComponents(l, n)
	}
	return slices.Concat(controlPlane(l), nodeComponents(l, n), []component{clusterDNS(l, n)})
}

func controlPlane(l layout) []component {
	n := l.node()
	etcdURL := fmt.Sprintf("https://127.0.0.1:%d", etcdPort)
	peerURL := fmt.Sprintf("https://127.0.0.1:%d", etcdPeerPort)
	// The two controllers serve their probes and metrics only to the host.
	controller := func(name string, port int, args ...string) component {
		config := l.clientConfig(name)
		return component{
			name: name,
			args: append([]string{
				name,
				"--kubeconfig=" + config,
				"--authentication-kubeconfig=" + config,
				"--authorization-kubeconfig=" + config,
				"--bind-address=127.0.0.1",
				fmt.Sprintf("--secure-port=%d", port),
				// There is one of each. Without a lease to lose they also
				// survive an absence of the API server.
				"--leader-elect=false",
				"--profiling=false",
			}, args...),
			needs: []string{"kube-apiserver"},
			// Their certificate is of their own making.
			ready: probeHTTP(&tls.Config{InsecureSkipVerify: true}, fmt.Sprintf("https://127.0.0.1:%d/healthz", port)),
		}
	}
	return []component{
		{
			name: "etcd",
			args: []string{
				"etcd",
				"--name=guildhall",
				"--data-dir=" + l.path("etcd"),
				"--listen-client-urls=" + etcdURL,
				"--advertise-client-urls=" + etcdURL,
				"--listen-peer-urls=" + peerURL,
				"--initial-advertise-peer-urls=" + peerURL,
				"--initial-cluster=guildhall=" + peerURL,
				"--cert-file=" + l.pki("etcd.crt"),
				"--key-file=" + l.pki("etcd.key"),
				"--trusted-ca-file=" + l.pki("etcd-ca.crt"),
				"--client-cert-auth",
				"--peer-cert-file=" + l.pki("etcd.crt"),
				"--peer-key-file=" + l.pki("etcd.key"),
				"--peer-trusted-ca-file=" + l.pki("etcd-ca.crt"),
				"--peer-client-cert-auth",
				// The data outlive the process but not the machine.
				"--unsafe-no-fsync",
				"--log-level=warn",
			},
			ready: probeTCP(fmt.Sprintf("127.0.0.1:%d", etcdPort)),
		},
		{
			name: "kube-apiserver",
			args: []string{
				"kube-apiserver",
				"--bind-address=" + n.ip(),
				"--advertise-address=" + n.ip(), // where pods find it
				fmt.Sprintf("--secure-port=%d", apiServerPort),
				"--tls-cert-file=" + l.pki("apiserver.crt"),
				"--tls-private-key-file=" + l.pki("apiserver.key"),
				"--client-ca-file=" + l.pki("ca.crt"),
				"--etcd-servers=" + etcdURL,
				"--etcd-cafile=" + l.pki("etcd-ca.crt"),
				"--etcd-certfile=" + l.pki("etcd-client.crt"),
				"--etcd-keyfile=" + l.pki("etcd-client.key"),
				"--kubelet-certificate-authority=" + l.pki("ca.crt"),
				"--kubelet-client-certificate=" + l.pki("apiserver-kubelet-client.crt"),
				"--kubelet-client-key=" + l.pki("apiserver-kubelet-client.key"),
				"--kubelet-preferred-address-types=InternalIP", // the node's name is in no DNS
				"--requestheader-client-ca-file=" + l.pki("front-proxy-ca.crt"),
				"--requestheader-allowed-names=front-proxy",
				"--requestheader-username-headers=X-Remote-User",
				"--requestheader-group-headers=X-Remote-Group",
				"--requestheader-extra-headers-prefix=X-Remote-Extra-",
				"--proxy-client-cert-file=" + l.pki("front-proxy.crt"),
				"--proxy-client-key-file=" + l.pki("front-proxy.key"),
				"--service-account-issuer=https://kubernetes.default.svc." + clusterDomain,
				"--service-account-key-file=" + l.pki("service-accounts.pub"),
				"--service-account-signing-key-file=" + l.pki("service-accounts.key"),
				"--service-cluster-ip-range=" + serviceCIDR,
				"--authorization-mode=Node,RBAC",
				"--enable-admission-plugins=NodeRestriction",
				"--allow-privileged=true",
				"--profiling=false",
			},
			needs: []string{"etcd"},
			ready: probeAPIServer(l),
		},
		controller("kube-controller-manager", 10257,
			"--controllers=*,-bootstrap-signer-controller,-token-cleaner-controller",
			"--use-service-account-credentials=true",
			"--service-account-private-key-file="+l.pki("service-accounts.key"),
			"--root-ca-file="+l.pki("ca.crt"),
			"--cluster-signing-cert-file="+l.pki("ca.crt"),
			"--cluster-signing-key-file="+l.pki("ca.key"),
			"--flex-volume-plugin-dir="+l.path("volume-plugins"),
			"--kube-api-qps=100",
			"--kube-api-burst=200",
		),
		controller("kube-scheduler", 10259),
	}
}

func nodeComponents(l layout, n node) []component {
	return []component{
		{
			name: "containerd",
			args: []string{"containerd", "--config=" + n.path("containerd.toml")},
			// containerd finds its shim, and the shim finds runc, by PATH.
			env:   []string{"PATH=" + l.path("bin") + ":" + os.Getenv("PATH")},
			ready: probeUnix(n.containerdSocket()),
		},
		{
			name: "kubelet",
			args: []string{
				"kubelet",
				"--config=" + n.path("kubelet.yaml"),
				"--kubeconfig=" + l.clientConfig(n.kubelet()),
				"--root-dir=" + n.path("kubelet"),
				"--cert-dir=" + n.path("kubelet/pki"),
				"--hostname-override=" + n.name,
				"--node-ip=" + n.ip(),
			},
			needs: []string{"containerd", imagesImported, "kube-apiserver"},
			ready: probeHTTP(nil, "http://127.0.0.1:10248/healthz"),
		},
		{
			name:  "kube-proxy",
			args:  []string{"kube-proxy", "--config=" + n.path("kube-proxy.yaml"), "--hostname-override=" + n.name},
			needs: []string{"kube-apiserver"},
			ready: probeHTTP(nil, "http://127.0.0.1:10256/livez"),
		},
	}
}

// clusterDNS runs beside the pods, not as one of them: it needs no image and
// answers before the first pod starts.
func clusterDNS(l layout, n node) component {
	return component{
		name:  "coredns",
		args:  []string{"coredns", "-conf=" + n.path("Corefile")},
		needs: []string{"kube-apiserver"},
		ready: probeHTTP(nil, "http://"+net.JoinHostPort(n.ip(), strconv.Itoa(dnsReadyPort))+"/ready"),
	}
}

// writeNodeConfigs writes the configuration files of a node's components.
func writeNodeConfigs(l layout, n node) error {
	files := map[string]string{
		"containerd.toml":           containerdConfig(l, n),
		"cni/10-guildhall.conflist": cniConfig(n),
		"kubelet.yaml":              kubeletConfig(l, n),
		"kube-proxy.yaml":           kubeProxyConfig(l, n),
	}
	if n.first() {
		files["Corefile"] = corefile(l, n)
	}
	for name, content := range files {
		if err := os.MkdirAll(filepath.Dir(n.path(name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(n.path(name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func containerdConfig(l layout, n node) string {
	return fmt.Sprintf(`version = 3
root = %[1]q
state = %[2]q
# Snapshotters that nobody asks for.
disabled_plugins = [
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.native",
]

[grpc]
  address = %[3]q

[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.internal.v1.opt"]
  path = %[9]q

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    # The full name: the short one would not match what was imported.
    sandbox = %[4]q

[plugins."io.containerd.cri.v1.runtime"]
  # The daemon may lack CAP_SYS_RESOURCE, and then cannot lower oom_score_adj.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%[5]q]
    conf_dir = %[6]q
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = %[7]q
        Root = %[8]q
        SystemdCgroup = false
`, n.path("containerd"), n.path("containerd-state"), n.containerdSocket(), pauseImage,
		l.path("bin"), n.path("cni"), l.bin("runc"), n.path("runc"), n.path("opt"))
}

// The bridge exists before the first pod and has its address from us: with
// isGateway the plugin would switch on forwarding for the whole machine.
func cniConfig(n node) string {
	from, to := n.podRange()
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "guildhall",
  "plugins": [
    {
      "type": "bridge",
      "bridge": %q,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "dataDir": %q,
        "ranges": [[{"subnet": %q, "rangeStart": %q, "rangeEnd": %q, "gateway": %q}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}, "backend": "nftables", "snat": true}
  ]
}
`, bridgeName, n.path("ipam"), n.podCIDR(), from, to, n.ip())
}

func kubeletConfig(l layout, n node) string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %[1]s
port: 10250
readOnlyPort: 0
healthzBindAddress: 127.0.0.1
healthzPort: 10248
tlsCertFile: %[2]s
tlsPrivateKeyFile: %[3]s
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %[4]s}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix://%[5]s
clusterDomain: %[6]s
clusterDNS: [%[7]s]
# Pods resolve names of the cluster and no others.
resolvConf: ""
cgroupDriver: cgroupfs
cgroupRoot: /%[8]s
failCgroupV1: false
failSwapOn: false
# The daemon may not lower its own score, see containerd.toml.
oomScoreAdj: 0
makeIPTablesUtilChains: false
maxPods: %[9]d
podLogsDir: %[10]s
volumePluginDir: %[11]s
# Images are loaded by hand and could not be pulled again.
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard:
  memory.available: "0%%"
  nodefs.available: "0%%"
  nodefs.inodesFree: "0%%"
  imagefs.available: "0%%"
  imagefs.inodesFree: "0%%"
# Tests that crash pods should not wait for minutes.
crashLoopBackOff: {maxContainerRestartPeriod: 2s}
shutdownGracePeriod: 0s
`, n.ip(), l.pki(n.kubelet()+".crt"), l.pki(n.kubelet()+".key"), l.pki("ca.crt"), n.containerdSocket(),
		clusterDomain, dnsIP, n.cgroup(), podsPerNode, n.path("pod-logs"), n.path("volume-plugins"))
}

// All zero under conntrack means that kube-proxy leaves the machine's settings
// alone.
func kubeProxyConfig(l layout, n node) string {
	return fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: %s}
clusterCIDR: %s
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
oomScoreAdj: 0
nftables: {minSyncPeriod: 200ms}
conntrack:
  maxPerCore: 0
  min: 0
  tcpEstablishedTimeout: 0s
  tcpCloseWaitTimeout: 0s
`, l.clientConfig("kube-proxy"), n.podCIDR())
}

// corefile has two servers in one, by zone. There is no other name server to
// ask about the rest of the world.
func corefile(l layout, n node) string {
	return fmt.Sprintf(`%[1]s:%[2]d in-addr.arpa:%[2]d ip6.arpa:%[2]d {
    bind %[3]s
    errors
    ready %[3]s:%[4]d
    kubernetes %[1]s in-addr.arpa ip6.arpa {
        kubeconfig %[5]s
        pods insecure
        ttl 5
    }
    # A short cache: tests ask about pods that have just moved.
    cache 5
    loadbalance
}
.:%[2]d {
    bind %[3]s
    template ANY ANY {
        rcode NXDOMAIN
    }
}
`, clusterDomain, dnsPort, n.ip(), dnsReadyPort, l.clientConfig("coredns"))
}

const probeTimeout = 2 * time.Second

func probeTCP(address string) func(context.Context) error { return probeDial("tcp", address) }
func probeUnix(socket string) func(context.Context) error { return probeDial("unix", socket) }

func probeDial(network, address string) func(context.Context) error {
	return func(ctx context.Context) error {
		dialer := net.Dialer{Timeout: probeTimeout}
		conn, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

func probeHTTP(config *tls.Config, url string) func(context.Context) error {
	client := &http.Client{
		Timeout:   probeTimeout,
		Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true},
	}
	return func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s: %s", url, response.Status, strings.TrimSpace(string(body)))
		}
		return nil
	}
}

func probeAPIServer(l layout) func(context.Context) error {
	return func(ctx context.Context) error {
		config, err := supervisorTLS(l)
		if err != nil {
			return err
		}
		return probeHTTP(config, l.apiServerURL()+"/readyz")(ctx)
	}
}

// supervisorTLS is the daemon's own access to the API server.
func supervisorTLS(l layout) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(l.pki("supervisor.crt"), l.pki("supervisor.key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(l.pki("ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("no certificate in " + l.pki("ca.crt"))
	}
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}, nil
}
