// gemv_4bit: y[N] = W[N][K] * x[K], W in 4 bits whose codes stand for values of the caller's: bitsandbytes' C function
// cgemm_4bit_inference_naive_*, which is given a table and no name of one.
//
// Problem. One vector; rows begin `stride` bytes apart, and blocks of scales run on across them. Float32 throughout.
//
// Roofline. Memory: half a byte for each weight. Not in benches/RESULTS.md.
//
// Tile. A warp for each row, eight to a block of threads: a lane takes words of eight codes where alignment allows it, else
//   single codes.
//
// Shared memory. The 16 values of the table.
//
// Determinism. Each lane adds along K in order, then the lanes by a tree: the same bits from run to run.
#include "common/types.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int CODES = 8;  // of a word

template <typename T>
__device__ inline void gemv_4bit(const T *x, const u8 *packed, const float *absmax, const float *table, T *y, i64 rows, i64 k,
                            i64 stride, int block_shift) {
    SHARED_ARRAY(float, values, [16]);
    const int thread = int(threadIdx.x);
    if (thread < 16) {
        values[thread] = table[thread];
    }
    __syncthreads();
    const int lane = thread % WARP;
    const i64 row = i64(blockIdx.x) * WARPS + thread / WARP;
    if (row >= rows) {
        return;
    }
    const u8 *const codes = packed + row * stride;
    const i64 first = row * stride * 2;
    float sum = 0.0f;
    i64 rest = 0;
    if (is_aligned(packed, 4) && stride % 4 == 0) {
        // Words of eight codes, of which none has two scales: blocks begin where words do.
        rest = k - k % CODES;
        for (i64 i = i64(lane) * CODES; i < rest; i += WARP * CODES) {
            const u32 word = *reinterpret_cast<const u32 *>(codes + i / 2);
            float part = 0.0f;
#pragma unroll
            for (int j = 0; j < CODES; j++) {
                const u32 code = word >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0)) & 15;
                part = __fmaf_rn(to_f32(x[i + j]), values[code], part);
            }
            sum = __fmaf_rn(part, absmax[(first + i) >> block_shift], sum);
        }
    }
    for (i64 i = rest + lane; i < k; i += WARP) {
        const u32 byte = codes[i / 2];
        const u32 code = i % 2 == 0 ? byte >> 4 : byte & 15;
        sum = __fmaf_rn(to_f32(x[i]), __fmul_rn(values[code], absmax[(first + i) >> block_shift]), sum);
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        sum += __shfl_down_sync(ALL_LANES, sum, step);
    }
    if (lane == 0) {
        y[row] = from_f32<T>(sum);
    }
}

// x:           [k] aligned to its elements
// packed:      [rows] rows of ceil(k / 2) bytes, any alignment
// absmax:      of the blocks of 2 * stride values a row
// table:       [16], the value of each code
// y:           [rows]
// stride:      bytes from a row to the next
// block_shift: log2 of the block size, 5 to 12
// Grid: ceil(rows / WARPS) blocks of THREADS.
#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        gemv_4bit_##name(const T *x, const u8 *packed, const float *absmax, const float *table, T *y, i64 rows, i64 k, \
                    i64 stride, int block_shift) {                                                                     \
        gemv_4bit<T>(x, packed, absmax, table, y, rows, k, stride, block_shift);                                       \
    }

INSTANCE(bf16, Bf16)
INSTANCE(f16, F16)
INSTANCE(f32, float)
