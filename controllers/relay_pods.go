package controllers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilrand "k8s.io/apimachinery/pkg/util/rand"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers/relayplan"
)

const (
	// createAtOnce bounds the pods made in one pass.
	createAtOnce = 50
	// The first pod that fails is replaced at once, the next ones after createDelay and twice that
	// and so on, up to createDelayMax. After failuresForgotten without one it begins anew.
	createDelay       = 5 * time.Second
	createDelayMax    = 5 * time.Minute
	failuresForgotten = 10 * time.Minute
)

// backoff keeps pods that cannot be made, or always fail, from being made again and again.
type backoff struct {
	failures int
	last     time.Time
	until    time.Time
	// trouble is what the API server said.
	trouble verdict
}

// failed takes in that a pod has failed, or could not be made, that was made at a time. Those that are as old as the one
// that failed last share its trouble, such as the end of a node, and make nobody wait.
func (b *backoff) failed(made, now time.Time) {
	switch {
	case now.Sub(b.last) > failuresForgotten:
		b.failures = 0
	case b.failures > 0 && made.Before(b.last.Truncate(time.Second)): // pods are dated in seconds
		return
	}
	delay := time.Duration(0)
	if b.failures > 0 {
		delay = min(createDelay<<min(b.failures-1, 10), createDelayMax)
	}
	b.failures++
	b.last, b.until = now, now.Add(delay)
}

// pods lists the relays of a guild, and takes in those that have lost their owner.
func (r *relays) pods(ctx context.Context, guild *v1.Guild, id string) ([]*corev1.Pod, error) {
	var list corev1.PodList
	if err := r.List(ctx, &list, client.InNamespace(guild.Namespace), client.UnsafeDisableDeepCopy,
		client.MatchingLabels(relayLabels(id))); err != nil {
		return nil, fmt.Errorf("listing the relays: %w", err)
	}
	pods := make([]*corev1.Pod, 0, len(list.Items))
	for i := range list.Items {
		pod := &list.Items[i]
		switch controllerOf(pod) {
		case guild.UID:
		case "":
			if pod.DeletionTimestamp != nil || guild.DeletionTimestamp != nil {
				continue
			}
			adopted, err := r.adopt(ctx, guild, pod)
			if err != nil {
				return nil, err
			}
			pod = adopted
		default:
			continue // of a Guild that is gone, and so are they soon
		}
		pods = append(pods, pod)
	}
	return pods, nil
}

// adopt makes a guild the owner of a relay without one, such as after a deletion that left orphans.
func (r *relays) adopt(ctx context.Context, guild *v1.Guild, pod *corev1.Pod) (*corev1.Pod, error) {
	log.FromContext(ctx).Info("Adopting a relay", "pod", pod.Name)
	adopted := pod.DeepCopy()
	adopted.OwnerReferences = append(adopted.OwnerReferences, *metav1.NewControllerRef(guild, v1.GroupVersion.WithKind("Guild")))
	if err := r.patchPod(ctx, pod, adopted); err != nil {
		return nil, fmt.Errorf("adopting pod %s: %w", pod.Name, err)
	}
	return adopted, nil
}

// patchPod writes changed, unless somebody has changed the pod meanwhile: lists are replaced whole.
func (r *relays) patchPod(ctx context.Context, pod, changed *corev1.Pod) error {
	patch := client.MergeFromWithOptions(pod, client.MergeFromWithOptimisticLock{})
	return client.IgnoreNotFound(r.Patch(ctx, changed, patch, client.FieldOwner(fieldManager)))
}

// markPods brings labels and annotations of the relays in line with a decision: who is to go, who takes new
// connections, and who has been ready.
func (r *relays) markPods(ctx context.Context, p *relayPass) error {
	var failed []error
	for i, pod := range p.facts.pods {
		if pod.DeletionTimestamp != nil {
			continue
		}
		changed := marked(pod, slices.Contains(p.decision.Accept, pod.Name), slices.Contains(p.decision.Drain, pod.Name), p.facts.now)
		if changed == nil {
			continue
		}
		if err := r.patchPod(ctx, pod, changed); err != nil {
			if !apierrors.IsConflict(err) {
				failed = append(failed, fmt.Errorf("marking pod %s: %w", pod.Name, err))
			}
			continue
		}
		p.state.ledger.wrote(changed, p.facts.now)
		p.facts.pods[i] = changed
	}
	return errors.Join(failed...)
}

// marked is a pod with the marks that it should have, nil when it has them.
func marked(pod *corev1.Pod, accepts, drains bool, now time.Time) *corev1.Pod {
	labels, annotations := maps.Clone(pod.Labels), maps.Clone(pod.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	delete(labels, labelAccepting)
	if accepts {
		labels[labelAccepting] = "true"
	}
	if _, already := labels[labelDraining]; drains && !already {
		labels[labelDraining] = strconv.FormatInt(now.Unix(), 10)
	}
	if podReady(pod) && annotations[annotationReadySince] == "" {
		annotations[annotationReadySince] = now.UTC().Format(time.RFC3339)
	}
	if maps.Equal(labels, pod.Labels) && len(annotations) == len(pod.Annotations) {
		return nil
	}
	changed := pod.DeepCopy()
	changed.Labels, changed.Annotations = labels, annotations
	return changed
}

// createPods makes the relays that are wanted, unless earlier ones have failed a moment ago.
func (r *relays) createPods(ctx context.Context, wish relayWish, p *relayPass) error {
	b := &p.state.create
	if p.decision.Create == 0 {
		b.trouble = verdict{}
		return nil
	}
	if p.facts.now.Before(b.until) {
		return nil
	}
	for range min(p.decision.Create, createAtOnce) {
		pod, err := wish.pod(relaysName(wish.id)+"-"+utilrand.String(5), p.facts.revision)
		if err != nil {
			return err
		}
		if err := r.Create(ctx, pod, client.FieldOwner(fieldManager)); err != nil {
			return r.createFailed(ctx, wish, b, p.facts.now, err)
		}
		log.FromContext(ctx).V(1).Info("Made a relay", "pod", pod.Name)
		p.state.ledger.made(pod, p.facts.now)
		p.replicas++
		p.updated++
	}
	b.trouble = verdict{}
	return nil
}

// createFailed waits longer and longer with what the API server refuses, and says why.
func (r *relays) createFailed(ctx context.Context, wish relayWish, b *backoff, now time.Time, err error) error {
	said := rejection(err)
	if said == "" || namespaceEnding(err) {
		return fmt.Errorf("creating a relay: %w", err)
	}
	b.failed(now, now)
	b.until = now.Add(max(b.until.Sub(now), createDelay))
	reason := reasonRejected
	if apierrors.IsForbidden(err) && strings.Contains(said, "exceeded quota") {
		reason = reasonQuotaExceeded
	}
	if b.trouble.reason != reason {
		r.recorder.Eventf(wish.guild, nil, corev1.EventTypeWarning, reason, "CreateRelay", "A relay cannot be made: %s", truncate(said, maxMessage/2))
	}
	// The name is random, and messages that differ each time would be written each time.
	b.trouble = isFalse(reason, "a relay cannot be made: "+withoutNames(said, relaysName(wish.id)))
	log.FromContext(ctx).Info("A relay cannot be made", "error", said, "wait", b.until.Sub(now).String())
	return nil
}

// withoutNames takes the random part of relays' names out of a message.
func withoutNames(s, prefix string) string {
	var out strings.Builder
	for {
		before, after, found := strings.Cut(s, prefix+"-")
		out.WriteString(before)
		if !found {
			return out.String()
		}
		out.WriteString(prefix)
		s = strings.TrimLeft(after, "bcdfghjklmnpqrstvwxz2456789")
	}
}

// deletePods deletes those that have ended, never got ready, or are empty. Others drain when they get SIGTERM.
func (r *relays) deletePods(ctx context.Context, p *relayPass) error {
	var failed []error
	for _, pod := range p.facts.pods {
		if !slices.Contains(p.decision.Delete, pod.Name) || pod.DeletionTimestamp != nil {
			continue
		}
		if phase, _ := relayPhase(pod); phase == relayplan.Failed || phase == relayplan.Pending && drainingSince(pod).IsZero() &&
			p.facts.now.Sub(pod.CreationTimestamp.Time) > p.facts.policy.PendingTimeout {
			log.FromContext(ctx).Info("Replacing a relay that has failed", "pod", pod.Name, "health", healthOf(pod).message)
			p.state.create.failed(pod.CreationTimestamp.Time, p.facts.now)
		}
		if err := r.deletePod(ctx, pod); err != nil {
			failed = append(failed, err)
			continue
		}
		p.state.ledger.deleted(pod, p.facts.now)
	}
	return errors.Join(failed...)
}

func (r *relays) deletePod(ctx context.Context, pod *corev1.Pod, opts ...client.DeleteOption) error {
	uid := pod.UID
	opts = append(opts, client.Preconditions{UID: &uid})
	if err := r.Delete(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}, opts...); err != nil &&
		!apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("deleting pod %s: %w", pod.Name, err)
	}
	log.FromContext(ctx).V(1).Info("Deleted a relay", "pod", pod.Name)
	return nil
}
