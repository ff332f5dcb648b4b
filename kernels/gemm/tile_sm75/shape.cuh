// The shape of a tile of gemm_4bit_tile_sm75: constants, and the partition of shared memory.
#pragma once

#include "gemm/tile.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int WARP_ROWS = ROWS / WARPS;  // of W of a warp
constexpr int LANE_ROWS = WARP_ROWS / 8;  // of these one lane has weights of
constexpr int STAGES = 2;                // of x: one is read while the other is written

template <int TILE_TOKENS>
struct Shape {
    static constexpr int TOKENS = TILE_TOKENS, THREADS = ::THREADS;
    // Blocks on a multiprocessor: what the registers for accumulators leave room for.
    static constexpr int BLOCKS = TOKENS > 32 ? 2 : 3;
    // Of 16 rows of W and of 8 rows of x, in a warp.
    static constexpr int ROW_FRAGMENTS = WARP_ROWS / 16;
    static constexpr int TOKEN_FRAGMENTS = TOKENS / 8;
    static constexpr int ACCUMULATORS = ROW_FRAGMENTS * TOKEN_FRAGMENTS * 4;  // of a thread
    // Shared memory: stages of x, whose place y takes in the epilogue, in rows of one token that begin in different banks; map.
    static constexpr int STAGE_BYTES = TOKENS * X_ROW_BYTES;
    static constexpr int OUT_ROW_BYTES = ROWS * 2 + 16;
    static constexpr int MAP_AT = TOKENS * OUT_ROW_BYTES;
    static constexpr int BYTES = MAP_AT + MAP_BYTES;
    static_assert(STAGES * STAGE_BYTES <= MAP_AT, "stages");
    static_assert(BLOCKS * BYTES <= 65536, "what a multiprocessor has on compute capability 7.5");
};
