// The main loop of gemm_4bit_dgrad_sm90a where one team multiplies every k-tile; gemm/tile_sm90a/rounds.cuh has that of two teams.
#pragma once

#include "gemm/tile_sm90a/consumer.cuh"

// The products of the k-tiles in `stages` stages of scales become `sums`, the accumulators: [64 rows][TOKENS] of a warpgroup, as
// wgmma has them. `Operand`: what A is, and `place` where of it this lane's part is.
template <typename T, typename Operand, typename S>
__device__ inline void multiply_k_tiles(float (&sums)[S::ACCUMULATORS], u8 *shared, ConsumerState<S> &state, int lane, u32 place,
                                        int stages) {
    const Pipelines<S> pipelines(shared);
    Operand a_operand(shared, lane, place);
    const u32 x_base = operand(shared + S::X_AT);
    constexpr int CHUNKS = Operand::CHUNKS, CHUNK_K_BLOCKS = Operand::K_BLOCKS;
    u32 a[4 * CHUNK_K_BLOCKS];
    typename Operand::Loaded loaded;
    PipelineState<S::CODES_STAGES> &codes_state = state.codes;
    PipelineState<S::SCALES_STAGES> &scales_state = state.scales;
    PipelineState<S::X_STAGES> &x_state = state.x;

    // The codes and scales of chunk c of k-tile i of a stage of scales.
    const auto load = [&](int i, int c) {
        if (i == 0 && c == 0) {
            barrier_wait(&pipelines.scales_full[scales_state.stage], scales_state.phase);
        }
        if ((i & 1) == 0 && c == 0) {
            barrier_wait(&pipelines.codes_full[codes_state.stage], codes_state.phase);
        }
        a_operand.load(loaded, codes_state.stage, u32(i & 1), scales_state.stage, i, c);
    };
    // K-block q of what was loaded.
    const auto dequantize = [&](u32 *to, int i, int c, int q) {
        a_operand.template dequantize<T>(to, loaded, c, q);
        if (c < CHUNKS - 1 || q < CHUNK_K_BLOCKS - 1) {
            return;
        }
        if ((i & 1) == 1) {
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&pipelines.codes_empty[codes_state.stage]);
            }
            codes_state.advance();
        }
        if (i == SCALES_K_TILES - 1) {
            if (lane == 0) {
                barrier_arrive(&pipelines.scales_empty[scales_state.stage]);
            }
            scales_state.advance();
        }
    };
    // Adds the products of k-block q of chunk c to the sums, or begins them.
    const auto multiply = [&](const u32 *from, int c, int q, bool fresh) {
        const u32 b = x_base + x_state.stage * (S::X_BYTES >> 4) + u32(2 * (c * CHUNK_K_BLOCKS + q));
        if (fresh) {
            multiply_fresh(T{}, sums, from + 4 * q, b);
        } else {
            multiply_add(T{}, sums, from + 4 * q, b);
        }
    };
    // Two k-tiles of a stage of scales from `first` on; `fresh` when they are the first of all.
    const auto main_loop = [&](bool fresh, int first) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                load(first + i, c);
#pragma unroll
                for (int q = 0; q < CHUNK_K_BLOCKS; q++) {
                    dequantize(a, first + i, c, q);
                }
                if (c == 0) {
                    barrier_wait(&pipelines.x_full[x_state.stage], x_state.phase);
                }
                products_begin();
#pragma unroll
                for (int q = 0; q < CHUNK_K_BLOCKS; q++) {
                    multiply(a, c, q, fresh && i == 0 && c == 0 && q == 0);
                }
                products_commit();
                products_wait<0>();
            }
            if (lane == 0) {
                barrier_arrive(&pipelines.x_empty[x_state.stage]);
            }
            x_state.advance();
        }
    };
    main_loop(true, 0);
    constexpr int PAIRS = SCALES_K_TILES / 2;
    for (int p = 1; p < stages * PAIRS; p++) {
        main_loop(false, p % PAIRS * 2);
    }
}
