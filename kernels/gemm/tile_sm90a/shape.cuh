// The shape of a tile of gemm_4bit_tile_sm90a: constants, the partition of shared memory and registers, pipeline states.
#pragma once

#include "common/planes.cuh"
#include "common/scales.cuh"
#include "common/workspace.cuh"
#include "common/wgmma.cuh"

constexpr int WARPGROUP = 128;            // threads whose matrix units work on one wgmma
constexpr int TEAM = 2 * WARPGROUP;       // consumers that multiply the same k-tile, 64 rows of W for each warpgroup
constexpr int TEAM_WARPS = TEAM / WARP;
constexpr int ROWS = TEAM / 2;            // of W in a tile: wgmma takes 64 of them
constexpr int K_TILE = 64;                // columns of a main loop iteration: 128 bytes of x, the widest swizzle
constexpr int K_TILE_BYTES = K_TILE * 2;
constexpr int CODES_K = 2 * K_TILE;       // columns of a stage of codes: one k-tile for each of two teams
constexpr int CODES_ROW_BYTES = CODES_K / 2;
constexpr int SCALES_K_TILES = 4;         // k-tiles of a stage of scales: blocks of 64 give one 16-byte load for each row
constexpr int SCALES_K = SCALES_K_TILES * K_TILE;  // K is split in whole stages of scales
constexpr int SCALE_SPAN = 32;            // columns that share a scale whatever the block size: the smallest block
constexpr int SCALES_PER_ROW = SCALES_K / SCALE_SPAN;
constexpr int MAX_SPLIT_K = 4;            // blocks of a cluster: their accumulators fit in place of x and the table
constexpr int SCALE_PRODUCERS = 2 * WARP; // threads that bring scales, the last of the block

constexpr u32 PLANES_BYTES = 2 * ROWS * 16;  // the sixteen values of a block of each row, their low and their high bytes

// How a product is divided: a tile for each block, or for each cluster of `split_k` blocks; or in `ranges`.
struct LaunchConfig {
    int token_tiles;    // along M; those of one range of rows of W follow each other
    int scales_stages;  // of K, in a split; the last split may have fewer
    int split_k;        // blocks of a cluster that share a tile, 1 to MAX_SPLIT_K
    int ranges;         // blocks, of which each takes as many stages of all tiles as another (stream-K); 0: one tile each
    int range_unit;     // stages that what a range has of a tile is a multiple of, as is a tile
};

// Of the tokens of a tile, how many a block of a cluster adds up, at most; and the bytes of their sums from all splits.
__device__ constexpr int split_tokens(int tokens, int split_k) { return (tokens / 16 + split_k - 1) / split_k * 16; }
__device__ constexpr u32 received_bytes(int tokens, int split_k) {
    return u32(split_k * split_tokens(tokens, split_k)) * (ROWS * 4);
}
__device__ constexpr u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// What a block of threads is made of, and how much of everything is in its shared memory. The launcher takes BYTES from here.
// With COLUMNS it is the shape of gemm_4bit_dgrad_sm90a, which swaps the roles of rows and columns of W: where this file says
// rows of W, read columns of W there, and for K the rows of W that are summed over.
// experts/tile_sm90a has a shape and a main loop of its own, for the same pipelines.
template <int TOKENS_, bool COLUMNS_ = false>
struct Shape {
    static constexpr int TOKENS = TOKENS_;
    static constexpr bool COLUMNS = COLUMNS_;
    // Two teams take k-tiles in turn where registers have room for both teams' accumulators: up to 128 tokens. They dequantize
    // through a table. With 128 the A operand of a whole k-tile no longer fits beside them, and a k-tile is dequantized by
    // halves. One team has time for permutations, and shared memory for y in place of the table. With
    // COLUMNS it has the table too: a lane's four rows of W in a k-block would each need values of their own for permutations.
    static constexpr int TEAMS = TOKENS <= 128 ? 2 : 1;
    static constexpr bool TABLE = TEAMS == 2 || COLUMNS;
    __device__ static constexpr int chunks(int tokens) { return tokens == 128 ? 2 : 1; }
    static constexpr int CONSUMERS = TEAMS * TEAM, CONSUMER_WARPS = CONSUMERS / WARP;
    static constexpr int THREADS = CONSUMERS + WARPGROUP;
    static constexpr int CODES_STAGES = TEAMS == 2 ? 4 : 3;    // of 8 KB; those of a round of two teams
    static constexpr int X_STAGES = TOKENS > 64 ? 4 : 8;       // two for each of two teams; twice that where they are small
    // Beside the table scales of some k-tiles, else the planes of one k-tile: see planes.cuh.
    static constexpr int SCALES_STAGES = TABLE ? 2 : 4;
    static constexpr int ACCUMULATORS = TOKENS / 2;            // of a thread: 64 rows x TOKENS over 128 threads
    static constexpr int TILE_ROWS = ROWS;                     // rows of W of a block, whose codes and scales lie together
    static constexpr int SECOND_ROW = 8;                       // of the two rows of W of a lane, the second behind the first
    static constexpr bool SCALES_WITH_CODES = false;           // whether the barriers of codes are for scales as well
    static constexpr int X_READERS = TEAM_WARPS;               // warps that read a stage of x
    static constexpr int SCALES_MEETING = 2;                   // the barrier of those who bring scales
    static constexpr u32 CODES_BYTES = TILE_ROWS * CODES_ROW_BYTES;
    static constexpr u32 X_BYTES = TOKENS * K_TILE_BYTES;
    static constexpr u32 SCALES_BYTES = TABLE ? TILE_ROWS * SCALES_PER_ROW * 4 : 2 * PLANES_BYTES;
    static constexpr u32 TABLE_BYTES = TABLE ? 256 * 256 : 0;
    static constexpr int OUT_TOKENS = TABLE ? TOKENS : TOKENS / 2;  // of which y is put together at a time
    static constexpr u32 OUT_BYTES = TABLE ? 0 : OUT_TOKENS * ROWS * 2;
    // Shared memory, in this order.
    static constexpr u32 X_AT = 0;
    static constexpr u32 TABLE_AT = X_AT + X_STAGES * X_BYTES;
    static constexpr u32 OUT_AT = TABLE ? X_AT : TABLE_AT;
    static constexpr u32 CODES_AT = TABLE_AT + TABLE_BYTES + OUT_BYTES;
    static constexpr u32 SCALES_AT = CODES_AT + CODES_STAGES * CODES_BYTES;
    static constexpr u32 MAP_AT = SCALES_AT + SCALES_STAGES * SCALES_BYTES;
    static constexpr u32 BARRIERS_AT = MAP_AT + 1024;
    // Whether two teams may go on with another tile, or part of one: then x waits for the epilogue of the one before.
    static constexpr bool SEVERAL_TILES = TEAMS == 2 && !COLUMNS;
    static constexpr u32 BYTES =
        BARRIERS_AT + (2 * (CODES_STAGES + X_STAGES + SCALES_STAGES) + (SEVERAL_TILES ? 1 : 0)) * 8;
    static_assert(BYTES <= 232448, "what a block may have");
    // In the epilogue: the other team's accumulators, or those of all splits of K, and behind these y of a split.
    static_assert(TEAMS == 1 || TEAM * ACCUMULATORS * 4 <= X_STAGES * X_BYTES, "the other team's sums take the place of x");
    static_assert(OUT_TOKENS * ROWS * 2 <= CODES_AT - OUT_AT, "y, beside a table in the place of x");
    static constexpr u32 SPLIT_AT =
        larger(received_bytes(TOKENS, 2), larger(received_bytes(TOKENS, 3), received_bytes(TOKENS, 4)));
    static_assert(SPLIT_AT + split_tokens(TOKENS, 2) * ROWS * 2 <= MAP_AT, "y of a split, where nothing is needed any more");
    // Registers of a consumer, and of a producer: setmaxnreg takes multiples of 8.
    static constexpr int REGISTERS = TEAMS == 2 ? 104 : TOKENS == 256 ? 216 : 208;
    static constexpr int PRODUCER_REGISTERS = TEAMS == 2 ? 64 : TOKENS == 256 ? 72 : 88;
    static_assert(CONSUMERS * REGISTERS + WARPGROUP * PRODUCER_REGISTERS <= THREADS * (65536 / THREADS / 8 * 8),
                  "a block has the registers that it was launched with, and would wait for more for ever");
    static_assert(X_STAGES % 2 == 0, "k-tiles of two teams");
};

// Where the rows of A are columns of W: of a lane of a team's warp the first of its two, which are neighbours. What a lane gets
// of a matrix of codes are four columns, of which one warp takes two and the next the others.
__device__ inline u32 my_column(int team_warp, int lane) {
    return u32(team_warp / 2 * 32 + lane / 4 * 4 + team_warp % 2 * 2);
}

// Which stage of a pipeline comes next, and the parity of its phase.
template <int STAGES>
struct PipelineState {
    u32 stage = 0, phase = 0;

    __device__ void advance(u32 by = 1) {
        stage += by;
        if (stage >= u32(STAGES)) {
            stage -= u32(STAGES);
            phase ^= 1;
        }
    }
};

// Barriers of the three pipelines: `full` when a stage has arrived, `empty` when every consumer has read it.
template <typename S>
struct Pipelines {
    Barrier *codes_full, *codes_empty, *x_full, *x_empty, *scales_full, *scales_empty;
    Barrier *epilogue;  // of two teams: over when nothing of an epilogue is in the place of x any more

    __device__ explicit Pipelines(unsigned char *shared) {
        codes_full = reinterpret_cast<Barrier *>(shared + S::BARRIERS_AT);
        codes_empty = codes_full + S::CODES_STAGES;
        x_full = codes_empty + S::CODES_STAGES;
        x_empty = x_full + S::X_STAGES;
        scales_full = S::SCALES_WITH_CODES ? codes_full : x_empty + S::X_STAGES;
        scales_empty = S::SCALES_WITH_CODES ? codes_empty : scales_full + S::SCALES_STAGES;
        epilogue = x_empty + S::X_STAGES + (S::SCALES_WITH_CODES ? 0 : 2 * S::SCALES_STAGES);
    }

    // By one thread, before any other knows of them.
    __device__ void init() const {
        for (int i = 0; i < S::CODES_STAGES; i++) {
            barrier_init(&codes_full[i], S::SCALES_WITH_CODES ? 1 + SCALE_PRODUCERS / WARP : 1);
            barrier_init(&codes_empty[i], S::CONSUMER_WARPS);
        }
        for (int i = 0; i < S::X_STAGES; i++) {
            barrier_init(&x_full[i], 1);
            barrier_init(&x_empty[i], S::X_READERS);
        }
        for (int i = 0; i < S::SCALES_STAGES && !S::SCALES_WITH_CODES; i++) {
            barrier_init(&scales_full[i], SCALE_PRODUCERS / WARP);
            barrier_init(&scales_empty[i], S::CONSUMER_WARPS);
        }
        if (S::SEVERAL_TILES) {
            barrier_init(epilogue, 1);
        }
        barriers_made();
    }
};

// Where a consumer is in them.
template <typename S>
struct ConsumerState {
    PipelineState<S::CODES_STAGES> codes;
    PipelineState<S::SCALES_STAGES> scales;
    PipelineState<S::X_STAGES> x;

};
