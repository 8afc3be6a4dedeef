package controllers

import (
	"context"
	"errors"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	acappsv1 "k8s.io/client-go/applyconfigurations/apps/v1"
	accorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	acmetav1 "k8s.io/client-go/applyconfigurations/meta/v1"

	v1 "guildhall.dev/guildhall/api/v1"
)

// ownerOf is the controller owner reference to a shard.
func ownerOf(shard *v1.GuildShard) *acmetav1.OwnerReferenceApplyConfiguration {
	return acmetav1.OwnerReference().
		WithAPIVersion(v1.GroupVersion.String()).
		WithKind("GuildShard").
		WithName(shard.Name).
		WithUID(shard.UID).
		WithController(true).
		WithBlockOwnerDeletion(true)
}

// ensureStatefulSet brings a shard's StatefulSet up to date. While the hash of the spec's
// pod-affecting fields is the same, the pod template is left as it is. It returns nil when the
// StatefulSet has just been written: its status does not speak of that yet.
func (r *shardReconciler) ensureStatefulSet(ctx context.Context, shard *v1.GuildShard) (*appsv1.StatefulSet, error) {
	hash, err := templateHash(shard)
	if err != nil {
		return nil, fmt.Errorf("hashing spec: %w", err)
	}
	key := types.NamespacedName{Namespace: shard.Namespace, Name: shard.Name}
	sts := new(appsv1.StatefulSet)
	found, err := r.find(ctx, key, sts, shard.UID)
	if err != nil {
		return nil, err
	}
	var template *accorev1.PodTemplateSpecApplyConfiguration
	if found && sts.Annotations[annotationTemplateHash] == hash {
		template, err = convert[accorev1.PodTemplateSpecApplyConfiguration](sts.Spec.Template)
	} else {
		template, err = podTemplate(shard, r.shardImage)
	}
	if err != nil {
		return nil, err
	}
	// No volumeClaimTemplates: they cannot be changed, and the claim can grow.
	desired := acappsv1.StatefulSet(shard.Name, shard.Namespace).
		WithLabels(shardLabels(shard.Name)).
		WithAnnotations(map[string]string{annotationTemplateHash: hash}).
		WithOwnerReferences(ownerOf(shard)).
		WithSpec(acappsv1.StatefulSetSpec().
			WithServiceName(podsSvcName(shard.Name)).
			WithReplicas(1).
			// OrderedReady would wait for a broken pod before it makes its successor.
			WithPodManagementPolicy(appsv1.ParallelPodManagement).
			// The operator deletes pods itself, one shard of a namespace after the other.
			WithUpdateStrategy(acappsv1.StatefulSetUpdateStrategy().WithType(appsv1.OnDeleteStatefulSetStrategyType)).
			WithRevisionHistoryLimit(3).
			WithSelector(acmetav1.LabelSelector().WithMatchLabels(shardSelector(shard.Name))).
			WithTemplate(template))
	if wrote, err := r.ensure(ctx, key, sts, desired, shard.UID); wrote || err != nil {
		return nil, err
	}
	return sts, nil
}

// ensureServices brings the headless and the client Service of a shard up to date.
func (r *shardReconciler) ensureServices(ctx context.Context, shard *v1.GuildShard) error {
	tls := tlsSecret(shard) != ""
	headless := accorev1.Service(podsSvcName(shard.Name), shard.Namespace).
		WithLabels(shardLabels(shard.Name)).
		WithOwnerReferences(ownerOf(shard)).
		WithSpec(accorev1.ServiceSpec().
			WithClusterIP(corev1.ClusterIPNone).
			// A pod that is starting holds clients, so others must find it.
			WithPublishNotReadyAddresses(true).
			WithSelector(shardSelector(shard.Name)).
			WithPorts(clientPorts(tls)...))
	client := accorev1.Service(shard.Name, shard.Namespace).
		WithLabels(shardLabels(shard.Name)).
		WithOwnerReferences(ownerOf(shard)).
		WithSpec(accorev1.ServiceSpec().
			WithSelector(acceptingSelector(shardSelector(shard.Name))).
			WithPorts(clientPorts(tls)...))
	for _, desired := range []*accorev1.ServiceApplyConfiguration{headless, client} {
		key := types.NamespacedName{Namespace: shard.Namespace, Name: *desired.Name}
		if _, err := r.ensure(ctx, key, new(corev1.Service), desired, shard.UID); err != nil {
			return err
		}
	}
	return nil
}

// clientPorts are the ports of Services for clients. The target ports are names: a pod without
// TLS has no wss, and is then no endpoint of it.
func clientPorts(tls bool) []*accorev1.ServicePortApplyConfiguration {
	ports := []*accorev1.ServicePortApplyConfiguration{servicePort(portWS, wsSvcPort)}
	if tls {
		ports = append(ports, servicePort(portWSS, wssSvcPort))
	}
	return ports
}

func servicePort(name string, port int32) *accorev1.ServicePortApplyConfiguration {
	return accorev1.ServicePort().
		WithName(name).
		WithProtocol(corev1.ProtocolTCP).
		WithPort(port).
		WithTargetPort(intstr.FromString(name))
}

// ensureClaim brings the volume claim of a shard with storage up to date.
func (r *shardReconciler) ensureClaim(ctx context.Context, shard *v1.GuildShard) error {
	storage := shard.Spec.Storage
	if storage == nil {
		return nil
	}
	key := types.NamespacedName{Namespace: shard.Namespace, Name: claimName(shard.Name)}
	claim := new(corev1.PersistentVolumeClaim)
	found, err := r.find(ctx, key, claim, shard.UID)
	if err != nil {
		return err
	}
	size := storage.Size
	if have := claim.Spec.Resources.Requests[corev1.ResourceStorage]; found && have.Cmp(size) > 0 {
		size = have // a claim that was kept from before never shrinks
	}
	spec := accorev1.PersistentVolumeClaimSpec().
		WithAccessModes(corev1.ReadWriteOncePod).
		WithResources(accorev1.VolumeResourceRequirements().WithRequests(corev1.ResourceList{corev1.ResourceStorage: size}))
	if storage.StorageClassName != "" {
		spec.WithStorageClassName(storage.StorageClassName)
	}
	desired := accorev1.PersistentVolumeClaim(key.Name, key.Namespace).WithLabels(shardLabels(shard.Name)).WithSpec(spec)
	if storage.WhenDeleted == v1.DeletionDelete {
		desired.WithOwnerReferences(ownerOf(shard))
	} else if found && metav1.IsControlledBy(claim, shard) {
		// The comparison in ensure looks for what is to be there, not for what is to go.
		return r.write(ctx, key, claim, desired, found)
	}
	_, err = r.ensure(ctx, key, claim, desired, shard.UID)
	return err
}

// removeOwned removes what a GuildShard owns besides its StatefulSet. Kubernetes would collect it, but
// not once the CRD is gone: then it does not know any more whose it was.
func (r *shardReconciler) removeOwned(ctx context.Context, shard *v1.GuildShard) error {
	key := func(name string) types.NamespacedName {
		return types.NamespacedName{Namespace: shard.Namespace, Name: name}
	}
	errs := []error{
		r.remove(ctx, new(corev1.Service), key(podsSvcName(shard.Name)), shard.UID),
		r.remove(ctx, new(corev1.Service), key(shard.Name), shard.UID),
		r.certs.drop(ctx, key(shardLinkName(shard.Name)), shard.UID),
	}
	if storage := shard.Spec.Storage; storage != nil && storage.WhenDeleted == v1.DeletionDelete {
		errs = append(errs, r.remove(ctx, new(corev1.PersistentVolumeClaim), key(claimName(shard.Name)), shard.UID))
	}
	return errors.Join(errs...)
}
