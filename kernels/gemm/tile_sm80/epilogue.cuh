// The epilogue of gemm_4bit_tile_sm80: sums of the blocks that share a tile, the bias, and y by whole lines.
#pragma once

#include "gemm/tile_sm80/shape.cuh"

// By all threads: the sums of a block, for the last one of the tile: [tiles][split_k - 1][COUNT / 4][THREADS][4].
template <int COUNT>
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
template <int COUNT>
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
template <typename T, int TOKENS>
__device__ inline void write_tile(const float (&sums)[Shape<TOKENS>::ROW_FRAGMENTS][Shape<TOKENS>::TOKEN_FRAGMENTS][4], u8 *out,
                                  const T *bias, T *y, int m, int n, const Tile &tile, int first_row, int first_token, int g,
                                  int t) {
    using S = Shape<TOKENS>;
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
    for (int i = int(threadIdx.x); i < TOKENS * (ROWS / 8); i += THREADS) {
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
