package v1_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
)

// embedded lists the fields whose types come from Kubernetes, with those types.
// Rules on the field itself are ours and need a case; what is inside follows
// Kubernetes' own types and is not repeated here.
var embedded = map[string]string{
	"Guild .spec.placement.shardSelector":                   "metav1.LabelSelector",
	"Guild .status.conditions[]":                            "metav1.Condition",
	"GuildShard .spec.template.resources":                   "corev1.ResourceRequirements",
	"GuildShard .spec.template.tolerations[]":               "corev1.Toleration",
	"GuildShard .spec.template.affinity":                    "corev1.Affinity",
	"GuildShard .spec.template.topologySpreadConstraints[]": "corev1.TopologySpreadConstraint",
	"GuildShard .spec.template.imagePullSecrets[]":          "corev1.LocalObjectReference",
	"GuildShard .spec.template.securityContext":             "corev1.PodSecurityContext",
	"GuildShard .spec.template.env[]":                       "corev1.EnvVar",
	"GuildShard .status.conditions[]":                       "metav1.Condition",
}

// rules walks a schema and returns the id of each rule in it, with the number of
// values that an enum has. The id is the path and the kind of the rule, or for a
// CEL rule its message: "Guild .spec.relays.replicas maximum". seen collects the
// embedded types that were met.
func rules(path string, s *apiextensionsv1.JSONSchemaProps, seen map[string]bool) map[string]int {
	found := map[string]int{}
	add := func(path, kind string) { found[path+" "+kind] = 0 }
	for kind, set := range map[string]bool{
		"minimum":       s.Minimum != nil,
		"maximum":       s.Maximum != nil,
		"multipleOf":    s.MultipleOf != nil,
		"minLength":     s.MinLength != nil,
		"maxLength":     s.MaxLength != nil,
		"minItems":      s.MinItems != nil,
		"maxItems":      s.MaxItems != nil,
		"minProperties": s.MinProperties != nil,
		"maxProperties": s.MaxProperties != nil,
		"pattern":       s.Pattern != "",
		"not":           s.Not != nil,
		"allOf":         len(s.AllOf) > 0,
		"oneOf":         len(s.OneOf) > 0,
		// A quantity is "integer or string", which is a type and no rule.
		"anyOf": len(s.AnyOf) > 0 && !s.XIntOrString,
	} {
		if set {
			add(path, kind)
		}
	}
	if len(s.Enum) > 0 {
		found[path+" enum"] = len(s.Enum)
	}
	for _, rule := range s.XValidations {
		add(path, "validation: "+rule.Message)
	}
	if embedded[strings.Replace(path, ".spec.relayTemplate", ".spec.template", 1)] != "" {
		seen[path] = true
		return found
	}
	for _, name := range s.Required {
		add(path+"."+name, "required")
	}
	descend := func(path string, s *apiextensionsv1.JSONSchemaProps) {
		maps.Copy(found, rules(path, s, seen))
	}
	for name, property := range s.Properties {
		descend(path+"."+name, &property)
	}
	if s.Items != nil && s.Items.Schema != nil {
		descend(path+"[]", s.Items.Schema)
	}
	if s.AdditionalProperties != nil && s.AdditionalProperties.Schema != nil {
		descend(path+"{}", s.AdditionalProperties.Schema)
	}
	return found
}

func TestEveryRuleOfTheCRDsHasACase(t *testing.T) {
	seen := map[string]bool{}
	want := map[string]int{}
	for kind, crd := range readCRDs(t) {
		for id, n := range rules(kind+" ", crd.Spec.Versions[0].Schema.OpenAPIV3Schema, seen) {
			// The root's own path is empty: "GuildShard  validation" reads better with one space.
			id = strings.Replace(id, "  ", " ", 1)
			// Relays' pods are shaped by the same type as shards'.
			want[strings.Replace(id, ".spec.relayTemplate", ".spec.template", 1)] = n
		}
	}
	if len(want) == 0 {
		t.Fatal("no rule found: the walk over the schemas is broken")
	}

	have := map[string]ruleCase{}
	for _, c := range ruleCases {
		if _, twice := have[c.rule]; twice {
			t.Errorf("two cases for %s", c.rule)
		}
		have[c.rule] = c
		if _, exists := want[c.rule]; !exists {
			t.Errorf("a case for a rule that no CRD has: %s", c.rule)
		}
	}
	var missing []string
	for id, values := range want {
		c, covered := have[id]
		switch {
		case !covered:
			missing = append(missing, id+": no case")
		case len(c.accepted) == 0 || len(c.refused) == 0:
			missing = append(missing, id+": needs an accepted and a refused object")
		case len(c.accepted) < values:
			missing = append(missing, fmt.Sprintf("%s: %d values, but %d accepted objects", id, values, len(c.accepted)))
		}
	}
	slices.Sort(missing)
	for _, m := range missing {
		t.Error(m)
	}
	for path := range embedded {
		if !seen[path] {
			t.Errorf("listed as embedded, but no CRD has it: %s", path)
		}
	}
	t.Logf("%d rules in the CRDs", len(want))
}
