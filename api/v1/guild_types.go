package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// GuildSpec is the wish for a guild.
//
// +kubebuilder:validation:XValidation:rule="has(self.id) == has(oldSelf.id) && (!has(self.id) || self.id == oldSelf.id)",fieldPath=".id",message="id is immutable: set it when the Guild is created, or never",reason=FieldValueForbidden
// +kubebuilder:validation:XValidation:rule="has(self.bootstrap) == has(oldSelf.bootstrap) && (!has(self.bootstrap) || self.bootstrap == oldSelf.bootstrap)",fieldPath=".bootstrap",message="bootstrap is immutable: it is used once, at the birth of the guild's log",reason=FieldValueForbidden
type GuildSpec struct {
	// id is the guild's snowflake: 17 to 19 decimal digits, as the client libraries expect.
	// Set it when the Guild is created, or never: without it the operator assigns one
	// and shows it in status.id. Unique within the namespace.
	// +optional
	// +kubebuilder:validation:MinLength=17
	// +kubebuilder:validation:MaxLength=19
	// +kubebuilder:validation:XValidation:rule="self.matches('^[1-9][0-9]*$')",message="must be a snowflake: 17 to 19 decimal digits without a leading zero"
	ID string `json:"id,omitempty"`

	// displayName is the name that clients show, 1 to 100 characters; metadata.name when absent.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=100
	DisplayName string `json:"displayName,omitempty"`

	// access says who may become a member.
	// +optional
	Access GuildAccess `json:"access,omitempty,omitzero"`

	// deletionPolicy says what happens to the guild's log when the Guild is deleted:
	// Retain (the default) leaves it on the shard's disk, Delete erases it.
	// +optional
	DeletionPolicy DeletionPolicy `json:"deletionPolicy,omitempty"`

	// bootstrap is the state that the guild's log starts with.
	// +optional
	Bootstrap *GuildBootstrap `json:"bootstrap,omitempty"`

	// placement limits which shards may hold the guild; any with room when absent.
	// +optional
	Placement *GuildPlacement `json:"placement,omitempty"`

	// gateway says how clients reach the guild.
	// +optional
	Gateway *GuildGateway `json:"gateway,omitempty"`

	// relays says how a heavy guild is spread over relay pods.
	// +optional
	// +default={}
	Relays GuildRelays `json:"relays,omitempty,omitzero"`

	// rebalance says how sessions are moved between relays, and how fast.
	// +optional
	Rebalance *GuildRebalance `json:"rebalance,omitempty"`
}

// JoinPolicy says who may become a member of a guild.
// +kubebuilder:validation:Enum=Open;MembersOnly
type JoinPolicy string

const (
	// JoinOpen lets every user with a valid token join, by connecting or over REST.
	JoinOpen JoinPolicy = "Open"
	// JoinMembersOnly leaves it to backends with the publish scope to add members.
	JoinMembersOnly JoinPolicy = "MembersOnly"
)

// GuildAccess says who may become a member.
// +kubebuilder:validation:MinProperties=1
type GuildAccess struct {
	// join is Open (any user with a valid token) or MembersOnly (the default: a backend adds members).
	// +optional
	Join JoinPolicy `json:"join,omitempty"`
}

// AnnotationTakeOver on a Guild gives up the log that status.placement.logID names, which is the annotation's value: the
// shard starts a new log in its place, with a new logID. What only the old log had is lost: messages, members, channels,
// roles, and the idempotency keys of publishers. All sessions start over.
const AnnotationTakeOver = "guildhall.dev/take-over"

// DeletionPolicy says what becomes of data when its object is deleted.
// +kubebuilder:validation:Enum=Retain;Delete
type DeletionPolicy string

const (
	// DeletionRetain keeps the data.
	DeletionRetain DeletionPolicy = "Retain"
	// DeletionDelete erases the data.
	DeletionDelete DeletionPolicy = "Delete"
)

// GuildBootstrap is the state that a guild's log starts with.
type GuildBootstrap struct {
	// channels are created in this order at the log's birth; one text channel "general" when absent.
	// +required
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=500
	Channels []BootstrapChannel `json:"channels,omitempty"`
}

// ChannelType is the kind of a bootstrap channel.
// +kubebuilder:validation:Enum=Text;Voice;Category
type ChannelType string

const (
	// ChannelText is a text channel (protocol type 0).
	ChannelText ChannelType = "Text"
	// ChannelVoice is a voice channel (protocol type 2).
	ChannelVoice ChannelType = "Voice"
	// ChannelCategory is a category (protocol type 4).
	ChannelCategory ChannelType = "Category"
)

// BootstrapChannel is a channel that a guild's log starts with.
type BootstrapChannel struct {
	// name of the channel, 1 to 100 characters.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=100
	Name string `json:"name,omitempty"`

	// type is Text, Voice or Category.
	// +required
	Type ChannelType `json:"type,omitempty"`
}

// GuildPlacement limits which shards may hold a guild.
// +kubebuilder:validation:MinProperties=1
// +kubebuilder:validation:XValidation:rule="!(has(self.shardName) && has(self.shardSelector))",message="shardName and shardSelector exclude each other: set one of them"
type GuildPlacement struct {
	// shardName pins the guild to the GuildShard of that name in the same namespace.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=40
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",message="must be the name of a GuildShard: lower case letters, digits and '-', starting with a letter and ending with a letter or digit"
	ShardName string `json:"shardName,omitempty"`

	// shardSelector allows the GuildShards whose labels match.
	// +optional
	ShardSelector *metav1.LabelSelector `json:"shardSelector,omitempty"`
}

// GuildGateway says how clients reach a guild.
// +kubebuilder:validation:MinProperties=1
type GuildGateway struct {
	// publicURL is the base of the guild's URL, ws(s)://host[:port][/path] without query:
	// clients connect to <publicURL>/g/<id>/. The shard's URLs apply when absent.
	// +optional
	PublicURL GatewayURL `json:"publicURL,omitempty"`
}

// GatewayURL is a base URL of WebSocket connections: ws(s)://host[:port][/path].
// Clients append their own query, so it has none.
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=512
// +kubebuilder:validation:XValidation:rule="isURL(self) && url(self).getScheme() in ['ws', 'wss'] && size(url(self).getHostname()) > 0 && !self.contains('@') && !self.contains('?') && !self.contains('#')",message="must be ws://host[:port][/path] or wss://host[:port][/path], without user, query or fragment"
type GatewayURL string

// RelayMode says who decides how many relays a guild has.
// +kubebuilder:validation:Enum=Auto;Manual;Disabled
type RelayMode string

const (
	// RelaysAuto lets the operator decide from the guild's load; the default.
	RelaysAuto RelayMode = "Auto"
	// RelaysManual follows spec.relays.replicas, also through the scale subresource.
	RelaysManual RelayMode = "Manual"
	// RelaysDisabled keeps every session on the shard.
	RelaysDisabled RelayMode = "Disabled"
)

// GuildRelays says how a heavy guild is spread over relay pods.
// +kubebuilder:validation:XValidation:rule="!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",fieldPath=".minReplicas",message="minReplicas must not be above maxReplicas"
type GuildRelays struct {
	// mode is Auto (the default), Manual or Disabled.
	// +optional
	Mode RelayMode `json:"mode,omitempty"`

	// replicas is the number of relay pods in mode Manual, 0 to 1000; the scale subresource writes it.
	// +optional
	// +default=0
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	Replicas *int32 `json:"replicas,omitempty"`

	// minReplicas is the least number of relay pods in mode Auto, 0 to 1000.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	MinReplicas *int32 `json:"minReplicas,omitempty"`

	// maxReplicas is the largest number of relay pods in mode Auto, 1 to 1000.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	MaxReplicas int32 `json:"maxReplicas,omitempty"`

	// sessionsPerRelay is what one relay pod is planned to hold, 1 to 15000.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=15000
	SessionsPerRelay int32 `json:"sessionsPerRelay,omitempty"`

	// stabilizationSeconds is how long, in mode Auto, a load must ask for another number of relay pods.
	// +optional
	StabilizationSeconds *RelayStabilization `json:"stabilizationSeconds,omitempty"`
}

// RelayStabilization is how long a load must ask for another number of relay pods.
// +kubebuilder:validation:MinProperties=1
type RelayStabilization struct {
	// up is how long it must ask for more, 1 to 3600 seconds; 4 when absent.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=3600
	Up int32 `json:"up,omitempty"`

	// down is how long it must ask for fewer, 1 to 86400 seconds; 300 when absent.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=86400
	Down int32 `json:"down,omitempty"`
}

// RebalanceMode says what happens to an uneven spread of sessions over relays.
// +kubebuilder:validation:Enum=Auto;Approve;Disabled
type RebalanceMode string

const (
	// RebalanceAuto moves sessions at once; the default.
	RebalanceAuto RebalanceMode = "Auto"
	// RebalanceApprove waits for the annotation that approves the plan.
	RebalanceApprove RebalanceMode = "Approve"
	// RebalanceDisabled leaves evening out to those who come and go.
	RebalanceDisabled RebalanceMode = "Disabled"
)

// AnnotationApprove on a Guild approves the plan of moves whose hash, status.rebalance.planHash, is the
// annotation's value. It counts for that plan alone.
const AnnotationApprove = "guildhall.dev/approve"

// GuildRebalance says how sessions are moved between relays. What is moved because a relay goes,
// or since the guild gets or loses its relays, needs no approval, and is as fast.
// +kubebuilder:validation:MinProperties=1
type GuildRebalance struct {
	// mode is Auto (the default), Approve or Disabled.
	// +optional
	Mode RebalanceMode `json:"mode,omitempty"`

	// maxMovesPerSecond bounds how many sessions of the guild are asked to reconnect in a second,
	// 1 to 15000; 500 when absent. A relay that ends has the time to ask all that it may hold.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=15000
	MaxMovesPerSecond int32 `json:"maxMovesPerSecond,omitempty"`

	// maxSkewPercent is by how much a relay may have more sessions than the even share, 1 to 1000
	// percent; 10 when absent.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	MaxSkewPercent int32 `json:"maxSkewPercent,omitempty"`

	// minSkewSessions is the number of sessions above the even share below which nothing is
	// moved, 1 to 15000; 100 when absent.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=15000
	MinSkewSessions int32 `json:"minSkewSessions,omitempty"`
}

// GuildMode says how a guild's sessions are served.
// +kubebuilder:validation:Enum=Direct;Promoting;Relayed;Demoting
type GuildMode string

const (
	// GuildDirect: the shard holds all sessions itself.
	GuildDirect GuildMode = "Direct"
	// GuildPromoting: relays are on their way.
	GuildPromoting GuildMode = "Promoting"
	// GuildRelayed: relays take the connections; sessions that the shard still has are on their way to them.
	GuildRelayed GuildMode = "Relayed"
	// GuildDemoting: the relays' sessions are on their way to the shard.
	GuildDemoting GuildMode = "Demoting"
)

// GuildStatus is what the operator last saw of a guild.
// +kubebuilder:validation:MinProperties=1
type GuildStatus struct {
	// conditions are Accepted (the spec can be carried out), Placed (a shard is booked),
	// Ready (clients can connect), LoadFresh (the counts are recent), Balanced (the sessions lie
	// evenly on the relays), Progressing (relays are being made, replaced or emptied).
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

	// id is the guild's snowflake.
	// +optional
	// +kubebuilder:validation:MinLength=17
	// +kubebuilder:validation:MaxLength=19
	ID string `json:"id,omitempty"`

	// mode says how the guild's sessions are served.
	// +optional
	Mode GuildMode `json:"mode,omitempty"`

	// placement is the shard that holds the guild and the log that it writes.
	// +optional
	Placement *GuildPlacementStatus `json:"placement,omitempty"`

	// gateway is where clients connect.
	// +optional
	Gateway *GuildGatewayStatus `json:"gateway,omitempty"`

	// members is the number of members, rounded; the exact figure is in the shard's metrics.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Members *int64 `json:"members,omitempty"`

	// online is the number of users with a session, rounded.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Online *int64 `json:"online,omitempty"`

	// sessions is the number of connected sessions, rounded.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Sessions *int64 `json:"sessions,omitempty"`

	// countsObservedAt is when members, online and sessions were counted.
	// +optional
	CountsObservedAt *metav1.Time `json:"countsObservedAt,omitempty"`

	// relays is the state of the guild's relay pods.
	// +optional
	Relays *GuildRelaysStatus `json:"relays,omitempty"`

	// rebalance is the last round of moves, or the one that waits for approval.
	// +optional
	Rebalance *GuildRebalanceStatus `json:"rebalance,omitempty"`
}

// GuildPlacementStatus is the shard that holds a guild and the log that it writes.
type GuildPlacementStatus struct {
	// shardName is the GuildShard that holds the guild.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=40
	ShardName string `json:"shardName,omitempty"`

	// shardUID is the uid of that GuildShard: a shard made anew under the same name is another one.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=64
	ShardUID string `json:"shardUID,omitempty"`

	// logID names the guild's log; a log born anew has a new one, and older sessions start over.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=64
	LogID string `json:"logID,omitempty"`

	// epoch counts the owners that the log has had, from 1.
	// +optional
	// +kubebuilder:validation:Minimum=1
	Epoch int64 `json:"epoch,omitempty"`
}

// GuildGatewayStatus is where clients connect.
type GuildGatewayStatus struct {
	// url is the guild's own address, ws(s)://host[:port][/path]/g/<id>/. Its REST API has the
	// same address with http(s) and api/v10 behind it. It outlives moves of the guild.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=600
	URL string `json:"url,omitempty"`
}

// GuildRelaysStatus is the state of a guild's relay pods.
type GuildRelaysStatus struct {
	// desired is the number of relay pods decided on.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Desired *int32 `json:"desired,omitempty"`

	// replicas is the number of relay pods that exist.
	// +required
	// +kubebuilder:validation:Minimum=0
	Replicas *int32 `json:"replicas,omitempty"`

	// ready is the number of relay pods that serve and stay.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Ready *int32 `json:"ready,omitempty"`

	// updated is the number of relay pods made from the present spec.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Updated *int32 `json:"updated,omitempty"`

	// draining is the number of relay pods that let their sessions go.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Draining *int32 `json:"draining,omitempty"`

	// selector matches the guild's relay pods, for the scale subresource.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Selector string `json:"selector,omitempty"`
}

// GuildRebalanceStatus is a round of moves.
// +kubebuilder:validation:MinProperties=1
type GuildRebalanceStatus struct {
	// round is the number of the last round that was begun.
	// +optional
	// +kubebuilder:validation:Minimum=1
	Round int64 `json:"round,omitempty"`

	// planHash names the plan of the round under way, or of the one that waits for approval: the annotation
	// guildhall.dev/approve with this value approves it.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=64
	PlanHash string `json:"planHash,omitempty"`

	// summary says who is to leave where in that plan.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Summary string `json:"summary,omitempty"`

	// toMove is the number of sessions that the plan has yet to move.
	// +optional
	// +kubebuilder:validation:Minimum=0
	ToMove *int64 `json:"toMove,omitempty"`

	// moved is the number of sessions asked to reconnect in the last round.
	// +optional
	// +kubebuilder:validation:Minimum=0
	Moved *int64 `json:"moved,omitempty"`

	// startedAt is when the round under way began.
	// +optional
	StartedAt *metav1.Time `json:"startedAt,omitempty"`

	// deadline ends the round under way: who has not been asked to reconnect then stays.
	// +optional
	Deadline *metav1.Time `json:"deadline,omitempty"`

	// blockedReason says why moves that are due do not begin, or pause.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=64
	BlockedReason string `json:"blockedReason,omitempty"`
}

// Guild is a community: members, channels and roles, and one ordered log of everything that
// happens in it, which every connected session follows.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:shortName=gd,categories=guildhall
// +kubebuilder:subresource:status
// +kubebuilder:subresource:scale:specpath=.spec.relays.replicas,statuspath=.status.relays.replicas,selectorpath=.status.relays.selector
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Shard",type=string,JSONPath=`.status.placement.shardName`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.status.mode`
// +kubebuilder:printcolumn:name="Members",type=integer,JSONPath=`.status.members`
// +kubebuilder:printcolumn:name="Online",type=integer,JSONPath=`.status.online`
// +kubebuilder:printcolumn:name="Relays",type=integer,JSONPath=`.status.relays.ready`
// +kubebuilder:printcolumn:name="Want",type=integer,JSONPath=`.status.relays.desired`
// +kubebuilder:printcolumn:name="ToMove",type=integer,JSONPath=`.status.rebalance.toMove`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Id",type=string,priority=1,JSONPath=`.status.id`
// +kubebuilder:printcolumn:name="Epoch",type=integer,priority=1,JSONPath=`.status.placement.epoch`
// +kubebuilder:printcolumn:name="URL",type=string,priority=1,JSONPath=`.status.gateway.url`
// +kubebuilder:selectablefield:JSONPath=`.status.placement.shardName`
type Guild struct {
	metav1.TypeMeta `json:",inline"`

	// metadata is the standard object's metadata.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty,omitzero"`

	// spec is the wish.
	// +optional
	// +default={}
	Spec GuildSpec `json:"spec,omitempty,omitzero"`

	// status is what the operator last saw.
	// +optional
	Status GuildStatus `json:"status,omitempty,omitzero"`
}

// GuildList is a list of Guilds.
// +kubebuilder:object:root=true
type GuildList struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ListMeta `json:"metadata,omitempty,omitzero"`
	// items are the Guilds.
	Items []Guild `json:"items"`
}

// DisplayName is what clients show as the guild's name.
func (g *Guild) DisplayName() string {
	if g.Spec.DisplayName != "" {
		return g.Spec.DisplayName
	}
	return g.Name
}

// JoinPolicy is who may become a member, with the default for an absent field.
func (g *Guild) JoinPolicy() JoinPolicy {
	if g.Spec.Access.Join == "" {
		return JoinMembersOnly
	}
	return g.Spec.Access.Join
}
