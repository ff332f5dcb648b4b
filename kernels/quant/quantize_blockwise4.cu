// quantize_blockwise4: values to 4-bit codes and one float32 scale per block, as rust/core/src/quant/blockwise4/scalar.rs
// defines them.
//
// Problem. Any number of values, any alignment, block sizes 32 to 4096; float32, float16, bfloat16; NF4 and FP4.
//
// Roofline. Memory: 2 or 4 bytes in, once, and half a byte of codes and 4 / blocksize of scales out, for each value. 14336 x
//   4096 in blocks of 64 from bfloat16 on an H100 (benches/RESULTS.md): 53.9 us, a kernel of the same traffic 52.8 (98 %);
//   4096 x 4096 97 %. With nested scales, quantize_absmax included, 57.9 us (91 %).
//
// Tile. 16384 values for a block of 512 threads, in four steps of 4096, the largest block of values:
//     thread t: values 8t ... 8t + 7 of a step -> one word of codes; while it works on them, those of the next step are on
//     their way. The 4 to 32 lanes that share a block of up to 256 values find its largest magnitude by shuffles; larger
//     blocks meet in shared memory.
//
//   A code is found by one look-up and one exact comparison instead of fifteen: the range is cut into cells so narrow that
//   none holds two thresholds, and a table has for each cell its threshold and the code below it.
//
// Shared memory. The cells (256 bytes); the largest magnitude of each warp in each step (256 bytes); the scales of the tile
//   (2 KB), which leave together at the end, and with them, where a tile has whole groups of 256 scales, the groups' sums:
//   the first launch of quantize_absmax.
//
// Budget. Four blocks of 512 threads on a multiprocessor, all that it has threads for, leave 32 registers; float32 values
//   take 40, so three. In flight: 16 bytes of 16-bit values a thread, 32 KB a multiprocessor.
//
// Determinism. The same bits everywhere: the largest magnitude does not depend on an order; NaN counts for no scale.
#include "common/vectors.cuh"
#include "common/scales.cuh"
#include "common/tree_sum.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
// Values that a thread packs into one word.
constexpr int GROUP = 8;
// Those of a thread: the kernel before may have made them.
template <typename T>
using Values = Eight<T, true>;
constexpr int STEP = THREADS * GROUP;
static_assert(STEP == 4096, "the largest block of values is quantized in one step");
// 256 blocks of 64 values.
constexpr int TILE = 16384;
constexpr int STEPS = TILE / STEP;
constexpr int MOST_SCALES = TILE / 32;
// Blocks of threads on a multiprocessor: as many as it has threads for, each with 32 registers. Four-byte values take more.
template <typename T>
constexpr int BLOCKS = sizeof(T) == 2 ? 4 : 3;

// The cell of a scaled value x is bits 2 to 6 of round(57 x) + 66: four of these steps to a cell, which is then a byte
// offset into a table of 32 words, one to a bank. -1 ... 1 lie in cells 2 ... 30. A cell is 0.070 wide, and the closest
// two thresholds are 0.0805 apart (NF4; of FP4 0.0833).
constexpr float STEPS_PER_UNIT = 57.0f;
constexpr float CENTRE = 66.0f;
constexpr int STEPS_PER_CELL = 4;
constexpr int CELLS = 32;
constexpr u32 CELL_BITS = (CELLS - 1) * STEPS_PER_CELL;
// No value lies there, and the bits of NaN do.
constexpr int NAN_CELL = 31;
// 1.5 * 2^23: a float32 of this size has no fraction, so that adding it rounds to an integer, in the low bits.
constexpr float ROUNDER = 12582912.0f;

// Looked up with masked_table.
struct alignas(128) Cells {
    float threshold[CELLS];  // in the cell, or more than any value
    u32 below[CELLS];        // the code, or rank, of what does not exceed it
};
// Bytes before each member.
constexpr u32 THRESHOLDS_AT = 0;
constexpr u32 BELOW_AT = CELLS * 4;

// The table, when compiling. Cells follow one another as values do: what is in a higher cell than a threshold exceeds it.
// Where exactly they meet does not matter, for no threshold is within 0.003 of such a place.
template <int LEVELS>
__device__ constexpr Cells cells_for(const float (&thresholds)[LEVELS]) {
    Cells cells = {};
    for (int cell = 0; cell < CELLS; cell++) {
        cells.threshold[cell] = 3.402823466e38f;
    }
    for (int level = 0; level < LEVELS; level++) {
        const int own = int(thresholds[level] * STEPS_PER_UNIT + CENTRE + 0.5f) / STEPS_PER_CELL;
        cells.threshold[own] = thresholds[level];
        for (int cell = own + 1; cell < NAN_CELL; cell++) {
            cells.below[cell]++;
        }
    }
    return cells;
}

GLOBAL_TABLE Cells CELLS_OF[2] = {cells_for(NF4_THRESHOLDS), cells_for(FP4_THRESHOLDS)};

template <u32 QUANT_TYPE>
__device__ inline const float *thresholds() {
    return QUANT_TYPE == NF4 ? NF4_THRESHOLDS : FP4_THRESHOLDS;
}

template <u32 QUANT_TYPE>
constexpr int LEVELS = QUANT_TYPE == NF4 ? NF4_LEVELS : FP4_LEVELS;

template <u32 QUANT_TYPE>
__device__ inline u32 code_reference(float scaled) {
    const float x = QUANT_TYPE == NF4 ? scaled : fabsf(scaled);
    u32 rank = 0;
    for (int level = 0; level < LEVELS<QUANT_TYPE>; level++) {
        rank += x > thresholds<QUANT_TYPE>()[level];
    }
    if (QUANT_TYPE == NF4) {
        return rank;
    }
    const u32 code_of_rank = 0x32547610;  // a nibble for each rank
    return ((code_of_rank >> (4 * rank)) & 7) | (scaled < 0.0f ? 8 : 0);
}

// The ranks of eight values, the first in the highest nibble. EXTREME is for blocks whose reciprocal is not an ordinary
// number: there scaled values may be infinite.
template <u32 QUANT_TYPE, bool EXTREME, typename T>
__device__ inline u32 ranks_of(const Values<T> &x, float inverse, MaskedTable cells) {
    const float steps = __fmul_rn(inverse, STEPS_PER_UNIT);
    // Two sums, so that neither waits for the other.
    u32 below = 0, above = 0;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
        const u32 one = 1u << (4 * (GROUP - 1 - k));
        const float scaled = __fmul_rn(x[k], inverse);
        float value = QUANT_TYPE == NF4 ? scaled : fabsf(scaled);
        float step;
        if (EXTREME) {
            // What is beyond 1 has the code of 1; NaN becomes -1, which has code 0.
            value = fminf(fmaxf(value, -1.0f), 1.0f);
            step = multiply_add(value, STEPS_PER_UNIT, ROUNDER + CENTRE);
        } else {
            step = multiply_add(QUANT_TYPE == NF4 ? x[k] : fabsf(x[k]), steps, ROUNDER + CENTRE);
        }
        const u32 bits = __float_as_uint(step);
        below = below * 16 + look_up<CELL_BITS, BELOW_AT>(cells, bits);
        // NaN exceeds nothing, and below its cell there is no threshold.
        const float threshold = __uint_as_float(look_up<CELL_BITS, THRESHOLDS_AT>(cells, bits));
        above += value > threshold ? one : 0;
        if (QUANT_TYPE == FP4) {
            above += scaled < 0.0f ? 8 * one : 0;
        }
    }
    return below + above;
}

// The codes of eight values of a block whose largest magnitude is `max`, as they lie in memory.
template <u32 QUANT_TYPE, typename T>
__device__ inline u32 codes_of_group(const Values<T> &x, float max, MaskedTable cells) {
    u32 ranks;
    if (max >= 0x1p-120f && max < 0x1p126f) {
        // The bits of __frcp_rn, which does the same behind a test of the range: an approximation and a step of Newton's.
        const float near = reciprocal_near(max);
        const float inverse = multiply_add(near, multiply_add(-max, near, 1.0f), near);
        ranks = ranks_of<QUANT_TYPE, false>(x, inverse, cells);
    } else {
        ranks = ranks_of<QUANT_TYPE, true>(x, __frcp_rn(max), cells);
    }
    if (QUANT_TYPE == FP4) {
        // The codes of the ranks 0 ... 7 are 0, 1, 6, 7, 4, 5, 2, 3: bit 2 is inverted where bit 1 is set.
        ranks ^= (ranks & 0x22222222u) << 1;
    }
    // The first value is in the highest nibble; in memory it is in the high nibble of the first byte.
    return permute_bytes(ranks, 0, 0x0123);
}

// The largest magnitude among the values of eight that share a block within a warp: 4 to 32 lanes.
template <typename T>
__device__ inline float largest_of_lanes(const Values<T> &x, int block_shift) {
    float max = x.largest();
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        if (lanes < 4 || lanes * GROUP < 1 << block_shift) {
            max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, lanes));
        }
    }
    return max;
}

template <typename T, u32 QUANT_TYPE>
__device__ inline void quantize(const T *input, u8 *packed, float *absmax, double *sums, i64 n, int block_shift) {
    SHARED_ARRAY(Cells, cells, );
    SHARED_ARRAY(float, warp_max, [STEPS][WARPS]);
    SHARED_ARRAY(float, scales, [MOST_SCALES]);
    wait_for_previous();
    let_next_start();

    const u32 thread = threadIdx.x, lead = thread * GROUP;
    const i64 base = i64(blockIdx.x) * TILE;
    const u32 size = u32(n - base < TILE ? n - base : TILE);
    const bool aligned = is_aligned(input, 16) && is_aligned(packed, 4);
    const bool ordinary = aligned && size == TILE && block_shift <= 8;
    input += base + lead;
    packed += base / 2 + lead / 2;

    Values<T> next;
    if (ordinary) {
        next.load(input);
    }
    if (thread < CELLS) {
        cells.threshold[thread] = CELLS_OF[QUANT_TYPE].threshold[thread];
        cells.below[thread] = CELLS_OF[QUANT_TYPE].below[thread];
    }
    __syncthreads();

    const MaskedTable table = masked_table(&cells);
    const bool first_of_block = (lead & ((1u << block_shift) - 1)) == 0;
    float *const own_scale = &scales[lead >> block_shift];
    const u32 scales_per_step = u32(STEP) >> block_shift;
    if (ordinary) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const Values<T> x = next;
            if (step + 1 < STEPS) {
                next.load(input + (step + 1) * STEP);
            }
            const float max = largest_of_lanes(x, block_shift);
            if (first_of_block) {
                own_scale[step * scales_per_step] = max;
            }
            *reinterpret_cast<u32 *>(packed + step * (STEP / 2)) = codes_of_group<QUANT_TYPE>(x, max, table);
        }
    } else {
        // The same for anything: an end of the tensor, any alignment, blocks of more than one warp.
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
            const u32 i = step * STEP + lead;
            const u32 count = i >= size ? 0 : size - i < GROUP ? size - i : GROUP;
            const bool wide = aligned && count == GROUP;
            Values<T> x;
            if (wide) {
                x.load(input + step * STEP);
            } else {
                x.load_some(input + step * STEP, count);
            }
            float max = largest_of_lanes(x, block_shift);
            if (block_shift > 8) {
                if (thread % WARP == 0) {
                    warp_max[step][thread / WARP] = max;
                }
                __syncthreads();
                const u32 warps = 1u << (block_shift - 8);
                const u32 first = thread / WARP & ~(warps - 1);
#pragma unroll 1
                for (u32 k = 0; k < warps; k++) {
                    max = fmaxf(max, warp_max[step][first + k]);
                }
            }
            if (first_of_block) {
                own_scale[step * scales_per_step] = max;
            }
            const u32 codes = codes_of_group<QUANT_TYPE>(x, max, table);
            if (wide) {
                *reinterpret_cast<u32 *>(packed + step * (STEP / 2)) = codes;
            } else {
#pragma unroll 1
                for (u32 k = 0; k < count; k += 2) {
                    packed[(step * STEP + k) / 2] = u8(codes >> (4 * k));
                }
            }
        }
    }
    __syncthreads();

    const u32 count = ((size - 1) >> block_shift) + 1;
    absmax += base >> block_shift;
#pragma unroll 1
    for (u32 i = thread; i < count; i += THREADS) {
        absmax[i] = scales[i];
    }
    const u32 warp = thread / WARP;
    if (sums != nullptr && warp * SUM_GROUP < count) {
        const double sum = group_sum(&scales[0], int(count), int(warp), int(thread % WARP));
        if (thread % WARP == 0) {
            sums[(base >> block_shift) / SUM_GROUP + warp] = sum;
        }
    }
}

// The definition: a thread for each block. The fast kernel must give the same bits.
template <typename T, u32 QUANT_TYPE>
__device__ inline void quantize_reference(const T *input, u8 *packed, float *absmax, i64 n, int block_shift) {
    const i64 block = i64(blockIdx.x) * THREADS + threadIdx.x;
    const i64 first = block << block_shift;
    if (first >= n) {
        return;
    }
    const i64 last = n - first < (i64(1) << block_shift) ? n : first + (i64(1) << block_shift);
    float max = 0.0f;
    for (i64 i = first; i < last; i++) {
        max = fmaxf(max, fabsf(to_f32(input[i])));
    }
    absmax[block] = max;
    const float inverse = __frcp_rn(max);
    for (i64 i = first; i < last; i += 2) {
        const u32 high = code_reference<QUANT_TYPE>(__fmul_rn(to_f32(input[i]), inverse));
        const float second = i + 1 < last ? to_f32(input[i + 1]) : 0.0f;
        packed[i / 2] = u8(high << 4 | code_reference<QUANT_TYPE>(__fmul_rn(second, inverse)));
    }
}

// input:       [n] aligned to its elements
// packed:      [ceil(n / 2)] any alignment; two codes to a byte, the earlier in the high nibble
// absmax:      [ceil(n / blocksize)]
// sums:        [ceil(n / blocksize / 256)] of 256 scales each, as quantize_absmax_sums writes them; or null. Only for blocks of
//              32 or 64, of which a tile has whole groups.
// block_shift: log2 of the block size, 5 to 12
// Grid: ceil(n / TILE) blocks of THREADS, which may start early; the reference ceil(blocks / THREADS).
#define INSTANCE(name, T, quant_type)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS<T>)                                                  \
        quantize_blockwise4_##name(const T *input, u8 *packed, float *absmax, double *sums, i64 n, int block_shift) { \
        quantize<T, quant_type>(input, packed, absmax, sums, n, block_shift);                                         \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        quantize_blockwise4_reference_##name(const T *input, u8 *packed, float *absmax, i64 n, int block_shift) {     \
        quantize_reference<T, quant_type>(input, packed, absmax, n, block_shift);                                     \
    }

INSTANCE(bf16_nf4, Bf16, NF4)
INSTANCE(f16_nf4, F16, NF4)
INSTANCE(f32_nf4, float, NF4)
INSTANCE(bf16_fp4, Bf16, FP4)
INSTANCE(f16_fp4, F16, FP4)
INSTANCE(f32_fp4, float, FP4)
