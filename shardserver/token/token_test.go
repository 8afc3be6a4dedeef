package token

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// Keys of the tests: b follows a.
const (
	keyA = "a.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	keyB = "deadbeef.BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBA"
)

var (
	now    = time.Unix(1_700_000_000, 0)
	anyone = Claims{User: 175928847299117063, Name: "anyone", Expires: now.Add(time.Hour)}
)

func keys(t testing.TB, current, previous string) *Keys {
	t.Helper()
	k, err := ParseKeys(current, previous)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func issue(t testing.TB, k *Keys, c Claims) string {
	t.Helper()
	s, err := k.Issue(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var drawUser = rapid.Custom(func(t *rapid.T) snowflake.ID {
	return snowflake.ID(rapid.Uint64Range(1e16, 1e19-1).Draw(t, "user"))
})

func TestWhatATokenSaysComesBack(t *testing.T) {
	k := keys(t, keyB, keyA)
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringN(1, -1, MaxNameLength).Draw(t, "name")
		c := Claims{User: drawUser.Draw(t, "id"), Name: name, Bot: rapid.Bool().Draw(t, "bot"), Publish: rapid.Bool().Draw(t, "publish")}
		if rapid.Bool().Draw(t, "expires") {
			c.Expires = now.Add(time.Duration(rapid.Int64Range(1, 1e9).Draw(t, "seconds")) * time.Second)
		}
		token, err := k.Issue(c)
		if err != nil {
			t.Fatal(err)
		}
		prefix := rapid.SampledFrom([]string{"", "Bot ", "Bearer "}).Draw(t, "prefix")
		if got, err := k.Verify(prefix+token, now); err != nil || got != c {
			t.Fatalf("got %+v, %v, issued %+v", got, err, c)
		}
	})
}

func TestWhatASessionIDHoldsComesBack(t *testing.T) {
	k := keys(t, keyB, keyA)
	rapid.Check(t, func(t *rapid.T) {
		s := Session{
			Base: rapid.Uint64().Draw(t, "base"), User: snowflake.ID(rapid.Uint64().Draw(t, "user")), Random: rapid.Uint64().Draw(t, "random"),
			Intents: rapid.Uint64().Draw(t, "intents"), Capabilities: rapid.Uint64().Draw(t, "capabilities"),
			Issued: time.Unix(int64(rapid.Uint32().Draw(t, "issued")), 0),
		}
		copy(s.Log[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "log"))
		id := k.Seal(s)
		if len(id) > MaxSessionIDSize {
			t.Fatalf("%d characters", len(id))
		}
		if got, err := k.Open(id); err != nil || got != s {
			t.Fatalf("got %+v, %v, sealed %+v", got, err, s)
		}
		if id == k.Seal(s) {
			t.Fatal("two session ids are the same")
		}
	})
}

// changes are all texts that differ from s in one place: a byte replaced, removed or put in.
func changes(s string) (list []string) {
	for i := range len(s) + 1 {
		for _, b := range []byte("Aa09-_.=\n\r \x00\xff") {
			list = append(list, s[:i]+string([]byte{b})+s[i:])
			if i < len(s) && s[i] != b {
				list = append(list, s[:i]+string([]byte{b})+s[i+1:])
			}
		}
		if i < len(s) {
			list = append(list, s[:i]+s[i+1:], s[:i]+string([]byte{s[i] ^ 1})+s[i+1:], s[:i]+string([]byte{s[i] + 1})+s[i+1:])
		}
	}
	return list
}

func TestWhatWasTamperedWithIsRefused(t *testing.T) {
	k := keys(t, keyB, keyA)
	token, id := issue(t, k, anyone), k.Seal(Session{User: anyone.User})
	for _, changed := range changes(token) {
		if c, err := k.Verify(changed, now); err == nil {
			t.Errorf("token %q passes for %q: %+v", changed, token, c)
		}
	}
	for _, changed := range changes(id) {
		if _, err := k.Open(changed); !errors.Is(err, ErrSession) {
			t.Errorf("session id %q passes for %q: %v", changed, id, err)
		}
	}
}

func TestVerify(t *testing.T) {
	before, after := keys(t, keyA, ""), keys(t, keyB, keyA)
	later := keys(t, "c"+keyA[1:], keyB)
	forged := keys(t, "deadbeef"+keyA[1:], "")
	for sentence, c := range map[string]struct {
		token string
		keys  *Keys
		now   time.Time
		want  error
	}{
		"the current key's token is accepted":          {issue(t, after, anyone), after, now, nil},
		"the previous key's token is accepted":         {issue(t, before, anyone), after, now, nil},
		"the key before that is unknown":               {issue(t, before, anyone), later, now, ErrUnknownKey},
		"the next key is unknown":                      {issue(t, after, anyone), before, now, ErrUnknownKey},
		"the same key id with another secret fails":    {issue(t, forged, anyone), after, now, ErrSignature},
		"a token is valid until it expires":            {issue(t, after, anyone), after, now.Add(time.Hour - 1), nil},
		"a token is not valid from its expiry on":      {issue(t, after, anyone), after, now.Add(time.Hour), ErrExpired},
		"an expiry in 1970 is not never":               {issue(t, after, Claims{User: anyone.User, Name: "x", Expires: time.Unix(0, 0)}), after, now, ErrExpired},
		"no expiry is never":                           {issue(t, after, Claims{User: anyone.User, Name: "x"}), after, now.AddDate(500, 0, 0), nil},
		"a session id is no token":                     {after.Seal(Session{}), after, now, ErrMalformed},
		"a token that is too long is not looked at":    {strings.Repeat("a", maxTokenSize) + "." + issue(t, after, anyone), after, now, ErrMalformed},
		"the empty text is malformed":                  {"", after, now, ErrMalformed},
		"two parts are malformed":                      {"a.b", after, now, ErrMalformed},
		"claims that are no JSON object are malformed": {"MQ.W10.AA", after, now, ErrMalformed},
	} {
		t.Run(sentence, func(t *testing.T) {
			if _, err := c.keys.Verify(c.token, c.now); !errors.Is(err, c.want) {
				t.Errorf("got %v, expected %v", err, c.want)
			}
		})
	}
}

func TestOpen(t *testing.T) {
	before, after := keys(t, keyA, ""), keys(t, keyB, keyA)
	later := keys(t, "c"+keyA[1:], keyB)
	s := Session{Log: guildlog.ID{1}, User: anyone.User, Issued: now}
	id := before.Seal(s)
	for sentence, c := range map[string]struct {
		id   string
		keys *Keys
		want error
	}{
		"the current key's session id is accepted":       {id, before, nil},
		"the previous key's session id is accepted":      {id, after, nil},
		"the key before that is unknown":                 {id, later, ErrSession},
		"another key's id does not pass for this one's":  {"deadbeef" + id[1:], after, ErrSession},
		"a token is no session id":                       {issue(t, before, anyone), before, ErrSession},
		"a session id that is too long is not looked at": {id + strings.Repeat("A", MaxSessionIDSize+1-len(id)), before, ErrSession},
		"a key id alone is refused":                      {"a", before, ErrSession},
		"a nonce alone is refused":                       {"a." + strings.Repeat("A", 16), before, ErrSession},
		"the empty text is refused":                      {"", before, ErrSession},
	} {
		t.Run(sentence, func(t *testing.T) {
			got, err := c.keys.Open(c.id)
			if !errors.Is(err, c.want) || err == nil && got != s {
				t.Errorf("got %+v, %v, expected %v", got, err, c.want)
			}
		})
	}
}

func TestIssueRefusesWhatVerifyWould(t *testing.T) {
	k := keys(t, keyA, "")
	for sentence, c := range map[string]Claims{
		"no user":                          {Name: "x"},
		"a user id that is no snowflake":   {User: 42, Name: "x"},
		"no name":                          {User: anyone.User},
		"a name that is too long":          {User: anyone.User, Name: strings.Repeat("x", MaxNameLength+1)},
		"a name that is not encoded right": {User: anyone.User, Name: "x\xff"},
	} {
		t.Run(sentence, func(t *testing.T) {
			if token, err := k.Issue(c); err == nil {
				t.Errorf("issued %s", token)
			}
		})
	}
	longest := Claims{User: 1e19 - 1, Name: strings.Repeat("<", MaxNameLength), Bot: true, Publish: true, Expires: time.Unix(1<<62, 0)}
	if got, err := k.Verify(issue(t, k, longest), now); err != nil || got.Name != longest.Name {
		t.Errorf("the longest token: %v", err)
	}
}

func TestKeySets(t *testing.T) {
	for sentence, c := range map[string]struct {
		current, previous string
		ok                bool
	}{
		"a current key is enough":                    {keyA, "", true},
		"white space around keys is no harm":         {" " + keyA + "\n", "\n" + keyB + "\n", true},
		"a generated key is a key":                   {GenerateKey(), GenerateKey(), true},
		"a current key is needed":                    {"", keyA, false},
		"two keys need two ids":                      {keyA, keyA, false},
		"a key id is lower-case hexadecimal":         {"A" + keyA[1:], "", false},
		"a key id has at most 8 digits":              {"123456789" + keyA[1:], "", false},
		"a short secret is refused":                  {keyA[:len(keyA)-1], "", false},
		"a secret has one form":                      {keyA[:len(keyA)-1] + "B", "", false},
		"a previous key that is no key is an error":  {keyA, "x", false},
		"a key without a point between is no key":    {strings.ReplaceAll(keyA, ".", ""), "", false},
		"a secret with padding is not what we write": {keyA + "=", "", false},
	} {
		t.Run(sentence, func(t *testing.T) {
			if _, err := ParseKeys(c.current, c.previous); (err == nil) != c.ok {
				t.Errorf("parsing: %v", err)
			}
			dir := t.TempDir()
			for name, key := range map[string]string{CurrentKey: c.current, PreviousKey: c.previous} {
				if key == "" {
					continue
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(key), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := LoadKeys(dir); (err == nil) != c.ok {
				t.Errorf("loading: %v", err)
			}
		})
	}
}

// FuzzVerify: what Verify accepts it does not accept with a letter changed.
func FuzzVerify(f *testing.F) {
	k := keys(f, keyB, keyA)
	for _, seed := range []string{
		issue(f, k, anyone), "Bot " + issue(f, keys(f, keyA, ""), anyone), "", "..",
		"MTc1OTI4ODQ3Mjk5MTE3MDYz.e30.AA", "MTc1OTI4ODQ3Mjk5MTE3MDYz.eyJrIjoiYSJ9.AA",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if _, err := k.Verify(token, now); err != nil {
			return
		}
		for _, changed := range changes(strings.TrimPrefix(strings.TrimPrefix(token, "Bot "), "Bearer ")) {
			if c, err := k.Verify(changed, now); err == nil {
				t.Errorf("%q passes for %q: %+v", changed, token, c)
			}
		}
	})
}

// FuzzOpen: what Open accepts is short enough, and it does not accept it with a letter changed.
func FuzzOpen(f *testing.F) {
	k := keys(f, keyB, keyA)
	for _, seed := range []string{
		k.Seal(Session{}), keys(f, keyA, "").Seal(Session{User: anyone.User, Issued: now}),
		"", "a.", "deadbeef." + strings.Repeat("A", 119),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, id string) {
		if _, err := k.Open(id); err != nil {
			return
		}
		if len(id) > MaxSessionIDSize {
			t.Errorf("%q has %d characters", id, len(id))
		}
		for _, changed := range changes(id) {
			if s, err := k.Open(changed); err == nil {
				t.Errorf("%q passes for %q: %+v", changed, id, s)
			}
		}
	})
}
