package protocol

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"guildhall.dev/guildhall/shardserver/snowflake"
)

func TestWithoutContent(t *testing.T) {
	for name, test := range map[string]struct{ whole, bare string }{
		"what users write is empty, the rest stays as it is and where it is": {
			`{"id":"7","content":"hi","embeds":[{"a":1}],"tts":false,"attachments":[{}],"n":1.50,"components":[[]]}`,
			`{"id":"7","content":"","embeds":[],"tts":false,"attachments":[],"n":1.50,"components":[]}`,
		},
		"what is missing is not added":            {`{"id":"7","flags":4}`, `{"id":"7","flags":4}`},
		"a message without anything":              {`{}`, `{}`},
		"what is empty is the same":               {`{"content":"","embeds":[]}`, `{"content":"","embeds":[]}`},
		"a poll is left out at the end":           {`{"id":"7","poll":{"question":{"text":"?"}}}`, `{"id":"7"}`},
		"a poll is left out at the beginning":     {`{"poll":{"a":[1,2]},"id":"7"}`, `{"id":"7"}`},
		"a poll is left out in between":           {`{"id":"7","poll":null,"n":1}`, `{"id":"7","n":1}`},
		"a poll is all there is":                  {`{"poll":"?"}`, `{}`},
		"a poll that is there again":              {`{"poll":1,"poll":2,"id":"7","poll":3}`, `{"id":"7"}`},
		"content that is there again":             {`{"content":"","content":"hi"}`, `{"content":"","content":""}`},
		"content under an escaped name":           {`{"c\u006fntent":"hi","\u0070oll":1}`, `{"c\u006fntent":""}`},
		"content with quotes and brackets":        {`{"content":"\"}]\\","x":"\\\"{[,:"}`, `{"content":"","x":"\\\"{[,:"}`},
		"odd types":                               {`{"content":null,"embeds":"x","attachments":{"a":1},"components":7}`, `{"content":"","embeds":[],"attachments":[],"components":[]}`},
		"content of something else is not its":    {`{"member":{"content":"x","poll":1}}`, `{"member":{"content":"x","poll":1}}`},
		"a message that is replied to":            {`{"referenced_message":{"content":"hi","poll":{},"id":"6"}}`, `{"referenced_message":{"content":"","id":"6"}}`},
		"a message that is replied to and gone":   {`{"referenced_message":null,"content":"hi"}`, `{"referenced_message":null,"content":""}`},
		"messages that are forwarded":             {`{"message_snapshots":[{"message":{"content":"hi","embeds":[1]}},{"message":{}}]}`, `{"message_snapshots":[{"message":{"content":"","embeds":[]}},{"message":{}}]}`},
		"a forwarded message that is replied to":  {`{"referenced_message":{"message_snapshots":[{"message":{"content":"hi"}}]}}`, `{"referenced_message":{"message_snapshots":[{"message":{"content":""}}]}}`},
		"odd messages in a message":               {`{"message_snapshots":{"content":"hi"},"referenced_message":[[{"content":"hi"}],3,"x"]}`, `{"message_snapshots":{"content":""},"referenced_message":[[{"content":""}],3,"x"]}`},
		"what a rule has found":                   {`{"user_id":"5","content":"hi","matched_keyword":"h","matched_content":"h"}`, `{"user_id":"5","content":"","matched_keyword":"h","matched_content":""}`},
		"what a rule has found without a keyword": {`{"content":"hi","matched_keyword":null,"matched_content":null}`, `{"content":"","matched_keyword":null,"matched_content":""}`},
	} {
		t.Run(name, func(t *testing.T) {
			got, readers := WithoutContent([]byte(test.whole))
			if got == nil {
				got = []byte(test.whole)
			} else if string(got) == test.whole {
				t.Error("the same, and made anew")
			}
			if string(got) != test.bare || readers != nil {
				t.Errorf("%s\nbecomes  %s, for all but %v\nexpected %s", test.whole, got, readers, test.bare)
			}
		})
	}
}

// TestWithoutContentOfTheDeepest: time rises with the size alone, whatever is in it.
func TestWithoutContentOfTheDeepest(t *testing.T) {
	const depth = 9000
	deep := strings.Repeat(`{"referenced_message":`, depth) + `{"content":"hi"}` + strings.Repeat("}", depth)
	began := time.Now()
	got, _ := WithoutContent([]byte(deep))
	if want := strings.Replace(deep, "hi", "", 1); string(got) != want {
		t.Error("not as expected")
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("took %v", took)
	}
}

func TestWhoReadsWithoutTheIntent(t *testing.T) {
	id := func(n int) string { return fmt.Sprintf(`{"id":"20000000000000000%d"}`, n) }
	for name, test := range map[string]struct {
		fields string
		want   []int
	}{
		"who wrote it":                    {`"author":` + id(1), []int{1}},
		"who is mentioned, and who wrote": {`"mentions":[` + id(2) + `,` + id(3) + `],"author":` + id(1), []int{2, 3, 1}},
		"nobody":                          {`"id":"7"`, nil},
		"not who wrote what it replies to, nor who is mentioned there": {
			`"referenced_message":{"author":` + id(1) + `,"mentions":[` + id(2) + `]},"author":` + id(3), []int{3},
		},
		"not who is a member under another name": {`"member":{"user":` + id(1) + `,"author":` + id(2) + `}`, nil},
		"an author who is null":                  {`"author":null,"mentions":[` + id(2) + `]`, []int{2}},
		"an author who is no object":             {`"author":"x","mentions":[` + id(2) + `]`, []int{2}},
		"an author with an odd id":               {`"author":{"id":5},"mentions":[` + id(2) + `]`, []int{2}},
		"an author without an id":                {`"author":{},"mentions":[` + id(2) + `]`, []int{2}},
		"mentions that are null":                 {`"mentions":null,"author":` + id(1), []int{1}},
		"mentions that are no list":              {`"mentions":"x","author":` + id(1), []int{1}},
		"mentions that are one user":             {`"mentions":` + id(2), []int{2}},
		"odd ones among the mentions": {
			`"mentions":[null,3,"x",[],{"id":null},{"id":"none"},{"id":"0"},` + id(3) + `],"author":` + id(1), []int{3, 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var want []snowflake.ID
			for _, n := range test.want {
				want = append(want, snowflake.ID(200000000000000000+uint64(n)))
			}
			if _, got := WithoutContent([]byte(`{"content":"hi",` + test.fields + `}`)); !slices.Equal(got, want) {
				t.Errorf("%v of %s, expected %v", got, test.fields, want)
			}
			if bare, got := WithoutContent([]byte(`{"content":"",` + test.fields + `}`)); bare != nil || got != nil {
				t.Errorf("%s and %v of a message that says nothing", bare, got)
			}
		})
	}
}

func FuzzWithoutContent(f *testing.F) {
	for _, body := range []string{
		`{"content":"hi","embeds":[{}],"poll":{},"author":{"id":"200000000000000001"},"mentions":[{"id":"200000000000000002"}]}`,
		`{"referenced_message":{"content":"\\\""},"message_snapshots":[{"message":{"components":[1,[2],{}]}}]}`,
		`{"poll":1,"c\u006fntent":"x"}`, `{"mentions":{"id":3},"author":[]}`, `[{"content":1},2]`, `[}`, `{"a`, `{"poll":`, `{"poll":1,"author":`, `{"poll":1,"mentions":[`, `"\`, ``,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		WithoutContent(data) // never panics
		var compact bytes.Buffer
		if json.Compact(&compact, data) != nil {
			return
		}
		bare, _ := WithoutContent(compact.Bytes())
		if bare == nil {
			bare = compact.Bytes()
		} else if again, _ := WithoutContent(bare); again != nil {
			t.Errorf("%s, then %s", bare, again)
		}
		got, want := encoded(t, decoded(t, bare)), encoded(t, blanked(decoded(t, data)))
		if got != want {
			t.Errorf("%s\nbecomes  %s\nexpected %s", data, got, want)
		}
	})
}

// blanked is what WithoutContent is to make of a body, done another way.
func blanked(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = blanked(v[i])
		}
	case map[string]any:
		delete(v, "poll")
		for name := range v {
			switch name {
			case "content", "matched_content":
				v[name] = ""
			case "embeds", "attachments", "components":
				v[name] = []any{}
			case "referenced_message", "message_snapshots", "message":
				v[name] = blanked(v[name])
			}
		}
	}
	return v
}

func decoded(t *testing.T, data []byte) (v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	return v
}

func encoded(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
