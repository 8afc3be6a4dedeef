package v1_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	guildhallv1 "guildhall.dev/guildhall/api/v1"
)

func TestServerSideDefaults(t *testing.T) {
	s := apiServer(t)
	for name, tc := range map[string]struct {
		kind, text string
		want       map[string]any
	}{
		"a Guild gets what the scale subresource reads, and nothing else": {
			kind: "Guild", text: `{}`,
			want: map[string]any{"relays": map[string]any{"replicas": int64(0)}},
		},
		"a Guild with some relay fields keeps them": {
			kind: "Guild", text: `{spec: {relays: {mode: Manual}}}`,
			want: map[string]any{"relays": map[string]any{"mode": "Manual", "replicas": int64(0)}},
		},
		"a GuildShard gets its capacity, and nothing else": {
			kind: "GuildShard", text: `{}`,
			want: map[string]any{"capacity": map[string]any{"guilds": int64(100), "sessions": int64(15000)}},
		},
		"a GuildShard with one figure of capacity gets the other": {
			kind: "GuildShard", text: `{spec: {capacity: {guilds: 7}}}`,
			want: map[string]any{"capacity": map[string]any{"guilds": int64(7), "sessions": int64(15000)}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			stored := s.create(t, object(t, tc.kind, "defaults", tc.text))
			if diff := cmp.Diff(any(tc.want), stored.Object["spec"]); diff != "" {
				t.Errorf("spec (-want +got):\n%s", diff)
			}
		})
	}
}

// The helpers on Guild stand in for defaults that the API server does not set.
func TestGuildDefaultsInCode(t *testing.T) {
	g := &guildhallv1.Guild{ObjectMeta: metav1.ObjectMeta{Name: "chess"}}
	if got := g.DisplayName(); got != "chess" {
		t.Errorf("DisplayName() = %q without spec.displayName, want the object's name", got)
	}
	if got := g.JoinPolicy(); got != guildhallv1.JoinMembersOnly {
		t.Errorf("JoinPolicy() = %q without spec.access, want MembersOnly", got)
	}
	g.Spec.DisplayName, g.Spec.Access.Join = "Chess club", guildhallv1.JoinOpen
	if g.DisplayName() != "Chess club" || g.JoinPolicy() != guildhallv1.JoinOpen {
		t.Errorf("DisplayName() = %q, JoinPolicy() = %q, want what spec says", g.DisplayName(), g.JoinPolicy())
	}
}

func TestShortNamesAndCategory(t *testing.T) {
	client, err := discovery.NewDiscoveryClientForConfig(apiServer(t).config)
	if err != nil {
		t.Fatal(err)
	}
	list, err := client.ServerResourcesForGroupVersion(guildhallv1.GroupVersion.String())
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"Guild": "gd", "GuildShard": "gsh"}
	for _, r := range list.APIResources {
		short, ok := want[r.Kind]
		if !ok || r.Name != resourceOf(r.Kind).Resource {
			continue // a subresource
		}
		delete(want, r.Kind)
		if !r.Namespaced || !slices.Equal(r.ShortNames, []string{short}) || !slices.Equal(r.Categories, []string{"guildhall"}) {
			t.Errorf("%s: namespaced %v, short names %v, categories %v", r.Name, r.Namespaced, r.ShortNames, r.Categories)
		}
	}
	for kind := range want {
		t.Errorf("the API server does not serve %s", kind)
	}
}

// What kubectl get shows: the server's table, with the wide columns after the others.
func TestPrinterColumns(t *testing.T) {
	s := apiServer(t)
	guild := s.create(t, object(t, "Guild", "columns", `{}`))
	s.setStatus(t, guild, `{status: {
		id: "123456789012345678", mode: Relayed, members: 12, online: 3,
		relays: {replicas: 2, ready: 2, desired: 3, selector: a}, rebalance: {round: 1, toMove: 40},
		placement: {shardName: shard-a, shardUID: u, logID: l, epoch: 2},
		gateway: {url: "ws://guildhall-gateway.default.svc/g/123456789012345678/"},
		conditions: [{type: Ready, status: "True", reason: Serving, message: "", lastTransitionTime: "2026-01-02T03:04:05Z"}]}}`)
	shard := s.create(t, object(t, "GuildShard", "columns", `{spec: {availability: Cordoned, capacity: {guilds: 50}}}`))
	s.setStatus(t, shard, `{status: {guilds: 4, sessions: 1200, version: v0.1.0, conditions: [
		{type: Ready, status: "False", reason: PodNotReady, message: "", lastTransitionTime: "2026-01-02T03:04:05Z"},
		{type: Durable, status: "False", reason: InMemory, message: "", lastTransitionTime: "2026-01-02T03:04:05Z"}]}}`)

	type row struct {
		Column   string
		Cell     any
		Priority int32
	}
	for kind, want := range map[string][]row{
		"Guild": {
			{"Name", "columns", 0},
			{"Ready", "True", 0},
			{"Reason", "Serving", 0},
			{"Shard", "shard-a", 0},
			{"Mode", "Relayed", 0},
			{"Members", 12.0, 0},
			{"Online", 3.0, 0},
			{"Relays", 2.0, 0},
			{"Want", 3.0, 0},
			{"ToMove", 40.0, 0},
			{"Age", nil, 0},
			{"Id", "123456789012345678", 1},
			{"Epoch", 2.0, 1},
			{"URL", "ws://guildhall-gateway.default.svc/g/123456789012345678/", 1},
		},
		"GuildShard": {
			{"Name", "columns", 0},
			{"Ready", "False", 0},
			{"Reason", "PodNotReady", 0},
			{"Availability", "Cordoned", 0},
			{"Guilds", 4.0, 0},
			{"Max", 50.0, 0},
			{"Sessions", 1200.0, 0},
			{"Durable", "False", 0},
			{"Version", "v0.1.0", 0},
			{"Age", nil, 0},
		},
	} {
		t.Run(kind, func(t *testing.T) {
			table := s.table(t, kind, "columns")
			var got []row
			for i, column := range table.ColumnDefinitions {
				r := row{Column: column.Name, Cell: table.Rows[0].Cells[i], Priority: column.Priority}
				if column.Name == "Age" {
					r.Cell = nil
				}
				got = append(got, r)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("table (-want +got):\n%s", diff)
			}
		})
	}
}

func (s *server) setStatus(t *testing.T, stored *unstructured.Unstructured, text string) {
	t.Helper()
	u := object(t, stored.GetKind(), stored.GetName(), text)
	u.SetResourceVersion(stored.GetResourceVersion())
	if _, err := s.resource(u.GetKind()).UpdateStatus(t.Context(), u, metav1.UpdateOptions{}); err != nil {
		t.Fatalf("status of %s: %v", u.GetName(), err)
	}
}

// table asks for an object the way kubectl get does.
func (s *server) table(t *testing.T, kind, name string) *metav1.Table {
	t.Helper()
	client, err := discovery.NewDiscoveryClientForConfig(s.config)
	if err != nil {
		t.Fatal(err)
	}
	data, err := client.RESTClient().Get().
		AbsPath("/apis", guildhallv1.GroupVersion.Group, guildhallv1.GroupVersion.Version,
			"namespaces", namespace, resourceOf(kind).Resource, name).
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").
		DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	table := &metav1.Table{}
	if err := json.Unmarshal(data, table); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	if len(table.Rows) != 1 {
		t.Fatalf("%d rows, want 1: %s", len(table.Rows), data)
	}
	return table
}

func TestScaleSubresource(t *testing.T) {
	s := apiServer(t)
	guilds := s.resource("Guild")
	guild := s.create(t, object(t, "Guild", "scale", `{}`))

	scale, err := guilds.Get(t.Context(), guild.GetName(), metav1.GetOptions{}, "scale")
	if err != nil {
		t.Fatalf("GET /scale of a Guild without spec.relays: %v", err)
	}
	if replicas, found, _ := unstructured.NestedInt64(scale.Object, "spec", "replicas"); found && replicas != 0 {
		t.Errorf("spec.replicas = %d, want 0", replicas)
	}

	put := func(replicas int64) error {
		if err := unstructured.SetNestedField(scale.Object, replicas, "spec", "replicas"); err != nil {
			t.Fatal(err)
		}
		_, err := guilds.Update(t.Context(), scale, metav1.UpdateOptions{}, "scale")
		return err
	}
	if err := put(1001); !apierrors.IsInvalid(err) {
		t.Errorf("PUT /scale with 1001 replicas: %v, want a refusal", err)
	}
	if err := put(7); err != nil {
		t.Fatalf("PUT /scale: %v", err)
	}
	after, err := guilds.Get(t.Context(), guild.GetName(), metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if replicas, _, _ := unstructured.NestedInt64(after.Object, "spec", "relays", "replicas"); replicas != 7 {
		t.Errorf("spec.relays.replicas = %d after PUT /scale with 7", replicas)
	}

	// A HorizontalPodAutoscaler reads the pods' selector and the count from here.
	s.setStatus(t, after, `{status: {relays: {replicas: 5, selector: "guildhall.dev/relay=scale"}}}`)
	scale, err = guilds.Get(t.Context(), guild.GetName(), metav1.GetOptions{}, "scale")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"replicas": int64(5), "selector": "guildhall.dev/relay=scale"}
	if diff := cmp.Diff(any(want), scale.Object["status"]); diff != "" {
		t.Errorf("status of /scale (-want +got):\n%s", diff)
	}
}

func TestGuildsAreSelectableByShard(t *testing.T) {
	s := apiServer(t)
	for _, name := range []string{"on-a", "on-b"} {
		guild := s.create(t, object(t, "Guild", name, `{}`))
		s.setStatus(t, guild, fmt.Sprintf(`{status: {placement: {shardName: %s, shardUID: u}}}`, name))
	}
	list, err := s.resource("Guild").List(t.Context(), metav1.ListOptions{FieldSelector: "status.placement.shardName=on-b"})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Items) != 1 || list.Items[0].GetName() != "on-b" {
		t.Errorf("found %d Guilds, want on-b alone", len(list.Items))
	}
}

// Status is its own subresource: what a user writes there with the object is dropped.
func TestStatusIsNotWrittenWithTheObject(t *testing.T) {
	s := apiServer(t)
	for _, kind := range []string{"Guild", "GuildShard"} {
		stored := s.create(t, object(t, kind, "status", `{status: {observedGeneration: 1}}`))
		if status, found := stored.Object["status"]; found {
			t.Errorf("%s was created with status %v", kind, status)
		}
	}
}

// Tools that apply the same manifest every few seconds must not write each time.
func TestApplyingTheSameManifestTwiceChangesNothing(t *testing.T) {
	s := apiServer(t)
	for name, tc := range map[string]struct{ kind, text string }{
		"a bare Guild":      {"Guild", `{metadata: {labels: {app: a}}}`},
		"a bare GuildShard": {"GuildShard", `{metadata: {labels: {app: a}}}`},
		"a full Guild": {"Guild", `{spec: {
			id: "123456789012345678", displayName: Chess club, access: {join: Open}, deletionPolicy: Delete,
			bootstrap: {channels: [{name: general, type: Text}, {name: lounge, type: Voice}]},
			placement: {shardSelector: {matchLabels: {tier: gold}}}, gateway: {publicURL: "wss://a.example.com"},
			relays: {mode: Auto, minReplicas: 0, maxReplicas: 5, sessionsPerRelay: 5000}}}`},
		"a full GuildShard": {"GuildShard", `{spec: {
			image: "guildhall.dev/guildhall:dev", capacity: {guilds: 10, sessions: 1000}, availability: Active,
			storage: {size: 1024Mi, storageClassName: fast, whenDeleted: Delete}, retention: {bytes: 1024Ki, age: 60m},
			gateway: {publicURL: "wss://b.example.com", frontDoorURL: "wss://a.example.com", tlsSecretName: tls},
			template: {metadata: {labels: {team: a}}, resources: {requests: {cpu: 1000m, memory: 1024Mi}},
				tolerations: [{key: a, operator: Exists}], nodeSelector: {pool: shards}, env: [{name: GOMEMLIMIT, value: 1GiB}],
				imagePullSecrets: [{name: pull}], imagePullPolicy: IfNotPresent}}}`},
	} {
		t.Run(name, func(t *testing.T) {
			client := s.resource(tc.kind)
			apply := func() *unstructured.Unstructured {
				applied, err := client.Apply(t.Context(), "applied", object(t, tc.kind, "applied", tc.text), metav1.ApplyOptions{FieldManager: "test"})
				if err != nil {
					t.Fatal(err)
				}
				return applied
			}
			first := apply()
			t.Cleanup(func() {
				if err := client.Delete(context.Background(), "applied", metav1.DeleteOptions{}); err != nil {
					t.Error(err)
				}
			})
			if second := apply(); second.GetResourceVersion() != first.GetResourceVersion() {
				t.Errorf("resourceVersion went from %s to %s:\n%s", first.GetResourceVersion(), second.GetResourceVersion(), cmp.Diff(first.Object, second.Object))
			}
		})
	}
}

// A rule that a new release adds must not block an object that was stored before
// it: what is invalid may stay as long as it is not touched.
func TestAnObjectFromBeforeARuleCanStillBeChanged(t *testing.T) {
	s := apiServer(t)

	// The same kind in a group of its own, so that the other tests keep their CRD.
	strict := readCRDs(t)["GuildShard"]
	strict.Spec.Group = "upgrade.guildhall.dev"
	strict.Name = strict.Spec.Names.Plural + "." + strict.Spec.Group
	strict.Spec.Names.Categories, strict.Spec.Names.ShortNames = nil, nil
	loose := strict.DeepCopy()
	spec := loose.Spec.Versions[0].Schema.OpenAPIV3Schema.Properties["spec"]
	capacity := spec.Properties["capacity"]
	sessions := capacity.Properties["sessions"]
	sessions.Maximum = nil
	capacity.Properties["sessions"] = sessions
	storage := spec.Properties["storage"]
	size := storage.Properties["size"]
	size.XValidations = nil
	storage.Properties["size"] = size

	install := func(crd *apiextensionsv1.CustomResourceDefinition) {
		t.Helper()
		if _, err := envtest.InstallCRDs(s.config, envtest.CRDInstallOptions{CRDs: []*apiextensionsv1.CustomResourceDefinition{crd}}); err != nil {
			t.Fatal(err)
		}
	}
	resource := schema.GroupVersionResource{Group: strict.Spec.Group, Version: "v1", Resource: strict.Spec.Names.Plural}
	client := s.dynamic.Resource(resource).Namespace(namespace)
	shard := func(name, text string) *unstructured.Unstructured {
		u := object(t, "GuildShard", name, text)
		u.SetAPIVersion(resource.GroupVersion().String())
		return u
	}
	const invalid = `{spec: {capacity: {sessions: 20000}, storage: {size: 1Mi}}}`

	install(loose)
	if _, err := client.Create(t.Context(), shard("old", invalid), metav1.CreateOptions{}); err != nil {
		t.Fatalf("before the rules: %v", err)
	}
	install(strict)
	dryRun := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	err := wait.PollUntilContextTimeout(t.Context(), 50*time.Millisecond, 30*time.Second, true, func(ctx context.Context) (bool, error) {
		_, err := client.Create(ctx, shard("new", invalid), dryRun)
		return apierrors.IsInvalid(err), nil
	})
	if err != nil {
		t.Fatalf("the API server did not take up the rules: %v", err)
	}

	for _, change := range []string{
		`{metadata: {labels: {a: b}}}`,
		`{metadata: {finalizers: [guildhall.dev/operator]}}`,
		`{spec: {availability: Draining}}`,
		`{spec: {storage: {whenDeleted: Delete}}}`,
	} {
		if err := mergePatch(t, client, "old", change); err != nil {
			t.Errorf("%s on an object from before the rules: %v", change, err)
		}
	}
	for _, tc := range []struct{ change, field, words string }{
		{`{spec: {capacity: {sessions: 20001}}}`, "spec.capacity.sessions", "should be less than or equal to 15000"},
		{`{spec: {storage: {size: 2Mi}}}`, "spec.storage.size", "must be at least 64Mi"},
	} {
		if err := mergePatch(t, client, "old", tc.change); !refusedFor(err, tc.field, tc.words) {
			t.Errorf("%s: %v, want a refusal that names %s", tc.change, err, tc.field)
		}
	}
	if err := mergePatch(t, client, "old", `{metadata: {finalizers: []}}`); err != nil {
		t.Error(err)
	}
}

func mergePatch(t *testing.T, client dynamic.ResourceInterface, name, text string) error {
	t.Helper()
	patch, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.Patch(t.Context(), name, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}
