package controllers

import (
	"context"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
)

// guildBuilder makes a Guild.
type guildBuilder struct{ v1.Guild }

func makeGuild(namespace, name string) *guildBuilder {
	return &guildBuilder{v1.Guild{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1.GroupVersion.String(), Kind: "Guild"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
	}}
}

func (b *guildBuilder) ID(id string) *guildBuilder { b.Spec.ID = id; return b }

func (b *guildBuilder) Pin(shard string) *guildBuilder {
	b.Spec.Placement = &v1.GuildPlacement{ShardName: shard}
	return b
}

func (b *guildBuilder) Select(key, val string) *guildBuilder {
	b.Spec.Placement = &v1.GuildPlacement{ShardSelector: &metav1.LabelSelector{MatchLabels: map[string]string{key: val}}}
	return b
}

func (b *guildBuilder) PublicURL(u v1.GatewayURL) *guildBuilder {
	b.Spec.Gateway = &v1.GuildGateway{PublicURL: u}
	return b
}

func (b *guildBuilder) Relays(r v1.GuildRelays) *guildBuilder { b.Spec.Relays = r; return b }

func (b *guildBuilder) Obj() *v1.Guild { return &b.Guild }

// shardBuilder makes a GuildShard.
type shardBuilder struct{ v1.GuildShard }

func makeShard(namespace, name string) *shardBuilder {
	return &shardBuilder{v1.GuildShard{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1.GroupVersion.String(), Kind: "GuildShard"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
	}}
}

func (b *shardBuilder) Capacity(guilds int32) *shardBuilder {
	b.Spec.Capacity.Guilds = guilds
	return b
}

func (b *shardBuilder) Label(key, val string) *shardBuilder {
	b.Labels = map[string]string{key: val}
	return b
}

func (b *shardBuilder) Availability(a v1.Availability) *shardBuilder {
	b.Spec.Availability = a
	return b
}

func (b *shardBuilder) Storage(size string, whenDeleted v1.DeletionPolicy) *shardBuilder {
	b.Spec.Storage = &v1.ShardStorage{Size: resource.MustParse(size), WhenDeleted: whenDeleted}
	return b
}

func (b *shardBuilder) TLS(secret string) *shardBuilder {
	b.gateway().TLSSecretName = secret
	return b
}

func (b *shardBuilder) FrontDoor(u v1.GatewayURL) *shardBuilder {
	b.gateway().FrontDoorURL = u
	return b
}

func (b *shardBuilder) gateway() *v1.ShardGateway {
	if b.Spec.Gateway == nil {
		b.Spec.Gateway = new(v1.ShardGateway)
	}
	return b.Spec.Gateway
}

func (b *shardBuilder) MemoryLimit(limit string) *shardBuilder {
	b.template().Resources.Limits = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(limit)}
	return b
}

func (b *shardBuilder) Env(name, val string) *shardBuilder {
	b.template().Env = append(b.template().Env, corev1.EnvVar{Name: name, Value: val})
	return b
}

func (b *shardBuilder) template() *v1.PodTemplate {
	if b.Spec.Template == nil {
		b.Spec.Template = new(v1.PodTemplate)
	}
	return b.Spec.Template
}

func (b *shardBuilder) Obj() *v1.GuildShard { return &b.GuildShard }

// world is a namespace with a node and a client.
type world struct {
	t         *testing.T
	server    *apiServer
	client    client.Client
	namespace string
	node      *node
}

func newWorld(t *testing.T) *world {
	t.Helper()
	s := server(t)
	w := &world{t: t, server: s, client: s.client(t, testAgent), namespace: s.namespace(t)}
	w.node = s.startNode(t, w.namespace)
	return w
}

func (w *world) operate(o ...Options) (stop func()) {
	w.t.Helper()
	options := Options{Dial: w.node.dial}
	if len(o) > 0 {
		options = o[0]
		options.Dial = w.node.dial
	}
	return w.server.operate(w.t, w.namespace, options)
}

func (w *world) create(objects ...client.Object) {
	w.t.Helper()
	for _, obj := range objects {
		if err := w.client.Create(context.Background(), obj); err != nil {
			w.t.Fatalf("creating %s: %v", obj.GetName(), err)
		}
	}
}

func (w *world) key(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: w.namespace, Name: name}
}

func get[T any, P interface {
	*T
	client.Object
}](w *world, name string) P {
	w.t.Helper()
	obj := P(new(T))
	if err := w.client.Get(context.Background(), w.key(name), obj); err != nil {
		w.t.Fatalf("reading %s: %v", name, err)
	}
	return obj
}

func (w *world) guild(name string) *v1.Guild      { w.t.Helper(); return get[v1.Guild](w, name) }
func (w *world) shard(name string) *v1.GuildShard { w.t.Helper(); return get[v1.GuildShard](w, name) }

// update changes an object as a user does.
func update[T any, P interface {
	*T
	client.Object
}](w *world, name string, change func(P)) {
	w.t.Helper()
	obj := get[T, P](w, name)
	base := obj.DeepCopyObject().(client.Object)
	change(obj)
	if err := w.client.Patch(context.Background(), obj, client.MergeFrom(base)); err != nil {
		w.t.Fatalf("changing %s: %v", name, err)
	}
}

// reason is that of a condition, with "!" before it when the condition is not True.
func reason(conditions []metav1.Condition, conditionType string) string {
	c := meta.FindStatusCondition(conditions, conditionType)
	switch {
	case c == nil:
		return ""
	case c.Status == metav1.ConditionTrue:
		return c.Reason
	}
	return "!" + c.Reason
}

func message(conditions []metav1.Condition, conditionType string) string {
	if c := meta.FindStatusCondition(conditions, conditionType); c != nil {
		return c.Message
	}
	return ""
}

// guildIs waits for a Guild's Ready reason.
func (w *world) guildIs(name, want string) *v1.Guild {
	w.t.Helper()
	var g *v1.Guild
	eventually(w.t, 30*time.Second, func() string {
		g = w.guild(name)
		if got := reason(g.Status.Conditions, condReady); got != want {
			return fmt.Sprintf("Ready of Guild %s to be %q; it is %q: %s", name, want, got, message(g.Status.Conditions, condReady))
		}
		return ""
	})
	return g
}

// shardIs waits for a condition of a GuildShard.
func (w *world) shardIs(name, conditionType, want string) *v1.GuildShard {
	w.t.Helper()
	var s *v1.GuildShard
	eventually(w.t, 30*time.Second, func() string {
		s = w.shard(name)
		if got := reason(s.Status.Conditions, conditionType); got != want {
			return fmt.Sprintf("%s of GuildShard %s to be %q; it is %q: %s", conditionType, name, want, got, message(s.Status.Conditions, conditionType))
		}
		return ""
	})
	return s
}

// gone waits until an object is gone.
func (w *world) gone(obj client.Object) {
	w.t.Helper()
	eventually(w.t, 30*time.Second, func() string {
		if err := w.client.Get(context.Background(), client.ObjectKeyFromObject(obj), obj); client.IgnoreNotFound(err) != nil {
			return err.Error()
		} else if err == nil {
			return fmt.Sprintf("%T %s to go", obj, obj.GetName())
		}
		return ""
	})
}
