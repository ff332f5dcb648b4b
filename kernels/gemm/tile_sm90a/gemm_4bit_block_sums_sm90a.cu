// gemm_4bit_block_sums_sm90a: y[M][N] = x[M][K] * W[N][K]^T + bias[N] for some 17 to 64 rows of x, W in 4 bits. GEMM_NAME, for elements
// of type GEMM_ELEMENT and tiles of GEMM_TOKENS rows of x: gemm_4bit_tile_sm90a.cuh with another main loop.
//
// Problem. Batches of some requests, speculative decoding. As gemm_4bit_tile_sm90a, but of weights of which a k-tile of a row, 64
//   columns, is within a block: K a multiple of 64, blocks of 64 and more.
//
// Roofline. Bytes as there: 9.2 us for codes and scales of 14336 x 4096 in blocks of 64, on an H200. In microseconds:
//     rows of x                      32     48     64
//     measured                     18.3   20.1   21.6
//     floor / measured             50 %   46 %   43 %
//     cuBLAS, weight in 16 bits    31.9   31.4   33.5
//   Clocks for 128 rows of W by 64 columns, at 128 bytes a clock of shared memory and 25 from the second-level cache:
//     rows of x                      32     48     64
//     matrix units                  128    192    256
//     shared memory                 305    340    375     table 128, codes 32 + 64, x 3 for each row, scales 16
//     instructions, of a quarter    178    197    207     8 warps of 89, 99 and 104, of a multiprocessor's quarters
//     second-level cache            350    430    500     codes and scales 4.5 KB, x 128 bytes for each row
//     what follows from the times   385    435    475
//   With 64 rows the second-level cache is the bound: each multiprocessor fetches all of x for 128 rows of W.
//
// Tile. As in gemm_4bit_tile_sm90a.cuh, with two teams. W goes into the products as it is in the codebook, rounded to 16 bits: the
//   table has 4 bytes for a byte of codes, and a look-up is one permutation and one load for two weights. A scale multiplies the sums
//   of its block, TOKENS / 2 of a thread for each k-tile, in float32; with more tokens than 64 it would cost more than scaling each
//   weight, and registers have no room for two sets of accumulators.
//
// Shared memory, with 32 / 48 / 64 tokens: x 32 / 48 / 64 KB, the table 64 KB of which half is used, codes 32 KB, scales 8 KB: the
//   stages of a round, see rounds.cuh. More codes on the way hold up the first x and scales: with 64 KB 19.3, 20.7 and 22.9 us.
//
// Tried on an H200, 14336 x 4096: the look-ups of the next half of a k-tile while products are made, 19.5 and not 20.1 us with 32
//   rows, but with 64 rows registers do not do; tiles of 16 tokens, 17.7 us, and no faster than gemm_4bit_small_m_sm90 at 4096 x
//   14336 either (18.6).
//
// Parameters, grid and shared memory: those of gemm_4bit_tile_sm90a.cu, but that k is a multiple of 64, and block_shift 6 to 12.
#include "gemm/tile_sm90a/block_sums.cuh"
#include "gemm/tile_sm90a/gemm_4bit_tile_sm90a.cuh"

extern "C" __global__ void __launch_bounds__(Shape<GEMM_TOKENS>::THREADS, 1)
    GEMM_NAME(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap codes,
              const __grid_constant__ Scales scales, const __grid_constant__ Codebook codebook, const GEMM_ELEMENT *bias,
              GEMM_ELEMENT *y, int m, int n, int k, int block_shift, const __grid_constant__ LaunchConfig config,
              const __grid_constant__ Workspace workspace) {
    using S = Shape<GEMM_TOKENS>;
    gemm_4bit_tile_sm90a<GEMM_ELEMENT, S, CodebookOperand<GEMM_ELEMENT, S>>(&x, &codes, scales, codebook, bias, y, m, n, k,
                                                                            block_shift, config, workspace);
}
