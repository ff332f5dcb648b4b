// The order in which scales are added for their mean: float64 sums by a binary tree inside groups of 256 (x[i] += x[i + 128],
// then 64, ... 1; the last group filled up with zeros), the group sums by the same tree until one is left. As
// rust/core/src/quant/absmax/mod.rs defines it.
#pragma once

#include "common/types.cuh"

constexpr int SUM_GROUP = 256;
// Values of a group that a lane has: lane, lane + 32, ...
constexpr int SUM_PER_LANE = SUM_GROUP / WARP;

// A lane's part of one group of `values`. I: what counts them.
template <typename V, typename I>
__device__ inline void load_group(double (&x)[SUM_PER_LANE], const V *values, I n, I group, int lane) {
#pragma unroll
    for (int k = 0; k < SUM_PER_LANE; k++) {
        const I i = group * SUM_GROUP + k * WARP + lane;
        x[k] = i < n ? double(values[i]) : 0.0;
    }
}

// The tree's sum of a group, in lane 0.
__device__ inline double tree_sum(double (&x)[SUM_PER_LANE]) {
#pragma unroll
    for (int half = SUM_PER_LANE / 2; half > 0; half /= 2) {
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

// One group of `values`, by a warp; the sum in lane 0.
template <typename V, typename I>
__device__ inline double group_sum(const V *values, I n, I group, int lane) {
    double x[SUM_PER_LANE];
    load_group(x, values, n, group, lane);
    return tree_sum(x);
}
