package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	minBackoff = 200 * time.Millisecond
	maxBackoff = 5 * time.Second
	// A component that ran this long before it died starts again at once.
	healthyRun = 10 * time.Second
	// stopGrace is what a component gets between SIGTERM and SIGKILL. The API
	// server would take its time for open watches; none of them loses data.
	stopGrace = 2 * time.Second
	// startLimit bounds how long a component may take to become ready.
	startLimit = 2 * time.Minute

	probeWhileStarting = 100 * time.Millisecond
	probeWhileRunning  = 3 * time.Second
)

// States of a component, as status shows them.
const (
	stateWaiting    = "waiting"    // for the components that it needs
	stateStarting   = "starting"   // running, not ready yet
	stateReady      = "ready"      // running, and its probe answers
	stateRestarting = "restarting" // died, and waits for its next try
	stateStopped    = "stopped"    // taken away on request
)

type componentStatus struct {
	Name     string    `json:"name"`
	State    string    `json:"state"`
	PID      int       `json:"pid,omitempty"` // in the cluster's process namespace
	Restarts int       `json:"restarts"`
	Since    time.Time `json:"since"`
	Problem  string    `json:"problem,omitempty"`
}

type clusterStatus struct {
	Ready      bool              `json:"ready"`   // it has been usable once
	Stage      string            `json:"stage"`   // what the start is at
	Failure    string            `json:"failure"` // why the start was given up
	Components []componentStatus `json:"components"`
}

// healthy reports whether the cluster can be used now.
func (s clusterStatus) healthy() bool {
	for _, c := range s.Components {
		if c.State != stateReady {
			return false
		}
	}
	return s.Ready
}

// A unit is a component under supervision.
type unit struct {
	component
	layout layout
	node   node
	wake   chan struct{} // tells the loop that wanted has changed
	first  chan struct{} // closed when it is ready for the first time

	mu      sync.Mutex
	wanted  bool
	status  componentStatus
	process *os.Process
	exited  chan struct{} // closed when process has ended
}

func newUnit(l layout, n node, c component) *unit {
	return &unit{
		component: c,
		layout:    l,
		node:      n,
		wake:      make(chan struct{}, 1),
		first:     make(chan struct{}),
		wanted:    true,
		status:    componentStatus{Name: c.name, State: stateWaiting, Since: time.Now()},
	}
}

func (u *unit) snapshot() componentStatus {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.status
}

func (u *unit) setState(state, problem string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.status.State != state {
		u.status.State, u.status.Since = state, time.Now()
	}
	u.status.Problem = problem
}

// run keeps the component alive for as long as the supervisor lives.
func (u *unit) run(needs []<-chan struct{}) {
	for _, need := range needs {
		<-need
	}
	backoff := minBackoff
	for {
		u.mu.Lock()
		wanted := u.wanted
		u.mu.Unlock()
		if !wanted {
			u.setState(stateStopped, "")
			<-u.wake
			backoff = minBackoff
			continue
		}
		start := time.Now()
		err := u.runOnce()
		u.mu.Lock()
		u.process, u.status.PID = nil, 0
		wanted = u.wanted
		if wanted {
			u.status.Restarts++
		}
		u.mu.Unlock()
		if !wanted {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s ended: %v\n", u.name, err)
		if time.Since(start) > healthyRun {
			backoff = minBackoff
		}
		u.setState(stateRestarting, fmt.Sprint(err))
		select {
		case <-time.After(backoff):
		case <-u.wake:
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// runOnce starts the program and waits for its end.
func (u *unit) runOnce() error {
	log, err := os.OpenFile(u.node.log(u.name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(u.layout.bin(u.args[0]), u.args[1:]...)
	cmd.Env = append(os.Environ(), u.env...)
	cmd.Dir = u.layout.dir
	cmd.Stdout, cmd.Stderr = log, log

	exited := make(chan struct{})
	u.mu.Lock()
	// stop looks at both under the same lock: it finds a process to end, or
	// none is started any more.
	if !u.wanted {
		err = errors.New("stopped")
	} else if err = cmd.Start(); err == nil {
		u.process, u.exited, u.status.PID = cmd.Process, exited, cmd.Process.Pid
	}
	u.mu.Unlock()
	if err != nil {
		return err
	}
	u.setState(stateStarting, "")

	ctx, cancel := context.WithCancel(context.Background())
	var probing sync.WaitGroup
	probing.Go(func() { u.probe(ctx) })
	err = cmd.Wait()
	close(exited)
	cancel()
	probing.Wait()
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// probe watches over one run of the component.
func (u *unit) probe(ctx context.Context) {
	for {
		pause := probeWhileRunning
		if err := u.ready(ctx); err == nil {
			u.setState(stateReady, "")
			u.mu.Lock()
			select {
			case <-u.first:
			default:
				close(u.first)
			}
			u.mu.Unlock()
		} else if ctx.Err() == nil {
			u.setState(stateStarting, err.Error())
			pause = probeWhileStarting
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func (u *unit) want(wanted bool) {
	u.mu.Lock()
	u.wanted = wanted
	u.mu.Unlock()
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

// stop takes the component away, and returns when it is gone.
func (u *unit) stop(ctx context.Context) error {
	u.want(false)
	u.mu.Lock()
	process, exited := u.process, u.exited
	u.mu.Unlock()
	if process != nil {
		// An error means that it has just ended by itself.
		_ = process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(stopGrace):
			_ = process.Kill()
			<-exited
		}
	}
	return u.waitFor(ctx, stateStopped, 10*time.Second)
}

func (u *unit) start(ctx context.Context) error {
	u.want(true)
	return u.waitFor(ctx, stateReady, startLimit)
}

func (u *unit) waitFor(ctx context.Context, state string, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for {
		now := u.snapshot()
		if now.State == state {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is %s after %v, not %s (%s); the end of its log:\n%s",
				u.name, now.State, limit, state, now.Problem, tail(u.node.log(u.name)))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// A supervisor is a node's daemon.
type supervisor struct {
	layout layout
	node   node
	units  []*unit
	images chan struct{} // closed when they are imported

	mu     sync.Mutex
	status clusterStatus
}

// supervise is the daemon's main function: it runs the components, brings the
// cluster up to its first use, or has the node join, and answers the control
// socket, until it is killed.
func supervise(l layout, n node) error {
	s := &supervisor{layout: l, node: n, images: make(chan struct{})}
	ready := map[string]<-chan struct{}{imagesImported: s.images}
	for _, c := range components(l, n) {
		u := newUnit(l, n, c)
		s.units = append(s.units, u)
		ready[c.name] = u.first
	}
	listener, err := net.Listen("unix", n.controlSocket())
	if err != nil {
		return err
	}
	if err := os.Chmod(n.controlSocket(), 0o600); err != nil {
		return err
	}
	for _, u := range s.units {
		var needs []<-chan struct{}
		for _, name := range u.needs {
			if need, ok := ready[name]; ok { // others are on the first node, and up
				needs = append(needs, need)
			}
		}
		go u.run(needs)
	}
	go func() {
		start := s.bootstrap
		if !n.first() {
			start = s.join
		}
		if err := start(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, "start failed:", err)
			s.update(func(status *clusterStatus) { status.Failure = err.Error() })
		}
	}()
	return http.Serve(listener, s.handler())
}

func (s *supervisor) update(change func(*clusterStatus)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.status)
}

func (s *supervisor) snapshot() clusterStatus {
	s.mu.Lock()
	status := s.status
	s.mu.Unlock()
	for _, u := range s.units {
		status.Components = append(status.Components, u.snapshot())
	}
	return status
}

// stage says what the start is waiting for.
func (s *supervisor) stage(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Fprintln(os.Stderr, text)
	s.update(func(status *clusterStatus) { status.Stage = text })
}

// handler is the control socket's protocol, read by control.go.
func (s *supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		// An error is the reader's loss: it has gone.
		_ = json.NewEncoder(w).Encode(s.snapshot())
	})
	change := func(do func(*unit, context.Context) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			for _, u := range s.units {
				if u.name != r.PathValue("component") {
					continue
				}
				if err := do(u, r.Context()); err != nil {
					http.Error(w, err.Error(), http.StatusInternalServerError)
				}
				return
			}
			http.Error(w, "no such component; status lists them", http.StatusNotFound)
		}
	}
	mux.HandleFunc("POST /stop/{component}", change((*unit).stop))
	mux.HandleFunc("POST /start/{component}", change((*unit).start))
	return mux
}

// tail is the end of a component's log, for error messages.
func tail(path string) string {
	const size, lines = 8 << 10, 20
	f, err := os.Open(path)
	if err != nil {
		return "(" + err.Error() + ")"
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > size {
		if _, err := f.Seek(-size, io.SeekEnd); err != nil {
			return "(" + err.Error() + ")"
		}
	}
	content, err := io.ReadAll(f)
	if err != nil {
		return "(" + err.Error() + ")"
	}
	last := strings.Split(strings.TrimSpace(string(content)), "\n")
	return strings.Join(last[max(0, len(last)-lines):], "\n")
}
