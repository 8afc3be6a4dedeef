package controllers

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	v1 "guildhall.dev/guildhall/api/v1"
)

const (
	// rolloutRetry is how soon a shard that waits for others looks again.
	rolloutRetry = 2 * time.Second
	// stuckAfter is how long a pod must have been unready for its replacement to harm nobody.
	stuckAfter = 10 * time.Second
)

// rolloutSlots has the one shard of each namespace whose pod is being replaced. What other shards'
// pods look like says the same; the slot covers the time until the cache shows it.
type rolloutSlots struct {
	mu    sync.Mutex
	slots map[string]rolloutSlot
}

type rolloutSlot struct {
	shard shardRef
	pod   types.UID
}

// take gives the slot to a shard whose old pod is named, unless another has it.
func (s *rolloutSlots) take(namespace string, shard shardRef, pod types.UID) (holder string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slot, taken := s.slots[namespace]; taken && slot.shard != shard {
		return slot.shard.name, false
	}
	s.slots[namespace] = rolloutSlot{shard: shard, pod: pod}
	return "", true
}

// free gives the slot back when the shard's pod is another one.
func (s *rolloutSlots) free(namespace string, shard shardRef, pod types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slot, ok := s.slots[namespace]; ok && slot.shard == shard && slot.pod != pod {
		delete(s.slots, namespace)
	}
}

// drop gives the slot of a shard back that is gone.
func (s *rolloutSlots) drop(namespace, shard string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.slots[namespace].shard.name == shard {
		delete(s.slots, namespace)
	}
}

// rollOut replaces a pod that was not made from the StatefulSet's template, one shard of the
// namespace after the other, and says how far it is.
func (r *shardReconciler) rollOut(ctx context.Context, shard *v1.GuildShard, sts *appsv1.StatefulSet, pod *corev1.Pod) (upToDate verdict, retry time.Duration, err error) {
	switch {
	case sts == nil || sts.Status.ObservedGeneration < sts.Generation || sts.Status.UpdateRevision == "":
		return isFalse(reasonNotMade, "the StatefulSet has just been written"), 0, nil
	case pod == nil:
		return isFalse(reasonNotMade, "the pod does not exist"), 0, nil
	case pod.Labels[appsv1.ControllerRevisionHashLabelKey] == sts.Status.UpdateRevision:
		if podReady(pod) && pod.DeletionTimestamp == nil {
			r.rollouts.free(shard.Namespace, refOf(shard), pod.UID)
		}
		return isTrue(reasonUpToDate, ""), 0, nil
	case pod.DeletionTimestamp != nil:
		return isFalse(reasonRollingOut, "the pod of the former spec is ending"), 0, nil
	}
	if !r.stuck(pod) {
		wait, err := r.waitsFor(ctx, shard, pod)
		if err != nil {
			return isFalse(reasonWaitingToRoll, "the namespace's shards cannot be listed"), 0, err
		}
		if wait != "" {
			return isFalse(reasonWaitingToRoll, fmt.Sprintf("one shard of a namespace at a time: waiting for shard %s to be Ready", wait)), rolloutRetry, nil
		}
	}
	log.FromContext(ctx).Info("Replacing the pod: the spec has changed", "pod", pod.Name, "revision", sts.Status.UpdateRevision)
	r.recorder.Eventf(shard, pod, corev1.EventTypeNormal, reasonRollingOut, "RollOut", "Replacing pod %s: the spec has changed", pod.Name)
	uid := pod.UID
	if err := r.Delete(ctx, pod, client.Preconditions{UID: &uid}); client.IgnoreNotFound(err) != nil {
		return isFalse(reasonRollingOut, "the pod of the former spec cannot be deleted"), 0, fmt.Errorf("deleting pod %s: %w", pod.Name, err)
	}
	return isFalse(reasonRollingOut, "the pod of the former spec is ending"), 0, nil
}

// stuck says whether a pod has been unready for so long that it needs no turn: a crashing pod of
// the former spec must not wait for the others.
func (r *shardReconciler) stuck(pod *corev1.Pod) bool {
	since := pod.CreationTimestamp.Time
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.LastTransitionTime.After(since) {
			since = c.LastTransitionTime.Time
		}
	}
	return !podReady(pod) && r.clock.Since(since) > stuckAfter
}

// waitsFor names a shard of the namespace that has to be Ready first, or takes the slot.
func (r *shardReconciler) waitsFor(ctx context.Context, shard *v1.GuildShard, pod *corev1.Pod) (string, error) {
	var shards v1.GuildShardList
	if err := r.List(ctx, &shards, client.InNamespace(shard.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return "", fmt.Errorf("listing GuildShards: %w", err)
	}
	var pods corev1.PodList
	if err := r.List(ctx, &pods, client.InNamespace(shard.Namespace), client.HasLabels{labelShard}, client.UnsafeDisableDeepCopy); err != nil {
		return "", fmt.Errorf("listing pods: %w", err)
	}
	ready := map[string]bool{}
	for i := range pods.Items {
		ready[pods.Items[i].Name] = healthOf(&pods.Items[i]).ready()
	}
	var blockers []string
	for i := range shards.Items {
		other := &shards.Items[i]
		if other.Name != shard.Name && other.DeletionTimestamp == nil && !ready[podName(other.Name)] {
			blockers = append(blockers, other.Name)
		}
	}
	if len(blockers) > 0 {
		return slices.Min(blockers), nil
	}
	if holder, ok := r.rollouts.take(shard.Namespace, refOf(shard), pod.UID); !ok {
		return holder, nil
	}
	return "", nil
}
