// A row of values to 8-bit codes, by its largest magnitude: what kernels of rows and of activations share.
#pragma once

#include "common/vectors.cuh"

using i8 = signed char;

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
// Values that a thread reads, and whose codes it writes, at once.
constexpr int GROUP = 8;
// Groups that stay in registers: rows of up to 8192 values are read once.
constexpr int DEPTH = 4;
// The longest row for a warp: it has that many registers.
constexpr int WARP_ROW = WARP * GROUP * DEPTH;

// How the values of a row become codes: round(x * factor / divisor), both operations in float32.
struct Division {
    float factor, divisor;
    float by;  // factor / divisor; NaN where that is no help

    // 127 and the scale. Both are divided by 256 where the product with 127 could be too large for a float32.
    __device__ explicit Division(float scale) {
        const bool large = scale >= 0x1p120f;
        factor = large ? 127.0f / 256 : 127.0f;
        divisor = large ? __fmul_rn(scale, 1.0f / 256) : scale;
        by = scale >= 0x1p-100f && scale < 0x1p100f ? __fdiv_rn(127.0f, scale) : __uint_as_float(0x7fffffffu);
    }

    // From -127 to 127. NaN, and what a row of zeros makes, has code 0.
    __device__ int code(float x) const { return __float2int_rn(__fdiv_rn(__fmul_rn(x, factor), divisor)); }
};

// What a sum with it rounds to a whole number, in the low bits.
constexpr float WHOLE = 0x1.8p23f;
// x times `by` is within 2^-15 of what is rounded: this far from half-way both become the same code.
constexpr float CERTAIN = 0.5f - 0x1p-13f;

// The `count` codes of `x`, at most a group, to `codes`. Those whose bit in `zeros` is set are 0.
template <typename Values>
__device__ inline void store_codes(i8 *codes, const Values &x, u32 count, const Division &division, u32 zeros = 0) {
    u32 code[GROUP];
    bool certain = true;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
        const float near = __fmul_rn(x[k], division.by), up = __fadd_rn(near, WHOLE);
        certain = certain && fabsf(__fsub_rn(near, __fsub_rn(up, WHOLE))) <= CERTAIN;
        code[k] = __float_as_uint(up);
    }
    if (!certain) {
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            code[k] = u32(division.code(x[k]));
        }
    }
    if (zeros != 0) {
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            code[k] = (zeros >> k & 1) != 0 ? 0 : code[k];
        }
    }
    // The low bytes of all.
    u32 half[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 *const four = code + 4 * h;
        half[h] = permute_bytes(permute_bytes(four[0], four[1], 0x0040), permute_bytes(four[2], four[3], 0x0040), 0x5410);
    }
    const u64 word = half[0] | u64(half[1]) << 32;
    if (count == GROUP && is_aligned(codes, GROUP)) {
        *reinterpret_cast<u64 *>(codes) = word;
    } else {
#pragma unroll 1
        for (u32 k = 0; k < count; k++) {
            codes[k] = i8(word >> (8 * k) & 0xff);
        }
    }
}

// The largest of the lanes of a warp, or, unless a warp is `alone` with its row, of a block of threads, by way of a place for
// each warp, which may be used again after the next barrier.
__device__ inline float largest_of_row(float max, float (&warp_max)[WARPS], bool alone) {
    for (int by = 1; by < WARP; by *= 2) {
        max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, by));
    }
    if (!alone) {
        if (threadIdx.x % WARP == 0) {
            warp_max[threadIdx.x / WARP] = max;
        }
        __syncthreads();
        for (int k = 0; k < WARPS; k++) {
            max = fmaxf(max, warp_max[k]);
        }
    }
    return max;
}
