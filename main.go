// Command manager is the Guildhall operator: it turns GuildShards into shard server pods, places
// Guilds on them and shows how both are.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics/filters"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/controllers"
)

// version is set by the linker: -X main.version=...
var version = "dev"

// leaseName is that of the leader election's lease.
const leaseName = "guildhall.dev"

// settings are the command line's.
type settings struct {
	shardImage     string
	namespace      string
	leaderElect    bool
	metricsAddress string
	metricsSecure  bool
	probeAddress   string
	logLevel       slog.Level
	logFormat      string
}

func main() {
	s, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if err := run(ctrl.SetupSignalHandler(), s); err != nil {
		ctrl.Log.Error(err, "The operator ends")
		os.Exit(1)
	}
}

func parse(args []string) (settings, error) {
	var s settings
	fs := flag.NewFlagSet("manager", flag.ContinueOnError)
	fs.StringVar(&s.shardImage, "shard-image", os.Getenv("SHARD_IMAGE"),
		"Image of shards whose spec.image is absent, taken up at their next roll-out. Default: environment SHARD_IMAGE.")
	fs.StringVar(&s.namespace, "namespace", envOr("POD_NAMESPACE", "guildhall-system"),
		"Namespace that the operator runs in: it has the leader election's lease, and shards let it read their reports. Default: environment POD_NAMESPACE.")
	fs.BoolVar(&s.leaderElect, "leader-elect", true,
		"Work only while holding the lease guildhall.dev, so that of several operators one acts.")
	fs.StringVar(&s.metricsAddress, "metrics-bind-address", ":8443", "Address of /metrics; 0 for none.")
	fs.BoolVar(&s.metricsSecure, "metrics-secure", true,
		"Serve /metrics over HTTPS, to those who may get the non-resource URL /metrics.")
	fs.StringVar(&s.probeAddress, "health-probe-bind-address", ":8081", "Address of /healthz and /readyz; 0 for none.")
	fs.TextVar(&s.logLevel, "log-level", slog.LevelInfo, "Least level that is logged: DEBUG, INFO, WARN or ERROR.")
	fs.StringVar(&s.logFormat, "log-format", "json", "Format of the log: json or text.")
	printVersion := fs.Bool("version", false, "Print the version and end.")
	if err := fs.Parse(args); err != nil {
		return s, err
	}
	switch {
	case *printVersion:
		fmt.Println(version)
		return s, flag.ErrHelp
	case fs.NArg() > 0:
		return s, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case s.shardImage == "":
		return s, errors.New("--shard-image or SHARD_IMAGE must name the image of shards")
	case s.logFormat != "json" && s.logFormat != "text":
		return s, fmt.Errorf("--log-format is %q: must be json or text", s.logFormat)
	}
	return s, nil
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

func setLogger(s settings) {
	o := &slog.HandlerOptions{Level: s.logLevel}
	var h slog.Handler = slog.NewJSONHandler(os.Stderr, o)
	if s.logFormat == "text" {
		h = slog.NewTextHandler(os.Stderr, o)
	}
	log := logr.FromSlogHandler(h)
	ctrl.SetLogger(log)
	klog.SetLogger(log)
}

func run(ctx context.Context, s settings) error {
	setLogger(s)
	ctrl.Log.Info("Starting", "version", version, "shardImage", s.shardImage)

	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1.AddToScheme(scheme)); err != nil {
		return fmt.Errorf("making the scheme: %w", err)
	}
	config, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("finding the API server: %w", err)
	}
	config.UserAgent = "guildhall/" + version
	mgr, err := ctrl.NewManager(config, managerOptions(s, scheme, config))
	if err != nil {
		return fmt.Errorf("making the manager: %w", err)
	}
	if err := controllers.Setup(ctx, mgr, operatorOptions(s)); err != nil {
		return fmt.Errorf("setting up the controllers: %w", err)
	}
	if err := errors.Join(
		mgr.AddHealthzCheck("ping", healthz.Ping),
		mgr.AddReadyzCheck("caches", cachesSynced(mgr)),
	); err != nil {
		return fmt.Errorf("adding probes: %w", err)
	}
	return mgr.Start(ctx)
}

func operatorOptions(s settings) controllers.Options {
	o := controllers.Options{ShardImage: s.shardImage, Namespace: s.namespace}
	if s.leaderElect {
		o.Lease = leaseName
	}
	return o
}

func managerOptions(s settings, scheme *runtime.Scheme, config *rest.Config) ctrl.Options {
	o := ctrl.Options{
		Scheme:                  scheme,
		Cache:                   controllers.CacheOptions(),
		HealthProbeBindAddress:  s.probeAddress,
		LeaderElection:          s.leaderElect,
		LeaderElectionID:        leaseName,
		LeaderElectionNamespace: s.namespace,
		// Its own client: however busy the controllers are, the lease is renewed.
		LeaderElectionConfig: rest.CopyConfig(config),
		// The process ends right after the manager, so the next leader need not wait.
		LeaderElectionReleaseOnCancel: true,
		Metrics: metricsserver.Options{
			BindAddress:   s.metricsAddress,
			SecureServing: s.metricsSecure,
			// HTTP/2 has no use here, and its streams can be abused (CVE-2023-44487).
			TLSOpts: []func(*tls.Config){func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }},
		},
	}
	if s.metricsSecure {
		o.Metrics.FilterProvider = filters.WithAuthenticationAndAuthorization
	}
	return o
}

// cachesSynced makes the operator ready when it knows the cluster, also while it is not the leader.
func cachesSynced(mgr manager.Manager) healthz.Checker {
	return func(req *http.Request) error {
		ctx, cancel := context.WithTimeout(req.Context(), time.Second)
		defer cancel()
		if !mgr.GetCache().WaitForCacheSync(ctx) {
			return errors.New("the caches are not synced")
		}
		return nil
	}
}
