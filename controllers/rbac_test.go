package controllers

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	v1 "guildhall.dev/guildhall/api/v1"
)

// TestOperatorNeedsNoMoreThanItsRole runs a whole life with the rights of config/rbac/role.yaml
// alone; the server's log has every request that it refused.
func TestOperatorNeedsNoMoreThanItsRole(t *testing.T) {
	w := newWorld(t)
	data, err := os.ReadFile(filepath.Join("..", "config", "rbac", "role.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	role := new(rbacv1.ClusterRole)
	if err := yaml.UnmarshalStrict(data, role); err != nil {
		t.Fatal(err)
	}
	w.create(role, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: role.Name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "operator"}},
	})
	user, err := w.server.env.AddUser(envtest.User{Name: "operator"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	limited := *w.server
	limited.config = user.Config()
	limited.config.QPS = -1
	began := time.Now()
	limited.operate(t, w.namespace, Options{Dial: w.node.dial})

	w.create(makeShard(w.namespace, "shard-a").Storage("1Gi", v1.DeletionDelete).Obj(), makeGuild(w.namespace, "lobby").Obj())
	w.guildIs("lobby", reasonServing)
	update(w, "shard-a", func(s *v1.GuildShard) {
		s.Spec.Image = "registry.example/guildhall:2"
		s.Spec.Storage.WhenDeleted = v1.DeletionRetain
	})
	eventually(t, 20*time.Second, func() string {
		pod := new(corev1.Pod)
		if err := w.client.Get(t.Context(), w.key("shard-a-0"), pod); err != nil || pod.Spec.Containers[0].Image != "registry.example/guildhall:2" {
			return "the roll-out"
		}
		return ""
	})
	w.guildIs("lobby", reasonServing)
	guild, shard := w.guild("lobby"), w.shard("shard-a")
	for _, obj := range []client.Object{guild, shard} {
		if err := w.client.Delete(t.Context(), obj); err != nil {
			t.Fatal(err)
		}
	}
	w.gone(guild)
	w.gone(shard)
	w.gone(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: frontDoorName}})

	for _, write := range w.server.refused(t, w.namespace, began) {
		if strings.HasPrefix(write, operatorAgent) {
			t.Errorf("refused: %s", write)
		}
	}
}
