// experts_few: products of small_m.cuh for mixtures of experts: each token's row by the matrices of the experts that the router
// chose for it. Twice for a block of experts: gate and up with the activation, then down.
//
// Problem. Expert e has a matrix [n][k] in 4 bits, or two of them, `gate` and `up`, whose products become one. For each slot
//   (route.cuh) the row of x that is its token's, or its own, by its expert's matrices. float16 or bfloat16; n and k multiples
//   of 64; blocks of 64 to 4096, plain or nested scales; any number of slots of an expert, 8 of them at a time. Compute
//   capability 8.0 and later.
//
// Roofline. Memory: the codes and scales of the experts that any slot has, once. A layer of Qwen3-30B-A3B (128 experts of
//   2048 x 768 with three matrices, 8 for each token) has 2.65 MB an expert: 1, 8 and 32 tokens read 21, 138 and 297 MB, which
//   takes an H200 4.8, 31 and 65 us.
//
// Tile. What there is to do are units: some tiles of 16 rows of each matrix, for a chunk of an expert's slots. All units, in
//   the order of chunks, are dealt out in equal consecutive parts, one for each block of threads; there are as many of these
//   as multiprocessors. Of each chunk a block has a segment:
//
//     chunk 0 (expert 1)        chunk 1 (expert 3)        chunk 2 (expert 7)
//     |-u-|-u-|-u-|-u-|-u-|-u-| |-u-|-u-|-u-|-u-|-u-|-u-| |-u-|-u- ...
//     [----- block 0 ------][-- block 1: two segments --][-- block 2 ...
//
//   A segment is worked on as gemm_4bit_small_m_sm90 does its rows: the warps of a group have a k-slice each, whose part of x
//   they keep in registers; groups take tiles in turn; the sums of a pass of tiles meet in shared memory. A gate's tile and an
//   up's follow each other, so that both are there when a pass is written. While a pass is written the next segment's x is on
//   the way, and each warp's bytes of its next tile are, whichever segment has it.
//
//   Few slots (64) are sorted by every block itself: 1 token takes 4 us longer with a launch for that. With 256 it is the other
//   way round. Where the kernel before is the one of gate and up, whose inputs are the same, a block sorts and loads its first
//   bytes while that one still runs, and waits before it reads x.
//
// Shared memory. Up to 99 KB where a device has no more, else what it has:
//     table      256 entries x 32 lanes x 4 bytes in rows of 256 bytes; between them the bytes of each warp's tile     64 KB
//     map        of nested scales                                                                               1 KB
//     route      few slots, sorted, and their chunks                                                          1.5 KB
//     segments   of a block, up to 16 at a time: matrices, and the row of x and y of each column              2.0 KB
//     partial    [2][tiles of a pass][k-slices][8][16] float32 sums
//
// Budget. One block of 8 warps on a multiprocessor, of 255 registers 211 to 243 taken: 64 for x of a k-tile of 8 blocks. 32 KB of
//   codes are on the way for all warps. With one token a multiprocessor has 80 KB of weights to read in all, and no time to come
//   up to speed: the first bytes of each segment are fetched to the second level as soon as it is known.
//
// Tried, and slower, on an H200 (in microseconds for 8 tokens of the layer above; 68 now): the bytes by way of registers, as
//   gemm_4bit_small_m_sm80 has them, with 16 warps (103), with 8 (89 to 100): eight rows of 32 bytes in a load, not whole lines;
//   16 columns at a time (82), which only pays from some 16 slots of an expert on. No faster: two or three tiles of each warp on
//   the way instead of one.
//
// Determinism. As small_m.cuh: a row's sum is added up in an order that n, k and the columns' number alone decide.
#pragma once

#include "experts/activation.cuh"
#include "experts/matrix.cuh"
#include "experts/route.cuh"
#include "gemm/small_m_sm80/warp.cuh"

// What a launch is to do, as the launcher says it. T is not known to it: the pointers are to T where they are to nothing else.
struct Experts {
    const Matrix *matrices;  // [projections][experts]
    const void *x;           // [tokens][k] if `gathers`, else [slots][k] in the order
    const void *bias;        // [experts][projections * n], or null
    void *y;                 // [slots][n] in the order if `gathers`, else as slots are numbered
    const i64 *ids;          // [slots]
    const int *order;        // of experts_route, or null: then blocks sort by themselves, and the next two are null too
    const Chunk *chunks;
    const int *chunk_count;
    int slots, top_k, experts;
    int n, k;
    int projections;  // 2: gate and up
    u32 gathers;      // whether x is of tokens
    u32 activation;   // of gate and up; ACTIVATION_NONE: y is [slots][projections * n]
    int block_shift;
    u32 quant_type;
    int k_slices;      // parts of K: a power of two, at most the number of warps
    int per_pass;      // tiles whose partial sums fit in shared memory: a multiple of `projections`
    int unit;          // tiles of a unit: a multiple of `projections`, and n / 16 * projections one of it
    int ahead;         // bytes that are fetched of each segment's matrices
};

// What a block of threads has of a chunk. Tiles: of 16 rows, those of gate and up alternating.
struct Segment {
    Matrix matrix[2];
    float offset[2];
    int expert, begin, count;
    int first, end;  // tiles
};
constexpr int SEGMENT_BYTES = int(sizeof(Segment));
static_assert(SEGMENT_BYTES % 16 == 0, "what is behind is aligned");

// The part of shared memory that few slots take, a multiple of 16.
constexpr u32 ROUTE_BYTES = (FEW_SLOTS_BYTES + 15) / 16 * 16;

// Segments that are known at a time. More are so few that waiting for them does not matter.
constexpr int SEGMENTS = 16;

// Eight warps, and blocks of a k-tile. See the budget.
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int K_TILE = 8;

// Where the bytes of a warp's k-tile are, in the unused halves of the look-up table: 16 rows of two pieces of 128 bytes, 256 bytes
// apart. In a piece of row r block j lies at j ^ (r % 4): so the four rows that half a warp reads at a time are in different
// banks.
constexpr int STAGE_ROW = 512;
constexpr int STAGE_SPAN = ROWS * STAGE_ROW;
static_assert(u32(WARPS * STAGE_SPAN) == LANE_TABLE_BYTES, "all warps have room");
static_assert(THREADS >= FEW_SLOTS, "a thread for each slot");

// Which part of K a warp has, and which tiles. What is easily had anew takes no registers.
struct KSlice {
    const Experts &job;
    int first_block, k_tiles, k_tile_size, larger_k_tiles;

    __device__ explicit KSlice(const Experts &job) : job(job) {
        const int k_slice = read_warp() & (job.k_slices - 1), shift = log2_k_slices();
        first_block = int(i64(row_blocks()) * k_slice >> shift);
        // K-tiles of a k-slice are as equal as can be: the first ones may have a block more.
        const int blocks = int(i64(row_blocks()) * (k_slice + 1) >> shift) - first_block;
        k_tiles = (blocks + K_TILE - 1) / K_TILE;
        k_tile_size = blocks / k_tiles;
        larger_k_tiles = blocks - k_tile_size * k_tiles;
    }
    __device__ int log2_k_slices() const { return 31 - __clz(job.k_slices); }
    __device__ int row_blocks() const { return job.k / BLOCK; }
    __device__ int groups() const { return WARPS >> log2_k_slices(); }
    __device__ int group() const { return read_warp() >> log2_k_slices(); }
    __device__ int begin(int k_tile) const {
        return first_block + k_tile * k_tile_size + (k_tile < larger_k_tiles ? k_tile : larger_k_tiles);
    }
    __device__ int blocks(int k_tile) const { return k_tile_size + (k_tile < larger_k_tiles); }
};

// A block's part of all tiles of all chunks.
struct alignas(16) Part {
    u32 begin, end;
    int first_chunk, end_chunk;  // the same where there is nothing
};
constexpr int PART_BYTES = int(sizeof(Part));

// Goes over a warp's k-tiles of tiles: segments in turn, in each passes, in each of these k-tiles, in each the tiles of its group.
struct Walker {
    int segment, pass_begin, pass_end;
    int k_tile, tile;

    // Before the first.
    __device__ __forceinline__ void start(const Segment *segments, int k_tiles) {
        const int first = segments[0].first;
        *this = {0, first, first, k_tiles, first};
    }
    // To the next one, or to segment `count`.
    template <typename Slice>
    __device__ __forceinline__ void advance(const Segment *segments, int count, int per_pass, const Slice &slice) {
        tile += slice.groups();
        if (tile < pass_end) {
            return;
        }
        if (++k_tile < slice.k_tiles) {
            tile = pass_begin + slice.group();
            return;
        }
        k_tile = 0;
        // To the next pass that has a tile for this group.
        do {
            pass_begin = pass_end;
            if (segment < count && pass_begin >= segments[segment].end && ++segment < count) {
                pass_begin = segments[segment].first;
            }
            if (segment >= count) {
                return;
            }
            const int end = segments[segment].end;
            pass_end = end - pass_begin < per_pass ? end : pass_begin + per_pass;
            tile = pass_begin + slice.group();
        } while (tile >= pass_end);
    }
};

// The scales of a warp's k-tiles, one after the other. Of a k-tile's blocks a lane has t, t + 4, ..., for row g and row g + 8:
// the lanes of a quad share theirs later. Those of blocks that are not there are finite; what they meet is zero.
template <bool NESTED>
struct LaneScales {
    RawScale<NESTED> low[K_TILE / 4], high[K_TILE / 4];

    __device__ void load(const Scales &scales, u32 low_block, u32 high_block, int t, int blocks, int shift) {
#pragma unroll
        for (int q = 0; q < K_TILE / 4; q++) {
            const int block = q * 4 + t;
            low[q] = high[q] = {};
            if (block < blocks) {
                low[q] = ScaleReader<NESTED>(scales, i64((low_block + u32(block)) >> shift))[0];
                high[q] = ScaleReader<NESTED>(scales, i64((high_block + u32(block)) >> shift))[0];
            }
        }
    }
};

// Copies the bytes of a k-tile of a tile to a stage; `from` is where its first row has them. 16 bytes for each lane, whole lines of
// two rows at a time: with as few bytes as a lane needs, of eight rows, the same loads took twice as long.
__device__ inline void copy_tile(u8 *stage, const u8 *from, u32 pitch, int blocks) {
    const int lane = read_lane(), row = lane / 16, piece = lane % 16, j = piece / 2;
    from += u32(row) * pitch + u32(piece * 16);
    u8 *const to = stage + row * STAGE_ROW + j / 4 * 256 + piece % 2 * 16;
    if (j < blocks) {
#pragma unroll
        for (int i = 0; i < ROWS; i += 2) {
            copy_async(reinterpret_cast<Words4 *>(to + i * STAGE_ROW + ((j ^ (i + row)) & 3) * BLOCK_BYTES),
                       reinterpret_cast<const Words4 *>(from));
            from += 2 * pitch;
        }
    }
    copy_async_commit();
}

// The sum of a row of a tile and a column over the k-slices, in their order.
__device__ inline float sum_of(const float *tile_sums, int k_slices, int size) {
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < k_slices; s++) {
        sum += tile_sums[s * size];
    }
    return sum;
}

// After a barrier: y from the partial sums [tile][k-slice][MOST][16] of the tiles from `begin` to `end` of a segment. A warp takes
// 32 rows of one column at a time.
template <typename T, int MOST>
__device__ inline void write_pass(const Experts &job, const Segment &segment, const int *rows, const float *sums, int begin,
                                  int end) {
    const int columns = segment.count;
    constexpr int SIZE = MOST * ROWS;
    const int lane = int(threadIdx.x % WARP), warp = int(threadIdx.x / WARP);
    const int projections = job.projections, k_slices = job.k_slices;
    const int first_row = begin / projections * ROWS, count = (end - begin) / projections * ROWS;
    const bool joins = job.activation != ACTIVATION_NONE;
    const i64 pitch = joins ? job.n : i64(projections) * job.n;
    const T *const bias =
        job.bias == nullptr ? nullptr : static_cast<const T *>(job.bias) + i64(segment.expert) * projections * job.n;
    T *const y = static_cast<T *>(job.y);
#pragma unroll 1
    for (int piece = warp; piece < (count + WARP - 1) / WARP * columns; piece += WARPS) {
        const int column = piece % columns, row = piece / columns * WARP + lane;
        if (row < count) {
            const float *const from =
                sums + row / ROWS * projections * k_slices * SIZE + partial_offset(column, row % ROWS, MOST);
            float first = sum_of(from, k_slices, SIZE), second = 1.0f;
            if (projections == 2) {
                second = sum_of(from + k_slices * SIZE, k_slices, SIZE);
            }
            if (bias != nullptr) {
                first += to_f32(bias[first_row + row]);
                if (projections == 2) {
                    second += to_f32(bias[job.n + first_row + row]);
                }
            }
            const i64 y_row = job.gathers ? segment.begin + column : rows[column];
            T *const to = y + (y_row * pitch + first_row + row);
            if (joins) {
                *to = from_f32<T>(activated(job.activation, first, second));
            } else {
                *to = from_f32<T>(first);
                if (projections == 2) {
                    to[job.n] = from_f32<T>(second);
                }
            }
        }
    }
}

template <typename T, bool NESTED, int FRAGMENTS>
__device__ inline void experts_few(const Experts &job) {
    constexpr int MOST = FRAGMENTS * COLUMNS, SIZE = MOST * ROWS;  // of a k-slice's sums
    DYNAMIC_SHARED(shared);
    u32 *const table = reinterpret_cast<u32 *>(shared);                       // [256][64], half used
    float *const map = reinterpret_cast<float *>(shared + LANE_TABLE_BYTES);  // [256]
    unsigned char *const behind_map = shared + LANE_TABLE_BYTES + MAP_BYTES;
    const FewSlots few = few_slots(behind_map);
    Segment *const segments = reinterpret_cast<Segment *>(behind_map + ROUTE_BYTES);                 // [SEGMENTS]
    Part *const part = reinterpret_cast<Part *>(segments + SEGMENTS);
    int *const rows = reinterpret_cast<int *>(part + 1);  // [SEGMENTS][MOST]
    float *const partial = reinterpret_cast<float *>(rows + SEGMENTS * MOST);
    const int thread = int(threadIdx.x);
    const KSlice slice(job);
    const int projections = job.projections, shift = job.block_shift - BLOCK_SHIFT;
    const bool gathers = job.gathers != 0;

    fill_table<T, THREADS>(table, job.quant_type);
    fill_map<NESTED, THREADS>(map);
    if (gathers) {
        wait_for_previous();
        let_next_start();
    }

    const bool routes = job.order == nullptr;
    const int chunk_count = routes ? route_few(few, job.ids, job.slots, job.experts, MOST) : *job.chunk_count;
    const auto chunk_tiles = [&]() { return job.n / ROWS * projections; };
    if (thread == 0) {
        // Equal parts, the first ones with a unit more.
        const u32 units = u32(chunk_count) * u32(chunk_tiles() / job.unit);
        const u32 each = units / gridDim.x, more = units % gridDim.x;
        const u32 begin = (blockIdx.x * each + (blockIdx.x < more ? blockIdx.x : more)) * u32(job.unit);
        const u32 end = begin + (each + (blockIdx.x < more)) * u32(job.unit);
        const int end_chunk = int((end + u32(chunk_tiles()) - 1) / u32(chunk_tiles()));
        *part = {begin, end, begin < end ? int(begin / u32(chunk_tiles())) : end_chunk, end_chunk};
    }
    __syncthreads();
    int buffer = 0;  // which of two: where its sums begin

    for (int batch = part->first_chunk; batch < part->end_chunk; batch += SEGMENTS) {
        const int count = part->end_chunk - batch < SEGMENTS ? part->end_chunk - batch : SEGMENTS;
        // The last pass of the batch before has been written.
        __syncthreads();
        const int *const order = routes ? few.order : job.order;
        const Chunk *const chunks = routes ? few.chunks : job.chunks;
        // A thread for each matrix; then one for each column.
        for (int i = thread; i < count * projections; i += THREADS) {
            const int s = i / projections, p = i % projections;
            const Chunk chunk = chunks[batch + s];
            const Matrix matrix = job.matrices[p * job.experts + chunk.expert];
            Segment &segment = segments[s];
            segment.matrix[p] = matrix;
            segment.offset[p] = NESTED ? *matrix.offset : 0.0f;
            const u32 chunk_begin = u32(batch + s) * u32(chunk_tiles()), chunk_end = chunk_begin + u32(chunk_tiles());
            const int first = part->begin > chunk_begin ? int(part->begin - chunk_begin) : 0;
            const int end = part->end < chunk_end ? int(part->end - chunk_begin) : chunk_tiles();
            if (p == 0) {
                segment.expert = chunk.expert;
                segment.begin = chunk.begin;
                segment.count = chunk.count;
                segment.first = first;
                segment.end = end;
            }
            const i64 of_tile = i64(ROWS) * slice.row_blocks() * BLOCK_BYTES;
            const i64 bytes = (end - first) / projections * of_tile;
            fetch_to_second_level(matrix.codes + first / projections * of_tile, u32(bytes < job.ahead ? bytes : job.ahead));
        }
        for (int i = thread; i < count * MOST; i += THREADS) {
            const Chunk chunk = chunks[batch + i / MOST];
            if (i % MOST < chunk.count) {
                const int slot = order[chunk.begin + i % MOST];
                rows[i] = gathers ? slot / job.top_k : slot;
            }
        }
        __syncthreads();

        // Where a warp's next tile is: this batch's, or none.
        Walker ahead;
        ahead.start(segments, slice.k_tiles);
        u32 block = 0;  // of the tile's first row
        LaneScales<NESTED> scales = {};
        const auto stage = [&]() { return reinterpret_cast<u8 *>(table) + 128 + read_warp() * STAGE_SPAN; };
        // Goes to the next tile, and has its scales and its bytes loaded.
        const auto load_next = [&]() {
            const int groups = slice.groups();
            // From one tile of a group to its next, where these are of one matrix.
            if (groups >= projections && ahead.tile + groups < ahead.pass_end) {
                ahead.tile += groups;
                block += u32((projections == 2 ? groups / 2 : groups) * ROWS * slice.row_blocks());
            } else {
                ahead.advance(segments, count, job.per_pass, slice);
                if (ahead.segment >= count) {
                    return;
                }
                const int row = (projections == 2 ? ahead.tile >> 1 : ahead.tile) * ROWS;
                block = u32(row * slice.row_blocks() + slice.begin(ahead.k_tile));
            }
            // Read anew each time: they would take registers that x needs.
            const Segment &segment = segments[ahead.segment];
            const int p = projections == 2 ? ahead.tile & 1 : 0;
            const Matrix &matrix = segment.matrix[p];
            const int blocks = slice.blocks(ahead.k_tile);
            copy_tile(stage(), matrix.codes + u64(block) * BLOCK_BYTES, u32(slice.row_blocks()) * BLOCK_BYTES, blocks);
            const int g = read_lane() / 4, t = read_lane() % 4;
            const u32 low = block + u32(g * slice.row_blocks());
            scales.load(matrix.scales(), low, low + u32(ROWS / 2 * slice.row_blocks()), t, blocks, shift);
        };
        load_next();
        u32 x_words[K_TILE][FRAGMENTS][8];
        const auto load_x_of = [&](int segment, int k_tile) {
            const int g = read_lane() / 4, t = read_lane() % 4;
            const int begin = segments[segment].begin, columns = segments[segment].count;
            const auto row_of = [&](int column) {
                const int c = column < columns ? column : columns - 1;
                return static_cast<const T *>(job.x) + i64(gathers ? rows[segment * MOST + c] : begin + c) * job.k;
            };
            load_x_rows<FRAGMENTS, K_TILE>(x_words, row_of, slice.begin(k_tile), slice.blocks(k_tile), g, t);
        };
        if (!gathers && batch == part->first_chunk) {
            wait_for_previous();
            let_next_start();
        }
        load_x_of(0, 0);

        const PlainTable entries = {table, u32(read_lane()) * 4};
#pragma unroll 1
        for (int s = 0; s < count; s++) {
            const int end = segments[s].end;
#pragma unroll 1
            for (int begin = segments[s].first, pass_end; begin < end; begin = pass_end) {
                pass_end = end - begin < job.per_pass ? end : begin + job.per_pass;
                buffer ^= job.per_pass * job.k_slices * SIZE;
#pragma unroll 1
                for (int k_tile = 0; k_tile < slice.k_tiles; k_tile++) {
                    if (k_tile > 0) {
                        load_x_of(s, k_tile);
                    }
#pragma unroll 1
                    for (int tile = begin + slice.group(); tile < pass_end; tile += slice.groups()) {
                        const float offset = NESTED ? segments[s].offset[projections == 2 ? tile & 1 : 0] : 0.0f;
                        float low_scale[K_TILE / 4], high_scale[K_TILE / 4];
#pragma unroll
                        for (int q = 0; q < K_TILE / 4; q++) {
                            low_scale[q] = scales.low[q].value(map, offset);
                            high_scale[q] = scales.high[q].value(map, offset);
                        }
                        // The copies have ended, for all lanes.
                        copy_async_wait<0>();
                        __syncwarp();
                        const u8 *const own_stage = stage();
                        const int lane = read_lane(), g = lane / 4, t = lane % 4;
                        float sums[FRAGMENTS][4] = {};
                        // Of blocks that are not there x is zero: no branch is faster than what it spares.
#pragma unroll
                        for (int j = 0; j < K_TILE; j++) {
                            const u8 *const bytes =
                                own_stage + (g * STAGE_ROW + j / 4 * 256 + t * 8 + ((j ^ g) & 3) * BLOCK_BYTES);
                            add_block<T>(sums, entries, *reinterpret_cast<const Words2 *>(bytes),
                                         *reinterpret_cast<const Words2 *>(bytes + ROWS / 2 * STAGE_ROW), x_words[j],
                                         __shfl_sync(ALL_LANES, low_scale[j / 4], (lane & ~3) + j % 4),
                                         __shfl_sync(ALL_LANES, high_scale[j / 4], (lane & ~3) + j % 4));
                        }
                        // Every lane has read its part.
                        __syncwarp();
                        load_next();
                        float *const own =
                            partial + buffer + ((tile - begin) * job.k_slices + (read_warp() & (job.k_slices - 1))) * SIZE;
                        add_partial(own, sums, MOST, k_tile == 0, g, t);
                    }
                }
                // x of the pass that follows.
                if (pass_end < end) {
                    if (slice.k_tiles > 1) {
                        load_x_of(s, 0);
                    }
                } else if (s + 1 < count) {
                    load_x_of(s + 1, 0);
                }
                // All sums are there; and all that was written of the pass before has been read.
                __syncthreads();
                write_pass<T, MOST>(job, segments[s], rows + s * MOST, partial + buffer, begin, pass_end);
            }
        }
    }
    if (!gathers && part->first_chunk == part->end_chunk) {
        // Without a part: the order of kernels is kept all the same.
        wait_for_previous();
        let_next_start();
    }
}
