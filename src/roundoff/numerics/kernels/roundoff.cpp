// roundoff's compiled kernels: quantize-dequantize, keyed noise, sums of few bits, decoding, and fingerprints of memory.
// They have no dependencies and are loaded through ctypes.
// Build as build.py does, with -ffp-contract=off: a fused multiply-add would round differently from torch's operators.
#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>
#include "accumulate.h"
#include "decode.h"
#include "fingerprint.h"
#include "hifloat.h"
#include "noise.h"
#include "nvfp4.h"
#include "pairs.h"

using namespace roundoff;

namespace {

constexpr int64_t PER_THREAD = 1 << 18;    // number of elements below which a thread costs more than it saves
constexpr int64_t PANEL_ROWS = 64, PANEL_ELEMENTS = 4096;  // rows whose tensor scales are computed ahead of their use
constexpr int64_t SHORT_ROW = 256;         // rows up to this length are scaled several at a time
constexpr int64_t STREAM_BYTES = 8 << 20;  // size from which an output is written around the cache

// Calls f(begin, end) on at most `threads` contiguous parts of [0, n), which are cut at multiples of `grain`.
template <class Function> void parallel(int64_t n, int64_t grain, int64_t elements, int threads, const Function& f) {
    int64_t parts = std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(1, elements / PER_THREAD));
    int64_t units = (n + grain - 1) / grain;
    parts = std::min(parts, std::max<int64_t>(units, 1));
    auto cut = [&](int64_t p) { return std::min(n, units * p / parts * grain); };
    std::vector<std::thread> others;
    others.reserve(parts);
    int64_t p = 1;
    try {
        for (; p < parts; ++p) others.emplace_back([&, p] { f(cut(p), cut(p + 1)); });
    } catch (const std::system_error&) {  // no further thread can be started, so this one does the rest
        f(cut(p), n);
    }
    f(0, cut(1));
    for (auto& t : others) t.join();
}

// Origin of the tensor scales, as in quantize.py.
enum Source : int32_t { NONE = 0, FROM_TENSOR = 1, FROM_ROW = 2, GIVEN = 3, GIVEN_ROWS = 4 };

struct Call {
    Work work;
    int64_t columns;
    Source source;
    float given;
    const float* per_row;
    bool is_encoded() const { return work.spec.scale == E4M3 && work.spec.rule >= TRANSFORMER_ENGINE; }
    // The scale that the kernels take, from the largest finite magnitude of the tensor or the row, or from a given one.
    float scale_of(float amax) const {
        const float divisor = work.spec.tensor_divisor;
        return is_encoded() ? encoding_of(amax, divisor) : amax / divisor;
    }
    float scale_given(float scale) const { return is_encoded() ? encoding_of_given(scale) : scale; }
    float scale(int64_t row) const { return source == GIVEN_ROWS ? scale_given(per_row[row]) : given; }
};

template <class T> float row_scale(const Call& c, const T* x, int64_t row) {
    if (c.source != FROM_ROW) return c.scale(row);
    uint32_t b = amax_of<T, true>(x, c.columns);
    float a;
    std::memcpy(&a, &b, sizeof a);
    return c.scale_of(a);
}

template <class T, int SCALE, int N, bool INTEGER, bool STREAM>
void blocks_in(const Call& c, const T* x, T* y, int64_t begin, int64_t end) {
    bool alike = c.source != FROM_ROW && c.source != GIVEN_ROWS;
    if (c.columns % N == 0 && alike && !c.work.random) {  // the rows form one run of blocks
        int64_t at = begin * c.columns;
        block_row<T, SCALE, N, INTEGER, STREAM>(c.work, x + at, y + at, (end - begin) * c.columns, c.given, 0);
        return;
    }
    if (c.columns % N == 0 && !c.work.random) {
        const int64_t panel = std::max<int64_t>(1, std::min<int64_t>(PANEL_ROWS, PANEL_ELEMENTS / c.columns));
        float scales[PANEL_ROWS];
        for (int64_t r = begin; r < end; r += panel) {
            int64_t n = std::min(panel, end - r), at = r * c.columns;
            for (int64_t i = 0; i < n; ++i) scales[i] = row_scale(c, x + at + i * c.columns, r + i);
            block_rows<T, SCALE, N, INTEGER, STREAM>(c.work, x + at, y + at, c.columns, scales, n);
        }
        return;
    }
    for (int64_t r = begin; r < end; ++r) {
        int64_t at = r * c.columns;
        float s = row_scale(c, x + at, r);
        if (c.columns % N) block_row<T, SCALE, N, INTEGER, false>(c.work, x + at, y + at, c.columns, s, r);
        else block_row<T, SCALE, N, INTEGER, STREAM>(c.work, x + at, y + at, c.columns, s, r);
    }
}

// Rows of a few whole vectors, LANES at a time, each under the scale of its own largest magnitude.
template <class T, bool INTEGER, bool STREAM>
void short_rows_in(const Call& c, const T* x, T* y, int64_t begin, int64_t end) {
    const bool finite = c.work.spec.scale == TENSOR;  // whether that is the largest finite magnitude
    for (int64_t r = begin; r < end; r += LANES) {
        const int rows = (int)std::min<int64_t>(LANES, end - r);
        const int64_t at = r * c.columns, n = rows * c.columns;
        U m[LANES] = {};
        for (int64_t i = 0, b = 0; i < n; ++b)
            for (const int64_t stop = i + c.columns; i < stop; i += LANES) {
                const U a = bits(load(x + at + i)) & MAGNITUDE;
                m[b] = max(m[b], finite ? (a < EXPONENT ? a : splat(0u)) : a);
            }
        const U amax = maxima(m);
        const F scale = finite ? real(amax) / splat(c.work.spec.tensor_divisor)
                               : scales_of<FLOAT32>(amax, c.work.spec, splat(1.0f)).multiply;
        alignas(64) float multiply[LANES], divide[LANES];
        store<false>(multiply, scale);
        store<false>(divide, scale == 0.0f ? splat(1.0f) : scale);
        for (int64_t i = 0, b = 0; i < n; ++b) {
            const F back = splat(multiply[b]), by = splat(divide[b]);
            for (const int64_t stop = i + c.columns; i < stop; i += LANES) {
                const F a = load(x + at + i), q = nearest<INTEGER>(a / by, c.work.grid) * back;
                store<STREAM>(y + at + i, (bits(a) & MAGNITUDE) < EXPONENT ? q : real(splat(QUIET_NAN)));
            }
        }
    }
}

template <class T, bool INTEGER, bool STREAM>
void rows_in(const Call& c, const T* x, T* y, int64_t begin, int64_t end) {
    const bool own_scale = c.work.spec.scale != TENSOR || c.source == FROM_ROW;
    if (own_scale && !c.work.random && c.columns <= SHORT_ROW && c.columns % LANES == 0)
        return short_rows_in<T, INTEGER, STREAM>(c, x, y, begin, end);
    for (int64_t r = begin; r < end; ++r) {
        int64_t at = r * c.columns;
        float multiply;
        if (c.work.spec.scale == TENSOR) {
            multiply = row_scale(c, x + at, r);
        } else {
            U amax = splat(amax_of<T, false>(x + at, c.columns));
            multiply = scales_of<FLOAT32>(amax, c.work.spec, splat(1.0f)).multiply[0];
        }
        if (c.columns % LANES) scaled_row<T, INTEGER, false>(c.work, x + at, y + at, c.columns, multiply, r);
        else scaled_row<T, INTEGER, STREAM>(c.work, x + at, y + at, c.columns, multiply, r);
    }
}

template <class T, bool STREAM> void tapered_in(const Call& c, const T* x, T* y, int64_t begin, int64_t end) {
    if (!c.work.random) return hif8_row<T, STREAM>(c.work, x + begin * c.columns, y + begin * c.columns,
                                                  (end - begin) * c.columns, 0);  // there are no blocks to respect
    for (int64_t r = begin; r < end; ++r)
        hif8_row<T, false>(c.work, x + r * c.columns, y + r * c.columns, c.columns, r);
}

template <class T, bool STREAM> void range(const Call& c, const T* x, T* y, int64_t begin, int64_t end) {
    const Spec& s = c.work.spec;
    bool integer = s.mantissa == 0;
    if (s.scale == E8M0) blocks_in<T, E8M0, 32, false, STREAM>(c, x, y, begin, end);
    else if (s.scale == TAPERED) tapered_in<T, STREAM>(c, x, y, begin, end);
    else if (s.scale == E6M2) blocks_in<T, E6M2, 64, false, STREAM>(c, x, y, begin, end);
    else if (c.is_encoded() && s.block == 16) blocks_in<T, ENCODED, 16, false, STREAM>(c, x, y, begin, end);
    else if (c.is_encoded()) blocks_in<T, ENCODED, 256, false, STREAM>(c, x, y, begin, end);
    else if (s.scale == E4M3) blocks_in<T, E4M3, 16, false, STREAM>(c, x, y, begin, end);
    else if (s.block == 32) blocks_in<T, FLOAT32, 32, true, STREAM>(c, x, y, begin, end);
    else if (integer) rows_in<T, true, STREAM>(c, x, y, begin, end);
    else rows_in<T, false, STREAM>(c, x, y, begin, end);
    if (STREAM) stream_fence();
}

template <class T> float tensor_amax(const T* x, int64_t n, int threads) {
    std::vector<uint32_t> parts((size_t)std::max(threads, 1) + 1, 0u);
    int64_t grain = std::max<int64_t>(64, (n / std::max(threads, 1) + 63) / 64 * 64);
    parallel(n, grain, n, threads, [&](int64_t begin, int64_t end) {
        if (begin < end) parts[(size_t)(begin / grain)] = amax_of<T, true>(x + begin, end - begin);
    });
    uint32_t b = *std::max_element(parts.begin(), parts.end());
    float a;
    std::memcpy(&a, &b, sizeof a);
    return a;
}

template <class T> void quantize(Call c, const T* x, T* y, int64_t rows, int threads) {
    int64_t n = rows * c.columns;
    if (c.source == FROM_TENSOR) c.given = c.scale_of(tensor_amax(x, n, threads));
    // Streaming needs an aligned start and whole lines. In place, it is faster to overwrite the lines in the cache.
    bool aligned = ((uintptr_t)y % 64) == 0 && (c.columns * (int64_t)sizeof(T)) % 64 == 0;
    bool stream = aligned && x != y && n * (int64_t)sizeof(T) >= STREAM_BYTES;
    parallel(rows, 1, n, threads, [&](int64_t begin, int64_t end) {
        if (stream) range<T, true>(c, x, y, begin, end);
        else range<T, false>(c, x, y, begin, end);
    });
}

template <class T, int DRAW>
void noise(const T* y, T* out, const Rows& rows, int64_t count, float s, uint64_t key, int threads) {
    int64_t n = count * rows.columns;
    bool aligned = ((uintptr_t)out % 64) == 0 && (rows.columns * (int64_t)sizeof(T)) % 64 == 0 && !rows.first;
    bool stream = aligned && y && y != out && n * (int64_t)sizeof(T) >= STREAM_BYTES;
    parallel(count, 1, n, threads, [&](int64_t begin, int64_t end) {
        if constexpr (DRAW == NORMALS) {
            if (stream) return noise_rows<T, DRAW, true>(y, out, rows, begin, end, s, key), stream_fence();
        }
        noise_rows<T, DRAW, false>(y, out, rows, begin, end, s, key);
    });
}

template <class Stored>
void attend_heads(const Attention& a, int64_t size, const Stored& stored, int64_t begin, int64_t end) {
    switch (size) {
        case 16: return attend_rows<16>(a, stored, begin, end);
        case 32: return attend_rows<32>(a, stored, begin, end);
        case 64: return attend_rows<64>(a, stored, begin, end);
        case 128: return attend_rows<128>(a, stored, begin, end);
    }
}

}  // namespace

extern "C" {

// dtype 0: float32, 1: bfloat16. x and y hold [rows, columns] contiguously and may be the same memory.
void ro_quantize(const void* spec, int dtype, const void* x, void* y, int64_t rows, int64_t columns, int source,
                 float given, const float* per_row, int random, uint64_t key, int threads) {
    const Spec& s = *(const Spec*)spec;
    Call c{Work(s, random != 0, key), columns, (Source)source, given, per_row};
    c.given = source == NONE ? 1.0f : c.scale_given(given);
    if (dtype == 0) quantize(c, (const float*)x, (float*)y, rows, threads);
    else quantize(c, (const bf16*)x, (bf16*)y, rows, threads);
}

void ro_noise(int dtype, const void* y, void* out, int64_t count, int64_t columns, const int64_t* ids,
              const int64_t* first, float s, uint64_t key, int threads) {
    Rows rows{ids, first, columns};
    if (dtype == 0) noise<float, NORMALS>((const float*)y, (float*)out, rows, count, s, key, threads);
    else noise<bf16, NORMALS>((const bf16*)y, (bf16*)out, rows, count, s, key, threads);
}

// kind 0: words (as int32), 1: normals, 2: uniforms in [0, 1).
void ro_draw(int kind, float* out, int64_t count, int64_t columns, const int64_t* ids, const int64_t* first,
             uint64_t key, int threads) {
    Rows rows{ids, first, columns};
    if (kind == WORDS) noise<float, WORDS>(nullptr, out, rows, count, 0.0f, key, threads);
    else if (kind == NORMALS) noise<float, NORMALS>(nullptr, out, rows, count, 0.0f, key, threads);
    else noise<float, UNIFORMS>(nullptr, out, rows, count, 0.0f, key, threads);
}

// out [rows, columns] = a [rows, length] times b [length, columns], by an accumulator of few bits; see accumulate.h.
// `columns` is a multiple of sixteen.
void ro_accumulate(const float* a, const float* b, float* out, int64_t rows, int64_t length, int64_t columns,
                   int mantissa, int64_t promote, int64_t group, int half, int threads) {
    const PartialSums sums{promote, group, mantissa, half != 0};
    parallel(rows, 1, rows * columns * length / 4, threads,
             [&](int64_t begin, int64_t end) { sum_rows(a, b, out, begin, end, length, columns, sums); });
}

// The next three functions work in float32; see decode.h. `delta` may be null.
void ro_norm(float* h, const float* delta, const float* weight, float eps, float* out, int64_t rows, int64_t n,
             int threads) {
    parallel(rows, 1, rows * n, threads,
             [&](int64_t begin, int64_t end) { norm_rows(h, delta, weight, eps, out, begin, end, n); });
}

void ro_gate(float* g, const float* up, int64_t n, int threads) {
    parallel(n, 16, n, threads, [&](int64_t begin, int64_t end) { gate_values(g, up, begin, end); });
}

void ro_attend(float* const* pointers, const int64_t* const* rows, const int64_t* sizes, float scale,
               const void* spec, int threads) {
    // pointers: q, k, v, out, prefix keys and values, own keys and values, cosine, sine
    // rows: of the prefix, of the own cache, left padding
    // sizes: rows, tokens, heads, kv_heads, start, window, columns of the prefix, capacity of the own cache, head size
    // spec: format of the cache, with one row for each token and head; null: float32
    const auto& p = pointers;
    Attention a{p[0], p[1], p[2], p[3], {p[4], p[5], rows[0], sizes[6]}, {p[6], p[7], rows[1], sizes[7]}, p[8], p[9],
                rows[2], sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], scale};
    const int64_t work = a.rows * a.tokens * a.heads * (a.start + a.tokens) * sizes[8] / 8;
    parallel(a.rows, 1, work, threads, [&](int64_t begin, int64_t end) {
        if (!spec) return attend_heads(a, sizes[8], [](float*) {}, begin, end);
        const Spec& s = *(const Spec*)spec;
        const Call c{Work(s, false, 0), sizes[8], s.tensor_divisor ? FROM_ROW : NONE, 1.0f, nullptr};
        attend_heads(a, sizes[8], [&](float* x) { range<float, false>(c, x, x, 0, a.kv_heads); }, begin, end);
    });
}

static int64_t step_of(int64_t bytes, int64_t lines, int64_t step) {
    return lines ? std::max<int64_t>(1, bytes / LINE / lines) : bytes <= SMALL ? 1 : step;
}

// The three fingerprints of one range: of about `lines` lines, of every `step`-th line, and of all lines.
void ro_fingerprints(const uint8_t* start, int64_t bytes, int64_t lines, int64_t step, uint64_t* out) {
    out[0] = fingerprint(start, bytes, step_of(bytes, lines, 0));
    out[1] = fingerprint(start, bytes, step_of(bytes, 0, step));
    out[2] = bytes <= SMALL ? out[1] : fingerprint(start, bytes, 1);
}

// Fingerprints of `count` ranges of memory. About `lines` lines of each are read. If `lines` is 0, every `step`-th line
// is read, and all of a range of up to SMALL bytes.
void ro_fingerprint(const uint8_t* const* starts, const int64_t* bytes, int64_t count, int64_t lines, int64_t step,
                    uint64_t* out) {
    for (int64_t i = 0; i < count; ++i) {
        out[i] = fingerprint(starts[i], bytes[i], step_of(bytes[i], lines, step));
    }
}

}  // extern "C"
