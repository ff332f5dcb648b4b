// quantize_blockwise8: values to 8-bit codes and one float32 scale per block, with any ascending map of 256 values, as
// rust/core/src/quant/blockwise8/mod.rs defines them.
//
// Problem. Any number of values, any alignment. Block sizes of the format (32 to 4096) have the fast kernel, any other from 1
//   on the one named `any`; float32, float16, bfloat16.
//
// Roofline. Memory: 2 or 4 bytes in and one out for each value. Not in benches/RESULTS.md.
//
// Tile. 4096 values for a block of 512 threads, eight to a thread; the next tile is on its way while one is worked on.
//   A code is the number of boundaries between values of the map that the scaled value exceeds. Halving 255 of them takes
//   eight look-ups that wait for one another; here a value's exponent and six bits of its fraction name a cell, a table has
//   the boundaries below the cell, and only those inside it are left to compare with: one for the dynamic map and for evenly
//   spaced ones. Each block of threads makes the table for itself, and then goes through many tiles.
//
// Shared memory. Boundaries (2 KB) and the boundaries below each cell (2.8 KB); the largest magnitude of each warp.
//
// Budget. Three blocks of 512 threads on a multiprocessor, 40 registers each; 24 KB of 16-bit values in flight.
//
// Determinism. The same bits everywhere. In blocks of the format NaN does not count for the scale; in others it is the scale.
#include "common/vectors.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
// Blocks on a multiprocessor: while they work on a tile, the next is on the way, 24 KB of 16-bit values.
constexpr int RESIDENT = 3;
// Values that a thread packs into one store.
constexpr int GROUP = 8;
// The largest block size of the fast kernel, so that a block never lies in two tiles.
constexpr int TILE = THREADS * GROUP;
static_assert(TILE == 4096, "the largest block of values is quantized by one block of threads");
// What a warp quantizes by itself, when blocks are of any size; larger blocks take all warps.
constexpr int WARP_BLOCK = 1024;

// Boundaries, and as many again that nothing exceeds: a search may look beyond the last.
constexpr int CODES = 256;
constexpr int BOUNDARIES = 2 * CODES;

// Cells of magnitudes: 64 in each binade from 2^-22 to 1, one below and one above. The smallest boundary of the dynamic
// map is 2^-21.8.
constexpr int CELL_SHIFT = 23 - 6;
constexpr int LOWEST = (127 - 22) << 6;
constexpr int HIGHEST = 127 << 6;
constexpr int MAGNITUDES = HIGHEST - LOWEST + 2;
// Of both signs, ascending.
constexpr int CELLS = 2 * MAGNITUDES;

constexpr u32 INFINITY_BITS = 0x7f800000u;

// What codes are found with.
struct Search {
    float boundaries[BOUNDARIES];
    u8 below[CELLS + 4];  // how many boundaries are below the lower edge of a cell; then below infinity
    u32 counts;           // all numbers of boundaries in a cell, or-ed
};

// The boundary above `code`. A value midway between two of the map has the even of the two codes: above an odd one the
// boundary is the next float32 below the middle, unless the middle is the lower value itself.
__device__ inline float boundary(const float *map, int code) {
    const float value = map[code];
    const float middle = __fmul_rn(__fadd_rn(value, map[code + 1]), 0.5f);
    if (code % 2 == 0 || !(middle > value)) {
        return middle;
    }
    const u32 bits = __float_as_uint(middle);
    return __uint_as_float(middle > 0.0f ? bits - 1 : middle < 0.0f ? bits + 1 : 0x80000001u);
}

// The least value of a cell, or what is next to it below; 0 <= cell <= CELLS.
__device__ inline float edge(int cell) {
    const bool negative = cell < MAGNITUDES;
    const int magnitude = negative ? MAGNITUDES - cell : cell - MAGNITUDES;
    const u32 bits = magnitude == 0            ? 0
                     : magnitude == MAGNITUDES ? INFINITY_BITS
                                               : u32(LOWEST + magnitude - 1) << CELL_SHIFT;
    return __uint_as_float(negative ? bits | 0x80000000u : bits);
}

// The cell of a value; of NaN some.
__device__ inline int cell_of(float value) {
    const u32 bits = __float_as_uint(value);
    const int key = int((bits & 0x7fffffffu) >> CELL_SHIFT) - (LOWEST - 1);
    const int magnitude = max(0, min(key, MAGNITUDES - 1));
    // Below zero they count downwards.
    return MAGNITUDES + (magnitude ^ (int(bits) >> 31));
}

// By all threads.
__device__ inline void make_search(Search &search, const float *map) {
    const int thread = int(threadIdx.x);
    static_assert(THREADS == BOUNDARIES, "a thread for each");
    search.boundaries[thread] = thread < CODES - 1 ? boundary(map, thread) : __uint_as_float(INFINITY_BITS);
    if (thread == 0) {
        search.counts = 0;
    }
    __syncthreads();
    for (int cell = thread; cell <= CELLS; cell += THREADS) {
        const float least = edge(cell);
        int below = 0;
        for (int step = CODES / 2; step > 0; step /= 2) {
            below |= search.boundaries[below | (step - 1)] < least ? step : 0;
        }
        search.below[cell] = u8(below);
    }
    __syncthreads();
    u32 counts = 0;
    for (int cell = thread; cell < CELLS; cell += THREADS) {
        counts |= u32(search.below[cell + 1] - search.below[cell]);
    }
    atomicOr(&search.counts, counts);
    __syncthreads();
}

// The first of the steps of a search inside a cell: a power of two, or 0.
__device__ inline int first_step(const Search &search) {
    const int bits = 32 - __clz(int(search.counts));
    return bits == 0 ? 0 : 1 << (bits - 1);
}

// The codes of scaled values, the first in the lowest byte; of NaN 0. The searches take turns, so that none waits for
// memory alone.
template <int COUNT>
__device__ inline u64 codes_of(const Search &search, int first, const float (&scaled)[COUNT]) {
    int code[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        code[k] = search.below[cell_of(scaled[k])];
    }
    for (int step = first; step > 0; step /= 2) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            // Exceeds this boundary, and so all before it.
            code[k] += scaled[k] > search.boundaries[code[k] + step - 1] ? step : 0;
        }
    }
    u64 word = 0;
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        word |= u64(scaled[k] == scaled[k] ? u32(code[k]) : 0) << (8 * k);
    }
    return word;
}

// Blocks of a power of two of values, 32 to 4096.
template <typename T>
__device__ inline void quantize_blockwise8(const T *input, const float *map, u8 *codes, float *absmax, i64 n, int block_shift) {
    SHARED_ARRAY(Search, search, );
    // Two, used in turn: one barrier for each tile is enough.
    SHARED_ARRAY(float, warp_max, [2][WARPS]);

    const u32 thread = threadIdx.x;
    const bool wide = is_aligned(input, 16), whole_words = is_aligned(codes, GROUP);
    const i64 step = i64(gridDim.x) * TILE;
    const auto left = [&](i64 i) { return i >= n ? 0 : n - i < GROUP ? u32(n - i) : u32(GROUP); };

    i64 i = i64(blockIdx.x) * TILE + thread * GROUP;
    Eight<T> x;
    x.load(input + i, left(i), wide);
    make_search(search, map);
    const int first = first_step(search);

    for (i64 tile = blockIdx.x; tile * TILE < n; tile += gridDim.x, i += step) {
        const Eight<T> now = x;
        // The next, while this one is worked on.
        x.load(input + (i + step), left(i + step), wide);

        float max = now.largest();
        // Lanes of one block: 4 to 32.
        const int lanes = block_shift < 8 ? 1 << (block_shift - 3) : WARP;
        for (int by = 1; by < lanes; by *= 2) {
            max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, by));
        }
        if (block_shift > 8) {
            // Blocks of two warps and more.
            float(&maxima)[WARPS] = warp_max[tile / gridDim.x % 2];
            if (thread % WARP == 0) {
                maxima[thread / WARP] = max;
            }
            __syncthreads();
            const u32 warps = 1u << (block_shift - 8);
            const u32 before = thread / WARP & ~(warps - 1);
            for (u32 k = 0; k < warps; k++) {
                max = fmaxf(max, maxima[before + k]);
            }
        }
        const u32 count = left(i);
        if (count == 0) {
            continue;
        }
        if ((i & ((i64(1) << block_shift) - 1)) == 0) {
            absmax[i >> block_shift] = max;
        }
        const float inverse = __frcp_rn(max);
        float scaled[GROUP];
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            scaled[k] = __fmul_rn(now[k], inverse);
        }
        const u64 word = codes_of(search, first, scaled);
        if (count == GROUP && whole_words) {
            *reinterpret_cast<u64 *>(codes + i) = word;
        } else {
#pragma unroll 1
            for (u32 k = 0; k < count; k++) {
                codes[i + k] = u8(word >> (8 * k));
            }
        }
    }
}

// Whether the block size is one of the format's: NaN then does not count for the scale. In other blocks it does, as it
// does on the processor (python/halfbyte/_cpu.py).
__device__ inline bool passes_nan_over(i64 blocksize) {
    return blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0;
}

// Blocks of any other size: a warp for each, or all threads when they are large.
template <typename T>
__device__ inline void quantize_blockwise8_any(const T *input, const float *map, u8 *codes, float *absmax, i64 n,
                                               i64 blocksize) {
    SHARED_ARRAY(Search, search, );
    SHARED_ARRAY(u32, warp_max, [2][WARPS]);
    make_search(search, map);
    const int first = first_step(search);

    const int thread = int(threadIdx.x), warp = thread / WARP;
    const bool alone = blocksize <= WARP_BLOCK;
    const i64 teams = alone ? i64(gridDim.x) * WARPS : i64(gridDim.x);
    const i64 team = alone ? i64(blockIdx.x) * WARPS + warp : i64(blockIdx.x);
    const int member = alone ? thread % WARP : thread, members = alone ? WARP : THREADS;
    const i64 blocks = i64(u64(n - 1) / u64(blocksize)) + 1;

    u32 turn = 0;
    for (i64 block = team; block < blocks; block += teams, turn ^= 1) {
        const i64 begin = block * blocksize;
        const i64 end = n - begin < blocksize ? n : begin + blocksize;
        // Magnitudes are in the order of their bits, with NaN above infinity.
        u32 bits = 0;
#pragma unroll 4
        for (i64 i = begin + member; i < end; i += members) {
            bits = max(bits, __float_as_uint(to_f32(input[i])) & 0x7fffffffu);
        }
        for (int by = 1; by < WARP; by *= 2) {
            bits = max(bits, __shfl_xor_sync(ALL_LANES, bits, by));
        }
        if (!alone) {
            if (thread % WARP == 0) {
                warp_max[turn][warp] = bits;
            }
            __syncthreads();
            for (int k = 0; k < WARPS; k++) {
                bits = max(bits, warp_max[turn][k]);
            }
        }
        const float largest = __uint_as_float(bits);
        if (member == 0) {
            absmax[block] = largest;
        }
        const float inverse = __frcp_rn(largest);
#pragma unroll 4
        for (i64 i = begin + member; i < end; i += members) {
            const float scaled[1] = {__fmul_rn(to_f32(input[i]), inverse)};
            codes[i] = u8(codes_of(search, first, scaled));
        }
    }
}

// The definition: a thread for each block. The fast kernels must give the same bits.
template <typename T>
__device__ inline void quantize_blockwise8_reference(const T *input, const float *map, u8 *codes, float *absmax, i64 n,
                                               i64 blocksize) {
    const i64 block = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (block > (n - 1) / blocksize) {
        return;
    }
    const i64 begin = block * blocksize;
    const i64 end = n - begin < blocksize ? n : begin + blocksize;
    float max = 0.0f;
    for (i64 i = begin; i < end; i++) {
        const float size = fabsf(to_f32(input[i]));
        max = size > max || (size != size && !passes_nan_over(blocksize)) ? size : max;
    }
    absmax[block] = max;
    const float inverse = __frcp_rn(max);
    for (i64 i = begin; i < end; i++) {
        const float scaled = __fmul_rn(to_f32(input[i]), inverse);
        int code = 0;
        while (code < CODES - 1 && scaled > boundary(map, code)) {
            code++;
        }
        codes[i] = u8(code);
    }
}

// input:       [n] aligned to its elements, n > 0
// map:         [256] ascending and finite: else codes mean nothing
// codes:       [n] any alignment
// absmax:      [ceil(n / blocksize)]
// block_shift: log2 of the block size, 5 to 12
// blocksize:   1 and more; for `any` none of those that the first kernel takes
// Grid, in blocks of THREADS: any number for the first two, which share the work among those there are; ceil(blocks /
// THREADS) for the reference.
#define INSTANCE(name, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize_blockwise8_##name(     \
        const T *input, const float *map, u8 *codes, float *absmax, i64 n, int block_shift) {       \
        quantize_blockwise8<T>(input, map, codes, absmax, n, block_shift);                          \
    }                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize_blockwise8_any_##name( \
        const T *input, const float *map, u8 *codes, float *absmax, i64 n, i64 blocksize) {         \
        quantize_blockwise8_any<T>(input, map, codes, absmax, n, blocksize);                        \
    }                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) quantize_blockwise8_reference_##name(     \
        const T *input, const float *map, u8 *codes, float *absmax, i64 n, i64 blocksize) {         \
        quantize_blockwise8_reference<T>(input, map, codes, absmax, n, blocksize);                  \
    }

INSTANCE(bf16, Bf16)
INSTANCE(f16, F16)
INSTANCE(f32, float)
