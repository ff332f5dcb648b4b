// Dequantizing by permutations of bytes: the sixteen values of a block as two planes of bytes.
#pragma once

#include "common/types.cuh"

// What each code stands for, for a block whose largest magnitude is 1.
struct Codebook {
    float value[16];
};

// The sixteen values of a block of W in 16 bits: their low and their high bytes, four to a word, in the order of codes.
struct Planes {
    u32 low[4], high[4];
};

// Scaled in float32, rounded once.
template <typename T>
__device__ inline Planes scaled_planes(const Codebook &codebook, float scale) {
    Planes planes;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const float *const value = codebook.value + 4 * w;
        const u32 a = pack2<T>(__fmul_rn(value[0], scale), __fmul_rn(value[1], scale));
        const u32 b = pack2<T>(__fmul_rn(value[2], scale), __fmul_rn(value[3], scale));
        planes.low[w] = permute_bytes(a, b, 0x6420);
        planes.high[w] = permute_bytes(a, b, 0x7531);
    }
    return planes;
}

// The weights of two bytes of codes, the low ones of `codes`: two of each byte, the earlier in the low half.
__device__ inline void look_up(const Planes &planes, u32 codes, u32 &first, u32 &second) {
    // A permutation finds four bytes among eight: two look for codes below 8 and from 8 on, a third takes one or the other.
    const u32 place = codes & 0x7777u, half = (codes >> 1 & 0x4444u) | 0x3210u;
    const u32 low = permute_bytes(permute_bytes(planes.low[0], planes.low[1], place),
                                  permute_bytes(planes.low[2], planes.low[3], place), half);
    const u32 high = permute_bytes(permute_bytes(planes.high[0], planes.high[1], place),
                                   permute_bytes(planes.high[2], planes.high[3], place), half);
    // The earlier code of a byte is in its high nibble.
    first = permute_bytes(low, high, 0x4051);
    second = permute_bytes(low, high, 0x6273);
}
