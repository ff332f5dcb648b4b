// gemm_4bit_tile_sm75: y[M][N] = x[M][K] * W[N][K]^T + bias[N] for more than 16 rows of x, W in 4 bits, by mma.sync of Turing.
//
// Problem. The products of prompts and batches in float16, M from 17 to some hundred: there a dense copy of W is 4 bytes of
//   traffic for a weight of half a byte. Any codebook; K a multiple of 64, at most 2^24, blocks of 64 to 4096, plain or nested
//   scales; x aligned to 16 bytes and codes to 8. Compute capability 7.5 and later.
//
// Roofline. Bytes: N * K / 2 of codes and the scales once, x once for each 128 rows of W, y once. Clocks of a multiprocessor for
//   a k-tile of 128 rows of W by 64 columns, by instructions and the units' rates, counted, not measured:
//     rows of x                                                32      64
//     matrix units, T4                                        512    1024
//     matrix units, RTX 20, half as fast with float32 sums   1024    2048
//     permutations of bytes and the like, integer units       370     370
//     shared memory, 64 bytes a clock                         320     640
//     instructions issued                                     340     460
//     memory of a T4, 5 bytes a clock                         920     920
//   14336 x 4096, blocks of 64, on a T4 (40 multiprocessors at 1.59 GHz, 320 GB/s), in microseconds, counted:
//     rows of x                                                32      64     128     192
//     all units in parallel                                   103     115     231     346
//     one unit after another, memory in parallel              135     229     458     687
//     a dense copy of W, and a product that reads it          825     825     825     825
//   192 rows are the most that come here: that many are faster even if no two units overlap (on an RTX 2080 Ti 626 against 657).
//   17 are the fewest: gemm_4bit_small_m_sm75 would read W twice for them.
//
// Tile. W is the operand of 16 rows and x that of 8 columns of mma.m16n8k8, two of which make one of depth 16.
//
//   block of 4 warps: 128 rows of W x 32 or 64 rows of x: warp w has rows 32 w ... 32 w + 31, all rows of x
//     k-tiles of 64 columns
//
//   Each warp dequantizes what it multiplies, into registers, unscaled, by permutations of bytes; the scale is applied in
//   float32 to the sums of a k-tile. K is permuted as in small_m.cuh: a lane takes 8 bytes of a row of W, and 32 of a row of x.
//   gemm_4bit_tile_sm80 has W in shared memory: for 64 rows that would be 88 KB in and out and more, where these are 40, at half
//   of the rate of later cards.
//
// Shared memory, 10 or 18 KB a block:
//     stages     2 of x [TOKENS][128 bytes], of which one is written, by way of registers, while the other is read
//     map        of nested scales                                                                              1 KB
//   In the epilogue y takes the place of the stages.
//
// Budget. 128 threads. 64 rows: two blocks on a multiprocessor, 255 registers, of which 248 or 250 are taken: 64 accumulators,
//   32 of W, 8 of planes, 8 of codes and 8 of x on the way. 32 rows: three blocks, 168 registers, of which 160 or 162 are taken.
//   Each quarter of a multiprocessor has a warp of each block. Blocks do not wait for each other, so one dequantizes while
//   another multiplies. 4 KB of codes are on the way for a block; the latency of the memory wants some 3.5 KB a multiprocessor.
//
// Division. As gemm_4bit_tile_sm80: where there are few tiles, some blocks share one, a part of K each, by way of memory.
//
// Determinism. The order of sums depends on the shape and the number of multiprocessors alone: the same bits from run to run.
#include "gemm/tile_sm75/products.cuh"

template <int TOKENS, bool NESTED>
__device__ inline void gemm_4bit_tile_sm75(const F16 *x, const u8 *packed, const Scales &scales, const Codebook &codebook,
                                           const F16 *bias, F16 *y, int m, int n, int k, int block_shift,
                                           const LaunchConfig &config, const Workspace &workspace) {
    using S = Shape<TOKENS>;
    DYNAMIC_SHARED(shared);
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, g = lane / 4, t = lane % 4;
    const int first_row = warp * WARP_ROWS;
    const Tile tile(TOKENS, k, config);

    XLoader<TOKENS> x_loader(x, m, k, tile);
    WLoader<NESTED> w_loader(packed, scales, tile, first_row, n, k, block_shift, g, t);
    w_loader.load(tile.first);
    x_loader.load(0);
    float *const map = reinterpret_cast<float *>(shared + S::MAP_AT);
    const float offset = NESTED ? *scales.offset : 0.0f;
    if (NESTED) {
        for (int code = int(threadIdx.x); code < 256; code += THREADS) {
            map[code] = DYNAMIC_MAP[code];
        }
    }
    const Planes planes = scaled_planes<F16>(codebook, 1.0f);
    x_loader.store(shared, 0);
    x_loader.load(1);
    x_loader.store(shared, 1);

    float sums[S::ROW_FRAGMENTS][S::TOKEN_FRAGMENTS][4] = {};
    for (int i = 0; i < tile.count; i++) {
        const bool is_last = i + 1 == tile.count;
        // x of this k-tile is there, and nobody reads that of the one before any more.
        __syncthreads();
        const float own_scale = w_loader.scale.value(map, offset);
        float row_scales[LANE_ROWS];
#pragma unroll
        for (int j = 0; j < LANE_ROWS; j++) {
            row_scales[j] = __shfl_sync(ALL_LANES, own_scale, (lane & ~3) + j);
        }
        const Weights<S::ROW_FRAGMENTS> weights(planes, w_loader.codes);
        if (!is_last) {
            w_loader.load(tile.first + i + 1);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (!is_last) {
                x_loader.load(half);
            }
            add_k_tile<TOKENS>(sums, weights, row_scales, shared + i % STAGES * S::STAGE_BYTES, half, g, t);
            if (!is_last) {
                x_loader.store(shared + (i + 1) % STAGES * S::STAGE_BYTES, half);
            }
        }
    }

    float(&all)[S::ACCUMULATORS] = reinterpret_cast<float(&)[S::ACCUMULATORS]>(sums);
    if (tile.part < config.split_k - 1) {
        leave_sums<THREADS>(all, workspace, tile, config.split_k);
        return;
    }
    collect_sums<THREADS>(all, workspace, tile, config.split_k);
    // Nobody reads the stages any more.
    __syncthreads();
    write_tile<F16, S>(sums, shared, bias, y, m, n, tile, first_row, 0, g, t);
}

// x:           [m][k] aligned to 16 bytes
// packed:      [n * k / 2] aligned to 8 bytes; k is a multiple of 64
// scales:      of n * k / blocksize blocks; `absmax` is null when they are nested
// codebook:    what the codes stand for
// bias:        [n] or null
// y:           [m][n]
// block_shift: log2 of the block size, 6 to 12
// workspace:   where split_k is more than 1, else null
// Grid: `split_k` blocks for each tile; blocks of THREADS; Shape::BYTES of dynamic shared memory.
#define INSTANCE(name, tokens, nested)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, Shape<tokens>::BLOCKS) gemm_4bit_tile_sm75_##name(                  \
        const F16 *x, const u8 *packed, Scales scales, const __grid_constant__ Codebook codebook, const F16 *bias, F16 *y,    \
        int m, int n, int k, int block_shift, LaunchConfig config, Workspace workspace) {                                     \
        gemm_4bit_tile_sm75<tokens, nested>(x, packed, scales, codebook, bias, y, m, n, k, block_shift, config, workspace);   \
    }

INSTANCE(f16_32, 32, false)
INSTANCE(f16_64, 64, false)
INSTANCE(f16_32_nested, 32, true)
INSTANCE(f16_64_nested, 64, true)
