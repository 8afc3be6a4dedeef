package e2e

import (
	"context"
	"encoding/json"
	"math"
	"testing"
	"time"

	"guildhall.dev/guildhall/hack/load/generator"
)

// load is a guild in use: sessions, and events that are published, all of which is audited.
type load struct {
	*generator.Run
	t         *testing.T
	endless   bool
	published chan error
}

// startLoad connects sessions and publishes events until end, or as many as change says.
func startLoad(t *testing.T, namespace, url string, change func(*generator.Options)) *load {
	t.Helper()
	o := generator.Defaults()
	o.URL, o.Events = url, math.MaxInt32
	o.Tokens = generator.Tokens{KeysSecret: namespace + "/guildhall-keys", Kubeconfig: cluster.Kubeconfig}
	change(&o)
	ctx, fail := context.WithCancelCause(context.Background())
	run, err := generator.New(ctx, o)
	l := &load{Run: run, t: t, endless: o.Events == math.MaxInt32, published: make(chan error, 1)}
	t.Cleanup(func() {
		fail(nil)
		l.Close()
	})
	if err == nil {
		err = run.Connect(ctx, fail)
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() { l.published <- run.Publish(ctx) }()
	return l
}

// end ends publishing and fails the test unless every session has received everything once and in order.
func (l *load) end() generator.Report {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), *patience)
	defer cancel()
	if l.endless {
		l.Finish()
	}
	var err error
	select {
	case err = <-l.published:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil {
		err = l.Settle(ctx)
	}
	r := l.Report(ctx, err)
	line, _ := json.Marshal(r)
	if r.Audit != generator.AuditClean {
		l.t.Fatalf("audit: %s", line)
	}
	l.t.Logf("audit: %s", line)
	return r
}

// during has the load go on for a while.
func (l *load) during(d time.Duration) {
	l.t.Helper()
	select {
	case err := <-l.published:
		l.t.Fatalf("publishing has ended: %v", err)
	case <-time.After(d):
	}
}
