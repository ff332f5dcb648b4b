// Rows of tokens, brought together for products by tiles: the copy engine brings rows that lie together.
#pragma once

#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;  // a row for each
constexpr int AT_ONCE = 8;             // pieces of a row on their way to a thread

// By a warp: a row of `pieces` times 16 bytes.
__device__ inline void copy_row(Words4 *to, const Words4 *from, int pieces) {
    for (int begin = int(threadIdx.x % WARP); begin < pieces; begin += AT_ONCE * WARP) {
        Words4 words[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i * WARP < pieces) {
                words[i] = load_stream_after(from + begin + i * WARP);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i * WARP < pieces) {
                store_words(to + begin + i * WARP, words[i]);
            }
        }
    }
}
