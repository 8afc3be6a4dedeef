package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A testCluster is a cluster in a run folder of its own, used as a user would,
// through the program.
type testCluster struct {
	*testing.T
	program string
	layout  layout
}

// TestCluster starts a real cluster, uses it and ends it. It takes a minute
// once everything is built, and the machine's only place for a cluster.
func TestCluster(t *testing.T) {
	if os.Geteuid() != 0 || os.Getenv("GUILDHALL_CLUSTER_TEST") == "" {
		t.Skip("NOT TESTED: the cluster itself. Run as root with GUILDHALL_CLUSTER_TEST=1; no other cluster may run meanwhile.")
	}
	c := testCluster{T: t, program: filepath.Join(t.TempDir(), "cluster"), layout: layout{dir: "/var/lib/guildhall-cluster-test"}}
	if output, err := exec.Command("go", "build", "-o", c.program, ".").CombinedOutput(); err != nil {
		t.Fatalf("building the program: %v\n%s", err, output)
	}
	if err := ownBridge(c.layout); err != nil {
		t.Fatal(err)
	}
	c.run("down")
	t.Cleanup(func() { c.run("down") })

	// Everything is built first, so that what follows is only about the cluster.
	assets, nodes, err := openCaches()
	if err != nil {
		t.Fatal(err)
	}
	for _, cache := range []cache{assets, nodes} {
		if err := cache.build(t.Context(), os.Stderr); err != nil {
			t.Fatal(err)
		}
	}
	before := machineState(t, c.layout)

	t.Run("interrupted start", func(t *testing.T) {
		for _, delay := range []time.Duration{100 * time.Millisecond, time.Second, 3 * time.Second} {
			ctx, cancel := context.WithTimeout(t.Context(), delay)
			cmd := c.command(ctx, "up")
			cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
			output, err := cmd.CombinedOutput()
			cancel()
			if err == nil {
				t.Fatalf("up succeeded within %v, before it was interrupted:\n%s", delay, output)
			}
			compareState(t, before, machineState(t, c.layout))
		}
	})
	t.Run("killed start", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if output, err := c.command(ctx, "up").CombinedOutput(); err == nil {
			t.Fatalf("up succeeded before it was killed:\n%s", output)
		}
		c.run("down")
		compareState(t, before, machineState(t, c.layout))
	})

	start := time.Now()
	if got := strings.TrimSpace(c.run("up")); got != c.layout.kubeconfig() {
		t.Errorf("up printed %q, not the path of the kubeconfig", got)
	}
	t.Logf("up took %v", time.Since(start))
	if t.Failed() {
		return
	}
	start = time.Now()
	c.run("up")
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("up on a running cluster took %v", took)
	}
	other := exec.Command(c.program, "up")
	other.Env = append(os.Environ(), runFolderEnv+"=/var/lib/guildhall-cluster-other")
	if output, err := other.CombinedOutput(); err == nil || !strings.Contains(string(output), c.layout.dir) {
		t.Errorf("a second cluster: %v\n%s", err, output)
	}

	c.loadProbe()
	c.run("kubectl", "apply", "-f", "testdata/workload.yaml")
	c.rollout()
	t.Run("volumes", c.testVolumes)
	t.Run("network", c.testNetwork)
	t.Run("logs, exec and port-forward", c.testStreams)
	t.Run("API server lost and back", c.testAPIServer)
	t.Run("components stop and start", c.testStopStart)
	t.Run("second node", c.testSecondNode)
	if t.Failed() {
		t.Log(c.run("status"))
		t.Log(c.run("kubectl", "get", "all,pvc,events", "-n", "probe"))
	}

	t.Run("supervisor killed", func(t *testing.T) {
		pids, err := daemonPIDs(c.layout, c.layout.node())
		if err != nil || len(pids) != 2 {
			t.Fatalf("the daemon is %v, %v", pids, err)
		}
		// The second is the supervisor proper.
		if err := syscall.Kill(slices.Max(pids), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		c.eventually("the daemon to end", func() error {
			if pids, _ := daemonPIDs(c.layout, c.layout.node()); len(pids) > 0 {
				return fmt.Errorf("still there: %v", pids)
			}
			return nil
		})
	})
	start = time.Now()
	c.run("down")
	t.Logf("down took %v", time.Since(start))
	compareState(t, before, machineState(t, c.layout))
	c.run("down")
}

func (c testCluster) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.program, args...)
	cmd.Env = append(os.Environ(), runFolderEnv+"="+c.layout.dir)
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

// run runs the program to its end and returns what it printed.
func (c testCluster) run(args ...string) string {
	c.Helper()
	output, err := c.try(args...)
	if err != nil {
		c.Fatal(err)
	}
	return output
}

func (c testCluster) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := c.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

func (c testCluster) eventually(what string, check func() error) {
	c.Helper()
	const limit = 90 * time.Second
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.Fatalf("waited %v for %s: %v", limit, what, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func (c testCluster) loadProbe() {
	c.Helper()
	probe := filepath.Join(c.TempDir(), "probe")
	build := exec.Command("go", "build", "-o", probe, "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		c.Fatalf("building the probe: %v\n%s", err, output)
	}
	c.run("image", "--name", "guildhall.dev/probe:test", "--out", probe+".tar", "--entrypoint", "/probe", "--user", "65532", probe)
	c.run("load", probe+".tar")
}

func (c testCluster) rollout() {
	c.Helper()
	if _, err := c.try("kubectl", "rollout", "status", "statefulset/probe", "-n", "probe", "--timeout=90s"); err != nil {
		c.Log(c.run("kubectl", "get", "pods,pvc,pv,events", "-n", "probe", "-o", "wide"))
		c.Fatal(err)
	}
}

// get reads one field of an object.
func (c testCluster) get(object, field string) string {
	c.Helper()
	return c.run("kubectl", "get", "-n", "probe", object, "-o", "jsonpath={"+field+"}")
}

func (c testCluster) exec(args ...string) string {
	c.Helper()
	return c.run(append([]string{"kubectl", "exec", "-n", "probe", "probe-0", "--", "/probe"}, args...)...)
}

func (c testCluster) testVolumes(t *testing.T) {
	c.T = t
	if got := c.exec("cat", "/data/starts"); got != "started as 65532\n" {
		t.Errorf("on the volume is %q", got)
	}
	volume := c.get("pvc/data-probe-0", ".spec.volumeName")
	folder := filepath.Join(c.layout.volumes(), volume)
	var stat syscall.Stat_t
	if err := syscall.Stat(folder, &stat); err != nil {
		t.Fatal(err)
	}
	if stat.Gid != 65532 {
		t.Errorf("the volume's group is %d, not the pod's fsGroup", stat.Gid)
	}

	// ReadWriteOncePod keeps a second pod away.
	thief := filepath.Join(t.TempDir(), "thief.yaml")
	if err := os.WriteFile(thief, []byte(thiefPod), 0o644); err != nil {
		t.Fatal(err)
	}
	c.run("kubectl", "apply", "-f", thief)
	c.eventually("the scheduler to refuse a second user of a volume", func() error {
		if got := c.get("pod/thief", ".status.conditions[0].message"); !strings.Contains(got, "ReadWriteOncePod") {
			return fmt.Errorf("it says %q", got)
		}
		return nil
	})
	c.run("kubectl", "delete", "-f", thief)

	c.run("kubectl", "patch", "-n", "probe", "pvc/data-probe-0", "-p", `{"spec":{"resources":{"requests":{"storage":"64Mi"}}}}`)
	c.eventually("the volume to grow", func() error {
		if got := c.get("pvc/data-probe-0", ".status.capacity.storage"); got != "64Mi" {
			return fmt.Errorf("it has %s", got)
		}
		return nil
	})

	// The same volume comes back with the pod.
	c.run("kubectl", "delete", "-n", "probe", "pod/probe-0")
	c.rollout()
	if got := c.exec("cat", "/data/starts"); strings.Count(got, "started") != 2 {
		t.Errorf("after a restart, on the volume is %q", got)
	}

	// And goes with its claim.
	c.run("kubectl", "scale", "-n", "probe", "statefulset/probe", "--replicas=1")
	gone := filepath.Join(c.layout.volumes(), c.get("pvc/data-probe-1", ".spec.volumeName"))
	c.run("kubectl", "delete", "-n", "probe", "pvc/data-probe-1", "--timeout=60s")
	c.eventually("the folder of a deleted volume to go", func() error {
		if _, err := os.Stat(gone); err == nil {
			return fmt.Errorf("%s is there", gone)
		}
		return nil
	})
	c.run("kubectl", "scale", "-n", "probe", "statefulset/probe", "--replicas=2")
	c.rollout()
}

func (c testCluster) testNetwork(t *testing.T) {
	c.T = t
	serviceIP := c.get("service/probe", ".spec.clusterIP")
	if got, want := strings.TrimSpace(c.exec("lookup", "probe")), "["+serviceIP+"]"; got != want {
		t.Errorf("the Service's name resolves to %s, not to %s", got, want)
	}
	peer := "probe-1.probe-peers"
	if got, want := strings.TrimSpace(c.exec("lookup", peer)), "["+c.get("pod/probe-1", ".status.podIP")+"]"; got != want {
		t.Errorf("%s resolves to %s, not to %s", peer, got, want)
	}
	if output, err := c.try("kubectl", "exec", "-n", "probe", "probe-0", "--", "/probe", "lookup", "example.com"); err == nil || !strings.Contains(err.Error(), "no such host") {
		t.Errorf("a name of the outside: %s %v", output, err)
	}
	// Through the Service to the other pod and, by hairpin, to itself.
	answers := map[string]bool{}
	for range 20 {
		answers[c.exec("get", "http://probe/")] = true
	}
	if len(answers) != 2 {
		t.Errorf("of two pods behind a Service, those answered: %v", answers)
	}
	if got := c.exec("get", "https://kubernetes.default/version"); !strings.Contains(got, kubernetesVersion) {
		t.Errorf("a pod got from the API server: %s", got)
	}
	c.run("kubectl", "wait", "--for=condition=Ready", "pod/probe-host-port", "-n", "default", "--timeout=60s")
	node := c.layout.node().ip()
	for what, url := range map[string]string{
		"pod":       "http://" + c.get("pod/probe-0", ".status.podIP") + ":8080",
		"Service":   "http://" + serviceIP,
		"node port": "http://" + node + ":30080",
		"host port": "http://" + node + ":30081",
	} {
		if got, err := httpGet(url); err != nil || !strings.Contains(got, "hello from probe") {
			t.Errorf("from the host, %s at %s: %q %v", what, url, got, err)
		}
	}
	// Nothing leaves the machine: refused at once, not lost.
	start := time.Now()
	if _, err := c.try("kubectl", "exec", "-n", "probe", "probe-0", "--", "/probe", "get", "http://192.0.2.1/"); err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("a pod's way to the outside was not refused: %v after %v", err, time.Since(start))
	}
}

func httpGet(url string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

func (c testCluster) testStreams(t *testing.T) {
	c.T = t
	if got := c.run("kubectl", "logs", "-n", "probe", "probe-0"); got != "probe serves\n" {
		t.Errorf("the log is %q", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	forward := c.command(ctx, "kubectl", "port-forward", "-n", "probe", "probe-0", "30099:8080")
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	c.eventually("the forwarded port", func() error {
		got, err := httpGet("http://127.0.0.1:30099/")
		if err == nil && got != "hello from probe-0\n" {
			err = fmt.Errorf("got %q", got)
		}
		return err
	})
	cancel()
	_ = forward.Wait() // killed
}

func (c testCluster) component(name string) componentStatus {
	c.Helper()
	status, err := readStatus(c.Context(), c.layout.node())
	if err != nil {
		c.Fatal(err)
	}
	for _, component := range status.Components {
		if component.Name == name {
			return component
		}
	}
	c.Fatalf("no component %s", name)
	return componentStatus{}
}

func (c testCluster) testAPIServer(t *testing.T) {
	c.T = t
	processes, err := nodeProcesses(c.layout, c.layout.node())
	if err != nil {
		t.Fatal(err)
	}
	inner := c.component("kube-apiserver").PID
	i := slices.IndexFunc(processes, func(p process) bool { return p.innerPID == inner })
	if i < 0 {
		t.Fatalf("no process has the number %d in the cluster", inner)
	}
	if err := syscall.Kill(processes[i].pid, syscall.SIGKILL); err != nil {
		t.Fatalf("ending process %d: %v", processes[i].pid, err)
	}
	c.eventually("the API server to be back", func() error {
		if now := c.component("kube-apiserver"); now.Restarts != 1 || now.State != stateReady {
			return fmt.Errorf("it is %s, restarted %d times", now.State, now.Restarts)
		}
		return nil
	})
	// Everything else has lived through it and still works.
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "coredns"} {
		if got := c.component(name).Restarts; got != 0 {
			t.Errorf("%s was restarted %d times", name, got)
		}
	}
	c.run("kubectl", "delete", "-n", "probe", "pod/probe-0")
	c.rollout()
}

func (c testCluster) testStopStart(t *testing.T) {
	c.T = t
	for _, name := range []string{"kube-apiserver", "etcd", "containerd", "kubelet", "kube-scheduler"} {
		start := time.Now()
		c.run("stop", name)
		stopped := time.Since(start)
		if got := c.component(name).State; got != stateStopped {
			t.Errorf("%s is %s after a stop", name, got)
		}
		// Pods do not depend on any of them.
		if got, err := httpGet("http://" + c.layout.node().ip() + ":30080"); err != nil {
			t.Errorf("without %s: %q %v", name, got, err)
		}
		start = time.Now()
		c.run("start", name)
		t.Logf("%s: stopped in %v, started in %v", name, stopped, time.Since(start))
	}
	c.eventually("everything to be ready", func() error {
		_, err := c.try("status")
		return err
	})
	c.run("kubectl", "delete", "-n", "probe", "pod/probe-1")
	c.rollout()
}

// testSecondNode leaves a second node behind, for down to end.
func (c testCluster) testSecondNode(t *testing.T) {
	c.T = t
	start := time.Now()
	c.run("join", "node-2")
	t.Logf("joined after %v", time.Since(start))
	c.run("join", "node-2") // nothing more
	manifest := filepath.Join(t.TempDir(), "away.yaml")
	if err := os.WriteFile(manifest, []byte(awayPod), 0o644); err != nil {
		t.Fatal(err)
	}
	c.run("kubectl", "apply", "-f", manifest)
	ready := func() { c.run("kubectl", "wait", "-n", "probe", "--for=condition=Ready", "pod/away", "--timeout=60s") }
	ready()
	ip := c.get("pod/away", ".status.podIP")
	if !strings.HasPrefix(ip, "10.213.1.") {
		t.Errorf("the pod's address is %s", ip)
	}
	for _, pod := range []string{"probe-0", "away"} {
		get := func(url string) string {
			return c.run("kubectl", "exec", "-n", "probe", pod, "--", "/probe", "get", url)
		}
		answers := map[string]bool{}
		c.eventually("every pod of the Service to answer "+pod, func() error {
			answers[get("http://probe/")] = true
			if len(answers) < 3 {
				return fmt.Errorf("only %v", answers)
			}
			return nil
		})
		if got := get("https://kubernetes.default/version"); !strings.Contains(got, kubernetesVersion) {
			t.Errorf("%s got from the API server: %s", pod, got)
		}
		for _, peer := range []string{"probe-0", "away"} {
			if got := get("http://" + c.get("pod/"+peer, ".status.podIP") + ":8080/"); got != "hello from "+peer+"\n" {
				t.Errorf("%s got from %s: %q", pod, peer, got)
			}
		}
	}
	for what, url := range map[string]string{"pod": "http://" + ip + ":8080", "node port": "http://10.213.1.1:30080"} {
		if got, err := httpGet(url); err != nil || !strings.Contains(got, "hello from") {
			t.Errorf("from the host, %s at %s: %q %v", what, url, got, err)
		}
	}
	if got := c.run("kubectl", "logs", "-n", "probe", "away"); got != "probe serves\n" {
		t.Errorf("the log is %q", got)
	}
	c.run("stop", "node-2/kubelet")
	c.run("start", "node-2/kubelet")

	// No connection is closed when a node is lost.
	conn, err := net.Dial("tcp", net.JoinHostPort(ip, "8080"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c.run("lose", "node-2")
	if err := conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection to a node that was lost: %v", err)
	}
	if _, err := os.Stat("/sys/class/net/" + cable(c.layout.nodes()[1])); err == nil {
		t.Error("the cable to the node is still there")
	}
	c.run("status")
	if _, err := c.try("lose", "node-2"); err == nil {
		t.Error("a node was lost twice")
	}
	c.run("join", "node-2")
	start = time.Now()
	c.eventually("the pod to run again", func() error {
		got, err := httpGet("http://" + c.get("pod/away", ".status.podIP") + ":8080")
		if err == nil && got != "hello from away\n" {
			err = fmt.Errorf("got %q", got)
		}
		return err
	})
	t.Logf("the pod answers %v after its node's return", time.Since(start))
}

// machineState is everything on the machine that a cluster could leave behind.
func machineState(t *testing.T, l layout) map[string][]string {
	t.Helper()
	state := map[string][]string{}
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		state["links"] = append(state["links"], i.Name)
	}
	for what, args := range map[string][]string{
		"packet filter": {"nft", "list", "tables"},
		"routes":        {"ip", "route", "show", "table", "all"},
	} {
		output, err := command(t.Context(), args...)
		if err != nil {
			t.Fatal(err)
		}
		state[what] = strings.Split(output, "\n")
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	state["mounts"] = strings.Split(string(mounts), "\n")

	// Processes: those of the run folder and of the cached binaries, and of
	// namespaces other than the machine's.
	own := map[string]string{}
	for _, kind := range []string{"net", "mnt", "pid"} {
		own[kind], _ = os.Readlink("/proc/self/ns/" + kind)
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range processes {
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil || parseProcessStatus(string(status)).dead {
			continue // when the machine's first process takes notice is its own affair
		}
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if strings.Contains(string(cmdline), l.dir) {
			state["processes"] = append(state["processes"], dir+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
		for kind, mine := range own {
			if namespace, err := os.Readlink(filepath.Join(dir, "ns", kind)); err == nil && namespace != mine {
				state["namespaces"] = append(state["namespaces"], namespace)
			}
		}
	}
	slices.Sort(state["namespaces"])
	state["namespaces"] = slices.Compact(state["namespaces"])

	hierarchies, err := cgroupMounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, folder := range append(hierarchies, "/run", "/run/netns", "/var/lib", "/var/log", "/opt", "/etc", "/usr/libexec", "/tmp") {
		entries, err := os.ReadDir(folder)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		for _, entry := range entries {
			// Others work in /tmp meanwhile.
			if folder != "/tmp" || strings.Contains(entry.Name(), "guildhall") || strings.Contains(entry.Name(), "containerd") {
				state["files"] = append(state["files"], filepath.Join(folder, entry.Name()))
			}
		}
	}
	for _, setting := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward",
		"net/ipv4/conf/all/forwarding", "net/ipv4/conf/all/route_localnet", "net/netfilter/nf_conntrack_max",
		"net/netfilter/nf_conntrack_tcp_timeout_established", "net/bridge/bridge-nf-call-iptables",
	} {
		value, err := os.ReadFile(filepath.Join("/proc/sys", setting))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		state["settings"] = append(state["settings"], setting+"="+strings.TrimSpace(string(value)))
	}
	return state
}

func compareState(t *testing.T, before, after map[string][]string) {
	t.Helper()
	for what, now := range after {
		for _, item := range now {
			if !slices.Contains(before[what], item) {
				t.Errorf("left behind, %s: %s", what, item)
			}
		}
	}
	for what, then := range before {
		for _, item := range then {
			if !slices.Contains(after[what], item) {
				t.Errorf("taken away, %s: %s", what, item)
			}
		}
	}
}

const thiefPod = `
apiVersion: v1
kind: Pod
metadata: {name: thief, namespace: probe}
spec:
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: probe
    image: guildhall.dev/probe:test
    args: [serve]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data-probe-0}}]
`

const awayPod = `
apiVersion: v1
kind: Pod
metadata: {name: away, namespace: probe, labels: {app: probe}}
spec:
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: node-2}
  securityContext: {runAsNonRoot: true, runAsUser: 65532, fsGroup: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: probe
    image: guildhall.dev/probe:test
    args: [serve]
    ports: [{containerPort: 8080}]
    readinessProbe: {httpGet: {port: 8080}, periodSeconds: 1}
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {medium: Memory}}]
`
