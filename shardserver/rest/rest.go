// Package rest is the HTTP side of a shard server: the part of Discord's REST API that client
// libraries need to connect and to talk, and Guildhall's own call to publish events.
//
// Answers have the Content-Type application/json without parameters: some libraries do not
// parse the body otherwise. Errors have Discord's form {"code", "message"}
// (https://docs.discord.com/developers/topics/opcodes-and-status-codes#json). A status of
// 500 and above means that surely nothing was appended.
package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/directory"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

const (
	// maxBody bounds a request's body, in bytes.
	maxBody = 4 << 20
	// requestTimeout bounds the wait for the guild and its log.
	requestTimeout = 30 * time.Second
	// maxWaiting bounds the requests that are held while their guild is not available.
	maxWaiting = 1024
)

// Directory knows where guilds are.
type Directory interface {
	Find(id snowflake.ID) (place directory.Place, changed <-chan struct{})
	Addresses(object *v1.Guild) v1.Addresses
	// Synced says that a guild that is not known does not exist, Stopped that none will be available again.
	Synced() bool
	Stopped() bool
}

// Options of a Handler.
type Options struct {
	Directory Directory
	// Keys returns the present key set.
	Keys   func() *token.Keys
	Logger *slog.Logger
	// HoldTime is how long a request waits for a guild that is not available.
	HoldTime time.Duration
}

// Handler serves REST requests. Make one with New.
type Handler struct {
	o       Options
	mux     *http.ServeMux
	waiting chan struct{}
	forward forwarder
}

// request is a request to a guild that this process holds.
type request struct {
	*http.Request
	guild  *guild.Guild
	object *v1.Guild
	bearer *token.Claims // nil: none was asked for
}

// answer is what a call returns: status and body, or an error.
type call func(*request) (status int, body any, err error)

// New makes a Handler.
func New(o Options) *Handler {
	h := &Handler{o: o, mux: http.NewServeMux(), waiting: make(chan struct{}, maxWaiting)}
	h.forward = newForwarder(o.HoldTime, o.Logger)
	open := func(pattern string, c call) { h.mux.Handle(pattern, h.endpoint(c, false)) }
	authed := func(pattern string, c call) { h.mux.Handle(pattern, h.endpoint(c, true)) }

	open("GET /gateway", h.gateway)
	authed("GET /gateway/bot", h.gatewayBot)
	authed("GET /users/@me", h.ownUser)
	authed("GET /users/@me/guilds", h.ownGuilds)
	authed("DELETE /users/@me/guilds/{guild}", h.leave)
	authed("GET /applications/@me", h.ownApplication)
	authed("GET /oauth2/applications/@me", h.ownApplication)
	authed("GET /guilds/{guild}", h.getGuild)
	authed("GET /guilds/{guild}/channels", h.getChannels)
	authed("POST /guilds/{guild}/channels", h.createChannel)
	authed("GET /guilds/{guild}/members/{user}", h.getMember)
	authed("PUT /guilds/{guild}/members/{user}", h.addMember)
	authed("DELETE /guilds/{guild}/members/{user}", h.removeMember)
	authed("POST /guilds/{guild}/events", h.publish)
	authed("GET /channels/{channel}", h.getChannel)
	authed("DELETE /channels/{channel}", h.deleteChannel)
	authed("POST /channels/{channel}/messages", h.sendMessage)
	h.mux.HandleFunc("/", noRoute)
	return h
}

// Close lets go of the connections to other pods.
func (h *Handler) Close() { h.forward.transport.CloseIdleConnections() }

type contextKey struct{}

// Serve answers a request to the guild with that id. route is what stands behind /api/v10.
func (h *Handler) Serve(w http.ResponseWriter, r *http.Request, id snowflake.ID, route string) {
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	place, err := h.find(ctx, r, id)
	if err != nil {
		writeError(w, err)
		return
	}
	if place.Remote != "" {
		h.forward.serve(w, r.WithContext(ctx), place.Remote)
		return
	}
	if route != path.Clean(route) { // the mux would redirect, to a place that it does not know
		noRoute(w, r)
		return
	}
	inner := r.Clone(context.WithValue(ctx, contextKey{}, place))
	inner.URL.Path, inner.URL.RawPath = route, ""
	h.mux.ServeHTTP(w, inner)
}

func noRoute(w http.ResponseWriter, r *http.Request) {
	writeError(w, &apiError{http.StatusNotFound, 0, "404: Not Found: no such route: " + r.Method + " " + r.URL.Path})
}

// find waits until the guild is available here or on another pod that this request has not come from.
func (h *Handler) find(ctx context.Context, r *http.Request, id snowflake.ID) (directory.Place, error) {
	timeout := time.NewTimer(h.o.HoldTime)
	defer timeout.Stop()
	forwarded := r.Header.Get(directory.ForwardedHeader) != ""
	held := false
	for {
		place, changed := h.o.Directory.Find(id)
		switch {
		case place.Guild != nil || place.Remote != "" && !forwarded:
			return place, nil
		case h.o.Directory.Stopped():
			return place, errUnavailable
		case place.Object == nil && !forwarded && h.o.Directory.Synced():
			return place, &apiError{http.StatusNotFound, 10004, "Unknown Guild: no guild with id " + id.String() + " is placed in this namespace"}
		}
		if !held {
			select {
			case h.waiting <- struct{}{}:
				held = true
				defer func() { <-h.waiting }()
			default:
				return place, errUnavailable
			}
		}
		select {
		case <-changed:
		case <-timeout.C:
			return place, errUnavailable
		case <-ctx.Done():
			return place, errUnavailable
		}
	}
}

func (h *Handler) endpoint(c call, authed bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		place := r.Context().Value(contextKey{}).(directory.Place)
		req := &request{Request: r, guild: place.Guild, object: place.Object}
		if authed {
			claims, err := h.o.Keys().Verify(r.Header.Get("Authorization"), time.Now())
			if err != nil {
				writeError(w, &apiError{http.StatusUnauthorized, 0, "401: Unauthorized: " + strings.TrimPrefix(err.Error(), "token: ")})
				return
			}
			req.bearer = &claims
		}
		status, body, err := c(req)
		if err != nil {
			writeError(w, err)
			return
		}
		writeJSON(w, status, body)
	})
}

// apiError is an error as clients see it.
type apiError struct {
	status  int
	code    int
	message string
}

func (e *apiError) Error() string { return e.message }

var errUnavailable = &apiError{http.StatusServiceUnavailable, 0, "the guild is not available now; nothing was appended, try again"}

var errBackendOnly = &apiError{http.StatusForbidden, 50013, "Missing Permissions: the token must have been issued with the right to publish"}

func invalid(field, expected string) error {
	return &guild.InvalidError{Field: field, Expected: expected}
}

func writeError(w http.ResponseWriter, err error) {
	var api *apiError
	var bad *guild.InvalidError
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &api):
	case errors.As(err, &bad):
		api = &apiError{http.StatusBadRequest, 50035, "Invalid Form Body: " + bad.Error()}
	case errors.As(err, &tooLarge):
		api = &apiError{http.StatusRequestEntityTooLarge, 40005, fmt.Sprintf("Request entity too large: expected at most %d bytes", tooLarge.Limit)}
	case errors.Is(err, guild.ErrKeyReused):
		api = &apiError{http.StatusUnprocessableEntity, 0, "Idempotency-Key: was used with another body before"}
	case errors.Is(err, guild.ErrBusy):
		w.Header().Set("Retry-After", "1")
		w.Header().Set("Via", "1.1 guildhall") // libraries take a 429 without it for a global one
		writeJSON(w, http.StatusTooManyRequests, map[string]any{
			"message": "too many requests wait for the guild's log", "retry_after": 1.0, "global": false,
		})
		return
	case errors.Is(err, guild.ErrNotMember):
		api = &apiError{http.StatusForbidden, 50001, "Missing Access: not a member of the guild"}
	case errors.Is(err, guild.ErrClosed):
		api = errUnavailable
	case errors.Is(err, guild.ErrFull):
		api = &apiError{http.StatusInsufficientStorage, 0, "the shard's disk is full; nothing was appended"}
	case errors.Is(err, guild.ErrUncertain):
		panic(http.ErrAbortHandler) // no answer is true: the connection is closed without one
	default:
		api = &apiError{http.StatusInternalServerError, 0, "internal error; nothing was appended"}
	}
	if api.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, api.status, map[string]any{"code": api.code, "message": api.message})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	if status == http.StatusNoContent {
		w.WriteHeader(status)
		return
	}
	encoded, err := json.Marshal(body)
	if err != nil { // only for types that JSON does not know
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(encoded)))
	w.WriteHeader(status)
	w.Write(encoded)
}

// decode reads a JSON body.
func decode(r *request, v any) error {
	if kind := r.Header.Get("Content-Type"); strings.HasPrefix(kind, "multipart/") {
		return invalid("Content-Type", "expected application/json: files are not supported in this version")
	}
	body, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	var network net.Error
	switch {
	case err == nil:
	case errors.As(err, &tooLarge):
		return err
	case errors.As(err, &network) && network.Timeout():
		return &apiError{http.StatusRequestTimeout, 0, "408: Request Timeout: the body did not arrive in time"}
	default:
		return invalid("body", err.Error())
	}
	if !utf8.Valid(body) {
		return invalid("body", "expected UTF-8")
	}
	err = json.Unmarshal(body, v)
	var wrongType *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &wrongType) && wrongType.Field != "":
		return invalid(wrongType.Field, "expected "+kindOf(wrongType.Type)+", got a "+wrongType.Value)
	}
	return invalid("body", "expected a JSON object with the fields of this route: "+err.Error())
}

// kindOf is a type as JSON knows it.
func kindOf(t reflect.Type) string {
	if snowflake.Is(t) {
		return "a snowflake, in a string"
	}
	switch t.Kind() {
	case reflect.Bool:
		return "a boolean"
	case reflect.Int, reflect.Int64, reflect.Uint64:
		return "an integer"
	case reflect.String:
		return "a string"
	case reflect.Slice:
		return "an array"
	}
	return "an object"
}

// guildID checks the guild of the route against the one of the address.
func (r *request) guildID() error {
	if id, err := snowflake.Parse(r.PathValue("guild")); err != nil || id != r.guild.ID() {
		return &apiError{http.StatusNotFound, 10004, "Unknown Guild: this address serves guild " + r.guild.ID().String()}
	}
	return nil
}

func (r *request) channelID() (snowflake.ID, error) {
	id, err := snowflake.Parse(r.PathValue("channel"))
	if err != nil {
		return 0, errUnknownChannel
	}
	return id, nil
}

var (
	errUnknownChannel = &apiError{http.StatusNotFound, 10003, "Unknown Channel"}
	errUnknownMember  = &apiError{http.StatusNotFound, 10007, "Unknown Member"}
)

// notFound turns ErrNotFound into what it means for the route.
func notFound(err error, as *apiError) error {
	if errors.Is(err, guild.ErrNotFound) {
		return as
	}
	return err
}
