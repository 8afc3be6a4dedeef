package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// An apiClient speaks the few requests that the daemon needs. A client library
// would be most of what "go run" has to compile.
type apiClient struct {
	base string
	http *http.Client
}

const (
	requestTimeout = 10 * time.Second
	// watchTimeout is how long one watch lasts; the API server ends it.
	watchTimeout = 5 * time.Minute

	applyPatch = "application/apply-patch+yaml"
	mergePatch = "application/merge-patch+json"
)

func newAPIClient(l layout) (*apiClient, error) {
	config, err := supervisorTLS(l)
	if err != nil {
		return nil, err
	}
	return &apiClient{
		base: l.apiServerURL(),
		http: &http.Client{Transport: &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}},
	}, nil
}

// An apiError is a refusal by the API server.
type apiError struct {
	code    int
	message string
}

func (e *apiError) Error() string { return e.message }

// do sends a request and decodes the answer into out, if there is one.
func (c *apiClient) do(ctx context.Context, method, path, contentType string, body []byte, out any) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	response, err := c.send(ctx, method, path, contentType, body)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if out == nil {
		out = new(json.RawMessage)
	}
	if err := json.NewDecoder(response.Body).Decode(out); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

func (c *apiClient) send(ctx context.Context, method, path, contentType string, body []byte) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode >= 300 {
		defer response.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(response.Body, 4<<10))
		var status struct{ Message string }
		if json.Unmarshal(text, &status) != nil || status.Message == "" {
			status.Message = strings.TrimSpace(string(text))
		}
		return nil, &apiError{response.StatusCode, fmt.Sprintf("%s %s: %s: %s", method, path, response.Status, status.Message)}
	}
	return response, nil
}

func (c *apiClient) get(ctx context.Context, path string, out any) error {
	return c.do(ctx, http.MethodGet, path, "", nil, out)
}

// apply is a server-side apply of a YAML manifest.
func (c *apiClient) apply(ctx context.Context, path, manifest string) error {
	return c.do(ctx, http.MethodPatch, path+"?fieldManager=guildhall-cluster&force=true", applyPatch, []byte(manifest), nil)
}

func (c *apiClient) patch(ctx context.Context, path string, change any) error {
	body, err := json.Marshal(change)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodPatch, path, mergePatch, body, nil)
}

func (c *apiClient) create(ctx context.Context, path string, object any) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodPost, path, "application/json", body, nil)
}

func (c *apiClient) delete(ctx context.Context, path string) error {
	return c.do(ctx, http.MethodDelete, path, "", nil, nil)
}

// watch calls changed at every change of a collection, until the watch ends.
// What changed is left to the caller's next list.
func (c *apiClient) watch(ctx context.Context, path string, changed func()) error {
	query := url.Values{"watch": {"1"}, "timeoutSeconds": {fmt.Sprint(int(watchTimeout.Seconds()))}}
	ctx, cancel := context.WithTimeout(ctx, watchTimeout+requestTimeout)
	defer cancel()
	response, err := c.send(ctx, http.MethodGet, path+"?"+query.Encode(), "", nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	lines := bufio.NewReader(response.Body)
	for {
		if _, err := lines.ReadSlice('\n'); err == nil {
			changed()
		} else if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}
