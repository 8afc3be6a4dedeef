package admin

import (
	"bytes"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"guildhall.dev/guildhall/shardserver/report"
)

// loadWindow is what rates are averaged over.
const loadWindow = 10 * time.Second

// Totals are counters of the process since its start.
type Totals struct {
	Events, Deliveries, Arrivals uint64
}

// LoadMeter measures the process. Make one with NewLoadMeter.
type LoadMeter struct {
	totals   func() Totals
	sessions func() int

	mu      sync.Mutex
	samples []sample // oldest first, over loadWindow
}

type sample struct {
	at time.Time
	Totals
	cpu time.Duration
}

// NewLoadMeter makes a LoadMeter of those counters.
func NewLoadMeter(totals func() Totals, sessions func() int) *LoadMeter {
	m := &LoadMeter{totals: totals, sessions: sessions}
	m.samples = []sample{m.sample()}
	return m
}

func (m *LoadMeter) sample() sample {
	return sample{at: time.Now(), Totals: m.totals(), cpu: cpuTime()}
}

// Load is the load now. Rates are averaged over the time since the oldest of the calls of the last 10 s.
func (m *LoadMeter) Load() report.Load {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.sample()
	for len(m.samples) > 1 && now.at.Sub(m.samples[1].at) >= loadWindow {
		m.samples = m.samples[1:]
	}
	old := m.samples[0]
	if now.at.Sub(m.samples[len(m.samples)-1].at) >= loadWindow/10 {
		m.samples = append(m.samples, now)
	}
	l := report.Load{Sessions: int64(m.sessions()), MemoryBytes: residentBytes()}
	if seconds := now.at.Sub(old.at).Seconds(); seconds > 0 {
		l.EventsPerSecond = int64(float64(now.Events-old.Events) / seconds)
		l.DeliveriesPerSecond = int64(float64(now.Deliveries-old.Deliveries) / seconds)
		l.ArrivalsPerSecond = int64(float64(now.Arrivals-old.Arrivals) / seconds)
		l.CPUMilli = int64(1000 * (now.cpu - old.cpu).Seconds() / seconds)
	}
	return l
}

// cpuTime is the CPU time of the process, user and system.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// residentBytes is the resident memory of the process; 0 where /proc does not tell.
func residentBytes() int64 {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := bytes.Fields(data)
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(string(fields[1]), 10, 64)
	return pages * int64(os.Getpagesize())
}
