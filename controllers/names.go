// Package controllers holds the reconcilers of Guild and GuildShard and the pure functions that
// decide for them. docs/architecture.md lists the objects, names and owners that appear here.
package controllers

import (
	"maps"

	v1 "guildhall.dev/guildhall/api/v1"
)

const (
	// fieldManager owns what the operator applies.
	fieldManager = "guildhall"

	// finalizer lets shards end a Guild's sessions, and a GuildShard's pod end, before the object goes.
	finalizer = "guildhall.dev/operator"

	labelName      = "app.kubernetes.io/name"
	labelManagedBy = "app.kubernetes.io/managed-by"
	labelComponent = "app.kubernetes.io/component"
	labelShard     = "guildhall.dev/shard"
	labelAccepting = "guildhall.dev/accepting"
	labelGuild     = "guildhall.dev/guild"

	managedBy      = "guildhall"
	componentShard = "shard"
	componentRelay = "relay"

	// labelDraining on a relay's pod has the time, in Unix seconds, since when it is to go.
	labelDraining = "guildhall.dev/draining"

	// annotationTemplateHash is the hash of the pod-affecting fields that the pod template was made from.
	annotationTemplateHash = "guildhall.dev/template-hash"
	// annotationRevision is the hash of what a relay's pod was made from.
	annotationRevision = "guildhall.dev/revision"
	// annotationReadySince is when a relay's pod was first seen ready.
	annotationReadySince = "guildhall.dev/ready-since"
	// annotationSafeToEvict keeps the cluster autoscaler from ending pods with sessions to save a node.
	annotationSafeToEvict = "cluster-autoscaler.kubernetes.io/safe-to-evict"

	containerName = "shardserver"

	portWS      = "ws"
	portWSS     = "wss"
	portAdmin   = "admin"
	portLink    = "link"
	wsPort      = 8080
	wssPort     = 8443
	adminPort   = 9090
	linkPort    = 9443
	wsSvcPort   = 80
	wssSvcPort  = 443
	nonRootUser = 65532

	frontDoorName = v1.FrontDoorService
	keysName      = "guildhall-keys"
	shardRoleName = "guildhall-shard"
	authorityName = "guildhall-link-ca"

	keysDir = "/etc/guildhall/keys"
	tlsDir  = "/etc/guildhall/tls"
	linkDir = "/etc/guildhall/link"
	dataDir = "/data"
)

// namespaceLabels are on the objects that a namespace with shards has once.
func namespaceLabels() map[string]string {
	return map[string]string{
		labelName:      managedBy,
		labelManagedBy: managedBy,
		labelComponent: componentShard,
	}
}

// shardLabels are on everything that belongs to one shard.
func shardLabels(shard string) map[string]string {
	l := namespaceLabels()
	l[labelShard] = shard
	return l
}

// shardSelector finds the pod of one shard.
func shardSelector(shard string) map[string]string {
	return map[string]string{labelName: managedBy, labelComponent: componentShard, labelShard: shard}
}

// acceptingSelector narrows a selector to pods that take new connections.
func acceptingSelector(selector map[string]string) map[string]string {
	out := maps.Clone(selector)
	out[labelAccepting] = "true"
	return out
}

// relayLabels are on everything that belongs to the relays of the guild with an id.
func relayLabels(id string) map[string]string {
	return map[string]string{
		labelName:      managedBy,
		labelManagedBy: managedBy,
		labelComponent: componentRelay,
		labelGuild:     id,
	}
}

// relaySelector finds the relays of one guild.
func relaySelector(id string) map[string]string {
	return map[string]string{labelName: managedBy, labelComponent: componentRelay, labelGuild: id}
}

func podName(shard string) string       { return shard + "-0" }
func podsSvcName(shard string) string   { return shard + "-pods" }
func claimName(shard string) string     { return shard + "-data" }
func shardLinkName(shard string) string { return shard + "-link" }
func relaysName(id string) string       { return v1.RelayService(id) }
func relayLinkName(id string) string    { return relaysName(id) + "-link" }

// availability of a shard with the absent field's meaning filled in.
func availability(shard *v1.GuildShard) v1.Availability {
	if shard.Spec.Availability == "" {
		return v1.ShardActive
	}
	return shard.Spec.Availability
}
