// Tiles of gemm_4bit_tile_sm90a that several blocks share, each over a range of K (stream-K): the one with the first columns
// finishes it, the others leave their sums in memory.
//
// A block makes its part of a tile that another finishes first of all, and finishes a tile itself last of all: nobody waits,
// but for a tile longer than a range. The sums are added in the order of the ranges.
#pragma once

#include "gemm/tile_sm90a/walk.cuh"

// By one team: its sums, for the block that finishes the tile: [ranges][TOKENS / 8][TEAM][4].
template <int TOKENS>
__device__ inline void leave_sums(const float (&sums)[Shape<TOKENS>::ACCUMULATORS], const Workspace &workspace, int range) {
    const int member = team_member();
    constexpr int FOURS = Shape<TOKENS>::ACCUMULATORS / 4;
    Floats4 *const to = reinterpret_cast<Floats4 *>(workspace.sums) + i64(range) * (FOURS * TEAM) + member;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        to[i * TEAM] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
    }
    meet<3, TEAM>();
    if (member == 0) {
        signal_sums(workspace, range);
    }
}

// By one team: adds what others have of the tile, whose first columns are in this block's range.
template <int TOKENS>
__device__ inline void collect_sums(float (&sums)[Shape<TOKENS>::ACCUMULATORS], const Workspace &workspace,
                                    const ProductWalk<TOKENS> &walk) {
    const int member = team_member();
    constexpr int FOURS = Shape<TOKENS>::ACCUMULATORS / 4;
    const int end = walk.at + walk.of_tile();  // of the tile, which begins here
    int range = walk.range();
    do {
        range++;
        if (member == 0) {
            wait_for_sums(workspace, range);
        }
        meet<3, TEAM>();
        const Floats4 *const from = reinterpret_cast<const Floats4 *>(workspace.sums) + i64(range) * (FOURS * TEAM) + member;
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            // No more on the way at a time than there are registers for.
            if (i % 8 == 0) {
                __syncwarp();
            }
            const Floats4 theirs = from[i * TEAM];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sums[4 * i + j] += theirs.value[j];
            }
        }
    } while (walk.first_of(range + 1) < end);
}
