package controllers

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
)

// ledgerLimit is how long the cache may take to show what was written.
const ledgerLimit = 10 * time.Second

// podLedger has what was written to pods until the cache shows it: a plan on a cache that is late would
// make pods twice, or choose others to go.
type podLedger map[string]podWrite

type podWrite struct {
	pod *corev1.Pod
	// made: the cache has not shown the pod yet. It has shown all others.
	made, deleted bool
	at            time.Time
}

func (l podLedger) made(pod *corev1.Pod, now time.Time) {
	l[pod.Name] = podWrite{pod: pod, made: true, at: now}
}

func (l podLedger) wrote(pod *corev1.Pod, now time.Time) {
	l[pod.Name] = podWrite{pod: pod, made: l[pod.Name].made, at: now}
}

func (l podLedger) deleted(pod *corev1.Pod, now time.Time) {
	l[pod.Name] = podWrite{pod: pod, deleted: true, at: now}
}

// current is what the cache shows, with what it does not show yet.
func (l podLedger) current(cached []*corev1.Pod, now time.Time) []*corev1.Pod {
	out := make([]*corev1.Pod, 0, len(cached))
	seen := make(map[string]bool, len(cached))
	for _, pod := range cached {
		seen[pod.Name] = true
		w, ok := l[pod.Name]
		switch {
		case !ok:
		case w.pod.UID != pod.UID || now.Sub(w.at) > ledgerLimit:
			delete(l, pod.Name)
		case w.deleted && pod.DeletionTimestamp == nil:
			pod = pod.DeepCopy()
			pod.DeletionTimestamp = new(metav1.NewTime(w.at))
		case !w.deleted && older(pod, w.pod):
			pod = w.pod
		default:
			delete(l, pod.Name)
		}
		out = append(out, pod)
	}
	for name, w := range l {
		switch {
		case seen[name]:
		case w.deleted || !w.made || now.Sub(w.at) > ledgerLimit:
			delete(l, name)
		default:
			out = append(out, w.pod)
		}
	}
	return out
}

// older says whether the cache's pod is from before a write.
func older(cached, written *corev1.Pod) bool {
	order, err := resourceversion.CompareResourceVersion(cached.ResourceVersion, written.ResourceVersion)
	return err == nil && order < 0
}
