// Package local runs Guildhall on a Kubernetes cluster of this machine, for the demo and the
// end-to-end tests: hack/cluster, the image, the operator.
package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	image = "guildhall.dev/guildhall:dev"
	// patience bounds each wait for the cluster.
	patience = 2 * time.Minute
	// endTimeout bounds the end of a command that was asked to end.
	endTimeout = 30 * time.Second
)

// Cluster is the machine's cluster with the operator on it.
type Cluster struct {
	// Root is the repository.
	Root string
	// Kubeconfig and KubectlPath lead to the cluster once it is up.
	Kubeconfig, KubectlPath string
	// Log takes what the commands print.
	Log io.Writer

	started bool
}

// Running says whether the machine's cluster is up.
func (c *Cluster) Running(ctx context.Context) bool {
	status := c.tool(ctx, "status")
	status.Stdout, status.Stderr = io.Discard, io.Discard
	return status.Run() == nil
}

// Up starts the cluster unless it is up. Down ends it again if it was started here.
func (c *Cluster) Up(ctx context.Context) error {
	c.started = !c.Running(ctx)
	kubeconfig, err := c.tool(ctx, "up").Text()
	if err != nil {
		return fmt.Errorf("starting the cluster: %w", err)
	}
	c.Kubeconfig = kubeconfig
	c.KubectlPath = filepath.Join(filepath.Dir(kubeconfig), "bin", "kubectl")
	return nil
}

// Down ends the cluster, also one that is half-way up, if Up found none.
func (c *Cluster) Down(ctx context.Context) error {
	if !c.started {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	return c.Tool(ctx, "down")
}

// Deploy builds the image and runs the operator from it.
func (c *Cluster) Deploy(ctx context.Context) error {
	deployed := c.Kubectl(ctx, "-n", "guildhall-system", "get", "deployment/guildhall-controller-manager")
	deployed.Stdout, deployed.Stderr = io.Discard, io.Discard
	again := deployed.Run() == nil
	if err := c.Load(ctx, image); err != nil {
		return err
	}
	if err := c.make(ctx, "deploy", image); err != nil {
		return err
	}
	if again { // the image has the name of the one before
		if err := c.Kubectl(ctx, "-n", "guildhall-system", "rollout", "restart", "deployment/guildhall-controller-manager").Run(); err != nil {
			return err
		}
	}
	return c.WaitForOperator(ctx)
}

// Load builds the image and brings it into the cluster under that name.
func (c *Cluster) Load(ctx context.Context, image string) error {
	return c.make(ctx, "cluster-load", image)
}

func (c *Cluster) make(ctx context.Context, target, image string) error {
	build := c.Command(ctx, "make", "--no-print-directory", target, "IMG="+image, "KUBECTL="+c.KubectlPath)
	if err := build.Run(); err != nil {
		return fmt.Errorf("make %s: %w", target, err)
	}
	return nil
}

// WaitForOperator waits until the operator is rolled out.
func (c *Cluster) WaitForOperator(ctx context.Context) error {
	err := c.Kubectl(ctx, "-n", "guildhall-system", "rollout", "status", "deployment/guildhall-controller-manager",
		"--timeout="+patience.String()).Run()
	if err != nil {
		return fmt.Errorf("waiting for the operator: %w", err)
	}
	return nil
}

// OpenFrontDoor makes the namespace's front door known under the address that leads to it from
// this machine, as one does with a load balancer's, and returns that address.
func (c *Cluster) OpenFrontDoor(ctx context.Context, namespace string) (string, error) {
	ip, err := c.Kubectl(ctx, "-n", namespace, "get", "service", "guildhall-gateway", "-o", "jsonpath={.spec.clusterIP}").Text()
	if err != nil {
		return "", fmt.Errorf("finding the front door: %w", err)
	}
	base := "ws://" + ip
	shards, err := c.Kubectl(ctx, "-n", namespace, "get", "guildshards", "-o", "name").Text()
	if err != nil {
		return "", err
	}
	for shard := range strings.FieldsSeq(shards) {
		patch := fmt.Sprintf(`{"spec":{"gateway":{"frontDoorURL":%q}}}`, base)
		if err := c.Kubectl(ctx, "-n", namespace, "patch", shard, "--type=merge", "-p", patch).Run(); err != nil {
			return "", err
		}
	}
	return base, nil
}

// GuildURL waits until a guild's address is below base, and returns it.
func (c *Cluster) GuildURL(ctx context.Context, namespace, guild, base string) (string, error) {
	id, err := c.Kubectl(ctx, "-n", namespace, "get", "guild", guild, "-o", "jsonpath={.status.id}").Text()
	if err != nil {
		return "", err
	}
	url := base + "/g/" + id + "/"
	err = c.Kubectl(ctx, "-n", namespace, "wait", "guild/"+guild, "--for=jsonpath={.status.gateway.url}="+url, "--timeout="+patience.String()).Run()
	if err != nil {
		return "", fmt.Errorf("waiting for the guild's address: %w", err)
	}
	return url, nil
}

// Command is a child process in the repository's root. When its context ends it is asked to end. It
// has a process group of its own, so that Ctrl-C reaches only its parent, which ends things in order.
type Command struct{ *exec.Cmd }

// Command makes a command whose output goes to Log.
func (c *Cluster) Command(ctx context.Context, name string, args ...string) Command {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = endTimeout
	cmd.Dir = c.Root
	cmd.Env = os.Environ()
	if c.Kubeconfig != "" {
		cmd.Env = append(cmd.Env, "KUBECONFIG="+c.Kubeconfig)
	}
	cmd.Stdout, cmd.Stderr = c.Log, c.Log
	return Command{cmd}
}

// Kubectl makes a kubectl command.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) Command {
	return c.Command(ctx, c.KubectlPath, args...)
}

// Tool runs a command of hack/cluster.
func (c *Cluster) Tool(ctx context.Context, args ...string) error { return c.tool(ctx, args...).Run() }

func (c *Cluster) tool(ctx context.Context, args ...string) Command {
	return c.Command(ctx, "go", append([]string{"-C", "hack/cluster", "run", "."}, args...)...)
}

// Text runs the command and returns what it prints, without white space around it.
func (c Command) Text() (string, error) {
	var out, problems bytes.Buffer
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &problems
	}
	err := c.Run()
	if err != nil && problems.Len() > 0 {
		err = errors.Join(err, errors.New(strings.TrimSpace(problems.String())))
	}
	return strings.TrimSpace(out.String()), err
}
