// experts_gather: out[i] = x[order[i] / top_k], the rows of the tokens sorted by expert, for products by tiles: their columns in
// the order of permute.cuh.
//
// Problem. Rows of whole 128 bytes, aligned to 16.
//
// Roofline. Memory: each row is written once and read back by the product, mostly from the second-level cache.
//
// Tile. A warp copies a row.
#include "experts/gather.cuh"

// x:      [tokens][pieces] of 16 bytes
// order:  [slots], slots sorted by expert, or null: rows stay where they are
// count:  [1]: how many of them have an expert; the rows of others are left as they are
// out:    [slots][pieces]
// Grid: ceil(slots / WARPS) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS)
    experts_gather(const Words4 *x, const int *order, const int *count, Words4 *out, int top_k, int pieces) {
    const i64 row = i64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    wait_for_previous();
    let_next_start();
    if (row < *count) {
        copy_row(out + row * pieces, x + (order == nullptr ? row : i64(order[row] / top_k)) * pieces, pieces);
    }
}
