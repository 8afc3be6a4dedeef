package manifest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/yaml"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// guild and shard make a document with a name and a spec in flow style.
func guild(name, spec string) string { return document("Guild", name, spec) }
func shard(name, spec string) string { return document("GuildShard", name, spec) }

func document(kind, name, spec string) string {
	return fmt.Sprintf("---\napiVersion: guildhall.dev/v1\nkind: %s\nmetadata: {name: %s}\nspec: {%s}\n", kind, name, spec)
}

// in puts the objects of a file into a namespace.
func in(namespace, file string) string {
	return strings.ReplaceAll(file, "metadata: {", "metadata: {namespace: "+namespace+", ")
}

// guilds makes n of them.
func guilds(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(guild(fmt.Sprintf("g%d", i), ""))
	}
	return b.String()
}

const full = `
# A comment may come first.
apiVersion: guildhall.dev/v1
kind: GuildShard
metadata:
  name: halls
  labels: {tier: small}
spec:
  capacity: {guilds: 2, sessions: 500}
  storage: {size: 1Gi}
  retention: {bytes: 4Mi, age: 2h}
  gateway: {publicURL: "wss://one.example.com", frontDoorURL: "wss://example.com/door"}
---
apiVersion: guildhall.dev/v1
kind: Guild
metadata: {name: raids, annotations: {note: "kept"}}
spec:
  id: "123456789012345678"
  displayName: Raids & Revelry
  access: {join: Open}
  deletionPolicy: Delete
  bootstrap:
    channels:
    - {name: general, type: Text}
    - {name: general, type: Voice}
  gateway: {publicURL: "wss://raids.example.com:8443/x"}
...
---
{"apiVersion": "guildhall.dev/v1", "kind": "Guild", "metadata": {"name": "trade.guild-2"}}
`

func TestAccepted(t *testing.T) {
	for sentence, c := range map[string]struct {
		file string
		want func(m *Manifest) bool
	}{
		"every field that a shard can carry out alone": {full, func(m *Manifest) bool {
			s, g := m.Shard, m.Guilds[0]
			return s.Name == "halls" && s.Labels["tier"] == "small" && s.Spec.Capacity == v1.ShardCapacity{Guilds: 2, Sessions: 500} &&
				s.Spec.Storage.Size.String() == "1Gi" && s.Spec.Retention.Age.Hours() == 2 && s.Spec.Gateway.FrontDoorURL == "wss://example.com/door" &&
				g.Spec.ID == "123456789012345678" && g.Status.ID == g.Spec.ID && g.Annotations["note"] == "kept" &&
				g.Spec.DisplayName == "Raids & Revelry" && g.Spec.Access.Join == v1.JoinOpen && g.Spec.DeletionPolicy == v1.DeletionDelete &&
				g.Spec.Bootstrap.Channels[1] == v1.BootstrapChannel{Name: "general", Type: v1.ChannelVoice} &&
				g.Kind == "Guild" && g.APIVersion == "guildhall.dev/v1" && m.Guilds[1].Name == "trade.guild-2"
		}},
		"without a GuildShard there is one with the defaults": {guild("a", ""), func(m *Manifest) bool {
			return m.Shard.Name == "shard" && m.Shard.Kind == "GuildShard" && m.Shard.Spec.Capacity == v1.ShardCapacity{Guilds: 100, Sessions: 15000}
		}},
		"defaults are filled in": {guild("a", "") + shard("s", "capacity: {guilds: 7}"), func(m *Manifest) bool {
			return m.Shard.Spec.Capacity.Sessions == 15000 && *m.Guilds[0].Spec.Relays.Replicas == 0
		}},
		"relays as they are by default": {guild("a", "relays: {replicas: 0}"), nil},
		"null is as good as absent": {guild("a", "placement: null, gateway: null") + shard("s", "image: null, capacity: null"), func(m *Manifest) bool {
			return m.Guilds[0].Spec.Placement == nil && m.Shard.Spec.Capacity.Guilds == 100
		}},
		"a creationTimestamp of null, as tools write it": {strings.Replace(guild("a", ""), "{name", "{creationTimestamp: null, name", 1), nil},
		"a guild without a spec":                         {"apiVersion: guildhall.dev/v1\nkind: Guild\nmetadata: {name: a}\n", nil},
		"empty documents":                                {"---\n---\n# nothing\n---\n" + guild("a", "") + "---\n", nil},
		"anchors":                                        {"apiVersion: guildhall.dev/v1\nkind: Guild\nmetadata: {name: &n hall}\nspec: {displayName: *n}\n", nil},
		"windows line ends":                              {strings.ReplaceAll(full, "\n", "\r\n"), nil},
		"as many guilds as the shard holds":              {guilds(3) + shard("s", "capacity: {guilds: 3}"), nil},
		"the namespace default, if none says another": {guild("a", ""), func(m *Manifest) bool {
			return m.Guilds[0].Namespace == "default" && m.Shard.Namespace == "default"
		}},
		"one namespace, also for those that do not name it": {guild("a", "") + in("games", guild("b", "")), func(m *Manifest) bool {
			return m.Guilds[0].Namespace == "games" && m.Guilds[1].Namespace == "games" && m.Shard.Namespace == "games"
		}},
		"each guild is placed on the shard": {full, func(m *Manifest) bool {
			for _, g := range m.Guilds {
				if g.UID == "" || *g.Status.Placement != (v1.GuildPlacementStatus{ShardName: "halls", ShardUID: "standalone"}) {
					return false
				}
			}
			return m.Shard.UID == "standalone" && m.Guilds[0].UID != m.Guilds[1].UID
		}},
	} {
		t.Run(sentence, func(t *testing.T) {
			m, err := Parse([]byte(c.file))
			if err != nil {
				t.Fatalf("refused:\n%v", err)
			}
			if c.want != nil && !c.want(m) {
				out, _ := yaml.Marshal(m)
				t.Errorf("not as expected:\n%s", out)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for sentence, c := range map[string]struct {
		file string
		want []string // in this order, one on each line
	}{
		"an empty file":               {"", []string{"empty: expected one or more Guilds"}},
		"comments alone":              {"# nothing\n---\n", []string{"empty: expected one or more Guilds"}},
		"a shard without guilds":      {shard("s", ""), []string{"no Guild"}},
		"two shards":                  {guild("a", "") + shard("s", "") + shard("t", ""), []string{`document 3, GuildShard "t": a second GuildShard`}},
		"another version":             {strings.Replace(guilds(2), "/v1", "/v2", 1), []string{`document 1: apiVersion: Unsupported value: "guildhall.dev/v2"`}},
		"another kind":                {strings.Replace(guilds(2), "kind: Guild", "kind: Gild", 1), []string{`document 1: kind: Unsupported value: "Gild": supported values: "Guild", "GuildShard"`}},
		"another project's object":    {guild("a", "") + "---\napiVersion: v1\nkind: ConfigMap\n", []string{`document 2: apiVersion: Unsupported value: "v1"`}},
		"no kind":                     {guild("a", "") + "---\napiVersion: guildhall.dev/v1\n", []string{"document 2: kind: Unsupported value: null"}},
		"a kind that is not a string": {guild("a", "") + "---\napiVersion: guildhall.dev/v1\nkind: []\n", []string{"document 2: kind: Unsupported value: []"}},
		"a document that is a list":   {guild("a", "") + "---\n- 1\n", []string{"document 2: expected an object"}},

		"broken YAML":                     {guild("a", "") + "---\nspec: {\n", []string{"document 2: yaml: line"}},
		"a duplicate field":               {guild("a", "displayName: x,\n displayName: y"), []string{`document 1: line 6: key "displayName" already set`}},
		"a duplicate field once a string": {guild("a", "1: x, '1': y"), []string{`spec.1: Duplicate value: "1"`}},
		"an unknown field":                {guild("a", "bootstrap: {channels: [{name: x, type: Text, topic: y}]}"), []string{`document 1, Guild "a": spec.bootstrap.channels[0].topic: unknown field`}},
		"an unknown field of the object":  {guild("a", "") + "sepc: {}\n", []string{"sepc: unknown field"}},
		"a number that JSON lacks":        {guild("a", "displayName: .nan"), []string{`spec.displayName: Invalid value: "NaN": must be a finite number`}},
		"bytes that are not text":         {guild("a", "displayName: !!binary /w=="), []string{"spec.displayName: Invalid value", "must be UTF-8"}},
		"a list as the name of a field":   {guild("a", "? [x]\n : y"), []string{"document 1: yaml: invalid map key"}},
		"a time as the name of a field":   {guild("a", "1.5: y"), []string{"spec.1.5: Invalid value: 1.5: the name of a field must be a string"}},

		"no name":                   {"apiVersion: guildhall.dev/v1\nkind: Guild\n", []string{"document 1, Guild: metadata.name: Required value"}},
		"a generated name":          {strings.Replace(guild("a", ""), "name", "generateName", 1), []string{"metadata.generateName: Forbidden", "metadata.name: Required value"}},
		"a name with capitals":      {guild("Raids", ""), []string{`document 1, Guild "Raids": metadata.name: Invalid value: "Raids": a lowercase RFC 1123 subdomain`}},
		"a name that is a number":   {guild("5", ""), []string{"document 1, Guild: metadata: Invalid value", "string"}},
		"metadata that is a string": {"apiVersion: guildhall.dev/v1\nkind: Guild\nmetadata: a\n", []string{"metadata: Invalid value"}},
		"a label that is none":      {strings.Replace(guild("a", ""), "{name", "{labels: {x: a b}, name", 1), []string{"metadata.labels: Invalid value: \"a b\""}},
		"what the API server writes": {
			strings.Replace(guild("a", ""), "{name", "{uid: x, deletionTimestamp: 2026-01-01T00:00:00Z, name", 1),
			[]string{"metadata.deletionTimestamp: Forbidden", "metadata.uid: Forbidden: a file gives name, namespace, labels and annotations"},
		},
		"two namespaces": {
			in("x", guild("a", "")) + guild("b", "") + in("z", shard("s", "")),
			[]string{`document 3, GuildShard "s": metadata.namespace: Invalid value: "z": a file is for one namespace, and document 1, Guild "a" is in "x"`},
		},
		"a namespace that is none":               {in("a.b", guild("a", "")), []string{`metadata.namespace: Invalid value: "a.b"`}},
		"two guilds of one name":                 {guild("a", "") + guild("b", "") + guild("a", ""), []string{`document 3, Guild "a": metadata.name: Duplicate value: "a": also that of document 1, Guild "a"`}},
		"two guilds of one id":                   {guild("a", `id: "12345678901234567"`) + guild("b", `id: "12345678901234567"`), []string{`document 2, Guild "b": spec.id: Duplicate value: "12345678901234567": also that of document 1, Guild "a"`}},
		"more guilds than the shard holds":       {shard("s", "capacity: {guilds: 2}") + guilds(3), []string{`document 1, GuildShard "s": spec.capacity.guilds: Invalid value: 2: the file has 3 Guilds`}},
		"more guilds than a shard holds unasked": {guilds(101), []string{`GuildShard "shard": spec.capacity.guilds: Invalid value: 100: the file has 101 Guilds`}},

		"an id of 16 digits":       {guild("a", `id: "1234567890123456"`), []string{"spec.id: Invalid value", "17"}},
		"an id that is a number":   {guild("a", "id: 123456789012345678"), []string{"spec.id: Invalid value", "type string"}},
		"an id that begins with 0": {guild("a", `id: "012345678901234567"`), []string{"spec.id: Invalid value", "without a leading zero"}},
		"an address without ws":    {guild("a", `gateway: {publicURL: "https://x"}`), []string{"spec.gateway.publicURL: Invalid value", "ws://host"}},
		"an empty object":          {guild("a", "access: {}"), []string{"spec.access"}},
		"another join policy":      {guild("a", "access: {join: Closed}"), []string{`spec.access.join: Unsupported value: "Closed": supported values: "Open", "MembersOnly"`}},
		"yes for a string":         {guild("a", "displayName: yes"), []string{"spec.displayName: Invalid value", "type string"}},
		"a channel without type":   {guild("a", "bootstrap: {channels: [{name: x}]}"), []string{"spec.bootstrap.channels[0].type: Required value"}},
		"a small volume":           {guild("a", "") + shard("s", "storage: {size: 1Mi}"), []string{"spec.storage.size: Invalid value", "at least 64Mi"}},
		"a volume of an endless number": {
			guild("a", "") + shard("s", "storage: {size: 1e999999999}, retention: {bytes: \"1e-999999999\"}, template: {resources: {limits: {cpu: \"1e-999999999\"}}}"),
			[]string{"spec.retention.bytes: Invalid value", "spec.storage.size: Invalid value"},
		},
		"a short memory":         {guild("a", "") + shard("s", "retention: {age: 5s}"), []string{"spec.retention.age: Invalid value", "between 1m and 720h"}},
		"a shard of a long name": {guild("a", "") + shard(strings.Repeat("s", 41), ""), []string{"at most 40 characters"}},
		"a shard for no guilds":  {guild("a", "") + shard("s", "capacity: {guilds: 0}"), []string{"spec.capacity.guilds: Invalid value: 0"}},

		"a status of a guild": {guild("a", "") + "status: {id: x}\n", []string{"status: Forbidden: status is written by the operator"}},
		"a status of a shard": {guild("a", "") + shard("s", "") + "status: {version: x}\n", []string{"status: Forbidden: status is written by the operator"}},
		"a placement":         {guild("a", "placement: {shardName: s}"), []string{"spec.placement: Forbidden: alone, one shard holds every guild"}},
		"relays": {
			guild("a", "relays: {mode: Manual, replicas: 3, minReplicas: 0, maxReplicas: 1, sessionsPerRelay: 9}"),
			[]string{"spec.relays.mode: Forbidden: only the operator", "spec.relays.replicas: F", "spec.relays.minReplicas: F", "spec.relays.maxReplicas: F", "spec.relays.sessionsPerRelay: F"},
		},
		"what shapes a pod": {
			guild("a", "") + shard("s", "image: x, availability: Active, template: {priorityClassName: x}, storage: {size: 1Gi, storageClassName: x, whenDeleted: Retain}, gateway: {tlsSecretName: x}"),
			[]string{"spec.image: Forbidden: only the operator makes pods", "spec.availability: F", "spec.storage.storageClassName: F", "spec.storage.whenDeleted: F", "spec.gateway.tlsSecretName: Forbidden: alone there are no Secrets", "spec.template: F"},
		},
		"duplicate entries of a list map": {guild("a", "") + shard("s", "template: {env: [{name: x}, {name: x}]}"), []string{"spec.template: F", "spec.template.env[1]: Duplicate value"}},

		"several problems, all of them": {
			guild("A", "x: 1") + shard("s", "z: 2") + guild("b", "id: x") + "---\nkind: x\n",
			[]string{`document 1, Guild "A": spec.x: unknown`, `document 1, Guild "A": metadata.name`, `document 2, GuildShard "s": spec.z: unknown`, `document 3, Guild "b": spec.id`, "document 4: apiVersion: Unsupported value: null"},
		},
		"a file that is too large": {strings.Repeat("#", maxSize+1), []string{"larger than 4 MiB"}},
	} {
		t.Run(sentence, func(t *testing.T) {
			m, err := Parse([]byte(c.file))
			if m != nil || err == nil {
				t.Fatal("accepted")
			}
			rest := err.Error()
			for _, want := range c.want {
				_, after, found := strings.Cut(rest, want)
				if !found {
					t.Fatalf("%q is missing, or too late, in\n%v", want, err)
				}
				rest = after
			}
		})
	}
}

// A guild that a file leaves without an id has the same one at every start, and in every release.
func TestIdentity(t *testing.T) {
	uid, id := identity("default", "raids")
	if got, want := fmt.Sprint(uid, " ", id), "47d1f83f-ff01-8928-bede-f3f145787bc1 292668508447447804"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	seen := make(map[string]bool)
	for i := range 10000 {
		uid, id := identity("default", fmt.Sprint("g", i))
		if _, err := snowflake.Parse(id); err != nil || len(id) != 18 || seen[id] || seen[string(uid)] {
			t.Fatalf("guild %d: uid %s, id %s: not new or not a snowflake: %v", i, uid, id, err)
		}
		seen[id], seen[string(uid)] = true, true
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if m, err := Load(file("good.yaml", full)); err != nil || len(m.Guilds) != 2 {
		t.Errorf("a good file: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "none.yaml")); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "none.yaml") {
		t.Errorf("no file: %v", err)
	}
	for name, content := range map[string]string{
		"empty.yaml": "",
		"large.yaml": strings.Repeat(" ", maxSize+1),
		"bad.yaml":   guild("a", "x: 1, y: 2"),
	} {
		_, err := Load(file(name, content))
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		for line := range strings.Lines(err.Error()) {
			if !strings.HasPrefix(line, filepath.Join(dir, name)+": ") {
				t.Errorf("%s: a line does not name the file: %s", name, line)
			}
		}
	}
}

// The fields that are refused exist: a field of another name would be let through.
func TestRefusedFieldsExist(t *testing.T) {
	for name, k := range map[string]*kind{"Guild": guildKind(), "GuildShard": shardKind()} {
		for _, r := range k.refused {
			if r.path == "status" {
				continue
			}
			s := k.structural
			for field := range strings.SplitSeq(r.path, ".") {
				next, ok := s.Properties[field]
				if !ok {
					t.Errorf("%s has no %s", name, r.path)
					next = schema.Structural{}
				}
				s = &next
			}
		}
	}
}

// FuzzParse: no input makes Parse panic; what it accepts keeps the promises of Manifest, and
// is accepted again as it was understood.
func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte(guilds(3) + in("x", shard("s", "storage: {size: 0.5Gi}, retention: {bytes: 1e7, age: 90m}"))))
	f.Add([]byte(guild("a", "placement: {shardSelector: {matchLabels: {a: b}}}, id: 5, relays: []")))
	f.Add([]byte("? {a: &x [*x, .nan, 0x7f, 1e400, 18446744073709551615, <<: *x]}\n: !!binary x\n"))
	f.Add([]byte("%YAML 1.1\n---\n...\n\xef\xbb\xbf--- |\n  text\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Parse(data)
		if err != nil {
			if m != nil {
				t.Fatal("both a manifest and an error")
			}
			return
		}
		var file []byte
		write := func(meta *string, obj any) {
			*meta = ""
			out, err := yaml.Marshal(obj)
			if err != nil {
				t.Fatal(err)
			}
			file = append(append(file, "---\n"...), out...)
		}
		shard := m.Shard.DeepCopy()
		write((*string)(&shard.UID), shard)
		ids := make(map[string]bool)
		for _, g := range m.Guilds {
			if _, err := snowflake.Parse(g.Status.ID); err != nil || ids[g.Status.ID] || g.UID == "" || g.Namespace != shard.Namespace {
				t.Fatalf("not unique or not complete: %+v", g)
			}
			ids[g.Status.ID] = true
			g := g.DeepCopy()
			g.Status = v1.GuildStatus{}
			write((*string)(&g.UID), g)
		}
		if len(ids) == 0 || len(ids) > int(shard.Spec.Capacity.Guilds) {
			t.Fatalf("%d guilds", len(ids))
		}
		again, err := Parse(file)
		if err != nil {
			t.Fatalf("refused once written:\n%s\n%v", file, err)
		}
		if !equality.Semantic.DeepEqual(m, again) {
			t.Fatalf("understood otherwise once written:\n%s", file)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	file := []byte(guilds(100))
	for b.Loop() {
		if _, err := Parse(file); err != nil {
			b.Fatal(err)
		}
	}
}
