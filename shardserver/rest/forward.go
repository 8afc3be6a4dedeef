package rest

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"time"

	"guildhall.dev/guildhall/shardserver/directory"
)

// forwarder passes requests on to the pod that holds their guild.
type forwarder struct {
	transport *http.Transport
	logger    *slog.Logger
}

// errNotSent: the request did not reach the other pod.
var errNotSent = errors.New("rest: the other pod cannot be reached")

func newForwarder(holdTime time.Duration, logger *slog.Logger) forwarder {
	dialer := &net.Dialer{Timeout: 2 * time.Second}
	return forwarder{logger: logger, transport: &http.Transport{
		// A pod that restarts is dialled again until a client would give up waiting.
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, holdTime)
			defer cancel()
			for {
				conn, err := dialer.DialContext(ctx, network, address)
				if err == nil {
					return conn, nil
				}
				select {
				case <-time.After(200 * time.Millisecond):
				case <-ctx.Done():
					return nil, errors.Join(errNotSent, err)
				}
			}
		},
		MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second, DisableCompression: true,
	}}
}

func (f forwarder) serve(w http.ResponseWriter, r *http.Request, address string) {
	proxy := httputil.ReverseProxy{
		Transport: f.transport,
		ErrorLog:  slog.NewLogLogger(f.logger.Handler(), slog.LevelDebug),
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(&url.URL{Scheme: "http", Host: address})
			p.Out.Host = p.In.Host
			p.Out.Header.Set(directory.ForwardedHeader, "1")
			p.SetXForwarded()
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if errors.Is(err, errNotSent) {
				writeError(w, errUnavailable)
				return
			}
			// The other pod may have carried the request out, so no answer is the honest one.
			panic(http.ErrAbortHandler)
		},
	}
	proxy.ServeHTTP(w, r)
}
