// dequantize_blockwise4: value[i] = round_to_T(VALUES[code[i]] * scale[i / blocksize]), the product in float32, as
// rust/core/src/quant/blockwise4/scalar.rs defines it.
//
// Problem. Any number of values, any alignment, block sizes 32 to 4096, plain or nested scales; float32, float16, bfloat16.
//
// Roofline. Memory: half a byte of codes and 4 / blocksize bytes of scales (1 / blocksize when nested) in, 2 or 4 bytes out,
//   for each value. 14336 x 4096 in blocks of 64 to bfloat16 on an H100 (benches/RESULTS.md): 53.6 us, a kernel of the same
//   traffic 53.8 (100 %); 4096 x 4096 92 %; nested scales 95 and 102 %.
//
// Tile. 8192 values for a block of 256 threads, in four strides of 2048:
//     thread t: word t of a stride (8 codes) -> 8 values        a warp: 128 bytes in, 512 out (16-bit values)
//   A tile begins with a block of any size, so that 32 bits are enough for any index inside.
//
// Shared memory. The 16 values, each in a bank of its own: 32 lanes look up without a conflict, in one instruction. The map of
//   nested scales, 1 KB.
//
// Budget. Four words of codes and four scales in flight for each thread before the first is used; __launch_bounds__(256, 5)
//   leaves 48 registers, of which 40 to 46 are taken. 20 to 24 KB of codes are on the way to a multiprocessor.
//
// Determinism. The same bits everywhere: each value is one product, rounded once to float32 and once to T.
#include "common/scales.cuh"

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

template <typename T, bool NESTED>
__device__ inline void dequantize(const u8 *packed, const Scales &scales, T *out, i64 n, int block_shift, u32 quant_type) {
    SHARED_ARRAY(float, values, [16]);
    SHARED_ARRAY(float, map, [NESTED ? 256 : 1]);
    static_assert(THREADS >= 256, "one thread for each value of the map");

    const u32 thread = threadIdx.x;
    const i64 base = i64(blockIdx.x) * TILE;
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

// The definition: a thread for each value. The fast kernel must give the same bits.
template <typename T, bool NESTED>
__device__ inline void dequantize_reference(const u8 *packed, const Scales &scales, T *out, i64 n, int block_shift,
                                            u32 quant_type) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) {
        return;
    }
    const u32 byte = packed[i / 2];
    const u32 code = i % 2 == 0 ? byte >> 4 : byte & 15;
    const float offset = NESTED ? *scales.offset : 0.0f;
    const float scale = ScaleReader<NESTED>(scales, i >> block_shift)[0].value(DYNAMIC_MAP, offset);
    out[i] = from_f32<T>(__fmul_rn(VALUES[quant_type][code], scale));
}

// packed:      [ceil(n / 2)] any alignment; two codes to a byte, the earlier in the high nibble
// scales:      of ceil(n / blocksize) blocks
// out:         [n] aligned to its elements
// block_shift: log2 of the block size, 5 to 12
// quant_type:  NF4 or FP4
// Grid: ceil(n / TILE) blocks of THREADS; the reference ceil(n / THREADS).
#define INSTANCE(name, T, nested)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 5)                                                            \
        dequantize_blockwise4_##name(const u8 *packed, Scales scales, T *out, i64 n, int block_shift, u32 quant_type) { \
        dequantize<T, nested>(packed, scales, out, n, block_shift, quant_type);                                         \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
        dequantize_blockwise4_reference_##name(const u8 *packed, Scales scales, T *out, i64 n, int block_shift,         \
                                    u32 quant_type) {                                                                   \
        dequantize_reference<T, nested>(packed, scales, out, n, block_shift, quant_type);                               \
    }

INSTANCE(bf16, Bf16, false)
INSTANCE(f16, F16, false)
INSTANCE(f32, float, false)
INSTANCE(bf16_nested, Bf16, true)
INSTANCE(f16_nested, F16, true)
INSTANCE(f32_nested, float, true)
