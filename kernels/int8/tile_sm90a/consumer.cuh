// Two warpgroups multiply: sums of a tile, and what other blocks of a cluster have of them.
#pragma once

#include "int8/tile_sm90a/shape.cuh"

// What those who multiply know of themselves.
struct Place {
    int thread, warp, lane;

    __device__ int group() const { return warp / (TEAM_WARPS / 2); }
    __device__ int member() const { return thread % GROUP; }
    // Rows g and g + 8 of the warp's sixteen, columns 8j + 2t and the next.
    __device__ int g() const { return lane / 4; }
    __device__ int t() const { return lane % 4; }
    __device__ int row() const { return group() * GROUP_ROWS + warp % (TEAM_WARPS / 2) * 16 + g(); }
    __device__ void meet_group() const {
        if (group() == 0) {
            meet<1, GROUP>();
        } else {
            meet<2, GROUP>();
        }
    }
};

// The sums of a tile, of all stages. `picked`: stages are waited for until outliers were taken out of them.
template <int TOKENS>
__device__ inline void multiply_stages(int (&sums)[Shape<TOKENS>::SUMS], u8 *shared, Turn<Shape<TOKENS>::STAGES> &turn,
                                       const Place &at, int steps, int rank, bool shares, bool picked) {
    using S = Shape<TOKENS>;
    const Barriers<TOKENS> barriers(shared);
    const u32 w_base = operand(shared + at.group() * GROUP_ROWS * STEP), x_base = operand(shared + S::W_BYTES);
    const u32 release_at = address_at(barriers.empty, shares ? u32(at.lane % 2) : u32(rank));
    const auto step = [&](bool fresh) {
        barrier_wait(&barriers.full[turn.place], turn.round);
        if (picked) {
            barrier_wait(&barriers.clean[turn.place], turn.round);
        }
        const u32 stage = turn.place * (S::STAGE_BYTES >> 4);
        products_begin();
#pragma unroll
        for (int q = 0; q < QUARTERS; q++) {
            if (fresh && q == 0) {
                multiply_fresh(sums, w_base + stage, x_base + stage);
            } else {
                multiply_add(sums, w_base + stage + u32(2 * q), x_base + stage + u32(2 * q));
            }
        }
        products_commit();
    };
    const auto release = [&](u32 place) {
        if (shares) {
            if (at.lane < 2) {
                barrier_arrive_at(release_at + place * 8);
            }
        } else if (at.lane == 0) {
            barrier_arrive(&barriers.empty[place]);
        }
    };
    step(true);
    u32 before = turn.place;
    turn.next();
    for (int i = 1; i < steps; i++) {
        step(false);
        products_wait<1>();
        release(before);
        before = turn.place;
        turn.next();
    }
    products_wait<0>();
    release(before);
}

// Each block of the cluster adds up a range of tokens, the first `tokens` of its sums from here on: what the others have of them
// comes to its memory, in rows of what all threads have of eight tokens. `sixteens`: of tokens, of a block.
template <int TOKENS>
__device__ inline void add_parts(int (&sums)[Shape<TOKENS>::SUMS], u8 *shared, int thread, int rank, int parts, int sixteens,
                                 int tokens) {
    constexpr u32 ALL = TEAM * 16;
    u8 *const own = shared + thread * 16;
    // Nobody's matrix units read the ring any more, and no copy to it is on the way.
    cluster_meet();
    int owner = 0, at = rank * sixteens;
    u32 there = address_at(own, 0);
#pragma unroll
    for (int j = 0; j < TOKENS / 16; j++) {
        const int *const d = sums + 8 * j;
        store_at(there + u32(2 * at) * ALL, d[0], d[1], d[2], d[3]);
        store_at(there + u32(2 * at + 1) * ALL, d[4], d[5], d[6], d[7]);
        at++;
        if (at == (rank + 1) * sixteens && owner + 1 < parts) {
            owner++;
            at = rank * sixteens;
            there = address_at(own, u32(owner));
        }
    }
    cluster_meet();
#pragma unroll
    for (int j = 0; j < part_tokens(TOKENS, 2) / 16; j++) {
        if (16 * j < tokens) {
            int total[8] = {};
            for (int from = 0; from < parts; from++) {
                const u8 *const received = own + u32(from * sixteens + j) * (2 * ALL);
                const Words4 *const theirs = reinterpret_cast<const Words4 *>(received);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    total[i] += int(theirs[i / 4 * TEAM].word[i % 4]);
                }
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sums[8 * j + i] = total[i];
            }
        }
    }
}
