package admin

import (
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"guildhall.dev/guildhall/shardserver/report"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestHandler(t *testing.T) {
	var notReady error
	h := NewHandler(Options{
		Ready: func() error { return notReady },
		Report: func(boot string, since int64) report.Report {
			return report.Report{BootID: boot, Revision: since, Guilds: []report.Guild{}}
		},
		Orders: func(o report.Orders) error {
			switch o.Term {
			case 1:
				return fmt.Errorf("%w: term 1", ErrStale)
			case 2:
				return errors.New("relay r has no link")
			}
			return nil
		},
		Metrics: prometheus.NewRegistry(),
	})
	for name, test := range map[string]struct {
		request  string
		notReady error
		status   int
		has      string
	}{
		"health":                      {"GET /healthz", nil, 200, "ok"},
		"health while not ready":      {"GET /healthz", errors.New("stopping"), 200, "ok"},
		"readiness":                   {"GET /readyz", nil, 200, "ok"},
		"readiness while not ready":   {"GET /readyz", errors.New("stopping"), 503, "stopping"},
		"the report":                  {"GET /v1/report", nil, 200, `"guilds":[]`},
		"the report since a number":   {"GET /v1/report?boot=b&since=5", nil, 200, `"bootID":"b"`},
		"the report since a word":     {"GET /v1/report?since=x", nil, 400, "since: expected"},
		"the report by another verb":  {"POST /v1/report", nil, 405, ""},
		"metrics":                     {"GET /metrics", nil, 200, ""},
		"orders":                      {"POST /v1/orders {}", nil, 204, ""},
		"orders of an old term":       {`POST /v1/orders {"term":1}`, nil, 409, "term 1"},
		"orders for who is not there": {`POST /v1/orders {"term":2}`, nil, 503, "no link"},
		"orders that are none":        {"POST /v1/orders x", nil, 400, "expected orders"},
		"anything else":               {"GET /", nil, 404, ""},
	} {
		t.Run(name, func(t *testing.T) {
			notReady = test.notReady
			w := httptest.NewRecorder()
			method, rest, _ := strings.Cut(test.request, " ")
			path, body, _ := strings.Cut(rest, " ")
			h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
			if w.Code != test.status || !strings.Contains(w.Body.String(), test.has) {
				t.Errorf("%d %s", w.Code, w.Body)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var totals Totals
		m := NewLoadMeter(func() Totals { return totals }, func() int { return 7 })
		if l := m.Load(); l.Sessions != 7 || l.EventsPerSecond != 0 || l.MemoryBytes == 0 {
			t.Errorf("%+v", l)
		}
		for range 60 {
			time.Sleep(time.Second)
			totals.Events += 10
			totals.Deliveries += 1000
		}
		for range 30 { // a poll each second; the rate has halved
			time.Sleep(time.Second)
			totals.Events += 5
			m.Load()
		}
		if l := m.Load(); l.EventsPerSecond != 5 || l.DeliveriesPerSecond != 0 {
			t.Errorf("%+v", l)
		}
		if n := len(m.samples); n > 20 {
			t.Errorf("%d samples kept", n)
		}
	})
}
