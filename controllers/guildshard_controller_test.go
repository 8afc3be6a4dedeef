package controllers

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
)

func TestShardObjects(t *testing.T) {
	w := newWorld(t)
	stop := w.operate()
	w.create(makeShard(w.namespace, "shard-a").TLS("cert").Storage("1Gi", v1.DeletionDelete).Obj())
	shard := w.shardIs("shard-a", condReady, reasonServing)

	for _, obj := range []client.Object{
		get[appsv1.StatefulSet](w, "shard-a"), get[corev1.Service](w, "shard-a"),
		get[corev1.Service](w, "shard-a-pods"), get[corev1.PersistentVolumeClaim](w, "shard-a-data"),
	} {
		if !metav1.IsControlledBy(obj, shard) {
			t.Errorf("%T %s is not controlled by the GuildShard", obj, obj.GetName())
		}
		if diff := cmp.Diff(shardLabels("shard-a"), obj.GetLabels()); diff != "" {
			t.Errorf("labels of %T %s (-want +got):\n%s", obj, obj.GetName(), diff)
		}
	}
	for _, obj := range []client.Object{
		get[corev1.Service](w, "guildhall-gateway"), get[corev1.Secret](w, "guildhall-keys"),
		get[corev1.ServiceAccount](w, "guildhall-shard"), get[rbacv1.Role](w, "guildhall-shard"),
		get[rbacv1.RoleBinding](w, "guildhall-shard"), get[networkingv1.NetworkPolicy](w, "guildhall-shard"),
	} {
		if len(obj.GetOwnerReferences()) > 0 {
			t.Errorf("%T %s has an owner", obj, obj.GetName())
		}
	}
	claim := get[corev1.PersistentVolumeClaim](w, "shard-a-data")
	if !slices.Equal(claim.Spec.AccessModes, []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOncePod}) {
		t.Errorf("the claim's access modes are %v", claim.Spec.AccessModes)
	}
	var ports []string
	for _, p := range get[corev1.Service](w, "guildhall-gateway").Spec.Ports {
		ports = append(ports, fmt.Sprintf("%s %d->%s", p.Name, p.Port, p.TargetPort.String()))
	}
	if diff := cmp.Diff([]string{"ws 80->ws", "wss 443->wss"}, ports); diff != "" {
		t.Errorf("ports of the front door (-want +got):\n%s", diff)
	}
	keys := get[corev1.Secret](w, "guildhall-keys")
	if id, key, ok := strings.Cut(string(keys.Data["current"]), "."); !ok || len(id) != 8 || len(key) != 43 {
		t.Errorf("the key is %q", keys.Data["current"])
	}
	for conditionType, want := range map[string]string{
		condAccepted: reasonAccepted, condDurable: "!" + reasonInMemory, condSchedulable: reasonActive,
		condLoadFresh: reasonReported, condUpToDate: reasonUpToDate,
	} {
		w.shardIs("shard-a", conditionType, want)
	}

	// The claim stays when the user wishes so after all, and a volume claim is never shrunk.
	update(w, "shard-a", func(s *v1.GuildShard) { s.Spec.Storage.WhenDeleted = v1.DeletionRetain })
	eventually(t, 10*time.Second, func() string {
		if len(get[corev1.PersistentVolumeClaim](w, "shard-a-data").OwnerReferences) > 0 {
			return "the claim to lose its owner"
		}
		return ""
	})
	w.settled(2 * time.Second)

	// Another operator, of another version, writes nothing.
	stop()
	w.operate(Options{ShardImage: "registry.example/guildhall:2"})
	w.still(5 * time.Second)
	if image := get[appsv1.StatefulSet](w, "shard-a").Spec.Template.Spec.Containers[0].Image; image != testImage {
		t.Errorf("the operator's upgrade alone has changed the image to %s", image)
	}

	// Drift of what is the operator's own is undone; a pod template of the same hash is not touched.
	update(w, "shard-a", func(s *appsv1.StatefulSet) { s.Spec.Replicas = new(int32(0)) })
	update(w, "guildhall-gateway", func(s *corev1.Service) { s.Spec.Selector[labelAccepting] = "maybe" })
	eventually(t, 10*time.Second, func() string {
		if *get[appsv1.StatefulSet](w, "shard-a").Spec.Replicas != 1 {
			return "the replica"
		}
		if get[corev1.Service](w, "guildhall-gateway").Spec.Selector[labelAccepting] != "true" {
			return "the front door's selector"
		}
		return ""
	})
	if image := get[appsv1.StatefulSet](w, "shard-a").Spec.Template.Spec.Containers[0].Image; image != testImage {
		t.Errorf("to undo drift has changed the image to %s", image)
	}

	// The next roll-out takes up the new image.
	update(w, "shard-a", func(s *v1.GuildShard) {
		s.Spec.Template = &v1.PodTemplate{NodeSelector: map[string]string{"disk": "fast"}}
	})
	eventually(t, 20*time.Second, func() string {
		pod := new(corev1.Pod)
		if err := w.client.Get(t.Context(), w.key("shard-a-0"), pod); err != nil {
			return "the new pod"
		}
		if pod.Spec.NodeSelector["disk"] != "fast" || pod.Spec.Containers[0].Image != "registry.example/guildhall:2" {
			return "the pod to be made anew"
		}
		return ""
	})
}

func TestRollOutIsOneShardAtATime(t *testing.T) {
	const shards = 4
	w := newWorld(t)
	w.operate()
	for i := range shards {
		w.create(makeShard(w.namespace, fmt.Sprintf("shard-%d", i)).Obj())
	}
	for i := range shards {
		w.shardIs(fmt.Sprintf("shard-%d", i), condReady, reasonServing)
	}
	for i := range shards {
		update(w, fmt.Sprintf("shard-%d", i), func(s *v1.GuildShard) {
			s.Spec.Template = &v1.PodTemplate{Env: []corev1.EnvVar{{Name: "COLOUR", Value: "blue"}}}
		})
	}
	for i := range shards {
		eventually(t, time.Minute, func() string {
			s := w.shard(fmt.Sprintf("shard-%d", i))
			if s.Status.ObservedGeneration != s.Generation || reason(s.Status.Conditions, condUpToDate) != reasonUpToDate || reason(s.Status.Conditions, condReady) != reasonServing {
				return s.Name + " to be made anew: " + message(s.Status.Conditions, condUpToDate)
			}
			return ""
		})
	}
	w.node.set(func(n *node) {
		if len(n.deleted) != shards {
			t.Errorf("%d pods were deleted, want %d", len(n.deleted), shards)
		}
		for _, d := range n.deleted {
			if d.othersReady != shards-1 {
				t.Errorf("%s was deleted while %d of %d others served", d.name, d.othersReady, shards-1)
			}
		}
	})
}

func TestBrokenPodOfAFormerSpecIsReplaced(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.node.set(func(n *node) {
		n.trouble["shard-a"] = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "back-off 10s"}}
	})
	w.create(makeShard(w.namespace, "shard-a").Obj())
	w.shardIs("shard-a", condReady, "!"+reasonImageNotFound)
	w.node.set(func(n *node) { clear(n.trouble) })
	update(w, "shard-a", func(s *v1.GuildShard) { s.Spec.Image = "registry.example/guildhall:right" })
	w.shardIs("shard-a", condReady, reasonServing)
}

func TestForeignObjectsAreLeftAlone(t *testing.T) {
	for name, foreign := range map[string]client.Object{
		"a StatefulSet of the shard's name": &appsv1.StatefulSet{
			ObjectMeta: metav1.ObjectMeta{Name: "shard-a"},
			Spec: appsv1.StatefulSetSpec{
				Replicas: new(int32(0)),
				Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "other"}},
				Template: corev1.PodTemplateSpec{
					ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "other"}},
					Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "other", Image: "other"}}},
				},
			},
		},
		"a Service of the shard's name": &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: "shard-a"},
			Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 5}}},
		},
		"a Service of the front door's name": &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: "guildhall-gateway"},
			Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 5}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			foreign.SetNamespace(w.namespace)
			w.create(foreign)
			began := time.Now()
			w.operate()
			w.create(makeShard(w.namespace, "shard-a").Obj())
			s := w.shardIs("shard-a", condReady, "!"+reasonNameConflict)
			if m := message(s.Status.Conditions, condReady); !strings.Contains(m, fmt.Sprintf("%q exists and is not this operator's", foreign.GetName())) {
				t.Errorf("the message is %q", m)
			}
			kind := strings.ToLower(reflect.TypeOf(foreign).Elem().Name())
			for _, write := range w.server.writes(t, w.namespace, began, testAgent, nodeAgent) {
				if strings.Contains(write, " "+kind+"s/"+foreign.GetName()+" ") {
					t.Errorf("it was written to: %s", write)
				}
			}
		})
	}
}

func TestUsersOwnKeysAreUsed(t *testing.T) {
	w := newWorld(t)
	w.create(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: keysName}, StringData: map[string]string{"current": "1.mine"}})
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj())
	w.shardIs("shard-a", condReady, reasonServing)
	if got := string(get[corev1.Secret](w, keysName).Data["current"]); got != "1.mine" {
		t.Errorf("the key is %q", got)
	}
}

func TestNamespaceObjectsGoWithTheLastShard(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj(), makeShard(w.namespace, "shard-b").Obj())
	w.shardIs("shard-a", condReady, reasonServing)
	w.shardIs("shard-b", condReady, reasonServing)
	a := w.shard("shard-a")
	if err := w.client.Delete(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	w.gone(a)
	get[corev1.Service](w, frontDoorName)

	b := w.shard("shard-b")
	if err := w.client.Delete(t.Context(), b, client.PropagationPolicy(metav1.DeletePropagationBackground)); err != nil {
		t.Fatal(err)
	}
	w.gone(b)
	for _, obj := range []client.Object{
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: frontDoorName}},
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: shardRoleName}},
		&rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: shardRoleName}},
		&rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: shardRoleName}},
		&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: shardRoleName}},
	} {
		obj.SetNamespace(w.namespace)
		w.gone(obj)
	}
	get[corev1.Secret](w, keysName)
}

func TestNamespaceThatEnds(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj(), makeGuild(w.namespace, "lobby").Obj())
	w.guildIs("lobby", reasonServing)
	if err := w.client.Delete(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: w.namespace}}); err != nil {
		t.Fatal(err)
	}
	// What the namespace controller would do, in no helpful order.
	shard, guild := w.shard("shard-a"), w.guild("lobby")
	if err := w.client.DeleteAllOf(t.Context(), new(v1.GuildShard), client.InNamespace(w.namespace)); err != nil {
		t.Fatal(err)
	}
	if err := w.client.DeleteAllOf(t.Context(), new(corev1.Pod), client.InNamespace(w.namespace), client.GracePeriodSeconds(0)); err != nil {
		t.Fatal(err)
	}
	if err := w.client.DeleteAllOf(t.Context(), new(v1.Guild), client.InNamespace(w.namespace)); err != nil {
		t.Fatal(err)
	}
	w.gone(shard)
	w.gone(guild)
}

func TestForegroundDeletionMakesNothingAnew(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj())
	shard := w.shardIs("shard-a", condReady, reasonServing)
	if err := w.client.Delete(t.Context(), shard, client.PropagationPolicy(metav1.DeletePropagationForeground)); err != nil {
		t.Fatal(err)
	}
	// The garbage collector's part: dependents first, then its finalizer.
	for _, obj := range []client.Object{new(corev1.Service), new(appsv1.StatefulSet)} {
		obj.SetName("shard-a")
		obj.SetNamespace(w.namespace)
		if err := w.client.Delete(t.Context(), obj); client.IgnoreNotFound(err) != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 20*time.Second, func() string {
		if s := w.shard("shard-a"); slices.Contains(s.Finalizers, finalizer) {
			return "the operator's finalizer to go"
		}
		return ""
	})
	for _, obj := range []client.Object{new(corev1.Service), new(appsv1.StatefulSet)} {
		if err := w.client.Get(t.Context(), w.key("shard-a"), obj); !apierrors.IsNotFound(err) {
			t.Errorf("%T was made anew: %v", obj, err)
		}
	}
	if err := w.client.Patch(t.Context(), shard, client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`))); err != nil {
		t.Fatal(err)
	}
	w.gone(shard)
}

func TestPodMeetsTheRestrictedStandard(t *testing.T) {
	s := server(t)
	namespace := s.namespace(t, "pod-security.kubernetes.io/enforce", "restricted")
	for name, shard := range map[string]*v1.GuildShard{
		"plain":   makeShard(namespace, "plain").Obj(),
		"with it": makeShard(namespace, "all").TLS("cert").Storage("1Gi", "").MemoryLimit("256Mi").Env("A", "b").Obj(),
	} {
		t.Run(name, func(t *testing.T) {
			template, err := podTemplate(shard, testImage)
			if err != nil {
				t.Fatal(err)
			}
			data, err := json.Marshal(template)
			if err != nil {
				t.Fatal(err)
			}
			pod := new(corev1.Pod)
			if err := json.Unmarshal(data, pod); err != nil {
				t.Fatal(err)
			}
			pod.Namespace, pod.Name = namespace, podName(shard.Name)
			if err := s.client(t, testAgent).Create(t.Context(), pod, client.DryRunAll); err != nil {
				t.Errorf("the pod is refused: %v", err)
			}
		})
	}
}

func TestShardsMadeTogetherAllStart(t *testing.T) {
	w := newWorld(t)
	w.operate()
	for round := range 5 {
		// Each round begins with a namespace without shards.
		var shards []*v1.GuildShard
		for i := range 4 {
			s := makeShard(w.namespace, fmt.Sprintf("shard-%d-%d", round, i)).Obj()
			w.create(s)
			shards = append(shards, s)
		}
		for _, s := range shards {
			w.shardIs(s.Name, condReady, reasonServing)
		}
		for _, s := range shards {
			if err := w.client.Delete(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range shards {
			w.gone(s)
		}
	}
}

func TestSpecThatMakesNoPodIsSaidToBeRejected(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Env("not=a name", "x").Obj())
	s := w.shardIs("shard-a", condAccepted, "!"+reasonRejected)
	if m := message(s.Status.Conditions, condAccepted); !strings.Contains(m, "not=a name") {
		t.Errorf("the message is %q", m)
	}
	update(w, "shard-a", func(s *v1.GuildShard) { s.Spec.Template = nil })
	w.shardIs("shard-a", condReady, reasonServing)
	w.shardIs("shard-a", condAccepted, reasonAccepted)
}
