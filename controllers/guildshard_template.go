package controllers

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"
	accorev1 "k8s.io/client-go/applyconfigurations/core/v1"

	v1 "guildhall.dev/guildhall/api/v1"
)

// templateHash is the hash of the fields of a GuildShard that shape its pod. The operator's own
// version and image are no part of it, so its upgrade restarts no shard.
func templateHash(shard *v1.GuildShard) (string, error) {
	data, err := json.Marshal(struct {
		Image    string          `json:"image,omitempty"`
		TLS      string          `json:"tls,omitempty"`
		Storage  bool            `json:"storage,omitempty"`
		Template *v1.PodTemplate `json:"template,omitempty"`
	}{shard.Spec.Image, tlsSecret(shard), shard.Spec.Storage != nil, shard.Spec.Template})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8]), nil
}

func tlsSecret(shard *v1.GuildShard) string {
	if shard.Spec.Gateway == nil {
		return ""
	}
	return shard.Spec.Gateway.TLSSecretName
}

// podTemplate is the pod of a shard. It meets the restricted Pod Security Standard.
func podTemplate(shard *v1.GuildShard, operatorImage string) (*accorev1.PodTemplateSpecApplyConfiguration, error) {
	t := shard.Spec.Template
	if t == nil {
		t = new(v1.PodTemplate)
	}
	container, err := shardContainer(shard, t, firstOf(shard.Spec.Image, operatorImage))
	if err != nil {
		return nil, err
	}
	spec := accorev1.PodSpec().
		WithServiceAccountName(shardRoleName).
		WithAutomountServiceAccountToken(true). // it watches its Guilds
		WithEnableServiceLinks(false).
		WithTerminationGracePeriodSeconds(60).
		WithContainers(container).
		WithVolumes(secretVolumes(shard, shardLinkName(shard.Name))...)
	if shard.Spec.Storage != nil {
		spec.WithVolumes(accorev1.Volume().WithName("data").
			WithPersistentVolumeClaim(accorev1.PersistentVolumeClaimVolumeSource().WithClaimName(claimName(shard.Name))))
	}
	if err := shapePod(spec, t); err != nil {
		return nil, err
	}
	labels := maps.Clone(t.Metadata.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, acceptingSelector(shardLabels(shard.Name)))
	return accorev1.PodTemplateSpec().WithLabels(labels).WithAnnotations(t.Metadata.Annotations).WithSpec(spec), nil
}

// secretVolumes are those of shards and relays: the keys, the certificate of the link and, if there is one, that
// for clients.
func secretVolumes(shard *v1.GuildShard, link string) []*accorev1.VolumeApplyConfiguration {
	volume := func(name, secret string) *accorev1.VolumeApplyConfiguration {
		return accorev1.Volume().WithName(name).WithSecret(accorev1.SecretVolumeSource().WithSecretName(secret).WithOptional(false))
	}
	volumes := []*accorev1.VolumeApplyConfiguration{volume("keys", keysName), volume(portLink, link)}
	if name := tlsSecret(shard); name != "" {
		volumes = append(volumes, volume("tls", name))
	}
	return volumes
}

// shapePod adds what the user wishes of the pod.
func shapePod(spec *accorev1.PodSpecApplyConfiguration, t *v1.PodTemplate) error {
	security := t.SecurityContext
	if security == nil {
		security = &corev1.PodSecurityContext{
			RunAsNonRoot:        new(true),
			RunAsUser:           new(int64(nonRootUser)),
			RunAsGroup:          new(int64(nonRootUser)),
			FSGroup:             new(int64(nonRootUser)),
			FSGroupChangePolicy: new(corev1.FSGroupChangeOnRootMismatch),
			SeccompProfile:      &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		}
	}
	// The types of the API are what users write, those of apply configurations what is applied.
	wished, err := convert[accorev1.PodSpecApplyConfiguration](struct {
		NodeSelector              map[string]string                 `json:"nodeSelector,omitempty"`
		Tolerations               []corev1.Toleration               `json:"tolerations,omitempty"`
		Affinity                  *corev1.Affinity                  `json:"affinity,omitempty"`
		TopologySpreadConstraints []corev1.TopologySpreadConstraint `json:"topologySpreadConstraints,omitempty"`
		ImagePullSecrets          []corev1.LocalObjectReference     `json:"imagePullSecrets,omitempty"`
		SecurityContext           *corev1.PodSecurityContext        `json:"securityContext,omitempty"`
	}{t.NodeSelector, t.Tolerations, t.Affinity, t.TopologySpreadConstraints, t.ImagePullSecrets, security})
	if err != nil {
		return fmt.Errorf("converting the template of the spec: %w", err)
	}
	spec.NodeSelector = wished.NodeSelector
	spec.Tolerations = wished.Tolerations
	spec.Affinity = wished.Affinity
	spec.TopologySpreadConstraints = wished.TopologySpreadConstraints
	spec.ImagePullSecrets = wished.ImagePullSecrets
	spec.SecurityContext = wished.SecurityContext
	if t.PriorityClassName != "" {
		spec.WithPriorityClassName(t.PriorityClassName)
	}
	return nil
}

func shardContainer(shard *v1.GuildShard, t *v1.PodTemplate, image string) (*accorev1.ContainerApplyConfiguration, error) {
	args := []string{
		"serve",
		"--namespace=" + shard.Namespace,
		"--shard-name=" + shard.Name,
		"--shard-uid=" + string(shard.UID),
		"--keys-dir=" + keysDir,
		fmt.Sprintf("--link-listen=:%d", linkPort),
		"--link-dir=" + linkDir,
	}
	if shard.Spec.Storage != nil {
		args = append(args, "--data-dir="+dataDir)
	}
	c, err := serverContainer(shard, t, image, args)
	if err != nil {
		return nil, err
	}
	c.WithPorts(accorev1.ContainerPort().WithName(portLink).WithContainerPort(linkPort).WithProtocol(corev1.ProtocolTCP))
	if shard.Spec.Storage != nil {
		c.WithVolumeMounts(accorev1.VolumeMount().WithName("data").WithMountPath(dataDir))
	}
	return c, nil
}

// serverContainer is what the containers of shards and relays have in common.
func serverContainer(shard *v1.GuildShard, t *v1.PodTemplate, image string, args []string) (*accorev1.ContainerApplyConfiguration, error) {
	mount := func(name, dir string) *accorev1.VolumeMountApplyConfiguration {
		return accorev1.VolumeMount().WithName(name).WithMountPath(dir).WithReadOnly(true)
	}
	c := accorev1.Container().
		WithName(containerName).
		WithImage(image).
		WithCommand("/shardserver").
		WithPorts(
			accorev1.ContainerPort().WithName(portWS).WithContainerPort(wsPort).WithProtocol(corev1.ProtocolTCP),
			accorev1.ContainerPort().WithName(portAdmin).WithContainerPort(adminPort).WithProtocol(corev1.ProtocolTCP),
		).
		WithVolumeMounts(mount("keys", keysDir), mount(portLink, linkDir)).
		// A start may re-read logs; readiness decides who gets connections and is asked often.
		WithStartupProbe(adminProbe("/healthz").WithPeriodSeconds(1).WithFailureThreshold(120)).
		WithLivenessProbe(adminProbe("/healthz").WithPeriodSeconds(10).WithTimeoutSeconds(5).WithFailureThreshold(3)).
		WithReadinessProbe(adminProbe("/readyz").WithPeriodSeconds(1).WithTimeoutSeconds(1).WithFailureThreshold(3)).
		WithSecurityContext(accorev1.SecurityContext().
			WithAllowPrivilegeEscalation(false).
			WithReadOnlyRootFilesystem(true).
			WithRunAsNonRoot(true).
			WithCapabilities(accorev1.Capabilities().WithDrop("ALL")))
	if tlsSecret(shard) != "" {
		args = append(args, "--tls-dir="+tlsDir)
		c.WithPorts(accorev1.ContainerPort().WithName(portWSS).WithContainerPort(wssPort).WithProtocol(corev1.ProtocolTCP)).
			WithVolumeMounts(mount("tls", tlsDir))
	}
	if t.ImagePullPolicy != "" {
		c.WithImagePullPolicy(t.ImagePullPolicy)
	}
	wished, err := convert[accorev1.ContainerApplyConfiguration](struct {
		Resources *corev1.ResourceRequirements `json:"resources,omitempty"`
		Env       []corev1.EnvVar              `json:"env,omitempty"`
	}{resourcesOf(t), serverEnv(t)})
	if err != nil {
		return nil, fmt.Errorf("converting the template of the spec: %w", err)
	}
	c.Resources, c.Env = wished.Resources, wished.Env
	return c.WithArgs(args...), nil
}

// defaultRequests are what a server needs that has little to do. One that asks for nothing gets next to no CPU while its
// node is busy, and is the first that a node without memory evicts.
var defaultRequests = corev1.ResourceList{
	corev1.ResourceCPU:    resource.MustParse("100m"),
	corev1.ResourceMemory: resource.MustParse("128Mi"),
}

// resourcesOf are the user's, and the default requests for what they say nothing of.
func resourcesOf(t *v1.PodTemplate) *corev1.ResourceRequirements {
	wished := t.Resources.DeepCopy()
	for name, amount := range defaultRequests {
		_, requested := wished.Requests[name]
		_, limited := wished.Limits[name] // then that is the request, too
		if requested || limited {
			continue
		}
		if wished.Requests == nil {
			wished.Requests = corev1.ResourceList{}
		}
		wished.Requests[name] = amount
	}
	return wished
}

// serverEnv is the user's environment, and the Go runtime's memory limit unless the user sets it.
func serverEnv(t *v1.PodTemplate) []corev1.EnvVar {
	const goMemLimit = "GOMEMLIMIT"
	var env []corev1.EnvVar
	own := false
	for _, e := range t.Env {
		own = own || e.Name == goMemLimit
		env = append(env, e)
	}
	if _, limited := t.Resources.Limits[corev1.ResourceMemory]; limited && !own {
		env = append(env, corev1.EnvVar{Name: goMemLimit, ValueFrom: &corev1.EnvVarSource{
			ResourceFieldRef: &corev1.ResourceFieldSelector{
				ContainerName: containerName, Resource: "limits.memory", Divisor: resource.MustParse("1"),
			},
		}})
	}
	return env
}

func adminProbe(path string) *accorev1.ProbeApplyConfiguration {
	return accorev1.Probe().WithHTTPGet(accorev1.HTTPGetAction().WithPath(path).WithPort(intstr.FromString(portAdmin)))
}
