// Philox4x32-7 and the Box-Muller transform for LANES counters, with the operations of rng.py in the same order.
#pragma once
#include "vector.h"

namespace roundoff {

constexpr int DRAWS = 4 * LANES;  // draws of one call
constexpr int QUARTERS = LANES / 4;  // pieces of 128 bits in a vector

// `interleave` transposes 4 x 4 words within each piece of 128 bits, so lane 4i + j must hold group QUARTERS * j + i.
static constexpr int lane_of_group(int g) { return 4 * (g % QUARTERS) + g / QUARTERS; }
static constexpr int group_of_lane(int lane) { return QUARTERS * (lane % 4) + lane / 4; }

constexpr int ROUNDS = 7;

struct Counters {
    U group_low, group_high, row_low, row_high;

    void set(int g, int64_t row, int64_t group) {
        int lane = lane_of_group(g);
        group_low[lane] = (uint32_t)(uint64_t)group;
        group_high[lane] = (uint32_t)((uint64_t)group >> 32);
        row_low[lane] = (uint32_t)(uint64_t)row;
        row_high[lane] = (uint32_t)((uint64_t)row >> 32);
    }
    // LANES consecutive groups of one row.
    void ramp(int64_t row, int64_t group) {
        U offset;
        for (int lane = 0; lane < LANES; ++lane) offset[lane] = (uint32_t)group_of_lane(lane);
        uint64_t g = (uint64_t)group, r = (uint64_t)row;
        group_low = splat((uint32_t)g) + offset;
        U carry = group_low < splat((uint32_t)g) ? splat(1u) : splat(0u);
        group_high = splat((uint32_t)(g >> 32)) + carry;
        row_low = splat((uint32_t)r);
        row_high = splat((uint32_t)(r >> 32));
    }
};

// The rounds, for the even or for the odd lanes. Each 64-bit lane holds a 32-bit word in its low half.
static inline void rounds(W& c0, W& c1, W& c2, W& c3, uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int i = 0; i < ROUNDS; ++i) {
        W p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
        c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
        c1 = p1;  // the high half is never read
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

static inline void philox(const Counters& c, uint64_t key, U w[4]) {
    W a0 = (W)c.group_low, a1 = (W)c.group_high, a2 = (W)c.row_low, a3 = (W)c.row_high;
    W b0 = a0 >> 32, b1 = a1 >> 32, b2 = a2 >> 32, b3 = a3 >> 32;
    rounds(a0, a1, a2, a3, key);
    rounds(b0, b1, b2, b3, key);
    w[0] = merge(a0, b0);
    w[1] = merge(a1, b1);
    w[2] = merge(a2, b2);
    w[3] = merge(a3, b3);
}

static inline F negative_two_log(U word) {
    F f = to_float(word) + 0.5f;
    U shifted = bits(f) - (0x3f3504f3u + (32u << 23));
    F exponent = __builtin_convertvector((I)shifted >> 23, F);
    F x = real((shifted & MANTISSA) + 0x3f3504f3u) - 1.0f;
    F p = x * 0.2858414053916931f + -0.4411187171936035f;
    p = p * x + 0.508065402507782f;
    p = p * x + -0.6651604771614075f;
    p = p * x + 0.9998043775558472f;
    p = p * x + -2.000009059906006f;
    return p * x + exponent * -1.3862943649291992f;
}

static inline void box_muller(U w0, U w1, F& first, F& second) {
    F r = square_root(negative_two_log(w0));
    F x = __builtin_convertvector((I)(w1 << 2), F) * 0x1.921fb6p-32f;
    F z = x * x;
    F s = ((z * 0.008151635527610779f + -0.16662479937076569f) * z + 0.9999985694885254f) * x;
    F c = ((z * -0.0013591853203251958f + 0.041655778884887695f) * z + -0.4999988377094269f) * z + 1.0f;
    c = real(bits(c) ^ ((w1 << 1) & SIGN));
    first = r * ((I)w1 < 0 ? s : c);
    second = r * ((I)w1 < 0 ? c : s);
}

// `interleave` brings words 0 to 3 of LANES counters into the order of DRAWS consecutive elements: it first pairs the
// words of two vectors, then puts the halves of the 128-bit pieces side by side.
struct FirstPairs {
    static constexpr int at(int k) { return k / 4 * 4 + k % 4 / 2 + k % 2 * LANES; }
};
struct LastPairs {
    static constexpr int at(int k) { return FirstPairs::at(k) + 2; }
};
struct FirstHalves {
    static constexpr int at(int k) { return k / 4 * 4 + k % 2 + k % 4 / 2 * LANES; }
};
struct LastHalves {
    static constexpr int at(int k) { return FirstHalves::at(k) + 2; }
};
static inline void interleave(const U w[4], U e[4]) {
    U a = shuffled<FirstPairs>(w[0], w[1]), b = shuffled<LastPairs>(w[0], w[1]);
    U c = shuffled<FirstPairs>(w[2], w[3]), d = shuffled<LastPairs>(w[2], w[3]);
    e[0] = shuffled<FirstHalves>(a, c);
    e[1] = shuffled<LastHalves>(a, c);
    e[2] = shuffled<FirstHalves>(b, d);
    e[3] = shuffled<LastHalves>(b, d);
}

enum Draw { WORDS = 0, NORMALS = 1, UNIFORMS = 2 };

// Writes DRAWS draws of LANES counters to p; words are written as bits.
template <int DRAW> static inline void draw(const Counters& c, uint64_t key, float* p) {
    U w[4], e[4];
    philox(c, key, w);
    if (DRAW == NORMALS) {
        F n[4];
        box_muller(w[0], w[1], n[0], n[1]);
        box_muller(w[2], w[3], n[2], n[3]);
        for (int k = 0; k < 4; ++k) w[k] = bits(n[k]);
    }
    interleave(w, e);
    if (DRAW == UNIFORMS)
        for (int k = 0; k < 4; ++k) e[k] = bits(small_to_float(e[k] >> 8) * 0x1p-24f);
    for (int k = 0; k < 4; ++k) store<false>(p + LANES * k, real(e[k]));
}

}  // namespace roundoff
