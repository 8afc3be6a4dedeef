package generator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"guildhall.dev/guildhall/hack/load/audit"
	"guildhall.dev/guildhall/hack/load/frame"
)

// refuse ends a run that cannot begin: its report says why.
func refuse(stdout, stderr io.Writer, why string) int {
	fmt.Fprintf(stderr, "error: %s\n", why)
	line, err := json.Marshal(Report{Audit: AuditFailed, Error: why})
	if err == nil {
		fmt.Fprintf(stdout, "%s\n", line)
	}
	return exitUsage
}

func complain(stderr io.Writer, err error) int {
	fmt.Fprintf(stderr, "load: %v\n", err)
	return exitUsage
}

// single are the flags of a command that acts as one user.
type single struct {
	url, guild string
	insecure   bool
	tokens     Tokens
	user       uint64
	name       string
}

func (s *single) register(f *flag.FlagSet) {
	guildFlags(f, &s.url, &s.guild, &s.insecure)
	s.tokens.register(f)
	f.Uint64Var(&s.user, "user", defaultUser, "id of the user, when the token is made here")
	f.StringVar(&s.name, "name", "load", "name of the user, when the token is made here")
}

func (s *single) open(ctx context.Context, publish bool) (*guild, string, error) {
	g, err := newGuild(s.url, s.guild, s.insecure, 1)
	if err != nil {
		return nil, "", err
	}
	source, err := s.tokens.source(ctx)
	if err != nil {
		return nil, "", err
	}
	token, err := source(ctx, s.user, s.name, publish)
	return g, token, err
}

// watchCommand prints every dispatch that a session gets, until it is interrupted.
func watchCommand(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var s single
	f := flag.NewFlagSet("load watch", flag.ContinueOnError)
	s.register(f)
	intents := f.Uint64("intents", defaultIntents, "intents of the session")
	width := f.Int("width", 200, "characters of a body to print; 0: all")
	all := f.Bool("all", false, "print HELLO, heartbeat ACKs and the like too")
	count := f.Int("count", 0, "end after so many dispatches other than READY and GUILD_CREATE; 0: never")
	if status, ok := parse(f, args, stderr); !ok {
		return status
	}
	g, token, err := s.open(ctx, false)
	if err != nil {
		return complain(stderr, err)
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	sw := newSwarm(g, audit.New(), *intents, false)
	sw.failed = end
	seen := 0
	sw.observe = func(f frame.Frame) {
		if ctx.Err() != nil {
			return
		}
		if f.Op == opDispatch || *all {
			if _, err := fmt.Fprintln(stdout, line(f, *width)); err != nil {
				end(err)
			}
		}
		switch string(f.Type) {
		case "", "READY", "GUILD_CREATE":
			return
		}
		if seen++; seen == *count {
			end(errDone)
		}
	}
	sw.prepare(context.WithoutCancel(ctx), []string{s.name}, []string{token})
	sw.connect(1)
	var why sync.WaitGroup
	why.Go(func() { tellErrors(ctx, sw, stderr) })
	<-ctx.Done()
	sw.stop()
	why.Wait()
	if err := context.Cause(ctx); !errors.Is(err, errDone) && !errors.Is(err, context.Canceled) {
		return complain(stderr, err)
	}
	return exitClean
}

var errDone = errors.New("done")

// tellErrors prints why connections end.
func tellErrors(ctx context.Context, sw *swarm, stderr io.Writer) {
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	var told *error
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := sw.lastError.Load(); err != told {
				told = err
				fmt.Fprintf(stderr, "connection ended: %v\n", *err)
			}
		}
	}
}

// line is a frame for people.
func line(f frame.Frame, width int) string {
	var b bytes.Buffer
	if f.Op == opDispatch {
		fmt.Fprintf(&b, "s=%d %s ", f.S, f.Type)
	} else {
		fmt.Fprintf(&b, "op=%d ", f.Op)
	}
	head := b.Len()
	if json.Compact(&b, f.Data) != nil {
		b.Write(f.Data)
	}
	text := b.String()
	if runes := []rune(text[head:]); width > 0 && len(runes) > width {
		text = text[:head] + string(runes[:width]) + "..."
	}
	return text
}

// publishCommand sends a message to a channel, by default the guild's first text channel.
func publishCommand(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var s single
	f := flag.NewFlagSet("load publish", flag.ContinueOnError)
	s.register(f)
	to := f.String("channel", "", "channel id; default: the guild's first text channel")
	if status, ok := parse(f, args, stderr); !ok {
		return status
	}
	text := strings.Join(f.Args(), " ")
	if text == "" {
		return complain(stderr, errors.New("give the text of the message"))
	}
	g, token, err := s.open(ctx, true)
	if err != nil {
		return complain(stderr, err)
	}
	defer g.http.CloseIdleConnections()
	if *to == "" {
		var channels []channel
		if err := g.call(ctx, http.MethodGet, "/guilds/"+g.id+"/channels", token, "", nil, &channels); err != nil {
			return complain(stderr, fmt.Errorf("listing channels: %w", err))
		}
		if *to = firstText(channels); *to == "" {
			return complain(stderr, errors.New("the guild has no text channel"))
		}
	}
	body, err := json.Marshal(map[string]string{"content": text})
	if err != nil {
		return complain(stderr, err)
	}
	var message json.RawMessage
	if err := g.call(ctx, http.MethodPost, "/channels/"+*to+"/messages", token, "", body, &message); err != nil {
		return complain(stderr, fmt.Errorf("sending the message: %w", err))
	}
	if _, err := fmt.Fprintf(stdout, "%s\n", message); err != nil {
		return complain(stderr, err)
	}
	return exitClean
}
