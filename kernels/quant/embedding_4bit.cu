// embedding_4bit: rows of a packed table, out[i][c] = round_to_T(VALUES[code] * scale) of row indices[i]: the bits of
// dequantize_blockwise4. A row that the table does not have is NaN, for a kernel cannot ask and must not fail.
//
// Problem. int32 or int64 indices of any value; up to 2^30 columns, any alignment; blocks of scales run on from row to row.
//
// Roofline. Memory: half a byte of codes in and 2 or 4 bytes out for each value, and 4 or 8 bytes of index for each row. Not in
//   benches/RESULTS.md.
//
// Tile. 8192 values of the output for a block of 256 threads, as in dequantize_blockwise4, eight to a thread at a time: short
//   rows and long ones keep all threads busy. The row of a value costs one division by 32 bits.
//
// Shared memory. The 16 values, and the map of nested scales (1 KB).
//
// Budget. All indices of a thread are on the way before the first is used, then all its codes and scales: four of each.
//   __launch_bounds__(256, 4) leaves 64 registers; 32 to 40 are taken.
//
// Determinism. The same bits everywhere.
#include "common/vectors.cuh"
#include "common/scales.cuh"

constexpr int THREADS = 256;
// Values of one 32-bit word of codes: a thread's share at a time. Every block size is a multiple of it.
constexpr int GROUP = 8;
// Words in flight in each thread, and indices before them.
constexpr int DEPTH = 4;
constexpr int STRIDE = THREADS * GROUP;
constexpr int TILE = STRIDE * DEPTH;
// Where a row is that the table does not have, or a value beyond the last.
constexpr i64 NOWHERE = -1;

// The indices, int32 or int64.
struct Indices {
    const void *first;
    u32 size;  // of one in bytes, 4 or 8
    i64 rows;  // those from 0 up to this exist

    // Index i, or NOWHERE.
    __device__ i64 operator[](i64 i) const {
        const i64 row = size == 8 ? static_cast<const i64 *>(first)[i] : i64(static_cast<const int *>(first)[i]);
        return u64(row) < u64(rows) ? row : NOWHERE;
    }
};

// A scale that makes every value NaN.
template <bool NESTED>
__device__ inline RawScale<NESTED> scale_of_nothing() {
    const float nan = __uint_as_float(0x7fffffffu);
    if constexpr (NESTED) {
        return {0, nan};
    } else {
        return {nan};
    }
}

template <bool NESTED>
__device__ inline RawScale<NESTED> scale_at(const Scales &scales, i64 at, int block_shift) {
    return at == NOWHERE ? scale_of_nothing<NESTED>() : ScaleReader<NESTED>(scales, at >> block_shift)[0];
}

// The code of value `at` of the table; without one, any.
__device__ inline u32 code_at(const u8 *packed, i64 at) {
    if (at == NOWHERE) {
        return 0;
    }
    const u32 byte = packed[at / 2];
    return at % 2 == 0 ? byte >> 4 : byte & 15;
}

template <typename T, bool NESTED>
__device__ inline void embedding(const Indices &indices, const u8 *packed, const Scales &scales, T *out, i64 n, u32 columns,
                                 int block_shift, u32 quant_type) {
    SHARED_ARRAY(float, values, [16]);
    SHARED_ARRAY(float, map, [NESTED ? 256 : 1]);
    static_assert(THREADS >= 256, "one thread for each value of the map");

    const u32 thread = threadIdx.x;
    const i64 base = i64(blockIdx.x) * TILE;
    const u32 size = u32(n - base < TILE ? n - base : TILE);
    out += base;
    const i64 first = i64(u64(base) / columns);
    const u32 begin = u32(base - first * columns);
    const float offset = NESTED ? *scales.offset : 0.0f;
    // Where value i of the tile is in the table.
    const auto place = [&](u32 i) {
        const u32 row = (begin + i) / columns;
        const i64 index = indices[first + row];
        return index == NOWHERE ? NOWHERE : index * columns + (begin + i - row * columns);
    };

    if (thread < 16) values[thread] = VALUES[quant_type][thread];
    if (NESTED) map[thread] = DYNAMIC_MAP[thread];
    __syncthreads();

    if (columns % GROUP != 0 || !is_aligned(packed, 4) || !is_aligned(out, 16)) {
        // Neighbouring threads read neighbouring codes, from cache mostly.
#pragma unroll 4
        for (u32 i = thread; i < size; i += THREADS) {
            const i64 at = place(i);
            const float scale = scale_at<NESTED>(scales, at, block_shift).value(map, offset);
            out[i] = from_f32<T>(__fmul_rn(values[code_at(packed, at)], scale));
        }
        return;
    }

    i64 at[DEPTH];
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        at[d] = i < size ? place(i) : NOWHERE;
    }
    u32 words[DEPTH];
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        words[d] = at[d] == NOWHERE ? 0 : load_stream(reinterpret_cast<const u32 *>(packed + at[d] / 2));
    }
    RawScale<NESTED> raw[DEPTH];
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        raw[d] = scale_at<NESTED>(scales, at[d], block_shift);
    }
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
        const u32 i = thread * GROUP + d * STRIDE;
        if (i < size) {
            const float scale = raw[d].value(map, offset);
            float x[GROUP];
#pragma unroll
            for (int j = 0; j < GROUP / 2; j++) {
                // Four times the code is the offset of its value: the mask keeps the code at bits 2 to 5.
                const u32 high = (words[d] >> (8 * j + 2)) & 0x3c;
                const u32 low = (j == 0 ? words[d] << 2 : words[d] >> (8 * j - 2)) & 0x3c;
                x[2 * j] = __fmul_rn(at_byte(values, high), scale);
                x[2 * j + 1] = __fmul_rn(at_byte(values, low), scale);
            }
#pragma unroll
            for (int j = 0; j < GROUP; j += PER_STORE<T>) {
                store_values(out + i + j, x + j);
            }
        }
    }
}

// The definition: a thread for each value. The fast kernel must give the same bits.
template <typename T, bool NESTED>
__device__ inline void embedding_reference(const Indices &indices, const u8 *packed, const Scales &scales, T *out, i64 n,
                                           u32 columns, int block_shift, u32 quant_type) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) {
        return;
    }
    const i64 index = indices[i / columns];
    const i64 at = index == NOWHERE ? NOWHERE : index * columns + i % columns;
    const float offset = NESTED ? *scales.offset : 0.0f;
    const float scale = scale_at<NESTED>(scales, at, block_shift).value(DYNAMIC_MAP, offset);
    out[i] = from_f32<T>(__fmul_rn(VALUES[quant_type][code_at(packed, at)], scale));
}

// indices:     [n / columns] int32 or int64, of any value: one below 0 or not below `rows` makes NaN of its row
// packed:      [ceil(rows * columns / 2)] any alignment; two codes to a byte, the earlier in the high nibble
// scales:      of ceil(rows * columns / blocksize) blocks, which run on from row to row
// out:         [n] aligned to its elements
// columns:     1 to 2^30: inside a tile 32 bits are enough for any place
// block_shift: log2 of the block size, 5 to 12
// quant_type:  NF4 or FP4
// Grid: ceil(n / TILE) blocks of THREADS; the reference ceil(n / THREADS).
#define INSTANCE(name, T, nested)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                          \
        embedding_4bit_##name(Indices indices, const u8 *packed, Scales scales, T *out, i64 n, u32 columns,           \
                         int block_shift, u32 quant_type) {                                                           \
        embedding<T, nested>(indices, packed, scales, out, n, columns, block_shift, quant_type);                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        embedding_4bit_reference_##name(Indices indices, const u8 *packed, Scales scales, T *out, i64 n, u32 columns, \
                                   int block_shift, u32 quant_type) {                                                 \
        embedding_reference<T, nested>(indices, packed, scales, out, n, columns, block_shift, quant_type);            \
    }

INSTANCE(bf16, Bf16, false)
INSTANCE(f16, F16, false)
INSTANCE(f32, float, false)
INSTANCE(bf16_nested, Bf16, true)
INSTANCE(f16_nested, F16, true)
INSTANCE(f32_nested, float, true)
