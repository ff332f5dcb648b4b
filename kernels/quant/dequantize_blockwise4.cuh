// The work of dequantize_blockwise4, for kernels that do it for one tensor or for many: see dequantize_blockwise4.cu.
#pragma once

#include "common/scales.cuh"

// At least 256: a thread for each value of the map of nested scales.
constexpr int THREADS = 256;
// Values of one 32-bit word of codes: a thread's share at a time. Every block size is a multiple of it.
constexpr int GROUP = 8;
// Words in flight in each thread: 4 KB in a block of threads.
constexpr int DEPTH = 4;
constexpr int STRIDE = THREADS * GROUP;
// A multiple of every block size: a tile begins with a block, and inside of it 32 bits are enough for any index.
constexpr int TILE = STRIDE * DEPTH;
static_assert(TILE % 4096 == 0, "whole blocks");

// Eight values of one block, whose codes are in `word`, the earlier ones in lower bytes and higher nibbles.
template <typename T>
__device__ inline void write_group(T *out, u32 word, float scale, const float (&values)[16]) {
    float x[GROUP];
#pragma unroll
    for (int j = 0; j < GROUP / 2; j++) {
        // Four times the code is the offset of its value: the mask keeps the code at bits 2 to 5.
        const u32 high = (word >> (8 * j + 2)) & 0x3c;
        const u32 low = (j == 0 ? word << 2 : word >> (8 * j - 2)) & 0x3c;
        x[2 * j] = __fmul_rn(at_byte(values, high), scale);
        x[2 * j + 1] = __fmul_rn(at_byte(values, low), scale);
    }
    Words4 *const to = reinterpret_cast<Words4 *>(out);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            store_words(to + j, {__float_as_uint(x[4 * j]), __float_as_uint(x[4 * j + 1]), __float_as_uint(x[4 * j + 2]),
                                 __float_as_uint(x[4 * j + 3])});
        }
    } else {
        store_words(to, {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])});
    }
}

// Tile number `tile` of n values, by a block of threads.
template <typename T, bool NESTED>
__device__ inline void dequantize(const u8 *packed, const Scales &scales, T *out, i64 n, int block_shift, u32 quant_type,
                                  i64 tile) {
    SHARED_ARRAY(float, values, [16]);
    SHARED_ARRAY(float, map, [NESTED ? 256 : 1]);
    static_assert(THREADS >= 256, "one thread for each value of the map");

    const u32 thread = threadIdx.x;
    const i64 base = tile * TILE;
    const u32 size = u32(n - base < TILE ? n - base : TILE);
    packed += base / 2;
    out += base;
    const ScaleReader<NESTED> reader(scales, base >> block_shift);
    const u32 whole = is_aligned(packed, 4) && is_aligned(out, 16) ? size & ~u32(GROUP - 1) : 0;

    u32 words[DEPTH];
    RawScale<NESTED> raw[DEPTH];
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        words[d] = i < whole ? load_stream(reinterpret_cast<const u32 *>(packed + i / 2)) : 0;
    }
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        raw[d] = i < size ? reader[i >> block_shift] : RawScale<NESTED>{};
    }
    const float offset = NESTED ? *scales.offset : 0.0f;

    if (thread < 16) values[thread] = VALUES[quant_type][thread];
    if (NESTED) map[thread] = DYNAMIC_MAP[thread];
    __syncthreads();

#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        const float scale = raw[d].value(map, offset);
        if (i < whole) {
            write_group(out + i, words[d], scale, values);
        } else {
            // The end of the list, or memory that is not aligned.
            for (u32 k = i; k < size && k < i + GROUP; k++) {
                const u32 code = k % 2 == 0 ? packed[k / 2] >> 4 : packed[k / 2] & 15;
                out[k] = from_f32<T>(__fmul_rn(values[code], scale));
            }
        }
    }
}
