// experts_tile_sm90a: for each expert y[slots][N] = gate(x[slots][K] * W[N][K]^T + bias[N]), its slots being consecutive rows of
// x, its weight in 4 bits; one launch for all experts. The products of batches, of prompts and of training.
//
// Problem. Up to 512 experts with any number of rows, none among them; which are whose the device alone knows (`offsets`). x,
//   biases and y are bfloat16 or float16, sums float32; the columns of x in the order of permute.cuh. Two weights of one expert, a
//   gate's and another, or one weight; then silu(gate) * up, gpt-oss's clamped form, gelu, the square of relu, or the products
//   themselves. Blocks of 64 and more, any codebook, plain or nested scales; K a multiple of 64; x and codes aligned to 16 bytes;
//   compute capability 9.0 alone.
//
// Roofline. 128 experts of 2048 x 768 with 8 choices for each token, bfloat16, blocks of 64, on an H200, in microseconds: what a
//   block of experts took, sorting and the weighted sum included, by tokens of a tile; all codes and scales alone take 76.
//     tokens              32     64    128    256    512   1024   2048   4096
//     16 in a tile       117    128    132    187    298    554   1028   1924
//     32                        145    154    160    232    410    712   1373
//     64                        176    182    192    226    344    588   1117
//     128                       276    292    303    352    371    592   1058
//   Not memory is the bound but the multiprocessor: with the same weights for all experts, which are then in the second-level
//   cache, 128 tokens took 111 us in place of 123 by tiles of 16. Clocks for 256 rows of W by 64 columns, at 128 bytes a clock:
//     tokens of a tile                        16     32     64    128
//     matrix units                           128    256    512   1024
//     their reads of x, 4 warpgroups          64    128    256    512
//     look-ups in the table                  256    256    256    512
//     codes, scales and x in and out         190    206    238    302
//     all of shared memory                   510    590    750   1326
//     instructions, of a quarter             330    350    400    480    16 warps of 82, 88, 101 and 121, of four quarters
//     what follows from 128 tokens' times    730    865   1040   1700    at 1.755 GHz, without 12 us besides the products
//
// Tile. Two teams of two warpgroups: each team takes every k-tile, for rows of its own, so x comes in once for 256 rows of W, no
//   sums have to be exchanged, and one team multiplies while the other writes.
//
//   CTA tile 256 rows of W x TOKENS rows of x, by quarters of 64 rows          a warp's 16 rows of products, lane 4g + t
//                       with a gate             without                          rows 0-7     quarter 2 team,     row 8 warp + r(g)
//     team 0   quarter 0   gate rows 0-63       rows 0-63                        rows 8-15    quarter 2 team + 1, row 8 warp + r(g)
//              quarter 1   up rows 0-63         rows 64-127                      r: row_of_group
//     team 1   quarter 2   gate rows 64-127     rows 128-191
//              quarter 3   up rows 64-127       rows 192-255
//   So a lane has the gate and what is gated in its own accumulators.
//   With up to 64 tokens in a tile W goes into the products as it is in the codebook, rounded to 16 bits, and scales are for the
//   sums of a block, as in gemm_4bit_block_sums_sm90a.cu; with 128 registers have no room for that, and W is dequantized.
//   Blocks stay. Each makes a run of consecutive tiles, equal parts of them all: first those of the first expert, of these
//   those of the first rows of W, those of one range of rows for all its tokens after each other, so that W comes from memory
//   once. A warp finds its block's first tile by adding up the experts' tiles; from there on it counts. With 16 tokens in a tile,
//   and few tiles, the parts are equal to the stage, and a tile may be of several blocks: see shared_tiles.cuh.
//   Producers: a thread that has the copy engine bring codes and plain scales of blocks of 64, one that has it bring x, two warps for
//   other scales. They run ahead of the consumers into the next tiles.
//
// Shared memory, with 16 / 32 / 64 / 128 tokens:
//     x          8 / 8 / 4 / 4 stages of TOKENS x 128 bytes, 128-byte swizzle                   16 / 32 / 32 / 64 KB
//     table      256 bytes of codes x 32 lanes x two values, half of it unused up to 64                         64 KB
//     codes      3 / 3 / 2 / 2 stages of 256 x 128 bytes, 128-byte swizzle                               96 or 64 KB
//     scales     as many stages of [256 rows][4 k-tiles]                                                  12 or 8 KB
//     y          of each team 32 tokens x 128 rows on their way to whole lines                                 16 KB
//     rows       of y, for each team's tokens                                                            1/8 to 1 KB
//     map        of nested scales                                                                               1 KB
//     barriers   full and empty, of each stage; those of codes are for scales as well
//
// Budget. 640 threads; a consumer has 104 registers (TOKENS / 2 accumulators, up to 64 tokens twice, 16 or 8 of A, with 16 tokens 32,
//   codes, scales, where it is), a producer 64. One block on a multiprocessor.
//
// Determinism. A row's products are added in the order of k-tiles; where blocks share tiles, in parts that depend on how many tiles
//   there are in all. The same inputs give the same bits on one device. With 128 tokens in a tile each weight is its codebook value
//   times its scale in float32, rounded once, the bits of dequantize, and x = identity gives the dequantized weights.
//
// Tried, on an H200, and no faster; in microseconds for 128 tokens by tiles of 16, where nothing else is said:
//   - Scales for the weights with up to 64 tokens: 200 for 256 tokens by tiles of 32.
//   - Codes in boxes of 64 bytes of a row: as fast, with columns in their own order, which take two loads of twice the size (138).
//   - x with the barriers of codes: 140 in place of 138, as codes are then held longer.
//   - Scales of blocks of 64 loaded by threads and not copied: 127 in place of 123; each load has 32 lines.
//   - One set of A with 16 tokens: 132 in place of 127; two with 32 tokens: 166 in place of 153.
//   - Boxes of codes fetched to the second level three stages ahead: 134 in place of 127. 256 bytes at a time from memory: no
//     difference.
//   - Shared tiles with 32 tokens: no difference.
//   - As many columns as a tile has tokens, by steps of 32 in one kernel: ptxas runs out of registers (C7512).
//   - All kinds of gates in one switch for each value: code so long that fetching it took 3 us for every 32 tokens.
#pragma once

#include "experts/tile_sm90a/epilogue.cuh"
#include "experts/tile_sm90a/main_loop.cuh"
#include "experts/tile_sm90a/producer.cuh"

// What A is.
template <typename T, typename S, bool BLOCK_SUMS = S::BLOCK_SUMS>
struct OperandOf {
    using Type = PermutedCodebookOperand<T, S>;
};
template <typename T, typename S>
struct OperandOf<T, S, false> {
    using Type = PermutedRowsOperand<S>;
};

template <typename T, int TOKENS>
__device__ inline void experts_tile_sm90a(const TensorMap *x_map, const ExpertsProduct &product, const Codebook &codebook,
                                          const T *bias, T *y, const Workspace &workspace) {
    using S = ExpertShape<TOKENS>;
    DYNAMIC_SHARED_1024(shared);
    const int thread = int(threadIdx.x), lane = thread % WARP;
    const int warp = __shfl_sync(ALL_LANES, thread / WARP, 0);
    if (thread == 0) {
        Pipelines<S>(shared).init();
    }
    __syncthreads();

    if (warp >= S::CONSUMER_WARPS) {
        give_registers<S::PRODUCER_REGISTERS>();
        wait_for_previous();
        const TileWalk<S> walk(product, lane);
        const int role = warp - S::CONSUMER_WARPS, member = thread - (S::THREADS - SCALE_PRODUCERS);
        if (role == 0) {
            if (lane == 0) {
                produce_codes<S>(shared, product, walk);
            }
            __syncwarp();
        } else if (role == 1) {
            if (lane == 0) {
                produce_x<S>(shared, x_map, walk);
            }
            __syncwarp();
        } else {
            produce_scales<S>(shared, product, walk, member, lane);
        }
        return;
    }

    take_registers<S::REGISTERS>();
    const u32 my_row = u32(warp / TEAM_WARPS) * (2 * QUARTER_ROWS) + u32(warp % TEAM_WARPS) * 8 + row_of_group(u32(lane) / 4);
    using Operand = typename OperandOf<T, S>::Type;
    Operand::prepare(shared, codebook, warp, lane);
    wait_for_previous();
    Rounds<S> rounds;
    for (TileWalk<S> walk(product, lane); walk.left > 0; walk.advance()) {
        const auto find_y_row = [&]() {
            const int slot = walk.token + thread % TOKENS, row = walk.begin + slot;
            return product.order == nullptr || slot >= walk.tokens ? row : product.order[row];
        };
        // Asked for early where there is a register for it: behind the products nothing hides the wait.
        int y_row = S::TIGHT ? 0 : find_y_row();
        float sums[S::ACCUMULATORS];
        multiply_rounds<T, Operand, S>(sums, shared, rounds, lane, my_row, walk.stages());
        if constexpr (S::TIGHT) {
            y_row = find_y_row();
        }
        if (walk.is_last()) {
            let_next_start();
        }
        const int team = warp / TEAM_WARPS, team_warp = warp % TEAM_WARPS;
        if constexpr (S::SHARES) {
            if (walk.first_stage() > 0) {
                leave_sums<S>(sums, workspace, walk.range(), team, team_warp);
                continue;
            }
            collect_sums<S>(sums, workspace, walk, team, team_warp);
        }
        write_tile<T, S>(sums, shared, bias, y, product, walk, y_row, team, team_warp);
    }
}
