// Package v1 holds version v1 of the guildhall.dev API group: Guild, a community
// whose events are one ordered log, and GuildShard, the pod that serves guilds.
//
// +kubebuilder:object:generate=true
// +kubebuilder:ac:generate=true
// +groupName=guildhall.dev
package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var (
	// GroupVersion is the group and version of this package's kinds.
	GroupVersion = schema.GroupVersion{Group: "guildhall.dev", Version: "v1"}

	// SchemeGroupVersion is GroupVersion under the name that generated code expects.
	SchemeGroupVersion = GroupVersion

	schemeBuilder = runtime.NewSchemeBuilder(addKnownTypes)

	// AddToScheme adds this package's kinds to a scheme.
	AddToScheme = schemeBuilder.AddToScheme
)

func addKnownTypes(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(GroupVersion,
		&Guild{}, &GuildList{},
		&GuildShard{}, &GuildShardList{},
	)
	metav1.AddToGroupVersion(scheme, GroupVersion)
	return nil
}
