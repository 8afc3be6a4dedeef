package manifest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/objectmeta"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	metavalidation "k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	"guildhall.dev/guildhall/config/crd"
)

// A kind judges the objects of one kind as the API server does when they are created.
type kind struct {
	structural *schema.Structural
	openAPI    validation.SchemaValidator
	rules      *cel.Validator
	refused    []refused
}

// refused is a field that only means something to the operator.
type refused struct {
	path   string // names joined by dots
	except any    // the value that is accepted nevertheless: the field's default
	reason string
}

const (
	oneShard   = "alone, one shard holds every guild of the file"
	noPod      = "only the operator makes pods: alone, the shard is the process that reads the file"
	noClaim    = "only the operator makes volume claims: alone, the logs are in the directory given to the shard server"
	noSecret   = "alone there are no Secrets: give the certificate to the shard server's flags"
	noRelay    = "only the operator makes relay pods: alone, the shard holds every session"
	noOperator = "status is written by the operator"
)

var (
	guildRefused = []refused{
		{"spec.placement", nil, oneShard},
		{"spec.relays.mode", nil, noRelay},
		{"spec.relays.replicas", int64(0), noRelay},
		{"spec.relays.minReplicas", nil, noRelay},
		{"spec.relays.maxReplicas", nil, noRelay},
		{"spec.relays.sessionsPerRelay", nil, noRelay},
		{"status", nil, noOperator},
	}
	shardRefused = []refused{
		{"spec.image", nil, noPod},
		{"spec.availability", nil, oneShard},
		{"spec.storage.storageClassName", nil, noClaim},
		{"spec.storage.whenDeleted", nil, noClaim},
		{"spec.gateway.tlsSecretName", nil, noSecret},
		{"spec.template", nil, noPod},
		{"status", nil, noOperator},
	}
)

// The kinds, compiled at first use. An error in them is one of the build, as the definitions
// are part of the program; hence the panics.
var (
	guildKind = sync.OnceValue(func() *kind { return mustCompile("guilds", guildRefused) })
	shardKind = sync.OnceValue(func() *kind { return mustCompile("guildshards", shardRefused) })
)

func mustCompile(plural string, refused []refused) *kind {
	k, err := compile("bases/guildhall.dev_"+plural+".yaml", refused)
	if err != nil {
		panic(fmt.Sprintf("manifest: CustomResourceDefinition of %s: %v", plural, err))
	}
	return k
}

// compile makes a kind of the CustomResourceDefinition in the named file.
func compile(file string, refused []refused) (*kind, error) {
	data, err := crd.Bases.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var def apiextensionsv1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(data, &def); err != nil {
		return nil, err
	}
	if len(def.Spec.Versions) != 1 {
		return nil, fmt.Errorf("expected one version, have %d", len(def.Spec.Versions))
	}
	var props apiextensions.JSONSchemaProps
	err = apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(def.Spec.Versions[0].Schema.OpenAPIV3Schema, &props, nil)
	if err != nil {
		return nil, err
	}
	// The status is refused before the schema is asked.
	delete(props.Properties, "status")

	k := &kind{refused: refused}
	if k.structural, err = schema.NewStructural(&props); err != nil {
		return nil, err
	}
	if k.openAPI, _, err = validation.NewSchemaValidator(&props); err != nil {
		return nil, err
	}
	k.rules = cel.NewValidator(k.structural, true, celconfig.PerCallLimit)
	return k, nil
}

// admit says what is wrong with obj. It fills in the defaults and removes what does not belong
// there, in the order of the API server.
func (k *kind) admit(obj map[string]any) []error {
	var errs []error
	for _, r := range k.refused {
		names := strings.Split(r.path, ".")
		if v, _, _ := unstructured.NestedFieldNoCopy(obj, names...); v != nil && v != r.except {
			errs = append(errs, field.Forbidden(field.NewPath(names[0], names[1:]...), r.reason))
		}
	}
	delete(obj, "status")

	unknown := pruning.PruneWithOptions(obj, k.structural, true, schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true})
	for _, path := range unknown {
		errs = append(errs, fmt.Errorf("%s: unknown field", path))
	}
	defaulting.PruneNonNullableNullsWithoutDefaults(obj, k.structural)
	defaulting.Default(obj, k.structural)

	found := validateMetadata(obj)
	found = append(found, validation.ValidateCustomResource(nil, obj, k.openAPI)...)
	found = append(found, listtype.ValidateListSetsAndMaps(nil, k.structural, obj)...)
	if !slices.ContainsFunc(found, blocksRules) {
		broken, _ := k.rules.Validate(context.Background(), nil, k.structural, obj, nil, celconfig.RuntimeCELCostBudget)
		found = append(found, broken...)
	}
	// The rules are asked in random order.
	slices.SortStableFunc(found, func(a, b *field.Error) int {
		return cmp.Or(cmp.Compare(a.Field, b.Field), cmp.Compare(a.Error(), b.Error()))
	})
	for _, err := range found {
		if err.Field == "<nil>" { // the object itself
			errs = append(errs, errors.New(err.ErrorBody()))
			continue
		}
		errs = append(errs, err)
	}
	return errs
}

// blocksRules reports whether the rules cannot be asked about an object with this error: they
// count on types, required fields and limits.
func blocksRules(err *field.Error) bool {
	switch err.Type {
	case field.ErrorTypeNotSupported, field.ErrorTypeRequired, field.ErrorTypeTooLong,
		field.ErrorTypeTooMany, field.ErrorTypeTypeInvalid:
		return true
	}
	return false
}

// validateMetadata says what is wrong with the metadata of obj, and removes from it what only the API
// server writes.
func validateMetadata(obj map[string]any) field.ErrorList {
	var errs field.ErrorList
	path := field.NewPath("metadata")
	entries, _ := obj["metadata"].(map[string]any)
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		switch name {
		case "name", "namespace", "labels", "annotations":
			continue
		}
		if entries[name] != nil {
			errs = append(errs, field.Forbidden(path.Child(name), "a file gives name, namespace, labels and annotations; the API server writes the rest"))
		}
		delete(entries, name)
	}
	meta, _, err := objectmeta.GetObjectMeta(obj, false)
	switch {
	case err != nil:
		return append(errs, field.TypeInvalid(path, "", err.Error()))
	case meta == nil:
		meta = new(metav1.ObjectMeta)
	}
	if meta.Name == "" {
		return append(errs, field.Required(path.Child("name"), ""))
	}
	if meta.Namespace == "" {
		meta.Namespace = metav1.NamespaceDefault
	}
	return append(errs, metavalidation.ValidateObjectMeta(meta, true, metavalidation.NameIsDNSSubdomain, path)...)
}
