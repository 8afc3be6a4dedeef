package controllers

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	accorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	acmetav1 "k8s.io/client-go/applyconfigurations/meta/v1"
	acnetworkingv1 "k8s.io/client-go/applyconfigurations/networking/v1"
	acrbacv1 "k8s.io/client-go/applyconfigurations/rbac/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
)

// namespaceObject is an object that a namespace with shards has once.
type namespaceObject struct {
	name    string
	empty   client.Object
	desired runtime.ApplyConfiguration
}

func namespaceObjects(namespace, operatorNamespace string, tls bool) []namespaceObject {
	return []namespaceObject{
		{
			shardRoleName, new(corev1.ServiceAccount),
			accorev1.ServiceAccount(shardRoleName, namespace).WithLabels(namespaceLabels()),
		},
		{shardRoleName, new(rbacv1.Role), shardRole(namespace)},
		{shardRoleName, new(rbacv1.RoleBinding), shardRoleBinding(namespace)},
		{shardRoleName, new(networkingv1.NetworkPolicy), shardNetworkPolicy(namespace, operatorNamespace)},
		{frontDoorName, new(corev1.Service), frontDoor(namespace, tls)},
	}
}

// frontDoor leads to every accepting pod of the namespace.
func frontDoor(namespace string, tls bool) *accorev1.ServiceApplyConfiguration {
	selector := acceptingSelector(map[string]string{labelName: managedBy, labelComponent: componentShard})
	return accorev1.Service(frontDoorName, namespace).
		WithLabels(namespaceLabels()).
		WithSpec(accorev1.ServiceSpec().WithSelector(selector).WithPorts(clientPorts(tls)...))
}

// shardRole is what a shard server may do: see its namespace's Guilds and GuildShards.
func shardRole(namespace string) *acrbacv1.RoleApplyConfiguration {
	return acrbacv1.Role(shardRoleName, namespace).
		WithLabels(namespaceLabels()).
		WithRules(acrbacv1.PolicyRule().
			WithAPIGroups(v1.GroupVersion.Group).
			WithResources("guilds", "guildshards").
			WithVerbs("get", "list", "watch"))
}

func shardRoleBinding(namespace string) *acrbacv1.RoleBindingApplyConfiguration {
	return acrbacv1.RoleBinding(shardRoleName, namespace).
		WithLabels(namespaceLabels()).
		WithRoleRef(acrbacv1.RoleRef().WithAPIGroup(rbacv1.GroupName).WithKind("Role").WithName(shardRoleName)).
		WithSubjects(acrbacv1.Subject().WithKind(rbacv1.ServiceAccountKind).WithName(shardRoleName).WithNamespace(namespace))
}

// shardNetworkPolicy is that of shards and relays: it lets everybody in for clients' ports, the namespace's pods for links,
// and to the admin port the operator alone.
func shardNetworkPolicy(namespace, operatorNamespace string) *acnetworkingv1.NetworkPolicyApplyConfiguration {
	port := func(n int32) *acnetworkingv1.NetworkPolicyPortApplyConfiguration {
		return acnetworkingv1.NetworkPolicyPort().WithProtocol(corev1.ProtocolTCP).WithPort(intstr.FromInt32(n))
	}
	operator := acnetworkingv1.NetworkPolicyPeer().WithNamespaceSelector(
		acmetav1.LabelSelector().WithMatchLabels(map[string]string{corev1.LabelMetadataName: operatorNamespace}))
	return acnetworkingv1.NetworkPolicy(shardRoleName, namespace).
		WithLabels(namespaceLabels()).
		WithSpec(acnetworkingv1.NetworkPolicySpec().
			WithPodSelector(acmetav1.LabelSelector().WithMatchLabels(map[string]string{labelName: managedBy}).
				WithMatchExpressions(acmetav1.LabelSelectorRequirement().
					WithKey(labelComponent).WithOperator(metav1.LabelSelectorOpIn).WithValues(componentShard, componentRelay))).
			WithPolicyTypes(networkingv1.PolicyTypeIngress).
			WithIngress(
				acnetworkingv1.NetworkPolicyIngressRule().WithPorts(port(wsPort), port(wssPort)),
				acnetworkingv1.NetworkPolicyIngressRule().WithPorts(port(linkPort)).
					WithFrom(acnetworkingv1.NetworkPolicyPeer().WithPodSelector(acmetav1.LabelSelector())),
				acnetworkingv1.NetworkPolicyIngressRule().WithPorts(port(adminPort)).WithFrom(operator),
			))
}

// ensureKeys makes the key set if there is none. One that exists is left alone, whoever made it:
// tokens and sessions depend on it.
func (r *namespaceReconciler) ensureKeys(ctx context.Context, namespace string) error {
	secret := new(corev1.Secret)
	err := r.live.Get(ctx, types.NamespacedName{Namespace: namespace, Name: keysName}, secret)
	if err == nil {
		return nil
	}
	if !apierrors.IsNotFound(err) {
		return fmt.Errorf("reading Secret %s: %w", keysName, err)
	}
	secret = &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: keysName, Labels: namespaceLabels()},
		Data:       map[string][]byte{"current": newKey()},
	}
	if err := r.Create(ctx, secret, client.FieldOwner(fieldManager)); client.IgnoreAlreadyExists(err) != nil {
		return fmt.Errorf("creating Secret %s: %w", keysName, err)
	}
	return nil
}

// newKey makes `<key id>.<32 bytes, base64url>`.
func newKey() []byte {
	var id [4]byte
	var key [32]byte
	_, _ = rand.Read(id[:]) // crypto/rand does not fail
	_, _ = rand.Read(key[:])
	return []byte(hex.EncodeToString(id[:]) + "." + base64.RawURLEncoding.EncodeToString(key[:]))
}
