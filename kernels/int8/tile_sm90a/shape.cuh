// What parts of the product by warpgroups share: sizes, shared memory, and which tiles a block has.
#pragma once

#include "common/wgmma.cuh"
#include "int8/int8_epilogue.cuh"
#include "int8/outliers.cuh"

constexpr int GROUP = 128;       // threads of a warpgroup
constexpr int TEAM = 2 * GROUP;  // threads that multiply
constexpr int TEAM_WARPS = TEAM / WARP;
constexpr int THREADS = TEAM + GROUP;
// The warp of which one thread has the copy engine work, and the first of those that bring outliers.
constexpr int COPIER = TEAM_WARPS, PICKER = COPIER + 1;
constexpr int HELPERS = THREADS / WARP - PICKER;
constexpr int ROWS = TEAM / 2;                        // of W in a tile: 64 for each warpgroup
constexpr int GROUP_ROWS = ROWS / 2;
constexpr int STEP = 128;        // columns of a stage: bytes that the swizzle spans, and a unit of masks
constexpr int QUARTERS = 4;      // of a step: a product of the units takes 32 columns
constexpr int MOST_PARTS = 4;    // of K
constexpr int OUT_TOKENS = 128;  // that a warpgroup writes at once
constexpr int OUT_PITCH = GROUP_ROWS * 2;
constexpr int CHUNK = 16;  // outlier columns that a product takes
constexpr u32 CHUNK_ROW = CHUNK * 2;
constexpr u32 CODES_CHUNK = ROWS * CHUNK;  // bytes of a chunk of W
constexpr int PIECES = 3;                  // 16-bit values that are a float32
constexpr float INVERSE_127 = 1.0f / 127;
static_assert(STEP == MASK_UNIT * WARP, "a stage's part of a mask is read at once");
static_assert(CHUNK == PANEL_UNIT, "chunks of x are whole");

// Of the tokens of a tile, how many a block of a cluster adds up, at most; and the bytes of their sums from all parts.
__device__ constexpr int part_tokens(int tokens, int parts) { return (tokens / 16 + parts - 1) / parts * 16; }
__device__ constexpr u32 received_bytes(int tokens, int parts) { return u32(parts * part_tokens(tokens, parts)) * (ROWS * 4); }

// How much of everything is in shared memory. The launcher takes BYTES from here.
template <int TOKENS>
struct Shape {
    // What leaves some 100 KB on the way while one stage is worked on.
    static constexpr int STAGES = TOKENS > 128 ? 4 : TOKENS > 64 ? 6 : 8;
    static constexpr int SUMS = TOKENS / 2;  // of a thread
    // Whether blocks may share a tile: with more sums a thread has no registers for that, and launches have more tiles.
    static constexpr bool DIVIDES = TOKENS <= 128;
    static constexpr u32 W_BYTES = ROWS * STEP;
    static constexpr u32 X_BYTES = TOKENS * STEP;
    static constexpr u32 STAGE_BYTES = W_BYTES + X_BYTES;
    static constexpr u32 OUT_BYTES = (TOKENS < OUT_TOKENS ? TOKENS : OUT_TOKENS) * OUT_PITCH;  // of a warpgroup
    // Of a thread that multiplies, and of the others.
    static constexpr int REGISTERS = TOKENS > 128 ? 224 : 184, OTHER_REGISTERS = TOKENS > 128 ? 56 : 136;
    static_assert(TEAM * REGISTERS + GROUP * OTHER_REGISTERS <= THREADS * (65536 / THREADS / 8 * 8),
                  "a block has the registers that it was launched with, and would wait for more for ever");
    // Whether those who take outliers out have registers for what they ask for in the beginning.
    static constexpr bool FIRST_UNITS = TOKENS <= 128;
    // Where y will be there are outliers first: codes of W of the first chunks, which are taken out of stages, then x.
    static constexpr int KEPT = TOKENS == 128 ? 8 : 4;
    static constexpr u32 X_CHUNK = TOKENS * CHUNK_ROW;  // of one piece
    static constexpr int ROOM = (2 * OUT_BYTES - KEPT * CODES_CHUNK) / X_CHUNK;
    // In this order.
    static constexpr u32 OUT_AT = STAGES * STAGE_BYTES;
    static constexpr u32 OUTLIERS_AT = OUT_AT + KEPT * CODES_CHUNK;  // of x
    static constexpr u32 SCALES_AT = OUT_AT + 2 * OUT_BYTES;
    static constexpr u32 BARRIERS_AT = SCALES_AT + 2 * TOKENS * 4;
    static constexpr u32 BYTES = BARRIERS_AT + (3 * STAGES + 2) * 8;
    static_assert(BYTES <= 232448, "what a block may have");
    static_assert(ROOM >= PIECES, "a chunk of float32");
    static_assert(!DIVIDES || (received_bytes(TOKENS, 2) <= OUT_AT && received_bytes(TOKENS, 3) <= OUT_AT &&
                               received_bytes(TOKENS, 4) <= OUT_AT),
                  "sums of all parts take the place of the ring");
};

// A place in a ring, and whether the ring was passed an odd number of times.
template <int COUNT>
struct Turn {
    u32 place = 0, round = 0;

    __device__ void next() {
        if (++place == u32(COUNT)) {
            place = 0;
            round ^= 1;
        }
    }
};

// The barriers of a block: stages that are full, empty, and rid of outliers; outliers that are there, and that were taken.
template <int TOKENS>
struct Barriers {
    Barrier *full, *empty, *clean, *gathered, *taken;

    __device__ explicit Barriers(u8 *shared) {
        full = reinterpret_cast<Barrier *>(shared + Shape<TOKENS>::BARRIERS_AT);
        empty = full + Shape<TOKENS>::STAGES;
        clean = empty + Shape<TOKENS>::STAGES;
        gathered = clean + Shape<TOKENS>::STAGES;
        taken = gathered + 1;
    }
    __device__ void init(int sharing) const {
        for (int i = 0; i < Shape<TOKENS>::STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], u32(TEAM_WARPS * sharing));
            barrier_init(&clean[i], 1);
        }
        barrier_init(gathered, HELPERS + 1);
        barrier_init(taken, TEAM_WARPS);
        barriers_made();
    }
};

// How the work is divided.
struct TilePlan {
    int token_tiles;  // those of one range of rows of W follow each other
    int tiles;        // for each block, or cluster of `parts` or `sharing` blocks
    int workers;      // blocks or clusters: each takes every so-manieth tile; with parts, one
    int steps;        // of K, of a part; the last part may have fewer
    int parts;        // of K: blocks of a cluster that share a tile, 1 to MOST_PARTS
    int sharing;      // blocks of a cluster, 1 or 2, with the same tokens and rows of W after each other; 1 with parts
};

// What a block does. Found by each role for itself: less has to be kept while a thread has few registers.
struct Share {
    int rank, worker;  // in the cluster, and which of them it is
    int begin, steps;  // of K
    int ranges;        // of rows, of the cluster

    __device__ Share(const TilePlan &plan, bool shares, bool divides, int k) {
        rank = shares || divides ? int(cluster_rank()) : 0;
        worker = int(blockIdx.x) / (shares ? plan.sharing : plan.parts);
        const int all = (k + STEP - 1) / STEP;
        begin = divides ? rank * plan.steps : 0;
        steps = (begin + plan.steps < all ? begin + plan.steps : all) - begin;
        ranges = shares ? plan.sharing : 1;
    }
    __device__ int row(const TilePlan &plan, int tile) const {
        return (tile / plan.token_tiles * ranges + (ranges > 1 ? rank : 0)) * ROWS;
    }
};

// The chunks of outliers that are handed over together: `first` of `all`, and how many.
template <int TOKENS>
struct HandOver {
    int all, room, first = 0;

    __device__ HandOver(int count, u32 kind)
        : all((count + CHUNK - 1) / CHUNK), room(kind == KIND_F32 ? Shape<TOKENS>::ROOM / PIECES : Shape<TOKENS>::ROOM) {}
    // Whether W of these was taken out of stages.
    __device__ bool kept() const { return first < Shape<TOKENS>::KEPT; }
    __device__ int chunks() const {
        const int end = kept() && Shape<TOKENS>::KEPT < all ? Shape<TOKENS>::KEPT : all;
        return end - first < room ? end - first : room;
    }
    // Which chunk in the place for W the first is.
    __device__ int place() const { return kept() ? first : 0; }
    // To the next; whether there is one.
    __device__ bool next() {
        first += chunks();
        return first < all;
    }
};
