package main

import (
	"bufio"
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	guildhallName = "guildhall"

	guildID   = 1574491430951321600
	firstUser = 900000000000000000
	// intents GUILDS and GUILD_MESSAGES.
	intents = 1<<0 | 1<<9
)

// guildhallDialect is how a bot comes into its session: HELLO, IDENTIFY, then READY and GUILD_CREATE.
var guildhallDialect = dialect{
	path: "/?v=10&encoding=json",
	steps: []step{
		{await: `"op":10`, send: func(c *client, i int) string {
			return fmt.Sprintf(`{"op":2,"d":{"token":%q,"intents":%d,"properties":{"os":"linux","browser":"bench","device":"bench"}}}`,
				userToken(c.config.Key, firstUser+1+i, false), intents)
		}},
		{await: `"GUILD_CREATE"`},
	},
	resume: []step{
		{await: `"op":10`, send: func(c *client, i int) string {
			s := &c.sessions[i]
			return fmt.Sprintf(`{"op":6,"d":{"token":%q,"session_id":%q,"seq":%d}}`, userToken(c.config.Key, firstUser+1+i, false), s.id, s.last)
		}},
		{await: `"RESUMED"`},
	},
	heartbeat: `{"op":1,"d":null}`,
}

// guildhallManifest is a file of so many guilds. With one it says nothing of the shard: defaults count.
func guildhallManifest(guilds int) []byte {
	var b []byte
	for i := range guilds {
		b = fmt.Appendf(b, "---\napiVersion: guildhall.dev/v1\nkind: Guild\nmetadata: {name: bench-%d}\nspec: {id: \"%d\", access: {join: Open}}\n",
			i, guildID+i)
	}
	if guilds > 1 {
		b = fmt.Appendf(b, "---\napiVersion: guildhall.dev/v1\nkind: GuildShard\nmetadata: {name: bench}\nspec: {capacity: {guilds: %d}}\n", guilds)
	}
	return b
}

// startGuildhall starts the shard server as its users do, alone with a file, in a folder of its own.
// more are further flags.
func startGuildhall(ctx context.Context, binary string, guilds int, more ...string) (_ *server, err error) {
	dir, err := os.MkdirTemp("", "guildhall-bench-")
	if err != nil {
		return nil, err
	}
	s := &server{dir: dir, guild: guildID}
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	var secret [32]byte
	rand.Read(secret[:])
	s.key = "1." + base64.RawURLEncoding.EncodeToString(secret[:])
	keys, file := filepath.Join(dir, "keys"), filepath.Join(dir, "guild.yaml")
	err = errors.Join(os.MkdirAll(keys, 0o700), os.WriteFile(filepath.Join(keys, "current"), []byte(s.key), 0o600),
		os.WriteFile(file, guildhallManifest(guilds), 0o600))
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, binary, append([]string{
		"serve", "--file", file, "--keys-dir", keys,
		"--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0",
	}, more...)...)
	return s, s.start(cmd)
}

// start starts a shard server, or a relay, which tells where it listens as it logs.
func (s *server) start(cmd *exec.Cmd) error {
	log, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if s.process, err = startProcess(cmd); err != nil {
		return err
	}
	lines := bufio.NewScanner(log)
	var said strings.Builder
	for lines.Scan() {
		said.WriteString(lines.Text() + "\n")
		if m := startedLine.FindStringSubmatch(lines.Text()); m != nil {
			s.address, s.admin = m[1], m[2]
			go io.Copy(io.Discard, log) //nolint:errcheck // until it ends
			return nil
		}
	}
	return fmt.Errorf("%s did not start:\n%s", cmd, said.String())
}

var startedLine = regexp.MustCompile(`msg="shard server started".* gateway=(\S+) admin=(\S+)`)

// userToken makes a token as docs/architecture.md has it.
func userToken(key string, user int, publish bool) string {
	id, encoded, _ := strings.Cut(key, ".")
	secret, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil {
		panic(err)
	}
	signing, err := hkdf.Key(sha256.New, secret, nil, "guildhall user token v1", 32)
	if err != nil {
		panic(err)
	}
	claims := fmt.Sprintf(`{"k":%q,"n":"user","p":%t,"i":%d}`, id, publish, time.Now().Unix())
	b64 := base64.RawURLEncoding
	signed := b64.EncodeToString([]byte(strconv.Itoa(user))) + "." + b64.EncodeToString([]byte(claims))
	mac := hmac.New(sha256.New, signing)
	mac.Write([]byte(signed))
	return signed + "." + b64.EncodeToString(mac.Sum(nil))
}

// appendPublish adds the REST call that publishes an event to the guild.
func appendPublish(b []byte, c *clientConfig, guild int, payload []byte) []byte {
	to := publishHead{c.Key, guild}
	if publishHeads[to] == nil {
		id := c.Guild + guild
		publishHeads[to] = fmt.Appendf(nil, "POST /g/%d/api/v10/guilds/%d/events HTTP/1.1\r\nHost: %s\r\nAuthorization: Bot %s\r\n"+
			"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n", id, id, c.Address,
			userToken(c.Key, firstUser, true), len(publishOpen)+len(payload)+len(publishClose))
	}
	b = append(append(b, publishHeads[to]...), publishOpen...)
	return append(append(b, payload...), publishClose...)
}

const publishOpen, publishClose = `{"t":"GAME_TICK","d":`, `}`

type publishHead struct {
	key   string
	guild int
}

var publishHeads = map[publishHead][]byte{}

// counters are what a shard server has counted so far, by its own metrics.
type counters struct{ deliveries, writes, lagging, allocations float64 }

func guildhallCounters(ctx context.Context, admin string) (c counters, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/metrics", nil)
	if err != nil {
		return c, err
	}
	resp, err := http.DefaultClient.Do(request)
	if err != nil {
		return c, err
	}
	defer resp.Body.Close()
	missing := map[string]*float64{
		"guildhall_deliveries_total": &c.deliveries, "guildhall_writes_total": &c.writes,
		"guildhall_sessions_lagging": &c.lagging, "go_memstats_mallocs_total": &c.allocations,
	}
	lines := bufio.NewScanner(io.LimitReader(resp.Body, 1<<20))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		to := missing[name]
		if to == nil {
			continue
		}
		if *to, err = strconv.ParseFloat(value, 64); err != nil {
			return c, err
		}
		delete(missing, name)
	}
	if len(missing) > 0 {
		return c, fmt.Errorf("expected %v in /metrics: %w", slices.Collect(maps.Keys(missing)), lines.Err())
	}
	return c, nil
}
