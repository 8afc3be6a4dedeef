package controllers

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	accorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	acmetav1 "k8s.io/client-go/applyconfigurations/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
)

// lostNodeSeconds is how long a relay stays on a node that is not heard of.
const lostNodeSeconds = 30

// relayWish is what a guild's relays are made from.
type relayWish struct {
	guild  *v1.Guild
	id     string
	shard  *v1.GuildShard
	image  string
	policy relayplan.Policy
}

// revision is the hash of what shapes relays. As with shards the operator's own version is no part of it, and the
// image is the shard's: an upgrade of the operator replaces no relay.
func (w relayWish) revision() (string, error) {
	data, err := json.Marshal(struct {
		Image    string          `json:"image"`
		TLS      string          `json:"tls,omitempty"`
		Template *v1.PodTemplate `json:"template,omitempty"`
		Guild    types.UID       `json:"guild"`
		Shard    string          `json:"shard"`
		ShardUID types.UID       `json:"shardUID"`
		URL      string          `json:"url"`
		Sessions int             `json:"sessions"`
	}{
		w.image, tlsSecret(w.shard), w.shard.Spec.RelayTemplate, w.guild.UID, w.shard.Name, w.shard.UID,
		w.gatewayURL(), w.policy.SessionsPerRelay,
	})
	if err != nil {
		return "", fmt.Errorf("hashing the spec: %w", err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8]), nil
}

func (w relayWish) gatewayURL() string { return v1.AddressesOf(w.guild, w.id, w.shard).Relays }

// pod makes a relay's pod of that name. It meets the restricted Pod Security Standard.
func (w relayWish) pod(name, revision string) (*corev1.Pod, error) {
	t := w.shard.Spec.RelayTemplate
	if t == nil {
		t = new(v1.PodTemplate)
	}
	args := []string{
		"relay",
		"--namespace=" + w.guild.Namespace,
		"--guild-id=" + w.id,
		"--guild-uid=" + string(w.guild.UID),
		"--name=" + name,
		fmt.Sprintf("--shard-address=%s.%s.%s.svc:%d", podName(w.shard.Name), podsSvcName(w.shard.Name), w.guild.Namespace, linkPort),
		"--link-dir=" + linkDir,
		"--keys-dir=" + keysDir,
		"--gateway-url=" + w.gatewayURL(),
		"--sessions=" + strconv.Itoa(w.policy.SessionsPerRelay),
		fmt.Sprintf("--listen=:%d", wsPort),
		fmt.Sprintf("--admin-listen=:%d", adminPort),
	}
	if tlsSecret(w.shard) != "" {
		args = append(args, fmt.Sprintf("--listen-tls=:%d", wssPort))
	}
	container, err := serverContainer(w.shard, t, w.image, args)
	if err != nil {
		return nil, err
	}
	spec := accorev1.PodSpec().
		WithAutomountServiceAccountToken(false). // everything comes over the link
		WithEnableServiceLinks(false).
		WithTerminationGracePeriodSeconds(int64(gracePeriod(w.policy) / time.Second)).
		WithContainers(container).
		WithVolumes(secretVolumes(w.shard, relayLinkName(w.id))...)
	if err := shapePod(spec, t); err != nil {
		return nil, err
	}
	spec.WithTolerations(lostNode(t.Tolerations)...)
	if len(t.TopologySpreadConstraints) == 0 {
		spec.WithTopologySpreadConstraints(accorev1.TopologySpreadConstraint().
			WithMaxSkew(1).WithTopologyKey(corev1.LabelHostname).WithWhenUnsatisfiable(corev1.ScheduleAnyway).
			WithLabelSelector(acmetav1.LabelSelector().WithMatchLabels(relaySelector(w.id))))
	}
	podSpec, err := convert[corev1.PodSpec](spec)
	if err != nil {
		return nil, fmt.Errorf("converting the template of the spec: %w", err)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: w.guild.Namespace, Name: name,
			Labels:          map[string]string{},
			Annotations:     map[string]string{annotationSafeToEvict: "false"},
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(w.guild, v1.GroupVersion.WithKind("Guild"))},
		},
		Spec: *podSpec,
	}
	maps.Copy(pod.Labels, t.Metadata.Labels)
	maps.Copy(pod.Labels, relayLabels(w.id))
	maps.Copy(pod.Annotations, t.Metadata.Annotations)
	pod.Annotations[annotationRevision] = revision
	return pod, nil
}

// lostNode has a relay that nobody can reach replaced sooner than after Kubernetes' 5 minutes: its sessions go on
// elsewhere, and there is nothing on the node to wait for. What the user tolerates stays as it is.
func lostNode(own []corev1.Toleration) (added []*accorev1.TolerationApplyConfiguration) {
	for _, taint := range []string{corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable} {
		if slices.ContainsFunc(own, func(t corev1.Toleration) bool {
			return (t.Key == taint || t.Key == "") && (t.Effect == corev1.TaintEffectNoExecute || t.Effect == "")
		}) {
			continue
		}
		added = append(added, accorev1.Toleration().WithKey(taint).WithOperator(corev1.TolerationOpExists).
			WithEffect(corev1.TaintEffectNoExecute).WithTolerationSeconds(lostNodeSeconds))
	}
	return added
}

// linked says whether a shard's pod takes links: one that an earlier version has made does not.
func linked(pod *corev1.Pod) bool {
	for _, c := range pod.Spec.Containers {
		for _, p := range c.Ports {
			if p.Name == portLink {
				return true
			}
		}
	}
	return false
}
