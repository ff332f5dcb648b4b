// The products of decode.cuh, W by way of shared memory: each warp copies its bytes and scales with cp.async into a ring of
// its own, so that 64 KB are always on the way to each multiprocessor. Needs 224 KB of shared memory, which compute
// capability 9.0 and 10.0 have.
//
// K is cut into chunks, and a chunk into slots beside each other, one for each warp of a group: what the warps of a group
// read at a time is one piece of each row. A round is of as many chunks as registers have room for x of a warp's slots: two
// for 8 columns, one for 16. In a round a warp walks over all rows of the block of threads, a step at a time: a tile of rows
// for each group.
#include "decode.cuh"

constexpr int LOG2_WARPS = 4;
constexpr int RING_WARPS = 1 << LOG2_WARPS;
constexpr int RING_THREADS = RING_WARPS * WARP;
// Blocks of a slot in a chunk.
constexpr int RING_CHUNK = 4;
// Parts of steps, of a chunk each, of a warp in its ring: while it works on one, two are on the way. 32 KB each for all warps.
constexpr int STAGES = 3;
constexpr int STAGE_BYTES = ROWS * RING_CHUNK * BLOCK_BYTES;
// With more rows of x, their way from the second-level cache takes longer than that of a stage from memory. With nested
// scales a stage has less to copy, but more copies.
template <bool NESTED>
constexpr int FEW_COLUMNS = NESTED ? 4 : 8;
// Sums of a warp for 8 columns of a step: [row][column], the pairs of columns exchanged by row, so that neither the lanes
// that store a fragment nor those that add up two columns meet in a bank.
constexpr int SUMS = ROWS * COLUMNS;

// Steps of a pass, at most: for so many there is room for barriers.
constexpr int MOST_STEPS = 16;

// How the launcher divides the work. Whole numbers that take a division are its business.
struct RingPlan {
    int rows;          // of W, for each block of threads
    int log2_slots;    // of a chunk, which has 1 to RING_WARPS
    int width;         // of a slot's part of a chunk, in blocks: at most RING_CHUNK
    int chunks;        // of K: the last may have less, or no, blocks for a slot
    int per_pass;      // steps whose sums fit in shared memory, at most MOST_STEPS
    int log2_sharing;  // of the warps that share a place for the sums of 16 columns: no more than there are slots
    int ahead;         // bytes of the block's codes that are fetched while the kernel before still runs
};

// A chunk of a step.
struct Turn {
    int chunk, step;
};

// What a warp has to do.
struct Share {
    int row_blocks, first_row, rows, steps;
    int slots, slot, groups, group;
    int width, chunks;

    __device__ Share(int n, int k, const RingPlan &plan) : row_blocks(k / BLOCK), width(plan.width), chunks(plan.chunks) {
        const int warp = int(threadIdx.x / WARP);
        first_row = int(blockIdx.x) * plan.rows;
        rows = n - first_row < plan.rows ? n - first_row : plan.rows;
        slots = 1 << plan.log2_slots;
        slot = warp & (slots - 1);
        group = warp >> plan.log2_slots;
        groups = RING_WARPS >> plan.log2_slots;
        steps = steps_of(rows, plan);
    }
    // Both factors of the divisor are powers of two.
    __device__ int steps_of(int rows, const RingPlan &plan) const {
        return int(u32(rows + groups * ROWS - 1) / ROWS) >> (LOG2_WARPS - plan.log2_slots);
    }
    __device__ int first_block(int chunk) const { return (chunk * slots + slot) * width; }
    // None, or less than that, when there is nothing left for this slot.
    __device__ int blocks(int chunk) const {
        const int left = row_blocks - first_block(chunk);
        return left < width ? left : width;
    }
    __device__ int tile_row(int step) const { return (step * groups + group) * ROWS; }
};

// Block j of row r lies at block j ^ (r % 4) of its row in a stage: so the eight rows that a warp reads at a time, four in
// each half of the warp, are in different banks.
__device__ inline int ring_offset(int row, int block) { return (row * RING_CHUNK + (block ^ (row % 4))) * BLOCK_BYTES; }

// Copies of a warp's turns, one after the other. ROUND: chunks of a round.
template <bool NESTED, int ROUND>
struct Copier {
    // Of the codes of W 16 bytes for each lane, and as many rows at a time as that gives.
    static constexpr int PIECES = RING_CHUNK * BLOCK_BYTES / 16, AT_A_TIME = WARP / PIECES;
    static_assert(AT_A_TIME % 4 == 0, "rows that are so far apart have their blocks in the same order");
    // Scales lie in the unused halves of the table's rows, WARP words in each: four of each row, of the rows from 0 and from
    // 8. Of nested ones it is these that are made there; behind them are the words that hold the codes, and the second
    // scales. When four scales lie together (`quads`), a lane copies those of a row, else of row g or g + 8 that of block t.
    static constexpr int SCALE_ROWS = NESTED ? 4 : 2;
    static_assert(RING_WARPS * STAGES * SCALE_ROWS <= 256 && WARP * 2 == LANE_TABLE_ROW, "halves of the table's rows");

    const Share &share;
    const Scales &scales;
    const u8 *const packed;
    u8 *const ring;     // [STAGES][STAGE_BYTES] of this warp
    u32 *const halves;  // [STAGES][SCALE_ROWS][LANE_TABLE_ROW] of this warp
    const int shift;    // log2 of the blocks here that share a scale
    const u32 scale_count;
    const bool quads;
    Turn turn = {0, 0};

    __device__ Copier(const Share &share, const Scales &scales, const u8 *packed, u8 *rings, u32 *table, int shift, int n)
        : share(share),
          scales(scales),
          packed(packed),
          ring(rings + threadIdx.x / WARP * (STAGES * STAGE_BYTES)),
          halves(table + WARP + threadIdx.x / WARP * (STAGES * SCALE_ROWS * LANE_TABLE_ROW)),
          shift(shift),
          scale_count(u32((i64(n) * share.row_blocks + (i64(1) << shift) - 1) >> shift)),
          quads(shift == 0 && share.width == RING_CHUNK && share.row_blocks % RING_CHUNK == 0 &&
                (NESTED || is_aligned(scales.absmax, sizeof(Words4)))) {}

    // The first block of a slot in a row of a tile.
    __device__ u32 block_of(const Turn &turn, int row) const {
        return u32(share.first_row + share.tile_row(turn.step) + row) * u32(share.row_blocks) +
               u32(share.first_block(turn.chunk));
    }
    __device__ u32 *scale_row(u32 stage, int i) const { return halves + (stage * SCALE_ROWS + i) * LANE_TABLE_ROW; }

    __device__ void copy_quads(u32 stage, int rows, bool there) const {
        const int lane = int(threadIdx.x % WARP), row = lane % ROWS;
        const u32 block = block_of(turn, row);
        if (!there || row >= rows) {
            return;
        }
        if constexpr (NESTED) {
            const u8 *const from = lane < ROWS ? scales.codes + block
                                               : reinterpret_cast<const u8 *>(scales.absmax2 + (block >> NESTED_SHIFT));
            copy_async(scale_row(stage, 2) + lane, reinterpret_cast<const u32 *>(from), 4);
        } else if (lane < ROWS) {
            copy_async(reinterpret_cast<Words4 *>(scale_row(stage, row / 8) + row % 8 * RING_CHUNK),
                       reinterpret_cast<const Words4 *>(scales.absmax + block));
        }
    }
    // Of blocks that are not there, zeros: they have no part in a sum.
    __device__ void copy_scales(u32 stage, int rows, int blocks) const {
        const int lane = int(threadIdx.x % WARP), t = lane % 4;
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            const int row = lane / 4 + half * (ROWS / 2);
            const bool there = t < blocks && row < rows;
            const u32 scale = there ? (block_of(turn, row) + u32(t)) >> shift : 0;
            if constexpr (NESTED) {
                // The word that holds the code, without what lies behind the last.
                const u32 first = scale & ~3u;
                copy_async(scale_row(stage, half) + lane, reinterpret_cast<const u32 *>(scales.codes + first),
                           there ? scale_count - first : 0);
                copy_async(scale_row(stage, 2 + half) + lane,
                           reinterpret_cast<const u32 *>(scales.absmax2 + (scale >> NESTED_SHIFT)), there ? 4 : 0);
            } else {
                copy_async(scale_row(stage, half) + lane, reinterpret_cast<const u32 *>(scales.absmax + scale), there ? 4 : 0);
            }
        }
    }

    // Starts copying a turn to a stage, and goes on to the next. What belongs to rows behind the last is left as it is: what
    // comes of it is not written.
    __device__ void copy(u32 stage) {
        if (turn.chunk < share.chunks) {
            const int blocks = share.blocks(turn.chunk), rows = share.rows - share.tile_row(turn.step);
            const int lane = int(threadIdx.x % WARP), row = lane / PIECES, piece = lane % PIECES;
            u8 *const to = ring + (stage * STAGE_BYTES + u32(ring_offset(row, piece / 2) + piece % 2 * 16));
            const u8 *from = packed + (u64(block_of(turn, row)) * BLOCK_BYTES + u32(piece * 16));
            const int row_end = piece / 2 < blocks ? rows - row : 0;
#pragma unroll
            for (int i = 0; i < ROWS; i += AT_A_TIME) {
                if (i < row_end) {
                    copy_async(reinterpret_cast<Words4 *>(to + i * RING_CHUNK * BLOCK_BYTES),
                               reinterpret_cast<const Words4 *>(from));
                }
                from += i64(AT_A_TIME * BLOCK_BYTES) * share.row_blocks;
            }
            if (quads) {
                copy_quads(stage, rows, blocks > 0);
            } else {
                copy_scales(stage, rows, blocks);
            }
            if (turn.chunk % ROUND + 1 < ROUND && turn.chunk + 1 < share.chunks) {
                turn.chunk++;
            } else if (++turn.step < share.steps) {
                turn.chunk -= turn.chunk % ROUND;
            } else {
                turn = {turn.chunk + 1, 0};
            }
        }
        copy_async_commit();
    }

    // Once a stage's copies have ended for all lanes: four scales of row g (0) or row g + 8 (1).
    __device__ const float *scales_of(u32 stage, int half) const {
        return reinterpret_cast<const float *>(scale_row(stage, half) + threadIdx.x % WARP / 4 * RING_CHUNK);
    }
    // Makes them of nested ones.
    __device__ void expand_scales(u32 stage, const Turn &turn, const float *map, float offset) const {
        const int lane = int(threadIdx.x % WARP), g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 *const to = scale_row(stage, half) + lane;
            u32 word, absmax2;
            int byte = t;
            if (quads) {
                word = scale_row(stage, 2)[half * (ROWS / 2) + g];
                absmax2 = scale_row(stage, 2)[ROWS + half * (ROWS / 2) + g];
            } else {
                word = *to;
                absmax2 = scale_row(stage, 2 + half)[lane];
                byte = int((block_of(turn, g + half * (ROWS / 2)) + u32(t)) >> shift & 3);
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

// Has the second-level cache fetch the first plan.ahead bytes of the block's codes, which lie together, and their scales.
// Nothing is read, so that it does not matter who still writes them.
template <bool NESTED>
__device__ inline void fetch_ahead(const u8 *packed, const Scales &scales, int n, int k, int shift, const RingPlan &plan) {
    if (threadIdx.x == 0) {
        const int first_row = int(blockIdx.x) * plan.rows;
        const u32 row_blocks = u32(k) / BLOCK, rows = u32(n - first_row < plan.rows ? n - first_row : plan.rows);
        const u64 first = u64(u32(first_row)) * row_blocks, all = u64(rows) * row_blocks;
        const u32 most = u32(plan.ahead) / BLOCK_BYTES, blocks = all < most ? u32(all) : most;
        fetch(packed + first * BLOCK_BYTES, blocks * BLOCK_BYTES);
        if constexpr (NESTED) {
            fetch(scales.codes + (first >> shift), blocks >> shift);
        } else {
            fetch(scales.absmax + (first >> shift), (blocks >> shift) * u32(sizeof(float)));
        }
    }
}

// Where the sums of a step are. Those of 16 columns of all warps would leave room for few steps in a pass, and passes end with
// barriers: there the warps of neighbouring slots share a place, each adding its own to what it finds.
template <int FRAGMENTS>
struct StepSums {
    static constexpr bool SHARED = FRAGMENTS > 1;
    static constexpr int PLACE = FRAGMENTS * SUMS;
    // A barrier of each warp for each of MOST_STEPS steps, where the next one waits for it. A pass is one phase.
    static constexpr u32 BARRIER_BYTES = SHARED ? MOST_STEPS * RING_WARPS * sizeof(Barrier) : 0;

    const int log2_sharing;

    __device__ StepSums(const RingPlan &plan) : log2_sharing(SHARED ? plan.log2_sharing : 0) {}
    __device__ int places() const { return RING_WARPS >> log2_sharing; }
};

template <typename T, bool NESTED, int FRAGMENTS>
__device__ inline void decode_ring(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m, int n,
                                   int k, int block_shift, u32 quant_type, const RingPlan &plan) {
    constexpr int ROUND = 2 / FRAGMENTS;
    DYNAMIC_SHARED(shared);
    const Share share(n, k, plan);
    using Sums = StepSums<FRAGMENTS>;
    const Sums places(plan);
    // The sums of all steps fit in shared memory: those of later rounds are added to them there.
    const bool gathers = Sums::SHARED && share.steps_of(plan.rows, plan) <= plan.per_pass;
    Barrier *const stored = reinterpret_cast<Barrier *>(shared);                 // [step][RING_WARPS], when places are shared
    float *const map = reinterpret_cast<float *>(shared + Sums::BARRIER_BYTES);  // [256]
    float *const all_sums = map + MAP_BYTES / sizeof(float);                     // [step][PLACES][FRAGMENTS][SUMS]
    const u32 sums_count = u32(plan.per_pass * places.places() * Sums::PLACE);
    float *const whole = all_sums + sums_count;  // [m][plan.rows], when there are several rounds of several passes
    const u32 whole_count = share.chunks > ROUND && !gathers ? u32(m * plan.rows) : 0;
    const u32 before = Sums::BARRIER_BYTES + MAP_BYTES + (sums_count + whole_count) * sizeof(float);
    const u32 place_of_table = before + lane_table_place(shared + before);
    u32 *const table = reinterpret_cast<u32 *>(shared + place_of_table);  // [256][LANE_TABLE_ROW], half used

    const int lane = int(threadIdx.x % WARP), warp = int(threadIdx.x / WARP);
    const int g = lane / 4, t = lane % 4;

    if (Sums::SHARED && threadIdx.x < u32(plan.per_pass * RING_WARPS)) {
        barrier_init(stored + threadIdx.x, WARP);
    }
    fetch_ahead<NESTED>(packed, scales, n, k, block_shift - BLOCK_SHIFT, plan);
    wait_for_previous();
    let_next_start();

    // What comes behind copies waits for them in the memory's queue: so x is loaded behind the first alone, and before it
    // where there is much of it.
    Copier<NESTED, ROUND> copier(share, scales, packed, shared + (place_of_table + LANE_TABLE_BYTES), table,
                                 block_shift - BLOCK_SHIFT, n);
    u32 started = 0;
    if (m <= FEW_COLUMNS<NESTED>) {
        copier.copy(started++);
    }
    const float offset = NESTED ? *scales.offset : 0.0f;
    u32 x_words[ROUND][RING_CHUNK][FRAGMENTS][8];
    const auto load_round = [&](int first) {
        const int lane = read_lane();
#pragma unroll
        for (int c = 0; c < ROUND; c++) {
            load_x<FRAGMENTS, RING_CHUNK>(x_words[c], x, m, k, share.first_block(first + c), share.blocks(first + c),
                                          lane / 4, lane % 4);
        }
    };
    load_round(0);
    fill_map<NESTED, RING_THREADS>(map);
#pragma unroll 1
    for (; started < STAGES; started++) {
        copier.copy(started);
    }
    fill_table<T, RING_THREADS>(table, quant_type);
    __syncthreads();

    const LaneTable entries = lane_table(table, lane);
    // This lane's 8 bytes of block j are at this offset, with bits 5 and 6 inverted where those of 32 j are set.
    static_assert(BLOCK_BYTES == 32 && RING_CHUNK == 4, "bits 5 and 6");
    const u32 lane_offset = u32(ring_offset(g, 0) + t * 8);
    const int low_place = g * COLUMNS + (t ^ g / 4) * 2;
    u32 stage = 0, phase = 0;  // its parity
    for (int chunk = 0; chunk < share.chunks; chunk += ROUND) {
        if (chunk > 0) {
            load_round(chunk);
        }
        for (int begin = 0, end; begin < share.steps; begin = end) {
            end = share.steps - begin < plan.per_pass ? share.steps : begin + plan.per_pass;
#pragma unroll 1
            for (int step = begin; step < end; step++) {
                float sums[FRAGMENTS][4] = {};
#pragma unroll
                for (int c = 0; c < ROUND; c++) {
                    if (chunk + c >= share.chunks) {
                        break;
                    }
                    // The oldest copy has ended, for all lanes.
                    copy_async_wait<STAGES - 1>();
                    if constexpr (NESTED) {
                        __syncwarp();
                        copier.expand_scales(stage, {chunk + c, step}, map, offset);
                    }
                    __syncwarp();
                    if (share.blocks(chunk + c) > 0) {
                        const u8 *const bytes = copier.ring + stage * STAGE_BYTES;
                        const float *const low_scales = copier.scales_of(stage, 0);
                        const float *const high_scales = copier.scales_of(stage, 1);
#pragma unroll
                        for (int j = 0; j < RING_CHUNK; j += 2) {
                            const Floats2 low_scale = *reinterpret_cast<const Floats2 *>(low_scales + j);
                            const Floats2 high_scale = *reinterpret_cast<const Floats2 *>(high_scales + j);
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
                    // Every lane has read its part.
                    __syncwarp();
                    copier.copy(stage);
                    stage = stage + 1 < STAGES ? stage + 1 : 0;
                }
                const int warps_before = (step - begin) * RING_WARPS + read_warp();
                float *const step_sums = all_sums + (warps_before >> places.log2_sharing) * Sums::PLACE;
                Barrier *const barrier = stored + warps_before;
                const int last = (1 << places.log2_sharing) - 1;
                const bool is_first = (warps_before & last) == 0;
                if (Sums::SHARED && (!is_first || (gathers && chunk > 0))) {
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
#pragma unroll
                for (int f = 0; f < FRAGMENTS; f++) {
                    *reinterpret_cast<Floats2 *>(step_sums + f * SUMS + low_place) = {sums[f][0], sums[f][1]};
                    *reinterpret_cast<Floats2 *>(step_sums + f * SUMS + (low_place ^ 4) + SUMS / 2) = {sums[f][2], sums[f][3]};
                }
                if (Sums::SHARED) {
                    barrier_arrive(barrier);
                }
            }
            // A pass ends one phase of every barrier, also of those of steps that it lacks.
            if (Sums::SHARED) {
                for (int step = end - begin; step < plan.per_pass; step++) {
                    barrier_arrive(stored + (step * RING_WARPS + warp));
                }
            }
            phase ^= 1;
            if (gathers && chunk + ROUND < share.chunks) {
                continue;
            }
            __syncthreads();
            // y, or the sums so far: a lane adds up those of one row and two columns, a warp those of two tiles.
            const int pairs_of_tiles = ((end - begin) * share.groups + 1) / 2;
#pragma unroll 1
            for (int two = warp, pair = 0;; two += RING_WARPS) {
                for (; two >= pairs_of_tiles; two -= pairs_of_tiles) {
                    pair++;
                }
                if (2 * pair >= m) {
                    break;
                }
                const int row_of_tile = lane % ROWS, tile = 2 * two + lane / ROWS;
                const int row = (begin * share.groups + tile) * ROWS + row_of_tile;
                if (tile < (end - begin) * share.groups && row < share.rows) {
                    const int place = tile << plan.log2_slots >> places.log2_sharing;
                    const float *const from = all_sums + place * Sums::PLACE + pair / 4 * SUMS +
                                              row_of_tile * COLUMNS + (pair % 4 ^ row_of_tile / 4) * 2;
                    float sums[2] = {};
                    if ((chunk == 0 || gathers) && bias != nullptr) {
                        sums[0] = sums[1] = to_f32(bias[share.first_row + row]);
                    }
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (chunk > 0 && !gathers && 2 * pair + i < m) {
                            sums[i] = whole[(2 * pair + i) * plan.rows + row];
                        }
                    }
#pragma unroll 8
                    for (int s = 0; s < share.slots >> places.log2_sharing; s++) {
                        const Floats2 part = *reinterpret_cast<const Floats2 *>(from + s * Sums::PLACE);
                        sums[0] += part.value[0];
                        sums[1] += part.value[1];
                    }
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int column = 2 * pair + i;
                        if (column >= m) {
                            continue;
                        }
                        if (chunk + ROUND < share.chunks) {
                            whole[column * plan.rows + row] = sums[i];
                        } else {
                            y[i64(column) * n + share.first_row + row] = from_f32<T>(sums[i]);
                        }
                    }
                }
            }
            __syncthreads();
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
// Grid: ceil(n / plan.rows) blocks of RING_THREADS. Dynamic shared memory: StepSums' barriers, MAP_BYTES, 1/2 KB for each
// place (of 16 columns 1) of each step of a pass, 4 * m * plan.rows when there are several rounds of several passes, then
// the table at the next place where it may begin, and STAGES * 32 KB behind it.
#define INSTANCE(name, T, nested, fragments)                                                                          \
    extern "C" __global__ void __launch_bounds__(RING_THREADS, 1)                                                     \
        decode_ring_##name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k,    \
                  int block_shift, u32 quant_type, RingPlan plan) {                                                   \
        decode_ring<T, nested, fragments>(x, packed, scales, bias, y, m, n, k, block_shift, quant_type, plan);        \
    }

INSTANCE(bf16_8, Bf16, false, 1)
INSTANCE(bf16_16, Bf16, false, 2)
INSTANCE(bf16_8_nested, Bf16, true, 1)
INSTANCE(bf16_16_nested, Bf16, true, 2)
INSTANCE(f16_8, F16, false, 1)
INSTANCE(f16_16, F16, false, 2)
INSTANCE(f16_8_nested, F16, true, 1)
INSTANCE(f16_16_nested, F16, true, 2)
