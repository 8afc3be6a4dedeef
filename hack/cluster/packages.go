package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// A requirement is something that the machine must have, and the Debian package
// that brings it.
type requirement struct {
	debian string
	check  []string // a command that works when it is there
}

var requirements = []requirement{
	{"nftables", []string{"nft", "--version"}},
	{"iproute2", []string{"ip", "-Version"}},
	{"conntrack", []string{"conntrack", "--version"}},
	{"mount", []string{"mount", "--version"}}, // the kubelet mounts with it
}

// buildRequirements are needed only while runc is not built yet.
var buildRequirements = []requirement{
	{"gcc", []string{"gcc", "--version"}},
	{"libc6-dev", []string{"sh", "-c", "echo '#include <stdlib.h>' | gcc -E -"}},
	{"pkg-config", []string{"pkg-config", "--version"}},
	{"libseccomp-dev", []string{"pkg-config", "--exists", "libseccomp"}},
}

// installPackages installs what is missing with apt-get, where there is one.
func installPackages(ctx context.Context, progress io.Writer, wanted []requirement) error {
	missing := missingPackages(wanted)
	if len(missing) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("the machine lacks %s, and has no apt-get to install it", strings.Join(missing, ", "))
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	fmt.Fprintf(progress, "installing %s\n", strings.Join(missing, " "))
	for _, args := range [][]string{{"update"}, append([]string{"install", "--yes", "--no-install-recommends"}, missing...)} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if output, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, output)
		}
	}
	if still := missingPackages(wanted); len(still) > 0 {
		return fmt.Errorf("installed, and yet not working: %s", strings.Join(still, ", "))
	}
	return nil
}

func missingPackages(wanted []requirement) []string {
	var missing []string
	for _, r := range wanted {
		if exec.Command(r.check[0], r.check[1:]...).Run() != nil {
			missing = append(missing, r.debian)
		}
	}
	return missing
}
