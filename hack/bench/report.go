package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// printTable writes the rows as a table for Markdown.
func printTable(w io.Writer, rows []row) {
	fmt.Fprintln(w, "| sessions | mode | system | deliveries per CPU-s | of floor | spread | deliveries/s | frames/write | p50 ms | p99 ms | KB idle | KB loaded | MB empty |")
	fmt.Fprintln(w, "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
	softirq, others := make([]float64, 0, len(rows)), make([]float64, 0, len(rows))
	for _, r := range rows {
		fmt.Fprintf(w, "| %d | %s | %s | %.0f | %.2f | %.0f %% | %.0f | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f |\n",
			r.sessions, r.mode, r.system, r.perCPUSecond, r.ratio, 100*r.spread, r.perSecond, r.framesPerWrite,
			r.p50, r.p99, r.rssIdle, r.rssLoaded, r.rssEmpty/1024)
		softirq, others = append(softirq, r.softirq), append(others, r.others)
	}
	if len(rows) > 0 {
		fmt.Fprintf(w, "\nCores used by other processes and interrupts meanwhile: %.2f (median), soft interrupts of those %.2f.\n",
			median(others), median(softirq))
	}
}

func writeCSV(path string, rows []row) (err error) {
	f, err := createFile(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := csv.NewWriter(f)
	header := []string{
		"system", "sessions", "mode", "deliveries_per_cpu_s", "ratio_to_floor", "deliveries_per_s", "frames_per_write",
		"p50_ms", "p99_ms", "rss_kb_idle", "rss_kb_loaded",
	}
	if err := w.Write(header); err != nil {
		return err
	}
	for _, r := range rows {
		record := []string{r.system, strconv.Itoa(r.sessions), r.mode}
		for _, v := range []struct {
			value  float64
			digits int
		}{{r.perCPUSecond, 0}, {r.ratio, 3}, {r.perSecond, 0}, {r.framesPerWrite, 2}, {r.p50, 2}, {r.p99, 2}, {r.rssIdle, 2}, {r.rssLoaded, 2}} {
			record = append(record, strconv.FormatFloat(v.value, 'f', v.digits, 64))
		}
		if err := w.Write(record); err != nil {
			return err
		}
	}
	w.Flush()
	return w.Error()
}
