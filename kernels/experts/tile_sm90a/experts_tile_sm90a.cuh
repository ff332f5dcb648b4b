// experts_tile_sm90a: for each expert y[slots][N] = gate(x[slots][K] * W[N][K]^T + bias[N]), its slots being consecutive rows of
// x, its weight in 4 bits; one launch for all experts. The products of prompts and of training.
//
// Problem. Up to 512 experts with any number of rows, none among them; which are whose the device alone knows (`offsets`). x,
//   biases and y are bfloat16 or float16, sums float32. Two weights of one expert, a gate's and another, or one weight; then
//   silu(gate) * up, gpt-oss's clamped form, gelu, the square of relu, or the products themselves. Any codebook and block size
//   of the format, plain or nested scales; K a multiple of 32; x and codes aligned to 16 bytes; compute capability 9.0 alone.
//
// Roofline. 128 experts of 2048 x 768 with 8 choices for each token, bfloat16, blocks of 64, on an H200, in microseconds: what
//   this kernel took for gate and up, and for down, by tokens of a tile; the codes and scales alone take 51 and 26.
//     tokens             128           256           512          1024          2048          4096
//     32 in a tile   122,  64      124,  64      184,  95      304, 153      567, 279     1141, 536
//     64             143,  74      144,  75      154,  80      230, 119      381, 189      708, 390
//     128            193,  99      194, 103      205, 105      224, 115      336, 177      613, 328
//   Not memory is the bound but the multiprocessor's shared memory: all experts with the same weights, in the second-level
//   cache, took as long. Clocks for 256 rows of W by 64 columns, at 128 bytes a clock:
//     tokens of a tile                        32     64    128
//     matrix units                           256    512   1024
//     their reads of x, 4 warpgroups         128    256    512
//     the table: 8 bytes a code              512    512    512
//     x coming in                             32     64    128
//     codes and scales in and out            208    208    208
//     all of shared memory                   880   1040   1360
//   A k-tile took 0.62, 0.71 and 0.96 us, some 90 % of that at the clock that power allows.
//
// Tile. gemm/tile_sm90a's main loop, with its two teams of two warpgroups beside instead of behind each other: each team takes
//   every k-tile, for rows of its own, so x comes in once for 256 rows of W, no sums have to be exchanged, and one team
//   multiplies while the other writes.
//
//   CTA tile 256 rows of W x TOKENS rows of x, by quarters of 64 rows          a warp's 16 rows of products, lane 4g + t
//                       with a gate             without                          rows 0-7     quarter 2 team,     row 8 warp + g
//     team 0   quarter 0   gate rows 0-63       rows 0-63                        rows 8-15    quarter 2 team + 1, row 8 warp + g
//              quarter 1   up rows 0-63         rows 64-127
//     team 1   quarter 2   gate rows 64-127     rows 128-191
//              quarter 3   up rows 64-127       rows 192-255
//   So a lane has the gate and what is gated in its own accumulators.
//   Blocks stay. Each makes a run of consecutive tiles, equal parts of them all: first those of the first expert, of these
//   those of the first rows of W, those of one range of rows for all its tokens after each other, so that W comes from memory
//   once. A warp finds its block's first tile by adding up the experts' tiles; from there on it counts.
//   Producers: a thread that has the copy engine bring codes, one that has it bring x, two warps for scales. They run ahead of
//   the consumers into the next tiles.
//
// Shared memory, with 32 / 64 / 128 tokens:
//     x          4 stages of TOKENS x 128 bytes, 128-byte swizzle                                    16 / 32 / 64 KB
//     table      256 bytes of codes x 32 lanes x two float32                                                   64 KB
//     codes      4 stages of 256 x 64 bytes, 64-byte swizzle                                                   64 KB
//     scales     2 stages of [4 k-tiles][256 rows][2]                                                          16 KB
//     y          of each team 32 tokens x 128 rows on their way to whole lines                                 16 KB
//     rows       of y, for each team's tokens                                                            1/4 to 1 KB
//     map        of nested scales                                                                               1 KB
//     barriers   full and empty, of each stage
//
// Budget. 640 threads; a consumer has 104 registers (TOKENS / 2 accumulators, 16 or 8 of A, codes, scales, where it is), a
//   producer 64. One block on a multiprocessor.
//
// Determinism. A row's products are added in the order of k-tiles, whatever block makes them and whatever the others' rows are.
//   Each weight is its codebook value times its scale in float32, rounded once: the bits of dequantize. The sum of one value
//   is that value, so x = identity gives the dequantized weights.
//
// Tried, on an H200, and no faster:
//   - The k-tile after the next dequantized while the matrix units work, with two sets of A: 2 % slower with 32 tokens, 14 %
//     with 64.
//   - As many columns as a tile has tokens, by steps of 32 in one kernel: ptxas runs out of registers (C7512), and it took what
//     this takes with 128 tokens at 2048 and more, 3 % more below.
//   - All kinds of gates in one switch for each value: code so long that fetching it took 3 us for every 32 tokens, 248 instead
//     of 177 us for down with 2048 tokens.
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
