package audit

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// record is a record of the model's log.
type record struct {
	number uint64
	ours   bool
	event  Event
	acked  bool
}

// received is a frame that a session of the model got.
type received struct {
	record
	damaged bool
	told    bool
}

type modelSession struct {
	base   uint64
	frames []received
	ends   bool
}

// judge is the audit as a list and a set would do it.
func judge(log []record, sessions []modelSession, complete bool) (v Verdict) {
	var last uint64
	for _, r := range log {
		if r.ours && r.acked {
			last = r.number
		}
	}
	for _, s := range sessions {
		seen := map[uint64]bool{}
		pos := s.base
		for _, f := range s.frames {
			n := f.number
			switch {
			case f.told:
			case !f.ours && n == pos:
				v.Doubled++
			case !f.ours && n < pos:
				v.Reordered++
			case !f.ours:
			case seen[n]:
				v.Doubled++
			default:
				v.Deliveries++
				if n < pos {
					v.Reordered++
				}
				if f.damaged {
					v.Corrupted++
				}
				if n > s.base {
					seen[n] = true
				}
			}
			pos = max(pos, n)
		}
		end := pos
		if complete && !s.ends {
			end = max(pos, last)
		}
		for _, r := range log {
			if r.ours && r.acked && s.base < r.number && r.number <= end && !seen[r.number] {
				v.Lost++
			}
		}
	}
	return v
}

func TestAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// The log: ours and others' records, with holes.
		var log []record
		counts := map[uint32]uint32{}
		number := uint64(2)
		for range rapid.IntRange(0, 30).Draw(t, "records") {
			number += rapid.Uint64Range(1, 3).Draw(t, "step")
			r := record{number: number, ours: rapid.IntRange(0, 4).Draw(t, "ours") > 0}
			if r.ours {
				p := rapid.Uint32Range(0, 1).Draw(t, "publisher")
				r.event = Event{Publisher: p, Count: counts[p]}
				counts[p]++
				r.acked = rapid.IntRange(0, 9).Draw(t, "acked") > 0
			}
			log = append(log, r)
		}

		// The sessions, each with faults of its own or none.
		sessions := make([]modelSession, rapid.IntRange(1, 4).Draw(t, "sessions"))
		for i := range sessions {
			s := &sessions[i]
			from := rapid.IntRange(0, len(log)).Draw(t, "from")
			to := rapid.IntRange(from, len(log)).Draw(t, "to")
			s.ends = to < len(log) && rapid.Bool().Draw(t, "ends")
			s.base = 2
			if from > 0 {
				s.base = log[from-1].number
			}
			faulty := rapid.Bool().Draw(t, "faulty")
			for j := from; j < to; j++ {
				f := received{record: log[j]}
				fault := "none"
				if faulty {
					fault = rapid.SampledFrom([]string{"none", "none", "none", "drop", "double", "swap", "damage", "late double", "stale"}).Draw(t, "fault")
				}
				switch fault {
				case "drop":
				case "double":
					s.frames = append(s.frames, f, f)
				case "swap":
					if j+1 < to {
						s.frames = append(s.frames, received{record: log[j+1]}, f)
						j++
					}
				case "damage":
					f.damaged = f.ours
					s.frames = append(s.frames, f)
				case "late double":
					s.frames = append(s.frames, f)
					if old := s.frames[rapid.IntRange(0, len(s.frames)-1).Draw(t, "old")]; old.ours {
						s.frames = append(s.frames, old)
					}
				case "stale":
					s.frames = append(s.frames, f)
					if from > 1 {
						if r := log[rapid.IntRange(0, from-2).Draw(t, "stale")]; r.ours {
							s.frames = append(s.frames, received{record: r})
						}
					}
				default:
					s.frames = append(s.frames, f)
					if rapid.IntRange(0, 9).Draw(t, "told") == 0 {
						pos := s.base
						for _, f := range s.frames {
							pos = max(pos, f.number)
						}
						s.frames = append(s.frames, received{record: record{number: pos}, told: true})
					}
				}
			}
		}

		// All of it happens in any order that keeps each party's own.
		a := New()
		var parties []func() bool
		for i, s := range sessions {
			var session *Session
			next := 0
			parties = append(parties, func() bool {
				if session == nil {
					session = a.Session(fmt.Sprint("s", i), "all", 0)
					session.Told(s.base - 1)
					session.Snapshot(s.base)
				}
				if next == len(s.frames) {
					if s.ends {
						session.End()
					}
					return false
				}
				feed(session, s.frames[next])
				next++
				return true
			})
		}
		for _, r := range log {
			if r.ours {
				a.Publish(r.event)
			}
		}
		acks := slices.DeleteFunc(slices.Clone(log), func(r record) bool { return !r.acked })
		parties = append(parties, func() bool {
			if len(acks) == 0 {
				return false
			}
			a.Acknowledge(acks[0].event, acks[0].number)
			acks = acks[1:]
			return true
		})
		for len(parties) > 0 {
			i := rapid.IntRange(0, len(parties)-1).Draw(t, "party")
			if !parties[i]() {
				parties = slices.Delete(parties, i, i+1)
			}
		}

		for _, complete := range []bool{false, true} {
			got := a.Verdict(complete)
			if got.Clean() != (len(got.Problems) == 0) {
				t.Fatalf("clean is %v with problems %q", got.Clean(), got.Problems)
			}
			if len(got.Problems) > maxProblems+1 {
				t.Fatalf("%d problems", len(got.Problems))
			}
			problems := got.Problems
			got.Problems = nil
			if diff := cmp.Diff(judge(log, sessions, complete), got); diff != "" {
				t.Fatalf("complete %v (-model +audit):\n%s%q", complete, diff, problems)
			}
		}
	})
}

func feed(s *Session, f received) {
	body := f.number * 7919
	switch {
	case f.told:
		s.Told(f.number)
	case f.damaged:
		s.Damaged(f.number)
	case f.ours:
		s.Event(f.number, f.event, body)
	default:
		s.Other(f.number, 1, body)
	}
}

// TestNumbers has the faults that the model lacks: numbers that are not the event's own.
func TestNumbers(t *testing.T) {
	event := func(n uint32) Event { return Event{Count: n} }
	for _, test := range []struct {
		name string
		do   func(a *Auditor, s, other *Session)
		want Verdict
	}{
		{"another number than other sessions", func(_ *Auditor, s, other *Session) {
			s.Event(11, event(0), 1)
			other.Event(12, event(0), 1)
		}, Verdict{Deliveries: 2, Reordered: 1}},
		{"another number than acknowledged", func(a *Auditor, s, other *Session) {
			a.Acknowledge(event(0), 11)
			s.Event(11, event(0), 1)
			other.Event(12, event(0), 1)
		}, Verdict{Deliveries: 2, Reordered: 1, Lost: 1}},
		{"acknowledged later as another number", func(a *Auditor, s, other *Session) {
			s.Event(12, event(0), 1)
			other.Event(12, event(0), 1)
			a.Acknowledge(event(0), 11)
		}, Verdict{Deliveries: 2, Reordered: 1, Lost: 2}},
		{"appended twice", func(a *Auditor, s, other *Session) {
			a.Acknowledge(event(0), 11)
			for _, s := range []*Session{s, other} {
				s.Event(11, event(0), 1)
				s.Event(12, event(0), 1)
			}
		}, Verdict{Deliveries: 4, Doubled: 2}},
		{"one number acknowledged twice", func(a *Auditor, _, _ *Session) {
			a.Acknowledge(event(0), 5)
			a.Acknowledge(event(1), 5)
		}, Verdict{Reordered: 1}},
		{"one number for two events, of which one was never acknowledged", func(a *Auditor, s, other *Session) {
			s.Event(11, event(0), 1)
			other.Event(11, event(0), 1)
			a.Acknowledge(event(1), 11)
		}, Verdict{Deliveries: 2, Reordered: 1}},
		{"acknowledged again, as before", func(a *Auditor, s, other *Session) {
			a.Acknowledge(event(0), 11)
			s.Event(11, event(0), 1)
			other.Event(11, event(0), 1)
			a.Acknowledge(event(0), 11)
		}, Verdict{Deliveries: 2}},
		{"acknowledged again, as another number", func(a *Auditor, _, _ *Session) {
			a.Acknowledge(event(0), 5)
			a.Acknowledge(event(0), 6)
		}, Verdict{Reordered: 1}},
		{"refused", func(a *Auditor, _, _ *Session) {
			a.Refuse(event(0))
		}, Verdict{}},
		{"refused, but appended", func(a *Auditor, s, _ *Session) {
			a.Refuse(event(0))
			s.Event(11, event(0), 1)
		}, Verdict{Deliveries: 1, Refuted: 1}},
		{"appended, then refused", func(a *Auditor, s, _ *Session) {
			s.Event(11, event(0), 1)
			a.Refuse(event(0))
		}, Verdict{Deliveries: 1, Refuted: 1}},
		{"never published", func(_ *Auditor, s, _ *Session) {
			s.Event(11, event(99), 1)
			s.Event(12, Event{Publisher: 9}, 1)
		}, Verdict{Deliveries: 2, Corrupted: 2}},
		{"acknowledged, never published", func(a *Auditor, _, _ *Session) {
			a.Acknowledge(event(99), 5)
		}, Verdict{Reordered: 1}},
		{"two bodies", func(_ *Auditor, s, other *Session) {
			s.Event(11, event(0), 1)
			other.Event(11, event(0), 2)
			s.Other(12, 1, 1)
			other.Other(12, 1, 2)
		}, Verdict{Deliveries: 2, Corrupted: 2}},
		{"publisher's order", func(_ *Auditor, s, other *Session) {
			for _, s := range []*Session{s, other} {
				s.Event(11, event(1), 1)
				s.Event(12, event(0), 1)
			}
		}, Verdict{Deliveries: 4, Reordered: 1}},
		{"number told before its event", func(_ *Auditor, s, _ *Session) {
			s.Told(11)
			s.Event(11, event(0), 1)
		}, Verdict{Deliveries: 1, Reordered: 1}},
		{"number told before its event, which comes twice", func(_ *Auditor, s, _ *Session) {
			s.Told(11)
			s.Event(11, event(0), 1)
			s.Event(11, event(0), 1)
		}, Verdict{Deliveries: 1, Reordered: 1, Doubled: 1}},
		{"an event of the snapshot as another number", func(a *Auditor, s, _ *Session) {
			a.Acknowledge(event(0), 10)
			s.Event(11, event(0), 1)
		}, Verdict{Deliveries: 1, Reordered: 1}},
		{"number told falls", func(_ *Auditor, s, _ *Session) {
			s.Event(11, event(0), 1)
			s.Told(10)
		}, Verdict{Deliveries: 1, Reordered: 1}},
		{"told past an acknowledged event", func(a *Auditor, s, other *Session) {
			a.Acknowledge(event(0), 11)
			s.Told(11)
			other.Event(11, event(0), 1)
		}, Verdict{Deliveries: 1, Lost: 1}},
		{"another event in its place", func(a *Auditor, s, other *Session) {
			a.Acknowledge(event(0), 11)
			s.Other(11, 5, 5)
			other.Event(11, event(0), 1)
		}, Verdict{Deliveries: 1, Lost: 1}},
		{"two types at one number", func(_ *Auditor, s, _ *Session) {
			s.Other(11, 5, 5)
			s.Event(11, event(0), 1)
			s.Other(11, 6, 5)
		}, Verdict{Deliveries: 1}},
		{"no duty after the end", func(a *Auditor, s, other *Session) {
			s.End()
			other.Event(11, event(0), 1)
			a.Acknowledge(event(0), 11)
		}, Verdict{Deliveries: 1}},
		{"before the snapshot", func(a *Auditor, _, _ *Session) {
			s := a.Session("new", "all", 0)
			s.Event(11, event(0), 1)
		}, Verdict{Reordered: 1}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := New()
			a.Publish(event(2))
			s, other := a.Session("one", "all", 0), a.Session("two", "all", 0)
			s.Snapshot(10)
			other.Snapshot(10)
			// What is acknowledged and not fed to a session is lost to it only when this
			// session came that far.
			test.do(a, s, other)
			got := a.Verdict(false)
			if got.Clean() != (len(got.Problems) == 0) {
				t.Errorf("clean is %v with problems %q", got.Clean(), got.Problems)
			}
			problems := got.Problems
			got.Problems = nil
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s%q", diff, problems)
			}
		})
	}
}

// TestDurable has what is a fault where the log survives its server, and is none elsewhere.
func TestDurable(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(a *Auditor, s *Session)
		want Verdict // with NewDurable
	}{
		{"a session is invalidated", func(_ *Auditor, s *Session) {
			s.Invalidated("op 9")
		}, Verdict{Invalidated: 1}},
		{"a session is invalidated, and told again", func(_ *Auditor, s *Session) {
			s.Invalidated("close 4007")
			s.Invalidated("READY of another")
		}, Verdict{Invalidated: 1}},
		{"a session has left", func(_ *Auditor, s *Session) {
			s.End()
			s.Invalidated("op 9")
		}, Verdict{}},
		{"a new session begins before what was acknowledged", func(a *Auditor, _ *Session) {
			a.Acknowledge(Event{}, 12)
			a.Session("new", "all", a.Last()).Snapshot(11)
		}, Verdict{Reordered: 1}},
		{"a new session begins where it was acknowledged", func(a *Auditor, _ *Session) {
			a.Acknowledge(Event{}, 12)
			a.Session("new", "all", a.Last()).Snapshot(12)
		}, Verdict{}},
		{"acknowledged while a new session begins", func(a *Auditor, _ *Session) {
			s := a.Session("new", "all", a.Last())
			a.Acknowledge(Event{}, 12)
			s.Snapshot(11)
		}, Verdict{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, a := range []*Auditor{NewDurable(), New()} {
				a.Publish(Event{})
				s := a.Session("one", "all", 0)
				s.Snapshot(10)
				test.do(a, s)
				got := a.Verdict(false)
				if got.Clean() != (len(got.Problems) == 0) {
					t.Errorf("clean is %v with problems %q", got.Clean(), got.Problems)
				}
				problems := got.Problems
				got.Problems = nil
				want := Verdict{}
				if a.durable {
					want = test.want
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("durable %v (-want +got):\n%s%q", a.durable, diff, problems)
				}
			}
		})
	}
}

// TestClean says that each count alone makes a verdict unclean.
func TestClean(t *testing.T) {
	if !(Verdict{Deliveries: 1}).Clean() {
		t.Error("deliveries are no fault")
	}
	for _, v := range []Verdict{{Lost: 1}, {Doubled: 1}, {Reordered: 1}, {Corrupted: 1}, {Refuted: 1}, {Invalidated: 1}} {
		if v.Clean() {
			t.Errorf("%+v is clean", v)
		}
	}
}

func BenchmarkEvent(b *testing.B) {
	a := New()
	sessions := make([]*Session, 1000)
	for i := range sessions {
		sessions[i] = a.Session("s", "all", 0)
		sessions[i].Snapshot(2)
	}
	n, i := uint32(0), len(sessions)
	for b.Loop() {
		if i == len(sessions) {
			i = 0
			a.Publish(Event{Count: n})
			a.Acknowledge(Event{Count: n}, uint64(n)+3)
			n++
		}
		sessions[i].Event(uint64(n)+2, Event{Count: n - 1}, 1)
		i++
	}
	b.StopTimer()
	if v := a.Verdict(false); !v.Clean() {
		b.Fatal(v)
	}
}

// TestShifted has a session that gets a stretch of the log under numbers that are one too high.
func TestShifted(t *testing.T) {
	a := New()
	right, wrong := a.Session("right", "all", 0), a.Session("wrong", "all", 0)
	right.Snapshot(10)
	wrong.Snapshot(10)
	for i := range uint32(5) {
		e := Event{Count: i}
		a.Publish(e)
		a.Acknowledge(e, uint64(i)+11)
		right.Event(uint64(i)+11, e, 1)
		wrong.Event(uint64(i)+12, e, 1)
	}
	got := a.Verdict(true)
	got.Problems = nil
	if diff := cmp.Diff(Verdict{Deliveries: 10, Reordered: 5, Lost: 5}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
