package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os/exec"
	"time"
)

// bootstrap brings a fresh cluster to its first use. Every wait has an end, and
// a message that names what it waited for.
func (s *supervisor) bootstrap(ctx context.Context) error {
	n := s.layout.node()
	units := map[string]*unit{}
	for _, u := range s.units {
		units[u.name] = u
	}

	client, err := newAPIClient(s.layout)
	if err != nil {
		return err
	}
	go (&localProvisioner{client: client, folder: s.layout.volumes(), node: n.name}).run(ctx)

	for _, name := range []string{"containerd", "etcd", "kube-apiserver"} {
		s.stage("waiting for %s", name)
		if err := units[name].waitFor(ctx, stateReady, startLimit); err != nil {
			return err
		}
		if name == "containerd" {
			s.stage("importing the sandbox image")
			if err := importImage(ctx, s.layout, s.layout.path("pause.tar")); err != nil {
				return err
			}
		}
	}

	s.stage("applying the cluster's own objects")
	for _, m := range manifests(n) {
		// The namespace or a default role may be a moment behind.
		err := retry(ctx, 30*time.Second, "applying "+m.path, s.layout.log("kube-apiserver"), func() error {
			return client.apply(ctx, m.path, m.yaml)
		})
		if err != nil {
			return err
		}
	}

	for _, u := range s.units {
		s.stage("waiting for %s", u.name)
		if err := u.waitFor(ctx, stateReady, startLimit); err != nil {
			return err
		}
	}

	s.stage("waiting for the node to be ready")
	err = retry(ctx, startLimit, "the node to be ready", s.layout.log("kubelet"), func() error {
		return nodeReady(ctx, client, n)
	})
	if err != nil {
		return err
	}
	s.stage("waiting for the default service account")
	err = retry(ctx, time.Minute, "the default service account", s.layout.log("kube-controller-manager"), func() error {
		return client.get(ctx, "/api/v1/namespaces/default/serviceaccounts/default", nil)
	})
	if err != nil {
		return err
	}
	s.stage("waiting for cluster DNS to answer")
	err = retry(ctx, time.Minute, "cluster DNS to answer at "+dnsIP, s.layout.log("coredns"), func() error {
		return dnsAnswers(ctx)
	})
	if err != nil {
		return err
	}
	s.update(func(status *clusterStatus) { status.Ready = true })
	s.stage("ready")
	return nil
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
func importImage(ctx context.Context, l layout, archive string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, l.bin("ctr"), "--address", l.node().containerdSocket(), "--namespace", "k8s.io",
		"images", "import", archive)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("importing %s: %w\n%s", archive, err, output.String())
	}
	return nil
}
