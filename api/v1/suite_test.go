package v1_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	guildhallv1 "guildhall.dev/guildhall/api/v1"
)

const namespace = "default"

var crdFolder = filepath.Join("..", "..", "config", "crd", "bases")

// A server is a real API server with the CRDs of this package, shared by all tests.
type server struct {
	env     *envtest.Environment
	config  *rest.Config
	dynamic dynamic.Interface
}

// startServer starts the API server at the first call that needs it.
var startServer = sync.OnceValues(func() (*server, error) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		return nil, errors.New("KUBEBUILDER_ASSETS is not set: these tests need a kube-apiserver and an etcd. " +
			"\"make test-controllers\" builds them and sets it; by hand: " +
			"export KUBEBUILDER_ASSETS=$(go -C hack/cluster run . assets)")
	}
	env := &envtest.Environment{CRDDirectoryPaths: []string{crdFolder}, ErrorIfCRDPathMissing: true}
	config, err := env.Start()
	if err != nil {
		return nil, errors.Join(err, env.Stop())
	}
	config.WarningHandler = rest.NoWarnings{}
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, errors.Join(err, env.Stop())
	}
	running = env
	return &server{env: env, config: config, dynamic: client}, nil
})

// running is what TestMain has to stop; nil when no test needed a server.
var running *envtest.Environment

func TestMain(m *testing.M) {
	code := m.Run()
	if running != nil {
		if err := running.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "stopping the API server:", err)
			code = 1
		}
	}
	os.Exit(code)
}

func apiServer(t *testing.T) *server {
	t.Helper()
	s, err := startServer()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// resource is the client for a kind of this package in the tests' namespace.
func (s *server) resource(kind string) dynamic.ResourceInterface {
	return s.dynamic.Resource(resourceOf(kind)).Namespace(namespace)
}

func resourceOf(kind string) schema.GroupVersionResource {
	return guildhallv1.GroupVersion.WithResource(strings.ToLower(kind) + "s")
}

// object is an object of the kind with the name, and with what the YAML says,
// which may set another name.
func object(t *testing.T, kind, name, text string) *unstructured.Unstructured {
	t.Helper()
	content := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &content); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	u := &unstructured.Unstructured{Object: content}
	u.SetGroupVersionKind(guildhallv1.GroupVersion.WithKind(kind))
	u.SetNamespace(namespace)
	if u.GetName() == "" {
		u.SetName(name)
	}
	return u
}

// create stores an object until the end of the test.
func (s *server) create(t *testing.T, u *unstructured.Unstructured) *unstructured.Unstructured {
	t.Helper()
	client := s.resource(u.GetKind())
	stored, err := client.Create(t.Context(), u, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create %s: %v", u.GetKind(), err)
	}
	t.Cleanup(func() {
		if err := client.Delete(context.Background(), stored.GetName(), metav1.DeleteOptions{}); err != nil {
			t.Errorf("delete %s: %v", stored.GetName(), err)
		}
	})
	return stored
}

// readCRDs reads the generated CRDs, by kind.
func readCRDs(t *testing.T) map[string]*apiextensionsv1.CustomResourceDefinition {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(crdFolder, "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no CRDs in %s: %v", crdFolder, err)
	}
	crds := map[string]*apiextensionsv1.CustomResourceDefinition{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		crd := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(data, crd); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if len(crd.Spec.Versions) != 1 {
			t.Fatalf("%s has %d versions; these tests know one", file, len(crd.Spec.Versions))
		}
		crds[crd.Spec.Names.Kind] = crd
	}
	return crds
}
