// Quantize-dequantize of bfloat16 two at a time.
#pragma once
#include "blocks.h"

namespace roundoff {

// `pair_tile` quantizes LANES whole blocks of bfloat16 as pairs (low half: even element, high half: odd element), which
// avoids widening and narrowing. Under a power-of-two scale every result is exact in bfloat16: it has fewer bits, and
// it is a multiple of the smallest bfloat16 number, because either its grid step is one or the input is on the grid.
struct EvenThenOdd {
    static constexpr int at(int k) { return k < LANES / 2 ? 2 * k : 2 * k + 1 - LANES; }
};
struct LowThenHigh {  // the low half of a beside the high half of b
    static constexpr int at(int k) { return k < LANES / 2 ? k : k + LANES; }
};
// Both halves of each lane.
static inline U doubled(U high_halves) { return high_halves | high_halves >> 16; }

// Rounds LANES whole blocks on a moved grid. Bits are treated as sixteen-bit lanes as far as possible.
template <int N, bool STREAM>
static inline void moved_pairs(const Work& w, const bf16* x, bf16* y, const MovedGrid& moved) {
    constexpr int EACH = N / (2 * LANES);
    alignas(64) float high[LANES], smallest[LANES];
    store<false>(high, real(doubled(bits(moved.high))));
    store<false>(smallest, real(doubled(moved.smallest)));
    const S rounder = (S)doubled(w.grid.rounder);
    for (int b = 0; b < LANES; ++b) {
        const S most = (S)splat(high[b]), least = (S)splat(smallest[b]);
        for (int k = 0; k < EACH; ++k) {
            const int64_t at = b * N + 2 * LANES * k;
            const U v = load_pairs(x + at);
            const S t = signed_min((S)(v & 0x7fff7fffu), most);
            const U c = (U)(signed_max(t & 0x7f80, least) + rounder), both = (U)t;
            const F even = real(c << 16), odd = real(c & ~0xffffu);
            const U r = bits((real(both << 16) + even) - even), q = bits((real(both & ~0xffffu) + odd) - odd);
            store_pairs<STREAM>(y + at, r >> 16 | q | (v & 0x80008000u));
        }
    }
}

template <int SCALE, int N, bool STREAM>
static void pair_tile(const Work& w, const bf16* x, bf16* y, F tensor_scale) {
    constexpr bool SHARED = N < 2 * LANES;  // two blocks in a vector
    constexpr int EACH = SHARED ? 1 : N / (2 * LANES), VECTORS = SHARED ? LANES / 2 : LANES;  // vectors that share scales
    static_assert(N >= LANES, "a block fills at least half of a vector of pairs");
    U m[VECTORS];
    for (int i = 0; i < VECTORS; ++i) {
        m[i] = splat(0u);
        for (int k = 0; k < EACH; ++k) {
            U v = load_pairs(x + 2 * LANES * (EACH * i + k));
            m[i] = max(m[i], max(v & (MAGNITUDE & ~0xffffu), (v << 16) & MAGNITUDE));
        }
    }
    // With two blocks per vector, the tree without its last step leaves block 2i in lane i, and block 2i + 1 half a
    // vector further.
    U amax;
    if constexpr (SHARED) {
        amax = maxima_of_halves(m);
        tensor_scale = shuffled<EvenThenOdd>(tensor_scale, tensor_scale);
    } else {
        amax = maxima(m);
    }
    Scales s = scales_of<SCALE>(amax, w.spec, tensor_scale);
    if constexpr (SCALE == E8M0) {
        const MovedGrid moved(w.spec, w.grid, amax, s.multiply);
        if (moved.exact && w.spec.mantissa <= 7) return moved_pairs<N, STREAM>(w, x, y, moved);
    }
    alignas(64) float multiply[LANES], divide[LANES];
    store<false>(multiply, s.multiply);
    store<false>(divide, s.divide);
    for (int i = 0; i < VECTORS; ++i) {
        F d = splat(divide[i]), back = splat(multiply[i]);
        if constexpr (SHARED) {
            d = shuffled<LowThenHigh>(d, splat(divide[i + LANES / 2]));
            back = shuffled<LowThenHigh>(back, splat(multiply[i + LANES / 2]));
        }
        for (int k = 0; k < EACH; ++k) {
            const int64_t at = 2 * LANES * (EACH * i + k);
            U v = load_pairs(x + at);
            F even = real(v << 16), odd = real(v & ~0xffffu);
            U a = bits(nearest<false>(SCALE == E8M0 ? even * d : even / d, w.grid) * back);
            U b = bits(nearest<false>(SCALE == E8M0 ? odd * d : odd / d, w.grid) * back);
            if (SCALE != E8M0) {  // round to nearest even; a NaN here has no low bits that could carry into the sign
                a = a + (((a >> 16) & 1u) + 0x7fffu);
                b = b + (((b >> 16) & 1u) + 0x7fffu);
            }
            store_pairs<STREAM>(y + at, (a >> 16) | (b & ~0xffffu));
        }
    }
}

}  // namespace roundoff
