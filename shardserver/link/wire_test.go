package link

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/report"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

var update = flag.Bool("update", false, "write testdata/version-1.txt anew: only as long as no release speaks this version")

// said is one of each thing that the ends say in version 1, by name.
func said() (names []string, values map[string]any) {
	names = []string{
		"follow", "follow from nothing", "welcome", "record", "record of some", "volatile", "state", "answer", "refusal",
		"evict", "order", "sessions", "attach", "detach", "report",
	}
	user := guild.NewUser(userID(1), "u1", true)
	return names, map[string]any{
		"follow":              follow{Version: 1, Log: "log", After: 17},
		"follow from nothing": follow{Version: 1},
		"welcome":             welcome{Version: 1, Log: "log", Epoch: 3, Begin: 17},
		"record": guildlog.Record{
			Seq: 18, Time: 1790000000000, Type: "GUILD_MEMBER_REMOVE", Data: []byte(`{"user":{"id":"200000000000000005"}}`), Reserved: 1,
		},
		"record of some": guildlog.Record{
			Seq: 20, Time: 1790000000001, Type: "MESSAGE_CREATE", Data: []byte(`{"content":"x"}`), Users: []snowflake.ID{userID(5), userID(9)},
		},
		"volatile": guildlog.Record{Seq: 20, Time: 1790000000002, Type: "TYPING_START", Data: []byte(`{"user_id":"200000000000000005"}`)},
		"state": guild.State{Seq: 20, Members: 2, Rows: []guildlog.Row{
			{Key: []byte("c\x01"), Value: []byte(`{"id":"1"}`)}, {Key: []byte("r"), Value: []byte{}},
		}},
		"answer":   guild.Answer{Nonce: 4, Random: 5, User: userID(1), Member: json.RawMessage(`{"nick":"n"}`), Joined: 19},
		"refusal":  guild.Answer{Nonce: 4, Random: 5, User: userID(1), Error: "not now"},
		"evict":    guild.Evict{Random: 5, Nonce: 4},
		"order":    guild.Order{Round: 7, Leave: 100, PerSecond: 50, Deadline: time.UnixMilli(1790000000000).UTC()},
		"sessions": []guild.Attached{{Random: 5, User: userID(1), Nonce: 4, Age: 1500}, {Random: 6, User: userID(2), Nonce: 3}},
		"attach":   guild.Attachment{User: user, Random: 5, Join: true, Nonce: 4},
		"detach":   guild.Detachment{Random: 5, Nonce: 4},
		"report": report.Relay{
			GuildUID: "uid", Name: "relay", BootID: "boot", Version: "v1", Attached: true, AgeMillis: 3, Ready: true, LastSeq: 20, Sessions: 12,
			DeliveriesPerSecond: 240, ArrivalsPerSecond: 2, Waiting: 1, Draining: true, Round: 7, Asked: 50,
		},
	}
}

// say makes the message that says something, as the ends do.
func say(v any) []byte {
	switch v := v.(type) {
	case guildlog.Record:
		if v.Type == "TYPING_START" {
			return appendItem(nil, &guild.Item{Volatile: &v}, 0)
		}
		return appendItem(nil, &guild.Item{Records: []guildlog.Record{v}}, 17)
	case guild.State, guild.Answer, guild.Evict, guild.Order:
		return appendItem(nil, &guild.Item{Message: v}, 0)
	}
	kind := map[string]byte{
		"link.follow": partFollow, "link.welcome": partWelcome, "[]guild.Attached": partSessions, "guild.Attachment": partAttach,
		"guild.Detachment": partDetach, "report.Relay": partReport,
	}[fmt.Sprintf("%T", v)]
	return jsonPart(nil, kind, v)
}

// readPart is the reverse.
func readPart(kind byte, content []byte) (any, error) {
	switch kind {
	case partRecord, partVolatile:
		r, _, err := readRecord(content)
		return r, err
	case partState:
		return readState(content)
	case partWelcome:
		return fromJSON[welcome](content)
	case partAnswer:
		return fromJSON[guild.Answer](content)
	case partEvict:
		return fromJSON[guild.Evict](content)
	case partOrder:
		return fromJSON[guild.Order](content)
	case partFollow:
		return fromJSON[follow](content)
	case partSessions:
		return fromJSON[[]guild.Attached](content)
	case partAttach:
		return fromJSON[guild.Attachment](content)
	case partDetach:
		return fromJSON[guild.Detachment](content)
	case partReport:
		return fromJSON[report.Relay](content)
	}
	return nil, fmt.Errorf("part %q", kind)
}

func fromJSON[T any](content []byte) (any, error) {
	var v T
	err := json.Unmarshal(content, &v)
	return v, err
}

// TestVersion1: what an end of version 1 says is understood, whatever has been added since. The bytes are kept.
func TestVersion1(t *testing.T) {
	const path = "testdata/version-1.txt"
	names, values := said()
	if *update {
		var b strings.Builder
		for _, name := range names {
			fmt.Fprintf(&b, "%s: %x\n", name, say(values[name]))
		}
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	kept := 0
	for ; lines.Scan(); kept++ {
		name, text, _ := strings.Cut(lines.Text(), ": ")
		message, err := hex.DecodeString(text)
		if err != nil {
			t.Fatal(err)
		}
		// A later release may say more.
		message = append(part(nil, '?', []byte("not known")), message...)
		message = part(message, '!', nil)
		var got any
		err = parts(message, func(kind byte, content []byte) error {
			v, err := readPart(kind, content)
			if kind != '?' && kind != '!' {
				got = v
				return err
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(values[name], got); diff != "" {
			t.Errorf("%s (-expected +got):\n%s", name, diff)
		}
	}
	if kept != len(names) {
		t.Errorf("%d things, expected %d", kept, len(names))
	}
}
