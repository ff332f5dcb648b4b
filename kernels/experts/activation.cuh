// What becomes of the products of an expert's first matrices before its last one.
#pragma once

#include "common/types.cuh"

// Of float32 values, `gate` with a bias already added; without a gate `up` is 1 and takes no part.
constexpr u32 ACTIVATION_NONE = 0;
constexpr u32 ACTIVATION_SILU = 1;
constexpr u32 ACTIVATION_GELU = 2;
constexpr u32 ACTIVATION_GELU_TANH = 3;
constexpr u32 ACTIVATION_RELU2 = 4;
constexpr u32 ACTIVATION_CLAMPED_SWIGLU = 5;  // gpt-oss's

__device__ inline float activated(u32 activation, float gate, float up) {
    switch (activation) {
        case ACTIVATION_SILU:
            return gate / (1.0f + expf(-gate)) * up;
        case ACTIVATION_GELU:
            return 0.5f * gate * (1.0f + erff(gate * 0.70710678f)) * up;
        case ACTIVATION_GELU_TANH:
            return 0.5f * gate * (1.0f + tanhf(0.7978845608f * (gate + 0.044715f * gate * gate * gate))) * up;
        case ACTIVATION_RELU2: {
            const float positive = gate < 0.0f ? 0.0f : gate;
            return positive * positive * up;
        }
        case ACTIVATION_CLAMPED_SWIGLU: {
            const float most = gate > 7.0f ? 7.0f : gate;
            const float inside = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
            return most / (1.0f + expf(-1.702f * most)) * (inside + 1.0f);
        }
        default:
            return gate;
    }
}
