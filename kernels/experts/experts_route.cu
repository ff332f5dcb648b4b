// experts_route: slots sorted by expert, for products that take more slots than a block of threads sorts by itself.
//
// Problem. Any number of slots, up to 512 experts; what an id that is none of an expert's stands for comes last.
//
// Roofline. Latency: 8 bytes of each slot are read, twice, and 4 written. No figure of its own: the products behind it read
//   megabytes.
//
// Tile. One block of threads. Each of its 32 warps has consecutive slots. It counts those of each expert, a warp's lanes with
//   the same expert at once; the counts of all warps become where each warp's slots of an expert begin; then it goes over its
//   slots again, and each takes its place. No order of warps matters, so the result is that of a stable sort.
//
// Shared memory:
//     counts     [32 warps][experts + 1] int32                                                            up to 64.1 KB
//     sums       of warps, when counts are added up                                                            0.3 KB
//
// Budget. 1024 threads: what is left to wait for is the memory's latency, for each 32 slots of a warp.
#include "experts/route.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
// As many as there is shared memory for everywhere.
constexpr int MOST_EXPERTS = 512;
static_assert(MOST_EXPERTS < THREADS, "a thread for each, and one for none");

// The sum of `value` over the threads before this one, and over all. Ends with a barrier.
__device__ inline int sum_before(int value, int *of_warps, int &all) {
    const int lane = int(threadIdx.x % WARP), warp = int(threadIdx.x / WARP);
    int sum = value;
#pragma unroll
    for (int by = 1; by < WARP; by *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, sum, u32(by));
        sum += lane >= by ? other : 0;
    }
    if (lane == WARP - 1) {
        of_warps[warp] = sum;
    }
    __syncthreads();
    int before = 0;
    all = 0;
#pragma unroll 8
    for (int w = 0; w < WARPS; w++) {
        before += w < warp ? of_warps[w] : 0;
        all += of_warps[w];
    }
    __syncthreads();
    return before + sum - value;
}

// The slots of a warp from `begin` to `end`. What `take` is given: a slot, its expert, or -1 where there is no slot; its place
// among the warp's lanes with that expert; and how many these are.
template <typename Take>
__device__ inline void for_all(const i64 *ids, int begin, int end, int experts, const Take &take) {
    const int lane = int(threadIdx.x % WARP);
    i64 next = begin + lane < end ? ids[begin + lane] : 0;
    for (int first = begin; first < end; first += WARP) {
        const int slot = first + lane;
        const i64 id = next;
        next = slot + WARP < end ? ids[slot + WARP] : 0;
        const int expert = slot < end ? expert_of(id, experts) : -1;
        const u32 same = __match_any_sync(ALL_LANES, expert);
        take(slot, expert, __popc(same & ((1u << lane) - 1)), __popc(same));
        __syncwarp();
    }
}

__device__ inline void route(const i64 *ids, int slots, int experts, int columns, int *offsets, int *order, int *chunk_count,
                             Chunk *chunks) {
    DYNAMIC_SHARED(shared);
    SHARED_ARRAY(int, of_warps, [WARPS]);
    int *const counts = reinterpret_cast<int *>(shared);  // [WARPS][experts + 1]
    const int thread = int(threadIdx.x), warp = thread / WARP;
    const int width = experts + 1;
    for (int i = thread; i < WARPS * width; i += THREADS) {
        counts[i] = 0;
    }
    __syncthreads();
    wait_for_previous();
    let_next_start();

    const int begin = int(i64(slots) * warp / WARPS), end = int(i64(slots) * (warp + 1) / WARPS);
    int *const own = counts + warp * width;
    for_all(ids, begin, end, experts, [&](int, int expert, int before, int same) {
        if (expert >= 0 && before == 0) {
            own[expert] += same;
        }
    });
    __syncthreads();

    int total = 0;
    if (thread < width) {
        for (int w = 0; w < WARPS; w++) {
            total += counts[w * width + thread];
        }
    }
    int all, all_chunks;
    const int first = sum_before(thread < width ? total : 0, of_warps, all);
    const int own_chunks = thread < experts ? (total + columns - 1) / columns : 0;
    const int first_chunk = sum_before(own_chunks, of_warps, all_chunks);
    if (thread < width) {
        offsets[thread] = first;
        int at = first;
        for (int w = 0; w < WARPS; w++) {
            const int count = counts[w * width + thread];
            counts[w * width + thread] = at;
            at += count;
        }
        for (int c = 0; c < own_chunks; c++) {
            chunks[first_chunk + c] = {thread, first + c * columns, min(columns, total - c * columns), 0};
        }
    }
    if (thread == 0) {
        *chunk_count = all_chunks;
    }
    __syncthreads();

    for_all(ids, begin, end, experts, [&](int slot, int expert, int before, int same) {
        const int place = expert >= 0 ? own[expert] : 0;
        __syncwarp();
        if (expert >= 0) {
            if (before == 0) {
                own[expert] = place + same;
            }
            order[place + before] = slot;
        }
    });
}

// ids:         [slots]
// columns:     slots of a chunk at most
// offsets:     [experts + 1]: where an expert's slots begin in the order, and behind the last of them all
// order:       [slots]
// chunk_count: [1]
// chunks:      [min(experts, slots) + slots / columns], of which the first *chunk_count are written
// Grid: 1 block of THREADS. Dynamic shared memory: WARPS * (experts + 1) * 4 bytes.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts_route(const i64 *ids, int slots, int experts, int columns, int *offsets, int *order, int *chunk_count,
                  Chunk *chunks) {
    route(ids, slots, experts, columns, offsets, order, chunk_count, chunks);
}
