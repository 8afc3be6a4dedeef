package generator

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// histogram counts durations in buckets of about 3 %, from any goroutine.
type histogram struct {
	stripes [8]stripe
}

const (
	subBits = 5
	buckets = (64 - subBits) << subBits
)

type stripe struct {
	counts [buckets]atomic.Uint64
}

// add counts a duration; a negative one, of two clocks, as 0. Callers with different hints do
// not disturb each other.
func (h *histogram) add(hint int, d time.Duration) {
	h.stripes[hint&7].counts[bucket(uint64(max(d, 0)))].Add(1) //nolint:gosec // not negative
}

func bucket(n uint64) int {
	if n < 1<<subBits {
		return int(n) //nolint:gosec // small
	}
	exponent := bits.Len64(n) - subBits - 1
	return exponent<<subBits + int(n>>exponent) //nolint:gosec // below 2^6
}

// middle of a bucket.
func middle(i int) float64 {
	if i < 2<<subBits {
		return float64(i)
	}
	exponent := i>>subBits - 1
	low := uint64(1<<subBits+i&(1<<subBits-1)) << exponent //nolint:gosec // not negative
	return float64(low) + float64(uint64(1)<<exponent)/2
}

// percentiles gives, for each share of 1, a duration that this share does not exceed.
func (h *histogram) percentiles(shares ...float64) []time.Duration {
	var counts [buckets]uint64
	var total uint64
	for i := range h.stripes {
		for j := range counts {
			n := h.stripes[i].counts[j].Load()
			counts[j] += n
			total += n
		}
	}
	out := make([]time.Duration, len(shares))
	if total == 0 {
		return out
	}
	for i, share := range shares {
		rank := uint64(share * float64(total))
		var sum uint64
		for j, n := range counts {
			if sum += n; n > 0 && sum >= max(rank, 1) {
				out[i] = time.Duration(middle(j))
				break
			}
		}
	}
	return out
}
