// The main loop of experts_tile_sm90a: both teams take every k-tile, each for rows of its own.
//
// A round of the loop is a stage of codes and scales, four k-tiles, so that the compiler knows where in it each of them is.
#pragma once

#include "experts/tile_sm90a/operands.cuh"

// Where a consumer is in the pipelines: stages of codes and scales, and of x, whose rounds are one or two.
template <typename S>
struct Rounds {
    static constexpr int X_ROUNDS = S::X_STAGES / SCALES_K_TILES;
    static_assert(S::X_STAGES == SCALES_K_TILES * X_ROUNDS && (X_ROUNDS == 1 || X_ROUNDS == 2), "whole rounds of x");
    PipelineState<S::CODES_STAGES> codes;
    u32 round = 0;

    __device__ u32 x_stage(int k_tile) const { return round % X_ROUNDS * u32(SCALES_K_TILES) + u32(k_tile); }
    __device__ u32 x_parity() const { return round / X_ROUNDS % 2; }
    __device__ void advance() {
        round++;
        codes.advance();
    }
};

// The products of the k-tiles in `stages` stages become `sums`, the accumulators: [64 rows][TOKENS] of a warpgroup, as wgmma has
// them. `Operand`: what A is, and `my_row` the first of the lane's rows; with Operand::BLOCK_SUMS a scale is applied to the sums of
// a k-tile, and while one is multiplied the next one's A is made, where there are registers for two.
template <typename T, typename Operand, typename S>
__device__ inline void multiply_rounds(float (&sums)[S::ACCUMULATORS], u8 *shared, Rounds<S> &at, int lane, u32 my_row, int stages) {
    constexpr int CHUNKS = Operand::CHUNKS, K_BLOCKS = Operand::K_BLOCKS, SETS = S::A_SETS;
    static_assert(SCALES_K_TILES % SETS == 0, "a round begins with the first set");
    const Pipelines<S> pipelines(shared);
    const Operand a_operand(shared, lane, my_row);
    const u32 x_base = operand(shared + S::X_AT);
    const auto arrive = [&](Barrier *barrier) {
        if (lane == 0) {
            barrier_arrive(barrier);
        }
    };
    // The matrix units read A, and write the products, until the wait for them.
    u32 a[SETS][4 * K_BLOCKS];
    float products[S::ACCUMULATORS];
    const auto make = [&](u32 (&to)[4 * K_BLOCKS], u32 stage, int k_tile, int c) {
        typename Operand::Loaded loaded;
        a_operand.load(loaded, stage, k_tile, c);
#pragma unroll
        for (int q = 0; q < K_BLOCKS; q++) {
            a_operand.template dequantize<T>(to, loaded, c, q);
        }
    };
    const auto wait_for_codes = [&](const PipelineState<S::CODES_STAGES> &which) {
        barrier_wait(&pipelines.codes_full[which.stage], which.phase);
    };
    const auto multiply = [&](const u32 (&from)[4 * K_BLOCKS], u32 x_stage, int c) {
        products_begin();
#pragma unroll
        for (int q = 0; q < K_BLOCKS; q++) {
            const u32 x = x_base + x_stage * (S::X_BYTES >> 4) + u32(2 * (c * K_BLOCKS + q));
            if constexpr (!Operand::BLOCK_SUMS) {
                multiply_add(T{}, sums, from + 4 * q, x);
            } else if (q == 0) {
                multiply_fresh(T{}, products, from, x);
            } else {
                multiply_add(T{}, products, from + 4 * q, x);
            }
        }
        products_commit();
    };
#pragma unroll
    for (int i = 0; i < S::ACCUMULATORS; i++) {
        sums[i] = 0.0f;
    }
    if constexpr (SETS == 2) {
        wait_for_codes(at.codes);
        make(a[0], at.codes.stage, 0, 0);
    }
#pragma unroll 1
    for (int stage = 0; stage < stages; stage++, at.advance()) {
#pragma unroll
        for (int k_tile = 0; k_tile < SCALES_K_TILES; k_tile++) {
            constexpr int LAST = SCALES_K_TILES - 1;
            const u32 x_stage = at.x_stage(k_tile);
            const auto codes_read = [&]() {
                if (k_tile == LAST) {
                    __syncwarp();
                    arrive(&pipelines.codes_empty[at.codes.stage]);
                }
            };
            if constexpr (SETS == 1) {
                if (k_tile == 0) {
                    wait_for_codes(at.codes);
                }
            }
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                if constexpr (SETS == 1) {
                    make(a[0], at.codes.stage, k_tile, c);
                    if (c == CHUNKS - 1 && !Operand::BLOCK_SUMS) {
                        codes_read();
                    }
                }
                if (c == 0) {
                    barrier_wait(&pipelines.x_full[x_stage], at.x_parity());
                }
                multiply(a[k_tile % SETS], x_stage, c);
                if constexpr (!Operand::BLOCK_SUMS) {
                    products_wait<0>();
                }
            }
            if constexpr (Operand::BLOCK_SUMS) {
                static_assert(CHUNKS == 1, "A is not overwritten before the products are made");
                const Floats2 scale = a_operand.scales(at.codes.stage, k_tile);
                codes_read();
                if constexpr (SETS == 2) {
                    if (k_tile < LAST) {
                        make(a[(k_tile + 1) % SETS], at.codes.stage, k_tile + 1, 0);
                    } else if (stage + 1 < stages) {
                        PipelineState<S::CODES_STAGES> next = at.codes;
                        next.advance();
                        wait_for_codes(next);
                        make(a[0], next.stage, 0, 0);
                    }
                }
                products_wait<0>();
#pragma unroll
                for (int i = 0; i < S::ACCUMULATORS; i++) {
                    sums[i] = __fmaf_rn(scale.value[i / 2 % 2], products[i], sums[i]);
                }
            }
            arrive(&pipelines.x_empty[x_stage]);
        }
    }
}
