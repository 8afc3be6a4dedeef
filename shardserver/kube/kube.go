// Package kube feeds a shard server with the resources of its namespace from the Kubernetes API.
package kube

import (
	"context"
	"fmt"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
)

// Target is told of the resources as they are and change. An object that disappears is not
// told: nothing is stopped since a watch lacks it.
type Target interface {
	ApplyShard(*v1.GuildShard)
	Apply(*v1.Guild)
	SetSynced()
}

// Feed watches the namespace's Guilds and the GuildShard named shard until ctx ends. While the
// API is away the target keeps what it was told.
func Feed(ctx context.Context, config *rest.Config, namespace, shard string, target Target) error {
	scheme := runtime.NewScheme()
	if err := v1.AddToScheme(scheme); err != nil {
		return err
	}
	c, err := cache.New(config, cache.Options{
		Scheme:            scheme,
		DefaultNamespaces: map[string]cache.Config{namespace: {}},
		DefaultTransform:  cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&v1.GuildShard{}: {Field: fields.OneTermEqualSelector("metadata.name", shard)},
		},
	})
	if err != nil {
		return fmt.Errorf("watching namespace %s: %w", namespace, err)
	}
	shards, err := c.GetInformer(ctx, &v1.GuildShard{}, cache.BlockUntilSynced(false))
	if err != nil {
		return fmt.Errorf("watching GuildShards: %w", err)
	}
	guilds, err := c.GetInformer(ctx, &v1.Guild{}, cache.BlockUntilSynced(false))
	if err != nil {
		return fmt.Errorf("watching Guilds: %w", err)
	}
	failed := make(chan error, 1)
	go func() { failed <- c.Start(ctx) }()

	// The shard first: guilds are opened with its retention.
	if err := follow(ctx, shards, failed, func(object any) { target.ApplyShard(object.(*v1.GuildShard)) }); err != nil {
		return err
	}
	if err := follow(ctx, guilds, failed, func(object any) { target.Apply(object.(*v1.Guild)) }); err != nil {
		return err
	}
	target.SetSynced()
	return <-failed
}

// follow hands the informer's objects to apply and returns when it has had all that exist.
func follow(ctx context.Context, informer cache.Informer, failed chan error, apply func(any)) error {
	registration, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    apply,
		UpdateFunc: func(_, object any) { apply(object) },
	})
	if err != nil {
		return err
	}
	synced := make(chan struct{})
	go func() {
		defer close(synced)
		toolscache.WaitForCacheSync(ctx.Done(), registration.HasSynced)
	}()
	select {
	case err := <-failed:
		return err
	case <-synced:
		return ctx.Err()
	}
}
