package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// bootstrap brings a fresh cluster to its first use. Every wait has an end, and
// a message that names what it waited for.
func (s *supervisor) bootstrap(ctx context.Context) error {
	n := s.node
	client, err := newAPIClient(s.layout)
	if err != nil {
		return err
	}
	go (&localProvisioner{client: client, folder: s.layout.volumes(), node: n.name}).run(ctx)

	for _, name := range []string{"containerd", "etcd", "kube-apiserver"} {
		if err := s.waitFor(ctx, name); err != nil {
			return err
		}
		if name == "containerd" {
			if err := s.importImages(ctx); err != nil {
				return err
			}
		}
	}

	s.stage("applying the cluster's own objects")
	for _, m := range manifests(n) {
		// The namespace or a default role may be a moment behind.
		err := retry(ctx, 30*time.Second, "applying "+m.path, n.log("kube-apiserver"), func() error {
			return client.apply(ctx, m.path, m.yaml)
		})
		if err != nil {
			return err
		}
	}

	if err := s.waitForNode(ctx, client); err != nil {
		return err
	}
	s.stage("waiting for the default service account")
	err = retry(ctx, time.Minute, "the default service account", n.log("kube-controller-manager"), func() error {
		return client.get(ctx, "/api/v1/namespaces/default/serviceaccounts/default", nil)
	})
	if err != nil {
		return err
	}
	s.stage("waiting for cluster DNS to answer")
	err = retry(ctx, time.Minute, "cluster DNS to answer at "+dnsIP, n.log("coredns"), func() error {
		return dnsAnswers(ctx)
	})
	if err != nil {
		return err
	}
	s.update(func(status *clusterStatus) { status.Ready = true })
	s.stage("ready")
	return nil
}

// join is what bootstrap is for a node that comes later.
func (s *supervisor) join(ctx context.Context) error {
	client, err := newAPIClient(s.layout)
	if err != nil {
		return err
	}
	if err := s.waitFor(ctx, "containerd"); err != nil {
		return err
	}
	if err := s.importImages(ctx); err != nil {
		return err
	}
	if err := s.waitForNode(ctx, client); err != nil {
		return err
	}
	s.update(func(status *clusterStatus) { status.Ready = true })
	s.stage("ready")
	return nil
}

// waitFor waits for a component.
func (s *supervisor) waitFor(ctx context.Context, name string) error {
	for _, u := range s.units {
		if u.name == name {
			s.stage("waiting for %s", name)
			return u.waitFor(ctx, stateReady, startLimit)
		}
	}
	return fmt.Errorf("no component %s", name)
}

// waitForNode waits for all components and for the node to take pods.
func (s *supervisor) waitForNode(ctx context.Context, client *apiClient) error {
	for _, u := range s.units {
		if err := s.waitFor(ctx, u.name); err != nil {
			return err
		}
	}
	s.stage("waiting for the node to be ready")
	return retry(ctx, startLimit, "the node to be ready", s.node.log("kubelet"), func() error {
		return nodeReady(ctx, client, s.node)
	})
}

// importImages loads those that the node starts with.
func (s *supervisor) importImages(ctx context.Context) error {
	s.stage("importing images")
	if err := importImage(ctx, s.layout, s.node, s.node.path("images.tar")); err != nil {
		return err
	}
	close(s.images)
	return os.Remove(s.node.path("images.tar"))
}

// retry calls try until it succeeds or the time is up.
func retry(ctx context.Context, limit time.Duration, what, log string, try func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := try()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %v for %s: %w; the end of %s:\n%s", limit, what, err, log, tail(log))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func nodeReady(ctx context.Context, client *apiClient, n node) error {
	var object struct {
		Spec struct {
			Taints []struct{ Key string }
		}
		Status struct {
			Conditions []struct{ Type, Status, Message string }
		}
	}
	if err := client.get(ctx, "/api/v1/nodes/"+n.name, &object); err != nil {
		return err
	}
	for _, taint := range object.Spec.Taints {
		return fmt.Errorf("node %s has the taint %s", n.name, taint.Key)
	}
	for _, condition := range object.Status.Conditions {
		if condition.Type == "Ready" {
			if condition.Status == "True" {
				return nil
			}
			return fmt.Errorf("node %s is not ready: %s", n.name, condition.Message)
		}
	}
	return fmt.Errorf("node %s has not reported yet", n.name)
}

// dnsAnswers asks through the Service, which shows that kube-proxy works too.
func dnsAnswers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	resolver := net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, network, net.JoinHostPort(dnsIP, "53"))
		},
	}
	name := "kubernetes.default.svc." + clusterDomain + "."
	addresses, err := resolver.LookupHost(ctx, name)
	if err != nil {
		return err
	}
	if len(addresses) != 1 || addresses[0] != kubernetesIP {
		return fmt.Errorf("%s resolves to %v, not to %s", name, addresses, kubernetesIP)
	}
	return nil
}

// importImage loads an image archive into the node, for the kubelet to find.
func importImage(ctx context.Context, l layout, n node, archive string) error {
	if _, err := images(ctx, l, n, "import", archive); err != nil {
		return fmt.Errorf("importing %s: %w", archive, err)
	}
	return nil
}

// exportImages writes all images of a node into an archive.
func exportImages(ctx context.Context, l layout, n node, archive string) error {
	list, err := images(ctx, l, n, "list", "--quiet")
	if err != nil {
		return err
	}
	names := strings.Fields(list)
	// The kubelet's names for the same images.
	names = slices.DeleteFunc(names, func(name string) bool { return strings.HasPrefix(name, "sha256:") })
	_, err = images(ctx, l, n, append([]string{"export", archive}, names...)...)
	return err
}

// images asks a node's containerd.
func images(ctx context.Context, l layout, n node, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	args = append([]string{"--address", n.containerdSocket(), "--namespace", "k8s.io", "images"}, args...)
	cmd := exec.CommandContext(ctx, l.bin("ctr"), args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}
