// What gemm_4bit_dgrad_sm90a does otherwise than gemm_4bit_tile_sm90a, because columns of W are the operand of M and the sums run
// over rows of W: how scales come to shared memory, and how the A operand of wgmma is made of codes.
#pragma once

#include "gemm/tile_sm90a/consumer.cuh"
#include "gemm/tile_sm90a/producer.cuh"

template <int TOKENS>
using ColumnsShape = Shape<TOKENS, true>;

constexpr int SPANS = ROWS / SCALE_SPAN;         // of a tile's columns, each of which has one scale in a row of W
constexpr u32 SPAN_BYTES = K_TILE * 4;           // a span's scales, of the rows of a k-tile
constexpr u32 K_TILE_SCALES_BYTES = SPANS * SPAN_BYTES;
constexpr int SCALES_AHEAD = 3;                  // stages that are on the way: each row's are in a line of their own
static_assert(SCALE_PRODUCERS == K_TILE, "each brings those of one row of each k-tile");

// Of the sixteen rows of a k-block, the place of each: a lane multiplies rows 2t, 2t + 1, 2t + 8 and 2t + 9, and finds their
// scales together.
__device__ inline u32 scale_place(u32 row) { return row / 2 % 4 * 4 + row / 8 % 2 * 2 + row % 2; }

// By SCALE_PRODUCERS threads, of which this is `member`: the scales of the tiles, in stages of
// [SCALES_K_TILES k-tiles][SPANS][K_TILE rows of W] float32. W is [n][k].
template <typename S>
__device__ inline void produce_column_scales(u8 *shared, const Scales &scales, int n, int k, int block_shift,
                                             ProductWalk<S::TOKENS> walk, int member, int lane) {
    static_assert(S::SCALES_BYTES == SCALES_K_TILES * K_TILE_SCALES_BYTES, "a stage");
    const Pipelines<S> pipelines(shared);
    const bool nested = scales.absmax == nullptr;
    wait_for_previous();
    const float *map = nullptr;
    float offset = 0.0f;
    if (nested) {
        map = fill_map<S>(shared, member);
        offset = *scales.offset;
    }
    // Whether one load brings both scales that a row of W has in a tile: blocks of 64, aligned.
    const bool pairs = block_shift == 6 && k % ROWS == 0 &&
                       (nested ? is_aligned(scales.codes, 2) : is_aligned(scales.absmax, 8));
    const u32 place = u32(member) / 16 * 16 + scale_place(u32(member) % 16);
    PipelineState<S::SCALES_STAGES> state;
    for (; walk.there(); walk.advance()) {
        const Tile tile = walk.tile();
        // This thread's row of W in k-tile j of a stage; scales of rows that are not there are read from the last one.
        const auto row_of = [&](int stage, int j) { return (tile.begin + stage) * SCALES_K + j * K_TILE + member; };
        const auto first_of = [&](int row) { return i64(row < n ? row : n - 1) * k + tile.row; };
        Floats2 values[SCALES_AHEAD][SCALES_K_TILES];
        const auto load_pairs = [&](Floats2(&to)[SCALES_K_TILES], int stage) {
#pragma unroll
            for (int j = 0; j < SCALES_K_TILES; j++) {
                const i64 block = first_of(row_of(stage, j)) >> 6;
                if (nested) {
                    const u32 codes = *reinterpret_cast<const u16 *>(scales.codes + block);
                    to[j] = {__uint_as_float(codes), scales.absmax2[block >> NESTED_SHIFT]};
                } else {
                    to[j] = *reinterpret_cast<const Floats2 *>(scales.absmax + block);
                }
            }
        };
        const auto enter = [&]() {
            barrier_wait(&pipelines.scales_empty[state.stage], state.phase ^ 1);
            return shared + S::SCALES_AT + state.stage * S::SCALES_BYTES + place * 4;
        };
        const auto leave = [&]() {
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&pipelines.scales_full[state.stage]);
            }
            state.advance();
        };
        // Rows that are not there add nothing, whatever the last one's scale is.
        const auto put = [&](u8 *to, int j, int span, bool there, float scale) {
            *reinterpret_cast<float *>(to + j * K_TILE_SCALES_BYTES + span * SPAN_BYTES) = there ? scale : 0.0f;
        };
        if (pairs) {
#pragma unroll
            for (int i = 0; i < SCALES_AHEAD; i++) {
                load_pairs(values[i], i);
            }
#pragma unroll 1
            for (int stage = 0; stage < tile.stages; stage += SCALES_AHEAD) {
#pragma unroll
                for (int i = 0; i < SCALES_AHEAD; i++) {
                    if (stage + i < tile.stages) {
                        u8 *const to = enter();
#pragma unroll
                        for (int j = 0; j < SCALES_K_TILES; j++) {
                            const bool there = row_of(stage + i, j) < n;
                            const u32 codes = __float_as_uint(values[i][j].value[0]);
#pragma unroll
                            for (int which = 0; which < 2; which++) {
                                const RawScale<true> raw = {codes >> 8 * which & 255, values[i][j].value[1]};
                                const float scale = nested ? raw.value(map, offset) : values[i][j].value[which];
                                put(to, j, 2 * which, there, scale);
                                put(to, j, 2 * which + 1, there, scale);
                            }
                        }
                        leave();
                        load_pairs(values[i], stage + i + SCALES_AHEAD);
                    }
                }
            }
        } else {
            const int left = k - SCALE_SPAN - tile.row;
#pragma unroll 1
            for (int stage = 0; stage < tile.stages; stage++) {
                u8 *const to = enter();
#pragma unroll 1
                for (int j = 0; j < SCALES_K_TILES; j++) {
                    const int row = row_of(stage, j);
                    const i64 first = first_of(row);
#pragma unroll
                    for (int span = 0; span < SPANS; span++) {
                        // Behind the last column that of the last: what comes of it is not written.
                        const int column = span * SCALE_SPAN;
                        const i64 block = (first + (column < left ? column : left)) >> block_shift;
                        put(to, j, span, row < n,
                            nested ? ScaleReader<true>(scales, block)[0].value(map, offset) : scales.absmax[block]);
                    }
                }
                leave();
            }
        }
    }
}

// Columns of W as the rows of A: two to a lane, neighbours, see my_column. A chunk of a k-tile are one or two parts of 32 rows of
// W, and k-blocks of 16, of which one wgmma makes the products.
template <typename S>
struct ColumnsOperand {
    static constexpr bool BLOCK_SUMS = false;
    static constexpr int CHUNKS = S::chunks(S::TOKENS), PARTS = 2 / CHUNKS, K_BLOCKS = 4 / CHUNKS;
    static constexpr u32 PART_BYTES = 32 * CODES_ROW_BYTES;
    const u8 *const shared, *const my_codes, *const my_scales;
    // As in RowsOperand, of a word the bytes of two rows.
    const u32 at_lane, first, second;
    struct Loaded {
        u32 words[PARTS][4];
        const u8 *scales;
    };

    __device__ ColumnsOperand(const u8 *shared, int lane, u32 team_warp)
        : shared(shared),
          // Row l of a part is lane l's to address, sixteen bytes of it, where the 64-byte swizzle has them.
          my_codes(shared + S::CODES_AT + lane * CODES_ROW_BYTES + (team_warp / 2 ^ u32(lane) / 2 % 4) * 16),
          my_scales(shared + S::SCALES_AT + team_warp / 2 * SPAN_BYTES + lane % 4 * 16),
          at_lane(u32(lane) * 8),
          first(0x1100u | (4u + team_warp % 2) << 4),
          second(first + (2u << 4)) {}

    // The codes of chunk c of k-tile `k_tile` of a stage of scales, which is in a half of a stage of codes.
    __device__ void load(Loaded &to, u32 codes_stage, u32 half, u32 scales_stage, int k_tile, int c) const {
        const u8 *const codes = my_codes + codes_stage * S::CODES_BYTES + half * (2 * PART_BYTES);
        to.scales = my_scales + scales_stage * S::SCALES_BYTES + k_tile * K_TILE_SCALES_BYTES + c * (K_BLOCKS * 64);
#pragma unroll
        for (int j = 0; j < PARTS; j++) {
            load_transposed(to.words[j], codes + (c + j) * PART_BYTES);
        }
    }
    // K-block q of what was loaded, to the registers that wgmma reads: scaled in float32, rounded once.
    template <typename T>
    __device__ void dequantize(u32 *to, const Loaded &from, int, int q) const {
        const u8 *const entries = shared + S::TABLE_AT;
        const Floats4 by = *reinterpret_cast<const Floats4 *>(from.scales + q * 64);
#pragma unroll
        for (int w = 0; w < 2; w++) {
            const u32 word = from.words[q / 2][q % 2 * 2 + w];
            const Floats2 one = *reinterpret_cast<const Floats2 *>(entries + permute_bytes(at_lane, word, first));
            const Floats2 next = *reinterpret_cast<const Floats2 *>(entries + permute_bytes(at_lane, word, second));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                to[4 * q + 2 * w + r] =
                    pack2<T>(__fmul_rn(one.value[r], by.value[2 * w]), __fmul_rn(next.value[r], by.value[2 * w + 1]));
            }
        }
    }
};
