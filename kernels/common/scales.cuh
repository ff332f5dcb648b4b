// The scale of a block: a float32, or an 8-bit code for one ("double quantization").
#pragma once

#include "common/tables.cuh"

// Codes that share a second scale.
constexpr int NESTED_SHIFT = 8;

// Where the scales of one tensor are. Only the members of its kind are read: plain ones `absmax`, nested ones the rest.
struct Scales {
    const float *absmax;   // [blocks]
    const u8 *codes;       // [blocks]
    const float *absmax2;  // [ceil(blocks / 256)]
    const float *offset;   // [1], on the device: so no launch waits for it
};

// The scales from some block on, to be indexed with 32 bits: `block` blocks of the tensor lie before.
template <bool NESTED>
struct ScaleReader;

// What is read of a scale before the table of its code is there.
template <bool NESTED>
struct RawScale;

template <>
struct RawScale<false> {
    float absmax;

    __device__ float value(const float *, float) const { return absmax; }
};

template <>
struct ScaleReader<false> {
    const float *absmax;

    __device__ ScaleReader(const Scales &scales, i64 block) : absmax(scales.absmax + block) {}
    __device__ RawScale<false> operator[](u32 i) const { return {absmax[i]}; }
};

template <>
struct RawScale<true> {
    u32 code;
    float absmax2;

    // `map`: [256], DYNAMIC_MAP or its copy in shared memory. A product rounded, then a sum rounded.
    __device__ float value(const float *map, float offset) const {
        return __fadd_rn(__fmul_rn(map[code], absmax2), offset);
    }
};

template <>
struct ScaleReader<true> {
    const u8 *codes;
    const float *absmax2;
    u32 lead;  // blocks before, in the group of the first

    __device__ ScaleReader(const Scales &scales, i64 block)
        : codes(scales.codes + block),
          absmax2(scales.absmax2 + (block >> NESTED_SHIFT)),
          lead(u32(block) & ((1u << NESTED_SHIFT) - 1)) {}
    __device__ RawScale<true> operator[](u32 i) const { return {codes[i], absmax2[(lead + i) >> NESTED_SHIFT]}; }
};
