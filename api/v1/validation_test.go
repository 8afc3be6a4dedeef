package v1_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// A ruleCase shows one rule of a CRD at work: objects that it lets pass, and
// objects that it refuses, on either side of the rule's limit.
type ruleCase struct {
	// rule is the rule's id, see rules.
	rule string
	// stored is the object that is there before, for rules on changes and for rules on status.
	stored string
	// accepted and refused are objects in YAML, without name and kind. With a stored
	// object they are updates of it.
	accepted, refused []string
	// field is the path that the refusal names; when empty, the path in rule with [0] for [].
	field string
	// words are in the refusal; when empty, the message in rule.
	words string
}

func (c ruleCase) kind() string { return strings.Fields(c.rule)[0] }

func (c ruleCase) wantField() string {
	if c.field != "" {
		return c.field
	}
	path := strings.TrimPrefix(strings.Fields(c.rule)[1], ".")
	return strings.ReplaceAll(path, "[]", "[0]")
}

func (c ruleCase) wantWords() string {
	if c.words != "" {
		return c.words
	}
	_, message, _ := strings.Cut(c.rule, " validation: ")
	return message
}

func (c ruleCase) onStatus() bool { return strings.HasPrefix(strings.Fields(c.rule)[1], ".status") }

// try sends the object the way that the rule is about, without storing it.
func (c ruleCase) try(t *testing.T, s *server, stored *unstructured.Unstructured, text string) error {
	t.Helper()
	client := s.resource(c.kind())
	u := object(t, c.kind(), "tried", text)
	if stored == nil {
		_, err := client.Create(t.Context(), u, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	u.SetName(stored.GetName())
	u.SetResourceVersion(stored.GetResourceVersion())
	options := metav1.UpdateOptions{DryRun: []string{metav1.DryRunAll}}
	var err error
	if c.onStatus() {
		_, err = client.UpdateStatus(t.Context(), u, options)
	} else {
		_, err = client.Update(t.Context(), u, options)
	}
	return err
}

func TestRulesAcceptAndRefuse(t *testing.T) {
	s := apiServer(t)
	for i, c := range ruleCases {
		t.Run(c.rule, func(t *testing.T) {
			var stored *unstructured.Unstructured
			if c.stored != "" || c.onStatus() {
				stored = s.create(t, object(t, c.kind(), fmt.Sprintf("case-%d", i), c.stored))
			}
			for _, text := range c.accepted {
				if err := c.try(t, s, stored, text); err != nil {
					t.Errorf("refused, should be accepted: %s\n%v", short(text), err)
				}
			}
			for _, text := range c.refused {
				err := c.try(t, s, stored, text)
				if err == nil {
					t.Errorf("accepted, should be refused: %s", short(text))
				} else if !refusedFor(err, c.wantField(), c.wantWords()) {
					t.Errorf("the refusal should name %q and say %q: %s\n%s", c.wantField(), c.wantWords(), short(text), short(err.Error()))
				}
			}
		})
	}
}

// refusedFor says whether the API server refused an object because of the field,
// with the words, and not because a CEL rule failed to compute.
func refusedFor(err error, field, words string) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) || !apierrors.IsInvalid(err) || words == "" {
		return false
	}
	for _, cause := range status.Status().Details.Causes {
		if cause.Field == field && strings.Contains(cause.Message, words) && !strings.Contains(cause.Message, "evaluating rule") {
			return true
		}
	}
	return false
}

// short keeps generated long strings out of the test's output.
func short(s string) string {
	if len(s) > 600 {
		return s[:600] + "..."
	}
	return s
}
