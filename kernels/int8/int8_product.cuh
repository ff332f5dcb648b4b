// y[M][N] = x[M][K] * W[N][K]^T for few rows of x, both in int8 codes, and then what Epilogue makes of the int32 sums.
//
// Problem. M up to 64, K a multiple of 16, rows of 16-byte alignment, any N; every compute capability from 7.5 on.
//
// Roofline. Memory: W is read once. Each multiprocessor reads all of x too, which counts from some 32 rows on.
//
// Tile. A block of threads has some consecutive rows of W. K is cut into chunks, and a chunk into slots of 256 bytes beside
//   each other, one for each warp of a group; groups take tiles of 16 rows in turn. A round is of as many chunks as registers
//   have room for x of a warp's slots: in a round a warp walks over all rows of the block, a step at a time. W is the operand
//   of 16 rows and x that of 8 columns of mma.m16n8k32, and K is permuted alike in both: lane (g, t) has 16 bytes that lie
//   together, its part of two products.
//
// Shared memory. int32 sums of all rows of the block, to which the warps add theirs: of integers, so that the order does not
//   matter. W comes by way of a ring that each warp has for itself. Columns with outliers have codes 0 in x: x itself of as
//   many of them as have room is fetched in the beginning; while a tile of W is there the warp puts their bytes aside; in the
//   end both are multiplied, in the order of the columns.
//
// Budget. __launch_bounds__(256, 1), 128 to 238 registers, half of them x from 16 columns on.
//
// Determinism. The same bits from run to run; without outliers those of every other kernel and of the processor.
#pragma once

#include "int8/int8_epilogue.cuh"

// Rows of W in a tile, and columns of the product in a fragment: those of mma.m16n8k32.
constexpr int ROWS = 16;
constexpr int COLUMNS = 8;
constexpr int LOG2_WARPS = 3;
constexpr int WARPS = 1 << LOG2_WARPS;
constexpr int THREADS = WARPS * WARP;
// Bytes of a row of W in a slot, the pieces that are copied, and what the lanes of a quad have at a time.
constexpr int SLOT = 256;
constexpr int PIECE = 16;
constexpr int PIECES = SLOT / PIECE;
constexpr int SEGMENT = 64;
constexpr int SEGMENTS = SLOT / SEGMENT;
constexpr int STAGE_BYTES = ROWS * SLOT;
// Of a ring: what has been asked for is waited for by a number that the instruction has.
constexpr int MOST_STAGES = 6;
// Sums of a tile for 8 columns: those of each lane side by side.
constexpr int SUMS = ROWS * COLUMNS;

// How the launcher divides the work. Whole numbers that take a division are its business.
struct ProductPlan {
    int rows;           // of W, for each block of threads
    int log2_slots;     // of a chunk, which has 1 to WARPS
    int chunks;         // of K: the last may have less, or nothing, for a slot
    int stages;         // of each warp's ring
    int kept;           // columns with outliers whose bytes have room, a multiple of 32
    int ahead;          // rows that are fetched while the kernel before still runs
};

// Chunks of a round.
template <int FRAGMENTS>
constexpr int ROUND = FRAGMENTS > 4 ? 1 : FRAGMENTS > 2 ? 2 : 4;

// What a warp has to do.
struct Share {
    int first_row, rows, steps, slots, slot, groups, group, chunks, k;

    __device__ Share(int n, int k, const ProductPlan &plan) : chunks(plan.chunks), k(k) {
        const int warp = read_warp();
        first_row = int(blockIdx.x) * plan.rows;
        rows = n - first_row < plan.rows ? n - first_row : plan.rows;
        slots = 1 << plan.log2_slots;
        slot = warp & (slots - 1);
        group = warp >> plan.log2_slots;
        groups = WARPS >> plan.log2_slots;
        steps = steps_of(plan);
    }
    // Of all blocks, the last one too.
    __device__ int steps_of(const ProductPlan &plan) const {
        return int(u32(plan.rows + groups * ROWS - 1) / ROWS) >> (LOG2_WARPS - plan.log2_slots);
    }
    __device__ int first_byte(int chunk) const { return (chunk * slots + slot) * SLOT; }
    __device__ int tile(int step) const { return step * groups + group; }
};

// Piece p of row r lies at piece p ^ (4 * (r % 2)): so the two rows that eight lanes read at a time are in different banks.
__device__ inline u32 piece_offset(int row, int piece) { return u32(row * SLOT + (piece ^ row % 2 * 4) * PIECE); }

// Copies of a warp's turns, one after the other.
template <int FRAGMENTS>
struct Copier {
    const Share &share;
    const u8 *const weight;
    u8 *const ring;  // [stages][STAGE_BYTES] of this warp
    int chunk = 0, step = 0;

    __device__ Copier(const Share &share, const u8 *weight, u8 *rings, int stages)
        : share(share), weight(weight), ring(rings + u32(read_warp() * stages) * STAGE_BYTES) {}

    // Starts copying a turn to a stage, and goes on to the next. What is behind the last row or column is left as it is: what
    // comes of such rows is not written, and x has zeros where there are no columns.
    __device__ void copy(int stage) {
        constexpr int AT_A_TIME = WARP / PIECES;
        static_assert(AT_A_TIME == 2, "so that all rows of a lane are even, or odd");
        if (chunk < share.chunks) {
            const int lane = read_lane(), row = lane / PIECES, piece = lane % PIECES;
            const int tile_row = share.tile(step) * ROWS, column = share.first_byte(chunk) + piece * PIECE;
            const int rows = column < share.k ? share.rows - tile_row - row : 0;
            u8 *const to = ring + (u32(stage * STAGE_BYTES) + piece_offset(row, piece));
            const u8 *from = weight + (i64(share.first_row + tile_row + row) * share.k + column);
#pragma unroll
            for (int i = 0; i < ROWS; i += AT_A_TIME) {
                if (i < rows) {
                    copy_async(reinterpret_cast<Words4 *>(to + i * SLOT), reinterpret_cast<const Words4 *>(from));
                }
                from += i64(AT_A_TIME) * share.k;
            }
            constexpr int LENGTH = ROUND<FRAGMENTS>;
            if (chunk % LENGTH + 1 < LENGTH && chunk + 1 < share.chunks) {
                chunk++;
            } else if (++step < share.steps) {
                chunk -= chunk % LENGTH;
            } else {
                chunk++;
                step = 0;
            }
        }
        copy_async_commit();
    }
};

// Until no more than `pending` groups, the latest, are on the way.
__device__ inline void wait_for_copies(int pending) {
    static_assert(MOST_STAGES == 6, "a case for each");
    switch (pending) {
        case 0: copy_async_wait<0>(); break;
        case 1: copy_async_wait<1>(); break;
        case 2: copy_async_wait<2>(); break;
        case 3: copy_async_wait<3>(); break;
        case 4: copy_async_wait<4>(); break;
        default: copy_async_wait<5>();
    }
}

// Columns with outliers of this block.
struct Aside {
    int count;           // of all
    int kept;            // of those that have room
    const int *columns;  // these, in shared memory, as is what follows
    u8 *bytes;           // [kept][places]
    int places;          // rows of the block, rounded up

    // Of how many the column is below this one.
    __device__ int before(int column) const {
        int found = 0;
        for (int first = 0; first < kept; first += WARP) {
            const int i = first + read_lane();
            found += __popc(__ballot_sync(ALL_LANES, i < kept && columns[i] < column));
        }
        return found;
    }
    // Of columns `begin` to `end` of the list those of a tile, whose slot is in a stage. Half of the lanes have a column each.
    __device__ void keep(const u8 *stage, int first_byte, int tile, int begin, int end) const {
        const int row = read_lane() % ROWS;
        for (int i = begin + read_lane() / ROWS; i < end; i += WARP / ROWS) {
            const int byte = columns[i] - first_byte;
            bytes[i * places + tile * ROWS + row] = stage[piece_offset(row, byte / PIECE) + u32(byte % PIECE)];
        }
    }
};

// Adds the products of a code of W and eight values of x.
__device__ inline void add_outliers(float (&sums)[COLUMNS], u8 byte, const float *x) {
    const float w = __int2float_rn(i8(byte));
    const Floats4 *const values = reinterpret_cast<const Floats4 *>(x);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        sums[c] = __fmaf_rn(values[c / 4].value[c % 4], w, sums[c]);
    }
}

template <int FRAGMENTS>
__device__ inline void int8_product(const u8 *x, i64 pitch, const u8 *weight, const Epilogue &epilogue, int m, int n, int k,
                                    const ProductPlan &plan) {
    constexpr int LENGTH = ROUND<FRAGMENTS>;
    DYNAMIC_SHARED(shared);
    const Share share(n, k, plan);
    const int tiles = share.steps * share.groups;
    constexpr int TOKENS = FRAGMENTS * COLUMNS;
    // [tile][FRAGMENTS][4][WARP]; of columns with outliers the list, x and the bytes; the rings.
    int *const all_sums = reinterpret_cast<int *>(shared);
    int *const kept_columns = all_sums + tiles * FRAGMENTS * SUMS;
    float *const kept_x = reinterpret_cast<float *>(kept_columns + plan.kept);  // [kept][TOKENS]
    u8 *const kept_bytes = reinterpret_cast<u8 *>(kept_x + plan.kept * TOKENS);
    u8 *const rings = kept_bytes + plan.kept * tiles * ROWS;
    Copier<FRAGMENTS> copier(share, weight, rings, plan.stages);

    // All that can be done while the kernel before still runs. Nothing of W is read, whoever still writes it.
    if (threadIdx.x == 0) {
        const int rows = share.rows < plan.ahead ? share.rows : plan.ahead;
        if (rows > 0) {
            fetch_to_second_level(weight + i64(share.first_row) * k, u32(rows) * u32(k));
        }
    }
    for (int i = int(threadIdx.x); i < tiles * FRAGMENTS * SUMS; i += THREADS) {
        all_sums[i] = 0;
    }
    wait_for_previous();
    let_next_start();
    // What comes behind copies waits for them in the memory's queue: so one turn is before x, and no more.
    copier.copy(0);
    const int outlier_count = epilogue.count == nullptr ? 0 : *epilogue.count;
    if (epilogue.count != nullptr) {
        // Of all that are kept, whether or not there are as many: nothing waits for their number.
        for (int i = int(threadIdx.x); i < plan.kept; i += THREADS) {
            kept_columns[i] = i < k ? epilogue.columns[i] : 0;
        }
    }
    const int lane = read_lane(), g = lane / 4, t = lane % 4;
    u32 x_words[LENGTH][FRAGMENTS][SEGMENTS][4];
    const auto load_round = [&](int first) {
#pragma unroll
        for (int c = 0; c < LENGTH; c++) {
#pragma unroll
            for (int f = 0; f < FRAGMENTS; f++) {
                // Columns of y that are not there get what the last one has: nothing of them is written.
                const int token = f * COLUMNS + g < m ? f * COLUMNS + g : m - 1;
                const int byte = share.first_byte(first + c) + t * PIECE;
                const u8 *const from = x + (token * pitch + byte);
#pragma unroll
                for (int s = 0; s < SEGMENTS; s++) {
                    const bool there = first + c < share.chunks && byte + s * SEGMENT < k;
                    const Words4 words =
                        there ? load_shared_line(reinterpret_cast<const Words4 *>(from + s * SEGMENT)) : Words4{};
#pragma unroll
                    for (int w = 0; w < 4; w++) {
                        x_words[c][f][s][w] = words.word[w];
                    }
                }
            }
        }
    };
    load_round(0);
    for (int stage = 1; stage < plan.stages; stage++) {
        copier.copy(stage);
    }
    Aside aside = {outlier_count, 0, kept_columns, kept_bytes, tiles * ROWS};
    aside.kept = aside.count < plan.kept ? aside.count : plan.kept;
    __syncthreads();
#pragma unroll 4
    for (int i = int(threadIdx.x); i < aside.kept * TOKENS; i += THREADS) {
        const int token = i % TOKENS, column = kept_columns[i / TOKENS];
        kept_x[i] = token < m ? load_as(epilogue.x, epilogue.kind, i64(token) * k + column) : 0.0f;
    }

    int stage = 0;
    for (int chunk = 0; chunk < share.chunks; chunk += LENGTH) {
        if (chunk > 0) {
            load_round(chunk);
        }
        int aside_begin[LENGTH], aside_end[LENGTH];
#pragma unroll
        for (int c = 0; c < LENGTH; c++) {
            aside_begin[c] = aside_end[c] = 0;
            if (aside.kept > 0 && chunk + c < share.chunks) {
                aside_begin[c] = aside.before(share.first_byte(chunk + c));
                aside_end[c] = aside.before(share.first_byte(chunk + c) + SLOT);
            }
        }
#pragma unroll 1
        for (int step = 0; step < share.steps; step++) {
            int sums[FRAGMENTS][4] = {};
#pragma unroll
            for (int c = 0; c < LENGTH; c++) {
                if (c > 0 && chunk + c >= share.chunks) {
                    break;
                }
                // The oldest copy has ended, for all lanes.
                wait_for_copies(plan.stages - 1);
                __syncwarp();
                const u8 *const bytes = copier.ring + u32(stage * STAGE_BYTES);
#pragma unroll
                for (int s = 0; s < SEGMENTS; s++) {
                    const u32 offset = piece_offset(g, s * (SEGMENT / PIECE) + t);
                    const Words4 low = *reinterpret_cast<const Words4 *>(bytes + offset);
                    const Words4 high = *reinterpret_cast<const Words4 *>(bytes + offset + ROWS / 2 * SLOT);
                    const u32 a[2][4] = {{low.word[0], high.word[0], low.word[1], high.word[1]},
                                         {low.word[2], high.word[2], low.word[3], high.word[3]}};
#pragma unroll
                    for (int f = 0; f < FRAGMENTS; f++) {
                        mma_m16n8k32(sums[f], a[0], x_words[c][f][s][0], x_words[c][f][s][1]);
                        mma_m16n8k32(sums[f], a[1], x_words[c][f][s][2], x_words[c][f][s][3]);
                    }
                }
                if (aside_begin[c] < aside_end[c]) {
                    aside.keep(bytes, share.first_byte(chunk + c), share.tile(step), aside_begin[c], aside_end[c]);
                }
                // Every lane has read its part.
                __syncwarp();
                copier.copy(stage);
                stage = stage + 1 < plan.stages ? stage + 1 : 0;
            }
            int *const to = all_sums + share.tile(step) * (FRAGMENTS * SUMS) + lane;
#pragma unroll
            for (int f = 0; f < FRAGMENTS; f++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    atomicAdd(to + (f * 4 + i) * WARP, sums[f][i]);
                }
            }
        }
    }
    copy_async_wait<0>();
    __syncthreads();

    // y: a thread has a row of W and the eight columns of a fragment. x of columns with outliers that had no room comes, part
    // by part, to where rings were.
    float *const other_x = reinterpret_cast<float *>(rings);  // [room][TOKENS]
    const int room = plan.stages * WARPS * STAGE_BYTES / (TOKENS * int(sizeof(float)));
    const int items = tiles * FRAGMENTS * ROWS;
    for (int first = 0; first < items; first += THREADS) {
        const int item = first + int(threadIdx.x);
        const int row = item / (ROWS * FRAGMENTS) * ROWS + item % ROWS, f = item / ROWS % FRAGMENTS;
        const bool there = item < items && row < share.rows;
        float outlier_sums[COLUMNS] = {};
        if (there) {
            const u8 *const bytes = kept_bytes + row;
#pragma unroll 8
            for (int i = 0; i < aside.kept; i++) {
                add_outliers(outlier_sums, bytes[i * aside.places], kept_x + (i * TOKENS + f * COLUMNS));
            }
        }
        for (int part = aside.kept; part < aside.count; part += room) {
            const int count = aside.count - part < room ? aside.count - part : room;
            __syncthreads();
#pragma unroll 4
            for (int i = int(threadIdx.x); i < count * TOKENS; i += THREADS) {
                const int token = i % TOKENS, column = epilogue.columns[part + i / TOKENS];
                other_x[i] = token < m ? load_as(epilogue.x, epilogue.kind, i64(token) * k + column) : 0.0f;
            }
            __syncthreads();
            if (there) {
                const u8 *const weight_row = weight + i64(share.first_row + row) * k;
#pragma unroll 4
                for (int i = 0; i < count; i++) {
                    const float *const x_of_column = other_x + (i * TOKENS + f * COLUMNS);
                    add_outliers(outlier_sums, weight_row[epilogue.columns[part + i]], x_of_column);
                }
            }
        }
        if (there) {
            const int column = share.first_row + row, r = item % ROWS;
            const float scale = epilogue.column_scale(column), shift = epilogue.shift(column);
            const int place = r / 8 * 2 * WARP + r % 8 * 4;
            const int *const from = all_sums + (item / (ROWS * FRAGMENTS) * FRAGMENTS + f) * SUMS + place;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const int token = f * COLUMNS + c, sum = from[c % 2 * WARP + c / 2];
                if (token < m) {
                    const float v =
                        epilogue.value(sum, epilogue.row_scale(token), aside.count > 0, outlier_sums[c], scale, shift);
                    epilogue.store(i64(token) * n + column, sum, v);
                }
            }
        }
    }
}
