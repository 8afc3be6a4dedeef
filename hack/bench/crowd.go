package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// relaySessions is how many sessions a relay has at most: what its descriptors allow.
const relaySessions = 15000

// crowdCommand puts the sessions of one guild on relays, each a process of its own with its clients in another one, and
// publishes an event now and then. Every session checks that it receives all of them, once and in order.
func crowdCommand(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("bench crowd", flag.ContinueOnError)
	binary := f.String("shardserver", "", "the shard server's binary")
	relayBinary := f.String("relayserver", "", "the shard server's binary that the relays run, such as another release's; --shardserver when empty")
	sessions := f.Int("sessions", 100000, "sessions of the guild")
	relayCounts := f.String("relays", "", "numbers of relays, with commas between; as many as the sessions need when empty")
	every := f.Duration("every", 2*time.Second, "time between two events")
	length := f.Duration("length", time.Minute, "how long events are published")
	disk := f.Bool("disk", false, "the log is on disk, below the directory of --shardserver")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *binary == "" || *sessions < 1 || *every <= 0 || *length < *every || f.NArg() > 0 {
		return errors.New("expected --shardserver, sessions, a time between events and a length above it, and no arguments")
	}
	if *relayBinary == "" {
		*relayBinary = *binary
	}
	runtime.LockOSThread() // children end with the thread that started them
	counts := []int{(*sessions + relaySessions - 1) / relaySessions}
	if *relayCounts != "" {
		counts = nil
		for field := range strings.SplitSeq(*relayCounts, ",") {
			n, err := strconv.Atoi(strings.TrimSpace(field))
			if err != nil || n < 1 {
				return errors.New("--relays: expected numbers from 1 on")
			}
			counts = append(counts, n)
		}
	}
	fmt.Println("| relays | sessions | connected in s | events | deliveries | p50 ms | p99 ms | shard: us of CPU per event | shard MB | relays: MB each | relays: us of CPU per delivery |")
	fmt.Println("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
	for _, n := range counts {
		data := ""
		if *disk {
			data = filepath.Join(filepath.Dir(*binary), "crowd-data")
		}
		if err := crowd(ctx, *binary, *relayBinary, data, min(*sessions, n*relaySessions), n, *every, *length); err != nil {
			return fmt.Errorf("%d relays: %w", n, err)
		}
	}
	return nil
}

// relayed is a relay with its clients.
type relayed struct {
	*server
	clients *clients
}

func crowd(ctx context.Context, binary, relayBinary, data string, sessions, relays int, every, length time.Duration) error {
	links, err := os.MkdirTemp("", "guildhall-links-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(links)
	if out, err := exec.CommandContext(ctx, binary, "linkcerts", "--dir", links, "--guild", strconv.Itoa(guildID)).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	address, err := freeAddress(ctx)
	if err != nil {
		return err
	}
	more := []string{"--link-listen", address, "--link-dir", filepath.Join(links, "shard")}
	if data != "" {
		defer os.RemoveAll(data)
		more = append(more, "--data-dir", data)
	}
	shard, err := startGuildhall(ctx, binary, 1, more...)
	if err != nil {
		return err
	}
	defer shard.end()
	s, err := systemNamed(guildhallName)
	if err != nil {
		return err
	}
	began := time.Now()
	var houses []relayed
	for i := range relays {
		r := relayed{server: &server{key: shard.key, guild: guildID}}
		err := r.start(exec.CommandContext(ctx, relayBinary, "relay", "--guild-id", strconv.Itoa(guildID), "--name", fmt.Sprint("relay-", i),
			"--shard-address", address, "--shard-rest-address", shard.address, "--link-dir", filepath.Join(links, "relay"),
			"--keys-dir", filepath.Join(shard.dir, "keys"), "--gateway-url", "ws://127.0.0.1:1/g/"+strconv.Itoa(guildID)+"/", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"))
		if err != nil {
			return err
		}
		defer r.process.end()
		if err := r.awaitReady(ctx); err != nil {
			return err
		}
		n := sessions/relays + min(1, max(0, sessions%relays-i))
		config := r.clientConfig(s, n)
		config.Follow = true
		if r.clients, err = startClients(ctx, config); err != nil {
			return err
		}
		defer r.clients.end()
		houses = append(houses, r)
		fmt.Fprintf(os.Stderr, "%d sessions on %d relays\n", (i+1)*n, i+1)
	}
	connected := time.Since(began)
	pause(ctx, 2*time.Second)
	shardBefore, relaysBefore, err := cpuOf(shard, houses)
	if err != nil {
		return err
	}
	events := uint64(length / every) //nolint:gosec // not negative
	type said struct {
		answer
		err error
	}
	answers := make(chan said, len(houses))
	for _, r := range houses {
		go func() {
			a, err := r.clients.ask(phase{Follow: events, Length: length + drainTime})
			answers <- said{a, err}
		}()
	}
	if err := publishEvery(ctx, shard, events, every); err != nil {
		return err
	}
	var worst50, worst99 float64
	deliveries := 0
	for range houses {
		a := <-answers
		if a.err != nil {
			return a.err
		}
		deliveries += a.Deliveries
		worst50, worst99 = max(worst50, a.P50), max(worst99, a.P99)
	}
	shardAfter, relaysAfter, err := cpuOf(shard, houses)
	if err != nil {
		return err
	}
	shardMemory, err := shard.rss()
	if err != nil {
		return err
	}
	relayMemory := 0.0
	for _, r := range houses {
		m, err := r.rss()
		if err != nil {
			return err
		}
		relayMemory += m
	}
	fmt.Printf("| %d | %d | %.0f | %d | %d | %.0f | %.0f | %.0f | %.0f | %.0f | %.2f |\n", relays, sessions, connected.Seconds(), events, deliveries,
		worst50, worst99, (shardAfter-shardBefore)/float64(events)*1e6, shardMemory/1024, relayMemory/1024/float64(relays),
		(relaysAfter-relaysBefore)/float64(deliveries)*1e6)
	return nil
}

func cpuOf(shard *server, houses []relayed) (own, relays float64, err error) {
	if own, err = shard.cpu(); err != nil {
		return 0, 0, err
	}
	for _, r := range houses {
		c, err := r.cpu()
		if err != nil {
			return 0, 0, err
		}
		relays += c
	}
	return own, relays, nil
}

// freeAddress is an address that nobody listens on.
func freeAddress(ctx context.Context) (string, error) {
	var c net.ListenConfig
	l, err := c.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func (s *server) awaitReady(ctx context.Context) error {
	for end := time.Now().Add(drainTime); ; pause(ctx, 20*time.Millisecond) {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.admin+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(request)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		if ctx.Err() != nil || time.Now().After(end) {
			return fmt.Errorf("the relay is not ready: %w", errors.Join(err, ctx.Err()))
		}
	}
}

// publishEvery publishes events one at a time.
func publishEvery(ctx context.Context, s *server, events uint64, every time.Duration) error {
	conn, err := net.Dial("tcp", s.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	reader := bufio.NewReader(conn)
	config := clientConfig{Guild: guildID, Address: s.address, Key: s.key}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for number := uint64(1); number <= events; number++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		conn.SetDeadline(time.Now().Add(drainTime))
		if _, err := conn.Write(appendPublish(nil, &config, 0, appendEvent(nil, number, payloadSize))); err != nil {
			return err
		}
		resp, err := http.ReadResponse(reader, nil)
		if err != nil {
			return err
		}
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			return fmt.Errorf("publishing: %s %s", resp.Status, answer)
		}
	}
	return nil
}
