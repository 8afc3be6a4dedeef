package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/token"
)

// failingDisk is the variable with the folder of a server in a process of its own. Once the folder has a
// file "fail", no sync of its logs succeeds.
const failingDisk = "GUILDHALL_TEST_FAILING_DISK"

func serveOnFailingDisk(dir string) {
	fails := errorfs.InjectorFunc(func(op errorfs.Op) error {
		switch op.Kind {
		case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
			if _, err := os.Stat(filepath.Join(dir, "fail")); err == nil && strings.HasSuffix(op.Path, ".log") {
				return syscall.EIO
			}
		}
		return nil
	})
	c := serverIn(dir)
	c.disk, c.logger = errorfs.Wrap(vfs.Default, fails), slog.New(slog.NewTextHandler(os.Stderr, nil))
	c.die = func(err error) {
		explain(err)
		os.Exit(1)
	}
	if err := serve(context.Background(), c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	os.Exit(0)
}

// TestAFailedSyncIsNotAnswered: what could not be synced is neither answered nor shown, the process ends at once, and
// the next one has everything that was answered.
func TestAFailedSyncIsNotAnswered(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "a", guildID)
	dir := filepath.Dir(c.file)
	c.data = serverIn(dir).data
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), failingDisk+"="+dir)
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address := ""
	lines := bufio.NewScanner(said)
	for address == "" && lines.Scan() {
		if m := regexp.MustCompile(`gateway=(\S+)`).FindStringSubmatch(lines.Text()); m != nil {
			address = m[1]
		}
	}
	var last strings.Builder
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines.Scan() {
			fmt.Fprintln(&last, lines.Text())
		}
	}()
	keys, err := token.LoadKeys(c.keysDir)
	if err != nil {
		t.Fatal(err)
	}
	failing := &running{server: &server{}, t: t, client: &http.Client{Transport: &http.Transport{}}}
	failing.keys.Store(keys)
	failing.listeners.plain = elsewhere(address)
	defer failing.client.CloseIdleConnections()
	eventually(t, "the guild is there", func() bool {
		status, _, err := failing.publish(guildID, `{"t":"MESSAGE_CREATE","d":{"n":0}}`)
		return err == nil && status == 200
	})
	ws := failing.dial(guildID)
	expect(t, ws, protocol.OpHello)
	identify(t, ws, failing.token(1, false))
	expect(t, ws, "READY", "GUILD_CREATE")
	const keyed = `{"t":"MESSAGE_CREATE","d":{"n":1}}`
	status, answer, err := failing.publishKey(guildID, "key", keyed)
	if status != 200 {
		t.Fatal(status, answer, err)
	}
	expect(t, ws, "MESSAGE_CREATE")

	if err := os.WriteFile(filepath.Join(dir, "fail"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if status, answer, err := failing.publishKey(guildID, "other", `{"t":"MESSAGE_CREATE","d":{"n":2}}`); err == nil {
		t.Errorf("answered %d %s", status, answer)
	}
	if m, err := receive(ws); err == nil {
		t.Errorf("shown: %+v", m)
	}
	<-read
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(last.String(), "input/output error") {
		t.Errorf("ended with %v: %s", err, last.String())
	}

	next := start(t, c)
	if status, again, err := next.publishKey(guildID, "key", keyed); status != 200 || again != answer {
		t.Errorf("%d %s %v, before %s", status, again, err, answer)
	}
}

// elsewhere is a listener of another process.
type elsewhere string

func (e elsewhere) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (e elsewhere) Close() error              { return nil }
func (e elsewhere) Addr() net.Addr            { return e }
func (e elsewhere) Network() string           { return "tcp" }
func (e elsewhere) String() string            { return string(e) }
