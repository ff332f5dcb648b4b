// dequantize_absmax: nested scales to float32, out[i] = DYNAMIC_MAP[codes[i]] * absmax2[i / 256] + offset, a product rounded
// and then a sum rounded, as rust/core/src/quant/absmax/mod.rs defines it.
//
// Problem. Any number of scales, any alignment.
//
// Roofline. Memory: one byte in and four out for each scale. Not in benches/RESULTS.md: products and dequantize_blockwise4 read
//   nested scales themselves, and this kernel is for callers that want them as float32.
//
// Tile. 4096 scales for a block of 256 threads, in four strides of 1024: a thread reads a word of four codes and writes 16
//   bytes. A tile begins with a group of 256 codes.
//
// Shared memory. The dynamic map, 1 KB: lanes look up different codes, which constant memory would serve one by one.
//
// Budget. Four words of codes in flight for each thread, 4 KB for a block; 32 registers.
//
// Determinism. The same bits everywhere.
#include "common/vectors.cuh"
#include "common/scales.cuh"

constexpr int THREADS = 256;
// Codes of one 32-bit word, whose scales are one store.
constexpr int GROUP = 4;
// Words in flight in each thread: 4 KB in a block of threads, and as many blocks as a multiprocessor takes.
constexpr int DEPTH = 4;
constexpr int STRIDE = THREADS * GROUP;
// A multiple of 256: a tile begins with a group of codes.
constexpr int TILE = STRIDE * DEPTH;
static_assert(TILE % (1 << NESTED_SHIFT) == 0, "whole groups");

// codes:   [n] any alignment
// absmax2: [ceil(n / 256)]
// offset:  [1]
// out:     [n] aligned to its elements
// Grid: ceil(n / TILE) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS)
    dequantize_absmax(const u8 *codes, const float *absmax2, const float *offset, float *out, i64 n) {
    SHARED_ARRAY(float, map, [256]);
    static_assert(THREADS >= 256, "one thread for each value of the map");

    const u32 thread = threadIdx.x;
    const i64 base = i64(blockIdx.x) * TILE;
    const u32 size = u32(n - base < TILE ? n - base : TILE);
    codes += base;
    out += base;
    absmax2 += base >> NESTED_SHIFT;
    const u32 whole = is_aligned(codes, 4) && is_aligned(out, 16) ? size & ~u32(GROUP - 1) : 0;

    u32 words[DEPTH];
    RawScale<true> raw[DEPTH];
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        words[d] = i < whole ? load_stream(reinterpret_cast<const u32 *>(codes + i)) : 0;
        raw[d].absmax2 = i < size ? absmax2[i >> NESTED_SHIFT] : 0.0f;
    }
    const float centre = *offset;
    map[thread] = DYNAMIC_MAP[thread];
    __syncthreads();

#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        if (i < whole) {
            float x[GROUP];
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                raw[d].code = words[d] >> (8 * j) & 0xff;
                x[j] = raw[d].value(map, centre);
            }
            store_values(out + i, x);
        } else {
            // The end of the list, or memory that is not aligned.
            for (u32 k = i; k < size && k < i + GROUP; k++) {
                raw[d].code = codes[k];
                out[k] = raw[d].value(map, centre);
            }
        }
    }
}

// The definition: a thread for each scale, with the same parameters. Grid: ceil(n / THREADS) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS)
    dequantize_absmax_reference(const u8 *codes, const float *absmax2, const float *offset, float *out, i64 n) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n) {
        out[i] = RawScale<true>{codes[i], absmax2[i >> NESTED_SHIFT]}.value(DYNAMIC_MAP, *offset);
    }
}
