package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// restartBar is how many seconds a killed shard server may take until it serves all its guilds.
const restartBar = 3

// restartCommand kills a shard server that has many guilds with long logs on disk, and measures how long the next one takes.
func restartCommand(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("bench restart", flag.ContinueOnError)
	binary := f.String("shardserver", "", "the shard server's binary")
	rounds := f.Int("rounds", 3, "how often it is killed; medians count")
	guilds := f.Int("guilds", 1000, "how many guilds it has")
	events := f.Int("events", 10000, "how many events, of 256 bytes, each guild's log has; thousands")
	dir := f.String("dir", os.TempDir(), "directory on the disk that is measured")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *binary == "" || *rounds < 1 || *guilds < 1 || *events < 1000 || *events%1000 != 0 || f.NArg() > 0 {
		return errors.New("expected --shardserver, at least one round and guild, events in thousands, and no arguments")
	}
	runtime.LockOSThread() // children end with the thread that started them
	data := filepath.Join(*dir, fmt.Sprintf("guildhall-bench-data-%d", os.Getpid()))
	defer os.RemoveAll(data)
	s, err := startGuildhall(ctx, *binary, *guilds, "--data-dir", data)
	if err != nil {
		return err
	}
	defer s.end()
	if err := s.serving(ctx, *guilds); err != nil {
		return err
	}
	began := time.Now()
	if err := s.fill(ctx, *guilds, *events/1000); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "%d events in %d guilds after %.0f s\n", *guilds**events, *guilds, time.Since(began).Seconds())

	var ready, all, memory []float64
	for range *rounds {
		again := *s.cmd
		s.process.end() // kills
		began := time.Now()
		next := &server{dir: s.dir, guild: s.guild, key: s.key}
		if err := next.start(restarted(ctx, &again)); err != nil {
			return err
		}
		s.process, s.address, s.admin = next.process, next.address, next.admin
		if err := s.ready(ctx); err != nil {
			return err
		}
		ready = append(ready, time.Since(began).Seconds())
		if err := s.serving(ctx, *guilds); err != nil {
			return err
		}
		all = append(all, time.Since(began).Seconds())
		kb, err := s.rss()
		if err != nil {
			return err
		}
		memory = append(memory, kb/1024)
		// Something to read again at the next start.
		if err := s.fill(ctx, min(*guilds, 50), 1); err != nil {
			return err
		}
	}
	fmt.Printf("\n| guilds | events each | s until ready | s until every guild has answered | MB resident |\n| ---: | ---: | ---: | ---: | ---: |\n")
	fmt.Printf("| %d | %d | %.2f | %.2f | %.0f |\n", *guilds, *events, median(ready), median(all), median(memory))
	printBars(os.Stdout, []bar{{what: "restart: s until every guild has answered", sessions: 0, limit: restartBar, rounds: all}})
	return nil
}

// restarted is the command of a process that was killed, once more.
func restarted(ctx context.Context, cmd *exec.Cmd) *exec.Cmd {
	return exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
}

// ready waits until the server says that it is.
func (s *server) ready(ctx context.Context) error {
	return untilOK(ctx, func() (*http.Request, error) {
		return http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.admin+"/readyz", nil)
	})
}

// serving waits until so many guilds have each answered a request.
func (s *server) serving(ctx context.Context, guilds int) error {
	token := userToken(s.key, firstUser, true)
	return inParallel(guilds, func(i int) error {
		return untilOK(ctx, func() (*http.Request, error) { return s.request(ctx, http.MethodGet, i, "", token, nil) })
	})
}

// fill publishes so many thousand events in each guild.
func (s *server) fill(ctx context.Context, guilds, thousands int) error {
	token := userToken(s.key, firstUser, true)
	event := publishOpen + `{"x":"` + strings.Repeat("x", 248) + `"}` + publishClose
	body := []byte(`{"events":[` + strings.TrimSuffix(strings.Repeat(event+",", 1000), ",") + `]}`)
	return inParallel(guilds, func(i int) error {
		for range thousands {
			r, err := s.request(ctx, http.MethodPost, i, "/events", token, body)
			if err != nil {
				return err
			}
			if err := do(r); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *server) request(ctx context.Context, method string, guild int, route, token string, body []byte) (*http.Request, error) {
	id := s.guild + guild
	r, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://%s/g/%d/api/v10/guilds/%d%s", s.address, id, id, route), bytes.NewReader(body))
	if err == nil {
		r.Header.Set("Authorization", "Bot "+token)
		r.Header.Set("Content-Type", "application/json")
	}
	return r, err
}

func do(r *http.Request) error {
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", r.Method, r.URL, resp.Status, answer)
	}
	return err
}

// untilOK repeats a request until it is answered with success, for a minute at most.
func untilOK(ctx context.Context, request func() (*http.Request, error)) error {
	for began := time.Now(); ; {
		r, err := request()
		if err != nil {
			return err
		}
		err = do(r)
		if err == nil || ctx.Err() != nil || time.Since(began) > time.Minute {
			return err
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// inParallel calls each of 0 to n-1, some at a time, and returns the first error.
func inParallel(n int, each func(i int) error) error {
	var group sync.WaitGroup
	var failed sync.Once
	var first error
	var next atomic.Int64
	for range 8 {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := each(i); err != nil {
					failed.Do(func() { first = err })
					return
				}
			}
		})
	}
	group.Wait()
	return first
}
