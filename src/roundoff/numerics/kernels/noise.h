// y + s * |y| * eps, with eps keyed by row id and column, and draws by themselves.
#pragma once
#include <algorithm>
#include "blocks.h"

namespace roundoff {

struct Rows {
    const int64_t *ids, *first;  // null: 0, 1, 2, ... and 0
    int64_t columns;
    int64_t id(int64_t r) const { return ids ? ids[r] : r; }
    int64_t start(int64_t r) const { return first ? first[r] : 0; }
};

// Iterates over the groups of four columns of consecutive rows, LANES groups at a time.
struct Cursor {
    const Rows& rows;
    int64_t row, group, groups;  // `group` is the next one in `row`; each row has `groups`

    // Fills the counters of the next LANES groups; those past `last_row` repeat and are not used.
    void next(Counters& c, int64_t last_row) {
        if (group + LANES <= groups) {
            c.ramp(rows.id(row), (rows.start(row) >> 2) + group);
            advance(LANES);
            return;
        }
        for (int g = 0; g < LANES; ++g) {
            int64_t r = std::min(row, last_row);
            c.set(g, rows.id(r), (rows.start(r) >> 2) + group);
            advance(1);
        }
    }
    void advance(int64_t n) {
        group += n;
        if (group >= groups) {
            group = 0;
            ++row;
        }
    }
};

template <class T, bool STREAM> static inline void perturb(const T* y, T* out, int64_t n, const float* eps, F s) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        F a = load(y + i);
        store<STREAM>(out + i, a + (real(bits(a) & MAGNITUDE) * s) * load(eps + i));
    }
    if (i == n) return;
    T buffer[LANES] = {};
    std::copy(y + i, y + n, buffer);
    float part[LANES] = {};
    std::copy(eps + i, eps + n, part);
    F a = load(buffer);
    store<false>(buffer, a + (real(bits(a) & MAGNITUDE) * s) * load(part));
    std::copy(buffer, buffer + (n - i), out + i);
}

constexpr int64_t STAGE = 2048;  // number of draws that are staged in the first-level cache

// Writes rows [begin, end) of y with noise to out, or the draws themselves if y is null.
template <class T, int DRAW, bool STREAM>
static void noise_rows(const T* y, T* out, const Rows& rows, int64_t begin, int64_t end, float s, uint64_t key) {
    alignas(64) float stage[STAGE + DRAWS];
    const F scale = splat(s);
    bool shifted = false;
    for (int64_t r = begin; rows.first && r < end; ++r) shifted |= (rows.first[r] & 3) != 0;
    const int64_t groups = (rows.columns + (shifted ? 6 : 3)) / 4, width = 4 * groups;
    const bool whole = width == rows.columns;  // draws and outputs then have the same layout
    Cursor cursor{rows, begin, 0, groups};
    Counters c;
    const int64_t total = (end - begin) * width;
    int64_t done = 0;  // draws consumed
    while (done < total) {
        int64_t n = std::min(STAGE, total - done);
        for (int64_t i = 0; i < n; i += DRAWS) {
            cursor.next(c, end - 1);
            draw<DRAW>(c, key, stage + i);
        }
        for (int64_t i = 0; i < n;) {
            int64_t row = begin + (done + i) / width, at = (done + i) % width;
            int64_t take = whole ? n - i : std::min(n - i, width - at);
            int64_t offset = whole ? 0 : rows.start(row) & 3;
            int64_t low = std::max(at, offset), high = std::min(at + take, offset + rows.columns);
            if (whole) high = at + take;
            if (low < high) {
                int64_t place = row * rows.columns + low - offset;
                const float* eps = stage + i + (low - at);
                if constexpr (DRAW == NORMALS) {
                    if (y) perturb<T, STREAM>(y + place, out + place, high - low, eps, scale);
                }
                if constexpr (sizeof(T) == sizeof(float)) {
                    if (!y) std::copy(eps, eps + (high - low), (float*)out + place);
                }
            }
            i += take;
        }
        done += n;
    }
}

}  // namespace roundoff
