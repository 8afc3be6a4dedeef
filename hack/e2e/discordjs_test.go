package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// jsBot is a discord.js bot in a process of its own.
type jsBot struct {
	t      *testing.T
	stdin  io.WriteCloser
	mu     sync.Mutex
	events []jsEvent
}

type jsEvent struct {
	Event    string
	Content  string
	Message  string
	Code     int
	Replayed int
	Guilds   []struct {
		ID, Name  string
		Available bool
		Channels  []string
	}
}

// startJSBot runs the bot, with its packages installed outside the repository.
func startJSBot(t *testing.T, url, token string) *jsBot {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "guildhall", "discordjs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	changed := false
	for _, name := range []string{"package.json", "package-lock.json", "bot.mjs"} {
		want, err := os.ReadFile(filepath.Join("discordjs", name))
		if err != nil {
			t.Fatal(err)
		}
		have, _ := os.ReadFile(filepath.Join(dir, name))
		if string(have) != string(want) {
			changed = changed || name != "bot.mjs"
			if err := os.WriteFile(filepath.Join(dir, name), want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules")); changed || err != nil {
		install := exec.Command("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
		install.Dir = dir
		if out, err := install.CombinedOutput(); err != nil {
			os.Remove(filepath.Join(dir, "package-lock.json")) // installed again next time
			t.Fatalf("npm ci: %v\n%s", err, out)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := exec.CommandContext(ctx, "node", "bot.mjs", restBase(url))
	c.Dir = dir
	c.Env = append(os.Environ(), "BOT_TOKEN="+token)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 5 * time.Second
	c.Stderr = os.Stderr
	b := &jsBot{t: t}
	if b.stdin, err = c.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var e jsEvent
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				e = jsEvent{Event: "noise", Message: lines.Text()}
			}
			b.mu.Lock()
			b.events = append(b.events, e)
			b.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-read
		_ = c.Wait() // it was told to end
		if t.Failed() {
			t.Logf("discord.js saw: %+v", b.events)
		}
	})
	return b
}

func (b *jsBot) tell(command string, fields map[string]any) {
	b.t.Helper()
	line := map[string]any{"command": command}
	maps.Copy(line, fields)
	encoded, err := json.Marshal(line)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.stdin.Write(append(encoded, '\n')); err != nil {
		b.t.Fatalf("telling the bot: %v", err)
	}
}

// seen are the events of a kind so far.
func (b *jsBot) seen(kind string) (events []jsEvent) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.events {
		if e.Event == kind {
			events = append(events, e)
		}
	}
	return events
}

func (b *jsBot) waitFor(kind string, n int) {
	b.t.Helper()
	eventually(b.t, fmt.Sprintf("discord.js: %d times %q", n, kind), func() bool {
		if failed := b.seen("failed"); len(failed) > 0 {
			b.t.Fatalf("the bot failed: %s", failed[0].Message)
		}
		return len(b.seen(kind)) >= n
	})
}

// contents are the messages of a series, in the order of their arrival.
func (b *jsBot) contents(series string) (contents []string) {
	for _, e := range b.seen("message") {
		if strings.HasPrefix(e.Content, series+" ") {
			contents = append(contents, e.Content)
		}
	}
	return contents
}

func series(name string, n int) []string {
	contents := make([]string, n)
	for i := range contents {
		contents[i] = fmt.Sprintf("%s %d", name, i)
	}
	return contents
}

func (b *jsBot) expectSeries(name string, n int) {
	b.t.Helper()
	want := series(name, n)
	eventually(b.t, "discord.js: the series "+name, func() bool { return len(b.contents(name)) >= n })
	if got := b.contents(name); !slices.Equal(got, want) {
		b.t.Errorf("discord.js received the series %q as %q", name, got)
	}
}

// afterReady waits as long as discord.js needs to empty the queue that it keeps until it is ready.
func (b *jsBot) afterReady() {
	b.t.Helper()
	b.waitFor("ready", 1)
	time.Sleep(time.Second)
}

func TestDiscordJS(t *testing.T) {
	namespace := makeNamespace(t)
	url := guildOn(t, namespace, "shard-a", "shard-b")
	issue := tokens(t, namespace)
	bot := startJSBot(t, url, issue("js", false))
	bot.afterReady()
	guilds := bot.seen("ready")[0].Guilds
	if len(guilds) != 1 || guilds[0].Name != "Lobby" || !guilds[0].Available || !slices.Equal(guilds[0].Channels, []string{"general", "Lounge"}) {
		t.Fatalf("the bot is in %+v", guilds)
	}

	bot.tell("send", map[string]any{"channel": "general", "contents": series("first", 50)})
	bot.expectSeries("first", 50)

	bot.tell("cut", nil)
	bot.waitFor("resumed", 1)
	bot.tell("send", map[string]any{"channel": "general", "contents": series("resumed", 50)})
	bot.expectSeries("resumed", 50)
	if n := len(bot.seen("identified")); n != 1 {
		t.Errorf("identified %d times, expected once: a cut socket is resumed", n)
	}

	// The shard's process is stopped and comes back in its pod, with a new log: the bot waits
	// at the front door, is told so, and identifies anew.
	if err := shardProcess(t, namespace, "shard-a").Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	bot.waitFor("identified", 2)
	eventually(t, "the shard to be ready again", func() bool {
		return kubectl(t, "-n", namespace, "get", "pod", "shard-a-0", "-o", "jsonpath={.status.containerStatuses[0].restartCount}{.status.containerStatuses[0].ready}") == "1true"
	})
	time.Sleep(time.Second) // as after ready
	bot.tell("send", map[string]any{"channel": "general", "contents": series("reborn", 50)})
	bot.expectSeries("reborn", 50)
}
