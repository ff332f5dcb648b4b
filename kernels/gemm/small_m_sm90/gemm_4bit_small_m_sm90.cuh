// The products of small_m.cuh, W by way of shared memory: each warp copies its bytes and scales with cp.async into a ring of
// its own, so that 32 to 64 KB are always on the way to each multiprocessor. Needs 192 or 224 KB of shared memory, which
// compute capability 9.0 and 10.0 have.
//
// K is cut into chunks, and a chunk into slots beside each other, one for each warp of a group: what the warps of a group
// read at a time is one piece of each row. A round is of as many chunks as registers have room for x of a warp's slots. In a
// round a warp walks over all rows of the block of threads, a step at a time: a tile of rows
// for each group. Few warps with many registers each are faster here than many with few: a warp adds up more before its sums
// go to shared memory, and there is room to look up early.
//
// Kernels for one round (gemm_4bit_small_m_sm90.cu) and for several (gemm_4bit_small_m_sm90_long.cu) differ in where sums meet. With one round, a
// pass of so many steps as have room in shared memory ends with all warps adding up. With several, the sums of all steps
// stay there until the last round has added its own; where there is no room for those of all warps, the warps of
// neighbouring slots share a place, each adding its own to what it finds.
#pragma once

#include "gemm/small_m.cuh"

constexpr int LOG2_WARPS = 3;
constexpr int RING_WARPS = 1 << LOG2_WARPS;
constexpr int RING_THREADS = RING_WARPS * WARP;

// What depends on the columns and on whether there are several rounds.
template <int FRAGMENTS, bool LONG>
struct Ring {
    // Blocks of a slot, by fours, and chunks of a round: with x of them a warp fills half of its registers.
    static constexpr int SLOT = FRAGMENTS > 2 ? 4 : 8, QUADS = SLOT / 4, ROUND = FRAGMENTS > 1 ? 1 : 2;
    // Turns of a warp (its part of a chunk of a step) that are on the way before the first is worked on, 64 KB for all warps.
    // More would hold up x, which comes by the same way.
    static constexpr int AHEAD = 16 / SLOT;
    // In a ring of as many stages the next copy begins once a turn is done. With several rounds x comes again and again:
    // there a further stage lets it begin before. All measured on an H100.
    static constexpr int STAGES = LONG ? AHEAD + 1 : AHEAD;
    static constexpr int STAGE_BYTES = ROWS * SLOT * BLOCK_BYTES;
};

// Sums of a warp for 8 columns of a step: [row][column], the pairs of columns exchanged by row, so that neither the lanes
// that store a fragment nor those that add up a row meet in a bank.
constexpr int SUMS = ROWS * COLUMNS;

// How the launcher divides the work. Whole numbers that take a division are its business.
struct LaunchConfig {
    int rows;          // of W, for each block of threads
    int log2_slots;    // of a chunk, which has 1 to RING_WARPS
    int chunks;        // of K: the last may have less, or nothing, for a slot
    int per_pass;      // steps whose sums fit in shared memory; with several rounds all
    int log2_sharing;  // with several rounds: of the warps that share a place, no more than there are slots
    int ahead;         // rows that are fetched while the kernel before still runs
};

// A chunk of a step.
struct Turn {
    int chunk, step;
};

// What a warp has to do. SLOT: its Ring's.
template <int SLOT>
struct Share {
    int row_blocks, first_row, rows, steps;
    int slots, slot, groups, group;
    int chunks;

    __device__ Share(int n, int k, const LaunchConfig &config) : row_blocks(k / BLOCK), chunks(config.chunks) {
        const int warp = int(threadIdx.x / WARP);
        first_row = int(blockIdx.x) * config.rows;
        rows = n - first_row < config.rows ? n - first_row : config.rows;
        slots = 1 << config.log2_slots;
        slot = warp & (slots - 1);
        group = warp >> config.log2_slots;
        groups = RING_WARPS >> config.log2_slots;
        // Both factors of the divisor are powers of two.
        steps = int(u32(rows + groups * ROWS - 1) / ROWS) >> (LOG2_WARPS - config.log2_slots);
    }
    __device__ int first_block(int chunk) const { return (chunk * slots + slot) * SLOT; }
    // None, or less than that, when there is nothing left for this slot.
    __device__ int blocks(int chunk) const {
        const int left = row_blocks - first_block(chunk);
        return left < SLOT ? left : SLOT;
    }
    __device__ int tile_row(int step) const { return (step * groups + group) * ROWS; }
};

// Block j of row r lies at block j ^ (r % 4) of its row in a stage: so the eight rows that a warp reads at a time, four in
// each half of the warp, are in different banks.
template <int SLOT>
__device__ inline int ring_offset(int row, int block) { return (row * SLOT + (block ^ (row % 4))) * BLOCK_BYTES; }

// Copies of a warp's turns, one after the other. R: a Ring.
template <bool NESTED, typename R>
struct Copier {
    static constexpr int SLOT = R::SLOT, QUADS = R::QUADS, STAGES = R::STAGES, STAGE_BYTES = R::STAGE_BYTES;
    // Of the codes of W 16 bytes for each lane, and as many rows at a time as that gives.
    static constexpr int PIECES = SLOT * BLOCK_BYTES / 16, AT_A_TIME = WARP / PIECES;
    // Scales lie in the unused halves of the table's rows, WARP words in each: for each quad of blocks a row of them for the
    // eight rows of W from 0, and one for those from 8. Of nested ones it is these that are made there; behind them are the
    // words that hold the codes, and the second scales. When four scales lie together (`quads`), a lane copies those of a
    // row, else of row g or g + 8 that of block t of a quad.
    static constexpr int SCALE_ROWS = 2 * QUADS * (NESTED ? 2 : 1);
    static_assert(RING_WARPS * STAGES * SCALE_ROWS <= 256 && WARP * 2 == LANE_TABLE_ROW, "halves of the table's rows");

    const Share<SLOT> &share;
    const Scales &scales;
    const u8 *const packed;
    u8 *const ring;     // [STAGES][STAGE_BYTES] of this warp
    u32 *const halves;  // [STAGES][SCALE_ROWS][LANE_TABLE_ROW] of this warp
    const int shift;    // log2 of the blocks here that share a scale
    const u32 scale_count;
    const bool quads;
    Turn turn = {0, 0};

    __device__ Copier(const Share<SLOT> &share, const Scales &scales, const u8 *packed, u8 *rings, u32 *table, int shift, int n)
        : share(share),
          scales(scales),
          packed(packed),
          ring(rings + threadIdx.x / WARP * (STAGES * STAGE_BYTES)),
          halves(table + WARP + threadIdx.x / WARP * (STAGES * SCALE_ROWS * LANE_TABLE_ROW)),
          shift(shift),
          scale_count(u32((i64(n) * share.row_blocks + (i64(1) << shift) - 1) >> shift)),
          quads(shift == 0 && share.row_blocks % 4 == 0 &&
                (NESTED || is_aligned(scales.absmax, sizeof(Words4)))) {}

    // The first block of a turn in a row of its tile.
    __device__ u32 block_of(const Turn &turn, int row) const {
        return u32(share.first_row + share.tile_row(turn.step) + row) * u32(share.row_blocks) +
               u32(share.first_block(turn.chunk));
    }
    __device__ u32 *scale_row(u32 stage, int i) const { return halves + (stage * SCALE_ROWS + i) * LANE_TABLE_ROW; }

    // Of blocks that are not there, zeros: they have no part in a sum.
    __device__ void copy_quads(u32 stage, int rows, int blocks) const {
        const int lane = read_lane(), row = lane % ROWS, quad = lane / ROWS;
        if (lane >= ROWS * QUADS) {
            return;
        }
        const bool there = row < rows && 4 * quad < blocks;
        const u32 block = there ? block_of(turn, row) + u32(4 * quad) : 0;
        if constexpr (NESTED) {
            copy_async(scale_row(stage, 2 * QUADS) + lane, reinterpret_cast<const u32 *>(scales.codes + block), there ? 4 : 0);
            copy_async(scale_row(stage, 2 * QUADS + 1) + lane,
                       reinterpret_cast<const u32 *>(scales.absmax2 + (block >> NESTED_SHIFT)), there ? 4 : 0);
        } else {
            copy_async(reinterpret_cast<Words4 *>(scale_row(stage, 2 * quad + row / 8) + row % 8 * 4),
                       reinterpret_cast<const Words4 *>(scales.absmax + block), there ? 16 : 0);
        }
    }
    __device__ void copy_scales(u32 stage, int rows, int blocks) const {
        const int lane = read_lane();
#pragma unroll 1
        for (int i = 0; i < 2 * QUADS; i++) {
            const int row = lane / 4 + i % 2 * (ROWS / 2), j = i / 2 * 4 + lane % 4;
            const bool there = j < blocks && row < rows;
            const u32 scale = there ? (block_of(turn, row) + u32(j)) >> shift : 0;
            if constexpr (NESTED) {
                // The word that holds the code, without what lies behind the last.
                const u32 first = scale & ~3u;
                copy_async(scale_row(stage, i) + lane, reinterpret_cast<const u32 *>(scales.codes + first),
                           there ? scale_count - first : 0);
                copy_async(scale_row(stage, 2 * QUADS + i) + lane,
                           reinterpret_cast<const u32 *>(scales.absmax2 + (scale >> NESTED_SHIFT)), there ? 4 : 0);
            } else {
                copy_async(scale_row(stage, i) + lane, reinterpret_cast<const u32 *>(scales.absmax + scale), there ? 4 : 0);
            }
        }
    }

    // Starts copying a turn to a stage, and goes on to the next. What belongs to rows behind the last is left as it is: what
    // comes of it is not written.
    __device__ void copy(u32 stage) {
        if (turn.chunk < share.chunks) {
            const int blocks = share.blocks(turn.chunk), rows = share.rows - share.tile_row(turn.step);
            const int lane = read_lane(), row = lane / PIECES, piece = lane % PIECES;
            u8 *const to = ring + (stage * STAGE_BYTES + u32(ring_offset<SLOT>(row, piece / 2) + piece % 2 * 16));
            u8 *const to_odd =
                ring + (stage * STAGE_BYTES + u32(ring_offset<SLOT>(row + AT_A_TIME, piece / 2) + piece % 2 * 16));
            const u8 *from = packed + (u64(block_of(turn, row)) * BLOCK_BYTES + u32(piece * 16));
            const int row_end = piece / 2 < blocks ? rows - row : 0;
#pragma unroll
            for (int i = 0; i < ROWS; i += 2 * AT_A_TIME) {
                if (i < row_end) {
                    copy_async(reinterpret_cast<Words4 *>(to + i * SLOT * BLOCK_BYTES),
                               reinterpret_cast<const Words4 *>(from));
                }
                from += i64(AT_A_TIME * BLOCK_BYTES) * share.row_blocks;
                if (i + AT_A_TIME < row_end) {
                    copy_async(reinterpret_cast<Words4 *>(to_odd + i * SLOT * BLOCK_BYTES),
                               reinterpret_cast<const Words4 *>(from));
                }
                from += i64(AT_A_TIME * BLOCK_BYTES) * share.row_blocks;
            }
            if (quads) {
                copy_quads(stage, rows, blocks);
            } else {
                copy_scales(stage, rows, blocks);
            }
            if (turn.chunk % R::ROUND + 1 < R::ROUND && turn.chunk + 1 < share.chunks) {
                turn.chunk++;
            } else if (++turn.step < share.steps) {
                turn.chunk -= turn.chunk % R::ROUND;
            } else {
                turn = {turn.chunk + 1, 0};
            }
        }
        copy_async_commit();
    }

    // Once a stage's copies have ended for all lanes: the scales of row g (0) or row g + 8 (1), of a quad.
    __device__ const float *scales_of(u32 stage, int half, int quad) const {
        return reinterpret_cast<const float *>(scale_row(stage, 2 * quad + half) + read_lane() / 4 * 4);
    }
    // Makes them of nested ones.
    __device__ void expand_scales(u32 stage, const Turn &turn, const float *map, float offset) const {
        const int lane = read_lane(), g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 2 * QUADS; i++) {
            const int half = i % 2, quad = i / 2;
            u32 *const to = scale_row(stage, i) + lane;
            u32 word, absmax2;
            int byte = t;
            if (quads) {
                const int from = quad * ROWS + half * (ROWS / 2) + g;
                word = scale_row(stage, 2 * QUADS)[from];
                absmax2 = scale_row(stage, 2 * QUADS + 1)[from];
            } else {
                const u32 block = block_of(turn, g + half * (ROWS / 2)) + u32(quad * 4 + t);
                word = *to;
                absmax2 = scale_row(stage, 2 * QUADS + i)[lane];
                byte = int(block >> shift & 3);
            }
            const RawScale<true> raw = {word >> (8 * byte) & 0xff, __uint_as_float(absmax2)};
            *to = __float_as_uint(raw.value(map, offset));
        }
    }
};

// Whole pieces of 16 bytes, from the one on that `from` is in.
__device__ inline void fetch(const void *from, u32 bytes) {
    const u8 *const address = static_cast<const u8 *>(from);
    if (bytes >= 16) {
        fetch_to_second_level(address - u32(reinterpret_cast<u64>(from)) % 16, bytes & ~15u);
    }
}

// Has the second-level cache fetch codes and scales of the first config.ahead rows, which lie together. Nothing is read, so
// that it does not matter who still writes them.
template <bool NESTED, int SLOT>
__device__ inline void fetch_ahead(const u8 *packed, const Scales &scales, const Share<SLOT> &share, int shift,
                                   const LaunchConfig &config) {
    if (threadIdx.x == 0) {
        const u32 rows = u32(share.rows < config.ahead ? share.rows : config.ahead), blocks = rows * u32(share.row_blocks);
        const u64 first = u64(u32(share.first_row)) * u32(share.row_blocks);
        fetch(packed + first * BLOCK_BYTES, blocks * BLOCK_BYTES);
        if constexpr (NESTED) {
            fetch(scales.codes + (first >> shift), blocks >> shift);
        } else {
            fetch(scales.absmax + (first >> shift), (blocks >> shift) * u32(sizeof(float)));
        }
    }
}

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
__device__ inline void gemm_4bit_small_m_sm90(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m, int n,
                                   int k, int block_shift, u32 quant_type, const LaunchConfig &config) {
    using R = Ring<FRAGMENTS, LONG>;
    constexpr int SLOT = R::SLOT, ROUND = R::ROUND, STAGES = R::STAGES, AHEAD = R::AHEAD, STAGE_BYTES = R::STAGE_BYTES;
    // Sums of a warp for a step.
    constexpr int PLACE = FRAGMENTS * SUMS;
    DYNAMIC_SHARED(shared);
    const Share<SLOT> share(n, k, config);
    const int log2_sharing = LONG ? config.log2_sharing : 0;
    // Of each warp for each step, where the next one waits for it. A round is one phase.
    Barrier *const stored = reinterpret_cast<Barrier *>(shared);  // [step][RING_WARPS], with several rounds
    const u32 barrier_bytes = LONG ? u32(config.per_pass * RING_WARPS) * u32(sizeof(Barrier)) : 0;
    float *const map = reinterpret_cast<float *>(shared + barrier_bytes);  // [256]
    float *const all_sums = map + MAP_BYTES / sizeof(float);  // [step][RING_WARPS >> log2_sharing][FRAGMENTS][SUMS]
    const u32 before = barrier_bytes + MAP_BYTES +
                       u32(config.per_pass * (RING_WARPS >> log2_sharing) * PLACE) * u32(sizeof(float));
    const u32 place_of_table = before + lane_table_place(shared + before);
    u32 *const table = reinterpret_cast<u32 *>(shared + place_of_table);  // [256][LANE_TABLE_ROW], half used
    const int shift = block_shift - BLOCK_SHIFT;

    // All that can be done while the kernel before still runs.
    fetch_ahead<NESTED>(packed, scales, share, shift, config);
    if (LONG) {
        for (int i = int(threadIdx.x); i < config.per_pass * RING_WARPS; i += RING_THREADS) {
            barrier_init(stored + i, WARP);
        }
    }
    fill_map<NESTED, RING_THREADS>(map);
    fill_table<T, RING_THREADS>(table, quant_type);
    __syncthreads();
    wait_for_previous();
    let_next_start();

    // What comes behind copies waits for them in the memory's queue: so one turn is before x, and no more.
    Copier<NESTED, R> copier(share, scales, packed, shared + (place_of_table + LANE_TABLE_BYTES), table, shift, n);
    copier.copy(0);
    const float offset = NESTED ? *scales.offset : 0.0f;
    u32 x_words[ROUND][SLOT][FRAGMENTS][8];
    const auto load_round = [&](int first) {
        const int lane = read_lane();
#pragma unroll
        for (int c = 0; c < ROUND; c++) {
            load_x<FRAGMENTS, SLOT>(x_words[c], x, m, k, share.first_block(first + c), share.blocks(first + c), lane / 4,
                                    lane % 4);
        }
    };
    load_round(0);
#pragma unroll 1
    for (u32 stage = 1; stage < AHEAD; stage++) {
        copier.copy(stage);
    }

    const int lane = int(threadIdx.x % WARP), g = lane / 4, t = lane % 4;
    const LaneTable entries = lane_table(table, lane);
    // This lane's 8 bytes of block j are at this offset, with bits 5 and 6 inverted where those of 32 j are set.
    static_assert(BLOCK_BYTES == 32 && SLOT % 4 == 0, "bits 5 and 6");
    const u32 lane_offset = u32(ring_offset<SLOT>(g, 0) + t * 8);
    const int low_place = g * COLUMNS + (t ^ g / 4) * 2;
    u32 stage = 0, phase = 0;  // its parity
    for (int chunk = 0; chunk < (LONG ? share.chunks : 1); chunk += ROUND) {
        if (chunk > 0) {
            load_round(chunk);
        }
        for (int begin = 0, end; begin < share.steps; begin = end) {
            end = LONG || share.steps - begin < config.per_pass ? share.steps : begin + config.per_pass;
#pragma unroll 1
            for (int step = begin; step < end; step++) {
                float sums[FRAGMENTS][4] = {};
#pragma unroll
                for (int c = 0; c < ROUND; c++) {
                    if (c > 0 && chunk + c >= share.chunks) {
                        break;
                    }
                    // The oldest copy has ended, for all lanes, and all have read what was before the next.
                    copy_async_wait<AHEAD - 1>();
                    if constexpr (NESTED) {
                        __syncwarp();
                        copier.expand_scales(stage, {chunk + c, step}, map, offset);
                    }
                    __syncwarp();
                    if (LONG) {
                        copier.copy(stage + AHEAD < STAGES ? stage + AHEAD : stage + AHEAD - STAGES);
                    }
                    if (share.blocks(chunk + c) > 0) {
                        const u8 *const bytes = copier.ring + stage * STAGE_BYTES;
#pragma unroll
                        for (int j = 0; j < SLOT; j += 2) {
                            const Floats2 low_scale =
                                *reinterpret_cast<const Floats2 *>(copier.scales_of(stage, 0, j / 4) + j % 4);
                            const Floats2 high_scale =
                                *reinterpret_cast<const Floats2 *>(copier.scales_of(stage, 1, j / 4) + j % 4);
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
                        copier.copy(stage);
                    }
                    stage = stage + 1 < STAGES ? stage + 1 : 0;
                }
                const int warps_before = (step - begin) * RING_WARPS + read_warp();
                float *const step_sums = all_sums + (warps_before >> log2_sharing) * PLACE;
                if (LONG) {
                    Barrier *const barrier = stored + warps_before;
                    const int last = (1 << log2_sharing) - 1;
                    const bool is_first = (warps_before & last) == 0;
                    if (!is_first || chunk > 0) {
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
            if (LONG && chunk + ROUND < share.chunks) {
                break;
            }
            __syncthreads();
            // y: a thread adds up what belongs to a row of W and eight columns. Neighbours have rows 0-3 and 8-11, or 4-7 and
            // 12-15, which are in different banks.
#pragma unroll 1
            for (int item = int(threadIdx.x); item < (end - begin) * share.groups * FRAGMENTS * ROWS; item += RING_THREADS) {
                const int f = item / ROWS % FRAGMENTS, tile = item / (ROWS * FRAGMENTS);
                const int row_of_tile = (item & 3) | (item & 4) << 1 | (item & 8) >> 1;
                const int row = (begin * share.groups + tile) * ROWS + row_of_tile;
                if (row < share.rows) {
                    const float *const from = all_sums + (tile << config.log2_slots >> log2_sharing) * PLACE + f * SUMS;
                    RowOfSums sums = {};
#pragma unroll 8
                    for (int s = 0; s < 1 << config.log2_slots >> log2_sharing; s++) {
                        sums.add(from + s * PLACE, row_of_tile);
                    }
                    const float first = bias != nullptr ? to_f32(bias[share.first_row + row]) : 0.0f;
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
                        const int column = f * COLUMNS + c;
                        if (column < m) {
                            y[i64(column) * n + share.first_row + row] = from_f32<T>(sums.value[c] + first);
                        }
                    }
                }
            }
            if (end < share.steps) {
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
// Grid: ceil(n / config.rows) blocks of RING_THREADS. Dynamic shared memory: with several rounds a Barrier for each warp and
// step; MAP_BYTES; for each step of a pass 4 KB for 8 columns, 8 for 16 and 16 for 32, or the part that sharing leaves; then
// the table at the next place where it may begin, and the stages behind it.
#define RING_KERNEL(name, T, nested, fragments, several)                                                              \
    extern "C" __global__ void __launch_bounds__(RING_THREADS, 1)                                                     \
        name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k, int block_shift,  \
             u32 quant_type, LaunchConfig config) {                                                                         \
        gemm_4bit_small_m_sm90<T, nested, fragments, several>(x, packed, scales, bias, y, m, n, k, block_shift, quant_type, config); \
    }
