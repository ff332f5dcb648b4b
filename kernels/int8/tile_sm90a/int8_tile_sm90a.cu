// One kernel of int8_tile_sm90a.cuh: INT8_TILE_NAME; INT8_TILE_TOKENS rows of x in a tile.
#include "int8/tile_sm90a/int8_tile_sm90a.cuh"

// w:    [n][k], by boxes of STEP columns and ROWS rows
// x:    [m][k], by boxes of STEP columns and the tile's rows, or half of them when two blocks share them
// panel: with outliers x of the first of their columns, [m][PANEL_COLUMNS] of 16-bit values, by boxes of CHUNK columns and the
//       tile's rows; else any map
// codes: those of w again
// e:    what makes y of the sums
// Grid: `workers` blocks, or clusters of `parts` or `sharing` blocks; Shape::BYTES of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    INT8_TILE_NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x,
                   const __grid_constant__ TensorMap panel, const i8 *codes, const __grid_constant__ Epilogue e, int m, int n,
                   int k, const __grid_constant__ TilePlan plan) {
    int8_tile<INT8_TILE_TOKENS>(&w, &x, &panel, codes, e, m, n, k, plan);
}
