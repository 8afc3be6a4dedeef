package controllers

import (
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Condition types.
const (
	condAccepted    = "Accepted"
	condPlaced      = "Placed"
	condReady       = "Ready"
	condLoadFresh   = "LoadFresh"
	condDurable     = "Durable"
	condSchedulable = "Schedulable"
	condUpToDate    = "UpToDate"
	condBalanced    = "Balanced"
	condProgressing = "Progressing"
)

// Reasons of conditions and events.
const (
	reasonAccepted = "Accepted"
	reasonRejected = "Rejected"
	reasonPlaced   = "Placed"

	reasonServing             = "Serving"
	reasonIDConflict          = "IDConflict"
	reasonNoShard             = "NoShard"
	reasonNoMatchingShard     = "NoMatchingShard"
	reasonShardMissing        = "ShardMissing"
	reasonShardsCordoned      = "ShardsCordoned"
	reasonShardsFull          = "ShardsFull"
	reasonInventoryIncomplete = "InventoryIncomplete"
	reasonShardNotReady       = "ShardNotReady"
	reasonOpening             = "Opening"
	reasonOpenFailed          = "OpenFailed"
	reasonLogMissing          = "LogMissing"
	reasonDeleting            = "Deleting"

	reasonPodMissing    = "PodMissing"
	reasonPodNotReady   = "PodNotReady"
	reasonImageNotFound = "ImageNotFound"
	reasonNotReporting  = "NotReporting"
	reasonNameConflict  = "NameConflict"

	reasonReported    = "Reported"
	reasonNotReported = "NotReported"
	reasonStale       = "Stale"

	reasonInMemory = "InMemory"
	reasonOnDisk   = "OnDisk"
	reasonDiskFull = "DiskFull"

	reasonActive   = "Active"
	reasonCordoned = "Cordoned"
	reasonDraining = "Draining"
	reasonFull     = "Full"

	reasonUpToDate      = "UpToDate"
	reasonRollingOut    = "RollingOut"
	reasonWaitingToRoll = "WaitingToRollOut"
	reasonNotMade       = "NotMade"

	reasonNoRelays         = "NoRelays"
	reasonSteady           = "Steady"
	reasonScalingUp        = "ScalingUp"
	reasonScalingDown      = "ScalingDown"
	reasonWaitingForRelays = "WaitingForRelays"
	reasonQuotaExceeded    = "QuotaExceeded"
	reasonShardWithoutLink = "ShardWithoutLink"
	reasonBalanced         = "Balanced"
	reasonMoving           = "Moving"
	reasonUneven           = "Uneven"
)

// maxMessage bounds messages: they come from the kubelet and from shards, too.
const maxMessage = 1024

// verdict is what a condition says.
type verdict struct {
	status  metav1.ConditionStatus
	reason  string
	message string
}

func isTrue(reason, message string) verdict {
	return verdict{metav1.ConditionTrue, reason, message}
}

func isFalse(reason, message string) verdict {
	return verdict{metav1.ConditionFalse, reason, message}
}

// conditionWriter sets conditions of one object in one pass; equal ones keep their transition time.
type conditionWriter struct {
	conditions *[]metav1.Condition
	generation int64
	now        time.Time
}

func (w conditionWriter) set(conditionType string, v verdict) {
	meta.SetStatusCondition(w.conditions, metav1.Condition{
		Type:               conditionType,
		Status:             v.status,
		Reason:             v.reason,
		Message:            truncate(v.message, maxMessage),
		ObservedGeneration: w.generation,
		LastTransitionTime: metav1.NewTime(w.now).Rfc3339Copy(),
	})
}

// keep leaves a condition as it was, for this generation; first is its value when there is none.
func (w conditionWriter) keep(conditionType string, first verdict) {
	if c := meta.FindStatusCondition(*w.conditions, conditionType); c != nil {
		first = verdict{c.Status, c.Reason, c.Message}
	}
	w.set(conditionType, first)
}

func truncate(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	const ellipsis = "..."
	cut := limit - len(ellipsis)
	for cut > 0 && s[cut]&0xC0 == 0x80 { // not inside a rune
		cut--
	}
	return s[:cut] + ellipsis
}

// rounded keeps two significant digits above 100, so that a busy guild's counts seldom change.
func rounded(n int64) int64 {
	unit := int64(1)
	for n/unit > 100 {
		unit *= 10
	}
	return (n + unit/2) / unit * unit
}
