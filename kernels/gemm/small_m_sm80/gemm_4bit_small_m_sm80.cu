// gemm_4bit_small_m_sm80: the products of small_m.cuh with W by way of registers: each warp loads the bytes of its next tile
// while it uses those of this one.
//
// Problem. Up to 16 rows of x, float16 or bfloat16; K a multiple of 64, blocks of 64 to 4096, plain or nested scales; x aligned
//   to 16 bytes and codes to 8. Compute capability 8.0 and later (mma.m16n8k16 of bfloat16).
//
// Roofline. Memory: N * K / 2 bytes of codes and the scales, once; x by every multiprocessor. benches/RESULTS.md has no times
//   of this kernel, only of gemm_4bit_small_m_sm90 on a card that has both.
//
// Tile. 16 rows of W by 8 or 16 rows of x (1 or 2 fragments) for a group of warps, a k-slice for each of its warps, of which it
//   loads a k-tile at a time: 4 or 8 blocks of each row. Work items of a warp come in passes, in each of these the k-tiles of
//   its k-slice, in each the tiles of its group.
//
// Shared memory. Up to 77 KB, which every card of compute capability 8.0 and later has:
//     table      256 entries x 32 lanes x 4 bytes in rows of 256 bytes, half used                              64 KB
//     map        of nested scales                                                                               1 KB
//     partial    [tiles of a pass][k-slices][m][16] float32 sums
//
// Budget. One block on a multiprocessor: 16 warps of 128 registers for 8 columns, of which 113 to 119 are taken, 8 warps of 255
//   for 16, of which 234 to 240 are. Twice the columns are twice the registers for x and so half the warps, each of which has
//   twice the bytes on the way: 64 or 128 bytes of codes a lane, 32 KB for all warps.
#include "gemm/small_m_sm80/by_registers.cuh"

// x:           [m][k] aligned to 16 bytes; m at most 8 times the number of fragments
// packed:      [n * k / 2] aligned to 8 bytes; k is a multiple of 64
// scales:      of n * k / blocksize blocks
// bias:        [n] or null
// y:           [m][n]
// block_shift: log2 of the block size, 6 to 12
// quant_type:  NF4 or FP4
// Grid: ceil(n / config.rows) blocks of Shape<fragments>::THREADS. Dynamic shared memory, with P = config.per_pass *
// config.k_slices * m * 64 bytes: LANE_TABLE_BYTES + MAP_BYTES + P.
#define INSTANCE(name, T, nested, fragments)                                                                                 \
    extern "C" __global__ void __launch_bounds__(Shape<fragments>::THREADS, 1)                                               \
        gemm_4bit_small_m_sm80_##name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k, \
                                      int block_shift, u32 quant_type, LaunchConfig config) {                                \
        small_m_by_registers<T, TableWeights, nested, fragments>(x, packed, scales, bias, y, m, n, k, block_shift,            \
                                                                 quant_type, config);                                        \
    }

INSTANCE(bf16_8, Bf16, false, 1)
INSTANCE(bf16_16, Bf16, false, 2)
INSTANCE(bf16_8_nested, Bf16, true, 1)
INSTANCE(bf16_16_nested, Bf16, true, 2)
INSTANCE(f16_8, F16, false, 1)
INSTANCE(f16_16, F16, false, 2)
INSTANCE(f16_8_nested, F16, true, 1)
INSTANCE(f16_16_nested, F16, true, 2)
