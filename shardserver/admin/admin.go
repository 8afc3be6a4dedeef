// Package admin serves what operators of a shard server look at: health, metrics and the report
// to the Guildhall operator. It is not for clients.
package admin

import (
	"encoding/json"
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"guildhall.dev/guildhall/shardserver/report"
)

// Options of a Handler.
type Options struct {
	// Ready says why clients should not come, nil when they may.
	Ready func() error
	// Report makes the report for one who knows revision since of process bootID.
	Report func(bootID string, since int64) report.Report
	// Metrics to be served.
	Metrics prometheus.Gatherer
}

// NewHandler makes the handler of the admin port.
func NewHandler(o Options) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := o.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET "+report.Path, func(w http.ResponseWriter, r *http.Request) {
		var since int64
		if s := r.URL.Query().Get("since"); s != "" {
			var err error
			if since, err = strconv.ParseInt(s, 10, 64); err != nil {
				http.Error(w, "since: expected a revision, a number", http.StatusBadRequest)
				return
			}
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(o.Report(r.URL.Query().Get("boot"), since))
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Metrics, promhttp.HandlerOpts{}))
	return mux
}
