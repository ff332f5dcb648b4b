// int8_plain: y[M][N] = x[M][K] * W[N][K]^T in int8 codes, and then what Epilogue makes of the int32 sums.
//
// Problem. Any shape, wherever it lies: what no other kernel takes.
//
// Tile. 32 rows of W and of x for a block of 256 threads, 64 columns at a time by way of shared memory; a thread has four sums.
//
// Determinism. The same bits from run to run; without outliers those of every other kernel and of the processor.
#include "int8/int8_epilogue.cuh"

constexpr int THREADS = 256;
// Rows of W, and of x, that a block of threads has; a thread has 2 x 2 of their products, some way apart.
constexpr int TILE = 32;
constexpr int APART = 16;
// Columns at a time, as words of four, and one more to spread rows over banks.
constexpr int STEP = 64;
constexpr int WORDS = STEP / 4;

// Columns `begin` to `begin + STEP` of rows `first` to `first + TILE`, zeros where there is nothing.
__device__ inline void load_tile(u32 (&tile)[TILE][WORDS + 1], const u8 *from, i64 first, i64 rows, i64 begin, i64 columns,
                                 i64 pitch) {
    for (int item = int(threadIdx.x); item < TILE * WORDS; item += THREADS) {
        const i64 row = first + item / WORDS, column = begin + item % WORDS * 4;
        u32 word = 0;
        for (int j = 0; j < 4; j++) {
            word |= row < rows && column + j < columns ? u32(from[row * pitch + column + j]) << (8 * j) : 0;
        }
        tile[item / WORDS][item % WORDS] = word;
    }
}

// x:      [m][pitch] int8
// weight: [n][k] int8
// Grid: ceil(n / TILE) * ceil(m / TILE) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS)
    int8_plain(const u8 *x, i64 pitch, const u8 *weight, Epilogue epilogue, i64 m, i64 n, i64 k) {
    SHARED_ARRAY(u32, w_tile, [TILE][WORDS + 1]);
    SHARED_ARRAY(u32, x_tile, [TILE][WORDS + 1]);
    const i64 across = (n + TILE - 1) / TILE;
    const i64 first_column = i64(blockIdx.x) % across * TILE, first_row = i64(blockIdx.x) / across * TILE;
    const int column = int(threadIdx.x) % APART, row = int(threadIdx.x) / APART;
    int sums[2][2] = {};
    for (i64 begin = 0; begin < k; begin += STEP) {
        load_tile(w_tile, weight, first_column, n, begin, k, k);
        load_tile(x_tile, x, first_row, m, begin, k, pitch);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    sums[r][c] = dot_4(x_tile[row + r * APART][i], w_tile[column + c * APART][i], sums[r][c]);
                }
            }
        }
        __syncthreads();
    }
    const int count = epilogue.count == nullptr ? 0 : *epilogue.count;
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const i64 of_x = first_row + row + r * APART, of_w = first_column + column + c * APART;
            if (of_x < m && of_w < n) {
                float outlier_sum = 0.0f;
                for (int i = 0; i < count; i++) {
                    const int which = epilogue.columns[i];
                    const float w = __int2float_rn(i8(weight[of_w * k + which]));
                    outlier_sum = __fmaf_rn(load_as(epilogue.x, epilogue.kind, of_x * k + which), w, outlier_sum);
                }
                const float v = epilogue.value(sums[r][c], epilogue.row_scale(of_x), count > 0, outlier_sum,
                                               epilogue.column_scale(int(of_w)), epilogue.shift(int(of_w)));
                epilogue.store(of_x * n + of_w, sums[r][c], v);
            }
        }
    }
}
