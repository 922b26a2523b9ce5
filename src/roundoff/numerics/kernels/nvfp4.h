// NVFP4 in the order of operations of Transformer Engine, and four over six, with the arithmetic of nvfp4.py.
#pragma once
#include <cfloat>
#include "blocks.h"

namespace roundoff {

// The encoding scale of a tensor: from its largest finite magnitude, or from a scale that a caller gave.
static inline float encoding_of(float amax, float divisor) {
    return amax == 0.0f ? 1.0f : std::min(divisor / amax, FLT_MAX);
}
static inline float encoding_of_given(float scale) { return std::min(1.0f / scale, FLT_MAX); }

// Lane j of m[i] becomes lane i of m[j].
template <int S = 1> static inline void transpose(F* m) {
    if constexpr (S < LANES) {
        for (int i = 0; i < LANES; ++i) {
            if (i & S) continue;
            F a = shuffled<EvenGroups<S>>(m[i], m[i + S]), b = shuffled<OddGroups<S>>(m[i], m[i + S]);
            m[i] = a;
            m[i + S] = b;
        }
        transpose<2 * S>(m);
    }
}

// The factor that brings elements to the grid under a stored scale.
static inline F to_grid(F stored, F decoding) { return at_most(splat(1.0f) / (stored * decoding), splat(FLT_MAX)); }

// Which of two stored scales has the smaller error in each of LANES blocks of N elements (lane b: block b).
template <class T, int N, bool SQUARED>
static inline F better(const Work& w, const T* x, int blocks, F first, F second, F encoding, F decoding) {
    const F stored[2] = {first, second};
    F by[2], error[2] = {};
    for (int k = 0; k < 2; ++k) by[k] = to_grid(stored[k], decoding);
    for (int i = 0; i < N; i += LANES) {
        F v[LANES];
        for (int b = 0; b < LANES; ++b) v[b] = b < blocks ? load(x + b * N + i) : splat(0.0f);
        transpose(v);
        for (int j = 0; j < LANES; ++j)
            for (int k = 0; k < 2; ++k) {
                F e = nearest<false>(v[j] * by[k], w.grid) * stored[k] / encoding - v[j];
                error[k] += SQUARED ? e * e : real(bits(e) & MAGNITUDE);
            }
    }
    return error[1] < error[0] ? second : first;
}

// Quantizes up to LANES blocks of N elements that start at `column` of `row`; lane b of `encoding` is for block b.
template <class T, int N, bool STREAM>
static void encoded_tile(const Work& w, const T* x, T* y, int blocks, F encoding, int64_t row, int64_t column) {
    constexpr int V = N / LANES;
    const U amax = amax_of_blocks<N>(x, blocks), finite = amax < EXPONENT ? splat(~0u) : splat(0u);
    const Grid e4m3(E4M3_MANTISSA, E4M3_EMIN, -E4M3_HIGH, E4M3_HIGH);
    const F decoding = splat(1.0f) / encoding;
    const F exact = real(amax & finite) * (encoding / splat(w.spec.divisor));
    F stored = nearest<false>(exact, e4m3);
    if (w.spec.rule != TRANSFORMER_ENGINE) {
        const F second = nearest<false>(exact * 1.5f, e4m3);
        stored = w.spec.rule == SQUARED ? better<T, N, true>(w, x, blocks, stored, second, encoding, decoding)
                                        : better<T, N, false>(w, x, blocks, stored, second, encoding, decoding);
    }
    alignas(64) float by[LANES], multiply[LANES], back[LANES], words[LANES * N];
    store<false>(by, to_grid(stored, decoding));
    store<false>(multiply, finite != 0u ? stored : real(splat(QUIET_NAN)));
    store<false>(back, decoding);
    if (w.random) words_of(w, row, column, (int64_t)blocks * N, words);
    for (int b = 0; b < blocks; ++b)
        for (int v = 0; v < V; ++v) {
            const int64_t at = b * N + v * LANES;
            F q = load(x + at) * splat(by[b]);
            q = w.random ? stochastic<false>(q, w.grid, bits(load(words + at))) : nearest<false>(q, w.grid);
            store<STREAM>(y + at, q * splat(multiply[b]) * splat(back[b]));
        }
}

}  // namespace roundoff
