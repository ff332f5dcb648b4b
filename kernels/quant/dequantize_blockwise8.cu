// dequantize_blockwise8: value[i] = round_to_T(map[code[i]] * absmax[i / blocksize]), the product in float32, with any map of
// 256 values and blocks of any size, as rust/core/src/quant/blockwise8/mod.rs defines it.
//
// Problem. Any number of values, any alignment, any block size from 1 on; float32, float16, bfloat16.
//
// Roofline. Memory: one byte in and 2 or 4 bytes out for each value. Not in benches/RESULTS.md.
//
// Tile. 32 KB of output for a block of 256 threads: a thread writes 16 bytes at a time, eight times.
//
// Shared memory. The map eight times, the copies of a value in eight banks: where lanes take their values by chance, a bank
//   serves two lanes or so in turn instead of three or four. 8 KB, written once for 32 KB of output.
//
// Budget. Eight reads of 4 or 8 bytes in flight for each thread, 8 to 16 KB for a block. __launch_bounds__(256, 4) leaves 64
//   registers; 40 to 48 are taken.
//
// Determinism. The same bits everywhere.
#include "common/blocks.cuh"
#include "common/vectors.cuh"

constexpr int THREADS = 256;
// Reads in flight in each thread: 4 to 8 bytes each, 8 to 16 KB in a block of threads.
constexpr int DEPTH = 8;
// What a block of threads writes, in bytes.
constexpr int TILE_BYTES = THREADS * 16 * DEPTH;
// Copies of the map; 8 KB, a 32nd of the work that the tile is.
constexpr int COPIES = 8;

template <typename T>
__device__ inline void dequantize_blockwise8(const u8 *codes, const float *absmax, const float *map, T *out, i64 n,
                                             i64 blocksize) {
    constexpr int GROUP = PER_STORE<T>;
    constexpr int STRIDE = THREADS * GROUP;
    constexpr int TILE = STRIDE * DEPTH;
    static_assert(TILE * sizeof(T) == TILE_BYTES, "as the launcher counts");
    SHARED_ARRAY(float, table, [256 * COPIES]);

    const u32 thread = threadIdx.x;
    const i64 base = i64(blockIdx.x) * TILE;
    const u32 size = u32(n - base < TILE ? n - base : TILE);
    codes += base;
    out += base;
    const TileBlocks blocks(base, blocksize);
    absmax += blocks.first;
    // Whether every group is of one block, and can be moved at once.
    const bool whole = blocksize % GROUP == 0 && is_aligned(codes, GROUP) && is_aligned(out, 16);

    Words2 words[DEPTH];
    float scales[DEPTH];
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        words[d] = {};
        if (whole && i + GROUP <= size) {
            if constexpr (GROUP == 8) {
                words[d] = load_stream(reinterpret_cast<const Words2 *>(codes + i));
            } else {
                words[d].word[0] = load_stream(reinterpret_cast<const u32 *>(codes + i));
            }
        }
    }
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        scales[d] = whole && i + GROUP <= size ? absmax[blocks[i]] : 0.0f;
    }
#pragma unroll
    for (u32 w = thread; w < 256 * COPIES; w += THREADS) {
        table[w] = map[w / COPIES];
    }
    __syncthreads();

    // A lane's copy of a value is `code` times so many bytes from here.
    const float *const own = &table[thread % COPIES];
    constexpr int CODE_SHIFT = 5;
    static_assert(COPIES * sizeof(float) == 1 << CODE_SHIFT, "bytes from one value to the next");
    if (whole) {
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
            const u32 i = thread * GROUP + d * STRIDE;
            if (i + GROUP <= size) {
                float x[GROUP];
#pragma unroll
                for (int j = 0; j < GROUP; j++) {
                    const u32 word = words[d].word[j / 4];
                    const u32 offset = j % 4 == 0 ? word << CODE_SHIFT : word >> (8 * (j % 4) - CODE_SHIFT);
                    x[j] = __fmul_rn(at_byte(own, offset & (0xff << CODE_SHIFT)), scales[d]);
                }
                store_values(out + i, x);
            }
        }
    }
    // The end of the list; everything, where blocks or memory are not aligned.
#pragma unroll 4
    for (u32 i = (whole ? size / GROUP * GROUP : 0) + thread; i < size; i += THREADS) {
        out[i] = from_f32<T>(__fmul_rn(own[codes[i] * COPIES], absmax[blocks[i]]));
    }
}

// The definition: a thread for each value. The fast kernel must give the same bits.
template <typename T>
__device__ inline void dequantize_blockwise8_reference(const u8 *codes, const float *absmax, const float *map, T *out, i64 n,
                                                 i64 blocksize) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n) {
        out[i] = from_f32<T>(__fmul_rn(map[codes[i]], absmax[i / blocksize]));
    }
}

// codes:     [n] any alignment
// absmax:    [ceil(n / blocksize)]
// map:       [256] the value of each code
// out:       [n] aligned to its elements
// blocksize: 1 and more
// Grid: ceil(n * sizeof(T) / TILE_BYTES) blocks of THREADS; the reference ceil(n / THREADS).
#define INSTANCE(name, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) dequantize_blockwise8_##name(        \
        const u8 *codes, const float *absmax, const float *map, T *out, i64 n, i64 blocksize) {   \
        dequantize_blockwise8<T>(codes, absmax, map, out, n, blocksize);                          \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_blockwise8_reference_##name( \
        const u8 *codes, const float *absmax, const float *map, T *out, i64 n, i64 blocksize) {   \
        dequantize_blockwise8_reference<T>(codes, absmax, map, out, n, blocksize);                \
    }

INSTANCE(bf16, Bf16)
INSTANCE(f16, F16)
INSTANCE(f32, float)
