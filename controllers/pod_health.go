package controllers

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// podHealth is what a pod's status says about it: no reason means that it is ready. Its words
// are made from what lasts, not from the kubelet's back-off times, so that a pod that stays
// broken causes no writes.
type podHealth struct {
	reason  string
	message string
}

func (h podHealth) ready() bool { return h.reason == "" }

// imageTroubles are the kubelet's reasons for an image that it cannot get.
var imageTroubles = map[string]bool{
	"ErrImagePull":              true,
	"ImagePullBackOff":          true,
	"InvalidImageName":          true,
	"ErrImageNeverPull":         true,
	"ImageInspectError":         true,
	"RegistryUnavailable":       true,
	"SignatureValidationFailed": true,
}

func healthOf(pod *corev1.Pod) podHealth {
	switch {
	case pod == nil:
		return podHealth{reasonPodMissing, "the pod does not exist"}
	case pod.DeletionTimestamp != nil:
		return podHealth{reasonPodNotReady, "the pod is being deleted"}
	case podReady(pod):
		return podHealth{}
	case pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded:
		return podHealth{reasonPodNotReady, fmt.Sprintf("the pod has ended: %s", firstOf(pod.Status.Reason, string(pod.Status.Phase)))}
	}
	for _, s := range pod.Status.ContainerStatuses {
		if s.Name == containerName {
			return containerHealth(s)
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return podHealth{reasonPodNotReady, fmt.Sprintf("%s: %s", firstOf(c.Reason, corev1.PodReasonUnschedulable), c.Message)}
		}
	}
	return podHealth{reasonPodNotReady, "the pod is starting"}
}

func containerHealth(s corev1.ContainerStatus) podHealth {
	switch waiting, ended := s.State.Waiting, s.LastTerminationState.Terminated; {
	case waiting != nil && imageTroubles[waiting.Reason]:
		reason := waiting.Reason
		if reason == "ImagePullBackOff" {
			reason = "ErrImagePull" // the two alternate
		}
		return podHealth{reasonImageNotFound, fmt.Sprintf("%s: the kubelet cannot get image %q", reason, s.Image)}
	case waiting != nil && waiting.Reason == "CrashLoopBackOff" && ended != nil:
		return podHealth{reasonPodNotReady, "CrashLoopBackOff: the container ends with " + endOf(ended)}
	case waiting != nil && waiting.Reason != "" && waiting.Reason != "ContainerCreating" && waiting.Reason != "PodInitializing":
		return podHealth{reasonPodNotReady, fmt.Sprintf("%s: %s", waiting.Reason, waiting.Message)}
	case s.State.Terminated != nil:
		return podHealth{reasonPodNotReady, "the container has ended with " + endOf(s.State.Terminated)}
	case s.State.Running != nil:
		return podHealth{reasonPodNotReady, "the container runs and is not ready yet"}
	}
	return podHealth{reasonPodNotReady, "the pod is starting"}
}

// endOf is how a container ended, and what it said of it.
func endOf(t *corev1.ContainerStateTerminated) string {
	end := fmt.Sprintf("exit code %d (%s)", t.ExitCode, t.Reason)
	if said := strings.TrimSpace(t.Message); said != "" {
		end += ": " + said
	}
	return end
}

func podReady(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
