// gemm_4bit_small_m_sm75: the products of gemm_4bit_small_m_sm80 on compute capability 7.5, in float16.
//
// Problem. Up to 16 rows of x, float16, the only 16-bit type of the matrix units of 7.5; K a multiple of 64, blocks of 64 to
//   4096, plain or nested scales; x aligned to 16 bytes and codes to 8. Compute capability 7.5 and later.
//
// Roofline. Memory: N * K / 2 bytes of codes and the scales, once; x by every multiprocessor. Clocks of a multiprocessor of a T4
//   (40 at 1.59 GHz, 320 GB/s) for a tile of 16 rows of W by 64 columns, counted, not measured:
//     rows of x                                  8      16
//     memory, 5 bytes a clock                  115     115
//     permutations of bytes and the like        46      46
//     matrix units                              16      32      (RTX 20: 32 and 64)
//   14336 x 4096, blocks of 64: 33 MB, 103 microseconds. A dense copy moves 4 bytes more for each weight: 825.
//
// Tile. That of gemm_4bit_small_m_sm80, but without a table, which would take all 64 KB of shared memory. The sixteen values are
//   two planes of bytes in registers (common/planes.cuh), and four weights take 11.5 operations of the integer units. A product
//   of depth 16 is two of depth 8.
//
// Shared memory. Up to 64 KB, all that there is:
//     map        of nested scales                                                                               1 KB
//     partial    [tiles of a pass][k-slices][m][16] float32 sums
//
// Budget. As gemm_4bit_small_m_sm80, one block on a multiprocessor: 16 warps of 128 registers for 8 columns, of which 114 or 116
//   are taken, 8 warps of 255 for 16, of which 239 or 241 are. The 32 KB on the way are several times what the latency of the
//   memory wants.
#include "gemm/small_m_sm80/by_registers.cuh"

// Parameters and grid are those of gemm_4bit_small_m_sm80. Dynamic shared memory: MAP_BYTES + config.per_pass * config.k_slices *
// m * 64 bytes.
#define INSTANCE(name, nested, fragments)                                                                                      \
    extern "C" __global__ void __launch_bounds__(Shape<fragments>::THREADS, 1)                                                 \
        gemm_4bit_small_m_sm75_##name(const F16 *x, const u8 *packed, Scales scales, const F16 *bias, F16 *y, int m, int n,    \
                                      int k, int block_shift, u32 quant_type, LaunchConfig config) {                           \
        small_m_by_registers<F16, PlanesWeights, nested, fragments>(x, packed, scales, bias, y, m, n, k, block_shift,          \
                                                                    quant_type, config);                                       \
    }

INSTANCE(f16_8, false, 1)
INSTANCE(f16_16, false, 2)
INSTANCE(f16_8_nested, true, 1)
INSTANCE(f16_16_nested, true, 2)
