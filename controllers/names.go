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

	// annotationTemplateHash is the hash of the pod-affecting fields that the pod template was made from.
	annotationTemplateHash = "guildhall.dev/template-hash"

	containerName = "shardserver"

	portWS      = "ws"
	portWSS     = "wss"
	portAdmin   = "admin"
	wsPort      = 8080
	wssPort     = 8443
	adminPort   = 9090
	wsSvcPort   = 80
	wssSvcPort  = 443
	nonRootUser = 65532

	frontDoorName = v1.FrontDoorService
	keysName      = "guildhall-keys"
	shardRoleName = "guildhall-shard"

	keysDir = "/etc/guildhall/keys"
	tlsDir  = "/etc/guildhall/tls"
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

func podName(shard string) string     { return shard + "-0" }
func podsSvcName(shard string) string { return shard + "-pods" }
func claimName(shard string) string   { return shard + "-data" }

// availability of a shard with the absent field's meaning filled in.
func availability(shard *v1.GuildShard) v1.Availability {
	if shard.Spec.Availability == "" {
		return v1.ShardActive
	}
	return shard.Spec.Availability
}
