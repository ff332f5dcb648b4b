// experts_gather: out[i] = x[order[i] / top_k], the rows of the tokens sorted by expert, for products by tiles: the copy engine
// brings rows that lie together.
//
// Problem. Rows of whole 16 bytes, aligned to 16.
//
// Roofline. Memory: each row is written once and read back by the product, mostly from the second-level cache.
//
// Tile. A warp copies a row; as many of its pieces are on their way at a time as a thread has registers for.
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int AT_ONCE = 8;

// x:      [tokens][pieces] of 16 bytes
// order:  [slots], slots sorted by expert
// count:  [1]: how many of them have an expert; the rows of others are left as they are
// out:    [slots][pieces]
// Grid: ceil(slots / WARPS) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS)
    experts_gather(const Words4 *x, const int *order, const int *count, Words4 *out, int top_k, int pieces) {
    const int lane = int(threadIdx.x % WARP);
    const i64 row = i64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    wait_for_previous();
    let_next_start();
    if (row >= *count) {
        return;
    }
    const Words4 *const from = x + i64(order[row] / top_k) * pieces;
    Words4 *const to = out + row * pieces;
    for (int begin = lane; begin < pieces; begin += AT_ONCE * WARP) {
        Words4 words[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i * WARP < pieces) {
                words[i] = load_stream_after(from + begin + i * WARP);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i * WARP < pieces) {
                store_words(to + begin + i * WARP, words[i]);
            }
        }
    }
}
