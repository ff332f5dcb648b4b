// lora_down: h[M][rank] = x[M][columns] * factor[rank][columns]^T, and x in the type of the products besides: the first product of a
// LoRA adapter, and of its gradient. One launch for what are casts of x and of the factor, a product and a sum of its parts.
//
// Problem. M tokens, 64 to some ten thousand; 1024 to 30000 columns; ranks up to 64. x is float32, as the residual stream of a model
//   under autocast, or already of the products' type, bfloat16 or float16; the factor likewise. Sums are float32, h is rounded once.
//   Columns are a multiple of 8; x, its copy and the factor aligned to 16 bytes.
//
// Roofline. Memory: x is read once, and written once where it is cast. 4096 x 3072 in float32 are 75 MB, 18.0 us at 4.2 TB/s; on an
//   H200 it takes 19.9 with 16 ranks and 32.0 with 64, and 62.3 for 8192 columns, of which memory has 47.9 (benches/RESULTS.md). The
//   factor comes from the second-level cache, once for each block: half as many bytes as x with 16 ranks, if both are of one type.
//   With few rows there are few blocks, each of which fetches all of its rows by itself: 10.0 us for 512 rows of 3072.
//
// Tile. A block has ROWS * ROW_TILES rows and all columns, so that no sums leave it. Its 16 warps, or 8 with more than 16 ranks, take
//   steps of 32 columns in turn:
//
//   x: 16 rows, 32 columns a step          lane 4g + t: columns 8t ... 8t + 7 of rows g and g + 8, each in one or two 16-byte loads
//   factor: 8 ranks, the same columns      lane 4g + t: the same columns of rank g
//   mma.m16n8k16, twice for a step: which columns are whose does not matter as long as x and the factor agree, so pairs 0 and 1 of a
//   lane's four are the first product's k, pairs 2 and 3 the second's.
//   The loads of two steps are under way at a time, where registers do.
//
// Shared memory: half of the warps' sums, [8 or 4][ROW_TILES][RANK_TILES][WARP][4] float32, 8 to 32 KB.
//
// Budget. 512 threads of up to 128 registers, or 256 of more; in flight 64 to 256 bytes of x a lane, 32 to 64 KB for a block.
//
// Tried on an H200: a factor that lies the other way round, read element by element: 126 in place of 61 us for 4096 x 8192, so lora_up
//   turns it on the way; types known at run time alone, which keeps loads from being under way together: 26.3 in place of 19.5.
//
// Determinism. The warps' sums are added as a tree, the same from run to run.
#include "lora/factors.cuh"

// Of a block: with more than 16 ranks a thread needs more than 128 registers.
constexpr int THREADS = 512;
constexpr int FEWER_THREADS = 256;
constexpr int STEP = 32;  // columns of a warp at a time
constexpr int ROWS = 16;  // of mma
constexpr int RANKS = 8;

// X: the type of x, F: of the factor.
template <typename T, typename X, typename F, int RANK_TILES, int ROW_TILES>
__device__ inline void lora_down(const X *x, const Factor &factor, T *cast, T *h, i64 m, int columns) {
    constexpr int WARPS = (RANK_TILES > 2 ? FEWER_THREADS : THREADS) / WARP;
    SHARED_ARRAY(Floats4, others, [WARPS / 2][ROW_TILES][RANK_TILES][WARP]);
    // Registers of a step's values.
    constexpr int OF_STEP = ROW_TILES * 4 * int(sizeof(X)) + RANK_TILES * 2 * int(sizeof(F));
    constexpr int TOGETHER = OF_STEP <= (RANK_TILES > 2 ? 64 : 32) ? 2 : 1;
    const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
    const i64 first_row = i64(blockIdx.x) * (ROWS * ROW_TILES);
    // Of a row or a rank that is not there, another is read: what comes of it is not written. A column that is not there is zero.
    const auto row_of = [&](int i, int r) {
        const i64 row = first_row + ROWS * i + g + 8 * r;
        return row < m ? row : m - 1;
    };
    float sums[ROW_TILES][RANK_TILES][4] = {};
    for (int begin = warp * STEP; begin < columns; begin += TOGETHER * WARPS * STEP) {
        Eight<X, true> values[TOGETHER][ROW_TILES][2];
        Eight<F, true> factors[TOGETHER][RANK_TILES];
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            const int column = begin + u * (WARPS * STEP) + 8 * t, read = column < columns ? column : 0;
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    values[u][i][r].load(x + (row_of(i, r) * columns + read));
                }
            }
#pragma unroll
            for (int j = 0; j < RANK_TILES; j++) {
                const int rank = RANKS * j + g, there = rank < factor.rank ? rank : factor.rank - 1;
                factors[u][j].load(static_cast<const F *>(factor.values) + (i64(there) * columns + read));
            }
        }
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            const int column = begin + u * (WARPS * STEP) + 8 * t;
            const bool there = column < columns;
            Words4 a[ROW_TILES][2];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        a[i][r].word[s] = there ? pair_of<T>(values[u][i][r], s) : 0;
                    }
                    const i64 row = first_row + ROWS * i + g + 8 * r;
                    if (sizeof(X) == 4 && there && row < m) {
                        store_words(reinterpret_cast<Words4 *>(cast + (row * columns + column)), a[i][r]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < RANK_TILES; j++) {
                u32 b[4];
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    b[s] = there ? pair_of<T>(factors[u][j], s) : 0;
                }
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
                    for (int s = 0; s < 4; s += 2) {
                        const u32 four[4] = {a[i][0].word[s], a[i][1].word[s], a[i][0].word[s + 1], a[i][1].word[s + 1]};
                        mma_m16n8k16(T{}, sums[i][j], four, b[s], b[s + 1]);
                    }
                }
            }
        }
    }
#pragma unroll 1
    for (int half = WARPS / 2; half > 0; half /= 2) {
        if (warp >= half && warp < 2 * half) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * RANK_TILES; i++) {
                const float(&from)[4] = sums[i / RANK_TILES][i % RANK_TILES];
                others[warp - half][i / RANK_TILES][i % RANK_TILES][lane] = {from[0], from[1], from[2], from[3]};
            }
        }
        __syncthreads();
        if (warp < half) {
#pragma unroll
            for (int i = 0; i < ROW_TILES * RANK_TILES; i++) {
                const Floats4 other = others[warp][i / RANK_TILES][i % RANK_TILES][lane];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    sums[i / RANK_TILES][i % RANK_TILES][k] += other.value[k];
                }
            }
        }
        __syncthreads();
    }
    if (warp > 0) {
        return;
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
        for (int j = 0; j < RANK_TILES; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const i64 row = first_row + ROWS * i + g + k / 2 * 8;
                const int rank = RANKS * j + 2 * t + k % 2;
                if (row < m && rank < factor.rank) {
                    h[row * factor.rank + rank] = from_f32<T>(sums[i][j][k]);
                }
            }
        }
    }
}

// x:       [m][columns]
// factor:  rows of ranks, at most RANKS times the kernel's tiles of ranks
// cast:    [m][columns]: x in the products' type, if it is float32; else not looked at
// h:       [m][rank]
// columns: a multiple of 8
// Grid: ceil(m / (ROWS * tiles of rows)) blocks of THREADS, or FEWER_THREADS.
#define INSTANCE(name, T, X, F, rank_tiles, row_tiles, threads)                                                       \
    extern "C" __global__ void __launch_bounds__(threads, 1)                                                          \
        lora_down_##name##_##rank_tiles##_##row_tiles(const X *x, Factor factor, T *cast, T *h, i64 m, int columns) { \
        lora_down<T, X, F, rank_tiles, row_tiles>(x, factor, cast, h, m, columns);                                    \
    }

#define INSTANCES(name, T, X, F)                 \
    INSTANCE(name, T, X, F, 2, 1, THREADS)       \
    INSTANCE(name, T, X, F, 2, 2, THREADS)       \
    INSTANCE(name, T, X, F, 4, 2, FEWER_THREADS) \
    INSTANCE(name, T, X, F, 8, 2, FEWER_THREADS)

// Named by the types of the products, of x and of the factor.
#define TYPES(name, T)                          \
    INSTANCES(name##_f32_f32, T, float, float)  \
    INSTANCES(name##_f32_##name, T, float, T)   \
    INSTANCES(name##_##name##_f32, T, T, float) \
    INSTANCES(name##_##name##_##name, T, T, T)

TYPES(bf16, Bf16)
TYPES(f16, F16)
