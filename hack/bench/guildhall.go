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
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	guildhallName = "guildhall"

	guildID   = "1574491430951321600"
	firstUser = 900000000000000000
	// intents GUILDS and GUILD_MESSAGES.
	intents = 1<<0 | 1<<9
)

// guildhallDialect is how a bot comes into its session: HELLO, IDENTIFY, then READY and GUILD_CREATE.
var guildhallDialect = dialect{
	path: "/?v=10&encoding=json",
	steps: []step{
		{await: `"op":10`, send: func(c *clientConfig, i int) string {
			return fmt.Sprintf(`{"op":2,"d":{"token":%q,"intents":%d,"properties":{"os":"linux","browser":"bench","device":"bench"}}}`,
				userToken(c.Key, firstUser+1+i, false), intents)
		}},
		{await: `"GUILD_CREATE"`},
	},
	heartbeat: `{"op":1,"d":null}`,
}

const guildhallManifest = `apiVersion: guildhall.dev/v1
kind: Guild
metadata:
  name: bench
spec:
  id: "` + guildID + `"
  access:
    join: Open
`

// startGuildhall starts the shard server as its users do, alone with a file. It tells where it listens
// as it logs.
func startGuildhall(ctx context.Context, binary, dir string) (*server, error) {
	var secret [32]byte
	rand.Read(secret[:])
	key := "1." + base64.RawURLEncoding.EncodeToString(secret[:])
	keys, file := filepath.Join(dir, "keys"), filepath.Join(dir, "guild.yaml")
	err := errors.Join(os.MkdirAll(keys, 0o700), os.WriteFile(filepath.Join(keys, "current"), []byte(key), 0o600),
		os.WriteFile(file, []byte(guildhallManifest), 0o600))
	if err != nil {
		return nil, err
	}
	s := &server{key: key, guild: guildID}
	cmd := exec.CommandContext(ctx, binary, "serve", "--file", file, "--keys-dir", keys,
		"--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
	log, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if s.process, err = startProcess(cmd); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(log)
	var said strings.Builder
	for lines.Scan() {
		said.WriteString(lines.Text() + "\n")
		if m := startedLine.FindStringSubmatch(lines.Text()); m != nil {
			s.address, s.admin = m[1], m[2]
			go io.Copy(io.Discard, log) //nolint:errcheck // until it ends
			return s, nil
		}
	}
	s.end()
	return nil, fmt.Errorf("the shard server did not start:\n%s", said.String())
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

// appendPublish adds the REST call that publishes an event.
func appendPublish(b []byte, c *clientConfig, payload []byte) []byte {
	if publishHead == nil {
		publishHead = fmt.Appendf(nil, "POST /g/%s/api/v10/guilds/%s/events HTTP/1.1\r\nHost: %s\r\nAuthorization: Bot %s\r\n"+
			"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n", c.Guild, c.Guild, c.Address,
			userToken(c.Key, firstUser, true), len(publishOpen)+payloadSize+len(publishClose))
	}
	b = append(append(b, publishHead...), publishOpen...)
	return append(append(b, payload...), publishClose...)
}

const publishOpen, publishClose = `{"t":"GAME_TICK","d":`, `}`

var publishHead []byte

// guildhallCounters are deliveries and writes so far, by the shard server's own metrics.
func guildhallCounters(ctx context.Context, admin string) (deliveries, writes float64, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/metrics", nil)
	if err != nil {
		return 0, 0, err
	}
	resp, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	found := 0
	lines := bufio.NewScanner(io.LimitReader(resp.Body, 1<<20))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		to := map[string]*float64{"guildhall_deliveries_total": &deliveries, "guildhall_writes_total": &writes}[name]
		if to == nil {
			continue
		}
		if *to, err = strconv.ParseFloat(value, 64); err != nil {
			return 0, 0, err
		}
		found++
	}
	if found != 2 {
		return 0, 0, fmt.Errorf("expected guildhall_deliveries_total and guildhall_writes_total in /metrics: %w", lines.Err())
	}
	return deliveries, writes, nil
}
