// Tiles of experts_tile_sm90a that several blocks share, each over a part of K (stream-K): the block with the first columns finishes
// it, the others leave their sums in memory. Teams have rows of their own, and so places of their own for sums.
//
// A block makes its part of a tile that another finishes first of all, and finishes a tile itself last of all: nobody waits, but
// for a tile longer than a range. The sums are added in the order of the ranges.
#pragma once

#include "experts/tile_sm90a/shape.cuh"

// All threads of a team.
__device__ inline void meet_team(int team) {
    if (team == 0) {
        meet<3, TEAM>();
    } else {
        meet<4, TEAM>();
    }
}

// Where a thread's sums of a team in a range are, in fours that are TEAM apart.
template <typename S>
__device__ inline Floats4 *sums_of(const Workspace &workspace, int range, int team, int member) {
    return reinterpret_cast<Floats4 *>(workspace.sums) + (i64(range) * S::TEAMS + team) * (S::ACCUMULATORS / 4 * TEAM) + member;
}

// By one team: leaves its sums for the block that finishes the tile.
template <typename S>
__device__ inline void leave_sums(const float (&sums)[S::ACCUMULATORS], const Workspace &workspace, int range, int team,
                                  int team_warp) {
    const int member = team_warp * WARP + read_lane();
    Floats4 *const to = sums_of<S>(workspace, range, team, member);
#pragma unroll
    for (int i = 0; i < S::ACCUMULATORS / 4; i++) {
        to[i * TEAM] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
    }
    meet_team(team);
    if (member == 0) {
        signal_sums(workspace, range * S::TEAMS + team);
    }
}

// By one team: adds what others have of the tile, whose first columns are in this block's range.
template <typename S, typename Walk>
__device__ inline void collect_sums(float (&sums)[S::ACCUMULATORS], const Workspace &workspace, const Walk &walk, int team,
                                    int team_warp) {
    const int member = team_warp * WARP + read_lane();
    if (walk.product.shares == 0) {
        return;
    }
    int range = walk.range();
    const int end = walk.first_shared(range + 1) - walk.left + stages_of(walk.product);
    while (walk.first_shared(range + 1) < end) {
        range++;
        // Where there are fewer stages than ranges some have none.
        if (walk.first_shared(range) == walk.first_shared(range + 1)) {
            continue;
        }
        if (team_warp == 0) {
            wait_for_sums_by_warp(workspace, range * S::TEAMS + team, member);
        }
        meet_team(team);
        const Floats4 *const from = sums_of<S>(workspace, range, team, member);
#pragma unroll
        for (int i = 0; i < S::ACCUMULATORS / 4; i++) {
            const Floats4 theirs = from[i * TEAM];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sums[4 * i + j] += theirs.value[j];
            }
        }
    }
}
