// Sixteen lanes of float32, as GCC and Clang vector extensions: one source for every CPU, lowered to what it has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace roundoff {

typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint64_t W __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
struct bf16 { uint16_t bits; };

constexpr int LANES = 16;
constexpr uint32_t SIGN = 0x80000000u, MAGNITUDE = 0x7fffffffu, EXPONENT = 0x7f800000u, MANTISSA = 0x007fffffu;
constexpr uint32_t QUIET_NAN = 0x7fc00000u;

static inline F splat(float a) { return F{} + a; }
static inline U splat(uint32_t a) { return U{} + a; }
static inline U bits(F a) { return (U)a; }
static inline F real(U a) { return (F)a; }
static inline U max(U a, U b) { return a > b ? a : b; }
// The smaller of a and a bound; a NaN in a stays.
static inline F at_most(F a, F bound) { return bound < a ? bound : a; }
static inline F at_least(F a, F bound) { return bound > a ? bound : a; }
static inline F to_float(U a) { return __builtin_convertvector(a, F); }

static inline F square_root(F a) {
#if defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)a);
#else
    F r;
    for (int i = 0; i < LANES; ++i) r[i] = std::sqrt(a[i]);
    return r;
#endif
}

// 32 x 32 -> 64 bit products of the low halves of eight 64-bit lanes; the high halves may hold anything.
static inline W multiply_low(W a, uint32_t b) {
#if defined(__AVX512F__)
    return (W)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64((long long)b));
#else
    return (a & 0xffffffffull) * (uint64_t)b;
#endif
}

static inline F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline F load(const bf16* p) {
    H h;
    std::memcpy(&h, p, sizeof h);
    return real(__builtin_convertvector(h, U) << 16);
}

// float32 to bfloat16, round to nearest even; NaN becomes the quiet NaN.
static inline H narrow(F v) {
    U b = bits(v);
    U rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    rounded = (b & MAGNITUDE) > EXPONENT ? splat(QUIET_NAN >> 16) : rounded;
    return __builtin_convertvector(rounded, H);
}

// STREAM writes around the cache: an output much larger than the cache then costs no read of its lines.
template <bool STREAM> static inline void store(float* p, F v) {
#if defined(__AVX512F__)
    if (STREAM) return _mm512_stream_ps(p, (__m512)v);
#endif
    std::memcpy(p, &v, sizeof v);
}
template <bool STREAM> static inline void store(bf16* p, F v) {
    H h = narrow(v);
#if defined(__AVX512F__)
    if (STREAM) return _mm256_stream_si256((__m256i*)p, (__m256i)h);
#endif
    std::memcpy(p, &h, sizeof h);
}
// Thirty-two bfloat16 as sixteen pairs, for work on both halves without widening.
static inline U load_pairs(const bf16* p) {
    U v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <bool STREAM> static inline void store_pairs(bf16* p, U v) {
#if defined(__AVX512F__)
    if (STREAM) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
    std::memcpy(p, &v, sizeof v);
}
static inline void stream_fence() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

struct Larger {
    template <class V> static inline V of(V a, V b) { return max(a, b); }
};
struct Sum {
    template <class V> static inline V of(V a, V b) { return a + b; }
};
// One level of the transposing trees below: lanes of a and b in groups of S, neighbouring groups joined by OP.
template <int S, class OP, class V> static inline V fold(V a, V b) {
    static_assert(S == 1 || S == 2 || S == 4 || S == 8, "");
    V low, high;
    if (S == 1) {
        low = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        high = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    } else if (S == 2) {
        low = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        high = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    } else if (S == 4) {
        low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        high = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    } else {
        low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        high = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    return OP::of(low, high);
}
// Lane i of the result joins all lanes of m[i]: a transposing tree of 15 steps.
template <class OP, class V> static inline V folded(const V m[16]) {
    V a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) a[i] = fold<1, OP>(m[2 * i], m[2 * i + 1]);
    for (int i = 0; i < 4; ++i) b[i] = fold<2, OP>(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 2; ++i) c[i] = fold<4, OP>(b[2 * i], b[2 * i + 1]);
    return fold<8, OP>(c[0], c[1]);
}
static inline U maxima(const U m[16]) { return folded<Larger>(m); }
static inline F sums(const F m[16]) { return folded<Sum>(m); }
// `maxima` of eight vectors, each of whose halves has a maximum of its own.
static inline U maxima_of_halves(const U m[8]) {
    U a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = fold<1, Larger>(m[2 * i], m[2 * i + 1]);
    for (int i = 0; i < 2; ++i) b[i] = fold<2, Larger>(a[2 * i], a[2 * i + 1]);
    return fold<4, Larger>(b[0], b[1]);
}
// The low half of a beside the high half of b.
static inline F halves(F a, F b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31);
}
static inline uint32_t maximum(U a) {
    a = max(a, __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    a = max(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    a = max(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return a[0] > a[1] ? a[0] : a[1];
}

}  // namespace roundoff
