// The shape of a tile of gemm_4bit_tile_sm80: constants, the partition of shared memory, and which tile a block makes.
#pragma once

#include "common/planes.cuh"
#include "common/scales.cuh"
#include "common/workspace.cuh"

constexpr int ROWS = 128;                   // of W in a tile
constexpr int K_TILE = 64;                  // columns of a main loop iteration: whole blocks, or parts of one
constexpr int X_ROW_BYTES = K_TILE * 2;     // of a stage
constexpr int CODES_ROW_BYTES = K_TILE / 2;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int WARP_TOKENS = 64;             // rows of x of a warp
constexpr int MAP_BYTES = 256 * 4;          // of nested scales
constexpr int HALF = 32;                    // columns that share a scale whatever the block size: the smallest block
constexpr int W_BYTES = ROWS * K_TILE * 2;  // a k-tile of W, dequantized
constexpr int MAX_SPLIT_K = 8;              // blocks that share a tile

// How a product is divided: `split_k` blocks for each tile, one after another.
struct LaunchConfig {
    int token_tiles;  // along M; those of the same rows of W follow each other
    int k_tiles;      // of a block; the last one of a tile may have fewer
    int split_k;      // 1 to MAX_SPLIT_K
};

template <int TOKENS>
struct Shape {
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

// What a block makes: rows of W from `row` on by rows of x from `token` on, over `count` k-tiles from `first` on.
struct Tile {
    int index, part;  // among tiles, and among the blocks of this one
    int row, token;
    int first, count;

    __device__ Tile(int tokens, int k, const LaunchConfig &config)
        : index(int(blockIdx.x) / config.split_k), part(int(blockIdx.x) % config.split_k) {
        row = index / config.token_tiles * ROWS;
        token = index % config.token_tiles * tokens;
        first = part * config.k_tiles;
        const int left = k / K_TILE - first;
        count = left < config.k_tiles ? left : config.k_tiles;
    }
};
