// gemm_4bit_simt: y[M][N] = x[M][K] * W[N][K]^T + bias[N], W in 4 bits, of any shape, alignment, block size and type.
//
// Problem. The definition that faster kernels are measured against, the way for what they do not take, and the way for float32.
//   Every weight is VALUES[code] * scale with one rounding to float32, and not rounded to T.
//
// Roofline. None is aimed at: W is read M times, from the caches as a rule, and a lane takes a code at a time.
//
// Tile. A warp for each element of y, eight to a block of threads: lane l has values l, l + 32, ... of K. Neighbouring warps
//   share a row of W.
//
// Shared memory. The 16 values.
//
// Determinism. Each lane adds along K in order, then the lanes by a tree: the same bits from run to run.
#include "common/scales.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;

template <typename T, bool NESTED>
__device__ inline void gemm_4bit_simt(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, i64 m, i64 n,
                                      i64 k, int block_shift, u32 quant_type) {
    SHARED_ARRAY(float, values, [16]);
    const int thread = int(threadIdx.x);
    if (thread < 16) {
        values[thread] = VALUES[quant_type][thread];
    }
    __syncthreads();
    const int lane = thread % WARP;
    const i64 element = i64(blockIdx.x) * WARPS + thread / WARP;
    if (element >= m * n) {
        return;
    }
    // Neighbouring warps share a row of W.
    const i64 row = element / m, column = element % m;
    const float offset = NESTED ? *scales.offset : 0.0f;
    float sum = 0.0f;
    for (i64 i = lane; i < k; i += WARP) {
        const i64 at = row * k + i;
        const u32 byte = packed[at / 2];
        const u32 code = at % 2 == 0 ? byte >> 4 : byte & 15;
        const float scale = ScaleReader<NESTED>(scales, at >> block_shift)[0].value(DYNAMIC_MAP, offset);
        sum = __fmaf_rn(to_f32(x[column * k + i]), __fmul_rn(values[code], scale), sum);
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        sum += __shfl_down_sync(ALL_LANES, sum, step);
    }
    if (lane == 0) {
        y[column * n + row] = from_f32<T>(bias != nullptr ? sum + to_f32(bias[row]) : sum);
    }
}

// x:           [m][k] aligned to its elements
// packed:      [ceil(n * k / 2)] any alignment
// scales:      of ceil(n * k / blocksize) blocks
// bias:        [n] or null
// y:           [m][n]
// block_shift: log2 of the block size, 5 to 12
// quant_type:  NF4 or FP4
// Grid: ceil(m * n / WARPS) blocks of THREADS.
#define INSTANCE(name, T, nested)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        gemm_4bit_simt_##name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, i64 m, i64 n, i64 k, \
                       int block_shift, u32 quant_type) {                                                            \
        gemm_4bit_simt<T, nested>(x, packed, scales, bias, y, m, n, k, block_shift, quant_type);                     \
    }

INSTANCE(bf16, Bf16, false)
INSTANCE(f16, F16, false)
INSTANCE(f32, float, false)
INSTANCE(bf16_nested, Bf16, true)
INSTANCE(f16_nested, F16, true)
INSTANCE(f32_nested, float, true)
