package main

import "math/bits"

// histogram counts durations in nanoseconds, each in a bucket that is at most 1/32 wide.
type histogram struct {
	buckets [64 * 32]uint64
	count   uint64
}

func (h *histogram) add(ns uint64) {
	i := ns
	if ns >= 32 {
		shift := bits.Len64(ns) - 6
		i = uint64(shift+1)<<5 + ns>>shift - 32 //nolint:gosec // not negative
	}
	h.buckets[i]++
	h.count++
}

// quantile is in milliseconds, 0 when nothing was counted.
func (h *histogram) quantile(q float64) float64 {
	rank := uint64(q * float64(h.count))
	for i, n := range h.buckets {
		if n > rank {
			low := uint64(i) //nolint:gosec // not negative
			if i >= 64 {
				low = uint64(i&31+32) << (i>>5 - 1) //nolint:gosec // not negative
			}
			return float64(low) / 1e6
		}
		rank -= n
	}
	return 0
}
