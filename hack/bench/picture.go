package main

import (
	"bytes"
	"fmt"
	"slices"
)

// Measures of the picture, in pixels.
const (
	pictureWidth = 760
	nameWidth    = 130
	valueWidth   = 70
	barHeight    = 16
	barGap       = 4
	titleHeight  = 34
)

// panel is one group of bars.
type panel struct {
	title  string
	value  func(row) float64
	format string
	rows   []row
}

// draw makes an SVG of the rows: what a CPU-second delivers flat out and at a low rate, what an idle
// connection takes, and what it costs to take one, for each number of sessions.
func draw(rows []row) []byte {
	var counts []int
	for _, r := range rows {
		if !slices.Contains(counts, r.sessions) {
			counts = append(counts, r.sessions)
		}
	}
	speed := func(r row) float64 { return r.perCPUSecond / 1000 }
	memory := func(r row) float64 { return r.rssIdle }
	storm := func(r row) float64 { return r.perSession }
	var panels []panel
	for _, p := range []struct {
		title, mode, format string
		value               func(row) float64
	}{
		{"thousand deliveries per server CPU-second, flat out", flatOut, "%.0f", speed},
		{"thousand deliveries per server CPU-second, low fixed rate", fixed, "%.0f", speed},
		{"resident KB per idle connection", fixed, "%.1f", memory},
		{"microseconds of server CPU to connect, each", connecting, "%.0f", storm},
		{"microseconds of server CPU to resume, each", resuming, "%.0f", storm},
	} {
		for _, n := range counts {
			of := slices.DeleteFunc(inModes(rows, p.mode), func(r row) bool { return r.sessions != n })
			if len(of) > 0 {
				panels = append(panels, panel{title: fmt.Sprintf("%d sessions: %s", n, p.title), value: p.value, format: p.format, rows: of})
			}
		}
	}
	var body bytes.Buffer
	y := 0
	for _, p := range panels {
		y = p.draw(&body, y)
	}
	var svg bytes.Buffer
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", pictureWidth, y+barGap)
	fmt.Fprintln(&svg, `<rect width="100%" height="100%" fill="#ffffff"/>`)
	svg.Write(body.Bytes())
	fmt.Fprintln(&svg, "</svg>")
	return svg.Bytes()
}

// draw adds the panel at height y and returns where it ends.
func (p panel) draw(b *bytes.Buffer, y int) int {
	fmt.Fprintf(b, `<text x="8" y="%d" font-weight="bold">%s</text>`+"\n", y+22, p.title)
	y += titleHeight
	largest := 0.001
	for _, r := range p.rows {
		largest = max(largest, p.value(r))
	}
	for _, r := range p.rows {
		color := "#9aa5b1"
		if r.system == guildhallName {
			color = "#2f6fde"
		}
		width := p.value(r) / largest * (pictureWidth - nameWidth - valueWidth)
		fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, nameWidth-8, y+barHeight-4, r.system)
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, nameWidth, y, max(width, 0), barHeight, color)
		fmt.Fprintf(b, `<text x="%.1f" y="%d">`+p.format+"</text>\n", nameWidth+max(width, 0)+6, y+barHeight-4, p.value(r))
		y += barHeight + barGap
	}
	return y
}
