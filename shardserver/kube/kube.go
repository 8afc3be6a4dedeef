// Package kube feeds a shard server with the resources of its namespace from the Kubernetes API.
package kube

import (
	"context"
	"fmt"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	v1 "guildhall.dev/guildhall/api/v1"
)

// Target is told of the resources as they are and change, the GuildShard first: guilds are opened
// with its retention. An object that disappears is not told: nothing is stopped since a watch lacks it.
type Target interface {
	ApplyShard(*v1.GuildShard)
	Apply(*v1.Guild)
	// SetSynced is told once, when the target has had everything that exists.
	SetSynced()
}

// Feed watches the namespace's Guilds and the GuildShard named shard until ctx ends. While the
// API is away, at the start or later, it is asked again and again, and the target keeps what it
// was told. Feed fails only for a config that cannot work.
func Feed(ctx context.Context, config *rest.Config, namespace, shard string, target Target) error {
	client, err := newClient(config)
	if err != nil {
		return fmt.Errorf("talking to the Kubernetes API: %w", err)
	}
	var group sync.WaitGroup
	defer group.Wait()
	// follow watches and returns when apply has had all that exist.
	follow := func(resource string, selector fields.Selector, expected any, apply func(object any)) {
		s := &sink{apply: apply, synced: make(chan struct{})}
		list := cache.NewListWatchFromClient(client, resource, namespace, selector)
		group.Go(func() {
			cache.NewReflectorWithOptions(list, expected, s, cache.ReflectorOptions{Name: resource, Backoff: &patience}).RunWithContext(ctx)
		})
		select {
		case <-s.synced:
		case <-ctx.Done():
		}
	}
	one := fields.OneTermEqualSelector(metav1.ObjectNameField, shard)
	follow("guildshards", one, &v1.GuildShard{}, func(object any) { target.ApplyShard(object.(*v1.GuildShard)) })
	follow("guilds", fields.Everything(), &v1.Guild{}, func(object any) { target.Apply(object.(*v1.Guild)) })
	if ctx.Err() == nil {
		target.SetSynced()
	}
	<-ctx.Done()
	return nil
}

// patience is how often an API that is away is asked again: clients wait for its answer, since a
// server that has just started knows its guilds from nowhere else.
var patience = wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 5, Cap: 8 * time.Second}

func newClient(config *rest.Config) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	if err := v1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	c := rest.CopyConfig(config)
	c.GroupVersion, c.APIPath = &v1.GroupVersion, "/apis"
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	return rest.RESTClientFor(c)
}

// sink hands on what a reflector stores, and keeps nothing.
type sink struct {
	apply  func(object any)
	once   sync.Once
	synced chan struct{} // closed when everything of the first list has been applied
}

func (s *sink) put(object any) error {
	if o, ok := object.(metav1.Object); ok {
		o.SetManagedFields(nil) // not needed, and large
	}
	s.apply(object)
	return nil
}

func (s *sink) Add(object any) error    { return s.put(object) }
func (s *sink) Update(object any) error { return s.put(object) }
func (s *sink) Delete(any) error        { return nil }
func (s *sink) Resync() error           { return nil }

func (s *sink) Replace(objects []any, _ string) error {
	for _, o := range objects {
		if err := s.put(o); err != nil {
			return err
		}
	}
	s.once.Do(func() { close(s.synced) })
	return nil
}
