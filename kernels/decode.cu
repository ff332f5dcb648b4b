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
// a time, while it walks over the tiles; bytes of W that were used are at once replaced by loads for the next tile, so
// that 32 KB are always on the way to each multiprocessor. The partial sums of the slots meet in
// shared memory, and are added in the order of the slots: the result does not change from run to run.
#include "scales.cuh"

// Rows of W in a tile, and columns of the product in a fragment: those of mma.m16n8k16.
constexpr int ROWS = 16;
constexpr int COLUMNS = 8;
// Values that share a scale here, and their bytes. Larger blocks of the format are several of these.
constexpr int BLOCK = 64;
constexpr int BLOCK_BYTES = BLOCK / 2;
constexpr int BLOCK_SHIFT = 6;
// Rows of partial sums are 20 floats apart: the lanes of a fragment then store to 32 banks.
constexpr int PARTIAL_STRIDE = 20;
constexpr int TABLE_BYTES = 256 * 256;
constexpr int MAP_BYTES = 256 * int(sizeof(float));

// By the number of 8-column fragments of x, 1 or 2: twice the columns are twice the registers for x and so half the warps,
// each of which has twice the bytes on the way.
template <int FRAGMENTS>
struct Sizes {
    static constexpr int WARPS = 16 / FRAGMENTS;
    static constexpr int THREADS = WARPS * WARP;
    // Blocks of one row that a warp reads at a time: of 16 rows 2 KB for each fragment.
    static constexpr int CHUNK = 4 * FRAGMENTS;
};

// How the launcher divides the work.
struct DecodePlan {
    int rows;      // of W, for each block of threads
    int slots;     // parts of K: a power of two, at most WARPS
    int per_pass;  // tiles whose partial sums fit in shared memory
};

// The chunk of one tile, as one lane sees it.
struct Unit {
    const u8 *low, *high;       // this lane's bytes in row g and row g + 8
    i64 low_block, high_block;  // the first blocks of these
    int blocks;                 // 0: nothing
};

template <bool NESTED, int CHUNK>
struct Decode {
    const u8 *packed;
    const Scales &scales;
    const int block_shift;
    const i64 blocks_per_row;
    const int first_row, end_row;  // of this block of threads
    const int slots, slot, group, groups;
    const int first_block, slot_blocks, chunks;
    const int tiles, per_pass;
    const int g, t;

    __device__ int tiles_of(int pass) const {
        const int left = tiles - pass * per_pass;
        return left < per_pass ? left : per_pass;
    }
    // The chunks of a slot, as equal as can be.
    __device__ int chunk_begin(int chunk) const { return first_block + slot_blocks * chunk / chunks; }

    __device__ Unit unit(int pass, int chunk, int tile) const {
        const int block = chunk_begin(chunk);
        const int row = first_row + (pass * per_pass + tile) * ROWS + g;
        Unit unit;
        unit.blocks = chunk_begin(chunk + 1) - block;
        // Rows behind the last are read as the last, and what comes of them is not written.
        unit.low_block = i64(row < end_row ? row : end_row - 1) * blocks_per_row + block;
        unit.high_block = i64(row + 8 < end_row ? row + 8 : end_row - 1) * blocks_per_row + block;
        unit.low = packed + unit.low_block * BLOCK_BYTES + t * 8;
        unit.high = packed + unit.high_block * BLOCK_BYTES + t * 8;
        return unit;
    }
    // The one that this warp works on after (pass, chunk, tile).
    __device__ Unit next_unit(int pass, int chunk, int tile) const {
        tile += groups;
        if (tile >= tiles_of(pass)) {
            tile = group;
            if (++chunk == chunks) {
                chunk = 0;
                pass++;
            }
        }
        if (pass * per_pass >= tiles || tile >= tiles_of(pass)) {
            Unit none = {};
            return none;
        }
        return unit(pass, chunk, tile);
    }

    struct Bytes {
        Words2 low, high;
    };
    __device__ static void load(Bytes &bytes, const Unit &unit, int j) {
        bytes.low = load_stream(reinterpret_cast<const Words2 *>(unit.low + j * BLOCK_BYTES));
        bytes.high = load_stream(reinterpret_cast<const Words2 *>(unit.high + j * BLOCK_BYTES));
    }

    // Of the chunk's blocks t, t + 4, ..., for row g and row g + 8: the lanes of a quad share theirs later.
    struct QuadScales {
        RawScale<NESTED> low[CHUNK / 4], high[CHUNK / 4];
    };
    __device__ void load(QuadScales &quad, const Unit &unit) const {
        const int shift = block_shift - BLOCK_SHIFT;
#pragma unroll
        for (int q = 0; q < CHUNK / 4; q++) {
            if (q * 4 + t < unit.blocks) {
                quad.low[q] = ScaleReader<NESTED>(scales, (unit.low_block + q * 4 + t) >> shift)[0];
                quad.high[q] = ScaleReader<NESTED>(scales, (unit.high_block + q * 4 + t) >> shift)[0];
            }
        }
    }
};

// Two weights for one byte of a word.
template <int BYTE>
__device__ inline u32 look_up(const u32 *table, u32 word, u32 lane_offset) {
    // Byte 0 of the address from the lane, byte 1 from the word, bytes 2 and 3 zero (as all but one of the lane's are).
    return at_byte(table, permute_bytes(word, lane_offset, 0x5504 | BYTE << 4));
}

// sums += scale * (the products of one block). The scales are those of rows g and g + 8.
template <typename T, int FRAGMENTS>
__device__ inline void add_block(float (&sums)[FRAGMENTS][4], const u32 *table, const Words2 &low, const Words2 &high,
                                 const u32 (&x)[FRAGMENTS][8], float low_scale, float high_scale, u32 lane_offset) {
    float products[FRAGMENTS][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 a[2][4] = {
            {look_up<0>(table, low.word[i], lane_offset), look_up<0>(table, high.word[i], lane_offset),
             look_up<1>(table, low.word[i], lane_offset), look_up<1>(table, high.word[i], lane_offset)},
            {look_up<2>(table, low.word[i], lane_offset), look_up<2>(table, high.word[i], lane_offset),
             look_up<3>(table, low.word[i], lane_offset), look_up<3>(table, high.word[i], lane_offset)}};
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

template <typename T, bool NESTED, int FRAGMENTS>
__device__ inline void decode(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m, int n, int k,
                              int block_shift, u32 quant_type, const DecodePlan &plan) {
    constexpr int WARPS = Sizes<FRAGMENTS>::WARPS, THREADS = Sizes<FRAGMENTS>::THREADS, CHUNK = Sizes<FRAGMENTS>::CHUNK;
    DYNAMIC_SHARED(shared);
    u32 *const table = reinterpret_cast<u32 *>(shared);                                       // [256][64], half used
    float *const map = reinterpret_cast<float *>(shared + TABLE_BYTES);                       // [256]
    float *const partial = reinterpret_cast<float *>(shared + TABLE_BYTES + MAP_BYTES);       // [tile][slot][m][20]

    const int thread = int(threadIdx.x);
    const int lane = thread % WARP;
    const int warp = thread / WARP;
    const int first_row = int(blockIdx.x) * plan.rows;
    const int end_row = n - first_row < plan.rows ? n : first_row + plan.rows;
    const int row_blocks = k / BLOCK;
    const int slot = warp % plan.slots;
    const int first_block = int(i64(row_blocks) * slot / plan.slots);
    const int slot_blocks = int(i64(row_blocks) * (slot + 1) / plan.slots) - first_block;
    using Work = Decode<NESTED, CHUNK>;
    const Work work = {packed,
                       scales,
                       block_shift,
                       row_blocks,
                       first_row,
                       end_row,
                       plan.slots,
                       slot,
                       warp / plan.slots,
                       WARPS / plan.slots,
                       first_block,
                       slot_blocks,
                       (slot_blocks + CHUNK - 1) / CHUNK,
                       (end_row - first_row + ROWS - 1) / ROWS,
                       plan.per_pass,
                       lane / 4,
                       lane % 4};
    const int g = work.g, t = work.t;

    // Loads first: the table is made while they are on the way.
    typename Work::Bytes bytes[CHUNK] = {};
    typename Work::QuadScales quad = {};
    if (work.group < work.tiles_of(0)) {
        const Unit first = work.unit(0, 0, work.group);
        work.load(quad, first);
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            if (j < first.blocks) {
                Work::load(bytes[j], first, j);
            }
        }
    }
    const float offset = NESTED ? *scales.offset : 0.0f;
    for (int item = thread; item < 256 * 8; item += THREADS) {
        const u32 byte = u32(item / 8);
        const u32 pair = pack2<T>(VALUES[quant_type][byte >> 4], VALUES[quant_type][byte & 15]);
        *reinterpret_cast<Words4 *>(&table[byte * 64 + u32(item % 8) * 4]) = {pair, pair, pair, pair};
    }
    if (NESTED) {
        for (int code = thread; code < 256; code += THREADS) {
            map[code] = DYNAMIC_MAP[code];
        }
    }
    __syncthreads();

    u32 x_words[CHUNK][FRAGMENTS][8];
    const u32 lane_offset = u32(lane) * 4;
    const int partial_size = m * PARTIAL_STRIDE;

    for (int pass = 0; pass * plan.per_pass < work.tiles; pass++) {
        const int pass_tiles = work.tiles_of(pass);
        for (int chunk = 0; chunk < work.chunks; chunk++) {
            const int begin = work.chunk_begin(chunk);
            const int blocks = work.chunk_begin(chunk + 1) - begin;
            if (pass == 0 || work.chunks > 1) {
#pragma unroll
                for (int f = 0; f < FRAGMENTS; f++) {
#pragma unroll
                    for (int j = 0; j < CHUNK; j++) {
                        const int column = f * COLUMNS + g;
                        const bool there = column < m && j < blocks;
                        const Words4 *const from =
                            reinterpret_cast<const Words4 *>(x + (i64(column) * k + i64(begin + j) * BLOCK + t * 16));
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const Words4 words = there ? load_shared_line(from + half) : Words4{};
#pragma unroll
                            for (int w = 0; w < 4; w++) {
                                x_words[j][f][half * 4 + w] = words.word[w];
                            }
                        }
                    }
                }
            }
            for (int tile = work.group; tile < pass_tiles; tile += work.groups) {
                const Unit next = work.next_unit(pass, chunk, tile);
                float low_scale[CHUNK / 4], high_scale[CHUNK / 4];
#pragma unroll
                for (int q = 0; q < CHUNK / 4; q++) {
                    low_scale[q] = quad.low[q].value(map, offset);
                    high_scale[q] = quad.high[q].value(map, offset);
                }
                work.load(quad, next);

                float sums[FRAGMENTS][4] = {};
                const int quad_lane = lane & ~3;
#pragma unroll
                for (int j = 0; j < CHUNK; j++) {
                    if (j < blocks) {
                        add_block<T>(sums, table, bytes[j].low, bytes[j].high, x_words[j],
                                     __shfl_sync(ALL_LANES, low_scale[j / 4], quad_lane + j % 4),
                                     __shfl_sync(ALL_LANES, high_scale[j / 4], quad_lane + j % 4), lane_offset);
                    }
                    if (j < next.blocks) {
                        Work::load(bytes[j], next, j);
                    }
                }

                float *const own = partial + (tile * plan.slots + work.slot) * partial_size;
#pragma unroll
                for (int f = 0; f < FRAGMENTS; f++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int column = f * COLUMNS + 2 * t + e % 2;
                        if (column < m) {
                            float *const sum = own + column * PARTIAL_STRIDE + g + (e / 2) * 8;
                            *sum = chunk == 0 ? sums[f][e] : *sum + sums[f][e];
                        }
                    }
                }
            }
        }
        __syncthreads();
        const int pass_row = first_row + pass * plan.per_pass * ROWS;
        const int pass_rows = end_row - pass_row < pass_tiles * ROWS ? end_row - pass_row : pass_tiles * ROWS;
        for (int column = warp; column < m; column += WARPS) {
            for (int row = lane; row < pass_rows; row += WARP) {
                const float *const from =
                    partial + (row / ROWS * plan.slots) * partial_size + column * PARTIAL_STRIDE + row % ROWS;
                float sum = 0.0f;
                for (int s = 0; s < plan.slots; s++) {
                    sum += from[s * partial_size];
                }
                if (bias != nullptr) {
                    sum += to_f32(bias[pass_row + row]);
                }
                y[i64(column) * n + pass_row + row] = from_f32<T>(sum);
            }
        }
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
// Grid: ceil(n / plan.rows) blocks of THREADS. Dynamic shared memory: TABLE_BYTES + MAP_BYTES
// + plan.per_pass * plan.slots * m * PARTIAL_STRIDE * 4 bytes.
#define INSTANCE(name, T, nested, fragments)                                                                          \
    extern "C" __global__ void __launch_bounds__(Sizes<fragments>::THREADS, 1)                                        \
        decode_##name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k,          \
                      int block_shift, u32 quant_type, DecodePlan plan) {                                             \
        decode<T, nested, fragments>(x, packed, scales, bias, y, m, n, k, block_shift, quant_type, plan);             \
    }

INSTANCE(bf16_8, Bf16, false, 1)
INSTANCE(bf16_16, Bf16, false, 2)
INSTANCE(bf16_8_nested, Bf16, true, 1)
INSTANCE(bf16_16_nested, Bf16, true, 2)
INSTANCE(f16_8, F16, false, 1)
INSTANCE(f16_16, F16, false, 2)
INSTANCE(f16_8_nested, F16, true, 1)
INSTANCE(f16_16_nested, F16, true, 2)
