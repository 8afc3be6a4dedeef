// Package admin serves what operators of a shard server look at: health, metrics and the report
// to the Guildhall operator. It is not for clients.
package admin

import (
	"encoding/json"
	"errors"
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
	// Report makes the report for one who knows revision since of process bootID; nil: there is none.
	Report func(bootID string, since int64) report.Report
	// Orders takes orders of the operator; nil: there is nobody to order about.
	Orders func(report.Orders) error
	// Metrics to be served.
	Metrics prometheus.Gatherer
}

// ErrStale: an order of a leader or of a round that is over.
var ErrStale = errors.New("admin: out of date")

// maxOrders bounds the body of orders, in bytes.
const maxOrders = 1 << 20

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
	if o.Report != nil {
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
	}
	if o.Orders != nil {
		mux.HandleFunc("POST "+report.OrdersPath, func(w http.ResponseWriter, r *http.Request) {
			var orders report.Orders
			if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxOrders)).Decode(&orders); err != nil {
				http.Error(w, "expected orders as JSON: "+err.Error(), http.StatusBadRequest)
				return
			}
			switch err := o.Orders(orders); {
			case errors.Is(err, ErrStale):
				http.Error(w, err.Error(), http.StatusConflict)
			case err != nil:
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
			default:
				w.WriteHeader(http.StatusNoContent)
			}
		})
	}
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Metrics, promhttp.HandlerOpts{}))
	return mux
}
