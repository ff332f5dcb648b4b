// experts_gather_few: what experts_route and experts_gather make, in one launch, of few slots: slots sorted by expert, and the rows of
// their tokens in that order.
//
// Problem. Up to FEW slots and any number of experts; rows of whole 128 bytes, aligned to 16.
//
// Roofline. Latency: two launches would take some 5 us more than one, of the 50 to 80 that all of the experts' products take.
//
// Tile. Every block sorts all slots by itself: a thread compares its slot with each other, which are in shared memory. A warp then
//   copies a row; the first block alone writes what others want to know.
//
// Determinism. A stable sort.
#include "experts/gather.cuh"
#include "experts/route.cuh"

constexpr int FEW = THREADS;  // slots: a thread for each

// x:       [tokens][pieces] of 16 bytes
// ids:     [slots]
// offsets: [experts + 1]: where an expert's slots begin in the order, and behind the last of them all
// order:   [slots]
// out:     [slots][pieces]; the rows of slots without an expert are left as they are
// Grid: ceil(slots / WARPS) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS)
    experts_gather_few(const Words4 *x, const i64 *ids, int slots, int experts, int *offsets, int *order, Words4 *out, int top_k,
                       int pieces) {
    SHARED_ARRAY(int, keys, [FEW]);
    SHARED_ARRAY(int, sorted, [FEW]);
    const int thread = int(threadIdx.x);
    wait_for_previous();
    let_next_start();
    const int mine = thread < slots ? expert_of(ids[thread], experts) : 0;
    keys[thread] = mine;
    __syncthreads();
    if (thread < slots) {
        int place = 0;
        for (int j = 0; j < slots; j++) {
            const int other = keys[j];
            place += other < mine || (other == mine && j < thread);
        }
        sorted[place] = thread;
    }
    __syncthreads();
    if (blockIdx.x == 0) {
        if (thread < slots) {
            order[thread] = sorted[thread];
        }
        for (int expert = thread; expert <= experts; expert += THREADS) {
            int before = 0;
            for (int j = 0; j < slots; j++) {
                before += keys[j] < expert;
            }
            offsets[expert] = before;
        }
    }
    const int row = int(blockIdx.x) * WARPS + thread / WARP;
    if (row < slots && keys[sorted[row]] < experts) {
        copy_row(out + i64(row) * pieces, x + i64(sorted[row] / top_k) * pieces, pieces);
    }
}
