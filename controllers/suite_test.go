package controllers

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	v1 "guildhall.dev/guildhall/api/v1"
)

// operatorAgent and the other agents tell in the audit log who wrote.
const (
	operatorAgent = "guildhall-operator"
	gitopsAgent   = "gitops"
	testAgent     = "test"
	nodeAgent     = "node"
)

const testImage = "registry.example/guildhall:1"

// apiServer is a real API server and etcd, shared by the tests of this package.
type apiServer struct {
	env    *envtest.Environment
	config *rest.Config
	scheme *runtime.Scheme
	audit  string
}

var sharedServer = sync.OnceValues(startAPIServer)

// started is set when a test has asked for the API server.
var started *apiServer

func TestMain(m *testing.M) {
	level := slog.LevelWarn
	if os.Getenv("GUILDHALL_TEST_LOG") != "" {
		level = slog.LevelDebug
	}
	log := logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	ctrl.SetLogger(log)
	klog.SetLogger(log)
	code := m.Run()
	if started != nil {
		_ = started.env.Stop()
		_ = os.RemoveAll(filepath.Dir(started.audit))
	}
	os.Exit(code)
}

const auditPolicy = `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  verbs: [get, list, watch]
- level: Metadata
`

func startAPIServer() (*apiServer, error) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		return nil, errors.New("KUBEBUILDER_ASSETS is not set: these tests need kube-apiserver and etcd; `make test` builds them and sets it")
	}
	dir, err := os.MkdirTemp("", "guildhall-envtest-")
	if err != nil {
		return nil, err
	}
	policy := filepath.Join(dir, "policy.yaml")
	if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
		return nil, err
	}
	s := &apiServer{scheme: runtime.NewScheme(), audit: filepath.Join(dir, "audit.log")}
	if err := errors.Join(clientgoscheme.AddToScheme(s.scheme), v1.AddToScheme(s.scheme)); err != nil {
		return nil, err
	}
	s.env = &envtest.Environment{
		Scheme:                s.scheme,
		CRDDirectoryPaths:     []string{filepath.Join("..", "config", "crd", "bases")},
		ErrorIfCRDPathMissing: true,
		// The machine may be busy with other builds.
		ControlPlaneStartTimeout: 2 * time.Minute,
		ControlPlaneStopTimeout:  time.Minute,
	}
	s.env.ControlPlane.GetAPIServer().Configure().
		Set("audit-log-path", s.audit).
		Set("audit-policy-file", policy).
		Set("service-cluster-ip-range", "10.96.0.0/16")
	s.config, err = s.env.Start()
	if err != nil {
		return nil, fmt.Errorf("starting the API server: %w", err)
	}
	s.config.QPS = -1 // as in the operator: fairness is the server's affair
	started = s
	return s, nil
}

// server returns the API server, or fails the test.
func server(t *testing.T) *apiServer {
	t.Helper()
	s, err := sharedServer()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *apiServer) configAs(agent string) *rest.Config {
	c := rest.CopyConfig(s.config)
	c.UserAgent = agent
	return c
}

// client reads and writes without a cache, under the name of an agent.
func (s *apiServer) client(t *testing.T, agent string) client.Client {
	t.Helper()
	c, err := client.New(s.configAs(agent), client.Options{Scheme: s.scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// namespace makes a namespace for one test.
func (s *apiServer) namespace(t *testing.T, labels ...string) string {
	t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-", Labels: map[string]string{}}}
	for i := 0; i+1 < len(labels); i += 2 {
		ns.Labels[labels[i]] = labels[i+1]
	}
	if err := s.client(t, testAgent).Create(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	return ns.Name
}

// manager that works on one namespace as the operator's does on all.
func (s *apiServer) manager(t *testing.T, namespace string) ctrl.Manager {
	t.Helper()
	options := CacheOptions()
	options.DefaultNamespaces = map[string]cache.Config{namespace: {}}
	mgr, err := ctrl.NewManager(s.configAs(operatorAgent), ctrl.Options{
		Scheme:                 s.scheme,
		Cache:                  options,
		Metrics:                metricsserver.Options{BindAddress: "0"},
		HealthProbeBindAddress: "0",
		// Several operators live in one test process.
		Controller: config.Controller{SkipNameValidation: new(true)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return mgr
}

// operate runs an operator until the test ends or stop is called.
func (s *apiServer) operate(t *testing.T, namespace string, o Options) (stop func()) {
	t.Helper()
	o.ShardImage = firstOf(o.ShardImage, testImage)
	o.Namespace = firstOf(o.Namespace, "guildhall-system")
	ctx, cancel := context.WithCancel(context.Background())
	mgr := s.manager(t, namespace)
	if err := Setup(ctx, mgr, o); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- mgr.Start(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the operator ended: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// auditEvent is a line of the API server's audit log.
type auditEvent struct {
	Verb      string `json:"verb"`
	UserAgent string `json:"userAgent"`
	ObjectRef struct {
		Resource    string `json:"resource"`
		Namespace   string `json:"namespace"`
		Name        string `json:"name"`
		Subresource string `json:"subresource"`
	} `json:"objectRef"`
	ResponseStatus struct {
		Code int `json:"code"`
	} `json:"responseStatus"`
	StageTimestamp metav1.MicroTime `json:"stageTimestamp"`
}

func (e auditEvent) String() string {
	return fmt.Sprintf("%s %s %s/%s %s", e.UserAgent, e.Verb, e.ObjectRef.Resource, e.ObjectRef.Name, e.ObjectRef.Subresource)
}

// writes returns the writes to a namespace since a time that no excused agent made, without leases.
func (s *apiServer) writes(t *testing.T, namespace string, since time.Time, excused ...string) []string {
	t.Helper()
	return s.audited(t, func(e auditEvent) bool {
		for _, agent := range excused {
			if strings.HasPrefix(e.UserAgent, agent) {
				return false
			}
		}
		return e.ObjectRef.Namespace == namespace && e.ObjectRef.Resource != "leases" && !e.StageTimestamp.Time.Before(since)
	})
}

// refused returns the writes to a namespace since a time that the writer had no right to.
func (s *apiServer) refused(t *testing.T, namespace string, since time.Time) []string {
	t.Helper()
	return s.audited(t, func(e auditEvent) bool {
		return e.ObjectRef.Namespace == namespace && e.ResponseStatus.Code == http.StatusForbidden && !e.StageTimestamp.Time.Before(since)
	})
}

func (s *apiServer) audited(t *testing.T, wanted func(auditEvent) bool) []string {
	t.Helper()
	f, err := os.Open(s.audit)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var out []string
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e auditEvent
		// The last line may be half written.
		if err := json.Unmarshal(lines.Bytes(), &e); err == nil && wanted(e) {
			out = append(out, e.String())
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

// eventually waits until check has nothing left to wait for.
func eventually(t *testing.T, limit time.Duration, check func() (waitingFor string)) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		waiting := check()
		if waiting == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s still waiting for %s", limit, waiting)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
