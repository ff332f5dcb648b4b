// Rows of tokens, brought together for products by tiles: the copy engine brings rows that lie together.
#pragma once

#include "experts/permute.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;  // a row for each
constexpr int AT_ONCE = 4;             // pieces of a row on their way to a thread

// By a warp: a row of `pieces` times 16 bytes, a multiple of PERMUTED_PIECES, in the order of permute.cuh.
__device__ inline void copy_row(Words4 *to, const Words4 *from, int pieces) {
    const u32 *const words = reinterpret_cast<const u32 *>(from);
    for (int begin = int(threadIdx.x % WARP); begin < pieces; begin += AT_ONCE * WARP) {
        Words4 made[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int piece = begin + i * WARP;
            if (piece < pieces) {
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    const int word = piece / PERMUTED_PIECES * (4 * PERMUTED_PIECES) + permuted_word(piece % PERMUTED_PIECES, t);
                    made[i].word[t] = words[word];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i * WARP < pieces) {
                store_words(to + begin + i * WARP, made[i]);
            }
        }
    }
}
