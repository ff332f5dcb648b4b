// quantize_absmax: float32 scales to 8-bit codes ("double quantization"), as rust/core/src/quant/absmax/mod.rs defines them:
// offset = mean of all scales, then scale - offset in blocks of 256 with the dynamic map.
//
// Problem. Any number of scales. Two launches: `quantize_absmax_sums` writes the float64 sum of each group of 256 (of blocks of
//   32 and 64 values quantize_blockwise4 has done so already), `quantize_absmax` adds these up, which is the mean, and
//   quantizes. The second takes 256 * 256 sums at most: `quantize_absmax_sums_of_sums` makes fewer of more.
//
// Roofline. Memory, but for launches: 4 bytes in and one out for each scale, which are a 64th of the weight's values. What
//   counts is the fixed cost. After quantize_blockwise4 it takes 4.0 us more for 14336 x 4096 in blocks of 64 on an H100
//   (57.9 in place of 53.9; benches/RESULTS.md), and 3.2 us for 4096 x 4096.
//
// Tile. A group of 256 scales for each warp, 16 warps to a block of threads; a lane has four scales in a row and four more 128
//   later, the next group's being on their way. Every block of threads adds up all the sums for itself: 8 bytes for 256
//   scales, from the second-level cache, which spares a launch and a wait between blocks.
//   A code is found by one look-up in a table indexed by the upper bits of the magnitude; adding the lower bits carries over
//   into the next code where the value exceeds the boundary in its cell.
//
// Shared memory. The cells of the look-up (5.6 KB), copied from global memory while the kernel before still runs; the sums
//   of sums (2 KB); the mean.
//
// Budget. Two blocks of 512 threads on a multiprocessor: 64 registers, of which 55 are taken. As many blocks are launched.
//
// Determinism. The sum is a binary tree of fixed shape (common/tree_sum.cuh): the same bits everywhere.
#include "common/tree_sum.cuh"
#include "common/tables.cuh"

constexpr int GROUP = 256;
static_assert(GROUP == SUM_GROUP, "scales are summed in the groups in which they are quantized");
constexpr int WARPS = 16;
constexpr int THREADS = WARPS * WARP;
// Values of a group that a lane has.
constexpr int PER_LANE = GROUP / WARP;
// Blocks of threads on a multiprocessor, and how many there are for each in a launch: each reads all the sums.
constexpr int BLOCKS = 2;

template <typename V>
__device__ inline void write_sums(const V *values, double *sums, i64 n) {
    const i64 group = i64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    const int lane = int(threadIdx.x) % WARP;
    if (group * GROUP < n) {
        const double sum = group_sum(values, n, group, lane);
        if (lane == 0) {
            sums[group] = sum;
        }
    }
}

// values: [n]   sums: [ceil(n / 256)]   Grid: ceil(n / (256 * WARPS)) blocks of THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) quantize_absmax_sums(const float *values, double *sums, i64 n) {
    write_sums(values, sums, n);
}
extern "C" __global__ void __launch_bounds__(THREADS) quantize_absmax_sums_of_sums(const double *values, double *sums, i64 n) {
    write_sums(values, sums, n);
}

// Codes by magnitude. The map is symmetric but for its last value, 1: code 127 + r means what code 127 - r means, negated.
// r is the rank of the magnitude: how many boundaries it exceeds. A boundary is midway between two values; a value there
// has the even of the two codes, which is the odd rank: so it exceeds the boundary above an even rank.
constexpr int ZERO = 127;
constexpr int RANKS = 256 - ZERO;

// The bits of a positive float32, in constant expressions.
__device__ constexpr u32 bits_of(float value) {
    u32 exponent = 127;
    for (; value < 1.0f; value *= 2.0f) {
        exponent--;
    }
    return exponent << 23 | u32((value - 1.0f) * 0x1p23f);
}

// A cell is the float32 that share an exponent and 6 bits of the fraction: 1/128 wide below 1, and narrower further down. No
// cell holds two boundaries.
constexpr int CELL_SHIFT = 17;
constexpr u32 IN_CELL = (1u << CELL_SHIFT) - 1;
// The first boundary is 2.75e-7, more than 2^-22; what is below is in the cell before. The last cell begins with 1.
constexpr float LEAST = 0x1.fffffep-23f;
constexpr u32 FIRST_CELL = bits_of(LEAST) >> CELL_SHIFT;
constexpr u32 LAST_CELL = bits_of(1.0f) >> CELL_SHIFT;
constexpr int CELLS = int(LAST_CELL - FIRST_CELL) + 1;
// Words of 16 bytes.
constexpr int TABLE_WORDS = (CELLS + 3) / 4;
static_assert(TABLE_WORDS <= THREADS, "each thread copies one at most");

// Of each cell the rank below its boundary, times 2^17, plus what a value in it must have in its lower bits to carry over
// into the next rank when they are added.
struct alignas(16) Ranks {
    u32 cell[TABLE_WORDS * 4];
};

__device__ constexpr Ranks ranks_of_cells() {
    Ranks ranks = {};
    u32 next = FIRST_CELL;
    for (int rank = 0; rank < RANKS; rank++) {
        // The largest that does not exceed the boundary; of the last rank there is none.
        u32 last = LAST_CELL << CELL_SHIFT | IN_CELL;
        if (rank + 1 < RANKS) {
            const float middle = (DYNAMIC_MAP[ZERO + rank] + DYNAMIC_MAP[ZERO + rank + 1]) * 0.5f;
            last = bits_of(middle) - (rank % 2 == 0 ? 1 : 0);
        }
        for (; next < last >> CELL_SHIFT; next++) {
            ranks.cell[next - FIRST_CELL] = u32(rank) << CELL_SHIFT;
        }
        ranks.cell[next - FIRST_CELL] = (u32(rank) << CELL_SHIFT) + IN_CELL - (last & IN_CELL);
        next++;
    }
    return ranks;
}

constexpr GLOBAL_TABLE Ranks RANKS_OF_CELLS = ranks_of_cells();

__device__ inline u32 code_of(float scaled, const u32 *ranks) {
    // What is beyond 1 has the code of 1; NaN becomes -1, which has code 0.
    const float x = fminf(fmaxf(scaled, -1.0f), 1.0f);
    const u32 bits = __float_as_uint(fmaxf(fabsf(x), LEAST));
    const int rank = int((ranks[(bits >> CELL_SHIFT) - FIRST_CELL] + (bits & IN_CELL)) >> CELL_SHIFT);
    return u32(x < 0.0f ? max(ZERO - rank, 0) : ZERO + rank);
}

// The definition: the code is the number of boundaries that a scaled value exceeds. A value midway between two of the map
// has the even of the two codes: above an odd one the boundary is the next float32 below the middle, unless that is the value.
__device__ inline float boundary(int code) {
    const float value = DYNAMIC_MAP[code];
    const float middle = __fmul_rn(__fadd_rn(value, DYNAMIC_MAP[code + 1]), 0.5f);
    if (code % 2 == 0 || !(middle > value)) {
        return middle;
    }
    // No middle of two values of the map is zero.
    const u32 bits = __float_as_uint(middle);
    return __uint_as_float(middle > 0.0f ? bits - 1 : bits + 1);
}

__device__ inline u32 code_reference(float scaled) {
    u32 code = 0;
    for (int k = 0; k < GROUP - 1; k++) {
        code += scaled > boundary(k);
    }
    return code;
}

// A lane's values of a group: four in a row, from 4 * lane on, and four in a row 128 later.
struct LaneScales {
    float x[PER_LANE];

    static __device__ int place(int k, int lane) { return k / 4 * 4 * WARP + 4 * lane + k % 4; }

    // NaN behind the last, which counts for nothing. `wide`: absmax is a multiple of 16.
    __device__ void load(const float *absmax, i64 n, i64 group, int lane, bool wide) {
        const i64 first = group * GROUP;
        if (wide && n - first >= GROUP) {
#pragma unroll
            for (int k = 0; k < PER_LANE; k += 4) {
                const Words4 words = *reinterpret_cast<const Words4 *>(absmax + first + place(k, lane));
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    x[k + j] = __uint_as_float(words.word[j]);
                }
            }
        } else {
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                const i64 i = first + place(k, lane);
                x[k] = i < n ? absmax[i] : __uint_as_float(0x7fffffffu);
            }
        }
    }

    // Takes the mean off, and gives the largest magnitude of the group.
    __device__ float centre(float mean) {
        float max = 0.0f;
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            x[k] = __fsub_rn(x[k], mean);
            max = fmaxf(max, fabsf(x[k]));  // passes NaN over
        }
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, step));
        }
        return max;
    }
};

// The mean of the `n` values whose group sums these are, by all threads together; of nothing 0. `second` is for the sums of
// those sums, and `part` is this lane's part of the first that its warp adds.
__device__ inline float mean_of(
    double (&part)[SUM_PER_LANE], double (&second)[GROUP], float &mean, const double *sums, int sum_count, i64 n) {
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
    const int count = (sum_count + GROUP - 1) / GROUP;
    for (int s = warp; s < count; s += WARPS) {
        double now[SUM_PER_LANE];
#pragma unroll
        for (int k = 0; k < SUM_PER_LANE; k++) {
            now[k] = part[k];
        }
        if (s + WARPS < count) {
            load_group(part, sums, sum_count, s + WARPS, lane);
        }
        const double sum = tree_sum(now);
        if (lane == 0) {
            second[s] = sum;
        }
    }
    __syncthreads();
    if (warp == 0) {
        // One sum is its own tree: adding zeros changes nothing.
        const double total = group_sum(&second[0], count, 0, lane);
        if (lane == 0) {
            mean = n > 0 ? float(total / double(n)) : 0.0f;
        }
    }
    __syncthreads();
    return mean;
}

// absmax:    [n] float32
// sums:      [sum_count] of groups of absmax, or of groups of sums, ...; at most 256 * 256
// codes:     [n]
// absmax2:   [ceil(n / 256)]
// offset:    [1]
// Grid: ceil(n / (256 * WARPS)) blocks of THREADS or fewer, at least one; they may start early.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    quantize_absmax(const float *absmax, const double *sums, i64 sum_count, u8 *codes, float *absmax2, float *offset, i64 n) {
    SHARED_ARRAY(Ranks, ranks, );
    SHARED_ARRAY(double, second_sums, [GROUP]);
    SHARED_ARRAY(float, mean_of_all, [1]);

    const int thread = int(threadIdx.x);
    const int lane = thread % WARP, warp = thread / WARP;
    const bool wide = is_aligned(absmax, 16) && is_aligned(codes, 4);
    i64 group = i64(blockIdx.x) * WARPS + warp;

    // All that is read first is on its way before the first of it is used.
    Words4 table = {};
    if (thread < TABLE_WORDS) {
        table = reinterpret_cast<const Words4 *>(RANKS_OF_CELLS.cell)[thread];
    }
    wait_for_previous();
    let_next_start();
    LaneScales next;
    next.load(absmax, n, group, lane, wide);
    double part[SUM_PER_LANE];
    load_group(part, sums, int(sum_count), warp, lane);
    if (thread < TABLE_WORDS) {
        reinterpret_cast<Words4 *>(ranks.cell)[thread] = table;
    }
    const float mean = mean_of(part, second_sums, mean_of_all[0], sums, int(sum_count), n);
    if (blockIdx.x == 0 && thread == 0) {
        *offset = mean;
    }

    const i64 stride = i64(gridDim.x) * WARPS;
    for (; group * GROUP < n; group += stride) {
        LaneScales scales = next;
        if ((group + stride) * GROUP < n) {
            next.load(absmax, n, group + stride, lane, wide);
        }
        const float max = scales.centre(mean);
        if (lane == 0) {
            absmax2[group] = max;
        }
        const float inverse = __frcp_rn(max);
        u32 words[PER_LANE / 4] = {};
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            words[k / 4] |= code_of(__fmul_rn(scales.x[k], inverse), ranks.cell) << (8 * (k % 4));
        }
        if (wide && n - group * GROUP >= GROUP) {
#pragma unroll
            for (int k = 0; k < PER_LANE; k += 4) {
                *reinterpret_cast<u32 *>(codes + group * GROUP + LaneScales::place(k, lane)) = words[k / 4];
            }
        } else {
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                const i64 i = group * GROUP + LaneScales::place(k, lane);
                if (i < n) {
                    codes[i] = u8(words[k / 4] >> (8 * (k % 4)));
                }
            }
        }
    }
}

// The definition of the last step: a thread for each group of 256, given the offset. The fast kernel must give the same bits.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_absmax_reference(const float *absmax, const float *offset, u8 *codes, float *absmax2, i64 n) {
    const i64 group = i64(blockIdx.x) * THREADS + threadIdx.x;
    const i64 first = group * GROUP, last = n - first < GROUP ? n : first + GROUP;
    if (first >= n) {
        return;
    }
    float max = 0.0f;
    for (i64 i = first; i < last; i++) {
        max = fmaxf(max, fabsf(__fsub_rn(absmax[i], *offset)));
    }
    absmax2[group] = max;
    const float inverse = __frcp_rn(max);
    for (i64 i = first; i < last; i++) {
        codes[i] = u8(code_reference(__fmul_rn(__fsub_rn(absmax[i], *offset), inverse)));
    }
}
