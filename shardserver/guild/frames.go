package guild

import (
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"guildhall.dev/guildhall/shardserver/fanout"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/protocol"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

const (
	// windowBytes and windowAge bound the frames that a stream keeps; what is older is made anew of the log's records.
	windowBytes = 8 << 20
	windowAge   = time.Minute
	// blockBytes and blockRecords bound what is made anew at a time.
	blockBytes   = 1 << 20
	blockRecords = 256
)

// window is what the stream keeps of what the log keeps.
func window(r guildlog.Retention) fanout.Retention {
	return fanout.Retention{Bytes: min(r.Bytes, windowBytes), Age: min(r.Age, windowAge)}
}

// turn is what a record does to a membership: nothing when user is 0. A record with a turn reserves a number.
type turn struct {
	user  snowflake.ID
	joins bool
}

// turnOf decodes the turn of a record of GUILD_MEMBER_ADD or GUILD_MEMBER_REMOVE that has one.
func turnOf(r *guildlog.Record) turn {
	var ref struct {
		User struct {
			ID snowflake.ID `json:"id"`
		} `json:"user"`
	}
	mustDecode(r, &ref)
	return turn{ref.User.ID, r.Type == "GUILD_MEMBER_ADD"}
}

// frame makes the frame of a record, whose data becomes the frame's own bytes.
func frame(r *guildlog.Record, t turn) *fanout.Frame {
	event := protocol.EventOf(r.Type)
	f := &fanout.Frame{Seq: r.Seq, Tag: event}
	f.Wire, r.Data = protocol.Dispatch(r.Type, r.Seq, r.Data)
	switch {
	case r.Users != nil: // is meant for them, as a direct message is: they may read it
		f.Personal, f.Wire = fanout.For(f.Wire, owners(r.Users)...), nil
	case event.Content:
		if bare, readers := protocol.WithoutContent(r.Data); bare != nil {
			wire, _ := protocol.Dispatch(r.Type, r.Seq, bare)
			f.Variants = [][]byte{withoutContent: wire}
			f.Personal = fanout.For(f.Wire, owners(readers)...)
		}
	}
	if t.user != 0 && !t.joins { // is told of the guild's end instead
		f.Personal = slices.DeleteFunc(f.Personal, func(p fanout.Personal) bool { return p.Owner == uint64(t.user) })
		if f.Wire != nil {
			f.Personal = fanout.For(nil, uint64(t.user))
		}
	}
	return f
}

// withoutContent is where a frame's variants have the body without what users write. A frame that has nothing of
// theirs has no variants.
const withoutContent = 0

// volatileFrame makes the frame of an event that is not logged, behind the number that it carries.
func volatileFrame(r guildlog.Record) *fanout.Frame {
	f := frame(&r, turn{})
	f.Volatile = true
	return f
}

// derived makes the frame that follows from a record with a turn, for its user alone. created is the
// body of GUILD_CREATE for one who joins. It is nil when the guild as it was then is not at hand:
// sessions cannot pass the frame, and start from a snapshot.
func derived(guild snowflake.ID, seq uint64, t turn, created []byte) *fanout.Frame {
	p := fanout.Personal{Owner: uint64(t.user), Turn: membership(t.joins)}
	name, body := "GUILD_DELETE", encode(map[string]snowflake.ID{"id": guild})
	if t.joins {
		name, body = "GUILD_CREATE", created
	}
	if body == nil {
		p.Turn = impassable{}
	} else {
		p.Wire, _ = protocol.Dispatch(name, seq, body)
	}
	return &fanout.Frame{Seq: seq, Tag: protocol.EventOf(name), Personal: []fanout.Personal{p}}
}

// membership turns the views of a user who becomes a member, or is none any more.
type membership bool

func (m membership) Ahead(v fanout.View) fanout.View { return viewOf(v.(*view).intents, bool(m)) }
func (m membership) Back(v fanout.View) fanout.View  { return viewOf(v.(*view).intents, !bool(m)) }

// impassable is a turn that no session passes.
type impassable struct{}

func (impassable) Ahead(fanout.View) fanout.View { return nil }
func (impassable) Back(fanout.View) fanout.View  { return nil }

// history makes the frames of a log's records anew.
type history struct {
	guild  snowflake.ID
	log    guildlog.Log
	logger *slog.Logger
	told   atomic.Int64 // when it was last told that the log cannot be read, Unix seconds
}

// toldEvery is how often it is, in seconds.
const toldEvery = 60

func (h *history) Kept(after uint64) bool { return h.log.Resumable(after) }

func (h *history) Frames(after uint64) (frames []*fanout.Frame, err error) {
	records, err := h.log.Read(after, blockRecords)
	if errors.Is(err, guildlog.ErrDropped) {
		return nil, fanout.ErrDropped
	}
	if err != nil {
		now, last := time.Now().Unix(), h.told.Load()
		if now-last >= toldEvery && h.told.CompareAndSwap(last, now) {
			h.logger.Error("the log cannot be read: sessions that ask for this part are closed", "guild", h.guild, "after", after, "error", err)
		}
		return nil, err
	}
	bytes := 0
	for i := range records {
		r := &records[i]
		var t turn
		if r.Reserved > 0 {
			t = turnOf(r)
		}
		if r.Seq > after {
			frames = append(frames, frame(r, t))
		}
		if t.user != 0 {
			frames = append(frames, derived(h.guild, r.End(), t, nil))
		}
		if bytes += len(r.Data); bytes > blockBytes {
			break
		}
	}
	return frames, nil
}

func owners(users []snowflake.ID) []uint64 {
	o := make([]uint64, len(users))
	for i, u := range users {
		o[i] = uint64(u)
	}
	return o
}
