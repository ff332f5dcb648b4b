// Where the packed weights of experts are.
#pragma once

#include "common/scales.cuh"

// Where a matrix is: a row of the table of addresses.
struct Matrix {
    const u8 *codes;
    const void *absmax;    // float32, or uint8 of nested scales
    const float *absmax2;  // of nested ones
    const float *offset;   // of nested ones

    __device__ Scales scales() const {
        return {static_cast<const float *>(absmax), static_cast<const u8 *>(absmax), absmax2, offset};
    }
};
