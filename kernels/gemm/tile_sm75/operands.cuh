// What comes to gemm_4bit_tile_sm75, each a k-tile before it is multiplied: x by way of registers to stages, W to the registers
// of the warp that multiplies it.
#pragma once

#include "gemm/tile_sm75/shape.cuh"

// The pieces of 16 bytes of x that one thread brings, of rows `row`, `row + ROWS_AT_ONCE`, ..., half of them at a time: more
// would take more registers than there are. Rows that are not there are read as the last one: what comes of them is not
// written.
template <int TOKENS>
struct XLoader {
    static constexpr int IN_ROW = X_ROW_BYTES / 16, ROWS_AT_ONCE = THREADS / IN_ROW, COUNT = TOKENS / ROWS_AT_ONCE / 2;
    static_assert(ROWS_AT_ONCE % 8 == 0, "all rows of a thread have their pieces in the same places");
    const u8 *base;        // of the tile's next k-tile
    u32 offset[2][COUNT];  // in bytes
    u32 to;                // in a stage, of the first
    Words4 pieces[COUNT];  // on the way

    __device__ XLoader(const void *x, int m, int k, const Tile &tile) {
        const int thread = int(threadIdx.x), row = thread / IN_ROW, piece = thread % IN_ROW;
        base = static_cast<const u8 *>(x) + (i64(tile.token) * k + tile.first * K_TILE) * 2;
        const int last = m - 1 - tile.token;
#pragma unroll
        for (int i = 0; i < 2 * COUNT; i++) {
            const int token = row + i * ROWS_AT_ONCE;
            offset[i / COUNT][i % COUNT] = u32(token < last ? token : last) * u32(k) * 2 + u32(piece) * 16;
        }
        to = piece_offset(u32(row), u32(piece));
    }

    // Of the next k-tile the first half, then the second.
    __device__ void load(int half) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            pieces[i] = load_shared_line(reinterpret_cast<const Words4 *>(base + offset[half][i]));
        }
        if (half == 1) {
            base += X_ROW_BYTES;
        }
    }
    __device__ void store(u8 *stage, int half) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            *reinterpret_cast<Words4 *>(stage + to + (half * COUNT + i) * (ROWS_AT_ONCE * X_ROW_BYTES)) = pieces[i];
        }
    }
};

// Codes and scales of one lane: of rows g, g + 8, g + 16 and g + 24 of its warp the bytes 8t ... 8t + 7 of a k-tile, and of row
// g + 8t the scale. Rows that are not there are read as the last one.
template <bool NESTED>
struct WLoader {
    const Scales &scales;
    const u8 *base;         // of the tile's next k-tile
    u32 offset[LANE_ROWS];  // in bytes
    i64 first;              // of W's values, the first of the scale's row
    int scale_shift;        // log2 of the block size
    Words2 codes[LANE_ROWS];
    RawScale<NESTED> scale;

    // `row` of the tile is the first of the warp.
    __device__ WLoader(const u8 *packed, const Scales &scales, const Tile &tile, int row, int n, int k, int block_shift, int g,
                       int t)
        : scales(scales), scale_shift(block_shift) {
        base = packed + (i64(tile.row) * (k / 2) + tile.first * CODES_ROW_BYTES);
        const int last = n - 1 - tile.row;
#pragma unroll
        for (int j = 0; j < LANE_ROWS; j++) {
            const int at = row + g + 8 * j;
            offset[j] = u32(at < last ? at : last) * u32(k / 2) + u32(t) * 8;
        }
        const int at = row + g + 8 * t;
        first = i64(tile.row + (at < last ? at : last)) * k;
    }

    // Of the next k-tile, which is this one.
    __device__ void load(int k_tile) {
#pragma unroll
        for (int j = 0; j < LANE_ROWS; j++) {
            codes[j] = load_stream(reinterpret_cast<const Words2 *>(base + offset[j]));
        }
        base += CODES_ROW_BYTES;
        scale = ScaleReader<NESTED>(scales, (first + k_tile * K_TILE) >> scale_shift)[0];
    }
};
