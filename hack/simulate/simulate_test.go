package main

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func TestBars(t *testing.T) {
	for _, c := range curves {
		seeds := uint64(1)
		switch c.name {
		case "flash crowd":
			seeds = 3 // the hard one, and quick
		case "resize":
		default:
			c = eighth(c)
		}
		for seed := uint64(1); seed <= seeds; seed++ {
			t.Run(fmt.Sprintf("%s with seed %d", c.name, seed), func(t *testing.T) {
				r := simulate(c, seed)
				if err := r.check(c); err != nil {
					t.Error(err)
				}
				if want := c.sessions(c.lasts - time.Second); c.noise == 0 && math.Abs(float64(r.sessionsEnd)-want) > want/50 {
					t.Errorf("%d sessions are left, should be about %.0f: the world loses some", r.sessionsEnd, want)
				}
				if r.skew > 0.1 {
					t.Errorf("a skew of %.1f %% lasted for a minute", 100*r.skew)
				}
				if r.astray() > 1 {
					t.Errorf("%.2f %% of the moved sessions landed on draining relays", r.astray())
				}
			})
		}
	}
}

// eighth is a curve with fewer sessions, for a quick test; the command runs the whole.
func eighth(c curve) curve {
	whole := c.sessions
	c.sessions = func(at time.Duration) float64 { return whole(at) / 8 }
	return c
}

func TestSameSeedSameRun(t *testing.T) {
	c := eighth(curves[0])
	if a, b := simulate(c, 7), simulate(c, 7); a != b {
		t.Errorf("two runs differ: %+v and %+v", a, b)
	}
	if a, b := simulate(c, 7), simulate(c, 8); a == b {
		t.Errorf("two seeds give the same: %+v", a)
	}
}

func TestCommand(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want int
	}{
		"one curve":            {[]string{"--curve", "flash crowd", "--seed", "3"}, 0},
		"a curve nobody knows": {[]string{"--curve", "square"}, 2},
		"a flag nobody knows":  {[]string{"--speed"}, 2},
		"help":                 {[]string{"--help"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if got := command(tc.args, &stdout, &stderr); got != tc.want {
				t.Errorf("status %d, want %d: %s%s", got, tc.want, stdout.String(), stderr.String())
			}
		})
	}
}

// The draws must have the mean and the variance that their names promise, also where they change
// from one way to another.
func TestDraws(t *testing.T) {
	w := world{rng: rand.New(rand.NewPCG(1, 1))}
	check := func(name string, mean, variance float64, draw func() int) {
		t.Helper()
		const times = 20000
		var sum, squares float64
		for range times {
			n := float64(draw())
			sum += n
			squares += n * n
		}
		m := sum / times
		v := squares/times - m*m
		if math.Abs(m-mean) > 5*math.Sqrt(variance/times)+0.01 || math.Abs(v-variance) > 0.1*variance+0.1 {
			t.Errorf("%s has mean %.3f and variance %.3f, should have %.3f and %.3f", name, m, v, mean, variance)
		}
	}
	for _, mean := range []float64{0.5, 30, 80} {
		check(fmt.Sprintf("poisson(%g)", mean), mean, mean, func() int { return w.poisson(mean) })
	}
	for _, b := range []struct {
		n      int
		chance float64
	}{{50, 0.3}, {1000, 0.01}, {1000, 0.3}, {10, 1}} {
		check(fmt.Sprintf("binomial(%d, %g)", b.n, b.chance), float64(b.n)*b.chance, float64(b.n)*b.chance*(1-b.chance),
			func() int { return w.binomial(b.n, b.chance) })
	}
}
