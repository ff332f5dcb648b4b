// gemm_4bit_small_m_sm90_one: the product of gemm_4bit_small_m_sm90.cuh for one row of x, which fits in shared memory.
//
// The matrix units take eight columns of x and here is one. So the eight columns are the one row's eight blocks of a k-slice:
// block j of W is multiplied by all eight, its own product is column j, and the others are thrown away. A lane then has 8
// registers of x for eight blocks instead of 64, what all warps fetch of x is x once, K is one round whatever its length, and
// a lane needs the scales of two blocks, not of eight.
//
//     x^T [64][8]: column j is block j        sums [16][8]: of block j column j alone      lane 4g + t keeps of blocks 2t
//                                                                                          and 2t + 1 rows g and g + 8
//
// The tile, the stages and the table are those of gemm_4bit_small_m_sm90.cuh; a warp walks over the k-tiles of a step first,
// then over the steps. How many k-slices there are is what leaves a warp the fewest work items.
//
// Roofline. As there; blocks of 64, bfloat16, on an H200, in microseconds (the floor reads codes and scales once; before: the
//   kernels for eight rows):
//                          floor    plain   before      nested   before
//     4096 x 4096            3.8     5.1      5.5         5.4      5.8
//     14336 x 4096           9.1    10.9     11.8        11.7     13.0
//     4096 x 14336           9.1    11.5     13.3        12.5     14.8
//     3072 x 8192            5.0     7.6      8.2         8.2      8.9
//     8192 x 28672          30.7    37.7     43.0        39.4     45.8
//
// Tried, and slower or no faster: two stages on the way instead of three (0.4 us more at 4096 x 14336); x of several k-tiles
//   from global memory, a work item ahead (12.2 there), of one k-tile from shared memory (11.9 at 14336 x 4096); sums of a step
//   added up by shuffles; both programs in one (28672 x 8192 took 38.7 instead of 37.5); nested scales made by the warp for all
//   of its lanes, as the other kernels do (12.2 at 14336 x 4096, 13.1 at 4096 x 14336, 42.8 at 8192 x 28672).
//
// Shared memory, 224 KB: map, x where there are several k-tiles, sums [steps of a pass][8 warps][16 rows][4 lanes] float32,
//   table, and three stages for each warp: 96 KB are on the way, x holding none of it up.
#pragma once

#include "gemm/small_m_sm90/pipeline.cuh"

struct OneRow {
    static constexpr int K_SLICE = COLUMNS, QUADS = K_SLICE / 4, X_K_TILES = 1 << 20;
    static constexpr int AHEAD = 3, STAGES = AHEAD;
    static constexpr int STAGE_BYTES = ROWS * K_SLICE * BLOCK_BYTES;
};
// Sums of a warp for a step: [row][lane t].
constexpr int ONE_ROW_SUMS = ROWS * 4;
// Of x for a k-slice, in pieces of 16 bytes.
constexpr int ONE_ROW_PIECES = OneRow::K_SLICE * BLOCK * 2 / 16;

// Where a piece of x lies in shared memory: the eight lanes that read at a time, each the first or the second of its two
// pieces, are in different banks.
__device__ inline int place_of_piece(int piece) { return piece ^ (piece >> 3 & 1); }

// SEVERAL: whether there are several k-tiles. With one, x stays in registers.
template <typename T, bool NESTED, bool SEVERAL>
__device__ inline void one_row_product(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int n, int k,
                                       int block_shift, u32 quant_type, const LaunchConfig &config) {
    using R = OneRow;
    constexpr int K_SLICE = R::K_SLICE, AHEAD = R::AHEAD, STAGE_BYTES = R::STAGE_BYTES;
    DYNAMIC_SHARED(shared);
    const Partition<K_SLICE> partition(n, k, config);
    const int k_tiles = SEVERAL ? partition.k_tiles : 1;
    float *const map = reinterpret_cast<float *>(shared);                       // [256]
    Words4 *const x_words = reinterpret_cast<Words4 *>(shared + MAP_BYTES);     // [pieces]
    const int pieces = SEVERAL ? k_tiles * partition.k_slices * ONE_ROW_PIECES : 0;
    float *const all_sums = reinterpret_cast<float *>(x_words + pieces);        // [step][WARPS][ONE_ROW_SUMS]
    const u32 before = MAP_BYTES + u32(pieces) * u32(sizeof(Words4)) +
                       u32(config.per_pass * WARPS * ONE_ROW_SUMS) * u32(sizeof(float));
    const u32 place_of_table = before + lane_table_place(shared + before);
    u32 *const table = reinterpret_cast<u32 *>(shared + place_of_table);  // [256][LANE_TABLE_ROW], half used
    const int shift = block_shift - BLOCK_SHIFT;

    // All that can be done while the kernel before still runs.
    fetch_ahead<NESTED>(packed, scales, partition, shift, config);
    fill_map<NESTED, THREADS>(map);
    fill_table<T, THREADS>(table, quant_type);
    __syncthreads();
    wait_for_previous();
    let_next_start();

    Pipeline<NESTED, R> pipeline(partition, scales, packed, shared + (place_of_table + LANE_TABLE_BYTES), table, shift, n);
    pipeline.copy(0);
    const float offset = NESTED ? *scales.offset : 0.0f;
    const int lane = int(threadIdx.x % WARP), g = lane / 4, t = lane % 4;
    // This lane's two pieces of x for a k-slice: of block g the values 16t ... 16t + 15.
    u32 b[1][8];
    const auto set = [&](const Words4 &first, const Words4 &second) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b[0][i] = first.word[i];
            b[0][4 + i] = second.word[i];
        }
    };
    if constexpr (SEVERAL) {
        // Zeros behind the last.
        for (int i = int(threadIdx.x); i < pieces; i += THREADS) {
            const bool there = i < k / 8;
            copy_async(x_words + place_of_piece(i), reinterpret_cast<const Words4 *>(x) + (there ? i : 0), there ? 16 : 0);
        }
        copy_async_commit();
    } else {
        const bool there = g < partition.blocks(0);
        const Words4 *const from = reinterpret_cast<const Words4 *>(x) + (partition.first_block(0) * (BLOCK / 8) + lane * 2);
        set(there ? load_shared_line(from) : Words4{}, there ? load_shared_line(from + 1) : Words4{});
    }
#pragma unroll 1
    for (u32 stage = 1; stage < AHEAD; stage++) {
        pipeline.copy(stage);
    }
    if constexpr (SEVERAL) {
        copy_async_wait<AHEAD - 1>();
        __syncthreads();
    }

    const LaneTable entries = lane_table(table, lane);
    // This lane's 8 bytes of block j are at this offset, with bits 5 and 6 inverted where those of 32 j are set.
    static_assert(BLOCK_BYTES == 32 && K_SLICE % 4 == 0, "bits 5 and 6");
    const u32 lane_offset = u32(ring_offset<K_SLICE>(g, 0) + t * 8);
    const Words4 *const x_first = x_words + place_of_piece(lane * 2), *const x_second = x_words + place_of_piece(lane * 2 + 1);
    u32 stage = 0;
    for (int begin = 0, end; begin < partition.steps; begin = end) {
        end = partition.steps - begin < config.per_pass ? partition.steps : begin + config.per_pass;
#pragma unroll 1
        for (int step = begin; step < end; step++) {
            float sums[4] = {};
#pragma unroll 1
            for (int k_tile = 0; k_tile < k_tiles; k_tile++) {
                // The oldest copy has ended, for all lanes.
                copy_async_wait<AHEAD - 1>();
                __syncwarp();
                if constexpr (NESTED) {
                    if (!pipeline.quads) {
                        pipeline.dequantize_scales(stage, {k_tile, step}, map, offset);
                        __syncwarp();
                    }
                }
                if (partition.blocks(k_tile) > 0) {
                    if constexpr (SEVERAL) {
                        const int from = (k_tile * partition.k_slices + partition.k_slice) * ONE_ROW_PIECES;
                        set(x_first[from], x_second[from]);
                    }
                    const u8 *const bytes = pipeline.ring + stage * STAGE_BYTES;
                    const Floats2 low_scale = pipeline.pair_of_scales(stage, 0, t, map, offset);
                    const Floats2 high_scale = pipeline.pair_of_scales(stage, 1, t, map, offset);
                    float own[4] = {};
#pragma unroll
                    for (int j = 0; j < K_SLICE; j++) {
                        const u8 *const lane_bytes = bytes + (lane_offset ^ u32(j * BLOCK_BYTES));
                        const Words2 low = *reinterpret_cast<const Words2 *>(lane_bytes);
                        const Words2 high = *reinterpret_cast<const Words2 *>(lane_bytes + STAGE_BYTES / 2);
                        float products[1][4] = {};
                        add_products<T>(products, entries, low, high, b);
                        // Chosen, not added up with zeros: what is thrown away may be infinite.
                        own[j % 2] = t == j / 2 ? products[0][j % 2] : own[j % 2];
                        own[2 + j % 2] = t == j / 2 ? products[0][2 + j % 2] : own[2 + j % 2];
                    }
                    sums[0] = __fmaf_rn(low_scale.value[0], own[0], sums[0]);
                    sums[1] = __fmaf_rn(low_scale.value[1], own[1], sums[1]);
                    sums[2] = __fmaf_rn(high_scale.value[0], own[2], sums[2]);
                    sums[3] = __fmaf_rn(high_scale.value[1], own[3], sums[3]);
                }
                // Every lane has read its part.
                __syncwarp();
                pipeline.copy(stage);
                stage = stage + 1 < R::STAGES ? stage + 1 : 0;
            }
            float *const to = all_sums + ((step - begin) * WARPS + read_warp()) * ONE_ROW_SUMS + lane;
            to[0] = sums[0] + sums[1];
            to[ONE_ROW_SUMS / 2] = sums[2] + sums[3];
        }
        __syncthreads();
        // y: a thread adds up what belongs to a row of W.
#pragma unroll 1
        for (int item = int(threadIdx.x); item < (end - begin) * partition.groups * ROWS; item += THREADS) {
            const int tile = item / ROWS, row = begin * partition.groups * ROWS + item;
            if (row < partition.rows) {
                const float *const from = all_sums + (tile << config.log2_k_slices) * ONE_ROW_SUMS + item % ROWS * 4;
                float sum[4] = {};
#pragma unroll 8
                for (int s = 0; s < partition.k_slices; s++) {
                    const Floats4 four = *reinterpret_cast<const Floats4 *>(from + s * ONE_ROW_SUMS);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        sum[i] += four.value[i];
                    }
                }
                const float first = bias != nullptr ? to_f32(bias[partition.first_row + row]) : 0.0f;
                y[partition.first_row + row] = from_f32<T>((sum[0] + sum[1]) + (sum[2] + sum[3]) + first);
            }
        }
        if (end < partition.steps) {
            __syncthreads();
        }
    }
    copy_async_wait<0>();
}

template <typename T, bool NESTED>
__device__ inline void gemm_4bit_small_m_sm90_one(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y,
                                                  int n, int k, int block_shift, u32 quant_type,
                                                  const LaunchConfig &config) {
    // Two programs, one after the other: what is said of one k-tile alone leaves the other no slower.
    if (config.k_tiles > 1) {
        one_row_product<T, NESTED, true>(x, packed, scales, bias, y, n, k, block_shift, quant_type, config);
    } else {
        one_row_product<T, NESTED, false>(x, packed, scales, bias, y, n, k, block_shift, quant_type, config);
    }
}

// As those of gemm_4bit_small_m_sm90.cuh, but: m is 1, config.log2_sharing 0. Dynamic shared memory: MAP_BYTES; with several
// k-tiles 1 KB for each k-slice of each; 2 KB for each step of a pass; then the table at the next place where it may begin,
// and the stages behind it.
#define ONE_ROW_SM90(name, T, nested)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                          \
        name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int, int n, int k, int block_shift,    \
             u32 quant_type, LaunchConfig config) {                                                                   \
        gemm_4bit_small_m_sm90_one<T, nested>(x, packed, scales, bias, y, n, k, block_shift, quant_type, config);     \
    }
