// Tiles of gemm_4bit_tile_sm90a and gemm_4bit_dgrad_sm90a that several blocks share, each over a range of K (stream-K): the one
// with the first columns finishes it, the others leave their sums in memory. With two teams these and those of the second team
// go through the place of x, which the copy engine leaves alone meanwhile.
//
// A block makes its part of a tile that another finishes first of all, and finishes a tile itself last of all: nobody waits,
// but for a tile longer than a range. The sums are added in the order of the ranges.
#pragma once

#include "gemm/tile_sm90a/epilogue.cuh"

// By one team: its sums and those that the second team left it, for the block that finishes the tile:
// [ranges][TOKENS / 8][TEAM][4].
template <typename S>
__device__ inline void leave_sums(const float (&sums)[S::ACCUMULATORS], const u8 *shared, const Workspace &workspace, int range) {
    const int member = team_member();
    constexpr int FOURS = S::ACCUMULATORS / 4;
    Floats4 *const to = reinterpret_cast<Floats4 *>(workspace.sums) + i64(range) * (FOURS * TEAM) + member;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        Floats4 mine = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
        // Added while they are stored: if they were added before, ptxas would spill the sums.
        if constexpr (S::TEAMS == 2) {
            const Floats4 other = (reinterpret_cast<const Floats4 *>(shared + S::X_AT) + member)[i * TEAM];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                mine.value[j] += other.value[j];
            }
        }
        to[i * TEAM] = mine;
    }
    meet<3, TEAM>();
    if (member == 0) {
        signal_sums(workspace, range);
    }
}

// By one team: waits for the sums of a range, and gives where the thread's are.
template <typename S>
__device__ inline const Floats4 *wait_for_range(const Workspace &workspace, int range, int member) {
    if (member == 0) {
        wait_for_sums(workspace, range);
    }
    meet<3, TEAM>();
    return reinterpret_cast<const Floats4 *>(workspace.sums) + i64(range) * (S::ACCUMULATORS / 4 * TEAM) + member;
}

// Of a tile that begins here, whether others have more of its sums than the ranges up to this one.
template <int TOKENS>
__device__ inline bool others_follow(const ProductWalk<TOKENS> &walk, int range) {
    return walk.config.ranges > 0 && walk.first_of(range + 1) < walk.at + walk.of_tile();
}

// By one team: adds what others have of the tile, whose first columns are in this block's range.
template <typename S>
__device__ inline void collect_sums(float (&sums)[S::ACCUMULATORS], const Workspace &workspace,
                                    const ProductWalk<S::TOKENS> &walk) {
    const int member = team_member();
    for (int range = walk.range(); others_follow(walk, range); range++) {
        const Floats4 *const from = wait_for_range<S>(workspace, range + 1, member);
#pragma unroll
        for (int i = 0; i < S::ACCUMULATORS / 4; i++) {
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
    }
}

// The same where there are no registers for loads that are under way: copies bring the sums to shared memory, to where the other
// team's were, and each thread reads what it copied itself. With two teams, the other team's sums are added first.
template <typename S>
__device__ inline void collect_sums(float (&sums)[S::ACCUMULATORS], u8 *shared, const Workspace &workspace,
                                    const ProductWalk<S::TOKENS> &walk) {
    const int member = team_member();
    Words4 *const to = reinterpret_cast<Words4 *>(shared + S::X_AT) + member;
    int range = walk.range();
    bool there = S::TEAMS == 2;
    do {
        if (there) {
            add_sums<S>(sums, shared);
        }
        there = others_follow(walk, range);
        if (there) {
            range++;
            const Words4 *const from = reinterpret_cast<const Words4 *>(wait_for_range<S>(workspace, range, member));
#pragma unroll
            for (int i = 0; i < S::ACCUMULATORS / 4; i++) {
                copy_async(to + i * TEAM, from + i * TEAM);
            }
            copy_async_commit();
            copy_async_wait<0>();
        }
    } while (there);
}

// Whether another block finishes the tile that a walk is at.
template <int TOKENS>
__device__ inline bool finishes_elsewhere(const ProductWalk<TOKENS> &walk) {
    return walk.config.ranges > 0 && walk.tile().begin > 0;
}
