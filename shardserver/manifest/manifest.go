// Package manifest reads the file of a shard server that runs alone, without Kubernetes: the
// YAML documents that kubectl would send, one or more Guilds and at most one GuildShard.
//
// No API server judges such a file, so the package does, with the same
// CustomResourceDefinitions: unknown and duplicate fields are refused, defaults filled in, types,
// limits and rules checked. What only the operator can carry out is refused too, rather than
// ignored. All problems of a file are reported at once.
package manifest

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"strconv"
	"unicode/utf8"

	yaml "go.yaml.in/yaml/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"

	v1 "guildhall.dev/guildhall/api/v1"
)

const (
	// ShardName is the name of the GuildShard of a file that has none.
	ShardName = "shard"
	// ShardUID is the uid of the GuildShard of every file.
	ShardUID types.UID = "standalone"

	maxSize = 4 << 20
)

// Manifest is what a file asks for, with what the API server and the operator
// would have added to it.
type Manifest struct {
	// Shard is the file's GuildShard, or one with all defaults. Its uid is ShardUID.
	Shard *v1.GuildShard
	// Guilds of the file, in its order. Each has a uid, Status.ID and a Status.Placement on
	// Shard, which depend on its namespace, name and spec.id alone.
	Guilds []*v1.Guild
}

// Load reads the manifest in the named file.
func Load(path string) (*Manifest, error) {
	f, err := os.Open(path) //nolint:gosec // the caller names the file
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, err
	}
	m, errs := parse(data)
	for i, err := range errs {
		errs[i] = fmt.Errorf("%s: %w", path, err)
	}
	return m, errors.Join(errs...)
}

// Parse reads a manifest from YAML. Its error joins all problems, one on each line.
func Parse(data []byte) (*Manifest, error) {
	m, errs := parse(data)
	return m, errors.Join(errs...)
}

func parse(data []byte) (*Manifest, []error) {
	if len(data) > maxSize {
		return nil, []error{fmt.Errorf("larger than %d MiB", maxSize>>20)}
	}
	var r reader
	documents := 0
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.SetStrict(true)
	for n := 1; ; n++ {
		r.at = "document " + strconv.Itoa(n)
		var doc any
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			break
		}
		var duplicates *yaml.TypeError
		switch {
		case errors.As(err, &duplicates):
			for _, e := range duplicates.Errors {
				r.fail(errors.New(e))
			}
		case err != nil:
			// Where the next document starts is anybody's guess.
			r.fail(err)
			return nil, r.errs
		}
		if doc != nil {
			documents++
			r.read(doc)
		}
	}
	if documents == 0 {
		return nil, append(r.errs, errors.New("empty: expected one or more Guilds and at most one GuildShard"))
	}
	r.finish()
	if r.errs != nil {
		return nil, r.errs
	}
	return &r.Manifest, nil
}

// A reader collects the objects of a file and the problems in it.
type reader struct {
	Manifest
	at      string // where in the file the reader is, for messages
	objects []object
	errs    []error
}

// An object is one of Manifest, with its place in the file.
type object struct {
	*metav1.ObjectMeta
	guild *v1.Guild // nil: a GuildShard
	at    string
}

func (r *reader) fail(errs ...error) {
	for _, err := range errs {
		r.errs = append(r.errs, fmt.Errorf("%s: %w", r.at, err))
	}
}

// read takes in one document. A faulty one counts too, so that what concerns several of them
// is judged on all.
func (r *reader) read(doc any) {
	if _, ok := doc.(map[any]any); !ok {
		r.fail(errors.New("expected an object with apiVersion, kind, metadata and spec"))
		return
	}
	value, err := jsonValue(nil, doc)
	if err != nil {
		r.fail(err)
		return
	}
	obj := value.(map[string]any)
	if v := obj["apiVersion"]; v != v1.GroupVersion.String() {
		r.fail(field.NotSupported(field.NewPath("apiVersion"), v, []string{v1.GroupVersion.String()}))
		return
	}
	switch obj["kind"] {
	case "Guild":
		r.addGuild(obj)
	case "GuildShard":
		r.addShard(obj)
	default:
		r.fail(field.NotSupported(field.NewPath("kind"), obj["kind"], []string{"Guild", "GuildShard"}))
	}
}

func (r *reader) addGuild(obj map[string]any) {
	guild := new(v1.Guild)
	r.convert(guildKind(), obj, guild)
	r.Guilds = append(r.Guilds, guild)
	r.objects = append(r.objects, object{&guild.ObjectMeta, guild, r.at})
}

func (r *reader) addShard(obj map[string]any) {
	shard := new(v1.GuildShard)
	r.convert(shardKind(), obj, shard)
	r.objects = append(r.objects, object{&shard.ObjectMeta, nil, r.at})
	if r.Shard != nil {
		r.fail(errors.New("a second GuildShard: the file is for one shard"))
		return
	}
	r.Shard = shard
}

// convert judges obj and makes it a typed object; a faulty one with no more than what is
// compared with other documents.
func (r *reader) convert(k *kind, obj map[string]any, into runtime.Object) {
	r.at += fmt.Sprintf(", %s", obj["kind"])
	if name, _, _ := unstructured.NestedString(obj, "metadata", "name"); name != "" {
		r.at += fmt.Sprintf(" %q", name)
	}
	errs := k.admit(obj)
	if errs != nil {
		spec, _ := obj["spec"].(map[string]any)
		maps.DeleteFunc(spec, func(name string, _ any) bool { return name != "id" && name != "capacity" })
	}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj, into); err != nil && errs == nil {
		errs = []error{err}
	}
	r.fail(errs...)
}

// finish judges the file as a whole, and adds what the API server and the operator would.
func (r *reader) finish() {
	if r.Shard == nil {
		r.at = "no document"
		r.addShard(map[string]any{
			"apiVersion": v1.GroupVersion.String(),
			"kind":       "GuildShard",
			"metadata":   map[string]any{"name": ShardName},
		})
	}
	r.Shard.UID = ShardUID
	r.joinNamespace()

	names, ids := make(map[string]string), make(map[string]string)
	for _, o := range r.objects {
		r.at = o.at
		switch {
		case o.guild != nil:
			var id string
			o.UID, id = identity(o.Namespace, o.Name)
			o.guild.Status.ID = cmp.Or(o.guild.Spec.ID, id)
			o.guild.Status.Placement = &v1.GuildPlacementStatus{ShardName: r.Shard.Name, ShardUID: string(ShardUID)}
			if o.Name != "" && r.unique(names, field.NewPath("metadata", "name"), o.Name) {
				r.unique(ids, field.NewPath("spec", "id"), o.guild.Status.ID)
			}
		case o.ObjectMeta == &r.Shard.ObjectMeta:
			have, limit := len(r.Guilds), int(r.Shard.Spec.Capacity.Guilds)
			if limit > 0 && have > limit {
				r.fail(field.Invalid(field.NewPath("spec", "capacity", "guilds"), limit, fmt.Sprintf("the file has %d Guilds", have)))
			}
		}
	}
	if len(r.Guilds) == 0 {
		r.errs = append(r.errs, errors.New("no Guild: expected one or more"))
	}
}

// joinNamespace puts all objects into the namespace that the file names.
func (r *reader) joinNamespace() {
	var first object
	for _, o := range r.objects {
		switch {
		case o.Namespace == "":
		case first.ObjectMeta == nil:
			first = o
		case o.Namespace != first.Namespace:
			r.at = o.at
			r.fail(field.Invalid(field.NewPath("metadata", "namespace"), o.Namespace,
				fmt.Sprintf("a file is for one namespace, and %s is in %q", first.at, first.Namespace)))
		}
	}
	namespace := metav1.NamespaceDefault
	if first.ObjectMeta != nil {
		namespace = first.Namespace
	}
	for _, o := range r.objects {
		o.Namespace = cmp.Or(o.Namespace, namespace)
	}
}

// unique notes that the object at hand has value in the field at path, and reports whether no other has.
func (r *reader) unique(seen map[string]string, path *field.Path, value string) bool {
	other, taken := seen[value]
	if taken {
		err := field.Duplicate(path, value)
		err.Detail = "also that of " + other
		r.fail(err)
		return false
	}
	seen[value] = r.at
	return true
}

// identity is the uid and the snowflake of the Guild of that name: the same at each start,
// since logs, tokens and clients' caches hold on to them.
func identity(namespace, name string) (types.UID, string) {
	sum := sha256.Sum256([]byte(namespace + "/" + name))
	const low = 100_000_000_000_000_000 // the least number of 18 digits
	id := low + binary.BigEndian.Uint64(sum[16:])%(9*low)
	sum[6] = sum[6]&0x0f | 0x80 // UUID version 8: of the program's own making
	sum[8] = sum[8]&0x3f | 0x80
	uid := fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
	return types.UID(uid), strconv.FormatUint(id, 10)
}

// jsonValue turns what the YAML decoder makes into what a JSON decoder would: kubectl
// sends JSON.
func jsonValue(path *field.Path, v any) (any, error) {
	switch v := v.(type) {
	case nil, bool, int64:
		return v, nil
	case int:
		return int64(v), nil
	case uint64: // does not fit an int64
		return float64(v), nil
	case float64:
		switch {
		case math.IsNaN(v) || math.IsInf(v, 0):
			return nil, field.Invalid(path, strconv.FormatFloat(v, 'g', -1, 64), "must be a finite number")
		case v == math.Trunc(v) && math.Abs(v) < 1<<63:
			return int64(v), nil
		}
		return v, nil
	case string:
		if !utf8.ValidString(v) {
			return nil, field.Invalid(path, v, "must be UTF-8")
		}
		return v, nil
	case []any:
		list := make([]any, len(v))
		for i, e := range v {
			var err error
			if list[i], err = jsonValue(path.Index(i), e); err != nil {
				return nil, err
			}
		}
		return list, nil
	case map[any]any:
		fields := make(map[string]any, len(v))
		for key, e := range v {
			var name string
			switch key := key.(type) {
			case string:
				name = key
			case bool, int, int64:
				name = fmt.Sprint(key)
			default:
				return nil, field.Invalid(path.Child(fmt.Sprint(key)), key, "the name of a field must be a string")
			}
			if _, ok := fields[name]; ok {
				return nil, field.Duplicate(path.Child(name), name)
			}
			var err error
			if fields[name], err = jsonValue(path.Child(name), e); err != nil {
				return nil, err
			}
		}
		return fields, nil
	}
	return nil, field.Invalid(path, fmt.Sprint(v), "has no place in JSON")
}
