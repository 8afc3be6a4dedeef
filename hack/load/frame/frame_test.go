package frame

import (
	"bytes"
	"encoding/json"
	"strconv"
	"testing"
	"unicode/utf8"
)

var seeds = []string{
	`{"op":10,"d":{"heartbeat_interval":41250},"s":null,"t":null}`,
	`{"t":"MESSAGE_CREATE","s":42,"op":0,"d":{"content":"a \"quoted\" \\ text","n":[1,{"x":"}"}]}}`,
	"{\n \"op\" : 11 }\t",
	`{"op":9,"d":false}`,
	`{"op":0,"\u0073":7,"t":"\u0041"}`,
	`{"op":0,"s":9007199254740991,"t":"X","d":-1.5e3}`,
	`{"op":0,"s":9007199254740992}`,
	`{"op":0,"s":-1}`,
	`{"op":0,"s":"1"}`,
	`{"op":1.0}`,
	`{"op":-1}`,
	`{"op":0,"t":1}`,
	`{"d":1}`,
	`{}`, `[]`, `null`, `{"op":0`, `{"op":0}x`, `{"op":0,}`, `{,"op":0}`, `{"op"}`, `{"op":}`, `{"a`, `{"a\`, `{"a\"`, `{"a":[1}`, ``,
	`{"op":0,"op":1}`,
}

// FuzzParse compares with encoding/json: of valid JSON both say the same; anything else must
// only not crash.
func FuzzParse(f *testing.F) {
	for _, s := range seeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		got, err := Parse(message)
		if !json.Valid(message) {
			return
		}
		var fields map[string]json.RawMessage
		object := bytes.HasPrefix(bytes.TrimSpace(message), []byte("{"))
		if e := json.Unmarshal(message, &fields); !object || e != nil {
			if object != (e == nil) && string(bytes.TrimSpace(message)) != "null" {
				t.Fatalf("object %v, %v", object, e)
			}
			if err == nil {
				t.Fatalf("accepted %q", message)
			}
			return
		}
		if duplicates(message, len(fields)) {
			return // encoding/json takes the last, we refuse when any is wrong
		}
		var want Frame
		ok := true
		op, has := fields["op"]
		n, e := strconv.Atoi(string(op))
		ok = ok && has && e == nil && n >= 0
		want.Op = n
		if s, has := fields["s"]; has && string(s) != "null" {
			want.S, e = strconv.ParseUint(string(s), 10, 53)
			ok = ok && e == nil
		}
		if v, has := fields["t"]; has && string(v) != "null" {
			var s string
			ok = ok && json.Unmarshal(v, &s) == nil
			want.Type = []byte(s)
		}
		if ok != (err == nil) {
			t.Fatalf("%q: accepted is %v (%v), want %v", message, err == nil, err, ok)
		}
		if !ok {
			return
		}
		if got.Op != want.Op || got.S != want.S || !bytes.Equal(got.Data, fields["d"]) {
			t.Fatalf("%q: got %+v", message, got)
		}
		// encoding/json mends invalid UTF-8, we leave it.
		if utf8.Valid(message) && !bytes.Equal(got.Type, want.Type) {
			t.Fatalf("%q: type %q, want %q", message, got.Type, want.Type)
		}
	})
}

func duplicates(message []byte, keys int) bool {
	n := 0
	_ = Fields(message, func(_, _ []byte) { n++ })
	return n != keys
}

func BenchmarkParse(b *testing.B) {
	message := []byte(`{"t":"MESSAGE_CREATE","s":4242,"op":0,"d":{"id":"1234567890123456789","content":"` +
		string(bytes.Repeat([]byte("x"), 200)) + `","author":{"id":"1","username":"load"},"mentions":[],"tts":false}}`)
	b.SetBytes(int64(len(message)))
	for b.Loop() {
		if _, err := Parse(message); err != nil {
			b.Fatal(err)
		}
	}
}
