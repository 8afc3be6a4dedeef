package main

import (
	"math"
	"time"

	"guildhall.dev/guildhall/controllers/relayplan"
)

// curve says how many sessions a guild would have if nobody had to wait.
type curve struct {
	name  string
	lasts time.Duration
	// stay is how long a session lasts on average.
	stay time.Duration
	// sessions at a time after the start.
	sessions func(at time.Duration) float64
	// noise is the standard deviation of a slow random change of the arrivals, as a share.
	noise float64
	// policy changes the default policy; nil: nothing.
	policy func(p *relayplan.Policy, at time.Duration)
}

const largest = 2_000_000

var curves = []curve{
	{
		name: "steady", lasts: 3 * time.Hour, stay: time.Hour,
		// Two hours up, and an hour as it is.
		sessions: func(at time.Duration) float64 { return 10 + largest*min(1, at.Hours()/2) },
	},
	{
		name: "flash crowd", lasts: 40 * time.Minute, stay: time.Hour,
		// A guild of 5,000; after a minute 1,000,000 come within 10 minutes, from one second to
		// the next at the full rate.
		sessions: func(at time.Duration) float64 {
			return 5000 + 1_000_000*min(max(0, (at-time.Minute).Minutes()/10), 1)
		},
	},
	{
		name: "daily wave", lasts: 24 * time.Hour, stay: time.Hour,
		sessions: func(at time.Duration) float64 {
			return largest * (0.55 - 0.45*math.Cos(2*math.Pi*at.Hours()/24))
		},
	},
	{
		name: "churn", lasts: 2 * time.Hour, stay: 5 * time.Minute, noise: 0.05,
		// As many as ever after 40 minutes, but nobody stays for long.
		sessions: func(at time.Duration) float64 { return 10 + largest*min(1, at.Minutes()/40) },
	},
	{
		name: "resize", lasts: 90 * time.Minute, stay: 24 * time.Hour,
		// Once they are there hardly anybody comes or goes; somebody asks for 30 relays instead of
		// 20, and for 20 again. Nothing can be steered, all has to be moved.
		sessions: func(at time.Duration) float64 { return 10 + 240_000*min(1, at.Minutes()/20) },
		policy: func(p *relayplan.Policy, at time.Duration) {
			p.Scaling, p.Replicas = relayplan.ScalingManual, 20
			if at > 40*time.Minute && at < 65*time.Minute {
				p.Replicas = 30
			}
		},
	},
}
