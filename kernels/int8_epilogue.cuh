// placeholder until the branches meet
#pragma once
#include "common.cuh"
struct Epilogue {
    const float *row_scales, *column_scales;
    const void *bias;
    void *y;
    const int *count, *columns;
    const void *x;
    u32 kind, bias_kind;
};
__device__ inline float load_as(const void *from, u32 kind, i64 i) {
    return kind == 0   ? to_f32(static_cast<const Bf16 *>(from)[i])
           : kind == 1 ? to_f32(static_cast<const F16 *>(from)[i])
                       : static_cast<const float *>(from)[i];
}
