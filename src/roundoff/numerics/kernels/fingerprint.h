// Fingerprints of memory, which detect writes that torch does not count.
//   Every lane keeps two running sums of 32-bit words, s1 += w and s2 += s1 (Fletcher 1982), so that a changed word and
//   a changed order of words both change the fingerprint. A hash joins the lanes at the end.
#pragma once
#include "vector.h"

namespace roundoff {

constexpr int64_t LINE = 64;  // bytes read together
constexpr int64_t SMALL = 1 << 16;  // bytes

static inline uint64_t mixed(uint64_t hash, uint64_t word) {  // FNV-1a on whole words, then a shift for the high bits
    hash = (hash ^ word) * 0x100000001b3ull;
    return hash ^ (hash >> 29);
}

// Fingerprint of every `step`-th line of `bytes` bytes, and of the bytes after the last whole line.
static uint64_t fingerprint(const uint8_t* start, int64_t bytes, int64_t step) {
    constexpr int VECTORS = LINE / (4 * LANES);
    U s1[VECTORS] = {}, s2[VECTORS] = {};
    const int64_t lines = bytes / LINE;
    for (int64_t line = 0; line < lines; line += step)
        for (int v = 0; v < VECTORS; ++v) {
            U w;
            std::memcpy(&w, start + line * LINE + v * 4 * LANES, sizeof w);
            s1[v] += w;
            s2[v] += s1[v];
        }
    uint64_t hash = 0xcbf29ce484222325ull ^ (uint64_t)bytes;
    for (int v = 0; v < VECTORS; ++v)
        for (int i = 0; i < LANES; ++i) hash = mixed(hash, (uint64_t)s2[v][i] << 32 | s1[v][i]);
    for (int64_t i = lines * LINE; i < bytes; ++i) hash = mixed(hash, start[i]);
    return hash;
}

}  // namespace roundoff
