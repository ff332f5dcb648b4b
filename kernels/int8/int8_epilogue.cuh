// What becomes of the int32 sums of an 8-bit product, as the other kernels and the processor have it: see `Epilogue::value`.
#pragma once

#include "common/types.cuh"

using i8 = signed char;

// Types of elements that are known when the kernel runs: one image serves all of them.
enum Kind : u32 { KIND_BF16, KIND_F16, KIND_F32, KIND_I32 };

// Element i of floats of a kind.
__device__ inline float load_as(const void *from, u32 kind, i64 i) {
    switch (kind) {
        case KIND_BF16: return to_f32(static_cast<const Bf16 *>(from)[i]);
        case KIND_F16: return to_f32(static_cast<const F16 *>(from)[i]);
        default: return static_cast<const float *>(from)[i];
    }
}

struct Epilogue {
    const float *row_scales;     // [m], of x
    const float *column_scales;  // [n], of W
    const void *bias;            // [n] or null
    void *y;                     // [m][n]
    // Columns of x with outliers, ascending, and how many there are; all null without. Their codes in x are 0.
    const int *count;
    const int *columns;
    const void *x;  // [m][k], of y's kind
    // The columns as a mask of int8/outliers.cuh, and x of the first of them, [m][PANEL_COLUMNS]; null unless codes of x mean
    // nothing there.
    const u32 *mask;
    const void *panel;
    u32 kind, bias_kind;

    // y from the sum of products of codes and that of the outlier columns, in the order that everybody has.
    __device__ float value(int sum, float row_scale, bool outliers, float outlier_sum, float column_scale, float shift) const {
        float v = __fmul_rn(__int2float_rn(sum), __fmul_rn(row_scale, 1.0f / 127));
        if (outliers) {
            v = __fadd_rn(v, outlier_sum);
        }
        v = __fmul_rn(v, __fmul_rn(column_scale, 1.0f / 127));
        return bias == nullptr ? v : __fadd_rn(v, shift);
    }
    __device__ float column_scale(int column) const { return kind == KIND_I32 ? 0.0f : column_scales[column]; }
    __device__ float row_scale(i64 row) const { return kind == KIND_I32 ? 0.0f : row_scales[row]; }
    __device__ float shift(int column) const { return bias == nullptr ? 0.0f : load_as(bias, bias_kind, column); }

    // Writes element i of y; `sum` alone where that is what y is to be.
    __device__ void store(i64 i, int sum, float v) const {
        switch (kind) {
            case KIND_BF16: static_cast<Bf16 *>(y)[i] = from_f32<Bf16>(v); break;
            case KIND_F16: static_cast<F16 *>(y)[i] = from_f32<F16>(v); break;
            case KIND_F32: static_cast<float *>(y)[i] = v; break;
            default: static_cast<int *>(y)[i] = sum;
        }
    }
};
