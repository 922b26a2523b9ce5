// HiF8 and HiF4, with the arithmetic of hifloat.py.
#pragma once
#include "blocks.h"

namespace roundoff {

// The bits of magnitudes of HiF8, to nearest and halves away from zero, for the bits of float32 (M = 23) or bfloat16
// (M = 7). Adding half a step to the bits and clearing those below the step also carries into the exponent.
template <int M, class V> static inline V hif8_bits(V v) {
    constexpr int BIAS = 127, SMALLEST = BIAS - 22, LOW = M - 3;  // LOW: bits below three bits of mantissa
    constexpr int ALL = (int)((1u << (M + 8)) - 1u), OVERFLOW = (BIAS + 15) << M | 1 << (M - 2), INFINITE = 255 << M;  // 1.25 * 2^15
    V magnitude = v & ALL;
    V exponent = (magnitude >> M) - BIAS;
    V size = signed_min(exponent < 0 ? -exponent : exponent, V{} + 31);
    // Above 3, 7 and 15 one more bit is below the step: the bits of the size, filled up from its highest one.
    V below = ((size | size >> 1 | size >> 2) << (LOW - 2)) | ((1 << LOW) - 1);
    V rounded = (magnitude + (below ^ below >> 1)) & ~below;
    rounded = signed_max(rounded, V{} + (SMALLEST << M)) & (V)(magnitude >= ((SMALLEST - 1) << M));
    rounded = magnitude >= OVERFLOW ? signed_max(magnitude, V{} + INFINITE) : rounded;  // NaN stays
    return rounded | (v & ~ALL);
}

// The whole numbers next to `quotient` (at least 0; above 8 it may become any number above 7): halves go up.
template <bool RANDOM> static inline F whole(F quotient, U words) {
    F bounded = at_most(quotient, splat(16.0f));
    F lower = __builtin_convertvector(__builtin_convertvector(bounded, I), F);
    F rest = bounded - lower;
    if (RANDOM) return lower + (rest > small_to_float(words >> 8) * 0x1p-24f ? splat(1.0f) : splat(0.0f));
    return lower + (rest >= 0.5f ? splat(1.0f) : splat(0.0f));
}

// HiF8 by random words.
static inline F hif8_stochastic(F v, U words) {
    const I magnitude = (I)(bits(v) & MAGNITUDE);
    const I exponent = (magnitude >> 23) - 127;
    const I size = exponent < 0 ? -exponent : exponent;
    const I of = (size <= 3) + (size <= 7) + (size <= 15);  // a true comparison is -1, so this is minus the bits
    const F step = (F)((signed_max(exponent, I{} - 22) + of + 127) << 23);
    F r = at_most(whole<true>((F)magnitude / step, words) * step, splat(0x1p15f));
    r = magnitude >= (I)bits(splat(1.25f * 0x1p15f)) ? (F)signed_max(magnitude, I{} + (int32_t)EXPONENT) : r;
    return with_sign(r, v);
}

// Quantizes n elements of a row to HiF8.
template <class T, bool STREAM> static void hif8_row(const Work& w, const T* x, T* y, int64_t n, int64_t row) {
    int64_t i = 0;
    if (!w.random) {
        constexpr int EACH = sizeof(T) == sizeof(float) ? LANES : 2 * LANES;
        auto rounded = [](const T* from, T* to) {
            U v = load_pairs((const bf16*)from);
            if constexpr (EACH == LANES) v = (U)hif8_bits<23>((I)v);
            else v = (U)hif8_bits<7>((S)v);
            store_pairs<STREAM>((bf16*)to, v);
        };
        for (; i + 2 * EACH <= n; i += 2 * EACH) {
            rounded(x + i, y + i);
            rounded(x + i + EACH, y + i + EACH);
        }
        for (; i < n; i += EACH) {
            if (n - i >= EACH) {
                rounded(x + i, y + i);
                continue;
            }
            alignas(64) T buffer[EACH] = {};
            std::copy(x + i, x + n, buffer);
            rounded(buffer, buffer);
            std::copy(buffer, buffer + (n - i), y + i);
        }
        return;
    }
    alignas(64) float words[64];
    for (; i < n; i += LANES) {
        if ((i & 63) == 0) words_of(w, row, i, 64, words);
        T buffer[LANES];
        store<false>(buffer, hif8_stochastic(load_part(x + i, n - i), bits(load(words + (i & 63)))));
        std::copy(buffer, buffer + std::min<int64_t>(LANES, n - i), y + i);
    }
}

// A finite float32 at least 0, rounded to nearest even at bit LOW.
template <int LOW> static inline F cut(F v) {
    U b = bits(v);
    return real((b + ((1u << (LOW - 1)) - 1u) + ((b >> LOW) & 1u)) >> LOW << LOW);
}

// Quantizes up to LANES blocks of N = 64 elements to HiF4.
template <class T, int N, bool STREAM, bool RANDOM>
static void hif4_tile(const Work& w, const T* x, T* y, int blocks, int64_t row, int64_t column) {
    constexpr int V = N / LANES, TOGETHER = LANES < 8 ? 2 : 1;  // vectors that hold a group of 8
    const U amax = amax_of_blocks<N>(x, blocks);
    const U finite = amax < EXPONENT ? splat(~0u) : splat(0u);
    F scale = cut<21>(cut<16>(real(amax & finite) * 0.142578125f));  // 1/7 in bfloat16
    scale = at_least(at_most(scale, splat(1.5f * 0x1p15f)), splat(0x1p-48f));
    const F reciprocal = cut<16>(splat(1.0f) / scale);
    alignas(64) float multiply[LANES], by[LANES], words[RANDOM ? LANES * N : 1];
    store<false>(multiply, finite != 0u ? scale : real(splat(QUIET_NAN)));
    store<false>(by, reciprocal);
    if (RANDOM) words_of(w, row, column, (int64_t)blocks * N, words);
    for (int b = 0; b < blocks; ++b) {
        const F back = splat(multiply[b]), times = splat(by[b]);
        for (int v = 0; v < V; v += TOGETHER) {
            F value[TOGETHER], of_four[TOGETHER];
            for (int k = 0; k < TOGETHER; ++k) {
                value[k] = load(x + b * N + (v + k) * LANES);
                U a = bits(real(bits(value[k]) & MAGNITUDE) * times);
                a = max(a, shuffled<Swapped<1>>(a, a));
                of_four[k] = real(max(a, shuffled<Swapped<2>>(a, a)));
            }
            F of_eight;
            if constexpr (TOGETHER == 2) of_eight = real(max(bits(of_four[0]), bits(of_four[1])));
            else of_eight = real(max(bits(of_four[0]), shuffled<Swapped<4 % LANES>>(bits(of_four[0]), bits(of_four[0]))));
            const F eight = of_eight >= 4.0f ? splat(2.0f) : splat(1.0f);
            for (int k = 0; k < TOGETHER; ++k) {
                const F micro = of_four[k] >= eight + eight ? eight + eight : eight;
                const F less = micro == 4.0f ? splat(0.25f) : micro == 2.0f ? splat(0.5f) : splat(1.0f);
                const int64_t at = b * N + (v + k) * LANES;
                F relative = real(bits(value[k]) & MAGNITUDE) * times;
                U random = splat(0u);
                if (RANDOM) random = bits(load(words + at));
                F code = at_most(whole<RANDOM>(relative * less * 4.0f, random), splat(7.0f));
                store<STREAM>(y + at, with_sign(code * (micro * 0.25f) * back, value[k]));
            }
        }
    }
}

}  // namespace roundoff
