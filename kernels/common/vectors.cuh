// Values of a group, as they travel: 16 bytes in one access.
#pragma once

#include "common/types.cuh"

// How many of T are 16 bytes.
template <typename T>
constexpr int PER_STORE = 16 / int(sizeof(T));

// Writes the PER_STORE<T> values from `x` on, rounded; `out` is a multiple of 16.
template <typename T>
__device__ inline void store_values(T *out, const float *x) {
    Words4 *const to = reinterpret_cast<Words4 *>(out);
    if constexpr (sizeof(T) == 4) {
        store_words(to, {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
    } else {
        store_words(to, {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])});
    }
}

// Eight values as they are in memory. LATE: the kernel before may still write them when this one starts.
template <typename T, bool LATE = false>
struct Eight {
    static constexpr int COUNT = 8;
    static constexpr int WIDE = int(sizeof(T)) * COUNT / 16;
    Words4 words[WIDE];

    // Those from `input` on, a multiple of 16.
    __device__ void load(const T *input) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) {
            const Words4 *const from = reinterpret_cast<const Words4 *>(input) + j;
            words[j] = LATE ? load_stream_after(from) : load_stream(from);
        }
    }

    // The first `count` of them, from anywhere; then zeros.
    __device__ void load_some(const T *input, u32 count) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 i = u32(4 * j + k);
                if constexpr (sizeof(T) == 4) {
                    words[j].word[k] = i < count ? __float_as_uint(input[i]) : 0;
                } else {
                    const u32 first = 2 * i < count ? input[2 * i].bits : 0;
                    const u32 second = 2 * i + 1 < count ? input[2 * i + 1].bits : 0;
                    words[j].word[k] = first | second << 16;
                }
            }
        }
    }

    // The same, in one access where there are eight and `wide` says that `input` is a multiple of 16.
    __device__ void load(const T *input, u32 count, bool wide) {
        if (wide && count >= COUNT) {
            load(input);
            return;
        }
        load_some(input, count);
    }

    // Value k; k is known at compile time once loops are unrolled.
    __device__ float operator[](int k) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(words[k / 4].word[k % 4]);
        } else {
            const u32 word = words[0].word[k / 2];
            return k % 2 == 0 ? first_of<T>(word) : second_of<T>(word);
        }
    }

    // The largest magnitude of these, or `max`.
    __device__ float largest(float max = 0.0f) const {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            max = fmaxf(max, fabsf((*this)[k]));  // passes NaN over
        }
        return max;
    }
};
