// One kernel of gemm_4bit_tile_sm90a.cuh: GEMM_NAME, for elements of type GEMM_ELEMENT and tiles of GEMM_TOKENS rows of x.
#include "gemm/tile_sm90a/gemm_4bit_tile_sm90a.cuh"

// x:           [m][k], by boxes of K_TILE columns and TOKENS rows, 128-byte swizzle
// codes:       [n][k / 2] bytes, by boxes of CODES_ROW_BYTES columns and ROWS rows, 64-byte swizzle; two codes to a byte, the
//              earlier in the high nibble
// scales:      of n * k / blocksize blocks; `absmax` is null when they are nested
// codebook:    what the codes stand for
// bias:        [n], or null
// y:           [m][n]
// k:           a multiple of 32
// block_shift: log2 of the block size, 5 to 12
// workspace:   what LaunchConfig::ranges wants, else null
// Grid: `split_k` blocks for each tile, a cluster when that is more than one, or `ranges`; blocks of Shape::THREADS;
// Shape::BYTES of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(Shape<GEMM_TOKENS>::THREADS, 1)
    GEMM_NAME(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap codes,
              const __grid_constant__ Scales scales, const __grid_constant__ Codebook codebook, const GEMM_ELEMENT *bias,
              GEMM_ELEMENT *y, int m, int n, int k, int block_shift, const __grid_constant__ LaunchConfig config,
              const __grid_constant__ Workspace workspace) {
    gemm_4bit_tile_sm90a<GEMM_ELEMENT, Shape<GEMM_TOKENS>>(&x, &codes, scales, codebook, bias, y, m, n, k, block_shift, config,
                                                            workspace);
}
