package e2e

import (
	"context"
	"testing"
	"time"
)

// TestUndeploy removes everything while a guild is served, and deploys again for those who come after.
func TestUndeploy(t *testing.T) {
	namespace := makeNamespace(t)
	guildOn(t, namespace, "shard-a")
	t.Cleanup(func() {
		if err := cluster.Deploy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), *patience)
	defer cancel()
	began := time.Now()
	if err := cluster.Command(ctx, "make", "--no-print-directory", "undeploy", "KUBECTL="+cluster.KubectlPath).Run(); err != nil {
		t.Fatal(err)
	}
	t.Logf("undeployed after %v", time.Since(began).Round(time.Millisecond))
	if left := kubectl(t, "get", "crds,clusterroles,clusterrolebindings,namespaces", "-o", "name", "-l", "app.kubernetes.io/name=guildhall"); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	// Kubernetes collects what the shards owned a moment later.
	eventually(t, "nothing of Guildhall to be left in the namespace", func() bool {
		return kubectl(t, "-n", namespace, "get", "statefulsets,services,pods,serviceaccounts,roles,networkpolicies", "-o", "name",
			"-l", "app.kubernetes.io/managed-by=guildhall") == ""
	})
}
