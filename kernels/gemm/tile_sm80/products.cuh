// The products of gemm_4bit_tile_sm80: W is the A operand of mma.m16n8k16, x the B operand, both read by ldmatrix.
#pragma once

#include "gemm/tile_sm80/stages.cuh"

// Adds the products of a k-tile to the sums: of `w` [ROWS][K_TILE] rows `first_row` and on, of `x` [TOKENS][K_TILE] rows
// `first_token` and on.
template <typename T, int TOKENS>
__device__ inline void add_k_tile(float (&sums)[Shape<TOKENS>::ROW_FRAGMENTS][Shape<TOKENS>::TOKEN_FRAGMENTS][4], const u8 *w,
                                  const u8 *x, int first_row, int first_token, int lane) {
    using S = Shape<TOKENS>;
    // This lane gives the address of row lane % 8 of one of four matrices. Of W these are rows 0 and 8, columns 0, then rows
    // 0 and 8, columns 8 of a fragment; of x rows 0, columns 0 and 8, of a fragment and then of the next.
    const u32 row = u32(first_row + lane % 16), token = u32(first_token + lane / 16 * 8 + lane % 8);
#pragma unroll
    for (int step = 0; step < K_TILE / 16; step++) {
        u32 a[S::ROW_FRAGMENTS][4], b[S::TOKEN_FRAGMENTS / 2][4];
#pragma unroll
        for (int r = 0; r < S::ROW_FRAGMENTS; r++) {
            load_matrices(a[r], w + piece_offset(row + u32(16 * r), u32(2 * step + lane / 16)));
        }
#pragma unroll
        for (int f = 0; f < S::TOKEN_FRAGMENTS / 2; f++) {
            load_matrices(b[f], x + piece_offset(token + u32(16 * f), u32(2 * step + lane / 8 % 2)));
        }
#pragma unroll
        for (int f = 0; f < S::TOKEN_FRAGMENTS; f++) {
#pragma unroll
            for (int r = 0; r < S::ROW_FRAGMENTS; r++) {
                mma_m16n8k16(T{}, sums[r][f], a[r], b[f / 2][f % 2 * 2], b[f / 2][f % 2 * 2 + 1]);
            }
        }
    }
}
