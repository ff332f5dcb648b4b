// gemm_4bit_small_m_sm90: the products of small_m.cuh with W by way of shared memory: each warp copies its bytes and scales
// with cp.async into stages of its own, so that 32 to 64 KB are always on the way to each multiprocessor.
//
// Problem. Up to 32 rows of x (one_row.cuh has one), float16 or bfloat16; K a multiple of 64, blocks of 64 to 4096, plain or
//   nested scales, fewer than 2^32 blocks; x and codes aligned to 16 bytes, codes of nested scales to 4. Compute capability
//   9.0 and 10.0, which have the shared memory.
//
// Roofline. Memory: N * K / 2 bytes of codes and the scales, once. Blocks of 64, bfloat16, plain scales, on an H100, in
//   microseconds (benches/RESULTS.md; the floor reads codes and scales once):
//                          floor    M = 1       M = 8       M = 16      M = 32
//     4096 x 4096            4.7     5.7         6.1         6.7         9.9
//     14336 x 4096          12.1    13.6        14.1        15.0        21.5
//     28672 x 8192          43.1    47.1        48.6        53.4        71.5
//     floor / measured at 14336 x 4096
//                                   89 %        86 %        81 %        56 %
//   Where the time goes (14336 x 4096, 16 rows, from the multiprocessors' clocks): 1 to 2 us until the last block of the kernel
//   before has ended; 3 to 4 until x and the first tiles are there; 7 steps of 1.2 to 1.3; 1.2 to add up and write. In a step
//   shared memory is busy for 1.0. What remains is x: each multiprocessor fetches all of it, 17 MB in all for 16 rows of 4096
//   columns, from a second-level cache that gives some 6 TB/s, and with 14336 columns 60 MB, in rounds that wait for it.
//
// Tile. K is cut into k-tiles, and a k-tile into k-slices beside each other, one for each warp of a group: what the warps of a
//   group read at a time is one piece of each row. A round is of as many k-tiles as registers have room for x of. In a round a
//   warp walks over all rows of the block of threads, a step at a time: a tile of 16 rows for each group.
//
//     rows of the block         k-tile 0 (round 0)             k-tile 1                 8 warps, here in 2 groups of 4 k-slices
//     step 0: group 0   | slice 0 | 1 | 2 | 3 || slice 0 | 1 | 2 | 3 |
//             group 1   | slice 0 | 1 | 2 | 3 || slice 0 | 1 | 2 | 3 |
//     step 1: group 0   ...                                      a work item: 16 rows x 8 blocks (4 with 32 columns)
//
//   Kernels for one round and for several (`long`) differ in where sums meet. With one round, a pass of as many steps as have
//   room in shared memory ends with all warps adding up. With several, the sums of all steps stay there until the last round
//   has added its own; where there is no room for those of all warps, the warps of neighbouring k-slices share a place, each
//   adding its own to what it finds, in the order of the warps (a barrier for each).
//
// Shared memory, 192 KB, and with several rounds 208 or 224:
//     barriers   with several rounds: [step][8 warps]
//     map        of nested scales                                                                               1 KB
//     sums       [steps of a pass][8 warps, or fewer that share][fragments][16][8] float32
//     table      at a multiple of 64 KB of shared memory's addresses, so that one PRMT makes an address: 64 KB. The unused
//                halves of its rows hold the scales of all stages.
//     stages     of each warp: 2 (4 with 32 columns) of [16 rows][8 or 4 blocks] codes, one more with several rounds. Block j
//                of row r lies at j ^ (r % 4)
//
// Budget. One block of 8 warps on a multiprocessor, 255 registers a thread, of which 233 to 247 are taken: x of a round takes
//   half of them. 64 KB of codes are on the way before the first is used; more would hold up x, which comes by the same way.
//   Few warps with many registers each are faster here than many with few: a warp adds up more before its sums go to shared
//   memory, and there is room to look up early. 16 warps of 128 registers took 17.3 us at 14336 x 4096 with 16 rows (15.0).
//   What else made that difference: the table is made before the wait for the kernel before, two work items are on the way
//   instead of three while x is loaded, sums share no places where K is one round, and whole tiles of rows.
//
// Tried, and slower or no faster: tensor maps in place of cp.async, by each warp or by one warp for all (which leaves 96
//   registers, and spills); x past the first-level cache, or in whole sectors; split-K over the blocks of a cluster, whose sums
//   meet through distributed shared memory (two barriers of a cluster for each pass, and clusters of four leave 12 of 132
//   multiprocessors without work); prefetching more than the beginning of the weight to the second-level cache.
//   On an H200, in microseconds: x of each work item anew, fetched while the one before is worked on, instead of rounds of K
//   (4096 x 14336: 17.0 with 8 rows, now 15.2; 24.9 with 16 rows, now 18.6). Split-K over blocks that leave their sums in
//   memory, which the last of them adds up: with 32 rows 28.6 at 14336 x 4096 (now 21.4) and 32.2 at 4096 x 14336 (27.6).
//   With 16 rows this one is faster where a part of K is one round and sums need no second pass: 10.3 at 3072 x 8192 (11.8), 14.8
//   at 4096 x 11008 (16.1), but 24.1 at 4096 x 14336 (19.6). With 8 rows it gains nothing, nor where parts have several rounds.
#pragma once

#include "gemm/small_m_sm90/pipeline.cuh"

// Eight sums of a row, as they are in shared memory: by fours, and in these by pairs, exchanged by row.
struct RowOfSums {
    float value[COLUMNS];

    // Those of a tile from `sums` on.
    __device__ void add(const float *sums, int row) {
        const bool exchanged = row / 4 % 2 != 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const Floats4 four = *reinterpret_cast<const Floats4 *>(sums + row * COLUMNS + (h ^ row / 8) * 4);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                value[4 * h + i] += exchanged ? four.value[i ^ 2] : four.value[i];
            }
        }
    }
};

template <typename T, bool NESTED, int FRAGMENTS, bool LONG>
__device__ inline void gemm_4bit_small_m_sm90(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m,
                                              int n, int k, int block_shift, u32 quant_type, const LaunchConfig &config) {
    using R = Shape<FRAGMENTS, LONG>;
    constexpr int K_SLICE = R::K_SLICE, X_K_TILES = R::X_K_TILES;
    constexpr int STAGES = R::STAGES, AHEAD = R::AHEAD, STAGE_BYTES = R::STAGE_BYTES;
    // Sums of a warp for a step.
    constexpr int PLACE = FRAGMENTS * SUMS;
    DYNAMIC_SHARED(shared);
    const Partition<K_SLICE> partition(n, k, config);
    const int log2_sharing = LONG ? config.log2_sharing : 0;
    // Of each warp for each step, where the next one waits for it. A round is one phase.
    Barrier *const stored = reinterpret_cast<Barrier *>(shared);  // [step][WARPS], with several rounds
    const u32 barrier_bytes = LONG ? u32(config.per_pass * WARPS) * u32(sizeof(Barrier)) : 0;
    float *const map = reinterpret_cast<float *>(shared + barrier_bytes);  // [256]
    float *const all_sums = map + MAP_BYTES / sizeof(float);  // [step][WARPS >> log2_sharing][FRAGMENTS][SUMS]
    const u32 before = barrier_bytes + MAP_BYTES +
                       u32(config.per_pass * (WARPS >> log2_sharing) * PLACE) * u32(sizeof(float));
    const u32 place_of_table = before + lane_table_place(shared + before);
    u32 *const table = reinterpret_cast<u32 *>(shared + place_of_table);  // [256][LANE_TABLE_ROW], half used
    const int shift = block_shift - BLOCK_SHIFT;

    // All that can be done while the kernel before still runs.
    fetch_ahead<NESTED>(packed, scales, partition, shift, config);
    if (LONG) {
        for (int i = int(threadIdx.x); i < config.per_pass * WARPS; i += THREADS) {
            barrier_init(stored + i, WARP);
        }
    }
    fill_map<NESTED, THREADS>(map);
    fill_table<T, THREADS>(table, quant_type);
    __syncthreads();
    wait_for_previous();
    let_next_start();

    // What comes behind copies waits for them in the memory's queue: so one work item is before x, and no more.
    Pipeline<NESTED, R> pipeline(partition, scales, packed, shared + (place_of_table + LANE_TABLE_BYTES), table, shift, n);
    pipeline.copy(0);
    const float offset = NESTED ? *scales.offset : 0.0f;
    u32 x_words[X_K_TILES][K_SLICE][FRAGMENTS][8];
    const auto load_x_of = [&](int first) {
        const int lane = read_lane();
#pragma unroll
        for (int c = 0; c < X_K_TILES; c++) {
            load_x<FRAGMENTS, K_SLICE>(x_words[c], x, m, k, partition.first_block(first + c), partition.blocks(first + c),
                                       lane / 4, lane % 4);
        }
    };
    load_x_of(0);
#pragma unroll 1
    for (u32 stage = 1; stage < AHEAD; stage++) {
        pipeline.copy(stage);
    }

    const int lane = int(threadIdx.x % WARP), g = lane / 4, t = lane % 4;
    const LaneTable entries = lane_table(table, lane);
    // This lane's 8 bytes of block j are at this offset, with bits 5 and 6 inverted where those of 32 j are set.
    static_assert(BLOCK_BYTES == 32 && K_SLICE % 4 == 0, "bits 5 and 6");
    const u32 lane_offset = u32(ring_offset<K_SLICE>(g, 0) + t * 8);
    const int low_place = g * COLUMNS + (t ^ g / 4) * 2;
    u32 stage = 0, phase = 0;  // its parity
    for (int k_tile = 0; k_tile < (LONG ? partition.k_tiles : 1); k_tile += X_K_TILES) {
        if (k_tile > 0) {
            load_x_of(k_tile);
        }
        for (int begin = 0, end; begin < partition.steps; begin = end) {
            end = LONG || partition.steps - begin < config.per_pass ? partition.steps : begin + config.per_pass;
#pragma unroll 1
            for (int step = begin; step < end; step++) {
                float sums[FRAGMENTS][4] = {};
#pragma unroll
                for (int c = 0; c < X_K_TILES; c++) {
                    if (c > 0 && k_tile + c >= partition.k_tiles) {
                        break;
                    }
                    // The oldest copy has ended, for all lanes, and all have read what was before the next.
                    copy_async_wait<AHEAD - 1>();
                    if constexpr (NESTED) {
                        __syncwarp();
                        pipeline.dequantize_scales(stage, {k_tile + c, step}, map, offset);
                    }
                    __syncwarp();
                    if (LONG) {
                        pipeline.copy(stage + AHEAD < STAGES ? stage + AHEAD : stage + AHEAD - STAGES);
                    }
                    if (partition.blocks(k_tile + c) > 0) {
                        const u8 *const bytes = pipeline.ring + stage * STAGE_BYTES;
#pragma unroll
                        for (int j = 0; j < K_SLICE; j += 2) {
                            const Floats2 low_scale =
                                *reinterpret_cast<const Floats2 *>(pipeline.scales_of(stage, 0, j / 4) + j % 4);
                            const Floats2 high_scale =
                                *reinterpret_cast<const Floats2 *>(pipeline.scales_of(stage, 1, j / 4) + j % 4);
#pragma unroll
                            for (int i = 0; i < 2; i++) {
                                const u8 *const lane_bytes = bytes + (lane_offset ^ u32((j + i) * BLOCK_BYTES));
                                const Words2 low = *reinterpret_cast<const Words2 *>(lane_bytes);
                                const Words2 high = *reinterpret_cast<const Words2 *>(lane_bytes + STAGE_BYTES / 2);
                                add_block<T>(sums, entries, low, high, x_words[c][j + i], low_scale.value[i],
                                             high_scale.value[i]);
                            }
                        }
                    }
                    if (!LONG) {
                        // Every lane has read its part.
                        __syncwarp();
                        pipeline.copy(stage);
                    }
                    stage = stage + 1 < STAGES ? stage + 1 : 0;
                }
                const int warps_before = (step - begin) * WARPS + read_warp();
                float *const step_sums = all_sums + (warps_before >> log2_sharing) * PLACE;
                if (LONG) {
                    Barrier *const barrier = stored + warps_before;
                    const int last = (1 << log2_sharing) - 1;
                    const bool is_first = (warps_before & last) == 0;
                    if (!is_first || k_tile > 0) {
                        // For the one before; the first, for the last in the round before.
                        barrier_wait(is_first ? barrier + last : barrier - 1, is_first ? phase ^ 1 : phase);
#pragma unroll
                        for (int f = 0; f < FRAGMENTS; f++) {
                            const float *const from = step_sums + f * SUMS;
                            const Floats2 low = *reinterpret_cast<const Floats2 *>(from + low_place);
                            const Floats2 high = *reinterpret_cast<const Floats2 *>(from + (low_place ^ 4) + SUMS / 2);
                            sums[f][0] += low.value[0];
                            sums[f][1] += low.value[1];
                            sums[f][2] += high.value[0];
                            sums[f][3] += high.value[1];
                        }
                    }
                }
#pragma unroll
                for (int f = 0; f < FRAGMENTS; f++) {
                    float *const to = step_sums + f * SUMS;
                    *reinterpret_cast<Floats2 *>(to + low_place) = {sums[f][0], sums[f][1]};
                    *reinterpret_cast<Floats2 *>(to + (low_place ^ 4) + SUMS / 2) = {sums[f][2], sums[f][3]};
                }
                if (LONG) {
                    barrier_arrive(stored + warps_before);
                }
            }
            phase ^= 1;
            if (LONG && k_tile + X_K_TILES < partition.k_tiles) {
                break;
            }
            __syncthreads();
            // y: a thread adds up what belongs to a row of W and eight columns. Neighbours have rows 0-3 and 8-11, or 4-7 and
            // 12-15, which are in different banks.
#pragma unroll 1
            for (int item = int(threadIdx.x); item < (end - begin) * partition.groups * FRAGMENTS * ROWS; item += THREADS) {
                const int f = item / ROWS % FRAGMENTS, tile = item / (ROWS * FRAGMENTS);
                const int row_of_tile = (item & 3) | (item & 4) << 1 | (item & 8) >> 1;
                const int row = (begin * partition.groups + tile) * ROWS + row_of_tile;
                if (row < partition.rows) {
                    const float *const from = all_sums + (tile << config.log2_k_slices >> log2_sharing) * PLACE + f * SUMS;
                    RowOfSums sums = {};
#pragma unroll 8
                    for (int s = 0; s < 1 << config.log2_k_slices >> log2_sharing; s++) {
                        sums.add(from + s * PLACE, row_of_tile);
                    }
                    const float first = bias != nullptr ? to_f32(bias[partition.first_row + row]) : 0.0f;
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
                        const int column = f * COLUMNS + c;
                        if (column < m) {
                            y[i64(column) * n + partition.first_row + row] = from_f32<T>(sums.value[c] + first);
                        }
                    }
                }
            }
            if (end < partition.steps) {
                __syncthreads();
            }
        }
    }
    copy_async_wait<0>();
}

// x:           [m][k] aligned to 16 bytes; m at most 8 times the number of fragments
// packed:      [n * k / 2] aligned to 16 bytes; k is a multiple of 64
// scales:      of n * k / blocksize blocks, less than 2^32; codes aligned to 4 bytes
// bias:        [n] or null
// y:           [m][n]
// block_shift: log2 of the block size, 6 to 12
// quant_type:  NF4 or FP4
// Grid: ceil(n / config.rows) blocks of THREADS. Dynamic shared memory: with several rounds a Barrier for each warp and
// step; MAP_BYTES; for each step of a pass 4 KB for 8 columns, 8 for 16 and 16 for 32, or the part that sharing leaves; then
// the table at the next place where it may begin, and the stages behind it.
#define SMALL_M_SM90(name, T, nested, fragments, several)                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                          \
        name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k, int block_shift,  \
             u32 quant_type, LaunchConfig config) {                                                                   \
        gemm_4bit_small_m_sm90<T, nested, fragments, several>(x, packed, scales, bias, y, m, n, k, block_shift,       \
                                                              quant_type, config);                                    \
    }
