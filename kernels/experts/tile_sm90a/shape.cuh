// The shape of a tile of experts_tile_sm90a, what its product is, and which tiles a block makes.
#pragma once

#include "common/workspace.cuh"
#include "gemm/tile_sm90a/shape.cuh"

constexpr int QUARTER_ROWS = 64;  // rows of one weight that a copy brings: wgmma has eight of them in a warp beside eight others
constexpr int BOX_BYTES = 128;    // of these rows' codes: whole lines
constexpr int QUARTERS = 4;       // of a tile: two for each team
constexpr int STEP_TOKENS = 32;   // that a copy brings at most, and that a team puts together before it writes whole lines

static_assert(2 * BOX_BYTES == SCALES_K, "a stage of codes has the columns of a stage of scales");

// A tile is 256 rows of W by TOKENS tokens of one expert, or as many as are left. See gemm/tile_sm90a/shape.cuh for what is not said
// here. The launcher takes BYTES from here.
template <int TOKENS_>
struct ExpertShape {
    static constexpr int TOKENS = TOKENS_;
    // Both teams take every k-tile, each for rows of its own: they share x, and one writes a tile while the other multiplies.
    static constexpr int TEAMS = 2;
    // Whether scales are for the sums of a block and not for its weights: where registers have room for two sets of accumulators.
    static constexpr bool BLOCK_SUMS = TOKENS <= 64;
    // Whether blocks can share tiles: where there are few of them.
    static constexpr bool SHARES = TOKENS <= 16;
    // Sets of registers of A.
    static constexpr int A_SETS = TOKENS <= 16 ? 2 : 1;
    // Whether hardly any registers are left beside two sets of accumulators and A.
    static constexpr bool TIGHT = TOKENS == 64;
    // Tokens that a copy brings.
    static constexpr int STEP = TOKENS < STEP_TOKENS ? TOKENS : STEP_TOKENS;
    static constexpr int CONSUMERS = TEAMS * TEAM, CONSUMER_WARPS = CONSUMERS / WARP;
    static constexpr int THREADS = CONSUMERS + WARPGROUP;
    // A stage of codes is 128 bytes of a row, for lines that are whole; scales are for the same columns.
    static constexpr int STAGE_K = 2 * BOX_BYTES, CODES_STAGES = TOKENS <= 32 ? 3 : 2, SCALES_STAGES = CODES_STAGES;
    static constexpr bool SEVERAL_TILES = false;
    static constexpr bool SCALES_WITH_CODES = true;
    static constexpr int X_STAGES = TOKENS <= 32 ? 8 : 4;
    static constexpr int ACCUMULATORS = TOKENS / 2;
    static constexpr int TILE_ROWS = QUARTERS * QUARTER_ROWS;
    static constexpr int SECOND_ROW = QUARTER_ROWS;
    static constexpr int X_READERS = CONSUMER_WARPS;
    static constexpr int SCALES_MEETING = 2;
    static constexpr u32 QUARTER_BYTES = QUARTER_ROWS * (STAGE_K / 2);
    static constexpr u32 CODES_BYTES = QUARTERS * QUARTER_BYTES;
    static constexpr u32 X_BYTES = TOKENS * K_TILE_BYTES;
    static constexpr u32 SCALES_BYTES = TILE_ROWS * SCALES_K_TILES * 4;  // [TILE_ROWS][SCALES_K_TILES]
    static constexpr u32 TABLE_BYTES = 256 * 256;
    static constexpr u32 OUT_BYTES = STEP_TOKENS * (TILE_ROWS / TEAMS) * 2;  // of a team
    // Shared memory, in this order.
    static constexpr u32 X_AT = 0;
    static constexpr u32 TABLE_AT = X_AT + X_STAGES * X_BYTES;
    static constexpr u32 CODES_AT = TABLE_AT + TABLE_BYTES;
    static constexpr u32 SCALES_AT = CODES_AT + CODES_STAGES * CODES_BYTES;
    static constexpr u32 OUT_AT = SCALES_AT + SCALES_STAGES * SCALES_BYTES;
    static constexpr u32 ROWS_AT = OUT_AT + TEAMS * OUT_BYTES;  // [TEAMS][TOKENS]: to which row of y a token goes
    static constexpr u32 MAP_AT = ROWS_AT + TEAMS * TOKENS * 4;
    static constexpr u32 BARRIERS_AT = MAP_AT + 1024;
    static constexpr u32 BYTES = BARRIERS_AT + 2 * (CODES_STAGES + X_STAGES) * 8;
    static_assert(BYTES <= 232448, "what a block may have");
    static constexpr int REGISTERS = 104, PRODUCER_REGISTERS = 64;
    static_assert(CONSUMERS * REGISTERS + WARPGROUP * PRODUCER_REGISTERS <= THREADS * (65536 / THREADS / 8 * 8),
                  "a block has the registers that it was launched with, and would wait for more for ever");
};

// Products of the experts' tokens with one projection, or with a gate's and another.
struct ExpertsProduct {
    const int *offsets;     // [experts + 1]: the first row of x of each expert, and behind the last
    const int *order;       // [slots]: to which row of y that of a row of x goes, or null: to the same
    const u64 *table;       // [projections][experts][4]: addresses of codes, absmax, absmax2 and offset
    // [projections][experts][2]: codes [n][k / 2], by boxes of BOX_BYTES columns and QUARTER_ROWS rows, 128-byte swizzle; and scales
    // [n][k / 64], by boxes of SCALES_K_TILES columns and QUARTER_ROWS rows, if `copies_scales` and the scales are aligned.
    const TensorMap *maps;
    int experts;
    int gate, up;           // projections; gate is -1 where `up` is alone
    int n, k;               // rows and columns of each weight
    int block_shift;        // log2 of the block size
    int nested;             // whether scales are
    u32 activation;         // ACTIVATION_...
    int pitch;              // elements between rows of y
    int bias_pitch;         // and between the experts' biases
    int copies_scales;      // whether they are of blocks of 64, not nested, and K is a multiple of SCALES_K
    int shares;             // whether blocks share all tiles evenly, so that several may have parts of one (stream-K)
    int permutes;           // whether columns of y are in the order of permute.cuh; n is then a multiple of 64

    __device__ bool gated() const { return gate >= 0; }
    // Rows of a weight in a tile, and of those before quarter `q` of it.
    __device__ int rows_of_tile() const { return gated() ? 2 * QUARTER_ROWS : 4 * QUARTER_ROWS; }
    __device__ int rows_before(int q) const { return (gated() ? q / 2 : q) * QUARTER_ROWS; }
    // The projection whose rows are in quarters 2i + `which`.
    __device__ int projection(int which) const { return which == 0 && gated() ? gate : up; }
    // Where in `table` and `maps` that of an expert is.
    __device__ i64 entry(int which, int expert) const { return i64(projection(which)) * experts + expert; }
    // Whether the copy engine brings an expert's scales.
    __device__ bool copies_scales_of(int expert) const {
        return copies_scales != 0 && (table[4 * entry(0, expert) + 1] | table[4 * entry(1, expert) + 1]) % 16 == 0;
    }
};

// Stages of a tile.
__device__ inline int stages_of(const ExpertsProduct &product) { return (product.k + SCALES_K - 1) / SCALES_K; }

// The tiles of a block, one after another: a range of all tiles' stages. First come those of the first expert, of these those of the
// first rows of W; the tiles of its tokens follow each other. By whole warps up to the loop. Where blocks share tiles a range may begin
// and end in the middle of one, else it is of whole ones.
template <typename S>
struct TileWalk {
    static constexpr int TOKENS = S::TOKENS;
    const ExpertsProduct &product;
    i64 all;            // tiles
    int left;           // stages to go, those of this tile with them; or tiles, where blocks never share any
    int expert;
    int begin, tokens;  // the expert's first row of x, and how many it has
    int row_tile, token;
    int begin_stage;    // the first of this tile's stages, where it may be another than 0

    __device__ TileWalk(const ExpertsProduct &product, int lane) : product(product) {
        // Tiles of tokens of so many experts for each lane, and of those up to it.
        const int each = (product.experts + WARP - 1) / WARP;
        int mine = 0;
        for (int i = 0; i < each; i++) {
            mine += lane * each + i < product.experts ? token_tiles(lane * each + i) : 0;
        }
        int up_to = mine;
        for (int by = 1; by < WARP; by *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, up_to, u32(by));
            up_to += lane >= by ? other : 0;
        }
        all = i64(__shfl_sync(ALL_LANES, up_to, WARP - 1)) * row_tiles();
        const int stages = stages_of(product);
        int first;
        begin_stage = 0;
        if (S::SHARES && product.shares != 0) {
            const int from = first_shared(range());
            left = first_shared(range() + 1) - from;
            first = from / stages;
            begin_stage = from - first * stages;
        } else {
            first = int(all * range() / gridDim.x);
            left = (int(all * (range() + 1) / gridDim.x) - first) * (S::SHARES ? stages : 1);
        }
        const int unit = left > 0 ? first / row_tiles() : 0;
        const int lanes = __popc(__ballot_sync(ALL_LANES, up_to <= unit));
        int before = __shfl_sync(ALL_LANES, up_to - mine, lanes % WARP);
        expert = 0;
        begin = tokens = row_tile = token = 0;
        if (left > 0) {
            expert = lanes * each;
            for (; before + token_tiles(expert) <= unit; expert++) {
                before += token_tiles(expert);
            }
            enter();
            const int tiles = token_tiles(expert), rest = first - before * row_tiles();
            row_tile = rest / tiles;
            token = rest % tiles * TOKENS;
        }
    }
    // Which range is this block's: the last is that of the first block, as a block must not wait for one that starts later.
    __device__ int range() const { return int(gridDim.x) - 1 - int(blockIdx.x); }
    // The first stage of a range, of those of all tiles, where blocks share tiles: as they are few, 32 bits do.
    __device__ int first_shared(int which) const {
        return int(u32(all) * u32(stages_of(product)) * u32(which) / gridDim.x);
    }
    // The first stage of this tile that the block makes, and how many.
    __device__ int first_stage() const { return S::SHARES ? begin_stage : 0; }
    __device__ int stages() const {
        const int there = stages_of(product) - first_stage();
        return S::SHARES && left < there ? left : there;
    }
    // Tokens of this tile that are brought: whole steps. What products make of others is not written.
    __device__ int width() const {
        const int there = tokens - token;
        return there < TOKENS ? (there + S::STEP - 1) / S::STEP * S::STEP : TOKENS;
    }
    __device__ void advance() {
        left -= S::SHARES ? stages() : 1;
        begin_stage = 0;
        token += TOKENS;
        if (token < tokens) {
            return;
        }
        token = 0;
        row_tile++;
        if (row_tile < row_tiles() || left == 0) {
            return;
        }
        row_tile = 0;
        do {
            expert++;
            enter();
        } while (tokens == 0);
    }
    // Whether this is the block's last tile.
    __device__ bool is_last() const { return left <= (S::SHARES ? stages() : 1); }

  private:
    __device__ int row_tiles() const { return (product.n + product.rows_of_tile() - 1) / product.rows_of_tile(); }
    __device__ void enter() {
        begin = product.offsets[expert];
        tokens = product.offsets[expert + 1] - begin;
    }
    __device__ int token_tiles(int of) const {
        return (product.offsets[of + 1] - product.offsets[of] + TOKENS - 1) / TOKENS;
    }
};
