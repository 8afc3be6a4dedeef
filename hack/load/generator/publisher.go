package generator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"guildhall.dev/guildhall/hack/load/audit"
)

// kept is how many of its answered requests a publisher remembers, to send them again.
const kept = 32

// publisher publishes its share of the events, one request after the other.
type publisher struct {
	guild    *guild
	auditor  *audit.Auditor
	number   int // of this publisher, from 0
	of       int // how many there are
	total    int // events of all publishers
	batch    int
	rate     float64 // events per second of all publishers; 0: as fast as it goes
	again    float64 // share of requests after which an earlier one is sent again
	abandon  float64 // share of refused requests that are given up
	run      uint32
	token    string
	event    string
	channel  string
	size     int
	finish   <-chan struct{} // closed when no further events are to be published
	answered func(events int)
	status   func(code int) // told of each answer that is an error
	took     func(time.Duration)

	earlier []*request
}

// request is a publication: the same bytes, however often it is sent.
type request struct {
	key    string
	body   []byte
	events []audit.Event
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
// an error, or when it is to finish.
func (p *publisher) publish(ctx context.Context, start time.Time) error {
	count := uint32(0)
	for first := p.number * p.batch; first < p.total; first += p.of * p.batch {
		size := min(p.batch, p.total-first)
		var due time.Duration
		if p.rate > 0 {
			due = time.Until(start.Add(time.Duration(float64(first) / p.rate * float64(time.Second))))
		}
		select {
		case <-p.finish:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(due):
		}
		if err := p.next(ctx, count, size); err != nil {
			return fmt.Errorf("publishing: %w", err)
		}
		count += uint32(size) //nolint:gosec // at most batch
		p.answered(size)
	}
	return nil
}

// next publishes size events from count on, and maybe earlier ones once more.
func (p *publisher) next(ctx context.Context, count uint32, size int) error {
	r, err := p.request(count, size)
	if err != nil {
		return err
	}
	began := time.Now()
	answered, err := p.send(ctx, r, p.abandon)
	if answered {
		p.took(time.Since(began))
	}
	if !answered || p.again == 0 {
		return err
	}
	if len(p.earlier) < kept {
		p.earlier = append(p.earlier, r)
	} else if i := rand.IntN(4 * kept); i < kept { //nolint:gosec // any will do
		p.earlier[i] = r // some stay for long
	}
	if rand.Float64() >= p.again { //nolint:gosec // any will do
		return nil
	}
	_, err = p.send(ctx, p.earlier[rand.IntN(len(p.earlier))], 0) //nolint:gosec // any will do
	return err
}

// request makes the request for size events from count on.
func (p *publisher) request(count uint32, size int) (r *request, err error) {
	r = &request{key: fmt.Sprintf("load-%08x-%d-%d", p.run, p.number, count), events: make([]audit.Event, size)}
	batch := publishBatch{Events: make([]publishEvent, size)}
	for i := range r.events {
		e := audit.Event{Publisher: uint32(p.number), Count: count + uint32(i)} //nolint:gosec // small
		r.events[i] = e
		p.auditor.Publish(e)
		batch.Events[i] = publishEvent{T: p.event, D: p.message(e, time.Now())}
	}
	if size == 1 {
		r.body, err = json.Marshal(batch.Events[0])
	} else {
		r.body, err = json.Marshal(batch)
	}
	return r, err
}

// send sends a request until it is carried out. With the probability abandon it gives one up, and returns false,
// that was refused by every answer so far.
func (p *publisher) send(ctx context.Context, r *request, abandon float64) (answered bool, err error) {
	var answer publishAnswer
	unsure := false // an attempt may have been carried out
	for attempt := 0; ; attempt++ {
		answer = publishAnswer{}
		err := p.guild.call(ctx, http.MethodPost, "/guilds/"+p.guild.id+"/events", p.token, r.key, r.body, &answer)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if !passing(err) {
			return false, err
		}
		wait := backoff(attempt)
		if status, ok := errors.AsType[*statusError](err); ok {
			p.status(status.status)
			wait = max(wait, status.after)
		}
		unsure = unsure || !refused(err)
		if !unsure && rand.Float64() < abandon { //nolint:gosec // any will do
			for _, e := range r.events {
				p.auditor.Refuse(e)
			}
			return false, nil
		}
		if sleep(ctx, wait) != nil {
			return false, err
		}
	}
	numbers := make([]uint64, 0, len(r.events))
	for _, e := range answer.Events {
		numbers = append(numbers, e.S)
	}
	if len(numbers) == 0 && len(r.events) == 1 {
		numbers = append(numbers, answer.S)
	}
	if len(numbers) != len(r.events) {
		return false, fmt.Errorf("the answer has %d numbers for %d events", len(numbers), len(r.events))
	}
	for i, e := range r.events {
		p.auditor.Acknowledge(e, numbers[i])
	}
	return true, nil
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
