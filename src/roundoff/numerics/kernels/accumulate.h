// Sums of products by an accumulator of few bits, with the products of a group aligned to the largest of them; see
// accumulate.py, which defines the arithmetic. All sums are of whole numbers, in int32, and therefore exact.
#pragma once
#include "vector.h"

namespace roundoff {

struct PartialSums {
    int64_t promote, group;
    int mantissa;
    bool half;
};

// The whole numbers of a sum (magnitudes below 2^31) without the bits after the first 24, which float32 cannot hold.
static inline U first_24(U a) {
    for (int s = 1; s < 8; ++s) a = a >= (1u << (23 + s)) ? a & ~((1u << s) - 1u) : a;
    return a;
}

// The partial sums p of V vectors of outputs after one group: products of the scalars a[0 .. n) with rows of b, of which
// each has `columns` elements.
template <int V>
static inline void add_aligned(F p[V], const float* a, const float* b, int64_t n, int64_t columns, const PartialSums& s,
                               bool wide) {
    U largest[V];
    for (int v = 0; v < V; ++v) largest[v] = bits(p[v]) & MAGNITUDE;
    for (int64_t k = 0; k < n; ++k) {
        const F x = splat(a[k]);
        for (int v = 0; v < V; ++v)
            largest[v] = max(largest[v], bits(x * load(b + k * columns + v * LANES)) & MAGNITUDE);
    }
    F inverse[V];
    I sum[V];
    U special = splat(0u);  // Inf or NaN
    for (int v = 0; v < V; ++v) {
        special |= largest[v] >= EXPONENT ? splat(1u) : splat(0u);
        U power = largest[v] & EXPONENT;
        power = (U)signed_max((I)power, (I)splat((127u - 103u) << 23));
        power = (U)signed_min((I)power, (I)splat((127u + 127u) << 23));
        largest[v] = power;
        inverse[v] = real(splat((uint32_t)(s.mantissa + 254) << 23) - power);
        sum[v] = __builtin_convertvector(p[v] * inverse[v], I);
    }
    for (int64_t k = 0; k < n; ++k) {
        const F x = splat(a[k]);
        for (int v = 0; v < V; ++v)
            sum[v] += __builtin_convertvector((x * load(b + k * columns + v * LANES)) * inverse[v], I);
    }
    F rare[V] = {};
    if (maximum(special)) {
        auto infinite = [](F a) { return (bits(a) & MAGNITUDE) >= EXPONENT ? a : F{}; };
        for (int v = 0; v < V; ++v) rare[v] = infinite(p[v]);
        for (int64_t k = 0; k < n; ++k)
            for (int v = 0; v < V; ++v) rare[v] += infinite(splat(a[k]) * load(b + k * columns + v * LANES));
    }
    const F unit = real(splat((uint32_t)(127 - s.mantissa) << 23));
    for (int v = 0; v < V; ++v) {
        U sign = (U)sum[v] & SIGN, magnitude = (U)(sum[v] < 0 ? -sum[v] : sum[v]);
        if (wide) magnitude = first_24(magnitude);
        U result = bits(small_to_float(magnitude) * unit * real(largest[v])) & ~((1u << (23 - s.mantissa)) - 1u);
        if (s.half) {
            const F r = real(result), units = to_float((U)__builtin_convertvector(at_most(r, splat(1.0f)) * 16777216.0f, I));
            result = result < bits(splat(6.103515625e-05f)) ? bits(units * 5.9604644775390625e-08f) : result;
            result = result > bits(splat(65504.0f)) ? splat(EXPONENT) : result;
        }
        p[v] = real(result | sign);
        p[v] = (bits(rare[v]) & MAGNITUDE) >= EXPONENT ? rare[v] : p[v];
    }
}

template <int V>
static inline void sum_columns(const float* a, const float* b, float* out, int64_t length, int64_t columns,
                               const PartialSums& s, bool wide) {
    F total[V] = {};
    for (int64_t start = 0; start < length; start += s.promote) {
        F p[V] = {};
        const int64_t end = length - start < s.promote ? length : start + s.promote;
        for (int64_t first = start; first < end; first += s.group) {
            const int64_t n = end - first < s.group ? end - first : s.group;
            add_aligned<V>(p, a + first, b + first * columns, n, columns, s, wide);
        }
        for (int v = 0; v < V; ++v) total[v] += p[v];
    }
    for (int v = 0; v < V; ++v) store<false>(out + v * LANES, total[v]);
}

// out [rows, columns] from a [rows, length] and b [length, columns]; `columns` is a multiple of sixteen.
static void sum_rows(const float* a, const float* b, float* out, int64_t begin, int64_t end, int64_t length,
                     int64_t columns, const PartialSums& s) {
    const bool wide = (s.group + 1) << (s.mantissa + 1) > 1 << 24;
    for (int64_t i = begin; i < end; ++i) {
        int64_t j = 0;
        for (; j + 4 * LANES <= columns; j += 4 * LANES)
            sum_columns<4>(a + i * length, b + j, out + i * columns + j, length, columns, s, wide);
        for (; j < columns; j += LANES)
            sum_columns<1>(a + i * length, b + j, out + i * columns + j, length, columns, s, wide);
    }
}

}  // namespace roundoff
