package controllers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

const (
	pollInterval = 2 * time.Second
	// hurryInterval is for a shard that has something to open or to end, for hurryFor.
	hurryInterval = 100 * time.Millisecond
	hurryFor      = 5 * time.Second
	// retryInterval is for a shard that has not answered this process yet.
	retryInterval = 500 * time.Millisecond
	pollTimeout   = 1500 * time.Millisecond
	// pollTick is how often the poller looks for what is due.
	pollTick = 50 * time.Millisecond
	// pollConcurrency bounds the requests under way: with every tenth of 1,000 shards hanging,
	// the others are still polled in time.
	pollConcurrency = 128
	// maxReport bounds a report's size: 10,000 guilds take about 4 MiB.
	maxReport = 16 << 20
	maxGuilds = 20000
	maxRelays = 10000
)

// poller asks every shard of every namespace for its report, on the leader only.
type poller struct {
	reader    client.Reader
	inventory *inventory
	clock     clock.WithTicker
	http      *http.Client
	// told is called with what a poll has brought.
	told func(shard types.NamespacedName, n news)

	slots chan struct{}

	mu      sync.Mutex
	targets map[types.NamespacedName]*target
}

// target is a shard that is polled.
type target struct {
	shard shardRef
	podIP string
	next  time.Time
	hurry time.Time
	busy  bool
}

var (
	_ manager.Runnable               = (*poller)(nil)
	_ manager.LeaderElectionRunnable = (*poller)(nil)
)

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

func newPoller(reader client.Reader, inv *inventory, c clock.WithTicker, dial dialFunc) *poller {
	return &poller{
		reader:    reader,
		inventory: inv,
		clock:     c,
		http: &http.Client{
			Transport: &http.Transport{
				DialContext:         dial,
				MaxIdleConns:        2000,
				MaxIdleConnsPerHost: 1,
				IdleConnTimeout:     30 * time.Second,
				DisableCompression:  true, // what is bounded is what is read
			},
			// A shard has no business sending the operator elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		told:    func(types.NamespacedName, news) {},
		slots:   make(chan struct{}, pollConcurrency),
		targets: map[types.NamespacedName]*target{},
	}
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (p *poller) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable.
func (p *poller) Start(ctx context.Context) error {
	ticker := p.clock.NewTicker(pollTick)
	defer ticker.Stop()
	defer p.http.CloseIdleConnections()
	var polls sync.WaitGroup
	defer polls.Wait()

	var refreshed time.Time
	for {
		now := p.clock.Now()
		if now.Sub(refreshed) >= retryInterval {
			if err := p.refresh(ctx, now); err != nil {
				log.FromContext(ctx).Error(err, "Listing the shards to poll")
			} else {
				refreshed = now
			}
		}
		for key, t := range p.due(now) {
			select {
			case p.slots <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
			polls.Go(func() {
				p.poll(ctx, key, t)
				<-p.slots
			})
		}
		for _, key := range p.inventory.aged(now) {
			p.told(key, news{shard: true, process: true})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

// hurry polls a shard at short intervals for a while: something there is about to happen.
func (p *poller) hurry(key types.NamespacedName) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.targets[key]; t != nil {
		now := p.clock.Now()
		t.hurry = now.Add(hurryFor)
		if soon := now.Add(hurryInterval); t.next.After(soon) {
			t.next = soon
		}
	}
}

// refresh brings the targets in line with the GuildShards and their pods.
func (p *poller) refresh(ctx context.Context, now time.Time) error {
	var shards v1.GuildShardList
	if err := p.reader.List(ctx, &shards, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("listing GuildShards: %w", err)
	}
	var pods corev1.PodList
	if err := p.reader.List(ctx, &pods, client.UnsafeDisableDeepCopy, client.HasLabels{labelShard}); err != nil {
		return fmt.Errorf("listing pods: %w", err)
	}
	ips := make(map[types.NamespacedName]string, len(pods.Items))
	for i := range pods.Items {
		pod := &pods.Items[i]
		shard := pod.Labels[labelShard]
		if pod.Name == podName(shard) && pod.Status.Phase != corev1.PodFailed && pod.Status.Phase != corev1.PodSucceeded {
			ips[types.NamespacedName{Namespace: pod.Namespace, Name: shard}] = pod.Status.PodIP
		}
	}
	exist := make(map[types.NamespacedName]bool, len(shards.Items))

	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range shards.Items {
		shard := &shards.Items[i]
		key := client.ObjectKeyFromObject(shard)
		exist[key] = true
		p.inventory.listen(key, shard.UID, now)
		ref := refOf(shard)
		if t := p.targets[key]; t == nil || t.shard != ref || t.podIP != ips[key] {
			// Not all at once; but a shard that has just come is wanted soon.
			spread := time.Duration(len(p.targets)%50) * (pollTick / 5)
			p.targets[key] = &target{shard: ref, podIP: ips[key], next: now.Add(spread)}
		}
	}
	for key := range p.targets {
		if !exist[key] {
			delete(p.targets, key)
		}
	}
	p.inventory.forget(func(key types.NamespacedName) bool { return exist[key] })
	return nil
}

// due takes the targets whose time has come.
func (p *poller) due(now time.Time) map[types.NamespacedName]*target {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[types.NamespacedName]*target{}
	for key, t := range p.targets {
		if t.busy || t.podIP == "" || t.next.After(now) {
			continue
		}
		t.busy = true
		out[key] = t
	}
	return out
}

func (p *poller) poll(ctx context.Context, key types.NamespacedName, t *target) {
	asked := p.clock.Now()
	rep, err := p.fetch(ctx, key, t)
	now := p.clock.Now()
	interval := pollInterval
	if err == nil {
		n := p.inventory.take(key, t.shard.uid, rep, asked, now)
		p.told(key, n)
	} else if ctx.Err() == nil {
		log.FromContext(ctx).V(1).Info("A shard does not report", "shard", key.String(), "error", err.Error())
		if p.inventory.shard(key, t.shard.uid, now).freshness == awaited {
			interval = retryInterval
		}
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	t.busy = false
	if now.Before(t.hurry) {
		interval = hurryInterval
	}
	t.next = asked.Add(interval)
}

func (p *poller) fetch(ctx context.Context, key types.NamespacedName, t *target) (*report.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	u := url.URL{Scheme: "http", Host: net.JoinHostPort(t.podIP, strconv.Itoa(adminPort)), Path: report.Path}
	if boot, revision := p.inventory.cursor(key); boot != "" {
		u.RawQuery = url.Values{"boot": {boot}, "since": {strconv.FormatInt(revision, 10)}}.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := p.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", report.Path, resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReport+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxReport {
		return nil, fmt.Errorf("the report has more than %d bytes", maxReport)
	}
	rep := new(report.Report)
	if err := json.Unmarshal(body, rep); err != nil {
		return nil, fmt.Errorf("the report is not what it should be: %w", err)
	}
	return rep, validateReport(rep, key.Namespace, t.shard)
}

// validateReport makes sure that a report comes from the shard that was asked, speaks of its own
// namespace only, and holds nothing that a status could not.
func validateReport(rep *report.Report, namespace string, shard shardRef) error {
	switch {
	case rep.ShardUID != string(shard.uid) || rep.ShardName != shard.name:
		return fmt.Errorf("the report is of shard %q (uid %q), not of %q (uid %q)", rep.ShardName, rep.ShardUID, shard.name, shard.uid)
	case rep.BootID == "" || len(rep.BootID) > 64:
		return errors.New("the report's bootID must have 1 to 64 characters")
	case len(rep.Guilds) > maxGuilds || len(rep.Gone) > maxGuilds:
		return fmt.Errorf("the report has more than %d guilds", maxGuilds)
	case len(rep.Relays) > maxRelays:
		return fmt.Errorf("the report has more than %d relays", maxRelays)
	}
	rep.Version = truncate(rep.Version, 128)
	for i := range rep.Guilds {
		g := &rep.Guilds[i]
		switch {
		case g.UID == "" || g.Namespace != namespace || g.Name == "":
			return fmt.Errorf("the report has a guild %q with uid %q of namespace %q", g.Name, g.UID, g.Namespace)
		case len(g.LogID) > 64 || g.Epoch < 0:
			return fmt.Errorf("the report has an impossible log for guild %q", g.Name)
		}
		if _, err := snowflake.Parse(g.ID); err != nil {
			return fmt.Errorf("the report has guild %q: %w", g.Name, err)
		}
		g.Message = truncate(g.Message, maxMessage)
		g.Members, g.Online, g.Sessions = max(g.Members, 0), max(g.Online, 0), max(g.Sessions, 0)
		g.Direct, g.Round, g.Asked = max(g.Direct, 0), max(g.Round, 0), max(g.Asked, 0)
	}
	for i := range rep.Relays {
		r := &rep.Relays[i]
		r.AgeMillis, r.Sessions, r.DeliveriesPerSecond = max(r.AgeMillis, 0), max(r.Sessions, 0), max(r.DeliveriesPerSecond, 0)
		r.Round, r.Asked = max(r.Round, 0), max(r.Asked, 0)
		r.ArrivalsPerSecond, r.Waiting = max(r.ArrivalsPerSecond, 0), max(r.Waiting, 0)
	}
	return nil
}
