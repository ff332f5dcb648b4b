// The scale of a block: a float32, or an 8-bit code for one ("double quantization").
#pragma once

#include "tables.cuh"

// Codes that share a second scale.
constexpr int NESTED_SHIFT = 8;

// Where the scales of one tensor are. Only the members of its kind are read: plain ones `absmax`, nested ones the rest.
struct Scales {
    const float *absmax;   // [blocks]
    const u8 *codes;       // [blocks]
    const float *absmax2;  // [ceil(blocks / 256)]
    const float *offset;   // [1], on the device: so no launch waits for it
};

// What is read of a scale before its table is there.
template <bool NESTED>
struct RawScale;

template <>
struct RawScale<false> {
    float absmax;

    __device__ static RawScale load(const Scales &scales, i64 block) { return {scales.absmax[block]}; }
    __device__ static RawScale none() { return {0.0f}; }
    __device__ float value(const float *, float) const { return absmax; }
};

template <>
struct RawScale<true> {
    u32 code;
    float absmax2;

    __device__ static RawScale load(const Scales &scales, i64 block) {
        return {scales.codes[block], scales.absmax2[block >> NESTED_SHIFT]};
    }
    __device__ static RawScale none() { return {0, 0.0f}; }
    // `map`: [256], DYNAMIC_MAP or its copy in shared memory. A product rounded, then a sum rounded.
    __device__ float value(const float *map, float offset) const {
        return __fadd_rn(__fmul_rn(map[code], absmax2), offset);
    }
};
