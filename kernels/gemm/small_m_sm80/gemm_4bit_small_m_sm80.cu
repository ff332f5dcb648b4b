// The products of small_m.cuh, W by way of registers: each warp loads the bytes of its next tile as it uses those of this
// one. Needs 77 KB of shared memory and less, which every card of compute capability 8.0 and later has.
#include "gemm/small_m.cuh"

// By the number of 8-column fragments of x, 1 or 2: twice the columns are twice the registers for x and so half the warps,
// each of which has twice the bytes on the way.
template <int FRAGMENTS>
struct Sizes {
    static constexpr int WARPS = 16 / FRAGMENTS;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int CHUNK = 4 * FRAGMENTS;
};

// How the launcher divides the work.
struct LaunchConfig {
    int rows;      // of W, for each block of threads
    int slots;     // parts of K: a power of two, at most the number of warps
    int per_pass;  // tiles whose partial sums fit in shared memory
};

// A chunk of a tile.
struct Place {
    int tile, pass_begin, pass_end;
    int chunk;
};

// What one warp has to do: a part of K, up to CHUNK blocks of it at a time. Its places come in passes, in each of these the
// chunks of its slot, in each the tiles of its group.
template <bool NESTED, int WARPS, int CHUNK>
struct Work {
    const Scales &scales;
    int scale_shift;  // log2 of the blocks here that share a scale
    int row_blocks;
    int first_row, rows;  // of this block of threads
    int slots, slot, group, groups;
    int first_block, chunks, chunk_size, larger_chunks;
    int tiles, per_pass;
    int g, t;

    __device__ Work(const Scales &scales, int n, int k, int block_shift, const LaunchConfig &config)
        : scales(scales),
          scale_shift(block_shift - BLOCK_SHIFT),
          row_blocks(k / BLOCK),
          slots(config.slots),
          per_pass(config.per_pass) {
        const int lane = int(threadIdx.x % WARP), warp = int(threadIdx.x / WARP);
        first_row = int(blockIdx.x) * config.rows;
        rows = n - first_row < config.rows ? n - first_row : config.rows;
        tiles = (rows + ROWS - 1) / ROWS;
        // `slots` is a power of two.
        const int log2_slots = 31 - __clz(slots);
        slot = warp & (slots - 1);
        group = warp >> log2_slots;
        groups = WARPS >> log2_slots;
        first_block = int(i64(row_blocks) * slot >> log2_slots);
        // Chunks of a slot are as equal as can be: the first ones may have a block more.
        const int slot_blocks = int(i64(row_blocks) * (slot + 1) >> log2_slots) - first_block;
        chunks = (slot_blocks + CHUNK - 1) / CHUNK;
        chunk_size = slot_blocks / chunks;
        larger_chunks = slot_blocks - chunk_size * chunks;
        g = lane / 4;
        t = lane % 4;
    }

    __device__ int chunk_begin(int chunk) const {
        return first_block + chunk * chunk_size + (chunk < larger_chunks ? chunk : larger_chunks);
    }
    __device__ int chunk_blocks(int chunk) const { return chunk_size + (chunk < larger_chunks); }
    __device__ int end_of_pass(int begin) const { return tiles - begin < per_pass ? tiles : begin + per_pass; }

    __device__ Place first() const {
        Place place = {group, 0, end_of_pass(0), 0};
        skip_empty(place);
        return place;
    }
    // To the next place; false when it is in another chunk, or the last was the last.
    __device__ bool advance(Place &place) const {
        if (!exists(place)) {
            return true;
        }
        place.tile += groups;
        if (place.tile < place.pass_end) {
            return true;
        }
        if (++place.chunk == chunks) {
            place.chunk = 0;
            place.pass_begin = place.pass_end;
            place.pass_end = end_of_pass(place.pass_begin);
        }
        place.tile = place.pass_begin + group;
        skip_empty(place);
        return false;
    }
    // The last pass may have no tile for this group.
    __device__ void skip_empty(Place &place) const {
        if (place.tile >= place.pass_end) {
            place.tile = tiles;
        }
    }
    __device__ bool exists(const Place &place) const { return place.tile < tiles; }
    // The first block of a row of a place's tile.
    __device__ i64 block_of(const Place &place, int row) const {
        return i64(first_row + place.tile * ROWS + row) * row_blocks + chunk_begin(place.chunk);
    }
};

// The scales of a warp's places, one place after the other. Of a chunk's blocks a lane has t, t + 4, ..., for row g and row
// g + 8: the lanes of a quad share theirs later.
template <bool NESTED, int WARPS, int CHUNK>
struct QuadScales {
    RawScale<NESTED> low[CHUNK / 4], high[CHUNK / 4];

    __device__ void load(const Work<NESTED, WARPS, CHUNK> &work, const Place &place, i64 low_block, int blocks) {
        const int row = place.tile * ROWS + work.g;
        const i64 high_block = low_block + i64(ROWS / 2) * work.row_blocks;
#pragma unroll
        for (int q = 0; q < CHUNK / 4; q++) {
            const int block = q * 4 + work.t;
            if (block < blocks && row < work.rows) {
                low[q] = ScaleReader<NESTED>(work.scales, (low_block + block) >> work.scale_shift)[0];
            }
            if (block < blocks && row + ROWS / 2 < work.rows) {
                high[q] = ScaleReader<NESTED>(work.scales, (high_block + block) >> work.scale_shift)[0];
            }
        }
    }
};

// Such a table anywhere, with 64 words from one entry to the next.
struct PlainTable {
    const u32 *table;
    u32 lane_offset;
};

template <int BYTE>
__device__ inline u32 look_up(PlainTable table, u32 word) {
    // Byte 0 of the offset from the lane, byte 1 from the word, bytes 2 and 3 zero (as all but one of the lane's are).
    return at_byte(table.table, permute_bytes(word, table.lane_offset, 0x5504 | BYTE << 4));
}

// A lane's bytes of a chunk, in row g and row g + 8.
template <int CHUNK>
struct Bytes {
    Words2 low[CHUNK], high[CHUNK];

    __device__ void load(int j, const u8 *low_packed, const u8 *high_packed) {
        low[j] = load_stream(reinterpret_cast<const Words2 *>(low_packed + j * BLOCK_BYTES));
        high[j] = load_stream(reinterpret_cast<const Words2 *>(high_packed + j * BLOCK_BYTES));
    }
};

// Where the sum of a column and a row of a tile is in a warp's [m][16] partial sums: columns in the order 0, 2, 4, ... 1,
// 3, ..., and in every other pair of these the halves of the rows exchanged. So the lanes of a fragment store to 32 banks.
__device__ inline int partial_offset(int column, int row, int m) {
    const int place = column / 2 + (column % 2 == 0 ? 0 : (m + 1) / 2);
    return place * ROWS + (row ^ (place / 2 % 2 * (ROWS / 2)));
}

// The sums of a tile's chunk to, or on top of, this warp's partial sums.
template <int FRAGMENTS>
__device__ inline void add_partial(float *own, const float (&sums)[FRAGMENTS][4], int m, bool is_first, int g, int t) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int column = f * COLUMNS + 2 * t + e % 2;
            if (column < m) {
                float *const sum = own + partial_offset(column, g + e / 2 * 8, m);
                *sum = is_first ? sums[f][e] : *sum + sums[f][e];
            }
        }
    }
}

// After a barrier: y from the partial sums [tile][slot][m][16] of the tiles from `begin` to `end`. A warp takes 32 rows of
// one column at a time.
template <typename T, int WARPS, typename W>
__device__ inline void write_pass(const W &work, int begin, int end, const float *partial, const T *bias, T *y, int m, int n) {
    const int lane = int(threadIdx.x % WARP), warp = int(threadIdx.x / WARP);
    const int rows = (work.rows < end * ROWS ? work.rows : end * ROWS) - begin * ROWS;
    const int first_row = work.first_row + begin * ROWS;
    const int size = m * ROWS;
#pragma unroll 1
    for (int piece = warp; piece < (rows + WARP - 1) / WARP * m; piece += WARPS) {
        const int column = piece % m, row = piece / m * WARP + lane;
        if (row < rows) {
            const float *from = partial + row / ROWS * work.slots * size + partial_offset(column, row % ROWS, m);
            float sum = bias != nullptr ? to_f32(bias[first_row + row]) : 0.0f;
#pragma unroll 8
            for (int s = 0; s < work.slots; s++) {
                sum += from[s * size];
            }
            y[i64(column) * n + first_row + row] = from_f32<T>(sum);
        }
    }
}

template <typename T, bool NESTED, int FRAGMENTS>
__device__ inline void gemm_4bit_small_m_sm80(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m, int n, int k,
                              int block_shift, u32 quant_type, const LaunchConfig &config) {
    constexpr int WARPS = Sizes<FRAGMENTS>::WARPS, THREADS = Sizes<FRAGMENTS>::THREADS, CHUNK = Sizes<FRAGMENTS>::CHUNK;
    DYNAMIC_SHARED(shared);
    u32 *const table = reinterpret_cast<u32 *>(shared);                                       // [256][64], half used
    float *const map = reinterpret_cast<float *>(shared + LANE_TABLE_BYTES);                  // [256]
    float *const partial = reinterpret_cast<float *>(shared + LANE_TABLE_BYTES + MAP_BYTES);  // [tile][slot][m][16]

    const Work<NESTED, WARPS, CHUNK> work(scales, n, k, block_shift, config);
    const int lane = int(threadIdx.x) % WARP, g = work.g, t = work.t, quad_lane = lane & ~3;
    const u8 *const lane_packed = packed + t * 8;

    // Loads first: the table is made while they are on the way. Rows behind the last are read as the last, and what comes
    // of them is not written.
    Place ahead = work.first();
    int blocks_ahead = work.exists(ahead) ? work.chunk_blocks(ahead.chunk) : 0;
    const u8 *low_packed = packed, *high_packed = packed;
    const auto aim = [&]() {
        const int last = work.rows - 1 - ahead.tile * ROWS;
        low_packed = lane_packed + work.block_of(ahead, g < last ? g : last) * BLOCK_BYTES;
        high_packed = lane_packed + work.block_of(ahead, g + 8 < last ? g + 8 : last) * BLOCK_BYTES;
    };
    QuadScales<NESTED, WARPS, CHUNK> quad = {};
    Bytes<CHUNK> bytes = {};
    if (blocks_ahead > 0) {
        aim();
        quad.load(work, ahead, work.block_of(ahead, g), blocks_ahead);
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            if (j < blocks_ahead) {
                bytes.load(j, low_packed, high_packed);
            }
        }
    }
    const float offset = NESTED ? *scales.offset : 0.0f;
    u32 x_words[CHUNK][FRAGMENTS][8];
    load_x<FRAGMENTS, CHUNK>(x_words, x, m, k, work.chunk_begin(0), work.chunk_blocks(0), g, t);
    fill_table<T, THREADS>(table, quant_type);
    fill_map<NESTED, THREADS>(map);
    __syncthreads();

    const PlainTable entries = {table, u32(lane) * 4};
    int chunk_of_x = 0;
    for (int begin = 0, end; begin < work.tiles; begin = end) {
        end = work.end_of_pass(begin);
        for (int chunk = 0; chunk < work.chunks; chunk++) {
            const int blocks = work.chunk_blocks(chunk);
            if (chunk != chunk_of_x) {
                chunk_of_x = chunk;
                load_x<FRAGMENTS, CHUNK>(x_words, x, m, k, work.chunk_begin(chunk), blocks, g, t);
            }
            for (int tile = begin + work.group; tile < end; tile += work.groups) {
                float low_scale[CHUNK / 4], high_scale[CHUNK / 4];
#pragma unroll
                for (int q = 0; q < CHUNK / 4; q++) {
                    low_scale[q] = quad.low[q].value(map, offset);
                    high_scale[q] = quad.high[q].value(map, offset);
                }
                work.advance(ahead);
                blocks_ahead = work.exists(ahead) ? work.chunk_blocks(ahead.chunk) : 0;
                if (blocks_ahead > 0) {
                    aim();
                    quad.load(work, ahead, work.block_of(ahead, g), blocks_ahead);
                }

                float sums[FRAGMENTS][4] = {};
#pragma unroll
                for (int j = 0; j < CHUNK; j++) {
                    if (j < blocks) {
                        add_block<T>(sums, entries, bytes.low[j], bytes.high[j], x_words[j],
                                     __shfl_sync(ALL_LANES, low_scale[j / 4], quad_lane + j % 4),
                                     __shfl_sync(ALL_LANES, high_scale[j / 4], quad_lane + j % 4));
                    }
                    if (j < blocks_ahead) {
                        bytes.load(j, low_packed, high_packed);
                    }
                }
                float *const own = partial + ((tile - begin) * work.slots + work.slot) * m * ROWS;
                add_partial(own, sums, m, chunk == 0, g, t);
            }
        }
        __syncthreads();
        write_pass<T, WARPS>(work, begin, end, partial, bias, y, m, n);
        __syncthreads();
    }
}

// x:           [m][k] aligned to 16 bytes; m at most 8 times the number of fragments
// packed:      [n * k / 2] aligned to 8 bytes; k is a multiple of 64
// scales:      of n * k / blocksize blocks
// bias:        [n] or null
// y:           [m][n]
// block_shift: log2 of the block size, 6 to 12
// quant_type:  NF4 or FP4
// Grid: ceil(n / config.rows) blocks of Sizes<fragments>::THREADS. Dynamic shared memory, with P = config.per_pass * config.slots *
// m * 64 bytes: LANE_TABLE_BYTES + MAP_BYTES + P.
#define INSTANCE(name, T, nested, fragments)                                                                          \
    extern "C" __global__ void __launch_bounds__(Sizes<fragments>::THREADS, 1)                                        \
        gemm_4bit_small_m_sm80_##name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k,         \
                  int block_shift, u32 quant_type, LaunchConfig config) {                                                 \
        gemm_4bit_small_m_sm80<T, nested, fragments>(x, packed, scales, bias, y, m, n, k, block_shift, quant_type, config);             \
    }

INSTANCE(bf16_8, Bf16, false, 1)
INSTANCE(bf16_16, Bf16, false, 2)
INSTANCE(bf16_8_nested, Bf16, true, 1)
INSTANCE(bf16_16_nested, Bf16, true, 2)
INSTANCE(f16_8, F16, false, 1)
INSTANCE(f16_16, F16, false, 2)
INSTANCE(f16_8_nested, F16, true, 1)
INSTANCE(f16_16_nested, F16, true, 2)
