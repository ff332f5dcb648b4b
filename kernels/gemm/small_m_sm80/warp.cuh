// What a warp does with W by way of registers: its shape, the table, its bytes of a k-tile, and where its sums go. Of
// gemm_4bit_small_m_sm80, gemm_4bit_small_m_sm75 and the products of experts.
#pragma once

#include "gemm/small_m.cuh"

// By the number of 8-column fragments of x, 1 or 2: twice the columns are twice the registers for x and so half the warps,
// each of which has twice the bytes on the way.
template <int FRAGMENTS>
struct Shape {
    static constexpr int WARPS = 16 / FRAGMENTS;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int K_TILE = 4 * FRAGMENTS;
};

// Such a table anywhere, with 64 words from one entry to the next.
struct PlainTable {
    const u32 *table;
    u32 lane_offset;
};

template <int BYTE>
__device__ inline u32 look_up(PlainTable table, u32 word) {
    // Byte 0 of the offset from the lane, byte 1 from the word, bytes 2 and 3 zero (as all but one of the lane's are).
    return at_byte(table.table, permute_bytes(word, table.lane_offset, 0x5504 | BYTE << 4));
}

// A lane's bytes of a k-tile, in row g and row g + 8.
template <int K_TILE>
struct Bytes {
    Words2 low[K_TILE], high[K_TILE];

    __device__ void load(int j, const u8 *low_packed, const u8 *high_packed) {
        low[j] = load_stream(reinterpret_cast<const Words2 *>(low_packed + j * BLOCK_BYTES));
        high[j] = load_stream(reinterpret_cast<const Words2 *>(high_packed + j * BLOCK_BYTES));
    }
};

// Where the sum of a column and a row of a tile is in a warp's [m][16] partial sums: columns in the order 0, 2, 4, ... 1,
// 3, ..., and in every other pair of these the halves of the rows exchanged. So the lanes of a fragment store to 32 banks.
__device__ inline int partial_offset(int column, int row, int m) {
    const int place = column / 2 + (column % 2 == 0 ? 0 : (m + 1) / 2);
    return place * ROWS + (row ^ (place / 2 % 2 * (ROWS / 2)));
}

// The sums of a tile's k-tile to, or on top of, this warp's partial sums.
template <int FRAGMENTS>
__device__ inline void add_partial(float *own, const float (&sums)[FRAGMENTS][4], int m, bool is_first, int g, int t) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int column = f * COLUMNS + 2 * t + e % 2;
            if (column < m) {
                float *const sum = own + partial_offset(column, g + e / 2 * 8, m);
                *sum = is_first ? sums[f][e] : *sum + sums[f][e];
            }
        }
    }
}
