package controllers

import (
	"context"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"
)

type requestQueue = workqueue.TypedRateLimitingInterface[reconcile.Request]

// trigger is a source through which one part of the operator wakes the reconciler of another. It
// adds to the queue itself: a channel between them could block the sender, or lose what a full
// one cannot take.
type trigger struct {
	mu    sync.Mutex
	queue requestQueue
}

var _ source.Source = (*trigger)(nil)

// Start implements source.Source.
func (t *trigger) Start(_ context.Context, queue requestQueue) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.queue = queue
	return nil
}

// wake has the reconciler look at the objects. Before the controller has started this does
// nothing: it begins with all objects anyway.
func (t *trigger) wake(keys ...types.NamespacedName) {
	t.wakeAfter(0, keys...)
}

func (t *trigger) wakeAfter(delay time.Duration, keys ...types.NamespacedName) {
	t.mu.Lock()
	queue := t.queue
	t.mu.Unlock()
	if queue == nil {
		return
	}
	for _, key := range keys {
		queue.AddAfter(reconcile.Request{NamespacedName: key}, delay)
	}
}

// namespaceHandler asks for a pass over the namespace of an object that matters. The delay makes
// one pass of a burst of events.
type namespaceHandler struct {
	delay time.Duration
	// changed says whether an update matters.
	changed func(before, after client.Object) bool
}

var _ handler.EventHandler = namespaceHandler{}

func (h namespaceHandler) add(obj client.Object, queue requestQueue) {
	queue.AddAfter(reconcile.Request{NamespacedName: namespaceKey(obj.GetNamespace())}, h.delay)
}

// Create implements handler.EventHandler.
func (h namespaceHandler) Create(_ context.Context, e event.CreateEvent, q requestQueue) {
	h.add(e.Object, q)
}

// Update implements handler.EventHandler.
func (h namespaceHandler) Update(_ context.Context, e event.UpdateEvent, q requestQueue) {
	if h.changed == nil || h.changed(e.ObjectOld, e.ObjectNew) {
		h.add(e.ObjectNew, q)
	}
}

// Delete implements handler.EventHandler.
func (h namespaceHandler) Delete(_ context.Context, e event.DeleteEvent, q requestQueue) {
	h.add(e.Object, q)
}

// Generic implements handler.EventHandler.
func (h namespaceHandler) Generic(_ context.Context, e event.GenericEvent, q requestQueue) {
	h.add(e.Object, q)
}

// namespaceKey is the key of a reconciler that works on whole namespaces.
func namespaceKey(namespace string) types.NamespacedName {
	return types.NamespacedName{Name: namespace}
}
