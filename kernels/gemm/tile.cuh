// What gemm_4bit_tile_sm80 and gemm_4bit_tile_sm75 share: how the tiles of y [M][N] = x [M][K] * W [N][K]^T are divided among
// blocks, and the epilogue: sums of the blocks that share a tile, the bias, and y by whole lines.
#pragma once

#include "common/planes.cuh"
#include "common/scales.cuh"
#include "common/workspace.cuh"

constexpr int ROWS = 128;                // of W in a tile
constexpr int K_TILE = 64;               // columns of a main loop iteration: whole blocks, or parts of one
constexpr int X_ROW_BYTES = K_TILE * 2;  // of a stage
constexpr int CODES_ROW_BYTES = K_TILE / 2;
constexpr int MAP_BYTES = 256 * 4;  // of nested scales
constexpr int MAX_SPLIT_K = 8;      // blocks that share a tile

// How a product is divided: `split_k` blocks for each tile, one after another.
struct LaunchConfig {
    int token_tiles;  // along M; those of the same rows of W follow each other
    int k_tiles;      // of a block; the last one of a tile may have fewer
    int split_k;      // 1 to MAX_SPLIT_K
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

// Piece c (16 bytes) of row r of 64 columns, of x or W, lies at c ^ (r % 8): then the rows of a matrix, which are read at a
// time, are in different banks.
__device__ inline u32 piece_offset(u32 row, u32 piece) { return row * (K_TILE * 2) + (piece ^ (row & 7)) * 16; }

// By all threads: the sums of a block, for the last one of the tile: [tiles][split_k - 1][COUNT / 4][THREADS][4].
template <int THREADS, int COUNT>
__device__ inline void leave_sums(const float (&sums)[COUNT], const Workspace &workspace, const Tile &tile, int split_k) {
    const i64 place = i64(tile.index) * (split_k - 1) + tile.part;
    Floats4 *const to = reinterpret_cast<Floats4 *>(workspace.sums) + place * (COUNT / 4 * THREADS) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
        to[i * THREADS] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        signal_sums(workspace, place);
    }
}

// By all threads of the last block of a tile: adds what the others left, in their order. They have started before.
template <int THREADS, int COUNT>
__device__ inline void collect_sums(float (&sums)[COUNT], const Workspace &workspace, const Tile &tile, int split_k) {
    for (int part = 0; part < split_k - 1; part++) {
        const i64 place = i64(tile.index) * (split_k - 1) + part;
        if (threadIdx.x == 0) {
            wait_for_sums(workspace, place);
        }
        __syncthreads();
        const Floats4 *const from =
            reinterpret_cast<const Floats4 *>(workspace.sums) + place * (COUNT / 4 * THREADS) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < COUNT / 4; i++) {
            const Floats4 theirs = from[i * THREADS];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sums[4 * i + j] += theirs.value[j];
            }
        }
    }
}

// By all threads, when nobody reads the stages any more: y [m][n] of the tile.
template <typename T, typename S>
__device__ inline void write_tile(const float (&sums)[S::ROW_FRAGMENTS][S::TOKEN_FRAGMENTS][4], u8 *out, const T *bias, T *y,
                                  int m, int n, const Tile &tile, int first_row, int first_token, int g, int t) {
#pragma unroll
    for (int r = 0; r < S::ROW_FRAGMENTS; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + 16 * r + 8 * h + g, at = tile.row + row;
            const float added = bias != nullptr ? to_f32(bias[at < n ? at : n - 1]) : 0.0f;
#pragma unroll
            for (int f = 0; f < S::TOKEN_FRAGMENTS; f++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int token = first_token + 8 * f + 2 * t + c;
                    reinterpret_cast<T *>(out + token * S::OUT_ROW_BYTES)[row] = from_f32<T>(sums[r][f][2 * h + c] + added);
                }
            }
        }
    }
    __syncthreads();
    const bool whole = n % 8 == 0 && is_aligned(y, 16);
    for (int i = int(threadIdx.x); i < S::TOKENS * (ROWS / 8); i += S::THREADS) {
        const int token = i / (ROWS / 8), piece = i % (ROWS / 8);
        const int to = tile.token + token, column = tile.row + piece * 8;
        if (to < m && column < n) {
            const u8 *const from = out + token * S::OUT_ROW_BYTES + piece * 16;
            T *const target = y + (i64(to) * n + column);
            if (whole) {
                store_words(reinterpret_cast<Words4 *>(target), *reinterpret_cast<const Words4 *>(from));
            } else {
                for (int j = 0; j < 8 && column + j < n; j++) {
                    target[j] = reinterpret_cast<const T *>(from)[j];
                }
            }
        }
    }
}
