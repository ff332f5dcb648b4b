// What the kernels of LoRA adapters share: values of one of two types, to the type of the products.
#pragma once

#include "common/vectors.cuh"

// A factor of an adapter, rank x columns, where it lies: element (r, c) is `rank_stride * r + column_stride * c` elements behind
// `values`; one of the strides is 1. For x A^T that is A itself, for h B^T it is B transposed; neither is copied. There are
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

// Values as they are in memory, 8, 16 or 32 bytes of them.
template <typename T, int COUNT>
struct Values {
    static constexpr int WORDS = COUNT * int(sizeof(T)) / 4;
    u32 words[WORDS];

    // Those from `input` on, which lies at a multiple of all their bytes, or of 16.
    __device__ void load(const T *input) {
        if constexpr (WORDS == 2) {
            const Words2 two = *reinterpret_cast<const Words2 *>(input);
            words[0] = two.word[0], words[1] = two.word[1];
        } else {
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                const Words4 four = reinterpret_cast<const Words4 *>(input)[i / 4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    words[i + j] = four.word[j];
                }
            }
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
