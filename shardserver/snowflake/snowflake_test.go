package snowflake

import (
	"encoding/json"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestIDsRise: whatever the clock does, ids rise, and are of the clock's millisecond or later.
func TestIDsRise(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.UnixMilli(rapid.Int64Range(0, 4e12).Draw(t, "start"))
		source := Source{Now: func() time.Time { return now }}
		last := source.Next()
		for _, step := range rapid.SliceOf(rapid.Int64Range(-1e6, 1e6)).Draw(t, "steps in ms") {
			now = now.Add(time.Duration(step) * time.Millisecond)
			id := source.Next()
			if id <= last {
				t.Fatalf("%d follows %d", id, last)
			}
			if now.UnixMilli() >= Epoch && id.Time().Before(now) {
				t.Fatalf("%d is of %s, made at %s", id, id.Time(), now)
			}
			last = id
		}
	})
}

func TestIDsOfManyGoroutinesAreDistinctAndRiseForEach(t *testing.T) {
	const goroutines, each = 8, 2000
	var source Source
	var all [goroutines][]ID
	var running sync.WaitGroup
	for i := range all {
		running.Go(func() {
			for range each {
				all[i] = append(all[i], source.Next())
			}
		})
	}
	running.Wait()
	for _, ids := range all {
		if !slices.IsSorted(ids) {
			t.Error("ids of one goroutine fall")
		}
	}
	ids := slices.Concat(all[:]...)
	slices.Sort(ids)
	if n := len(slices.Compact(ids)); n != goroutines*each {
		t.Errorf("%d distinct ids of %d", n, goroutines*each)
	}
}

func TestParse(t *testing.T) {
	for sentence, c := range map[string]struct {
		text string
		want ID
	}{
		"the documentation's example is read": {"175928847299117063", 175928847299117063},
		"17 digits are enough":                {"10000000000000000", 1e16},
		"19 digits are not too many":          {"9999999999999999999", 9999999999999999999},
		"16 digits are refused":               {"9999999999999999", 0},
		"20 digits are refused":               {"18446744073709551615", 0},
		"a leading zero is refused":           {"017592884729911706", 0},
		"a sign is refused":                   {"+17592884729911706", 0},
		"an underscore is refused":            {"17592_8847299117063", 0},
		"the empty text is refused":           {"", 0},
	} {
		t.Run(sentence, func(t *testing.T) {
			id, err := Parse(c.text)
			if id != c.want || (err == nil) != (c.want != 0) {
				t.Errorf("got %d, %v", id, err)
			}
			if err == nil && id.String() != c.text {
				t.Errorf("written as %s", id)
			}
		})
	}
	if at := ID(175928847299117063).Time().UTC(); at.Format(time.RFC3339Nano) != "2016-04-30T11:18:25.796Z" {
		t.Errorf("the example was made at %s", at)
	}
}

func TestJSONIsAString(t *testing.T) {
	in := map[ID][]ID{175928847299117063: {175928847299117064}}
	text, err := json.Marshal(in)
	if err != nil || string(text) != `{"175928847299117063":["175928847299117064"]}` {
		t.Fatalf("%s, %v", text, err)
	}
	var out map[ID][]ID
	if err := json.Unmarshal(text, &out); err != nil || out[175928847299117063][0] != 175928847299117064 {
		t.Fatalf("%v, %v", out, err)
	}
	var id ID
	if json.Unmarshal([]byte(`175928847299117063`), &id) == nil {
		t.Error("a number was accepted")
	}
}
