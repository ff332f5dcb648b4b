// gemm_4bit_tile_sm80: y[M][N] = x[M][K] * W[N][K]^T + bias[N] for more than 32 rows of x, W in 4 bits, by mma.sync.
//
// Problem. The products of prompts and batches on cards without warpgroup products, M from 33 to some hundred: there a dense
//   copy of W is 4 bytes of traffic for a weight of half a byte. float16 or bfloat16; any codebook; K a multiple of 64, any
//   block size, plain or nested scales; x and codes aligned to 16 bytes. Compute capability 8.0 and later.
//
// Roofline. Bytes: N * K / 2 of codes and the scales once, x once for each 128 rows of W, y once. Clocks of a multiprocessor
//   for a k-tile of 128 rows of W by 64 columns, by instructions and the units' rates (counted):
//     rows of x                                                64     128
//     matrix units, cards of 8.0                              512    1024
//     matrix units, cards of 8.6, 8.9 and 12.0         1024-2048  2048-4096
//     permutations of bytes, at half of the issue rate        288     288
//     shared memory: x, W and codes, in and out               770    1090
//     instructions issued                                     620     750
//   Measured on an H200 alone, which has faster kernels: 14336 x 4096, bfloat16, blocks of 64, in microseconds, in one run:
//     rows of x                                64    128    1024
//     measured                               54.4   74.9   518.8
//     without dequantizing                   36.0   52.5   354.9
//     cuBLAS, weight in 16 bits              33.3   33.9   153.0
//
// Tile. W is the operand of 16 rows and x that of 8 columns of mma.m16n8k16.
//
//   block of 8 warps: 128 rows of W x TOKENS rows of x      with 64 tokens: warp w has rows 16 w ... 16 w + 15, all tokens
//     k-tiles of 64 columns                                  with 128: warp w has rows 32 (w % 4) ..., 64 tokens of half w / 4
//
//   Each weight is dequantized once in a block, a k-tile before it is multiplied: a thread has 32 columns of a row, the sixteen
//   values of their block as two planes of bytes in registers, and takes four of these at a time by permutations. W [128][64]
//   goes to shared memory, from where ldmatrix has it for all warps.
//
// Shared memory, 82 or 95 KB, which every card of compute capability 8.0 and later has:
//     stages     4 or 3 of x [TOKENS][128 bytes] and codes [128][32 bytes], by cp.async; codes are a k-tile ahead
//     W          of this k-tile and of the next, [2][128][128 bytes]                                          32 KB
//     map        of nested scales                                                                              1 KB
//   In the epilogue y takes the place of the stages.
//
// Budget. 256 threads and one block on a multiprocessor, __launch_bounds__(256, 1), up to 200 registers: 32 or 64 accumulators,
//   A and B of a k-step, 8 of planes. Warps 0 to 3 dequantize before they multiply, the others after: so the two of a quarter
//   of the multiprocessor want different units.
//
// Tried, on an H200, and slower, microseconds for 64, 128 and 1024 rows:
//   - Each warp dequantizes what it multiplies, into registers, unscaled, and scales sums: 51.6, 81.1, 561.8. Scaled, by planes
//     in shared memory: 55.3, 82.4, 567.4.
//   - All warps dequantize before they multiply: 61.9, 76.7, 564.5.
//
// Division. Where there are few tiles, some blocks share one, a part of K each (split-K): all but the last leave their sums in
//   memory, the last adds them in their order. It waits for blocks alone that started before it.
//
// Determinism. The order of sums depends on the shape and the number of multiprocessors alone: the same bits from run to run.
#include "gemm/tile_sm80/products.cuh"

template <typename T, int TOKENS>
__device__ inline void gemm_4bit_tile_sm80(const T *x, const u8 *packed, const Scales &scales, const Codebook &codebook,
                                           const T *bias, T *y, int m, int n, int k, int block_shift, const LaunchConfig &config,
                                           const Workspace &workspace) {
    using S = Shape<TOKENS>;
    DYNAMIC_SHARED(shared);
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, g = lane / 4, t = lane % 4;
    const int first_row = warp % S::ROW_WARPS * (16 * S::ROW_FRAGMENTS), first_token = warp / S::ROW_WARPS * WARP_TOKENS;
    const Tile tile(TOKENS, k, config);

    // Group j of copies: x of k-tile j and the codes of k-tile j + 1, which go to the stages of these numbers.
    Copier<TOKENS> copier(x, packed, m, n, k, tile);
    const auto stage_of = [&](int i) { return shared + i % S::STAGES * S::STAGE_BYTES; };
    const auto copy_group = [&](int j) {
        if (j < tile.count) {
            copier.copy_x(stage_of(j));
        }
        if (j + 1 < tile.count) {
            copier.copy_codes(stage_of(j + 1));
        }
        copy_async_commit();
    };
    copier.copy_codes(stage_of(0));
    copy_async_commit();
#pragma unroll
    for (int j = 0; j < S::STAGES - 1; j++) {
        copy_group(j);
    }

    Dequantizer dequantizer(scales, reinterpret_cast<float *>(shared + S::MAP_AT), tile, n, k, block_shift);
    const auto load_scale = [&](int i) { dequantizer.load_scale(tile.first + (i < tile.count ? i : tile.count - 1)); };
    const auto w_of = [&](int i) { return shared + S::W_AT + i % 2 * W_BYTES; };
    load_scale(0);
    copy_async_wait<S::STAGES - 1>();
    __syncthreads();
    dequantizer.template dequantize<T>(codebook, stage_of(0) + S::CODES_AT, w_of(0));
    load_scale(1);

    float sums[S::ROW_FRAGMENTS][S::TOKEN_FRAGMENTS][4] = {};
    const auto dequantize_next = [&](int i) {
        dequantizer.template dequantize<T>(codebook, stage_of(i + 1) + S::CODES_AT, w_of(i + 1));
        load_scale(i + 2);
    };
    const auto multiply = [&](int i) { add_k_tile<T, TOKENS>(sums, w_of(i), stage_of(i), first_row, first_token, lane); };
    for (int i = 0; i < tile.count - 1; i++) {
        // W and x of this k-tile and the codes of the next are there, and nobody reads those of the one before any more.
        copy_async_wait<S::STAGES - 2>();
        __syncthreads();
        copy_group(i + S::STAGES - 1);
        // Of the two warps that share a quarter of the multiprocessor one multiplies while the other dequantizes.
        if (warp < WARPS / 2) {
            dequantize_next(i);
            multiply(i);
        } else {
            multiply(i);
            dequantize_next(i);
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    multiply(tile.count - 1);

    float(&all)[S::ACCUMULATORS] = reinterpret_cast<float(&)[S::ACCUMULATORS]>(sums);
    if (tile.part < config.split_k - 1) {
        leave_sums<THREADS>(all, workspace, tile, config.split_k);
        return;
    }
    collect_sums<THREADS>(all, workspace, tile, config.split_k);
    // Nobody reads the stages any more, and no copy is on the way.
    __syncthreads();
    write_tile<T, S>(sums, shared, bias, y, m, n, tile, first_row, first_token, g, t);
}

// x:           [m][k] aligned to 16 bytes
// packed:      [n * k / 2] aligned to 16 bytes; k is a multiple of 64
// scales:      of n * k / blocksize blocks; `absmax` is null when they are nested
// codebook:    what the codes stand for
// bias:        [n] or null
// y:           [m][n]
// block_shift: log2 of the block size, 5 to 12
// workspace:   where split_k is more than 1, else null
// Grid: `split_k` blocks for each tile; blocks of THREADS; Shape::BYTES of dynamic shared memory.
#define INSTANCE(name, T, tokens)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_4bit_tile_sm80_##name(                                     \
        const T *x, const u8 *packed, Scales scales, const __grid_constant__ Codebook codebook, const T *bias, T *y, int m,  \
        int n, int k, int block_shift, LaunchConfig config, Workspace workspace) {                                           \
        gemm_4bit_tile_sm80<T, tokens>(x, packed, scales, codebook, bias, y, m, n, k, block_shift, config, workspace);       \
    }

INSTANCE(bf16_64, Bf16, 64)
INSTANCE(bf16_128, Bf16, 128)
INSTANCE(f16_64, F16, 64)
INSTANCE(f16_128, F16, 128)
