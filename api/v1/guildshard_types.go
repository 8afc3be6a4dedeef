package v1

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// GuildShardSpec is the wish for a shard: one pod that serves guilds.
//
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.storage) || has(self.storage)",fieldPath=".storage",message="storage cannot be taken away: the logs of the shard's guilds are on it",reason=FieldValueForbidden
type GuildShardSpec struct {
	// image of the shard server; when absent, the operator's own at the shard's last roll-out.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Image string `json:"image,omitempty"`

	// capacity is what the shard is planned to hold.
	// +optional
	// +default={}
	Capacity ShardCapacity `json:"capacity,omitempty,omitzero"`

	// availability is Active (when absent), Cordoned (no new guilds) or Draining (no new
	// guilds, and those it has move away).
	// +optional
	Availability Availability `json:"availability,omitempty"`

	// storage is the volume of the guilds' logs; without it logs are in memory and end with the process.
	// +optional
	Storage *ShardStorage `json:"storage,omitempty"`

	// retention bounds the history that each guild keeps, and so how far back a session can resume.
	// +optional
	Retention *ShardRetention `json:"retention,omitempty"`

	// gateway says how clients outside the cluster reach the shard and the front door.
	// +optional
	Gateway *ShardGateway `json:"gateway,omitempty"`

	// template shapes the shard's pod.
	// +optional
	Template *PodTemplate `json:"template,omitempty"`

	// relayTemplate shapes the relay pods of the guilds on the shard. A change rolls out to them, and
	// leaves the shard's own pod alone.
	// +optional
	RelayTemplate *PodTemplate `json:"relayTemplate,omitempty"`
}

// ShardCapacity is what a shard is planned to hold.
type ShardCapacity struct {
	// guilds is the largest number of guilds on the shard, 1 to 10000.
	// +optional
	// +default=100
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=10000
	Guilds int32 `json:"guilds,omitempty"`

	// sessions is the largest number of connections on the shard, 1 to 15000.
	// +optional
	// +default=15000
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=15000
	Sessions int32 `json:"sessions,omitempty"`
}

// Availability says whether a shard takes guilds.
// +kubebuilder:validation:Enum=Active;Cordoned;Draining
type Availability string

const (
	// ShardActive takes new guilds; the meaning of an absent field.
	ShardActive Availability = "Active"
	// ShardCordoned keeps its guilds and takes no new ones.
	ShardCordoned Availability = "Cordoned"
	// ShardDraining takes no new guilds and gives away those it has.
	ShardDraining Availability = "Draining"
)

// ShardStorage is the volume of the guilds' logs.
//
// +kubebuilder:validation:XValidation:rule="has(self.storageClassName) == has(oldSelf.storageClassName) && (!has(self.storageClassName) || self.storageClassName == oldSelf.storageClassName)",fieldPath=".storageClassName",message="storageClassName is immutable: a volume cannot change its class",reason=FieldValueForbidden
// +kubebuilder:validation:XValidation:rule="!string(self.size).matches('[eE][+-]?[0-9]') && quantity(string(self.size)).compareTo(quantity(string(oldSelf.size))) >= 0",fieldPath=".size",message="size can only grow",reason=FieldValueForbidden
type ShardStorage struct {
	// size of the volume, at least 64Mi; it can only grow. Exponents are refused: comparing
	// 1e999999999 would keep the API server busy for minutes.
	// +required
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[0-9]{1,15}([.][0-9]{1,3})?([kMGTPE]|[KMGTPE]i)?$') && quantity(string(self)).compareTo(quantity('64Mi')) >= 0",message="must be at least 64Mi, in digits with a suffix such as Mi or Gi"
	Size resource.Quantity `json:"size,omitempty,omitzero"`

	// storageClassName of the claim; the cluster's default class when absent.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="!format.dns1123Subdomain().validate(self).hasValue()",message="must be the name of a StorageClass: lower case letters, digits, '-' and '.'"
	StorageClassName string `json:"storageClassName,omitempty"`

	// whenDeleted says what becomes of the volume claim when the GuildShard is deleted: Retain (the default) or Delete.
	// +optional
	WhenDeleted DeletionPolicy `json:"whenDeleted,omitempty"`
}

// ShardRetention bounds the history that each guild keeps.
// +kubebuilder:validation:MinProperties=1
type ShardRetention struct {
	// bytes is the most that one guild's history takes, 1Mi to 1Ti; 16Mi when absent.
	// +optional
	// +kubebuilder:validation:XValidation:rule="string(self).matches('^[0-9]{1,15}([.][0-9]{1,3})?([kMGTPE]|[KMGTPE]i)?$') && quantity(string(self)).compareTo(quantity('1Mi')) >= 0 && quantity(string(self)).compareTo(quantity('1Ti')) <= 0",message="must be between 1Mi and 1Ti, in digits with a suffix such as Mi or Gi"
	Bytes *resource.Quantity `json:"bytes,omitempty"`

	// age is how long a record is kept while there is room, 1m to 720h; 1h when absent.
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,7}([.][0-9]+)?(h|m|s|ms))+$') && duration(self) >= duration('1m') && duration(self) <= duration('720h')",message="must be a duration between 1m and 720h, such as 90m"
	Age *metav1.Duration `json:"age,omitempty"`
}

// ShardGateway says how clients outside the cluster reach a shard.
// +kubebuilder:validation:MinProperties=1
type ShardGateway struct {
	// publicURL leads to this shard alone, ws(s)://host[:port][/path]: new connections are sent here.
	// +optional
	PublicURL GatewayURL `json:"publicURL,omitempty"`

	// frontDoorURL leads to the namespace's front door, ws(s)://host[:port][/path]: the guild's
	// lasting address and where sessions resume. Shards of one namespace have the same one.
	// +optional
	FrontDoorURL GatewayURL `json:"frontDoorURL,omitempty"`

	// tlsSecretName is a Secret of type kubernetes.io/tls in the same namespace; with it the
	// shard serves wss on port 443 as well.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="!format.dns1123Subdomain().validate(self).hasValue()",message="must be the name of a Secret: lower case letters, digits, '-' and '.'"
	TLSSecretName string `json:"tlsSecretName,omitempty"`
}

// PodTemplate is the part of a pod that users of a GuildShard may shape; the container is the shard server's or the relay's.
// +kubebuilder:validation:MinProperties=1
type PodTemplate struct {
	// metadata is added to the pod.
	// +optional
	Metadata PodMetadata `json:"metadata,omitempty,omitzero"`

	// resources of the shard server's container. Without a request or limit of its own the container requests 100m of CPU and
	// 128Mi of memory.
	// +optional
	Resources corev1.ResourceRequirements `json:"resources,omitempty,omitzero"`

	// nodeSelector limits the nodes.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	NodeSelector map[string]string `json:"nodeSelector,omitempty"`

	// tolerations of the pod.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Tolerations []corev1.Toleration `json:"tolerations,omitempty"`

	// affinity of the pod.
	// +optional
	Affinity *corev1.Affinity `json:"affinity,omitempty"`

	// topologySpreadConstraints of the pod.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	TopologySpreadConstraints []corev1.TopologySpreadConstraint `json:"topologySpreadConstraints,omitempty"`

	// priorityClassName of the pod.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	PriorityClassName string `json:"priorityClassName,omitempty"`

	// imagePullPolicy of the shard server's container: Always, IfNotPresent or Never.
	// +optional
	// +kubebuilder:validation:Enum=Always;IfNotPresent;Never
	ImagePullPolicy corev1.PullPolicy `json:"imagePullPolicy,omitempty"`

	// imagePullSecrets of the pod.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=16
	ImagePullSecrets []corev1.LocalObjectReference `json:"imagePullSecrets,omitempty"`

	// securityContext of the pod; one that meets the restricted Pod Security Standard when absent.
	// +optional
	SecurityContext *corev1.PodSecurityContext `json:"securityContext,omitempty"`

	// env is added to the shard server's container.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=64
	Env []corev1.EnvVar `json:"env,omitempty"`
}

// PodMetadata is metadata that is added to a pod.
// +kubebuilder:validation:MinProperties=1
type PodMetadata struct {
	// labels of the pod; keys of guildhall.dev are the operator's own.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	// +kubebuilder:validation:XValidation:rule="self.all(k, !k.startsWith('guildhall.dev/') && !k.startsWith('app.kubernetes.io/'))",message="labels of guildhall.dev/ and app.kubernetes.io/ are set by the operator"
	Labels map[string]string `json:"labels,omitempty"`

	// annotations of the pod; keys of guildhall.dev are the operator's own.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	// +kubebuilder:validation:XValidation:rule="self.all(k, !k.startsWith('guildhall.dev/'))",message="annotations of guildhall.dev/ are set by the operator"
	Annotations map[string]string `json:"annotations,omitempty"`
}

// GuildShardStatus is what the operator last saw of a shard.
// +kubebuilder:validation:MinProperties=1
type GuildShardStatus struct {
	// conditions are Accepted (the spec can be carried out), Ready (the pod serves), Durable (logs
	// are on disk), Schedulable (new guilds may come), LoadFresh (the load is recent),
	// UpToDate (the pod is made from the present spec).
	// +optional
	// +listType=map
	// +listMapKey=type
	// +patchStrategy=merge
	// +patchMergeKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty" patchStrategy:"merge" patchMergeKey:"type"`

	// observedGeneration is the generation of the spec that this status answers.
	// +optional
	// +kubebuilder:validation:Minimum=1
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// guilds is the number of guilds placed on the shard.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Guilds *int32 `json:"guilds,omitempty"`

	// sessions is the number of connected sessions, rounded.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Sessions *int64 `json:"sessions,omitempty"`

	// capacityFree is the number of guilds that the shard can still take.
	// +optional
	// +kubebuilder:validation:Minimum=0
	CapacityFree *int32 `json:"capacityFree,omitempty"`

	// load is the shard's load, rounded.
	// +optional
	Load *ShardLoad `json:"load,omitempty"`

	// version of the running shard server.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	Version string `json:"version,omitempty"`

	// bootID names the running shard server process; it changes with each start.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=64
	BootID string `json:"bootID,omitempty"`
}

// ShardLoad is the load of a shard.
type ShardLoad struct {
	// eventsPerSecond appended to the logs.
	// +required
	// +kubebuilder:validation:Minimum=0
	EventsPerSecond *int64 `json:"eventsPerSecond,omitempty"`

	// deliveriesPerSecond is the number of events written to sessions.
	// +required
	// +kubebuilder:validation:Minimum=0
	DeliveriesPerSecond *int64 `json:"deliveriesPerSecond,omitempty"`

	// cpuMilli is the CPU used, in thousandths of a core.
	// +required
	// +kubebuilder:validation:Minimum=0
	CPUMilli *int64 `json:"cpuMilli,omitempty"`

	// memoryBytes is the resident memory.
	// +required
	// +kubebuilder:validation:Minimum=0
	MemoryBytes *int64 `json:"memoryBytes,omitempty"`

	// diskUsedBytes is what the logs take on the volume; 0 with logs in memory.
	// +required
	// +kubebuilder:validation:Minimum=0
	DiskUsedBytes *int64 `json:"diskUsedBytes,omitempty"`
}

// GuildShard is one shard server: a pod, with its own volume where storage is asked for, that
// runs the fan-out core for the guilds placed on it.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:shortName=gsh,categories=guildhall
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Availability",type=string,JSONPath=`.spec.availability`
// +kubebuilder:printcolumn:name="Guilds",type=integer,JSONPath=`.status.guilds`
// +kubebuilder:printcolumn:name="Max",type=integer,JSONPath=`.spec.capacity.guilds`
// +kubebuilder:printcolumn:name="Sessions",type=integer,JSONPath=`.status.sessions`
// +kubebuilder:printcolumn:name="Durable",type=string,JSONPath=`.status.conditions[?(@.type=="Durable")].status`
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.status.version`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",fieldPath=".metadata",message="metadata.name must be a DNS label of at most 40 characters that starts with a letter: Services and the pod are named after it"
type GuildShard struct {
	metav1.TypeMeta `json:",inline"`

	// metadata is the standard object's metadata.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty,omitzero"`

	// spec is the wish.
	// +optional
	// +default={}
	Spec GuildShardSpec `json:"spec,omitempty,omitzero"`

	// status is what the operator last saw.
	// +optional
	Status GuildShardStatus `json:"status,omitempty,omitzero"`
}

// GuildShardList is a list of GuildShards.
// +kubebuilder:object:root=true
type GuildShardList struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ListMeta `json:"metadata,omitempty,omitzero"`
	// items are the GuildShards.
	Items []GuildShard `json:"items"`
}
