package controllers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log"
)

// applier writes objects with server-side apply, and only those that differ.
type applier struct {
	client.Client
	// live reads past the cache, which holds nothing but the operator's own objects: somebody
	// else's object of the same name is seen only here.
	live client.Reader
}

// nameConflictError says that an object of a wanted name belongs to somebody else.
type nameConflictError struct {
	kind, name string
}

func (e *nameConflictError) Error() string {
	return fmt.Sprintf("%s %q exists and is not this operator's: delete or rename it", e.kind, e.name)
}

func isNameConflict(err error) bool {
	_, ok := errors.AsType[*nameConflictError](err)
	return ok
}

// find reads obj, first from the cache, then from the server. It returns false when there is
// none, and a nameConflictError when it is not the operator's or controlled by another owner.
func (a *applier) find(ctx context.Context, key types.NamespacedName, obj client.Object, owner types.UID) (bool, error) {
	err := a.Get(ctx, key, obj)
	if apierrors.IsNotFound(err) {
		err = a.live.Get(ctx, key, obj)
	}
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading %T %s: %w", obj, key.Name, err)
	}
	controller := metav1.GetControllerOf(obj)
	foreign := obj.GetLabels()[labelManagedBy] != managedBy ||
		controller != nil && controller.UID != owner
	if foreign {
		return true, &nameConflictError{kind: reflect.TypeOf(obj).Elem().Name(), name: key.Name}
	}
	return true, nil
}

// ensure applies desired unless the object has all of it already. current is an empty object of
// the kind, and is filled with what was found; owner is the uid of the controller owner, if any.
func (a *applier) ensure(ctx context.Context, key types.NamespacedName, current client.Object, desired runtime.ApplyConfiguration, owner types.UID) (wrote bool, err error) {
	found, err := a.find(ctx, key, current, owner)
	if err != nil {
		return false, err
	}
	if found && current.GetDeletionTimestamp() != nil {
		return false, nil // made again when it is gone
	}
	if found && covers(current, desired) {
		return false, nil
	}
	return true, a.write(ctx, key, current, desired, found)
}

// write applies desired. Force only takes what is known to be ours: an object that somebody else
// has made since the look-up answers with a conflict.
func (a *applier) write(ctx context.Context, key types.NamespacedName, current client.Object, desired runtime.ApplyConfiguration, found bool) error {
	kind := reflect.TypeOf(current).Elem().Name()
	opts := []client.ApplyOption{client.FieldOwner(fieldManager)}
	if found {
		opts = append(opts, client.ForceOwnership)
	}
	log.FromContext(ctx).V(1).Info("Applying", "kind", kind, "object", key.String())
	err := a.Apply(ctx, desired, opts...)
	switch {
	case apierrors.IsConflict(err) && !found:
		return &nameConflictError{kind: kind, name: key.Name}
	case err != nil:
		return fmt.Errorf("applying %s %s: %w", kind, key.Name, err)
	}
	return nil
}

// covers says whether an object has every field that desired asks for. Fields that the server or
// others have added do not count; lists must have the same length. A no-op apply can still raise
// the resource version and so wake its own watcher for ever, hence the comparison.
func covers(current client.Object, desired runtime.ApplyConfiguration) bool {
	have, err := toTree(current)
	if err != nil {
		return false
	}
	want, err := toTree(desired)
	if err != nil {
		return false
	}
	if m, ok := want.(map[string]any); ok {
		// Objects from a typed client have lost their kind.
		delete(m, "kind")
		delete(m, "apiVersion")
	}
	return contains(have, want)
}

func toTree(v any) (any, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var tree any
	return tree, json.Unmarshal(data, &tree)
}

func contains(have, want any) bool {
	switch want := want.(type) {
	case map[string]any:
		have, ok := have.(map[string]any)
		if !ok {
			return len(want) == 0 && have == nil
		}
		for k, w := range want {
			if !contains(have[k], w) {
				return false
			}
		}
		return true
	case []any:
		have, ok := have.([]any)
		if !ok || len(have) != len(want) {
			return false
		}
		for i := range want {
			if !contains(have[i], want[i]) {
				return false
			}
		}
		return true
	default:
		return have == want
	}
}

// convert gives a value the shape of an apply configuration: both have the same JSON.
func convert[T any](from any) (*T, error) {
	data, err := json.Marshal(from)
	if err != nil {
		return nil, err
	}
	to := new(T)
	if err := json.Unmarshal(data, to); err != nil {
		return nil, err
	}
	return to, nil
}

// remove deletes an object if it is there and the operator's own.
func (a *applier) remove(ctx context.Context, obj client.Object, key types.NamespacedName, owner types.UID, opts ...client.DeleteOption) error {
	found, err := a.find(ctx, key, obj, owner)
	if isNameConflict(err) || err == nil && (!found || obj.GetDeletionTimestamp() != nil) {
		return nil
	}
	if err != nil {
		return err
	}
	uid := obj.GetUID()
	opts = append(opts, client.Preconditions{UID: &uid})
	if err := a.Delete(ctx, obj, opts...); err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("deleting %T %s: %w", obj, key.Name, err)
	}
	return nil
}

// patchFinalizer adds or removes the operator's finalizer. Finalizers are a list, which a merge
// patch replaces whole: hence the optimistic lock.
func patchFinalizer(ctx context.Context, c client.Client, obj client.Object, change func(client.Object, string) bool) error {
	base, ok := obj.DeepCopyObject().(client.Object)
	if !ok || !change(obj, finalizer) {
		return nil
	}
	patch := client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})
	return c.Patch(ctx, obj, patch, client.FieldOwner(fieldManager))
}

func addFinalizer(ctx context.Context, c client.Client, obj client.Object) error {
	return patchFinalizer(ctx, c, obj, controllerutil.AddFinalizer)
}

func removeFinalizer(ctx context.Context, c client.Client, obj client.Object) error {
	return client.IgnoreNotFound(patchFinalizer(ctx, c, obj, controllerutil.RemoveFinalizer))
}

// rejection is the message of an error that stays until somebody mends its cause: a template that
// makes no pod, a quota, a cluster without free addresses. It is empty for others.
func rejection(err error) string {
	switch apierrors.ReasonForError(err) {
	case metav1.StatusReasonInvalid, metav1.StatusReasonForbidden, metav1.StatusReasonBadRequest, metav1.StatusReasonInternalError:
		return err.Error()
	}
	return ""
}

// namespaceEnding says that a write was refused because the namespace is being deleted.
func namespaceEnding(err error) bool {
	return apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause)
}
