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
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// publishBar is how much of the smaller of the others the disk has to reach.
const publishBar = 0.7

// published is what one system did with its publishers.
type published struct {
	perSecond float64
	p50, p99  float64 // ms from the request to its answer
	batch     float64 // events of one commit; 0: there are none
}

// publishCommand compares publishing with logs on disk and in memory, over REST with many publishers of which each
// waits for its answer, and a bare loop that appends as many bytes as the disk's commits had, and syncs.
func publishCommand(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("bench publish", flag.ContinueOnError)
	binary := f.String("shardserver", "", "the shard server's binary")
	rounds := f.Int("rounds", 3, "how often everything is measured; medians count")
	publishers := f.Int("publishers", 64, "how many publish at a time")
	length := f.Duration("length", 5*time.Second, "how long each measurement publishes")
	dir := f.String("dir", os.TempDir(), "directory on the disk that is measured")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *binary == "" || *rounds < 1 || *publishers < 1 || *length <= 0 || f.NArg() > 0 {
		return errors.New("expected --shardserver, at least one round and publisher, a length, and no arguments")
	}
	runtime.LockOSThread() // children end with the thread that started them
	results := map[string][]published{}
	for round := range *rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, *rounds)
		order := []string{inMemory, onDisk}
		if round%2 == 1 {
			slices.Reverse(order)
		}
		var batch float64
		for _, name := range order {
			data := ""
			if name == onDisk {
				data = filepath.Join(*dir, fmt.Sprintf("guildhall-bench-data-%d", os.Getpid()))
			}
			p, err := publishTo(ctx, *binary, data, *publishers, *length)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			results[name] = append(results[name], p)
			batch = max(batch, p.batch)
		}
		p, err := bareLoop(*dir, batch, *length)
		if err != nil {
			return err
		}
		results[bare] = append(results[bare], p)
	}
	printPublished(os.Stdout, results, *publishers)
	return nil
}

const (
	inMemory = "REST, logs in memory"
	onDisk   = "REST, logs on disk"
	bare     = "append and fdatasync"
)

// publishTo starts a shard server and publishes to it. data is the directory of its logs, empty for memory.
func publishTo(ctx context.Context, binary, data string, publishers int, length time.Duration) (p published, err error) {
	var more []string
	if data != "" {
		defer os.RemoveAll(data)
		more = []string{"--data-dir", data}
	}
	s, err := startGuildhall(ctx, binary, 1, more...)
	if err != nil {
		return p, err
	}
	defer s.end()
	latencies := make([][]time.Duration, publishers)
	errs := make([]error, publishers)
	var group sync.WaitGroup
	began := time.Now()
	for i := range publishers {
		group.Go(func() { latencies[i], errs[i] = publishUntil(s, began.Add(length)) })
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			return p, err // the others have the same
		}
	}
	all := slices.Concat(latencies...)
	slices.Sort(all)
	milliseconds := func(q float64) float64 { return float64(all[int(q*float64(len(all)-1))].Microseconds()) / 1000 }
	p = published{perSecond: float64(len(all)) / time.Since(began).Seconds(), p50: milliseconds(0.5), p99: milliseconds(0.99)}
	if data != "" {
		commits, records, err := commitsOf(ctx, s.admin)
		if err != nil {
			return p, err
		}
		p.batch = records / commits
	}
	return p, nil
}

// publishUntil publishes one event after the other until a time.
func publishUntil(s *server, end time.Time) (latencies []time.Duration, err error) {
	conn, err := net.Dial("tcp", s.address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	body := publishOpen + `{"x":"` + strings.Repeat("x", 248) + `"}` + publishClose
	request := fmt.Appendf(nil, "POST /g/%d/api/v10/guilds/%d/events HTTP/1.1\r\nHost: %s\r\nAuthorization: Bot %s\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", guildID, guildID, s.address, userToken(s.key, firstUser, true), len(body), body)
	reader := bufio.NewReader(conn)
	for time.Now().Before(end) {
		began := time.Now()
		conn.SetDeadline(began.Add(time.Minute))
		if _, err := conn.Write(request); err != nil {
			return nil, err
		}
		resp, err := http.ReadResponse(reader, nil)
		if err != nil {
			return nil, err
		}
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return nil, err
		}
		if resp.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("%s: %s", resp.Status, answer)
		}
		latencies = append(latencies, time.Since(began))
	}
	return latencies, nil
}

func commitsOf(ctx context.Context, admin string) (commits, records float64, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/metrics", nil)
	if err != nil {
		return 0, 0, err
	}
	resp, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		switch v, _ := strconv.ParseFloat(value, 64); name {
		case "guildhall_store_commits_total":
			commits = v
		case "guildhall_store_records_total":
			records = v
		}
	}
	if commits == 0 || records == 0 {
		return 0, 0, fmt.Errorf("expected commits and records in /metrics: %w", lines.Err())
	}
	return commits, records, lines.Err()
}

// bareLoop appends batches of so many events to a file and syncs after each.
func bareLoop(dir string, batch float64, length time.Duration) (p published, err error) {
	file, err := os.CreateTemp(dir, "guildhall-bench-append-*")
	if err != nil {
		return p, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	const eventBytes = 320 // as a record of the log on disk, with what belongs to it
	buf := make([]byte, int(batch*eventBytes))
	var took []time.Duration
	began := time.Now()
	for time.Since(began) < length {
		start := time.Now()
		if _, err := file.Write(buf); err != nil {
			return p, err
		}
		if err := syncData(file); err != nil {
			return p, err
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	milliseconds := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1000 }
	return published{
		perSecond: float64(len(took)) * batch / time.Since(began).Seconds(), p50: milliseconds(0.5), p99: milliseconds(0.99), batch: batch,
	}, nil
}

func printPublished(w io.Writer, results map[string][]published, publishers int) {
	fmt.Fprintf(w, "\n| %d publishers | events/s | p50 ms | p99 ms | events per commit |\n| --- | ---: | ---: | ---: | ---: |\n", publishers)
	column := func(name string, f func(published) float64) (values []float64) {
		for _, p := range results[name] {
			values = append(values, f(p))
		}
		return values
	}
	speed := func(p published) float64 { return p.perSecond }
	for _, name := range []string{inMemory, onDisk, bare} {
		fmt.Fprintf(w, "| %s | %.0f | %.2f | %.2f | %.1f |\n", name, median(column(name, speed)),
			median(column(name, func(p published) float64 { return p.p50 })), median(column(name, func(p published) float64 { return p.p99 })),
			median(column(name, func(p published) float64 { return p.batch })))
	}
	var least []float64
	for i, m := range column(inMemory, speed) {
		least = append(least, min(m, column(bare, speed)[i]))
	}
	printBars(w, []bar{{
		what: "events per second on disk, of the smaller of the others", sessions: publishers, limit: publishBar, atLeast: true,
		rounds: each(quotient, column(onDisk, speed), least),
	}})
}
