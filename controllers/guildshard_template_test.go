package controllers

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
)

func templateOf(t *testing.T, shard *v1.GuildShard) corev1.PodTemplateSpec {
	t.Helper()
	ac, err := podTemplate(shard, testImage)
	if err != nil {
		t.Fatal(err)
	}
	template, err := convert[corev1.PodTemplateSpec](ac)
	if err != nil {
		t.Fatal(err)
	}
	return *template
}

func TestPodTemplate(t *testing.T) {
	for name, tc := range map[string]struct {
		shard *shardBuilder
		args  []string
		ports []string
		mount []string
		env   []string
	}{
		"a minimal shard": {
			shard: makeShard("ns", "a"),
			args:  []string{"serve", "--namespace=ns", "--shard-name=a", "--shard-uid=u", "--keys-dir=/etc/guildhall/keys", "--link-listen=:9443", "--link-dir=/etc/guildhall/link"},
			ports: []string{"ws", "admin", "link"},
			mount: []string{"/etc/guildhall/keys", "/etc/guildhall/link"},
		},
		"with certificate, volume, limit and environment": {
			shard: makeShard("ns", "a").TLS("cert").Storage("1Gi", "").MemoryLimit("1Gi").Env("A", "b"),
			args:  []string{"serve", "--namespace=ns", "--shard-name=a", "--shard-uid=u", "--keys-dir=/etc/guildhall/keys", "--link-listen=:9443", "--link-dir=/etc/guildhall/link", "--data-dir=/data", "--tls-dir=/etc/guildhall/tls"},
			ports: []string{"ws", "admin", "wss", "link"},
			mount: []string{"/etc/guildhall/keys", "/etc/guildhall/link", "/etc/guildhall/tls", "/data"},
			env:   []string{"A", "GOMEMLIMIT"},
		},
		"the user's own GOMEMLIMIT stands": {
			shard: makeShard("ns", "a").MemoryLimit("1Gi").Env("GOMEMLIMIT", "1MiB"),
			args:  []string{"serve", "--namespace=ns", "--shard-name=a", "--shard-uid=u", "--keys-dir=/etc/guildhall/keys", "--link-listen=:9443", "--link-dir=/etc/guildhall/link"},
			ports: []string{"ws", "admin", "link"},
			mount: []string{"/etc/guildhall/keys", "/etc/guildhall/link"},
			env:   []string{"GOMEMLIMIT"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tc.shard.UID = "u"
			c := templateOf(t, tc.shard.Obj()).Spec.Containers[0]
			var ports, mount, env []string
			for _, p := range c.Ports {
				ports = append(ports, p.Name)
			}
			for _, m := range c.VolumeMounts {
				mount = append(mount, m.MountPath)
			}
			for _, e := range c.Env {
				env = append(env, e.Name)
			}
			if diff := cmp.Diff([][]string{tc.args, tc.ports, tc.mount, tc.env}, [][]string{c.Args, ports, mount, env}); diff != "" {
				t.Errorf("args, ports, mounts, env (-want +got):\n%s", diff)
			}
			if !slices.Equal(c.Command, []string{"/shardserver"}) {
				t.Errorf("the command is %v", c.Command)
			}
		})
	}
}

func TestPodTemplateKeepsItsOwnLabels(t *testing.T) {
	shard := makeShard("ns", "a").Obj()
	shard.Spec.Template = &v1.PodTemplate{Metadata: v1.PodMetadata{Labels: map[string]string{"team": "x", labelName: "y"}}}
	want := map[string]string{
		"team": "x", labelName: managedBy, labelManagedBy: managedBy, labelComponent: componentShard,
		labelShard: "a", labelAccepting: "true",
	}
	if diff := cmp.Diff(want, templateOf(t, shard).Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
}

func TestServersRequestWhatNobodyHasSaid(t *testing.T) {
	list := func(cpu, memory string) corev1.ResourceList {
		l := corev1.ResourceList{}
		for name, amount := range map[corev1.ResourceName]string{corev1.ResourceCPU: cpu, corev1.ResourceMemory: memory} {
			if amount != "" {
				l[name] = resource.MustParse(amount)
			}
		}
		return l
	}
	for name, tc := range map[string]struct {
		limits, requests, want corev1.ResourceList
	}{
		"nothing is said":   {nil, nil, list("100m", "128Mi")},
		"a limit of memory": {list("", "1Gi"), nil, list("100m", "")},
		"requested CPU":     {nil, list("2", ""), list("2", "128Mi")},
		"no CPU is wanted":  {nil, list("0", "64Mi"), list("0", "64Mi")},
		"limits alone":      {list("2", "1Gi"), nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			template := &v1.PodTemplate{Resources: corev1.ResourceRequirements{Limits: tc.limits, Requests: tc.requests}}
			shard := makeShard("ns", "a").Obj()
			shard.Spec.Template, shard.Spec.RelayTemplate = template, template
			pod, err := relayWish{guild: makeGuild("ns", "lobby").Obj(), id: "1", shard: shard}.pod("relay", "revision")
			if err != nil {
				t.Fatal(err)
			}
			want := corev1.ResourceRequirements{Limits: tc.limits, Requests: tc.want}
			for what, got := range map[string]corev1.ResourceRequirements{
				"shard": templateOf(t, shard).Spec.Containers[0].Resources,
				"relay": pod.Spec.Containers[0].Resources,
			} {
				if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
					t.Errorf("%s (-want +got):\n%s", what, diff)
				}
			}
		})
	}
}

func TestTemplateHash(t *testing.T) {
	base := func() *shardBuilder { return makeShard("ns", "a").Storage("1Gi", "") }
	for name, tc := range map[string]struct {
		shard *shardBuilder
		same  bool
	}{
		"capacity":      {base().Capacity(7), true},
		"front door":    {base().FrontDoor("ws://x"), true},
		"availability":  {base().Availability(v1.ShardCordoned), true},
		"a larger size": {makeShard("ns", "a").Storage("2Gi", ""), true},
		"environment":   {base().Env("A", "b"), false},
		"certificate":   {base().TLS("cert"), false},
		"no storage":    {makeShard("ns", "a"), false},
	} {
		t.Run(name, func(t *testing.T) {
			want, _ := templateHash(base().Obj())
			got, err := templateHash(tc.shard.Obj())
			if err != nil || (got == want) != tc.same {
				t.Errorf("hash %s, before %s, error %v; want the same: %t", got, want, err, tc.same)
			}
		})
	}
}

func TestPodHealth(t *testing.T) {
	pod := func(state corev1.ContainerState) *corev1.Pod {
		return &corev1.Pod{Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			Name: containerName, Image: "img", State: state,
			LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 2, Reason: "Error"}},
		}}}}
	}
	waiting := func(reason, message string) *corev1.Pod {
		return pod(corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}})
	}
	for name, tc := range map[string]struct {
		pod  *corev1.Pod
		want podHealth
	}{
		"no pod":            {nil, podHealth{reasonPodMissing, "the pod does not exist"}},
		"image missing":     {waiting("ErrImagePull", "rpc error"), podHealth{reasonImageNotFound, `ErrImagePull: the kubelet cannot get image "img"`}},
		"image in back-off": {waiting("ImagePullBackOff", "Back-off 5m"), podHealth{reasonImageNotFound, `ErrImagePull: the kubelet cannot get image "img"`}},
		"crashing":          {waiting("CrashLoopBackOff", "back-off 40s"), podHealth{reasonPodNotReady, "CrashLoopBackOff: the container ends with exit code 2 (Error)"}},
		"keys missing":      {waiting("CreateContainerConfigError", `secret "x" not found`), podHealth{reasonPodNotReady, `CreateContainerConfigError: secret "x" not found`}},
		"starting":          {waiting("ContainerCreating", ""), podHealth{reasonPodNotReady, "the pod is starting"}},
		"running": {
			pod(corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}),
			podHealth{reasonPodNotReady, "the container runs and is not ready yet"},
		},
		"unschedulable": {
			&corev1.Pod{Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{
				Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: "0/1 nodes",
			}}}},
			podHealth{reasonPodNotReady, "Unschedulable: 0/1 nodes"},
		},
		"ready": {
			&corev1.Pod{Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}},
			podHealth{},
		},
		"ending": {
			&corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: new(metav1.Now())},
				Status:     corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
			},
			podHealth{reasonPodNotReady, "the pod is being deleted"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, healthOf(tc.pod), cmp.AllowUnexported(podHealth{})); diff != "" {
				t.Errorf("health (-want +got):\n%s", diff)
			}
		})
	}
}
