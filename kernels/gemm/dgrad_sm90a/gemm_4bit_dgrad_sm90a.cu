// One kernel of gemm_4bit_dgrad_sm90a.cuh: DGRAD_NAME, for elements of type DGRAD_ELEMENT and tiles of DGRAD_TOKENS rows of dy.
#include "gemm/dgrad_sm90a/gemm_4bit_dgrad_sm90a.cuh"

// dy:          [m][n], by boxes of K_TILE columns and TOKENS rows, 128-byte swizzle
// codes:       [n][k / 2] bytes, by boxes of CODES_ROW_BYTES columns and ROWS rows, 64-byte swizzle; two codes to a byte, the
//              earlier in the high nibble
// scales:      of n * k / blocksize blocks; `absmax` is null when they are nested
// codebook:    what the codes stand for
// dx:          [m][k]
// n:           a multiple of 8, k of 32
// block_shift: log2 of the block size, 5 to 12
// workspace:   what LaunchConfig::ranges wants, else null
// Grid: `split_k` blocks for each tile, a cluster when that is more than one, or `ranges`; blocks of ColumnsShape::THREADS;
// ColumnsShape::BYTES of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(ColumnsShape<DGRAD_TOKENS>::THREADS, 1)
    DGRAD_NAME(const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap codes,
               const __grid_constant__ Scales scales, const __grid_constant__ Codebook codebook, DGRAD_ELEMENT *dx, int m, int n,
               int k, int block_shift, const __grid_constant__ LaunchConfig config, const __grid_constant__ Workspace workspace) {
    gemm_4bit_dgrad_sm90a<DGRAD_ELEMENT, DGRAD_TOKENS>(&dy, &codes, scales, codebook, dx, m, n, k, block_shift, config,
                                                       workspace);
}
