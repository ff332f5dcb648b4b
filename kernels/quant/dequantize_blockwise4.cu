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
#include "quant/dequantize_blockwise4.cuh"

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
        dequantize<T, nested>(packed, scales, out, n, block_shift, quant_type, blockIdx.x);                             \
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
