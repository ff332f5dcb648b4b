// What the kernels of LoRA adapters share: values of one of two types, to the type of the products.
#pragma once

#include "common/vectors.cuh"

// A factor of an adapter, rank x columns, where it lies: element (r, c) is `rank_stride * r + column_stride * c` elements behind
// `values`; one of the strides is 1. For x A^T that is A itself, for h B^T it is B transposed, and nothing is moved for it. There are
// less than 2^31 elements.
struct Factor {
    const void *values;
    int rank_stride, column_stride;
    int rank;
    int is_float;  // whether its values are float32, or of the type of the products

    // Element (r, c), or 0 where there is none: as its bits in T.
    template <typename T>
    __device__ u32 bits(int r, int c, int columns) const {
        if (r >= rank || c >= columns) {
            return 0;
        }
        const int at = rank_stride * r + column_stride * c;
        return is_float != 0 ? from_f32<T>(static_cast<const float *>(values)[at]).bits : static_cast<const T *>(values)[at].bits;
    }
    // Elements (r, c) and (r + 1, c) as a word; both ranks are there, or neither. `together`: whether they can be read in one.
    template <typename T>
    __device__ u32 pair(int r, int c, int columns, bool together) const {
        if (!together) {
            return bits<T>(r, c, columns) | bits<T>(r + 1, c, columns) << 16;
        }
        if (r >= rank || c >= columns) {
            return 0;
        }
        const int at = r + column_stride * c;
        if (is_float == 0) {
            return *reinterpret_cast<const u32 *>(static_cast<const T *>(values) + at);
        }
        const Floats2 two = *reinterpret_cast<const Floats2 *>(static_cast<const float *>(values) + at);
        return pack2<T>(two.value[0], two.value[1]);
    }
};

// Four values as they are in memory.
template <typename T>
struct Four {
    u32 words[sizeof(T)];

    // Those from `input` on, at a multiple of four values.
    __device__ void load(const T *input) {
        if constexpr (sizeof(T) == 4) {
            const Words4 four = *reinterpret_cast<const Words4 *>(input);
            words[0] = four.word[0], words[1] = four.word[1], words[2] = four.word[2], words[3] = four.word[3];
        } else {
            const Words2 two = *reinterpret_cast<const Words2 *>(input);
            words[0] = two.word[0], words[1] = two.word[1];
        }
    }
    __device__ float operator[](int k) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(words[k]);
        } else {
            return k % 2 == 0 ? first_of<T>(words[k / 2]) : second_of<T>(words[k / 2]);
        }
    }
};

// Values 2i and 2i + 1 of eight as a word of two in T.
template <typename T, typename X>
__device__ inline u32 pair_of(const Eight<X, true> &eight, int i) {
    if constexpr (sizeof(X) == 2) {
        return eight.words[0].word[i];
    } else {
        return pack2<T>(eight[2 * i], eight[2 * i + 1]);
    }
}
