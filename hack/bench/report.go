package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
)

// inModes are the rows of these modes.
func inModes(rows []row, modes ...string) []row {
	return slices.DeleteFunc(slices.Clone(rows), func(r row) bool { return !slices.Contains(modes, r.mode) })
}

// printTables writes the rows as tables for Markdown.
func printTables(w io.Writer, rows []row) {
	if main := inModes(rows, fixed, flatOut); len(main) > 0 {
		printTable(w, main)
	}
	if storm := inModes(rows, connecting, resuming); len(storm) > 0 {
		fmt.Fprintln(w, "\n| sessions | storm | system | us of CPU per session | beyond an upgrade | spread | seconds for all |")
		fmt.Fprintln(w, "| ---: | --- | --- | ---: | ---: | ---: | ---: |")
		for _, r := range storm {
			fmt.Fprintf(w, "| %d | %s | %s | %.1f | %.1f | %.0f %% | %.1f |\n",
				r.sessions, r.mode, r.system, r.perSession, beyondUpgrade(r, storm), 100*r.spread, r.seconds)
		}
	}
	if side := inModes(rows, allRead, someStuck, alone, withQuiet); len(side) > 0 {
		fmt.Fprintln(w, "\n| sessions | scenario | system | deliveries per CPU-s | spread | deliveries/s | p50 ms | p99 ms | frames/write | MB resident | lagging |")
		fmt.Fprintln(w, "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
		for _, r := range side {
			server := "| | | "
			if r.resident > 0 {
				server = fmt.Sprintf("| %.1f | %.1f | %.0f ", r.framesPerWrite, r.resident, r.lagging)
			}
			fmt.Fprintf(w, "| %d | %s | %s | %.0f | %.0f %% | %.0f | %.1f | %.1f %s|\n",
				r.sessions, r.mode, r.system, r.perCPUSecond, 100*r.spread, r.perSecond, r.p50, r.p99, server)
		}
	}
}

// beyondUpgrade is how much more CPU a session takes than a bare upgrade in the same storm.
func beyondUpgrade(r row, storm []row) float64 {
	for _, other := range storm {
		if other.system == upgradeOnly.name && other.mode == r.mode {
			return r.perSession - other.perSession
		}
	}
	return 0 // there is always one
}

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
	fmt.Fprintf(w, "\nCores used by other processes and interrupts meanwhile: %.2f (median), soft interrupts of those %.2f.\n",
		median(others), median(softirq))
}

// column is a figure in a CSV file, after system, sessions and mode.
type column struct {
	name   string
	digits int
	value  func(row) float64
}

func writeCSV(path string, rows []row) error {
	return writeColumns(path, inModes(rows, fixed, flatOut), []column{
		{"deliveries_per_cpu_s", 0, func(r row) float64 { return r.perCPUSecond }},
		{"ratio_to_floor", 3, func(r row) float64 { return r.ratio }},
		{"deliveries_per_s", 0, func(r row) float64 { return r.perSecond }},
		{"frames_per_write", 2, func(r row) float64 { return r.framesPerWrite }},
		{"p50_ms", 2, func(r row) float64 { return r.p50 }},
		{"p99_ms", 2, func(r row) float64 { return r.p99 }},
		{"rss_kb_idle", 2, func(r row) float64 { return r.rssIdle }},
		{"rss_kb_loaded", 2, func(r row) float64 { return r.rssLoaded }},
	})
}

func writeStormCSV(path string, rows []row) error {
	storm := inModes(rows, connecting, resuming)
	return writeColumns(path, storm, []column{
		{"cpu_us_per_session", 1, func(r row) float64 { return r.perSession }},
		{"beyond_upgrade_us", 1, func(r row) float64 { return beyondUpgrade(r, storm) }},
		{"seconds", 2, func(r row) float64 { return r.seconds }},
	})
}

// writeColumns writes rows into a file; with none the file is left as it is.
func writeColumns(path string, rows []row, columns []column) (err error) {
	if len(rows) == 0 {
		return nil
	}
	f, err := createFile(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := csv.NewWriter(f)
	record := []string{"system", "sessions", "mode"}
	for _, c := range columns {
		record = append(record, c.name)
	}
	err = w.Write(record)
	for _, r := range rows {
		record = []string{r.system, strconv.Itoa(r.sessions), r.mode}
		for _, c := range columns {
			record = append(record, strconv.FormatFloat(c.value(r), 'f', c.digits, 64))
		}
		err = errors.Join(err, w.Write(record))
	}
	w.Flush()
	return errors.Join(err, w.Error())
}
