package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/admin"
	"guildhall.dev/guildhall/shardserver/directory"
	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/gateway"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/kube"
	"guildhall.dev/guildhall/shardserver/link"
	"guildhall.dev/guildhall/shardserver/linkcert"
	"guildhall.dev/guildhall/shardserver/manifest"
	"guildhall.dev/guildhall/shardserver/poll"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/relay"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/rest"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/store"
	"guildhall.dev/guildhall/shardserver/token"
)

const (
	// keysPeriod is how often the key set is read again.
	keysPeriod = 5 * time.Second
	// shutdownTimeout bounds the orderly end of the process.
	shutdownTimeout = 30 * time.Second
	// reservedFiles are descriptors kept for everything but connections.
	reservedFiles = 1000
)

// config of "shardserver serve".
type config struct {
	file                  string
	namespace             string
	shardName, shardUID   string
	listen, listenTLS     string
	adminListen           string
	keysDir, tlsDir, data string
	linkListen, linkDir   string
	podAddress            string
	relayAddress          string
	resolvePod            func(shard string) string
	resolveRelays         func(id snowflake.ID) string // nil: there are no relays
	logger                *slog.Logger
	holdTime              time.Duration // gateway.HoldTime when 0
	// disk is where data is; the operating system's when nil.
	disk vfs.FS
	// die ends the process at once.
	die func(error)
	// relay: the process is one of a guild's relays.
	relay *relayConfig
}

func serveCommand(ctx context.Context, args []string) error {
	var c config
	fs := flag.NewFlagSet("shardserver serve", flag.ContinueOnError)
	fs.StringVar(&c.file, "file", "", "run alone, with the Guilds and the GuildShard of this YAML file")
	fs.StringVar(&c.namespace, "namespace", "", "namespace of the GuildShard")
	fs.StringVar(&c.shardName, "shard-name", "", "name of the GuildShard that this process serves")
	fs.StringVar(&c.shardUID, "shard-uid", "", "uid of that GuildShard")
	fs.StringVar(&c.listen, "listen", ":8080", "address of the gateway and REST")
	fs.StringVar(&c.listenTLS, "listen-tls", ":8443", "address of the same over TLS, with --tls-dir")
	fs.StringVar(&c.adminListen, "admin-listen", ":9090", "address of health, metrics and report")
	fs.StringVar(&c.keysDir, "keys-dir", defaultKeysDir, "directory of the key set; with --file it is made when missing")
	fs.StringVar(&c.tlsDir, "tls-dir", "", "directory with tls.crt and tls.key, re-read when they change")
	fs.StringVar(&c.data, "data-dir", "", "directory of the guilds' logs; empty: they are in memory and end with the process")
	fs.StringVar(&c.linkListen, "link-listen", "", "address of the links of relays; with --link-dir")
	fs.StringVar(&c.linkDir, "link-dir", "", "directory with tls.crt, tls.key and ca.crt of the links, re-read when they change")
	fs.StringVar(&c.relayAddress, "relay-address", "relay-{guild}.{namespace}.svc:80", "address of the gateway of a guild's relays")
	fs.StringVar(&c.podAddress, "pod-address", "{shard}-0.{shard}-pods.{namespace}.svc:8080",
		"address of the gateway of another GuildShard's pod")
	if err := parse(fs, args); err != nil {
		return err
	}
	c.logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	c.die = func(err error) {
		explain(err)
		os.Exit(1)
	}
	switch {
	case c.file == "" && (c.namespace == "" || c.shardName == "" || c.shardUID == ""):
		return errors.New("serve: expected --file, or --namespace, --shard-name and --shard-uid")
	case (c.linkListen == "") != (c.linkDir == ""):
		return errors.New("serve: --link-listen and --link-dir need each other")
	case c.file != "" && (c.namespace != "" || c.shardName != "" || c.shardUID != ""):
		return errors.New("serve: --file excludes --namespace, --shard-name and --shard-uid")
	}
	c.resolvePod = func(shard string) string {
		return strings.NewReplacer("{shard}", shard, "{namespace}", c.namespace).Replace(c.podAddress)
	}
	if c.linkListen != "" && c.file == "" {
		c.resolveRelays = func(id snowflake.ID) string {
			return strings.NewReplacer("{guild}", id.String(), "{namespace}", c.namespace).Replace(c.relayAddress)
		}
	}
	return serve(ctx, c)
}

// serve runs a shard server until ctx ends, and then lets its sessions go in an orderly way.
func serve(ctx context.Context, c config) error {
	s, err := newServer(ctx, c)
	if err != nil {
		return err
	}
	return s.run(ctx)
}

// server is a shard server.
type server struct {
	config
	alone     *manifest.Manifest // of --file
	api       *restclient.Config // without --file
	keys      atomic.Pointer[token.Keys]
	core      *fanout.Core
	store     *store.Store // nil: logs are in memory
	poller    *poll.Poller // nil where the system has none
	places    places
	directory *directory.Directory // of a shard
	links     *link.Server         // of a shard
	orders    orders
	relay     *relay.Relay // of a relay
	gateway   *gateway.Gateway
	rest      *rest.Handler
	meter     *admin.LoadMeter
	listeners listeners
	draining  atomic.Bool
}

// newServer makes a server that listens. Its clients wait until it runs.
func newServer(ctx context.Context, c config) (_ *server, err error) {
	s := &server{config: c, places: make(places, connectionLimit())}
	switch {
	case c.relay != nil:
	case c.file != "":
		if s.alone, err = manifest.Load(c.file); err != nil {
			return nil, err
		}
		if err := makeKeys(c.keysDir); err != nil {
			return nil, fmt.Errorf("making a key set: %w", err)
		}
		s.shardName, s.shardUID = s.alone.Shard.Name, string(s.alone.Shard.UID)
	default:
		rules := clientcmd.NewDefaultClientConfigLoadingRules()
		if s.api, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig(); err != nil {
			return nil, fmt.Errorf("finding the Kubernetes API: %w", err)
		}
	}
	keys, err := token.LoadKeys(c.keysDir)
	if err != nil {
		return nil, err
	}
	s.keys.Store(keys)
	if c.data != "" {
		if s.store, err = openStore(ctx, c.data, c.disk, c.logger); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, s.store.Close())
			}
		}()
	}
	if s.listeners, err = s.listenAll(); err != nil {
		return nil, err
	}
	if s.poller, err = poll.New(); err != nil && !errors.Is(err, poll.ErrUnsupported) {
		return nil, err
	}
	s.core = fanout.New(fanout.Options{
		Noop:    protocol.Noop,
		Overrun: func() []byte { return protocol.CloseFrame(protocol.CloseUnknownError, "fell too far behind") },
	})
	var guilds gateway.Directory
	var requests rest.Directory
	if c.relay != nil {
		if err := s.makeRelay(); err != nil {
			return nil, err
		}
		guilds, requests = s.relay, s.relay.Requests()
	} else {
		s.makeShard()
		guilds, requests = s.directory, s.directory
	}
	hold := cmp.Or(c.holdTime, gateway.HoldTime)
	s.gateway = gateway.New(gateway.Options{Directory: guilds, Core: s.core, Poller: s.poller, Keys: s.keys.Load, HoldTime: hold, Dial: s.places.dial})
	s.rest = rest.New(rest.Options{Directory: requests, Keys: s.keys.Load, Logger: c.logger, HoldTime: hold})
	s.meter = admin.NewLoadMeter(s.totals, s.gateway.Sessions)
	return s, nil
}

// makeShard makes the server that of a GuildShard.
func (s *server) makeShard() {
	s.directory = directory.New(directory.Options{
		ShardName: s.shardName, ShardUID: s.shardUID, Version: version, Core: s.core,
		PodAddress: s.resolvePod, RelayAddress: s.resolveRelays, Load: s.load, Store: s.store, Logger: s.logger,
	})
	s.links = link.NewServer(link.ServerOptions{
		Guild: func(id snowflake.ID) *guild.Guild {
			place, _ := s.directory.Find(id)
			return place.Guild
		},
		Logger: s.logger,
	})
}

// run serves until ctx ends or a part of the server fails.
func (s *server) run(ctx context.Context) (err error) {
	defer s.core.Stop()
	if s.poller != nil {
		defer s.poller.Close() //nolint:errcheck // it only reads
	}
	background, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	failed := make(chan error, 8)
	start := func(what string, f func() error) {
		group.Go(func() {
			if err := f(); err != nil && !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("%s: %w", what, err)
			}
		})
	}
	// The times are those of REST requests, which are answered within them. A gateway's
	// connection leaves the HTTP server, and its deadlines, with the upgrade.
	clients := &http.Server{
		Handler: s, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: time.Minute,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(s.logger.Handler(), slog.LevelDebug),
	}
	admins := &http.Server{
		Handler:     admin.NewHandler(s.adminOptions()),
		ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(s.logger.Handler(), slog.LevelDebug),
	}
	for range runtime.GOMAXPROCS(0) {
		start("gateway", func() error { return clients.Serve(&front{s.listeners.plain, s}) })
	}
	if s.listeners.tls != nil {
		start("gateway over TLS", func() error { return clients.Serve(s.listeners.tls) })
	}
	start("admin", func() error { return admins.Serve(s.listeners.admin) })
	links := &http.Server{Handler: s.links, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: clients.ErrorLog}
	if s.listeners.links != nil {
		start("links", func() error { return links.Serve(s.listeners.links) })
	}
	group.Go(func() { trimMemory(background) })
	start("keys", func() error { return s.watchKeys(background) })
	switch {
	case s.relay != nil:
		group.Go(func() { s.relay.Run(background) })
	case s.alone != nil:
		s.runAlone()
	default:
		start("kubernetes", func() error { return kube.Feed(background, s.api, s.namespace, s.shardName, s.directory) })
	}
	s.logger.Info("shard server started", "version", version, "shard", s.shardName,
		"gateway", s.listeners.plain.Addr(), "admin", s.listeners.admin.Addr())

	var storeFailed <-chan struct{}
	if s.store != nil {
		storeFailed = s.store.Failed()
	}
	select {
	case <-ctx.Done():
	case err = <-failed:
	case <-storeFailed:
		// What is on disk is not known, so nobody is told anything any more, and nothing is waited for.
		s.die(s.store.Err())
	}
	s.logger.Info("shard server stopping")
	s.draining.Store(true)
	end, stop := context.WithTimeout(context.Background(), shutdownTimeout)
	defer stop()
	if s.relay != nil {
		s.relay.Drain(context.Background(), s.config.relay.drain)
		end, stop = context.WithTimeout(context.Background(), shutdownTimeout)
		defer stop()
	}
	s.gateway.Drain(end)
	if s.directory != nil {
		s.directory.Stop()
		s.links.Close()
		_ = links.Close()
	}
	for _, server := range []*http.Server{clients, admins} {
		if server.Shutdown(end) != nil {
			_ = server.Close()
		}
	}
	s.rest.Close()
	if s.store != nil {
		err = errors.Join(err, s.store.Close())
	}
	return err
}

// lockTime is how long a server waits for another process to let go of its directory: the one before it may still be ending.
const lockTime = time.Minute

// openStore opens the store when no other process has it open any more.
func openStore(ctx context.Context, dir string, disk vfs.FS, logger *slog.Logger) (*store.Store, error) {
	o := store.Options{
		FS: disk, Logger: logger,
		Retention: guildlog.Retention{Bytes: directory.DefaultRetentionBytes, Age: directory.DefaultRetentionAge},
	}
	for deadline := time.Now().Add(lockTime); ; {
		s, err := store.Open(dir, o)
		if !errors.Is(err, store.ErrLocked) || time.Now().After(deadline) {
			if err != nil {
				return nil, fmt.Errorf("--data-dir: %w", err)
			}
			return s, nil
		}
		logger.Warn("waiting for another process to let go of the logs", "dir", dir)
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("--data-dir: %w", err)
		case <-time.After(time.Second):
		}
	}
}

// report is the shard server's account of itself, and of its relays.
func (s *server) report(bootID string, since int64) report.Report {
	r := s.directory.Report(bootID, since)
	r.Relays = s.links.Relays(s.directory.UID)
	return r
}

// load is what the process does.
func (s *server) load() report.Load {
	l := s.meter.Load()
	l.Waiting = int64(s.gateway.Held())
	if s.store != nil {
		if stats, err := s.store.Stats(); err == nil {
			l.DiskUsedBytes = int64(stats.DiskUsed)
		}
	}
	return l
}

type listeners struct {
	plain, tls, admin, links net.Listener
}

func (l *listeners) close() {
	for _, ln := range []net.Listener{l.plain, l.tls, l.admin, l.links} {
		if ln != nil {
			ln.Close()
		}
	}
}

// listen opens all ports, or none.
func (s *server) listenAll() (l listeners, err error) {
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.plain, err = listenClients(s.listen, s.places); err != nil {
		return l, fmt.Errorf("--listen: %w", err)
	}
	if l.admin, err = net.Listen("tcp", s.adminListen); err != nil {
		return l, fmt.Errorf("--admin-listen: %w", err)
	}
	if s.linkListen != "" {
		files, err := linkcert.Load(s.linkDir)
		if err != nil {
			return l, fmt.Errorf("--link-dir: %w", err)
		}
		if l.links, err = net.Listen("tcp", s.linkListen); err != nil {
			return l, fmt.Errorf("--link-listen: %w", err)
		}
		l.links = tls.NewListener(l.links, files.Server())
	}
	if s.tlsDir == "" {
		return l, nil
	}
	certificate := &certificate{dir: s.tlsDir}
	if _, err = certificate.get(nil); err != nil {
		return l, err
	}
	clients, err := listenClients(s.listenTLS, s.places)
	if err != nil {
		return l, fmt.Errorf("--listen-tls: %w", err)
	}
	l.tls = tls.NewListener(clients, &tls.Config{
		GetCertificate: certificate.get, NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS12,
	})
	return l, nil
}

// connectionLimit is how many connections the process may have by its descriptor limit.
func connectionLimit() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil || r.Cur > 1<<20 {
		return 1 << 20
	}
	return max(int(r.Cur)-reservedFiles, 64)
}

// certificate is read again when its file has changed.
type certificate struct {
	dir string

	mu       sync.Mutex
	modified time.Time
	loaded   *tls.Certificate
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	crt, key := filepath.Join(c.dir, "tls.crt"), filepath.Join(c.dir, "tls.key")
	info, err := os.Stat(crt)
	if err != nil {
		return c.loaded, errorUnless(c.loaded != nil, fmt.Errorf("--tls-dir: %w", err))
	}
	if c.loaded != nil && info.ModTime().Equal(c.modified) {
		return c.loaded, nil
	}
	pair, err := tls.LoadX509KeyPair(crt, key)
	if err != nil {
		return c.loaded, errorUnless(c.loaded != nil, fmt.Errorf("--tls-dir: %w", err))
	}
	c.loaded, c.modified = &pair, info.ModTime()
	return c.loaded, nil
}

func errorUnless(ok bool, err error) error {
	if ok {
		return nil
	}
	return err
}

// ServeHTTP serves what clients ask for: /g/<guild id>/ is the guild's gateway, and REST is
// below /g/<guild id>/api/v10/ or v9.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rest, ok := strings.CutPrefix(r.URL.Path, "/g/")
	if !ok {
		http.Error(w, "expected /g/<guild id>/ for the gateway or /g/<guild id>/api/v10/... for REST", http.StatusNotFound)
		return
	}
	guild, rest, _ := strings.Cut(rest, "/")
	id, err := snowflake.Parse(guild)
	if err != nil {
		http.Error(w, "/g/<guild id>/: "+err.Error(), http.StatusNotFound)
		return
	}
	if rest == "" {
		s.gateway.Serve(w, r, id)
		return
	}
	for _, prefix := range []string{"api/v10", "api/v9"} {
		if path, ok := strings.CutPrefix(rest, prefix); ok && strings.HasPrefix(path, "/") {
			s.rest.Serve(w, r, id, path)
			return
		}
	}
	http.Error(w, "expected /g/<guild id>/ for the gateway or /g/<guild id>/api/v10/... for REST", http.StatusNotFound)
}

var (
	errDraining  = errors.New("stopping")
	errNotSynced = errors.New("the namespace's guilds are not known yet")
)

func (s *server) ready() error {
	switch {
	case s.draining.Load():
		return errDraining
	case s.relay != nil:
		return s.relay.Ready()
	case !s.directory.Synced():
		return errNotSynced
	}
	return nil
}

// watchKeys reads the key set again as it changes. While it is unreadable the last one counts.
func (s *server) watchKeys(ctx context.Context) error {
	tick := time.NewTicker(keysPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		keys, err := token.LoadKeys(s.keysDir)
		if err != nil {
			s.logger.Error("key set not read again", "error", err)
			continue
		}
		s.keys.Store(keys)
	}
}

// runAlone applies what the file has. Addresses that it does not give are this process's own.
func (s *server) runAlone() {
	m := s.alone
	if m.Shard.Spec.Gateway == nil {
		m.Shard.Spec.Gateway = &v1.ShardGateway{}
	}
	own := s.listeners.plain.Addr().String()
	if host, port, err := net.SplitHostPort(own); err == nil && net.ParseIP(host).IsUnspecified() {
		own = net.JoinHostPort("127.0.0.1", port)
	}
	if g := m.Shard.Spec.Gateway; g.FrontDoorURL == "" {
		g.FrontDoorURL = g.PublicURL
		if g.FrontDoorURL == "" {
			g.FrontDoorURL = v1.GatewayURL("ws://" + own)
		}
	}
	s.directory.ApplyShard(m.Shard)
	for _, g := range m.Guilds {
		s.directory.Apply(g)
		s.logger.Info("guild serving", "guild", g.Name, "url", s.directory.Addresses(g).Gateway)
	}
	s.directory.SetSynced()
}

func (s *server) totals() admin.Totals {
	return admin.Totals{Events: s.events(), Deliveries: s.core.Stats().Deliveries, Arrivals: s.gateway.Arrivals()}
}

// events is how many events this process has appended to logs.
func (s *server) events() uint64 {
	if s.relay != nil {
		return 0
	}
	return s.directory.Events()
}

// holding is the number of guilds that this process serves.
func (s *server) holding() int {
	if s.relay != nil {
		return s.relay.Holding()
	}
	return s.directory.Holding()
}

// adminOptions are what the admin port shows. A relay reports over its link.
func (s *server) adminOptions() admin.Options {
	o := admin.Options{Ready: s.ready, Metrics: s.metrics()}
	if s.relay == nil {
		o.Report, o.Orders = s.report, s.takeOrders
	}
	return o
}

// metrics are what /metrics shows.
func (s *server) metrics() prometheus.Gatherer {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "guildhall", Name: name, Help: help}, f))
	}
	counter := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "guildhall", Name: name, Help: help}, f))
	}
	gauge("guilds", "Guilds that this process holds.", func() float64 { return float64(s.holding()) })
	gauge("sessions", "Connections that have identified or resumed, or may now.", func() float64 { return float64(s.gateway.Sessions()) })
	gauge("connections", "All client connections.", func() float64 { return float64(s.gateway.Connections()) })
	gauge("connections_held", "Connections that wait until their guild can serve them.", func() float64 { return float64(s.gateway.Held()) })
	gauge("connections_spliced", "Connections forwarded to the pod that holds their guild.", func() float64 { return float64(s.gateway.Spliced()) })
	gauge("sessions_lagging", "Sessions whose socket takes no more at present.", func() float64 { return float64(s.core.Stats().Parked) })
	gauge("sessions_catching_up", "Sessions that are brought up to date from their guild's history.", func() float64 { return float64(s.core.Stats().CatchingUp) })
	gauge("messages_half_sent", "Messages of clients of which the rest is waited for.", func() float64 { return float64(s.gateway.HalfSent()) })
	counter("arrivals_total", "Client connections that have come.", func() float64 { return float64(s.gateway.Arrivals()) })
	counter("events_total", "Events appended to the logs.", func() float64 { return float64(s.events()) })
	counter("deliveries_total", "Events written to sessions.", func() float64 { return float64(s.core.Stats().Deliveries) })
	counter("writes_total", "Write calls on sockets of sessions.", func() float64 { return float64(s.core.Stats().Writes) })
	counter("written_bytes_total", "Bytes written to sockets of sessions.", func() float64 { return float64(s.core.Stats().Bytes) })
	counter("overruns_total", "Sessions closed since they fell behind what their guild keeps.", func() float64 { return float64(s.core.Stats().Overruns) })
	if s.store != nil {
		r.MustRegister(storeCollector{s.store})
	}
	return r
}
