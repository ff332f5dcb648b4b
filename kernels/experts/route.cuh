// Which slots an expert has. A slot is one choice of a token's: slot token * top_k + j. Sorted by expert, and by number where
// experts are equal, slots of an expert lie together; up to COLUMNS of them are a chunk, which a product takes at a time.
//
//     ids      [slots]              7 3 3 9 | 3 1 7 -1      -1, like all from the number of experts on: no expert
//     order    [slots]              5 | 1 2 4 | 0 6 | 3 | 7
//     chunks   {expert, begin in order, slots}              {1, 0, 1} {3, 1, 3} {7, 4, 2} {9, 6, 1}
#pragma once

#include "common/types.cuh"

// Experts whose slots are consecutive in the order.
struct alignas(16) Chunk {
    int expert, begin, count, unused;
};

// An expert's number, or `experts` for none.
__device__ inline int expert_of(i64 id, int experts) { return id >= 0 && id < experts ? int(id) : experts; }

// Slots that a block of threads sorts by itself: each is compared with each other. More take a launch of experts_route.
constexpr int FEW_SLOTS = 64;

// What comes of few slots, in shared memory.
struct FewSlots {
    int *keys;      // [FEW_SLOTS], to work with
    int *order;     // [FEW_SLOTS]
    Chunk *chunks;  // [FEW_SLOTS]
    u32 *starts;    // [FEW_SLOTS / WARP], to work with
};
constexpr u32 FEW_SLOTS_BYTES = FEW_SLOTS * (2 * sizeof(int) + sizeof(Chunk)) + FEW_SLOTS / WARP * sizeof(u32);

__device__ inline FewSlots few_slots(unsigned char *shared) {
    Chunk *const chunks = reinterpret_cast<Chunk *>(shared);
    int *const keys = reinterpret_cast<int *>(chunks + FEW_SLOTS);
    return {keys, keys + FEW_SLOTS, chunks, reinterpret_cast<u32 *>(keys + 2 * FEW_SLOTS)};
}

// Sorts up to FEW_SLOTS slots by a block of at least as many threads; gives the number of chunks, of at most `columns` slots,
// a power of two. Ends with a barrier.
__device__ inline int route_few(const FewSlots &to, const i64 *ids, int slots, int experts, int columns) {
    const int i = int(threadIdx.x), lane = i % WARP;
    int expert = experts;
    if (i < FEW_SLOTS) {
        if (i < slots) {
            expert = expert_of(ids[i], experts);
        }
        to.keys[i] = expert;
    }
    __syncthreads();
    if (i < slots) {
        int less = 0, before = 0, equal = 0;
        for (int j = 0; j < slots; j++) {
            const int other = to.keys[j];
            less += other < expert;
            before += other == expert && j < i;
            equal += other == expert;
        }
        to.order[less + before] = i;
        const bool starts = expert < experts && before % columns == 0;
        // For now at the place of its first slot.
        to.chunks[less + before] = {expert, less + before, starts ? min(columns, equal - before) : 0, 0};
    }
    __syncthreads();
    Chunk chunk = {};
    if (i < FEW_SLOTS) {
        if (i < slots) {
            chunk = to.chunks[i];
        }
        const u32 of_warp = __ballot_sync(ALL_LANES, chunk.count > 0);
        if (lane == 0) {
            to.starts[i / WARP] = of_warp;
        }
    }
    __syncthreads();
    int count = 0, place = 0;
#pragma unroll
    for (int w = 0; w < FEW_SLOTS / WARP; w++) {
        const u32 starts = to.starts[w];
        if (w < i / WARP) {
            place += __popc(starts);
        } else if (w == i / WARP) {
            place += __popc(starts & ((1u << lane) - 1));
        }
        count += __popc(starts);
    }
    if (chunk.count > 0) {
        to.chunks[place] = chunk;
    }
    __syncthreads();
    return count;
}
