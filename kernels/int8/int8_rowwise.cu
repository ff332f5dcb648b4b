// int8_rowwise: rows to int8 codes, each by its largest magnitude, and back: the statistics of LLM.int8(), as
// rust/core/src/quant/int8_rowwise/mod.rs defines them.
//
// Problem. Matrices of any shape and alignment; float32, float16, bfloat16.
//
// Roofline. Memory: 2 or 4 bytes in and one out for each value, and the other way round. Not in benches/RESULTS.md.
//
// Tile. To quantize: a row for each warp when it has up to 1024 values, else for each block of 256 threads.
//     thread t: values 8t ... 8t + 7 of each stride; up to four strides stay in registers between the search for the largest
//     magnitude and the division, so that rows of up to 8192 values are read once. The rest of a longer row is read again,
//     from the second-level cache as a rule.
//   Back: 16 KB of output for a block of 256 threads; a thread writes 16 bytes at a time, four times.
//
// Shared memory. The largest magnitude of each warp, twice, used in turn: one barrier for each row is enough.
//
// Budget. To quantize __launch_bounds__(256, 3), 64 to 79 registers: 32 values of a row in flight for each thread. Back 31.
//
// Determinism. The same bits everywhere: the largest magnitude does not depend on an order.
#include "common/blocks.cuh"
#include "int8/rows.cuh"

// Reads in flight in each thread on the way back: 4 to 8 bytes each.
constexpr int BACK_DEPTH = 4;
// What a block of threads then writes, in bytes.
constexpr int TILE_BYTES = THREADS * 16 * BACK_DEPTH;

template <typename T>
__device__ inline void quantize_int8_rowwise(const T *input, i8 *codes, float *scales, i64 rows, i64 columns) {
    // Two, used in turn: one barrier for each row is enough.
    SHARED_ARRAY(float, warp_max, [2][WARPS]);
    const u32 thread = threadIdx.x, warp = thread / WARP;
    const bool alone = columns <= WARP_ROW;
    const i64 teams = alone ? i64(gridDim.x) * WARPS : i64(gridDim.x);
    const i64 team = alone ? i64(blockIdx.x) * WARPS + warp : i64(blockIdx.x);
    const i64 begin = (alone ? thread % WARP : thread) * GROUP, step = (alone ? WARP : THREADS) * GROUP;
    const auto left = [&](i64 i) { return i >= columns ? 0 : columns - i < GROUP ? u32(columns - i) : u32(GROUP); };

    u32 turn = 0;
    for (i64 row = team; row < rows; row += teams, turn ^= 1) {
        const T *const in = input + row * columns;
        i8 *const out = codes + row * columns;
        const bool wide = is_aligned(in, 16);
        Eight<T> x[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            x[d].load(in + (begin + d * step), left(begin + d * step), wide);
        }
        float max = 0.0f;
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            max = x[d].largest(max);
        }
        for (i64 i = begin + DEPTH * step; i < columns; i += step) {
            Eight<T> more;
            more.load(in + i, left(i), wide);
            max = more.largest(max);
        }
        max = largest_of_row(max, warp_max[turn], alone);
        if (begin == 0) {
            scales[row] = max;
        }
        const Division division(max);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const i64 i = begin + d * step;
            if (i < columns) {
                store_codes(out + i, x[d], left(i), division);
            }
        }
        for (i64 i = begin + DEPTH * step; i < columns; i += step) {
            Eight<T> more;
            more.load(in + i, left(i), wide);
            store_codes(out + i, more, left(i), division);
        }
    }
}

// The definition: a thread for each row. The fast kernel must give the same bits.
template <typename T>
__device__ inline void quantize_int8_rowwise_reference(const T *input, i8 *codes, float *scales, i64 rows, i64 columns) {
    const i64 row = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (row >= rows) {
        return;
    }
    float max = 0.0f;
    for (i64 i = row * columns; i < (row + 1) * columns; i++) {
        max = fmaxf(max, fabsf(to_f32(input[i])));
    }
    scales[row] = max;
    const Division division(max);
    for (i64 i = row * columns; i < (row + 1) * columns; i++) {
        codes[i] = i8(division.code(to_f32(input[i])));
    }
}

// Two products, in this order: that is what bitsandbytes computes.
__device__ inline float value_of_row(int code, float scale) {
    return __fmul_rn(__fmul_rn(__int2float_rn(code), scale), 1.0f / 127);
}

template <typename T>
__device__ inline void dequantize_int8_rowwise(const i8 *codes, const float *scales, T *out, i64 n, i64 columns) {
    constexpr int ONE_STORE = PER_STORE<T>;
    constexpr int STRIDE = THREADS * ONE_STORE;
    constexpr int TILE = STRIDE * BACK_DEPTH;
    static_assert(TILE * sizeof(T) == TILE_BYTES, "as the launcher counts");

    const u32 thread = threadIdx.x;
    const i64 base = i64(blockIdx.x) * TILE;
    const u32 size = u32(n - base < TILE ? n - base : TILE);
    codes += base;
    out += base;
    const TileBlocks row(base, columns);
    scales += row.first;
    // Whether every store is of one row, and can be made at once.
    const bool whole = columns % ONE_STORE == 0 && is_aligned(codes, ONE_STORE) && is_aligned(out, 16);
    if (whole) {
        Words2 words[BACK_DEPTH];
        float scale[BACK_DEPTH];
#pragma unroll
        for (u32 d = 0; d < BACK_DEPTH; d++) {
            const u32 i = thread * ONE_STORE + d * STRIDE;
            words[d] = {};
            scale[d] = 0.0f;
            if (i < size) {
                if constexpr (ONE_STORE == 8) {
                    words[d] = load_stream(reinterpret_cast<const Words2 *>(codes + i));
                } else {
                    words[d].word[0] = load_stream(reinterpret_cast<const u32 *>(codes + i));
                }
                scale[d] = scales[row[i]];
            }
        }
#pragma unroll
        for (u32 d = 0; d < BACK_DEPTH; d++) {
            const u32 i = thread * ONE_STORE + d * STRIDE;
            if (i < size) {
                float x[ONE_STORE];
#pragma unroll
                for (int j = 0; j < ONE_STORE; j++) {
                    const int code = int(words[d].word[j / 4] << (24 - 8 * (j % 4))) >> 24;
                    x[j] = value_of_row(code, scale[d]);
                }
                store_values(out + i, x);
            }
        }
        return;
    }
#pragma unroll 4
    for (u32 i = thread; i < size; i += THREADS) {
        out[i] = from_f32<T>(value_of_row(codes[i], scales[row[i]]));
    }
}

// The definition: a thread for each value. The fast kernel must give the same bits.
template <typename T>
__device__ inline void dequantize_int8_rowwise_reference(const i8 *codes, const float *scales, T *out, i64 n, i64 columns) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n) {
        out[i] = from_f32<T>(value_of_row(codes[i], scales[i / columns]));
    }
}

// input:   [rows][columns] aligned to its elements
// codes:   [rows][columns] int8
// scales:  [rows]
// out:     [rows][columns] aligned to its elements; n = rows * columns
// columns: 1 and more on the way back
// Grid, in blocks of THREADS: any number to quantize, whose work is shared among those there are; ceil(n * sizeof(T) /
// TILE_BYTES) on the way back; ceil(rows / THREADS) and ceil(n / THREADS) for the references.
#define INSTANCE(name, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                         \
        quantize_int8_rowwise_##name(const T *input, i8 *codes, float *scales, i64 rows, i64 columns) {              \
        quantize_int8_rowwise<T>(input, codes, scales, rows, columns);                                               \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        quantize_int8_rowwise_reference_##name(const T *input, i8 *codes, float *scales, i64 rows, i64 columns) {    \
        quantize_int8_rowwise_reference<T>(input, codes, scales, rows, columns);                                     \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        dequantize_int8_rowwise_##name(const i8 *codes, const float *scales, T *out, i64 n, i64 columns) {           \
        dequantize_int8_rowwise<T>(codes, scales, out, n, columns);                                                  \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        dequantize_int8_rowwise_reference_##name(const i8 *codes, const float *scales, T *out, i64 n, i64 columns) { \
        dequantize_int8_rowwise_reference<T>(codes, scales, out, n, columns);                                        \
    }

INSTANCE(bf16, Bf16)
INSTANCE(f16, F16)
INSTANCE(f32, float)
