// The main loop of the kernels of two teams: gemm_4bit_tile_sm90a, gemm_4bit_block_sums_sm90a, gemm_4bit_dgrad_sm90a and
// experts_tile_sm90a: consumers dequantize W into the A operand of wgmma and multiply, a team while the other works.
//
// A round of the loop goes through stages of each pipeline that the compiler knows: so it knows their addresses. With stages that
// were counted at run time, a warp had 144 instructions for a k-tile of 16 tokens in place of 81; with rounds of half the length
// of `TeamsInTurn`, 120 in place of 91 for one of 32.
#pragma once

#include "gemm/tile_sm90a/consumer.cuh"

constexpr int TURNS = 4;  // k-tiles of a team in a round

// What a team's turns of a round are where two teams take every other k-tile of the one tile that a block has: a round goes once or
// twice through all stages of each pipeline.
template <typename S>
struct TeamsInTurn {
    static constexpr int ROUND = 2;                  // stages of scales of a round
    static constexpr int X_TURNS = S::X_STAGES / 2;  // after which x begins again with the same stage
    static constexpr int CODES_TURNS = 1;            // turns with the same stage of codes
    static constexpr int SCALES_TURNS = 2;           // and of scales
    static constexpr bool X_WITH_CODES = false;
    static_assert(TURNS == X_TURNS || TURNS == 2 * X_TURNS, "all stages of x in a round, or twice");
    static_assert(S::SCALES_STAGES * SCALES_K_TILES == 2 * TURNS, "all stages of scales");
    static_assert(S::CODES_STAGES == TURNS, "all stages of codes");
    const u32 team, round;

    __device__ u32 codes_stage(int turn) const { return u32(turn); }
    __device__ u32 half(int) const { return team; }
    __device__ u32 codes_parity() const { return round & 1; }
    __device__ u32 scales_stage(int turn) const { return u32(turn / 2); }
    __device__ int k_tile(int turn) const { return turn % 2 * 2 + int(team); }
    __device__ u32 scales_parity() const { return round & 1; }
    __device__ u32 x_stage(int turn) const { return u32(2 * (turn % X_TURNS)) + team; }
    __device__ u32 x_parity(int turn) const { return X_TURNS == TURNS ? round & 1 : u32(turn / X_TURNS); }
};

// Where both teams take every k-tile, each for rows of its own, and a block has tiles of whole stages of scales: a round is one of
// them, and goes through some of the stages of each pipeline. With S::X_WITH_CODES x is in the stages of codes, whose barriers are
// for both.
template <typename S>
struct TeamsBeside {
    static constexpr bool X_WITH_CODES = S::X_WITH_CODES;
    static constexpr int ROUND = 1, CODES_TURNS = CODES_K / K_TILE, SCALES_TURNS = SCALES_K_TILES;
    static constexpr int CODES_ROUND = TURNS / CODES_TURNS;  // stages of codes in a round
    static_assert(TURNS == SCALES_K_TILES, "a round is a stage of scales");
    static_assert(S::CODES_STAGES == 2 * CODES_ROUND, "all stages of codes in two rounds");
    static_assert(S::X_STAGES == (X_WITH_CODES ? S::CODES_STAGES * CODES_TURNS : TURNS), "and of x in one, or with the codes");
    const u32 team, round;

    __device__ u32 codes_stage(int turn) const { return round % 2 * u32(CODES_ROUND) + u32(turn / CODES_TURNS); }
    __device__ u32 half(int turn) const { return u32(turn % CODES_TURNS); }
    __device__ u32 codes_parity() const { return round / 2 % 2; }
    __device__ u32 scales_stage(int) const { return round % u32(S::SCALES_STAGES); }
    __device__ int k_tile(int turn) const { return turn; }
    __device__ u32 scales_parity() const { return round / u32(S::SCALES_STAGES) % 2; }
    __device__ u32 x_stage(int turn) const { return X_WITH_CODES ? round % 2 * u32(TURNS) + u32(turn) : u32(turn); }
    __device__ u32 x_parity(int) const { return round % 2; }
};

// The products of this team's k-tiles in `stages` stages of scales become `sums`, the accumulators: [64 rows][TOKENS] of a
// warpgroup, as wgmma has them; `rounds` are those before, and counted on. `Operand`: what A is, and `place` where of it this lane's
// part is; with `Operand::BLOCK_SUMS` a scale is applied to the sums of a k-tile. `Teams`: what the turns of a round are.
template <typename T, typename Operand, typename S, typename Teams = TeamsInTurn<S>>
__device__ inline void multiply_in_rounds(float (&sums)[S::ACCUMULATORS], u8 *shared, int lane, int team, u32 place, int stages,
                                          u32 &rounds) {
    constexpr int CHUNKS = Operand::CHUNKS, CHUNK_K_BLOCKS = Operand::K_BLOCKS;
    const Pipelines<S> pipelines(shared);
    const Operand a_operand(shared, lane, place);
    const u32 x_base = operand(shared + S::X_AT);
    const auto arrive = [&](Barrier *barrier) {
        if (lane == 0) {
            barrier_arrive(barrier);
        }
    };
#pragma unroll
    for (int i = 0; i < S::ACCUMULATORS; i++) {
        sums[i] = 0.0f;
    }
    for (int stage = 0; stage < stages; stage += Teams::ROUND, rounds++) {
        const Teams teams{u32(team), rounds};
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            if (Teams::ROUND == 2 && turn == TURNS / 2 && stage + 1 >= stages) {
                break;
            }
            const u32 codes_stage = teams.codes_stage(turn), scales_stage = teams.scales_stage(turn);
            const u32 x_stage = teams.x_stage(turn);
            const auto wait_for_scales = [&]() {
                if (turn % Teams::SCALES_TURNS == 0) {
                    barrier_wait(&pipelines.scales_full[scales_stage], teams.scales_parity());
                }
            };
            const auto scales_read = [&]() {
                if (turn % Teams::SCALES_TURNS == Teams::SCALES_TURNS - 1) {
                    __syncwarp();
                    arrive(&pipelines.scales_empty[scales_stage]);
                }
            };
            const auto codes_read = [&]() {
                if (turn % Teams::CODES_TURNS == Teams::CODES_TURNS - 1) {
                    __syncwarp();
                    arrive(&pipelines.codes_empty[codes_stage]);
                }
            };
            if constexpr (!Operand::BLOCK_SUMS) {
                wait_for_scales();
            }
            if (turn % Teams::CODES_TURNS == 0) {
                barrier_wait(&pipelines.codes_full[codes_stage], teams.codes_parity());
            }
            // The matrix units read A and write the products until the wait for them.
            u32 a[4 * CHUNK_K_BLOCKS];
            float products[S::ACCUMULATORS];
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                typename Operand::Loaded loaded;
                a_operand.load(loaded, codes_stage, teams.half(turn), scales_stage, teams.k_tile(turn), c);
#pragma unroll
                for (int q = 0; q < CHUNK_K_BLOCKS; q++) {
                    a_operand.template dequantize<T>(a, loaded, c, q);
                }
                if (c == CHUNKS - 1) {
                    if constexpr (!Teams::X_WITH_CODES) {
                        codes_read();
                    }
                    if constexpr (!Operand::BLOCK_SUMS) {
                        scales_read();
                    }
                }
                if (c == 0 && !Teams::X_WITH_CODES) {
                    barrier_wait(&pipelines.x_full[x_stage], teams.x_parity(turn));
                }
                products_begin();
#pragma unroll
                for (int q = 0; q < CHUNK_K_BLOCKS; q++) {
                    const u32 x = x_base + x_stage * (S::X_BYTES >> 4) + u32(2 * (c * CHUNK_K_BLOCKS + q));
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
                const Floats2 scale = a_operand.scales(scales_stage, teams.k_tile(turn));
                scales_read();
                products_wait<0>();
#pragma unroll
                for (int i = 0; i < S::ACCUMULATORS; i++) {
                    sums[i] = __fmaf_rn(scale.value[i / 2 % 2], products[i], sums[i]);
                }
            }
            if constexpr (Teams::X_WITH_CODES) {
                codes_read();
            } else {
                arrive(&pipelines.x_empty[x_stage]);
            }
        }
    }
}

// The same for the one tile that a block has.
template <typename T, typename Operand, typename S>
__device__ inline void multiply_in_rounds(float (&sums)[S::ACCUMULATORS], u8 *shared, int lane, int team, u32 place, int stages) {
    u32 rounds = 0;
    multiply_in_rounds<T, Operand, S>(sums, shared, lane, team, place, stages, rounds);
}
