// The main loop of the kernels of two teams, gemm_4bit_tile_sm90a, gemm_4bit_block_sums_sm90a and gemm_4bit_dgrad_sm90a: consumers
// dequantize W into the A operand of wgmma and multiply, a team while the other works.
//
// What a block of threads has of a tile begins with stage 0 of all pipelines, and a round of the loop goes once or twice through all
// stages of each: so the compiler knows the address of every stage. Where another tile follows, it is of whole rounds. With stages
// that were counted at run time, a warp had 144 instructions for a k-tile of 16 tokens in place of 81; with rounds of half the length,
// 120 in place of 91 for one of 32.
#pragma once

#include "gemm/tile_sm90a/consumer.cuh"

// The products of this team's k-tiles in `stages` stages of scales become `sums`, the accumulators: [64 rows][TOKENS] of a
// warpgroup, as wgmma has them. `Operand`: what A is, and `place` where of it this lane's part is; with `Operand::BLOCK_SUMS` a
// scale is applied to the sums of a k-tile. `rounds`: of the loop, those before; and then those after.
template <typename T, typename Operand, typename S>
__device__ inline void multiply_in_rounds(float (&sums)[S::ACCUMULATORS], u8 *shared, int lane, int team, u32 place, int stages,
                                          u32 &rounds) {
    constexpr int TURNS = 4;                    // k-tiles of a team in a round
    constexpr int X_TURNS = S::X_STAGES / 2;    // after which x begins again with the same stage
    constexpr int CHUNKS = Operand::CHUNKS, CHUNK_K_BLOCKS = Operand::K_BLOCKS;
    static_assert(TURNS == X_TURNS || TURNS == 2 * X_TURNS, "all stages of x in a round, or twice");
    static_assert(S::SCALES_STAGES * SCALES_K_TILES == 2 * TURNS, "all stages of scales");
    static_assert(S::CODES_STAGES == TURNS, "all stages of codes");
    const Pipelines<S> pipelines(shared);
    const Operand a_operand(shared, lane, place);
    const u32 x_base = operand(shared + S::X_AT) + u32(team) * (S::X_BYTES >> 4);
    const auto arrive = [&](Barrier *barrier) {
        if (lane == 0) {
            barrier_arrive(barrier);
        }
    };
#pragma unroll
    for (int i = 0; i < S::ACCUMULATORS; i++) {
        sums[i] = 0.0f;
    }
    for (int left = stages; left > 0; left -= 2, rounds++) {
        const u32 parity = rounds & 1;
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            if (turn == TURNS / 2 && left < 2) {
                break;
            }
            const int scales_stage = turn / 2, x_stage = 2 * (turn % X_TURNS) + team, k_tile = turn % 2 * 2 + team;
            const auto wait_for_scales = [&]() {
                if (turn % 2 == 0) {
                    barrier_wait(&pipelines.scales_full[scales_stage], parity);
                }
            };
            const auto scales_read = [&]() {
                if (turn % 2 != 0) {
                    __syncwarp();
                    arrive(&pipelines.scales_empty[scales_stage]);
                }
            };
            if constexpr (!Operand::BLOCK_SUMS) {
                wait_for_scales();
            }
            barrier_wait(&pipelines.codes_full[turn], parity);
            // The matrix units read A and write the products until the wait for them.
            u32 a[4 * CHUNK_K_BLOCKS];
            float products[S::ACCUMULATORS];
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                typename Operand::Loaded loaded;
                a_operand.load(loaded, u32(turn), u32(team), u32(scales_stage), k_tile, c);
#pragma unroll
                for (int q = 0; q < CHUNK_K_BLOCKS; q++) {
                    a_operand.template dequantize<T>(a, loaded, c, q);
                }
                if (c == CHUNKS - 1) {
                    __syncwarp();
                    arrive(&pipelines.codes_empty[turn]);
                    if constexpr (!Operand::BLOCK_SUMS) {
                        scales_read();
                    }
                }
                if (c == 0) {
                    barrier_wait(&pipelines.x_full[x_stage], X_TURNS == TURNS ? parity : u32(turn / X_TURNS));
                }
                products_begin();
#pragma unroll
                for (int q = 0; q < CHUNK_K_BLOCKS; q++) {
                    const u32 x = x_base + u32(2 * (turn % X_TURNS)) * (S::X_BYTES >> 4) + u32(2 * (c * CHUNK_K_BLOCKS + q));
                    if constexpr (!Operand::BLOCK_SUMS) {
                        multiply_add(T{}, sums, a + 4 * q, x);
                    } else if (c == 0 && q == 0) {
                        multiply_fresh(T{}, products, a, x);
                    } else {
                        multiply_add(T{}, products, a + 4 * q, x);
                    }
                }
                products_commit();
                if constexpr (!Operand::BLOCK_SUMS) {
                    products_wait<0>();
                }
            }
            if constexpr (Operand::BLOCK_SUMS) {
                static_assert(CHUNKS == 1, "A is not overwritten before the products are made");
                wait_for_scales();
                const Floats2 scale = a_operand.scales(u32(scales_stage), k_tile);
                scales_read();
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
