// The operations of a Llama-like decoder layer between its matrix products, each in one pass over memory, in float32.
//   norm:    h += delta;  out = weight * (h / sqrt(mean(h^2) + eps))
//   attend:  rotary embedding of q and k; k and v into the cache, perhaps in a format of its own;
//            softmax(q k^T * scale) v over the visible columns
//   gate:    g = g / (1 + exp(-g)) * up
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>
#include "vector.h"

namespace roundoff {

// On every target a sum runs in sixteen lanes (PARTS vectors), which are joined in a fixed order for the same bits.
constexpr int SIXTEEN = 16, PARTS = SIXTEEN / LANES;

static inline float total(const F a[PARTS]) {
    F joint[PARTS];
    for (int i = 0; i < PARTS; ++i) joint[i] = a[i];
    for (int n = PARTS / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) joint[i] += joint[i + n];
    return joined<Sum, LANES / 2>(joint[0]);
}
// Lane i of `result` becomes the sum of all lanes of m[i], i < SIXTEEN; each m[i] consists of PARTS vectors.
static inline void sums_of(F m[SIXTEEN][PARTS], F result[PARTS]) {
    for (int part = 0; part < PARTS; ++part) {
        F pieces[PARTS];
        for (int p = 0; p < PARTS; ++p) {
            F own[LANES];
            for (int i = 0; i < LANES; ++i) own[i] = m[LANES * part + i][p];
            pieces[p] = sums(own);
        }
        for (int n = 1; n < PARTS; n *= 2)
            for (int i = 0; i + n < PARTS; i += 2 * n) pieces[i] += pieces[i + n];
        result[part] = pieces[0];
    }
}

// exp with an error of about 1 ulp: x = n*ln2 + r, a polynomial of degree 6 in r (Cephes expf), then n is added to the
// exponent.
static inline F exponential(F x) {
    x = at_least(at_most(x, splat(88.0f)), splat(-87.0f));
    const F shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    F n = (x * 1.44269504088896341f + shift) - shift;
    F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    F y = (p * r * r + r) + 1.0f;
    I exponent = __builtin_convertvector(n, I);
    return y * (F)((exponent + 127) << 23);
}

static inline F load_part(const float* p, int64_t n, float fill) {
    if (n >= LANES) return load(p);
    float buffer[LANES];
    std::fill(buffer, buffer + LANES, fill);
    if (n > 0) std::copy(p, p + n, buffer);
    return load(buffer);
}
static inline void store_part(float* p, F v, int64_t n) {
    if (n >= LANES) return store<false>(p, v);
    float buffer[LANES];
    store<false>(buffer, v);
    if (n > 0) std::copy(buffer, buffer + n, p);
}

static void norm_rows(float* h, const float* delta, const float* weight, float eps, float* out, int64_t begin,
                      int64_t end, int64_t n) {
    for (int64_t row = begin; row < end; ++row) {
        float *x = h + row * n, *y = out + row * n;
        F squares[PARTS] = {};
        for (int64_t i = 0; i < n; i += SIXTEEN) {
            for (int p = 0; p < PARTS; ++p) {
                const int64_t at = i + p * LANES;
                F a = load_part(x + at, n - at, 0.0f);
                if (delta) {
                    a += load_part(delta + row * n + at, n - at, 0.0f);
                    store_part(x + at, a, n - at);
                }
                squares[p] += a * a;
            }
        }
        const float scale = 1.0f / std::sqrt(total(squares) / (float)n + eps);
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) store<false>(y + i, load(weight + i) * (load(x + i) * scale));
        for (; i < n; ++i) y[i] = weight[i] * (x[i] * scale);
    }
}

static void gate_values(float* g, const float* up, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += LANES) {
        F a = load_part(g + i, end - i, 0.0f);
        store_part(g + i, a / (1.0f + exponential(-a)) * load_part(up + i, end - i, 0.0f), end - i);
    }
}

// Keys and values of one layer, [rows, kv_heads, capacity, D]. Row r of a batch is at `row[r]`, or at r without `row`.
struct Cache {
    float *keys, *values;
    const int64_t* row;
    int64_t capacity;
    int64_t at(int64_t r, int64_t g, int64_t kv_heads, int64_t size) const {
        return ((row ? row[r] : r) * kv_heads + g) * capacity * size;
    }
};

// Attention of one layer; q, k, v and out are [B, tokens, heads * D]. The first columns of the cache are in `prefix`, a
// prompt that several rows may share (its capacity is the number of its columns, perhaps 0). All others are in `own`,
// which receives the new columns.
struct Attention {
    float *q, *k, *v, *out;  // null `out`: only rotate and fill the cache
    Cache prefix, own;
    const float *cosine, *sine;  // [positions, D]
    const int64_t* left;         // [B] columns of left padding
    int64_t rows, tokens, heads, kv_heads, start, window;  // window 0: all columns are visible
    float scale;
};

static inline void rotate(float* x, const float* cosine, const float* sine, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

// Attention of one query over `seen` columns; a padding query has 0 or fewer, and gets zeros. D is the size of a head.
template <int64_t D, class Keys, class Values>
static inline void attend(const float* q, float* out, const Keys& keys, const Values& values, int64_t seen,
                          float scale, float* scores) {
    constexpr int N = D / LANES;
    F query[N], sum[N];
    for (int i = 0; i < N; ++i) query[i] = load(q + LANES * i), sum[i] = splat(0.0f);
    F most = splat(-INFINITY);
    for (int64_t c = 0; c < seen; c += SIXTEEN) {
        F products[SIXTEEN][PARTS], joint[PARTS];
        for (int j = 0; j < SIXTEEN; ++j) {
            const float* other = keys(std::min(c + j, seen - 1));
            for (int p = 0; p < PARTS; ++p) {
                F sum_of = query[p] * load(other + LANES * p);
                for (int i = p + PARTS; i < N; i += PARTS) sum_of += query[i] * load(other + LANES * i);
                products[j][p] = sum_of;
            }
        }
        sums_of(products, joint);
        for (int p = 0; p < PARTS; ++p) {
            F score = joint[p] * scale;
            store<false>(scores + c + LANES * p, score);
            most = score > most ? score : most;
        }
    }
    float peak = -INFINITY;
    for (int i = 0; i < LANES; ++i) peak = std::max(peak, most[i]);
    F weight[PARTS] = {};
    for (int64_t c = 0; c < seen; c += SIXTEEN) {
        for (int p = 0; p < PARTS; ++p) {
            const int64_t at = c + LANES * p;
            F e = exponential(load(scores + at) - peak);
            store<false>(scores + at, e);
            weight[p] += load_part(scores + at, seen - at, 0.0f);  // without the columns that were repeated above
        }
    }
    for (int64_t c = 0; c < seen; ++c) {
        const float* other = values(c);
        for (int i = 0; i < N; ++i) sum[i] += scores[c] * load(other + LANES * i);
    }
    const float inverse = seen > 0 ? 1.0f / total(weight) : 0.0f;
    for (int i = 0; i < N; ++i) store<false>(out + LANES * i, sum[i] * inverse);
}

// `stored` changes the keys or the values [kv_heads, D] of a token to what the cache holds of them.
template <int64_t D, class Stored>
static void attend_rows(const Attention& a, const Stored& stored, int64_t begin, int64_t end) {
    const int64_t shared = a.heads / a.kv_heads;
    std::vector<float> space(a.start + a.tokens + 2 * SIXTEEN);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t left = a.left[row];
        for (int64_t t = 0; t < a.tokens; ++t) {
            const int64_t column = a.start + t, position = std::max<int64_t>(column - left, 0), at = row * a.tokens + t;
            const float *cosine = a.cosine + position * D, *sine = a.sine + position * D;
            const int64_t first = std::max(left, a.window ? column + 1 - a.window : 0);
            float *token_keys = a.k + at * a.kv_heads * D, *token_values = a.v + at * a.kv_heads * D;
            for (int64_t g = 0; g < a.kv_heads; ++g) rotate(token_keys + g * D, cosine, sine, D);
            stored(token_keys);
            stored(token_values);
            for (int64_t g = 0; g < a.kv_heads; ++g) {
                const float *key = token_keys + g * D, *value = token_values + g * D;
                const int64_t before = a.prefix.capacity;
                const int64_t shared_at = before ? a.prefix.at(row, g, a.kv_heads, D) : 0;
                const int64_t own_at = a.own.at(row, g, a.kv_heads, D) - before * D;
                std::copy(key, key + D, a.own.keys + own_at + column * D);
                std::copy(value, value + D, a.own.values + own_at + column * D);
                auto keys = [&](int64_t c) {
                    c += first;
                    return c < before ? a.prefix.keys + shared_at + c * D : a.own.keys + own_at + c * D;
                };
                auto values = [&](int64_t c) {
                    c += first;
                    return c < before ? a.prefix.values + shared_at + c * D : a.own.values + own_at + c * D;
                };
                for (int64_t s = 0; s < shared; ++s) {
                    const int64_t place = (at * a.heads + g * shared + s) * D;
                    rotate(a.q + place, cosine, sine, D);
                    if (a.out) attend<D>(a.q + place, a.out + place, keys, values, column + 1 - first, a.scale, space.data());
                }
            }
        }
    }
}

}  // namespace roundoff
