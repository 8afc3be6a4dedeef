package fanout

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// scene is a core of one worker, and a stream that keeps all.
type scene struct {
	*testing.T
	core   *Core
	stream *Stream
	model  model
}

var keepAll = Retention{Bytes: 1 << 40, Age: 1e6 * time.Hour}

// play runs a scene in which nothing is real but the code: no sockets and no time.
func play(t *testing.T, o Options, act func(*scene)) {
	synctest.Test(t, func(t *testing.T) {
		o.Workers = 1
		s := &scene{T: t, core: New(o)}
		s.stream = s.core.NewStream(0, nil, keepAll, keepAll)
		act(s)
		synctest.Wait()
		s.core.Stop()
	})
}

// hold stops the worker until the returned function is called: what happens meanwhile is one pass.
func (s *scene) hold() (release func()) {
	held := make(chan struct{})
	go s.core.workers[0].post(func() { <-held })
	synctest.Wait()
	return func() { close(held); synctest.Wait() }
}

// actor is a session of owner 1 that sees topic 0, and its peer.
type actor struct {
	*Session
	peer    *fakeConn
	outcome *outcome
}

func (s *scene) connect(allowed int) actor {
	fake, o := newFake(allowed), &outcome{}
	a := actor{s.core.NewSession(fakeSocket{fake}, o.ended), fake, o}
	s.Cleanup(func() { a.End(nil) })
	return a
}

func (s *scene) follow(a actor, start Start) {
	if start.View == nil {
		start.View = topics(1)
	}
	if start.Owner == 0 {
		start.Owner = 1
	}
	if err := a.Follow(s.stream, start); err != nil {
		s.Error(err)
	}
}

// publish publishes a frame for each padding, of topic 0.
func (s *scene) publish(paddings ...int) {
	for _, n := range paddings {
		s.stream.Publish(s.model.frame(s.model.last()+1, 0, n))
	}
}

// turn publishes a frame to an owner, behind which they see topic 0, or do not any more.
func (s *scene) turn(owner uint64) {
	f := s.model.frame(s.model.last()+1, 1, 0, owner)
	f.Personal[0].Turn = flip(1)
	s.stream.Publish(f)
}

func (s *scene) retain(r Retention) { s.stream.Retain(r, r) }

// history has the stream keep one frame; what is older the model makes anew.
func (s *scene) history(block int) {
	s.model.block = block
	s.stream = s.core.NewStream(0, &s.model, Retention{Bytes: 1, Age: time.Hour}, keepAll)
}

// got checks all that the peer got, without the padding.
func (s *scene) got(a actor, want ...string) {
	s.Helper()
	synctest.Wait()
	got := strings.TrimRight(strings.ReplaceAll(string(a.peer.bytes()), "x", ""), "\n")
	got = strings.ReplaceAll(got, " \n", "\n")
	if got = strings.TrimRight(got, " "); got != strings.Join(want, "\n") {
		s.Errorf("got %q, expected %q", got, strings.Join(want, "\n"))
	}
}

// ended checks whether the session has ended, and why.
func (s *scene) ended(a actor, want bool, cause error) {
	s.Helper()
	synctest.Wait()
	if done, why := a.outcome.get(); done != want || !errors.Is(why, cause) {
		s.Errorf("ended: %v with %v, expected: %v, %v", done, why, want, cause)
	}
}

// watched is a view that admits all, and calls a function when it does so first.
type watched struct{ first func() }

func (w *watched) Pick(f *Frame) []byte {
	if do := w.first; do != nil {
		w.first = nil
		do()
	}
	return f.Wire
}

var live = Start{}

func TestScenes(t *testing.T) {
	var during func() // called by the next no-op
	options := Options{
		Overrun: overrun,
		Noop: func(seq uint64) []byte {
			if f := during; f != nil {
				during = nil
				f()
			}
			return noop(seq)
		},
	}
	for sentence, act := range map[string]func(*scene){
		"replays with different ends in one pass each get their own end": func(s *scene) {
			a, b := s.connect(unlimited), s.connect(unlimited)
			release := s.hold()
			s.publish(0, 0)
			s.follow(a, Start{Replayed: replayed})
			s.publish(0)
			s.follow(b, Start{Replayed: replayed})
			s.publish(0)
			release()
			s.got(a, "f 0", "f 1", "replayed 2", "f 2", "f 3")
			s.got(b, "f 0", "f 1", "f 2", "replayed 3", "f 3")
		},
		"what is addressed to one owner is not shared with others": func(s *scene) {
			a, b, c := s.connect(unlimited), s.connect(unlimited), s.connect(unlimited)
			s.follow(b, Start{Owner: 2})
			s.follow(a, live)
			s.follow(c, live)
			s.stream.Publish(s.model.frame(1, 0, 0), s.model.frame(2, 0, 0, 2), s.model.frame(3, 0, 0))
			s.got(a, "f 0", "f 2")
			s.got(b, "f 0", "f 1", "f 2")
			s.got(c, "f 0", "f 2")
		},
		"views turn at an exact number, and what is addressed passes them": func(s *scene) {
			a, b, c := s.connect(unlimited), s.connect(unlimited), s.connect(unlimited)
			s.follow(a, live)
			s.follow(b, Start{Owner: 2, View: topics(0)})
			s.follow(c, Start{Owner: 3, View: topics(0)})
			s.publish(0)
			synctest.Wait()
			release := s.hold()
			s.turn(2)
			s.publish(0)
			s.turn(1)
			s.publish(0)
			s.stream.Publish(s.model.frame(6, 1, 0, 1))
			release()
			s.got(a, "f 0", "f 2", "f 3", "f 5")
			s.got(b, "f 1", "f 2", "f 4")
			s.got(c)
			if len(s.stream.turns) != 2 {
				s.Errorf("%v", s.stream.turns)
			}
			s.stream.Retain(Retention{Bytes: 1, Age: time.Hour}, keepAll)
			if len(s.stream.turns) != 0 {
				s.Errorf("turns of dropped frames are kept: %v", s.stream.turns)
			}
		},
		"a frame that turns is for those who see it before and behind": func(s *scene) {
			a, b := s.connect(unlimited), s.connect(unlimited)
			s.follow(a, Start{View: topics(0b11)})
			s.follow(b, Start{View: topics(0b10)})
			f := s.model.frame(1, 0, 0)
			f.Turn = flip(1)
			g := s.model.frame(2, 1, 0)
			g.Turn = flip(1)
			s.stream.Publish(f, g, s.model.frame(3, 0, 0))
			s.got(a, "f 1", "f 2")
			s.got(b, "f 1")
		},
		"a session that a turn leaves without view is cut": func(s *scene) {
			a := s.connect(unlimited)
			s.follow(a, live)
			f := s.model.frame(1, 1, 0)
			f.Turn = blind{}
			s.stream.Publish(f)
			s.publish(0)
			s.got(a, "overrun")
			b := s.connect(0)
			if err := b.Follow(s.stream, Start{View: topics(1)}); !errors.Is(err, ErrDropped) {
				s.Error(err)
			}
		},
		"views that pick the same share the bytes": func(s *scene) {
			views := []topics{0b001, 0b101, 0b011, 0b111}
			for _, v := range views {
				s.follow(s.connect(unlimited), Start{View: v})
			}
			release := s.hold()
			s.stream.Publish(s.model.frame(1, 0, 5), s.model.frame(2, 0, 5), s.model.frame(3, 1, 5))
			spans, texts := 0, 0
			s.core.workers[0].post(func() {
				cache := s.core.workers[0].scratch.cache
				s.core.workers[0].post(func() { spans, texts = len(cache.spans), len(cache.texts) })
			})
			release()
			if spans != len(views) || texts != 2 {
				s.Errorf("%d spans, %d texts", spans, texts)
			}
		},
		"bodies of the same length are not taken for the same": func(s *scene) {
			a, b := s.connect(unlimited), s.connect(unlimited)
			s.follow(a, live)
			s.follow(b, Start{View: 1 | variant})
			f := s.model.frame(1, 0, 0)
			f.Variants = [][]byte{line("v 0 ")}
			s.stream.Publish(f, s.model.frame(2, 0, 0))
			s.got(a, "f 0", "f 1")
			s.got(b, "v 0", "f 1")
		},
		"a session that lags catches up from the history, and sees what it saw then": func(s *scene) {
			s.history(3)
			a := s.connect(3)
			s.follow(a, live)
			s.publish(0)
			synctest.Wait()
			s.publish(0)
			s.turn(1)
			s.publish(0)
			s.turn(1)
			s.publish(0, 0)
			if n := s.core.Stats().CatchingUp; n != 0 { // it waits for its socket
				s.Errorf("%d sessions catch up", n)
			}
			a.peer.take(8)
			synctest.Wait()
			if n := s.core.Stats().CatchingUp; n != 1 || len(s.core.readers) != 0 {
				s.Errorf("%d sessions catch up, %d read", n, len(s.core.readers))
			}
			a.peer.take(unlimited)
			s.got(a, "f 0", "f 1", "f 2", "f 4", "f 5", "f 6")
			time.Sleep(blockTime)
			synctest.Wait()
			if n := s.core.Stats(); n.CatchingUp != 0 || n.Overruns != 0 || s.stream.blocks.kept != nil {
				s.Errorf("%+v, %d blocks", n, len(s.stream.blocks.kept))
			}
		},
		"sessions that resume from the history share its blocks": func(s *scene) {
			s.history(30)
			for range 100 {
				s.publish(0)
			}
			release := s.hold()
			for i := range 50 {
				a := s.connect(unlimited)
				s.follow(a, Start{Seq: uint64(i % 5), Replayed: replayed})
			}
			release()
			if s.model.reads > 8 { // 4, or some more as they start apart
				s.Errorf("%d reads", s.model.reads)
			}
			if n := s.core.Stats().Deliveries; n != 50*98 {
				s.Errorf("%d deliveries", n)
			}
		},
		"a replay from the history ends where it began, however far the stream goes on": func(s *scene) {
			s.history(3)
			s.publish(0, 0, 0)
			a := s.connect(0)
			s.follow(a, Start{Replayed: replayed})
			synctest.Wait()
			s.publish(0, 0)
			a.peer.take(unlimited)
			s.got(a, "f 0", "f 1", "f 2", "replayed 3", "f 3", "f 4")
		},
		"a session that the history has dropped is cut": func(s *scene) {
			s.history(3)
			a, b := s.connect(3), s.connect(3)
			s.follow(a, live)
			s.follow(b, live)
			s.publish(0, 0, 0)
			synctest.Wait()
			b.peer.take(1)
			s.publish(0)
			s.model.forgotten = 3
			s.publish(0)
			s.ended(a, true, errOverrun)
			c := s.connect(unlimited)
			if err := c.Follow(s.stream, Start{View: topics(1), Seq: 2}); !errors.Is(err, ErrDropped) {
				s.Error(err)
			}
		},
		"a session whose history cannot be read is told": func(s *scene) {
			s.history(3)
			s.publish(0, 0, 0)
			s.model.unreadable = errors.New("damaged")
			a := s.connect(unlimited)
			s.follow(a, live)
			s.got(a, "overrun")
			if n := s.core.Stats().Overruns; n != 0 {
				s.Errorf("%d overruns", n)
			}
		},
		"a session that starts to follow while parked goes on when it can": func(s *scene) {
			a := s.connect(0)
			a.Send(line("m 0"))
			synctest.Wait()
			s.follow(a, live)
			s.publish(0)
			a.peer.take(2)
			synctest.Wait()
			s.publish(0)
			a.peer.take(unlimited)
			s.got(a, "m 0", "f 0", "f 1")
		},
		"a stream's end reaches a session that follows it only once it is not parked": func(s *scene) {
			a := s.connect(0)
			a.Send(line("m 0"))
			synctest.Wait()
			s.follow(a, live)
			s.stream.Close(closing)
			synctest.Wait()
			a.peer.take(unlimited)
			s.got(a, "m 0", "close")
		},
		"messages of Send come before frames that are not yet begun": func(s *scene) {
			a := s.connect(7)
			s.follow(a, live)
			release := s.hold()
			s.publish(0, 0, 0)
			release()
			a.Send(line("m 0"))
			a.peer.take(unlimited)
			s.got(a, "f 0", "f 1", "m 0", "f 2")
		},
		"a message of Send comes before frames that are just being looked at": func(s *scene) {
			a := s.connect(unlimited)
			v := &watched{func() { a.Send(line("m 0")) }}
			if err := a.Follow(s.stream, Start{View: v}); err != nil {
				s.Error(err)
			}
			s.publish(0)
			s.got(a, "m 0", "f 0")
		},
		"a message of Send that meets a no-op is not lost": func(s *scene) {
			a := s.connect(unlimited)
			s.retain(Retention{Bytes: 1, Age: time.Hour})
			s.follow(a, live)
			during = func() { a.Send(line("m 0")) }
			s.stream.Publish(s.model.frame(1, 1, 0))
			s.got(a, "noop 1", "m 0")
		},
		"a no-op that meets Close does not come behind the last message": func(s *scene) {
			a := s.connect(unlimited)
			s.retain(Retention{Bytes: 1, Age: time.Hour})
			s.follow(a, live)
			during = func() { a.Close(closing) }
			s.stream.Publish(s.model.frame(1, 1, 0))
			s.got(a, "noop 1", "close")
		},
		"a no-op comes when an eighth to a fourth of the retention was not let through": func(s *scene) {
			a := s.connect(unlimited)
			s.retain(Retention{Bytes: 8 * 210, Age: time.Hour})
			s.follow(a, live)
			const pad = 140 - 128 - len("f 0 \n")
			s.stream.Publish(s.model.frame(1, 0, pad), s.model.frame(2, 1, pad))
			synctest.Wait()
			s.stream.Publish(s.model.frame(3, 1, pad)) // twice 140: due, but nothing looks
			s.got(a, "f 0")
			s.stream.Publish(s.model.frame(4, 1, pad))
			s.got(a, "f 0", "noop 4")
			s.stream.Publish(s.model.frame(5, 1, pad), s.model.frame(6, 0, pad))
			synctest.Wait()
			s.stream.Publish(s.model.frame(7, 1, pad), s.model.frame(8, 1, pad))
			s.got(a, "f 0", "noop 4", "f 5")
		},
		"a no-op comes when an eighth of the time went by without a frame": func(s *scene) {
			a := s.connect(unlimited)
			s.retain(Retention{Bytes: 1 << 30, Age: 8 * time.Minute})
			s.follow(a, live)
			for i := range 3 {
				s.stream.Publish(s.model.frame(uint64(i+1), 1, 0))
				synctest.Wait()
				time.Sleep(time.Minute)
			}
			s.got(a, "noop 2", "noop 3")
		},
		"a session that fell behind between frames is told": func(s *scene) {
			a := s.connect(unlimited)
			s.follow(a, live)
			release := s.hold()
			s.retain(Retention{Bytes: 200, Age: time.Hour})
			s.publish(100, 100)
			release()
			s.got(a, "overrun")
			if n := s.core.Stats().Overruns; n != 1 {
				s.Errorf("%d overruns", n)
			}
		},
		"a session that fell behind within a frame is cut at once": func(s *scene) {
			a := s.connect(3)
			s.follow(a, live)
			s.publish(100)
			synctest.Wait()
			s.retain(Retention{Bytes: 200, Age: time.Hour})
			s.publish(100, 100)
			s.ended(a, true, errOverrun)
			if n := s.core.Stats().Overruns; n != 1 {
				s.Errorf("%d overruns", n)
			}
		},
		"a session that is closing has its time to do so, however far the stream goes on": func(s *scene) {
			a := s.connect(0)
			s.follow(a, live)
			a.Send(line("m 0"))
			synctest.Wait()
			a.Close(closing)
			s.retain(Retention{Bytes: 200, Age: time.Hour})
			s.publish(100, 100)
			s.ended(a, false, nil)
			a.peer.take(unlimited)
			s.got(a, "m 0", "close")
		},
		"a peer that takes nothing does not hold up the end": func(s *scene) {
			a := s.connect(0)
			s.follow(a, live)
			s.publish(0)
			a.Close(closing)
			s.ended(a, false, nil)
			time.Sleep(closeTimeout)
			s.ended(a, true, nil)
		},
		"a peer that takes the last message but does not close is closed": func(s *scene) {
			a := s.connect(unlimited)
			a.Close(closing)
			a.Send(line("m 0"))
			s.got(a, "close")
			s.ended(a, false, nil)
			time.Sleep(closeTimeout)
			s.ended(a, true, nil)
		},
		"a peer that does not take its messages is cut when they are too many": func(s *scene) {
			a := s.connect(0)
			for range maxUrgent>>20 + 1 {
				a.Send(make([]byte, 1<<20))
			}
			s.ended(a, true, errUrgent)
		},
		"no-ops do not widen the bound of Send": func(s *scene) {
			a := s.connect(unlimited)
			s.retain(Retention{Bytes: 1, Age: time.Hour})
			s.follow(a, live)
			s.stream.Publish(s.model.frame(1, 1, 0))
			synctest.Wait()
			a.Send(line("m 0"))
			synctest.Wait()
			if a.urgentBytes != 0 {
				s.Errorf("%d bytes counted, none wait", a.urgentBytes)
			}
		},
		"a session that leaves during a pass takes nobody's frame away": func(s *scene) {
			var actors []actor
			for range 3 * quantum {
				a := s.connect(unlimited)
				s.follow(a, live)
				actors = append(actors, a)
			}
			synctest.Wait()
			actors[quantum+1].peer.onWrite = func() { actors[3].End(nil); actors[quantum+9].End(nil) }
			s.publish(0)
			for i, a := range actors {
				if i != quantum+9 {
					s.got(a, "f 0")
				}
			}
		},
		"what is published during a pass reaches those who were served before": func(s *scene) {
			var actors []actor
			for range quantum + 1 {
				a := s.connect(unlimited)
				s.follow(a, live)
				actors = append(actors, a)
			}
			synctest.Wait()
			once := sync.OnceFunc(func() { s.publish(0) })
			actors[1].peer.onWrite = once
			s.publish(0)
			for _, a := range actors {
				s.got(a, "f 0", "f 1")
			}
		},
		"a quiet stream waits for one quantum of a hot one": func(s *scene) {
			writes := 0
			for range 4 * quantum {
				a := s.connect(unlimited)
				a.peer.onWrite = func() { writes++ }
				s.follow(a, live)
			}
			quiet, before := s.connect(unlimited), -1
			stream := s.core.NewStream(0, nil, keepAll, keepAll)
			if err := quiet.Follow(stream, Start{View: topics(1)}); err != nil {
				s.Error(err)
			}
			synctest.Wait()
			quiet.peer.onWrite = func() { before = writes }
			release := s.hold()
			s.publish(0)
			stream.Publish((&model{}).frame(1, 0, 0))
			release()
			if before != quantum {
				s.Errorf("%d writes came before, expected %d", before, quantum)
			}
			if writes != 4*quantum {
				s.Errorf("%d writes, expected %d", writes, 4*quantum)
			}
		},
		"a session with much to replay lets others go first, and gets it all": func(s *scene) {
			for range 4 * maxWrites {
				s.publish(maxSpan)
			}
			a, b := s.connect(unlimited), s.connect(unlimited)
			writes, before := 0, -1
			a.peer.onWrite = func() { writes++ }
			b.peer.onWrite = func() { before = writes }
			release := s.hold()
			s.follow(a, live)
			b.Send(line("m 0"))
			release()
			if before != maxWrites || writes != 4*maxWrites {
				s.Errorf("%d of %d writes came before, expected %d of %d", before, writes, maxWrites, 4*maxWrites)
			}
		},
		"messages in parts are written together, and shared parts are left as they were": func(s *scene) {
			a, b := s.connect(unlimited), s.connect(0)
			shared, writes := line("shared"), 0
			a.peer.onWrite = func() { writes++ }
			release := s.hold()
			a.Send(line("m 0"), nil, shared)
			a.Send(line("m 1"))
			b.Send(line("m 0"), shared, line("m 1"))
			s.follow(b, live)
			s.publish(0)
			release()
			s.got(a, "m 0", "shared", "m 1")
			if writes != 1 {
				s.Errorf("%d writes, expected 1", writes)
			}
			for range 40 {
				b.peer.take(1)
				synctest.Wait()
			}
			s.got(b, "m 0", "shared", "m 1", "f 0")
			if string(shared) != "shared\n" {
				s.Errorf("the shared part is %q", shared)
			}
		},
		"a message larger than what is joined goes out whole": func(s *scene) {
			a := s.connect(unlimited)
			release := s.hold()
			a.Send(line("m 0"))
			a.Send(line("big%s", strings.Repeat("x", 3*maxJoined)))
			a.Send(line("m 1"))
			release()
			s.got(a, "m 0", "big", "m 1")
		},
		"behind CloseWrite's message the stream of bytes ends, and the peer closes": func(s *scene) {
			a := s.connect(4)
			a.Send(line("m 0"))
			a.CloseWrite(line("bye"))
			s.got(a, "m 0")
			if a.peer.hungUp {
				s.Error("hung up before the last message")
			}
			a.peer.take(unlimited)
			s.got(a, "m 0", "bye")
			if !a.peer.hungUp {
				s.Error("not hung up")
			}
			s.ended(a, false, nil)
			time.Sleep(closeTimeout)
			s.ended(a, true, nil)
		},
		"CloseWrite behind Close sends nothing, and hangs up": func(s *scene) {
			a := s.connect(unlimited)
			a.Close(line("bye"))
			s.got(a, "bye")
			a.CloseWrite(line("bye again"))
			s.got(a, "bye")
			if !a.peer.hungUp {
				s.Error("not hung up")
			}
		},
		"a connection that is slow to close does not hold up its worker": func(s *scene) {
			fake, closed := newFake(0), make(chan struct{})
			fake.onClose = func() { <-closed }
			slow := actor{s.core.NewSession(fake, ignore), fake, nil} // no plain socket
			slow.Send(line("m 0"))
			synctest.Wait()
			s.core.workers[0].post(func() { slow.End(nil) })
			a := s.connect(unlimited)
			a.Send(line("m 0"))
			s.got(a, "m 0")
			close(closed)
		},
	} {
		t.Run(sentence, func(t *testing.T) { play(t, options, act) })
	}
}

// blind is a turn that nobody passes.
type blind struct{}

func (blind) Ahead(View) View { return nil }
func (blind) Back(View) View  { return nil }

// TestWritesOfAnySize cuts the writes of one run at every offset, live and from the history.
func TestWritesOfAnySize(t *testing.T) {
	for _, history := range []bool{false, true} {
		for size := 1; size <= 60; size++ {
			play(t, Options{}, func(s *scene) {
				if history {
					s.history(2)
				}
				a := s.connect(0)
				s.publish(3, 5)
				s.turn(1)
				s.publish(8)
				a.Send(line("m 0"))
				view := topics(0)
				if history { // where it starts
					view = 1
				}
				s.follow(a, Start{View: view, Replayed: replayed})
				f := s.model.frame(s.model.last()+1, 0, 9)
				s.model.personal(f, 1, "mine", nil)
				s.stream.Publish(f)
				s.turn(1)
				f = s.model.frame(s.model.last()+1, 0, 2)
				s.model.personal(f, 1, "mine", nil)
				s.stream.Publish(f, s.model.frame(f.Seq+1, 0, 0, 1))
				s.publish(0, 20)
				for range 140/size + 1 {
					a.peer.take(size)
					synctest.Wait()
				}
				s.got(a, "m 0", "f 0", "f 1", "f 2", "replayed 4", "f 5", "p 6 mine", "f 7", "f 8", "f 9")
			})
		}
	}
}
