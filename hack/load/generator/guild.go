package generator

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// guild is where a guild answers.
type guild struct {
	id      string
	gateway string // without query
	rest    string // .../api/v10
	http    *http.Client
	tls     *tls.Config
}

var guildPath = regexp.MustCompile(`/g/([0-9]+)(/|$)`)

// newGuild takes the guild's address apart. The id is the path's, unless it is given.
func newGuild(address, id string, insecure bool, connections int) (*guild, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("--url: %w", err)
	}
	if (u.Scheme != "ws" && u.Scheme != "wss") || u.Host == "" {
		return nil, errors.New("--url: expected ws://HOST/g/GUILD/ or wss://HOST/g/GUILD/")
	}
	u.RawQuery, u.Fragment = "", ""
	if !strings.HasSuffix(u.Path, "/") {
		u.Path += "/"
	}
	if id == "" {
		m := guildPath.FindStringSubmatch(u.Path)
		if m == nil {
			return nil, errors.New("--url: expected a path that ends in /g/GUILD/")
		}
		id = m[1]
	}
	g := &guild{id: id, gateway: u.String(), tls: &tls.Config{InsecureSkipVerify: insecure}} //nolint:gosec // on demand
	rest := *u
	rest.Scheme = strings.Replace(u.Scheme, "ws", "http", 1)
	rest.Path += "api/v10"
	g.rest = rest.String()
	g.http = &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			TLSClientConfig:     g.tls.Clone(),
			MaxIdleConns:        connections,
			MaxIdleConnsPerHost: connections,
			IdleConnTimeout:     time.Minute,
		},
	}
	return g, nil
}

func (g *guild) loopback() bool { return loopback(g.gateway) }

func loopback(address string) bool {
	u, err := url.Parse(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(u.Hostname())
	return u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
}

// statusError is an answer that is not 2xx.
type statusError struct {
	status int
	after  time.Duration // of Retry-After
	body   string
}

func (e *statusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s: %s", e.status, http.StatusText(e.status), e.body))
}

// passing says that the same request may succeed later.
func passing(err error) bool {
	var status *statusError
	if !errors.As(err, &status) {
		return true // no answer: the connection broke
	}
	switch status.status {
	case http.StatusRequestTimeout, http.StatusTooManyRequests:
		return true
	}
	return status.status >= 500
}

// refused says that the server answered and has surely done nothing.
func refused(err error) bool {
	var status *statusError
	return errors.As(err, &status) && status.status >= 500
}

// call does a REST call, once. Neither body nor answer need be given.
func (g *guild) call(ctx context.Context, method, path, token, idempotencyKey string, body []byte, answer any) error {
	req, err := http.NewRequestWithContext(ctx, method, g.rest+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bot "+token)
	req.GetBody = nil // the transport is not to send it again by itself: what was answered 5xx might then be in the log
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if idempotencyKey != "" {
		req.Header.Set("Idempotency-Key", idempotencyKey)
	}
	resp, err := g.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if resp.StatusCode/100 != 2 {
		e := &statusError{status: resp.StatusCode, body: string(b[:min(len(b), 300)])}
		if s, err := strconv.ParseFloat(resp.Header.Get("Retry-After"), 64); err == nil && s > 0 {
			e.after = time.Duration(min(s, 60) * float64(time.Second))
		}
		return e
	}
	if err != nil || answer == nil {
		return err
	}
	return json.Unmarshal(b, answer)
}

type channel struct {
	ID   string `json:"id"`
	Type int    `json:"type"`
	Name string `json:"name"`
}

// firstText is the first text channel, "" when there is none.
func firstText(channels []channel) string {
	for _, c := range channels {
		if c.Type == 0 {
			return c.ID
		}
	}
	return ""
}
