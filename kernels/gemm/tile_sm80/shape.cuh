// The shape of a tile of gemm_4bit_tile_sm80: constants, and the partition of shared memory.
#pragma once

#include "gemm/tile.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int WARP_TOKENS = 64;             // rows of x of a warp
constexpr int HALF = 32;                    // columns that share a scale whatever the block size: the smallest block
constexpr int W_BYTES = ROWS * K_TILE * 2;  // a k-tile of W, dequantized

template <int TILE_TOKENS>
struct Shape {
    static constexpr int TOKENS = TILE_TOKENS, THREADS = ::THREADS;
    // Of 16 rows of W and of 8 rows of x, in a warp.
    static constexpr int ROW_FRAGMENTS = TOKENS / WARP_TOKENS;
    static constexpr int TOKEN_FRAGMENTS = WARP_TOKENS / 8;
    static constexpr int ROW_WARPS = ROWS / (16 * ROW_FRAGMENTS);
    static constexpr int ACCUMULATORS = ROW_FRAGMENTS * TOKEN_FRAGMENTS * 4;  // of a thread
    static constexpr int STAGES = TOKENS > 64 ? 3 : 4;
    static constexpr int X_BYTES = TOKENS * X_ROW_BYTES, CODES_BYTES = ROWS * CODES_ROW_BYTES;
    static constexpr int STAGE_BYTES = X_BYTES + CODES_BYTES;
    // Shared memory, in this order.
    static constexpr int CODES_AT = X_BYTES;           // in a stage, behind x
    static constexpr int W_AT = STAGES * STAGE_BYTES;  // [2], of this k-tile and of the next
    static constexpr int MAP_AT = W_AT + 2 * W_BYTES;
    static constexpr int BYTES = MAP_AT + MAP_BYTES;
    static_assert(BYTES <= 101376, "what a block may have on compute capability 8.6, 8.9 and 12.0");
    // In the epilogue y takes the place of the stages, in rows of one token that begin in different banks.
    static constexpr int OUT_ROW_BYTES = ROWS * 2 + 16;
    static_assert(TOKENS * OUT_ROW_BYTES <= MAP_AT, "y of a tile");
    static_assert(ROW_WARPS * TOKENS / WARP_TOKENS == WARPS, "a warp for each part of the tile");
};
