// y[M][N] = x[M][K] * W[N][K]^T + bias[N] for few rows of x, W in 4 bits: the products of token-by-token generation.
//
// Bound by reading W once. What the layout of the format gives for free:
//   - A block of 64 values of a row of W is 32 consecutive bytes. Each lane of a quad takes 8 of them, 16 values; K of x is
//     permuted the same way. Then one packed byte is one register of the A operand of mma.m16n8k16, so that W is decoded
//     by one look-up for two weights. W is the operand of 16 rows and x that of 8 columns: M <= 8 costs what M = 1 does.
//   - The look-up table has an entry for each byte, the two unscaled values in T. Lane l has a copy in bank l of shared
//     memory, 256 bytes apart: PRMT puts the byte and the lane together to an address, and no two lanes conflict.
//   - The scale is applied in float32 to the sums of a block, once for 64 products.
// A block of threads has some consecutive rows of W, all of K: WARPS / slots groups of warps take tiles of 16 rows in
// turn, and the `slots` warps of a group a part of K each. A warp keeps its part of x in registers, up to CHUNK blocks at
// a time, while it walks over the tiles. The partial sums of the slots meet in shared memory, and are added in the order
// of the slots: the result does not change from run to run.
//
// Two kernels differ in how W arrives. `decode_ring` copies it to shared memory by cp.async, each warp into a ring of its
// own, STAGES tiles ahead: 64 KB are always on the way to each multiprocessor. That takes the 227 KB of compute capability
// 9.0 and 10.0. `decode` needs 77 KB and less: each warp loads the bytes of its next tile to registers as it uses those of
// this one.
#include "scales.cuh"

// Rows of W in a tile, and columns of the product in a fragment: those of mma.m16n8k16.
constexpr int ROWS = 16;
constexpr int COLUMNS = 8;
// Values that share a scale here, and their bytes. Larger blocks of the format are several of these.
constexpr int BLOCK = 64;
constexpr int BLOCK_BYTES = BLOCK / 2;
constexpr int BLOCK_SHIFT = 6;
constexpr u32 MAP_BYTES = 256 * sizeof(float);

// How the launcher divides the work.
struct DecodePlan {
    int rows;      // of W, for each block of threads
    int slots;     // parts of K: a power of two, at most the number of warps
    int per_pass;  // tiles whose partial sums fit in shared memory
};

// A chunk of a tile.
struct Place {
    int tile, pass_begin, pass_end;
    int chunk;
};

// What one warp has to do. Its places come in passes, in each of these the chunks of its slot, in each the tiles of its
// group.
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
    i64 scale_count;

    __device__ Work(const Scales &scales, int n, int k, int block_shift, const DecodePlan &plan)
        : scales(scales),
          scale_shift(block_shift - BLOCK_SHIFT),
          row_blocks(k / BLOCK),
          slots(plan.slots),
          per_pass(plan.per_pass),
          scale_count((i64(n) * (k / BLOCK) + (i64(1) << scale_shift) - 1) >> scale_shift) {
        const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
        first_row = int(blockIdx.x) * plan.rows;
        rows = n - first_row < plan.rows ? n - first_row : plan.rows;
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

// Entry `byte` of a table: its two values in T, for each lane. Eight threads write one, and a warp four neighbouring ones.
template <typename T, int THREADS>
__device__ inline void fill_table(u32 *table, u32 quant_type) {
    const int lane = int(threadIdx.x) % WARP;
    const float value = value_of(quant_type, lane % 16);
    for (int item = int(threadIdx.x); item < 256 * 8; item += THREADS) {
        const int byte = item / 8;
        const u32 pair = pack2<T>(__shfl_sync(ALL_LANES, value, byte >> 4), __shfl_sync(ALL_LANES, value, byte & 15));
        *reinterpret_cast<Words4 *>(&table[byte * LANE_TABLE_ROW + item % 8 * 4]) = {pair, pair, pair, pair};
    }
}

template <bool NESTED, int THREADS>
__device__ inline void fill_map(float *map) {
    if (NESTED) {
        for (int code = int(threadIdx.x); code < 256; code += THREADS) {
            map[code] = DYNAMIC_MAP[code];
        }
    }
}

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

// This lane's part of x for a chunk: of column g of each fragment the values 16t ... 16t + 15 of each block.
template <int FRAGMENTS, int CHUNK, typename T>
__device__ inline void load_x(u32 (&words)[CHUNK][FRAGMENTS][8], const T *x, int m, int k, int begin, int blocks, int g,
                              int t) {
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            const int column = f * COLUMNS + g;
            const bool there = column < m && j < blocks;
            const Words4 *const from = reinterpret_cast<const Words4 *>(x + (i64(column) * k + i64(begin + j) * BLOCK + t * 16));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Words4 loaded = there ? load_shared_line(from + half) : Words4{};
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    words[j][f][half * 4 + w] = loaded.word[w];
                }
            }
        }
    }
}

// sums += scale * (the products of one block). The scales are those of rows g and g + 8.
template <typename T, int FRAGMENTS, typename Table>
__device__ inline void add_block(float (&sums)[FRAGMENTS][4], const Table &table, const Words2 &low, const Words2 &high,
                                 const u32 (&x)[FRAGMENTS][8], float low_scale, float high_scale) {
    float products[FRAGMENTS][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 a[2][4] = {{look_up<0>(table, low.word[i]), look_up<0>(table, high.word[i]),
                              look_up<1>(table, low.word[i]), look_up<1>(table, high.word[i])},
                             {look_up<2>(table, low.word[i]), look_up<2>(table, high.word[i]),
                              look_up<3>(table, low.word[i]), look_up<3>(table, high.word[i])}};
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            mma_m16n8k16(T{}, products[f], a[0], x[f][4 * i], x[f][4 * i + 1]);
            mma_m16n8k16(T{}, products[f], a[1], x[f][4 * i + 2], x[f][4 * i + 3]);
        }
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        sums[f][0] = __fmaf_rn(low_scale, products[f][0], sums[f][0]);
        sums[f][1] = __fmaf_rn(low_scale, products[f][1], sums[f][1]);
        sums[f][2] = __fmaf_rn(high_scale, products[f][2], sums[f][2]);
        sums[f][3] = __fmaf_rn(high_scale, products[f][3], sums[f][3]);
    }
}

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
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
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

// ---- by way of registers -------------------------------------------------------------------------------------------

// By the number of 8-column fragments of x, 1 or 2: twice the columns are twice the registers for x and so half the warps,
// each of which has twice the bytes on the way.
template <int FRAGMENTS>
struct Sizes {
    static constexpr int WARPS = 16 / FRAGMENTS;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int CHUNK = 4 * FRAGMENTS;
};

// A lane's bytes of a chunk, in row g and row g + 8.
template <int CHUNK>
struct Bytes {
    Words2 low[CHUNK], high[CHUNK];

    __device__ void load(int j, const u8 *low_packed, const u8 *high_packed) {
        low[j] = load_stream(reinterpret_cast<const Words2 *>(low_packed + j * BLOCK_BYTES));
        high[j] = load_stream(reinterpret_cast<const Words2 *>(high_packed + j * BLOCK_BYTES));
    }
};

template <typename T, bool NESTED, int FRAGMENTS>
__device__ inline void decode(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m, int n, int k,
                              int block_shift, u32 quant_type, const DecodePlan &plan) {
    constexpr int WARPS = Sizes<FRAGMENTS>::WARPS, THREADS = Sizes<FRAGMENTS>::THREADS, CHUNK = Sizes<FRAGMENTS>::CHUNK;
    DYNAMIC_SHARED(shared);
    u32 *const table = reinterpret_cast<u32 *>(shared);                                       // [256][64], half used
    float *const map = reinterpret_cast<float *>(shared + LANE_TABLE_BYTES);                  // [256]
    float *const partial = reinterpret_cast<float *>(shared + LANE_TABLE_BYTES + MAP_BYTES);  // [tile][slot][m][16]

    const Work<NESTED, WARPS, CHUNK> work(scales, n, k, block_shift, plan);
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

// ---- by way of shared memory ---------------------------------------------------------------------------------------

// Chunks of a warp in its ring: while it works on one, two are on the way. 32 KB each for all warps.
constexpr int STAGES = 3;

// Block j of row r lies at block j ^ (r % 4) of its row in a stage: so the eight rows that a warp reads at a time, four in
// each half of the warp, are in different banks.
template <int CHUNK>
__device__ inline int ring_offset(int row, int block) {
    return (row * CHUNK + (block ^ (row % 4))) * BLOCK_BYTES;
}

// Copies of a warp's places, one place after the other.
template <bool NESTED, int WARPS, int CHUNK>
struct Copier {
    // Of the codes of W 16 bytes for each lane, and as many rows at a time as that gives.
    static constexpr int PIECES = CHUNK * BLOCK_BYTES / 16, AT_A_TIME = WARP / PIECES;
    static constexpr int STAGE_BYTES = ROWS * CHUNK * BLOCK_BYTES;
    // Of the scales, 4 bytes for each lane at a time: of a chunk's blocks t, t + 4, ..., for row g and row g + 8. They lie in
    // the unused halves of the table's rows, WARP words in each; nested ones after one another the words that hold the
    // codes, and the second scales.
    static constexpr int QUADS = CHUNK / 4;
    static constexpr int SCALE_ROWS = (NESTED ? 4 : 2) * QUADS;
    static_assert(WARPS * STAGES * SCALE_ROWS <= 256 && WARP * 2 == LANE_TABLE_ROW, "halves of the table's rows");

    using W = Work<NESTED, WARPS, CHUNK>;
    const W &work;
    const u8 *const packed;
    u8 *const ring;     // [STAGES][STAGE_BYTES] of this warp
    u32 *const halves;  // [STAGES][SCALE_ROWS][LANE_TABLE_ROW] of this warp
    const int lane, row, piece;
    Place place;
    int blocks;      // of the chunk; none: no more places
    const u8 *from;  // this lane's piece of the first rows
    i64 low_block;   // of row g, the chunk's first
    u32 code_shifts = 0;  // where in their words this lane's codes are, in bytes: CODE_BITS for each stage, the oldest lowest
    static constexpr int CODE_BITS = 4 * QUADS;
    static_assert(CODE_BITS * STAGES <= 32, "two bits for each code");

    __device__ Copier(const W &work, const u8 *packed, u8 *rings, u32 *table)
        : work(work),
          packed(packed),
          ring(rings + threadIdx.x / WARP * (STAGES * STAGE_BYTES)),
          halves(table + WARP + threadIdx.x / WARP * (STAGES * SCALE_ROWS * LANE_TABLE_ROW)),
          lane(int(threadIdx.x) % WARP),
          row(lane / PIECES),
          piece(lane % PIECES),
          place(work.first()) {
        aim();
    }
    __device__ void aim() {
        blocks = work.exists(place) ? work.chunk_blocks(place.chunk) : 0;
        from = packed + work.block_of(place, row) * BLOCK_BYTES + piece * 16;
        low_block = work.block_of(place, work.g);
    }
    __device__ u32 *scale_row(u32 stage, int i) const { return halves + (stage * SCALE_ROWS + i) * LANE_TABLE_ROW; }

    // The word that holds a code. Where part of the word lies outside of the codes, the byte alone is read, and at once.
    __device__ void copy_code(u32 *to, const u8 *code) const {
        const u32 *const word = reinterpret_cast<const u32 *>(code - (u64(code) & 3));
        const u8 *const first = work.scales.codes, *const last = first + work.scale_count;
        if (reinterpret_cast<const u8 *>(word) >= first && reinterpret_cast<const u8 *>(word + 1) <= last) {
            copy_async(to, word);
        } else {
            *to = u32(*code) << (8 * (u64(code) & 3));
        }
    }
    __device__ void copy_scale(u32 stage, int q, int high, i64 block) {
        const i64 scale = block >> work.scale_shift;
        u32 *const to = scale_row(stage, 2 * q + high) + lane;
        if constexpr (NESTED) {
            const u8 *const code = work.scales.codes + scale;
            copy_code(to, code);
            code_shifts |= u32(u64(code) & 3) << (CODE_BITS * (STAGES - 1) + 4 * q + 2 * high);
            copy_async(scale_row(stage, 2 * (QUADS + q) + high) + lane,
                       reinterpret_cast<const u32 *>(work.scales.absmax2 + (scale >> NESTED_SHIFT)));
        } else {
            copy_async(to, reinterpret_cast<const u32 *>(work.scales.absmax + scale));
        }
    }

    // Starts copying a place to a stage, and goes on to the next place. What belongs to rows behind the last is left as it
    // is: what comes of it is not written.
    __device__ void copy(u32 stage) {
        const i64 row_bytes = i64(work.row_blocks) * BLOCK_BYTES;
        const int rows = work.rows - place.tile * ROWS;
        if (piece / 2 < blocks) {
            u8 *const to = ring + (stage * STAGE_BYTES + u32(ring_offset<CHUNK>(row, piece / 2) + piece % 2 * 16));
#pragma unroll
            for (int i = 0; i < ROWS; i += AT_A_TIME) {
                if (row + i < rows) {
                    // Rows that are AT_A_TIME apart have their blocks in the same order, or in one that is exchanged.
                    u8 *const row_to = AT_A_TIME % 4 == 0 ? to + i * CHUNK * BLOCK_BYTES
                                                          : ring + (stage * STAGE_BYTES +
                                                                    u32(ring_offset<CHUNK>(row + i, piece / 2) + piece % 2 * 16));
                    copy_async(reinterpret_cast<Words4 *>(row_to), reinterpret_cast<const Words4 *>(from + i * row_bytes));
                }
            }
        }
        const i64 high_block = low_block + i64(ROWS / 2) * work.row_blocks;
        code_shifts >>= CODE_BITS;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const int block = q * 4 + work.t;
            if (block < blocks && work.g < rows) {
                copy_scale(stage, q, 0, low_block + block);
            }
            if (block < blocks && work.g + ROWS / 2 < rows) {
                copy_scale(stage, q, 1, high_block + block);
            }
        }
        copy_async_commit();
        if (work.advance(place)) {
            const i64 step = i64(work.groups * ROWS) * work.row_blocks;
            from += step * BLOCK_BYTES;
            low_block += step;
            blocks = work.exists(place) ? blocks : 0;
        } else {
            aim();
        }
    }

    // Once a stage's copies have ended for all lanes: the float32 scales of row g (0) and row g + 8 (1), for four blocks.
    __device__ const float *scales_of(u32 stage, int q, int high) const {
        return reinterpret_cast<const float *>(scale_row(stage, 2 * q + high) + work.g * 4);
    }
    // Makes them of nested ones in the oldest stage, each lane those that it copied.
    __device__ void expand_scales(u32 stage, const float *map, float offset) const {
        if constexpr (NESTED) {
#pragma unroll
            for (int i = 0; i < 2 * QUADS; i++) {
                u32 *const word = scale_row(stage, i) + lane;
                const u32 code = (*word >> (8 * (code_shifts >> (2 * i) & 3))) & 0xff;
                const RawScale<true> raw = {code, __uint_as_float(scale_row(stage, 2 * QUADS + i)[lane])};
                *word = __float_as_uint(raw.value(map, offset));
            }
        }
    }
};

template <typename T, bool NESTED, int FRAGMENTS>
__device__ inline void decode_ring(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m, int n,
                                   int k, int block_shift, u32 quant_type, const DecodePlan &plan) {
    constexpr int WARPS = Sizes<FRAGMENTS>::WARPS, THREADS = Sizes<FRAGMENTS>::THREADS, CHUNK = Sizes<FRAGMENTS>::CHUNK;
    DYNAMIC_SHARED(shared);
    float *const map = reinterpret_cast<float *>(shared);                  // [256]
    float *const partial = reinterpret_cast<float *>(shared + MAP_BYTES);  // [tile][slot][m][16]
    const u32 before = MAP_BYTES + u32(plan.per_pass * plan.slots * m * ROWS) * sizeof(float);
    const u32 place_of_table = before + lane_table_place(shared + before);
    u32 *const table = reinterpret_cast<u32 *>(shared + place_of_table);  // [256][LANE_TABLE_ROW], half used

    const Work<NESTED, WARPS, CHUNK> work(scales, n, k, block_shift, plan);
    const int lane = int(threadIdx.x) % WARP, g = work.g, t = work.t;

    // What comes behind the copies waits for them in the memory's queue: so everything else is loaded before.
    const float offset = NESTED ? *scales.offset : 0.0f;
    u32 x_words[CHUNK][FRAGMENTS][8];
    load_x<FRAGMENTS, CHUNK>(x_words, x, m, k, work.chunk_begin(0), work.chunk_blocks(0), g, t);
    fill_map<NESTED, THREADS>(map);
    Copier<NESTED, WARPS, CHUNK> copier(work, packed, shared + (place_of_table + LANE_TABLE_BYTES), table);
#pragma unroll 1
    for (u32 s = 0; s < STAGES; s++) {
        copier.copy(s);
    }
    fill_table<T, THREADS>(table, quant_type);
    __syncthreads();

    const LaneTable entries = lane_table(table, lane);
    // This lane's 8 bytes of block j are at this offset, with bits 5 and 6 inverted where those of 32 j are set.
    static_assert(BLOCK_BYTES == 32, "bits 5 and 6");
    const u32 lane_offset = u32(ring_offset<CHUNK>(g, 0) + t * 8);
    int chunk_of_x = 0;
    u32 stage = 0;
    for (int begin = 0, end; begin < work.tiles; begin = end) {
        end = work.end_of_pass(begin);
        for (int chunk = 0; chunk < work.chunks; chunk++) {
            const int blocks = work.chunk_blocks(chunk);
            if (chunk != chunk_of_x) {
                chunk_of_x = chunk;
                load_x<FRAGMENTS, CHUNK>(x_words, x, m, k, work.chunk_begin(chunk), blocks, g, t);
            }
            for (int tile = begin + work.group; tile < end; tile += work.groups) {
                // The oldest copy has ended, for all lanes.
                copy_async_wait<STAGES - 1>();
                copier.expand_scales(stage, map, offset);
                __syncwarp();
                const u8 *const bytes = copier.ring + stage * copier.STAGE_BYTES;
                float sums[FRAGMENTS][4] = {};
#pragma unroll
                for (int q = 0; q < CHUNK / 4; q++) {
                    const float(&low_scale)[4] = *reinterpret_cast<const float(*)[4]>(copier.scales_of(stage, q, 0));
                    const float(&high_scale)[4] = *reinterpret_cast<const float(*)[4]>(copier.scales_of(stage, q, 1));
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        if (q * 4 + j < blocks) {
                            const u8 *const lane_bytes = bytes + (lane_offset ^ u32((q * 4 + j) * BLOCK_BYTES));
                            const Words2 low = *reinterpret_cast<const Words2 *>(lane_bytes);
                            const Words2 high = *reinterpret_cast<const Words2 *>(lane_bytes + copier.STAGE_BYTES / 2);
                            add_block<T>(sums, entries, low, high, x_words[q * 4 + j], low_scale[j], high_scale[j]);
                        }
                    }
                }
                // Every lane has read its part.
                __syncwarp();
                copier.copy(stage);
                stage = stage + 1 < STAGES ? stage + 1 : 0;
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
// packed:      [n * k / 2] aligned to 8 bytes, for decode_ring to 16; k is a multiple of 64
// scales:      of n * k / blocksize blocks
// bias:        [n] or null
// y:           [m][n]
// block_shift: log2 of the block size, 6 to 12
// quant_type:  NF4 or FP4
// Grid: ceil(n / plan.rows) blocks. Dynamic shared memory: with P = plan.per_pass * plan.slots * m * 64 bytes, decode takes
// LANE_TABLE_BYTES + MAP_BYTES + P. decode_ring has MAP_BYTES + P, then the table at the next place where it may begin,
// and STAGES * 32 KB behind it.
#define INSTANCE(name, T, nested, fragments)                                                                          \
    extern "C" __global__ void __launch_bounds__(Sizes<fragments>::THREADS, 1)                                        \
        decode_##name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k,          \
                      int block_shift, u32 quant_type, DecodePlan plan) {                                             \
        decode<T, nested, fragments>(x, packed, scales, bias, y, m, n, k, block_shift, quant_type, plan);             \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(Sizes<fragments>::THREADS, 1)                                        \
        decode_ring_##name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k,     \
                           int block_shift, u32 quant_type, DecodePlan plan) {                                        \
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
