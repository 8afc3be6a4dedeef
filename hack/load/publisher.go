package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"guildhall.dev/guildhall/hack/load/audit"
)

// publisher publishes its share of the events, one request after the other.
type publisher struct {
	guild    *guild
	auditor  *audit.Auditor
	number   int // of this publisher, from 0
	of       int // how many there are
	total    int // events of all publishers
	batch    int
	rate     float64 // events per second of all publishers; 0: as fast as it goes
	run      uint32
	token    string
	event    string
	channel  string
	size     int
	answered func(events int)
}

type publishEvent struct {
	T string         `json:"t"`
	D map[string]any `json:"d"`
}

type publishBatch struct {
	Events []publishEvent `json:"events"`
}

type publishAnswer struct {
	S      uint64 `json:"s"`
	Events []struct {
		S uint64 `json:"s"`
	} `json:"events"`
}

// publish sends the publisher's events, which are those of every of-th batch. It comes back early only with
// an error.
func (p *publisher) publish(ctx context.Context, start time.Time) error {
	count := uint32(0)
	for first := p.number * p.batch; first < p.total; first += p.of * p.batch {
		size := min(p.batch, p.total-first)
		if p.rate > 0 {
			due := start.Add(time.Duration(float64(first) / p.rate * float64(time.Second)))
			if err := sleep(ctx, time.Until(due)); err != nil {
				return err
			}
		}
		if err := p.send(ctx, count, size); err != nil {
			return err
		}
		count += uint32(size) //nolint:gosec // at most batch
		p.answered(size)
	}
	return nil
}

// send publishes size events from count on, as often as it takes.
func (p *publisher) send(ctx context.Context, count uint32, size int) error {
	batch := publishBatch{Events: make([]publishEvent, size)}
	keys := make([]audit.Event, size)
	for i := range keys {
		e := audit.Event{Publisher: uint32(p.number), Count: count + uint32(i)} //nolint:gosec // small
		keys[i] = e
		p.auditor.Publish(e)
		batch.Events[i] = publishEvent{T: p.event, D: p.message(e, time.Now())}
	}
	var body []byte
	var err error
	if size == 1 {
		body, err = json.Marshal(batch.Events[0])
	} else {
		body, err = json.Marshal(batch)
	}
	if err != nil {
		return err
	}
	key := fmt.Sprintf("load-%08x-%d-%d", p.run, p.number, count)
	var answer publishAnswer
	for attempt := 0; ; attempt++ {
		answer = publishAnswer{}
		err = p.guild.call(ctx, http.MethodPost, "/guilds/"+p.guild.id+"/events", p.token, key, body, &answer)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !passing(err) {
			return fmt.Errorf("publishing: %w", err)
		}
		wait := backoff(attempt)
		if status, ok := err.(*statusError); ok { //nolint:errorlint // call does not wrap it
			wait = max(wait, status.after)
		}
		if sleep(ctx, wait) != nil {
			return fmt.Errorf("publishing: %w", err)
		}
	}
	numbers := make([]uint64, 0, size)
	for _, e := range answer.Events {
		numbers = append(numbers, e.S)
	}
	if len(numbers) == 0 && size == 1 {
		numbers = append(numbers, answer.S)
	}
	if len(numbers) != size {
		return fmt.Errorf("publishing: the answer has %d numbers for %d events", len(numbers), size)
	}
	for i, e := range keys {
		p.auditor.Acknowledge(e, numbers[i])
	}
	return nil
}

// message is the body of an event: a message object with our content.
func (p *publisher) message(e audit.Event, now time.Time) map[string]any {
	// An id of Discord's kind that no other event of this run has.
	id := uint64(now.UnixMilli()-1420070400000)<<22 | uint64(e.Publisher&0x3f)<<16 | uint64(e.Count&0xffff) //nolint:gosec // after 2015
	return map[string]any{
		"id":         fmt.Sprint(id),
		"channel_id": p.channel,
		"guild_id":   p.guild.id,
		"author": map[string]any{
			"id": "100000000000000001", "username": "load", "discriminator": "0", "global_name": nil, "avatar": nil, "bot": true,
		},
		"content":          content(p.run, e, now, p.size),
		"timestamp":        now.UTC().Format("2006-01-02T15:04:05.000000+00:00"),
		"edited_timestamp": nil,
		"tts":              false,
		"mention_everyone": false,
		"mentions":         []any{},
		"mention_roles":    []any{},
		"attachments":      []any{},
		"embeds":           []any{},
		"pinned":           false,
		"type":             0,
	}
}

// sleep waits, or returns why it must not.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// backoff is how long to wait before another attempt: at random, up to 250 ms at first and 10 s at last.
func backoff(attempt int) time.Duration {
	limit := min(250*time.Millisecond<<min(attempt, 10), 10*time.Second)
	return rand.N(limit) //nolint:gosec // only jitter
}
