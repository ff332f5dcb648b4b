// The products of gemm_4bit_tile_sm75: W is the A operand of mma, dequantized into it, and x the B operand. K is permuted as in
// small_m.cuh: a lane has 16 consecutive columns of a block.
#pragma once

#include "gemm/tile_sm75/operands.cuh"

// A lane's weights of a k-tile, without their scales: the A operands of four products of depth 16 for each fragment of rows.
template <int FRAGMENTS>
struct Weights {
    u32 a[FRAGMENTS][4][4];

    __device__ Weights(const Planes &planes, const Words2 (&codes)[2 * FRAGMENTS]) {
#pragma unroll
        for (int r = 0; r < FRAGMENTS; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 low = codes[2 * r].word[i / 2] >> (i % 2 * 16), high = codes[2 * r + 1].word[i / 2] >> (i % 2 * 16);
                look_up(planes, low, a[r][i][0], a[r][i][2]);
                look_up(planes, high, a[r][i][1], a[r][i][3]);
            }
        }
    }
};

// Adds the products of a k-tile and half of the rows of x to the sums, times the scales of rows g, g + 8, ... of the warp.
// `x` [TOKENS][K_TILE].
template <int TOKENS>
__device__ inline void add_k_tile(float (&sums)[Shape<TOKENS>::ROW_FRAGMENTS][Shape<TOKENS>::TOKEN_FRAGMENTS][4],
                                  const Weights<Shape<TOKENS>::ROW_FRAGMENTS> &weights,
                                  const float (&scales)[LANE_ROWS], const u8 *x, int half_of_x, int g, int t) {
    using S = Shape<TOKENS>;
#pragma unroll
    for (int i = 0; i < S::TOKEN_FRAGMENTS / 2; i++) {
        const int f = half_of_x * (S::TOKEN_FRAGMENTS / 2) + i;
        const u32 token = u32(8 * f + g);
        Words4 b[2];
        float products[S::ROW_FRAGMENTS][4] = {};
        // Of eight lanes four read every other piece of a row, and four the pieces between of the next: in different banks.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            b[half] = *reinterpret_cast<const Words4 *>(x + piece_offset(token, u32(2 * t + half)));
        }
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const u32 *const at = &b[step / 2].word[step % 2 * 2];
#pragma unroll
            for (int r = 0; r < S::ROW_FRAGMENTS; r++) {
                mma_m16n8k16(F16{}, products[r], weights.a[r][step], at[0], at[1]);
            }
        }
#pragma unroll
        for (int r = 0; r < S::ROW_FRAGMENTS; r++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sums[r][f][e] = __fmaf_rn(scales[2 * r + e / 2], products[r][e], sums[r][f][e]);
            }
        }
    }
}
