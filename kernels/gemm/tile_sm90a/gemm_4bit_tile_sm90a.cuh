// gemm_4bit_tile_sm90a: y[M][N] = x[M][K] * W[N][K]^T + bias[N] for more than 32 rows of x, W in 4 bits.
//
// Problem. The products of prompts and batches, M from 33 to some 1024. x, bias and y are bfloat16 or float16, sums float32.
//   Any codebook and block size of the format, plain or nested scales; K a multiple of 32; x and codes aligned to 16 bytes;
//   compute capability 9.0 alone (wgmma, TMA, setmaxnreg).
//
// Roofline. Bytes: N * K / 2 of codes and N * K / blocksize scales once, x once for each 128 rows of W, y once. 14336 x 4096 in
//   blocks of 64, bfloat16, on an H200, in microseconds (benches/RESULTS.md; 8.9 is what reading codes and scales once takes):
//     rows of x                      64     96    128    256    512
//     measured                     25.7   29.6   35.3   51.7  108.1
//     floor / measured             35 %   30 %   25 %   17 %    8 %
//     cuBLAS, weight in 16 bits    33.5   33.5   33.6   44.9   95.1
//   Not memory is the bound but the multiprocessor: its shared memory, and from 256 rows on its matrix units nearly as much.
//   Clocks for 128 rows of W by 64 columns, at 128 bytes a clock:
//     rows of x                      64     96    128    192    256
//     matrix units                  256    384    512    768   1024
//     their reads of x              128    192    256    384    512
//     the table: 8 bytes a code     256    256    256    256    256
//     x coming in                    64     96    128    192    256
//     codes in and out               96     96     96     96     96
//     all of shared memory          544    640    736    928   1120
//     what follows from the times   610    715    810   1030   1190
//     shared memory's part of it     89 %   90 %   91 %   90 %   94 %
//   A tile takes some 4500 clocks before its first product, most of them latency of memory, and 1200 to 3700 in the epilogue.
//   Launches that keep the card busy for long run at 1.53 instead of 1.78 GHz, for want of power.
//
// Tile. W is the operand of M of wgmma, because A may come from registers: it is dequantized into just those.
//
//   CTA tile 128 rows of W x TOKENS rows of x                    one team of consumers: 2 warpgroups
//                     x: TOKENS rows, 64 columns a stage           warpgroup w: rows 64 w ... 64 w + 63
//                   +-------------------------------------+          warp v: rows 16 v ... of these
//     warpgroup 0   |  64 rows: m64 n TOKENS k16 from     |            lane 4g + t: rows g and g + 8,
//     warpgroup 1   |  64 rows: registers, and from x     |              A: k = 2t, 2t+1, 2t+8, 2t+9
//                   +-------------------------------------+              accumulators: columns 8j + 2t, 8j + 2t + 1
//   Up to 128 tokens a second team takes every other k-tile, with accumulators of its own: dequantizing is a chain of look-ups
//   that waits for its own products, and the other team works meanwhile. Beyond, registers have room for one team, which
//   dequantizes a k-block of the next k-tile between two products.
//   Producers: a warp of which one thread drives the copy engine (codes, 128 columns a stage; x), and two warps that turn
//   scales to float32 (256 columns a stage). The fourth warp of their warpgroup has nothing to do.
//
// Shared memory, with 64 / 96, 128 / 192 / 256 tokens:
//     x          8 / 4 / 4 / 4 stages of TOKENS x 128 bytes, 128-byte swizzle    64 / 48, 64 / 96 / 128 KB
//     table      256 bytes of codes x 32 lanes x two float32: a lane's entries are in banks of its own       64 KB
//     codes      6 / 6 / 3 / 3 stages of 128 x 64 bytes, 64-byte swizzle                                 48 or 24 KB
//     scales     2 stages of [4 k-tiles][128 rows][2]                                                         8 KB
//     map        of nested scales                                                                             1 KB
//     barriers   full and empty, of each stage
//   The epilogue puts into the place of x and the table: the second team's sums, those of other blocks of the cluster, and y on
//   its way to whole lines.
//
// Budget. A consumer has 104 registers where there are two teams (TOKENS / 2 accumulators, 16 or 8 of A, codes and scales), 208
//   or 224 where there is one; producers give theirs away (setmaxnreg). In flight: all stages, 104 to 160 KB for each
//   multiprocessor. One block on a multiprocessor, 640 or 384 threads.
//
// Determinism. A tile's products are added in the order of k-tiles, then of teams. When a launch has few tiles, up to four
//   blocks of a cluster share one, a part of K each (split-K), and each adds up a range of tokens in the order of the parts.
//   Nothing depends on which block comes first: the same inputs give the same bits on one device. Each weight is its codebook
//   value times its scale in float32, rounded once: the bits of dequantize.
//
// Tried, on an H200 in 14336 x 4096, and slower:
//   - One team for up to 128 tokens: 28.8, 34.2 and 34.5 us for 64, 96 and 128 rows of x, in place of 26.4, 30.5 and 34.0.
//   - W dequantized by warps of their own into shared memory, for products of two operands from there: 48.4 us for 128 rows,
//     94.1 for 256. More of shared memory, and the dequantizing waits for itself.
//   - No table of 64 KB: warps beside make the 16 scaled values of each block, consumers look four weights up at once by
//     permutations of bytes (110 instructions of a warp for a k-tile, each 2.2 clocks of its quarter). 32.4, 34.0, 39.3, 48.4,
//     98.4 and 205 us for 64, 96, 128, 256, 512 and 1024 rows: less of shared memory, but the permutations take 60 % of their
//     unit and their chain is longer than that of the look-ups; with two teams as well.
//   - Copies of x for two blocks of a cluster at once (multicast): 30.4, 37.1 and 51.0 us for 64, 128 and 256 rows.
//   - Scales for the sums instead of the weights, with 4 bytes of the table for a code: ptxas does not keep two sets of
//     accumulators in registers, and makes the products wait for each other (C7512).
//   - A clock counter in the kernel with one team said 657, 818 and 1240 clocks a k-tile for 64, 128 and 256 tokens; 1193 for
//     256 when a k-tile is dequantized by k-blocks.
#pragma once

#include "gemm/tile_sm90a/consumer.cuh"
#include "gemm/tile_sm90a/epilogue.cuh"
#include "gemm/tile_sm90a/producer.cuh"

template <typename T, int TOKENS>
__device__ inline void gemm_4bit_tile_sm90a(const TensorMap *x_map, const TensorMap *codes_map, const Scales &scales,
                                            const Codebook &codebook, const T *bias, T *y, int m, int n, int k,
                                            int block_shift, const LaunchConfig &config) {
    using S = Shape<TOKENS>;
    DYNAMIC_SHARED_1024(shared);
    const int thread = int(threadIdx.x), lane = thread % WARP;
    const int warp = __shfl_sync(ALL_LANES, thread / WARP, 0);
    Tile tile;
    tile.split = config.split_k > 1 ? int(cluster_rank()) : 0;
    const int index = int(blockIdx.x) / config.split_k;
    tile.token = index % config.token_tiles * TOKENS;
    tile.row = index / config.token_tiles * ROWS;
    const int all = (k + SCALES_K - 1) / SCALES_K;
    tile.begin = tile.split * config.scales_stages;
    tile.stages = (tile.begin + config.scales_stages < all ? tile.begin + config.scales_stages : all) - tile.begin;

    if (thread == 0) {
        Pipelines<S>(shared).init();
    }
    __syncthreads();

    // The barriers of a cluster are for all of its threads: those that end before the reduction pass by both.
    const auto pass_by_reduction = [&]() {
        if (config.split_k > 1) {
            cluster_meet();
            cluster_meet();
        }
    };
    if (warp >= S::CONSUMER_WARPS) {
        give_registers<S::PRODUCER_REGISTERS>();
        const int member = thread - (S::THREADS - SCALE_PRODUCERS);
        if (warp == S::CONSUMER_WARPS) {
            if (lane == 0) {
                produce_codes_and_x<TOKENS>(shared, x_map, codes_map, tile);
            }
            __syncwarp();
        } else if (member >= 0) {
            produce_scales<S>(shared, scales, n, k, block_shift, tile, member, lane);
        }
        pass_by_reduction();
        return;
    }

    take_registers<S::REGISTERS>();
    const int team = warp / TEAM_WARPS, team_warp = warp % TEAM_WARPS, member = thread % TEAM;
    const u32 my_row = u32(team_warp) * 16 + u32(lane) / 4;
    float sums[S::ACCUMULATORS];
    fill_table<S>(shared, codebook, warp, lane);
    ConsumerState<S> state(team);
    multiply_k_tiles<T, S, TOKENS>(sums, shared, state, lane, team, my_row, tile.stages);
    let_next_start();
    if constexpr (S::TEAMS == 2) {
        exchange_sums<TOKENS>(sums, shared, team, member);
        if (team == 1) {
            pass_by_reduction();
            return;
        }
        add_sums<TOKENS>(sums, shared, member);
    }
    wait_for_previous();
    write_tile<T, TOKENS>(sums, shared, bias, y, m, n, tile, config, lane, team_warp, my_row, member);
}
