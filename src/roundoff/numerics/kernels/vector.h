// Vectors as wide as the target's own, by the vector extensions of GCC and Clang: sixteen lanes of float32 under
// AVX-512, eight under AVX2, four elsewhere (SSE2, NEON). Every operation rounds each lane by itself, so results do not
// depend on the width. Intrinsics are used only where compilers turn the portable form into code that is several times
// slower.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace roundoff {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float F __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint64_t W __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
typedef int16_t S __attribute__((vector_size(4 * LANES)));  // for pairs of bfloat16
struct bf16 { uint16_t bits; };

constexpr uint32_t SIGN = 0x80000000u, MAGNITUDE = 0x7fffffffu, EXPONENT = 0x7f800000u, MANTISSA = 0x007fffffu;
constexpr uint32_t QUIET_NAN = 0x7fc00000u;

static inline F splat(float a) { return a - F{}; }  // a + 0 would be an addition, because -0 + 0 is 0
static inline U splat(uint32_t a) { return U{} + a; }
static inline U bits(F a) { return (U)a; }
static inline F real(U a) { return (F)a; }
// The smaller (below: the larger) of a and a bound; a NaN in a stays NaN.
static inline F at_most(F a, F bound) { return bound < a ? bound : a; }
static inline F at_least(F a, F bound) { return bound > a ? bound : a; }
static inline F to_float(U a) { return __builtin_convertvector(a, F); }
// For numbers below 2^31: the signed conversion, which is one instruction on every target.
static inline F small_to_float(U a) { return __builtin_convertvector((I)a, F); }

template <class V> static inline V signed_max(V a, V b) { return a > b ? a : b; }
template <class V> static inline V signed_min(V a, V b) { return a < b ? a : b; }

// The larger bits of magnitudes, below 2^31.
static inline U max(U a, U b) {
#if defined(__AVX512F__)
    return (U)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (U)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    return (U)signed_max((I)a, (I)b);
#endif
}

static inline F square_root(F a) {
#if defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
    return (F)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
    return (F)_mm_sqrt_ps((__m128)a);
#elif defined(__aarch64__)
    return (F)vsqrtq_f32((float32x4_t)a);
#else
    F r;
    for (int i = 0; i < LANES; ++i) r[i] = std::sqrt(a[i]);
    return r;
#endif
}

// 32 x 32 -> 64 bit products of the low halves of the 64-bit lanes; the high halves may hold anything.
static inline W multiply_low(W a, uint32_t b) {
#if defined(__AVX512F__)
    return (W)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64((long long)b));
#elif defined(__AVX2__)
    return (W)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x((long long)b));
#elif defined(__SSE2__)
    return (W)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x((long long)b));
#elif defined(__ARM_NEON)
    return (W)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
    return (a & 0xffffffffull) * (uint64_t)b;
#endif
}

// The low half of each 64-bit lane from `even`, the high half from the low half of `odd`.
static inline U merge(W even, W odd) {
#if defined(__AVX512F__)
    return (U)_mm512_mask_blend_epi32(0xaaaa, (__m512i)even, (__m512i)(odd << 32));
#elif defined(__AVX2__)
    return (U)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
    return (U)((odd << 32) | (even & 0xffffffffull));
#endif
}

static inline F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline F load(const bf16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return real((U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
    H h;
    std::memcpy(&h, p, sizeof h);
    return real(__builtin_convertvector(h, U) << 16);
#endif
}

// float32 to bfloat16, round to nearest even; NaN becomes the quiet NaN.
static inline H narrow(F v) {
    U b = bits(v);
    U rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    rounded = (b & MAGNITUDE) > EXPONENT ? splat(QUIET_NAN >> 16) : rounded;
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
    return (H)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(rounded, H);
#endif
}

// STREAM writes around the cache, so that an output much larger than the cache is not read first.
template <bool STREAM> static inline void store(float* p, F v) {
#if defined(__AVX512F__)
    if (STREAM) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    if (STREAM) return _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
    if (STREAM) return _mm_stream_ps(p, (__m128)v);
#endif
    std::memcpy(p, &v, sizeof v);
}
template <bool STREAM> static inline void store(bf16* p, F v) {
    H h = narrow(v);
#if defined(__AVX512F__)
    if (STREAM) return _mm256_stream_si256((__m256i*)p, (__m256i)h);
#elif defined(__AVX2__)
    if (STREAM) return _mm_stream_si128((__m128i*)p, (__m128i)h);
#endif
    std::memcpy(p, &h, sizeof h);
}
// Loads 2 * LANES bfloat16 as pairs, so that both halves can be used without widening.
static inline U load_pairs(const bf16* p) {
    U v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <bool STREAM> static inline void store_pairs(bf16* p, U v) {
    store<STREAM>((float*)p, real(v));
}
static inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// `shuffled<INDEX>(a, b)`: lane k of the result is lane INDEX::at(k) of the concatenation of a and b.
template <class INDEX, class V, size_t... K> static inline V shuffled_by(V a, V b, std::index_sequence<K...>) {
    return __builtin_shufflevector(a, b, INDEX::at((int)K)...);
}
template <class INDEX, class V> static inline V shuffled(V a, V b) {
    return shuffled_by<INDEX>(a, b, std::make_index_sequence<LANES>());
}

struct Larger {
    template <class V> static inline V of(V a, V b) { return max(a, b); }
};
struct Sum {
    template <class V> static inline V of(V a, V b) { return a + b; }
};
// One level of the transposing trees below: OP joins neighbouring groups of S lanes of a and of b.
template <int S> struct EvenGroups {
    static constexpr int at(int k) { return (k / S) % 2 == 0 ? k : k - S + LANES; }
};
template <int S> struct OddGroups {
    static constexpr int at(int k) { return (k / S) % 2 == 0 ? k + S : k + LANES; }
};
template <int S, class OP, class V> static inline V fold(V a, V b) {
    return OP::of(shuffled<EvenGroups<S>>(a, b), shuffled<OddGroups<S>>(a, b));
}
// Lane i of the result joins all lanes of m[i], i < LANES, by a transposing tree of LANES - 1 steps. S is the size of
// the groups on the next level.
template <class OP, int S, int END, class V> static inline V fold_tree(V* m) {
    if constexpr (S == END) {
        return m[0];
    } else {
        for (int i = 0; i < END / S / 2; ++i) m[i] = fold<S, OP>(m[2 * i], m[2 * i + 1]);
        return fold_tree<OP, 2 * S, END>(m);
    }
}
static inline U maxima(U* m) { return fold_tree<Larger, 1, LANES>(m); }
static inline F sums(F* m) { return fold_tree<Sum, 1, LANES>(m); }
// The bits of the largest magnitude of up to LANES blocks of N elements; lane b is for block b, and 0 past the last one.
template <int N, class T>
static inline U amax_of_blocks(const T* x, int blocks) {
    U m[LANES];
    for (int b = 0; b < LANES; ++b) {
        m[b] = splat(0u);
        if (b >= blocks) continue;
        for (int v = 0; v < N / LANES; ++v) m[b] = max(m[b], bits(load(x + b * N + v * LANES)) & MAGNITUDE);
    }
    return maxima(m);
}
// `maxima` of LANES / 2 vectors, separately for the two halves of each.
static inline U maxima_of_halves(U* m) { return fold_tree<Larger, 1, LANES / 2>(m); }

// Exchanges the halves of each group of 2 * S lanes.
template <int S> struct Swapped {
    static constexpr int at(int k) { return k ^ S; }
};
template <class OP, int S, class V> static inline auto joined(V a) {
    if constexpr (S == 0) {
        return a[0];
    } else {
        return joined<OP, S / 2>(OP::of(a, shuffled<Swapped<S>>(a, a)));
    }
}
static inline uint32_t maximum(U a) { return joined<Larger, LANES / 2>(a); }

}  // namespace roundoff
