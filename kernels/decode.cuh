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
// Two kernels differ in how W arrives: that of decode.cu by way of registers, that of decode_ring.cu by way of shared memory.
#pragma once

#include "scales.cuh"

// Rows of W in a tile, and columns of the product in a fragment: those of mma.m16n8k16.
constexpr int ROWS = 16;
constexpr int COLUMNS = 8;
// Values that share a scale here, and their bytes. Larger blocks of the format are several of these.
constexpr int BLOCK = 64;
constexpr int BLOCK_BYTES = BLOCK / 2;
constexpr int BLOCK_SHIFT = 6;
constexpr u32 MAP_BYTES = 256 * sizeof(float);

// By the number of 8-column fragments of x, 1 or 2: twice the columns are twice the registers for x and so half the warps,
// each of which has twice the bytes on the way.
template <int FRAGMENTS>
struct Sizes {
    static constexpr int WARPS = 16 / FRAGMENTS;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int CHUNK = 4 * FRAGMENTS;
};

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
