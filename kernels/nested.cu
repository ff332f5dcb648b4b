// Float32 scales to 8-bit codes, as rust/nested.rs defines them: offset = mean, then scale - offset in blocks of 256 with
// the dynamic map.
//
// The mean has a fixed order: float64 sums by a binary tree inside groups of 256 (x[i] += x[i + 128], then 64, ... 1), the
// group sums by the same tree until one is left. Two launches: `sums` writes one float64 for each group; in `compress` every
// block of threads adds those up for itself, which spares a third launch, and then quantizes one group with each warp. It
// takes 256 * 256 sums at most: `sums_of_sums` makes fewer of more.
#include "tables.cuh"

constexpr int GROUP = 256;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
// Values of a group that a lane has: lane, lane + 32, ...
constexpr int PER_LANE = GROUP / WARP;
// The tree's sum of a group, in lane 0; lane l has x[l], x[l + 32], ...
__device__ inline double tree_sum(double (&x)[PER_LANE]) {
#pragma unroll
    for (int half = PER_LANE / 2; half > 0; half /= 2) {
#pragma unroll
        for (int k = 0; k < half; k++) {
            x[k] = x[k] + x[k + half];
        }
    }
    double sum = x[0];
#pragma unroll
    for (int half = WARP / 2; half > 0; half /= 2) {
        sum = sum + __shfl_down_sync(ALL_LANES, sum, half);
    }
    return sum;
}

// One group of `values`, by a warp; zeros behind the last.
template <typename V>
__device__ inline double group_sum(const V *values, i64 n, i64 group, int lane) {
    double x[PER_LANE];
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const i64 i = group * GROUP + k * WARP + lane;
        x[k] = i < n ? double(values[i]) : 0.0;
    }
    return tree_sum(x);
}

template <typename V>
__device__ inline void write_sums(const V *values, double *sums, i64 n) {
    const i64 group = i64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    const int lane = int(threadIdx.x) % WARP;
    if (group * GROUP < n) {
        const double sum = group_sum(values, n, group, lane);
        if (lane == 0) {
            sums[group] = sum;
        }
    }
}

// values: [n]   sums: [ceil(n / 256)]   Grid: ceil(n / (256 * WARPS)) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) nested_sums(const float *values, double *sums, i64 n) {
    write_sums(values, sums, n);
}
extern "C" __global__ void __launch_bounds__(THREADS) nested_sums_of_sums(const double *values, double *sums, i64 n) {
    write_sums(values, sums, n);
}

// The code of a scaled value is the number of boundaries that it exceeds. A value midway between two of the map has the
// even of the two codes: above an odd one the boundary is the next float32 below the middle, unless that is the value.
__device__ inline float boundary(int code) {
    if (code == GROUP - 1) {
        return __uint_as_float(0x7f800000u);
    }
    const float value = DYNAMIC_MAP[code];
    const float middle = __fmul_rn(__fadd_rn(value, DYNAMIC_MAP[code + 1]), 0.5f);
    if (code % 2 == 0 || !(middle > value)) {
        return middle;
    }
    // No middle of two values of the map is zero.
    const u32 bits = __float_as_uint(middle);
    return __uint_as_float(middle > 0.0f ? bits - 1 : bits + 1);
}

// absmax:    [n] float32
// sums:      [sum_count] of groups of absmax, or of groups of sums, ...; at most 256 * 256
// codes:     [n]
// absmax2:   [ceil(n / 256)]
// offset:    [1]
// Grid: ceil(n / (256 * WARPS)) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS)
    nested_compress(const float *absmax, const double *sums, i64 sum_count, u8 *codes, float *absmax2, float *offset, i64 n) {
    SHARED_ARRAY(float, boundaries, [GROUP]);
    SHARED_ARRAY(double, second_sums, [GROUP]);
    SHARED_ARRAY(float, mean, [1]);

    const int thread = int(threadIdx.x);
    const int lane = thread % WARP, warp = thread / WARP;
    const i64 group = i64(blockIdx.x) * WARPS + warp;
    float x[PER_LANE];
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const i64 i = group * GROUP + k * WARP + lane;
        x[k] = i < n ? absmax[i] : 0.0f;
    }

    boundaries[thread] = boundary(thread);
    const int second_count = int((sum_count + GROUP - 1) / GROUP);
    for (int s = warp; s < second_count; s += WARPS) {
        const double sum = group_sum(sums, sum_count, s, lane);
        if (lane == 0) {
            second_sums[s] = sum;
        }
    }
    __syncthreads();
    if (warp == 0) {
        // One sum is its own tree: adding zeros changes nothing.
        const double total = group_sum(&second_sums[0], second_count, 0, lane);
        if (lane == 0) {
            mean[0] = float(total / double(n));
            if (blockIdx.x == 0) {
                *offset = mean[0];
            }
        }
    }
    __syncthreads();
    if (group * GROUP >= n) {
        return;
    }

    const float centre = mean[0];
    float max = 0.0f;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const bool there = group * GROUP + k * WARP + lane < n;
        x[k] = there ? __fsub_rn(x[k], centre) : 0.0f;
        max = fmaxf(max, fabsf(x[k]));  // passes NaN over
    }
    for (int step = 1; step < WARP; step *= 2) {
        max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, step));
    }
    if (lane == 0) {
        absmax2[group] = max;
    }
    const float inverse = __frcp_rn(max);
    u32 code[PER_LANE];
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        x[k] = __fmul_rn(x[k], inverse);
        code[k] = 0;
    }
    // Halvings of eight values in turn. `code` is a multiple of 2 * step: this is the boundary before code + step.
#pragma unroll
    for (u32 step = GROUP / 2; step > 0; step /= 2) {
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            code[k] |= x[k] > boundaries[code[k] | (step - 1)] ? step : 0;
        }
    }
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const i64 i = group * GROUP + k * WARP + lane;
        if (i < n) {
            codes[i] = u8(code[k]);
        }
    }
}
