package controllers

import (
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
)

func TestWaitAfterPodsThatFailed(t *testing.T) {
	type failure struct{ made, at time.Duration }
	for name, tc := range map[string]struct {
		failures []failure
		want     time.Duration // after the last failure
	}{
		"the first one":                       {[]failure{{0, time.Hour}}, 0},
		"its successor":                       {[]failure{{0, time.Hour}, {time.Hour, time.Hour + time.Minute}}, createDelay},
		"and the successor of that":           {[]failure{{0, 0}, {0, time.Minute}, {time.Minute, 2 * time.Minute}}, 2 * createDelay},
		"one as old as the first":             {[]failure{{0, time.Hour}, {time.Second, time.Hour + time.Second}}, -time.Second},
		"many of one node":                    {slices.Repeat([]failure{{0, time.Hour}}, 20), 0},
		"one after another, for hours":        {[]failure{{0, 0}, {time.Hour, 2 * time.Hour}}, 0},
		"always, for the longest time it has": {slices.Repeat([]failure{{time.Hour, time.Hour}}, 20), createDelayMax},
	} {
		t.Run(name, func(t *testing.T) {
			var b backoff
			var last time.Time
			for _, f := range tc.failures {
				last = noon.Add(f.at)
				b.failed(noon.Add(f.made), last)
			}
			if got := b.until.Sub(last); got != tc.want {
				t.Errorf("%s, expected %s", got, tc.want)
			}
		})
	}
}

func TestWhatWasWrittenCountsUntilTheCacheShowsIt(t *testing.T) {
	pod := func(version string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "relay", UID: "uid", ResourceVersion: version}}
	}
	made := func(l podLedger) { l.made(pod("5"), noon) }
	marked := func(l podLedger) { l.wrote(pod("7"), noon) }
	deleted := func(l podLedger) { l.deleted(pod("5"), noon) }
	for name, tc := range map[string]struct {
		writes []func(podLedger)
		cached []*corev1.Pod
		after  time.Duration
		want   []string
	}{
		"nothing was written":                            {nil, []*corev1.Pod{pod("5")}, 0, []string{"5"}},
		"a pod that was made and is not shown yet":       {[]func(podLedger){made}, nil, 0, []string{"5"}},
		"one that is not shown for too long":             {[]func(podLedger){made}, nil, ledgerLimit + 1, nil},
		"a mark that is not shown yet":                   {[]func(podLedger){marked}, []*corev1.Pod{pod("5")}, 0, []string{"7"}},
		"a mark that is shown":                           {[]func(podLedger){marked}, []*corev1.Pod{pod("8")}, 0, []string{"8"}},
		"a pod that went when it had been marked":        {[]func(podLedger){marked}, nil, 0, nil},
		"one that was made and marked, not shown yet":    {[]func(podLedger){made, marked}, nil, 0, []string{"7"}},
		"a deletion that is not shown yet":               {[]func(podLedger){deleted}, []*corev1.Pod{pod("5")}, 0, []string{"5 deleted"}},
		"a deletion that has ended":                      {[]func(podLedger){deleted}, nil, 0, nil},
		"a deletion of what the cache has not shown yet": {[]func(podLedger){made, deleted}, nil, 0, nil},
	} {
		t.Run(name, func(t *testing.T) {
			l := podLedger{}
			for _, write := range tc.writes {
				write(l)
			}
			var got []string
			for _, pod := range l.current(tc.cached, noon.Add(tc.after)) {
				state := pod.ResourceVersion
				if pod.DeletionTimestamp != nil {
					state += " deleted"
				}
				got = append(got, state)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("versions (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRelaysLeaveALostNode(t *testing.T) {
	const notReady, unreachable = corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable
	for name, tc := range map[string]struct {
		own  []corev1.Toleration
		want []string
	}{
		"by themselves":             {nil, []string{notReady + " 30", unreachable + " 30"}},
		"and other things are said": {[]corev1.Toleration{{Key: "gpu", Operator: corev1.TolerationOpExists}}, []string{"gpu", notReady + " 30", unreachable + " 30"}},
		"as the user says": {
			[]corev1.Toleration{{Key: unreachable, Operator: corev1.TolerationOpExists, TolerationSeconds: new(int64(600))}},
			[]string{unreachable + " 600", notReady + " 30"},
		},
		"never": {[]corev1.Toleration{{Operator: corev1.TolerationOpExists}}, []string{""}},
	} {
		t.Run(name, func(t *testing.T) {
			shard := makeShard("ns", "a").Obj()
			shard.Spec.RelayTemplate = &v1.PodTemplate{Tolerations: tc.own}
			pod, err := relayWish{guild: makeGuild("ns", "lobby").Obj(), id: "1", shard: shard}.pod("relay", "revision")
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, toleration := range pod.Spec.Tolerations {
				said := toleration.Key
				if toleration.TolerationSeconds != nil {
					said += " " + strconv.FormatInt(*toleration.TolerationSeconds, 10)
				}
				got = append(got, said)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("tolerations (-want +got):\n%s", diff)
			}
		})
	}
}
