// Command simulate runs the relay planner (controllers/relayplan) against growth curves of up to
// two million sessions and says how it did:
//
//	go run ./hack/simulate --seed 1
//
// The world around the planner is in world.go: pods take 5 to 60 s to start, reports are 2 s old
// and one in a hundred is lost, labels take 2 s to show in the traffic, arriving and moved
// sessions pick an accepting endpoint at random, and a relay that is full lets clients wait, for
// 12 s at most; then they try again. Sessions are counted per relay, not kept one by one.
//
// Columns of the table:
//
//	moves       sessions sent away with op 7
//	bound       the load above target after each change of the relays. When relays become ready:
//	            what the shard holds, at the first of them (its target is 0), and what each relay
//	            holds above maxSkewPercent over the even share. When relays are taken away:
//	            as many of the smallest loads. What was counted and has not left yet is not
//	            counted again.
//	ratio       moves / bound. Arrivals that are steered to the emptier relays save moves, so it
//	            may be below 1.
//	overload    seconds in which any relay had more sessions than its capacity, those that wait
//	            counted, and the longest stretch of one relay
//	held        clients that had to wait, and the longest wait, attempts after 12 s included
//	pods        the most at one time, and those at the end
//	want        how often the wanted number changed, and how often it turned back within
//	            10 minutes (oscillations)
//	astray      share of moved sessions that landed on a relay that drains
//	skew        the fullest relay above the even share: the worst that lasted for 60 s while no
//	            relay became ready and nobody was moved
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"
)

func main() {
	os.Exit(command(os.Args[1:], os.Stdout, os.Stderr))
}

// command does what the arguments say and returns the exit status: 1 when a bar is missed.
func command(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("simulate", flag.ContinueOnError)
	flags.SetOutput(stderr)
	seed := flags.Uint64("seed", 1, "seed of all that is random")
	only := flags.String("curve", "", "run this curve alone")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	table := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "curve\tpeak\thours\tmoves\tbound\tratio\toverload s\tlongest s\theld\tlongest s\tpods max\tend\twant changed\tback\tastray %\tskew %\t")
	var missed []error
	found := false
	for _, c := range curves {
		if *only != "" && *only != c.name {
			continue
		}
		found = true
		r := simulate(c, *seed)
		fmt.Fprintf(table, "%s\t%d\t%.1f\t%d\t%d\t%.2f\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%.2f\t%.1f\t\n",
			c.name, r.peak, c.lasts.Hours(), r.moves, r.bound, r.ratio(), r.overload, r.longestOverload,
			r.held, r.longestWait, r.podsMax, r.podsEnd, r.changes, r.oscillations, r.astray(), 100*r.skew)
		missed = append(missed, r.check(c))
	}
	if !found {
		fmt.Fprintf(stderr, "simulate: no curve %q\n", *only)
		return 2
	}
	missed = append(missed, table.Flush())
	if err := errors.Join(missed...); err != nil {
		fmt.Fprintf(stderr, "\n%v\n", err)
		return 1
	}
	return 0
}

// The bars.
const (
	maxRatio    = 1.2
	maxOverload = 30 * time.Second
)

// check says which bars a run missed.
func (r *result) check(c curve) error {
	var missed []error
	if r.ratio() > maxRatio {
		missed = append(missed, fmt.Errorf("%s: moves are %.2f times the bound, more than %.1f", c.name, r.ratio(), maxRatio))
	}
	if longest := time.Duration(r.longestOverload) * time.Second; longest > maxOverload {
		missed = append(missed, fmt.Errorf("%s: a relay was above its capacity for %v, more than %v", c.name, longest, maxOverload))
	}
	if r.oscillations > 0 {
		missed = append(missed, fmt.Errorf("%s: the wanted number turned back %d times within %v", c.name, r.oscillations, turnBack))
	}
	return errors.Join(missed...)
}
