// Quantize-dequantize of rows, with the same operations as blocks.py, in one pass over memory.
#pragma once
#include <algorithm>
#include <type_traits>
#include "philox.h"

namespace roundoff {

// In the order of formats/table.py. ENCODED: E4M3 under the last three rules, which nvfp4.h computes.
enum Scale : int32_t { TENSOR = 0, E8M0 = 1, E4M3 = 2, FLOAT32 = 3, E6M2 = 4, TAPERED = 5, ENCODED = 6 };
enum Rule : int32_t { FLOOR = 0, CEIL = 1, EVEN = 2, RCEIL = 3, TRANSFORMER_ENGINE = 4, SQUARED = 5, ABSOLUTE = 6 };

// The layout of `formats.Format.packed`.
struct Spec {
    int32_t scale, rule, block, mantissa, emin, emax;  // block 0: a whole row
    float low, high, divisor, tensor_divisor;
};

// The grid of an element, with its constants in every lane.
struct Grid {
    F low, high;
    U smallest, rounder;
    uint32_t mantissa;
    Grid(int mantissa_bits, int emin, float lo, float hi)
        : low(splat(lo)), high(splat(hi)), smallest(splat((uint32_t)(emin + 127) << 23)),
          rounder(splat((uint32_t)(23 - mantissa_bits) << 23)), mantissa((uint32_t)mantissa_bits) {}
};
static const int E4M3_MANTISSA = 3, E4M3_EMIN = -6;
static const float E4M3_HIGH = 448.0f;

static inline F with_sign(F magnitude, F of) { return real(bits(magnitude) | (bits(of) & SIGN)); }

// Rounds v on a floating-point grid, whose largest number is `high` and whose smallest normal one has the bits `smallest`.
static inline F nearest_on(F v, F high, U smallest, U rounder) {
    F t = at_most(real(bits(v) & MAGNITUDE), high);
    F c = real(max(bits(t) & EXPONENT, smallest) + rounder);
    return with_sign((t + c) - c, v);
}

// Rounds v to the nearest grid number, ties to even. Values beyond the grid saturate, and NaN stays NaN.
template <bool INTEGER> static inline F nearest(F v, const Grid& g) {
    if (INTEGER) {
        F t = at_least(at_most(v, g.high), g.low);
        return with_sign(real(bits((t + 0x1.8p23f) - 0x1.8p23f) & MAGNITUDE), v);
    }
    return nearest_on(v, g.high, g.smallest, g.rounder);
}

// Rounds v to one of its two grid neighbours, chosen by random words so that the mean is v.
template <bool INTEGER> static inline F stochastic(F v, const Grid& g, U words) {
    F t = at_least(at_most(v, g.high), g.low);
    F a = real(bits(t) & MAGNITUDE);
    F step = INTEGER ? splat(1.0f) : real(max(bits(a) & EXPONENT, g.smallest) - (g.mantissa << 23));
    F quotient = a / step;
    F lower = (quotient + 0x1p23f) - 0x1p23f;
    lower = lower > quotient ? lower - 1.0f : lower;
    F threshold = small_to_float(words >> 8) * 0x1p-24f;
    F up = threshold < quotient - lower ? splat(1.0f) : splat(0.0f);
    return with_sign((lower + up) * step, v);
}

// Scales of LANES blocks. Elements are divided by `divide` (E8M0: multiplied by it), rounded, and multiplied by
// `multiply`.
struct Scales { F multiply, divide; };

template <int SCALE> static inline Scales scales_of(U amax, const Spec& s, F tensor_scale) {
    U finite = amax < EXPONENT ? splat(~0u) : splat(0u);
    F a = real(amax & finite);
    Scales r;
    if (SCALE == E8M0) {
        U b = bits(s.rule == RCEIL ? a / splat(s.divisor) : a);
        if (s.rule == EVEN) b = b + (1u << (22 - s.mantissa));
        U e = b >> 23;
        if (s.rule == CEIL) e = e + ((b & MANTISSA) != 0u ? splat(1u) : splat(0u));
        if (s.rule == RCEIL) {
            U limit = b < 0x800000u ? splat(0x400000u) : (b & ~MANTISSA);
            e = e + (b > limit ? splat(1u) : splat(0u));
        } else {
            U down = splat((uint32_t)s.emax);
            e = e > down ? e - down : splat(0u);
        }
        e = e > 254u ? splat(254u) : e;
        r.multiply = real(e == 0u ? splat(0x400000u) : e << 23);
        r.divide = real(e == 254u ? splat(0x400000u) : (254u - e) << 23);
    } else {
        F q = a / splat(s.divisor);
        if (SCALE == E4M3) {
            q = q / tensor_scale;
            q = tensor_scale == 0.0f ? splat(0.0f) : q;
            q = nearest<false>(q, Grid(E4M3_MANTISSA, E4M3_EMIN, -E4M3_HIGH, E4M3_HIGH)) * tensor_scale;
        }
        r.multiply = q;
        r.divide = q == 0.0f ? splat(1.0f) : q;
    }
    r.multiply = finite != 0u ? r.multiply : real(splat(QUIET_NAN));
    return r;
}

// The grid of an element times the power-of-two scales of LANES blocks. Rounding on it gives the same bits as dividing,
// rounding and multiplying, as long as no number on the way leaves float32's normal range: `exact` says so.
struct MovedGrid {
    F high;
    U smallest;
    bool exact;
    MovedGrid(const Spec& s, const Grid& g, U amax, F scale) {
        scale = amax == 0u ? splat(1.0f) : scale;  // any scale serves a block of zeros
        const U exponent = bits(scale) >> 23;      // 255 for a block that holds NaN or Inf
        high = g.high * scale;
        smallest = g.smallest + ((exponent - 127u) << 23);
        const U far = exponent > 127u ? exponent - 127u : 127u - exponent;
        exact = s.emin >= -32 && s.emax <= 32 && maximum(far) <= 60;
    }
};

// The parameters of a call, apart from its arrays.
struct Work {
    const Spec& spec;
    Grid grid;
    bool random;
    uint64_t key;
    Work(const Spec& s, bool random, uint64_t key)
        : spec(s), grid(s.mantissa, s.emin, s.low, s.high), random(random), key(key) {}
};

// Random words of columns [column, column + n) of a row; column is a multiple of 4.
__attribute__((noinline)) static void words_of(const Work& w, int64_t row, int64_t column, int64_t n, float* out) {
    Counters c;
    for (int64_t i = 0; i < n; i += DRAWS) {
        c.ramp(row, (column + i) >> 2);
        draw<WORDS>(c, w.key, out + i);
    }
}

// Tiles with arithmetic of their own: hifloat.h, nvfp4.h and pairs.h.
template <class T, int N, bool STREAM, bool RANDOM>
static void hif4_tile(const Work& w, const T* x, T* y, int blocks, int64_t row, int64_t column);
template <class T, int N, bool STREAM>
static void encoded_tile(const Work& w, const T* x, T* y, int blocks, F encoding, int64_t row, int64_t column);

// Quantizes up to LANES blocks of N elements that start at `column` of `row`; lane b of tensor_scale is for block b.
template <class T, int SCALE, int N, bool INTEGER, bool STREAM>
static inline void tile(const Work& w, const T* x, T* y, int blocks, F tensor_scale, int64_t row, int64_t column) {
    if constexpr (SCALE == E6M2) {
        return w.random ? hif4_tile<T, N, STREAM, true>(w, x, y, blocks, row, column)
                        : hif4_tile<T, N, STREAM, false>(w, x, y, blocks, row, column);
    }
    if constexpr (SCALE == ENCODED) return encoded_tile<T, N, STREAM>(w, x, y, blocks, tensor_scale, row, column);
    constexpr int V = N / LANES;
    U m[LANES];  // written out: by `amax_of_blocks` NVFP4 takes a tenth longer (GCC, AVX-512)
    for (int b = 0; b < LANES; ++b) {
        m[b] = splat(0u);
        if (b >= blocks) continue;
        for (int v = 0; v < V; ++v) m[b] = max(m[b], bits(load(x + b * N + v * LANES)) & MAGNITUDE);
    }
    const U amax = maxima(m);
    Scales s = scales_of<SCALE>(amax, w.spec, tensor_scale);
    if constexpr (SCALE == E8M0) {
        const MovedGrid moved(w.spec, w.grid, amax, s.multiply);
        if (moved.exact && !w.random) {
            alignas(64) float high[LANES], smallest[LANES];
            store<false>(high, moved.high);
            store<false>(smallest, real(moved.smallest));
            for (int b = 0; b < blocks; ++b) {
                const F most = splat(high[b]);
                const U least = bits(splat(smallest[b]));
                for (int v = 0; v < V; ++v) {
                    const F a = load(x + b * N + v * LANES);
                    store<STREAM>(y + b * N + v * LANES, nearest_on(a, most, least, w.grid.rounder));
                }
            }
            return;
        }
    }
    alignas(64) float multiply[LANES], divide[LANES], words[LANES * N];
    store<false>(multiply, s.multiply);
    store<false>(divide, s.divide);
    if (w.random) words_of(w, row, column, (int64_t)blocks * N, words);
    auto each = [&](auto rounded) {
        for (int b = 0; b < blocks; ++b)
            for (int v = 0; v < V; ++v) {
                const int at = b * N + v * LANES;
                const F a = load(x + at), d = splat(divide[b]);
                store<STREAM>(y + at, rounded(SCALE == E8M0 ? a * d : a / d, at) * splat(multiply[b]));
            }
    };
    const Grid grid = w.grid;
    if (w.random) each([&](F q, int at) { return stochastic<INTEGER>(q, grid, bits(load(words + at))); });
    else each([&](F q, int) { return nearest<INTEGER>(q, grid); });
}

template <int SCALE, int N, bool STREAM>
static void pair_tile(const Work& w, const bf16* x, bf16* y, F tensor_scale);

// Quantizes LANES whole blocks on the fastest path.
template <class T, int SCALE, int N, bool INTEGER, bool STREAM>
static inline void full_tile(const Work& w, const T* x, T* y, F tensor_scale, int64_t row, int64_t column) {
    if constexpr (std::is_same<T, bf16>::value && !INTEGER && SCALE != E6M2 && SCALE != ENCODED) {
        if (!w.random) return pair_tile<SCALE, N, STREAM>(w, x, y, tensor_scale);
    }
    tile<T, SCALE, N, INTEGER, STREAM>(w, x, y, LANES, tensor_scale, row, column);
}

// Quantizes n elements of a row: whole blocks, perhaps followed by a partial one.
template <class T, int SCALE, int N, bool INTEGER, bool STREAM>
static void block_row(const Work& w, const T* x, T* y, int64_t n, float tensor_scale, int64_t row) {
    const F scale = splat(tensor_scale);
    int64_t i = 0;
    for (; i + LANES * N <= n; i += LANES * N) full_tile<T, SCALE, N, INTEGER, STREAM>(w, x + i, y + i, scale, row, i);
    int blocks = (int)((n - i) / N);
    if (blocks > 0) tile<T, SCALE, N, INTEGER, STREAM>(w, x + i, y + i, blocks, scale, row, i);
    i += (int64_t)blocks * N;
    if (i == n) return;
    alignas(64) T buffer[N] = {};
    std::copy(x + i, x + n, buffer);
    tile<T, SCALE, N, INTEGER, false>(w, buffer, buffer, 1, scale, row, i);
    std::copy(buffer, buffer + (n - i), y + i);
}

// Quantizes rows of whole blocks under one tensor scale per row; a tile may contain blocks of several rows.
template <class T, int SCALE, int N, bool INTEGER, bool STREAM>
static void block_rows(const Work& w, const T* x, T* y, int64_t columns, const float* row_scales, int64_t rows) {
    const int64_t per_row = columns / N, blocks = rows * per_row;
    int64_t row = 0, in_row = 0;
    for (int64_t b = 0; b < blocks; b += LANES) {
        int count = (int)std::min<int64_t>(LANES, blocks - b);
        alignas(64) float scales[LANES] = {};
        for (int i = 0; i < count; ++i) {
            scales[i] = row_scales[row];
            if (++in_row == per_row) in_row = 0, ++row;
        }
        if (count == LANES) full_tile<T, SCALE, N, INTEGER, STREAM>(w, x + b * N, y + b * N, load(scales), 0, 0);
        else tile<T, SCALE, N, INTEGER, STREAM>(w, x + b * N, y + b * N, count, load(scales), 0, 0);
    }
}

// Loads min(n, LANES) elements; the other lanes are zero.
template <class T> static inline F load_part(const T* x, int64_t n) {
    if (n >= LANES) return load(x);
    T buffer[LANES] = {};
    std::copy(x, x + n, buffer);
    return load(buffer);
}

// The bits of the largest magnitude of n elements; FINITE ignores NaN and Inf.
template <class T, bool FINITE> static uint32_t amax_of(const T* x, int64_t n) {
    U m[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; ++k) {
            U a = bits(load(x + i + LANES * k)) & MAGNITUDE;
            m[k] = max(m[k], FINITE ? (a < EXPONENT ? a : splat(0u)) : a);
        }
    for (; i < n; i += LANES) {
        U a = bits(load_part(x + i, n - i)) & MAGNITUDE;
        m[0] = max(m[0], FINITE ? (a < EXPONENT ? a : splat(0u)) : a);
    }
    return maximum(max(max(m[0], m[1]), max(m[2], m[3])));
}

// Quantizes a row under one scale; elements that are not finite become NaN.
template <class T, bool INTEGER, bool STREAM>
static void scaled_row(const Work& w, const T* x, T* y, int64_t n, float multiply, int64_t row) {
    F scale = splat(multiply), divide = splat(multiply == 0.0f ? 1.0f : multiply);
    alignas(64) float words[64];
    for (int64_t i = 0; i < n; i += LANES) {
        F a = load_part(x + i, n - i);
        F q = a / divide;
        if (w.random && (i & 63) == 0) words_of(w, row, i, 64, words);
        q = w.random ? stochastic<INTEGER>(q, w.grid, bits(load(words + (i & 63)))) : nearest<INTEGER>(q, w.grid);
        q = q * scale;
        q = (bits(a) & MAGNITUDE) < EXPONENT ? q : real(splat(QUIET_NAN));
        if (n - i >= LANES) {
            store<STREAM>(y + i, q);
        } else {
            T buffer[LANES];
            store<false>(buffer, q);
            std::copy(buffer, buffer + (n - i), y + i);
        }
    }
}

}  // namespace roundoff
