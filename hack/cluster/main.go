// Command cluster builds and runs a real Kubernetes cluster on a bare Linux
// machine, from Go modules and Debian packages alone. See README.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

const usage = `usage: go run . <command>

  assets                  build the control plane and print the folder of its binaries
                          (for KUBEBUILDER_ASSETS; needs no root)
  up                      start the cluster and wait until it can be used (root)
  down                    end it and remove everything that it made (root)
  status                  one line for each component
  stop | start COMPONENT  take a component away, and bring it back
  join | lose node-2      add a node, and end it as a power cut does (root)
  kubeconfig              print the path of the admin kubeconfig
  kubectl ARGS...         run the cluster's kubectl
  image --name REF --out FILE [--entrypoint PATH] [--user UID] BINARY...
                          make an image of static binaries
  load FILE...            import image archives into all nodes

GUILDHALL_CACHE        where binaries are kept (default: the user's cache folder)
GUILDHALL_CLUSTER_DIR  the run folder (default: ` + defaultRunFolder + `)
`

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	cancel()
	var exit exitCode
	switch {
	case errors.As(err, &exit):
		os.Exit(int(exit))
	case err != nil:
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

// An exitCode ends the program without a message, for commands that have said
// all there is to say.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return exitCode(2)
	}
	name, args := args[0], args[1:]
	if name == "help" || name == "-h" || name == "--help" {
		fmt.Print(usage)
		return nil
	}
	// These two need no cluster.
	switch name {
	case "assets":
		return printAssets(ctx)
	case "image":
		return imageCommand(args)
	}

	l, err := layoutFromEnvironment()
	if err != nil {
		return err
	}
	switch name {
	case "up":
		return up(ctx, l)
	case "down":
		return down(ctx, l, os.Stderr)
	case "status":
		return printStatus(ctx, l)
	case "stop", "start":
		if len(args) != 1 {
			return fmt.Errorf("%s takes the name of one component; status lists them", name)
		}
		return control(ctx, l, name, args[0])
	case "join", "lose":
		if len(args) != 1 {
			return fmt.Errorf("%s takes the name of a node: node-2", name)
		}
		if name == "join" {
			return join(ctx, l, args[0])
		}
		return lose(ctx, l, args[0])
	case "kubeconfig":
		fmt.Println(l.kubeconfig())
		return nil
	case "kubectl":
		return kubectl(l, args)
	case "load":
		return load(ctx, l, args)
	case commandInit, commandSupervise:
		if len(args) != 1 {
			return errors.New("this command is for the cluster itself")
		}
		n, err := l.nodeNamed(args[0])
		if err != nil {
			return err
		}
		if name == commandInit {
			return runInit(l, n)
		}
		return supervise(l, n)
	}
	fmt.Fprintf(os.Stderr, "cluster: unknown command %q\n\n%s", name, usage)
	return exitCode(2)
}

func printAssets(ctx context.Context) error {
	c, _, err := openCaches()
	if err != nil {
		return err
	}
	if err := c.build(ctx, os.Stderr); err != nil {
		return err
	}
	fmt.Println(c.bin())
	return nil
}
