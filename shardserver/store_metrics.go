package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"guildhall.dev/guildhall/shardserver/store"
)

// storeCollector shows a store's numbers.
type storeCollector struct{ store *store.Store }

func storeMetric(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("guildhall_store_"+name, help, nil, nil)
}

var (
	storeCommits  = storeMetric("commits_total", "Commits written to the logs on disk.")
	storeRecords  = storeMetric("records_total", "Records written to the logs on disk.")
	storeSyncs    = storeMetric("sync_seconds", "How long syncs of the write-ahead log took.")
	storeSlow     = storeMetric("slow_writes_total", "Writes to the disk that took longer than 5 s.")
	storeUsed     = storeMetric("disk_used_bytes", "Size of the store's files.")
	storeFree     = storeMetric("disk_free_bytes", "What is free on the store's disk.")
	storeFull     = storeMetric("disk_full", "1 while publishes are refused since too little of the disk is free.")
	storeTroubled = storeMetric("background_error", "1 when the last background work of the store failed; it is tried again.")
)

func (storeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{storeCommits, storeRecords, storeSyncs, storeSlow, storeUsed, storeFree, storeFull, storeTroubled} {
		ch <- d
	}
}

func (c storeCollector) Collect(ch chan<- prometheus.Metric) {
	stats, err := c.store.Stats()
	if err != nil {
		return // closed
	}
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64) {
		ch <- prometheus.MustNewConstMetric(d, kind, v)
	}
	send(storeCommits, prometheus.CounterValue, float64(stats.Commits))
	send(storeRecords, prometheus.CounterValue, float64(stats.Records))
	send(storeSlow, prometheus.CounterValue, float64(stats.SlowWrites))
	send(storeUsed, prometheus.GaugeValue, float64(stats.DiskUsed))
	send(storeFree, prometheus.GaugeValue, float64(stats.DiskFree))
	send(storeFull, prometheus.GaugeValue, oneIf(stats.Full))
	send(storeTroubled, prometheus.GaugeValue, oneIf(stats.Background != nil))
	ch <- prometheus.MustNewConstHistogram(storeSyncs, stats.Syncs, stats.SyncSeconds, stats.SyncBuckets)
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
