package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	guildID = "1100000000000000001"
	// host is not the address that others dial from: a client that dials a port nobody listens on can
	// end up connected to itself, and would take the server's port.
	host = "127.0.0.99"
	// patience bounds each wait for the server.
	patience = time.Minute
)

// manifest of the shard and its guild. The retention is the default unless the whole log is to be read.
const manifest = `apiVersion: guildhall.dev/v1
kind: GuildShard
metadata: {name: shard-a, namespace: torture}
spec: {%s}
---
apiVersion: guildhall.dev/v1
kind: Guild
metadata: {name: lobby, namespace: torture}
spec: {id: "` + guildID + `", access: {join: Open}}
`

const keepAll = `retention: {bytes: 1Gi, age: 720h}`

// shard is a shard server: one process after the other with the same configuration and address.
type shard struct {
	binary  string
	file    string // manifest
	keys    string // directory
	data    string // directory; empty: in memory
	address string // host and port
	log     io.Writer
	client  *http.Client

	// Of the latest process.
	cmd     *exec.Cmd
	started time.Time
	tail    *tail
	ended   chan struct{} // closed when the process has ended
	err     error         // of its end, before ended is closed
}

// refusal is that of a server which does not serve the guild.
type refusal struct {
	err  error  // of the process; nil when it goes on without the guild
	text string // what it printed last
}

func (e *refusal) Error() string {
	if e.err == nil {
		return "the server does not open the guild: " + e.text
	}
	return fmt.Sprintf("the server did not start: %v: %s", e.err, e.text)
}

// newShard makes a shard in a directory; release gives its port back.
func newShard(dir, binary, spec string, log io.Writer) (s *shard, release func(), err error) {
	s = &shard{
		binary: binary, file: filepath.Join(dir, "guild.yaml"), keys: filepath.Join(dir, "keys"), data: filepath.Join(dir, "data"), log: log,
		client: &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}},
	}
	if err := os.WriteFile(s.file, fmt.Appendf(nil, manifest, spec), 0o600); err != nil {
		return nil, nil, err
	}
	s.address, release, err = reserve()
	return s, release, err
}

// reserve finds a port that is free and stays so: its socket is bound, which keeps the kernel from giving
// the port to anybody who asks for any, but not the server from listening.
func reserve() (address string, release func(), err error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		return "", nil, err
	}
	syscall.CloseOnExec(fd)
	release = func() { syscall.Close(fd) }
	a := &syscall.SockaddrInet4{}
	copy(a.Addr[:], []byte{127, 0, 0, 99})
	err = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	if err == nil {
		err = syscall.Bind(fd, a)
	}
	var name syscall.Sockaddr
	if err == nil {
		name, err = syscall.Getsockname(fd)
	}
	if err != nil {
		release()
		return "", nil, fmt.Errorf("reserving a port: %w", err)
	}
	return fmt.Sprintf("%s:%d", host, name.(*syscall.SockaddrInet4).Port), release, nil
}

func (s *shard) url() string { return "ws://" + s.address + "/g/" + guildID + "/" }

// start starts a process. The one before has ended.
func (s *shard) start() error {
	args := []string{"serve", "--file", s.file, "--keys-dir", s.keys, "--listen", s.address, "--admin-listen", host + ":0"}
	if s.data != "" {
		args = append(args, "--data-dir", s.data)
	}
	s.cmd = exec.Command(s.binary, args...) //nolint:gosec // the caller's own binary
	s.tail = &tail{to: s.log}
	s.cmd.Stdout, s.cmd.Stderr = s.tail, s.tail
	s.cmd.SysProcAttr = processAttributes()
	s.started = time.Now()
	if err := s.cmd.Start(); err != nil {
		return err
	}
	cmd, ended := s.cmd, make(chan struct{})
	s.ended = ended
	go func() {
		s.err = cmd.Wait()
		close(ended)
	}()
	return nil
}

// serving waits until the guild answers and returns how long that took from the start. It fails with a
// refusal when the process ends before, or says that it does not open the guild.
func (s *shard) serving(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var last error
	for {
		wait := 2 * time.Millisecond
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.Replace(s.url(), "ws", "http", 1)+"api/v10/gateway", http.NoBody)
		if err != nil {
			return 0, err
		}
		resp, err := s.client.Do(req)
		if err == nil {
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 500))
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return time.Since(s.started), nil
			}
			err = fmt.Errorf("%s: %s", resp.Status, body)
			wait = 100 * time.Millisecond
		}
		if s.tail.says("guild not opened") {
			return 0, &refusal{nil, s.tail.text()}
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-s.ended:
			return 0, &refusal{s.err, s.tail.text()}
		case <-ctx.Done():
			return 0, fmt.Errorf("the guild does not answer: %w; the server's last words: %s", errors.Join(ctx.Err(), last), s.tail.text())
		case <-time.After(wait):
		}
	}
}

// answers says whether the guild answers at once.
func (s *shard) answers() bool {
	client := http.Client{Timeout: time.Second, Transport: s.client.Transport}
	resp, err := client.Get(strings.Replace(s.url(), "ws", "http", 1) + "api/v10/gateway")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// signal sends a signal to the process, by its id.
func (s *shard) signal(sig syscall.Signal) error {
	select {
	case <-s.ended:
		return s.unexpected()
	default:
		return s.cmd.Process.Signal(sig)
	}
}

// kill ends the process with SIGKILL.
func (s *shard) kill() error {
	if err := s.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-s.ended
	return nil
}

// end ends the process with SIGTERM, and fails unless it then ends by itself, in order and in time.
func (s *shard) end() error {
	if err := s.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-s.ended:
		if s.err != nil {
			return fmt.Errorf("after SIGTERM the server ended with: %w: %s", s.err, s.tail.text())
		}
		return nil
	case <-time.After(patience):
		return errors.New("after SIGTERM the server did not end")
	}
}

// unexpected is the error of a process that has ended by itself.
func (s *shard) unexpected() error {
	return fmt.Errorf("the server ended by itself: %w: %s", s.err, s.tail.text())
}

// gone makes sure that no process is left.
func (s *shard) gone() {
	if s.ended == nil {
		return
	}
	s.kill() //nolint:errcheck // it has ended
	<-s.ended
	s.client.CloseIdleConnections()
}

// tail passes on what a process prints, up to a limit, and remembers its first and its last words.
type tail struct {
	to io.Writer

	mu          sync.Mutex
	first, last []byte
	passed      int
}

const (
	tailSize  = 2000 // bytes that are shown
	tailBytes = 64 << 10
	// maxPassed is how much of one process goes to the log: a broken server can print without end.
	maxPassed = 16 << 20
)

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.first = append(t.first, b[:min(len(b), tailBytes-len(t.first))]...)
	t.last = append(t.last, b...)
	if len(t.last) > 2*tailBytes {
		t.last = append(t.last[:0], t.last[len(t.last)-tailBytes:]...)
	}
	if t.passed += len(b); t.passed > maxPassed {
		return len(b), nil
	}
	return t.to.Write(b)
}

// says tells whether the process has printed a text, first or last.
func (t *tail) says(text string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.Contains(t.first, []byte(text)) || bytes.Contains(t.last, []byte(text))
}

func (t *tail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.last[max(len(t.last)-tailSize, 0):]))
}
