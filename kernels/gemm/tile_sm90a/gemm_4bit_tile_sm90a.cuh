// gemm_4bit_tile_sm90a: y[M][N] = x[M][K] * W[N][K]^T + bias[N] for many rows of x, W in 4 bits.
//
// Problem. The products of prompts and batches, M from 65 to some 2048; and of fewer rows those of weights that
//   gemm_4bit_block_sums_sm90a.cu does not take, which has another main loop. x, bias and y are bfloat16 or float16, sums float32.
//   Any codebook and block size of the format, plain or nested scales; K a multiple of 32; x and codes aligned to 16 bytes;
//   compute capability 9.0 alone (wgmma, TMA, setmaxnreg).
//
// Roofline. Bytes: N * K / 2 of codes and N * K / blocksize scales once, x once for each 128 rows of W, y once. 14336 x 4096 in
//   blocks of 64, bfloat16, on an H200, in microseconds (benches/RESULTS.md; 9.2 is what reading codes and scales once takes):
//     rows of x                      64     96    128    256    512
//     measured                     26.2   29.8   34.4   52.4   99.8
//     floor / measured             35 %   31 %   27 %   17 %    9 %
//     cuBLAS, weight in 16 bits    32.9   33.8   33.9   45.2   90.3
//   Not memory is the bound but the multiprocessor: its shared memory, and from 256 rows on its matrix units nearly as much.
//   Clocks for 128 rows of W by 64 columns, at 128 bytes a clock:
//     rows of x                      64     96    128    192    256
//     matrix units                  256    384    512    768   1024
//     their reads of x              128    192    256    384    512
//     the table: 8 bytes a code     256    256    256      -      -
//     planes in and out               -      -      -    160    160
//     x coming in                    64     96    128    192    256
//     codes in and out               96     96     96     96     96
//     all of shared memory          544    640    736    832   1024
//     what follows from the times   610    715    810   1030   1210
//   With 256 rows and without dequantizing (the registers of A filled with anything) a clock counter said 1080: instructions of
//   the dequantizing warps are not hidden wholly behind the products, and each of a warp's costs about half a clock of its
//   quarter, wherever it stands: 250 of them in a k-tile took 1370 clocks, 190 took 1230.
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
//   in a table that waits for its own products, and the other team works meanwhile. Beyond, registers have room for one team,
//   which dequantizes the next k-tile while one is multiplied, by permutations of bytes (planes.cuh).
//   Producers: two warps of which one thread drives the copy engine (codes, 128 columns a stage; x), and two warps that turn
//   scales to float32 (256 columns a stage), or to planes: the sixteen values of a block in 16 bits (64 columns a stage).
//
// Division. A block makes one tile. Where tiles are too few for the device, blocks share them: up to four of a cluster, or, since
//   clusters of four take 120 of 132 multiprocessors at a time, two to eight that leave their sums in memory. Where multiprocessors
//   would have no tile in the last turn, all blocks share all tiles evenly (stream-K). Of more than 128 tokens a tile the end of
//   one tile and the start of the next then overlap, as producers go on. Of fewer, x waits for the epilogue, which is in its place,
//   and what a block has of a tile is whole rounds of the main loop: 512 columns. See walk.cuh and ranges.cuh.
//
// Shared memory, with 64 / 96, 128 / 192 / 256 tokens:
//     x          8 / 4 / 4 / 4 stages of TOKENS x 128 bytes, 128-byte swizzle    64 / 48, 64 / 96 / 128 KB
//     table      256 bytes of codes x 32 lanes x two float32: a lane's entries are in banks of its own    64 KB, up to 128
//     y          of half of the tokens, on its way to whole lines                                         24 / 32 KB, from 192
//     codes      4 / 4 / 3 / 3 stages of 128 x 64 bytes, 64-byte swizzle                                 32 or 24 KB
//     scales     2 stages of [4 k-tiles][128 rows][2]                                                     8 KB, up to 128
//     planes     4 stages of [2 halves][low, high][128 rows][16 bytes]                                    32 KB, from 192
//     map        of nested scales                                                                         1 KB
//     barriers   full and empty, of each stage
//   The epilogue of two teams puts into the place of x and the table: the second team's sums, and y on its way to whole lines;
//   that of a cluster the sums of its other blocks.
//
// Budget. A consumer has 104 registers where there are two teams (TOKENS / 2 accumulators, 16 or 8 of A, codes and scales), 208
//   or 216 where there is one; producers give theirs away (setmaxnreg). In flight: all stages, 88 to 160 KB for each
//   multiprocessor. One block on a multiprocessor, 640 or 384 threads.
//
// Determinism. A tile's products are added in the order of k-tiles, then of teams. Of the blocks of a cluster each adds up a range
//   of tokens in the order of the parts of K (split-K); in ranges, the block with the first columns adds what the others left,
//   in the order of K.
//   Nothing depends on which block comes first: the same inputs give the same bits on one device. Each weight is its codebook
//   value times its scale in float32, rounded once: the bits of dequantize.
//
// Tried, on an H200 in 14336 x 4096, and slower; from 256 tokens on in launches of less than a tenth of a second in all, which
// leave the card cool:
//   - One team for up to 128 tokens: 28.8, 34.2 and 34.5 us for 64, 96 and 128 rows of x, in place of 26.4, 30.5 and 34.0.
//   - W dequantized by warps of their own into shared memory, for products of two operands from there: 48.4 us for 128 rows,
//     94.1 for 256. More of shared memory, and the dequantizing waits for itself.
//   - Planes for up to 128 tokens as well: 32.4, 34.0 and 39.3 us for 64, 96 and 128 rows: less of shared memory, but the
//     permutations take 60 % of their unit and their chain is longer than that of the look-ups; with two teams as well.
//   - For 256 tokens, the table: 51.7 us in place of 50.7. Planes that each lane makes for itself: 54.7. Products one by one:
//     52.7; two at a time: 50.0, but not with ptxas 12.0 and 12.4 (C7513); two warpgroups that take turns by barriers: no
//     difference. Registers of A for two k-blocks ahead instead of four: 59.7.
//   - Clusters of three alone where four blocks leave their sums in memory, 4096 x 14336: 31.7, 36.0 and 42.3 us for 64, 96 and
//     128 rows in place of 27.7, 31.5 and 36.6.
//   - Of more than 128 tokens, ranges where there are fewer tiles than multiprocessors: 54.0 in place of 50.0 us for 256 rows. Of
//     512 rows they take 96.7 and not 101, of 1024 187 and not 213 to 220.
//   - Copies of x for two blocks of a cluster at once (multicast): 30.4, 37.1 and 51.0 us for 64, 128 and 256 rows.
//   - Scales for the sums instead of the weights, with 4 bytes of the table for a code, from 96 rows on: ptxas does not keep two
//     sets of accumulators in registers, and makes the products wait for each other (C7512).
//   - The same with tiles of 256 rows of W by 96 or 128 of x, where each of two warpgroups has 128 rows and products of one of 64 rows
//     by half of the tokens at a time: 32.6 and 38.9 us in place of 29.5 and 33.7 for 96 and 128 rows. Less of shared memory and of
//     the second level, but look-ups, products and sums of a warpgroup are one chain of 420 clocks for 128 of its matrix units.
//   - Blocks that begin with different columns: 35.2 in place of 33.7 us for 128 rows, 21.8 and 23.9 in place of 18.3 and 21.6 for 32
//     and 64. Multiprocessors that read the same part of x at the same time help each other.
//   - From 256 rows on, W made dense in memory by three warps of each block, by units of 64 rows and 128 columns in the order in which
//     they are wanted, and from there by the copy engine to products of two operands from shared memory, tiles of 256 rows of W by
//     128 of x in clusters of two: 93, 129, 231 and 399 us for 256, 512, 1024 and 2048 rows, where a dense copy and cuBLAS take 84,
//     139, 222 and 402. Up to 512 rows three warps do not make W dense fast enough, and there are no registers for more; from 1024
//     rows on power limits the clock, and dequantizing takes its part of that whenever it is done.
//   - Stages that are known where the main loop is compiled (rounds.cuh): no difference from 96 rows on, where shared memory binds.
#pragma once

#include "gemm/tile_sm90a/consumer.cuh"
#include "gemm/tile_sm90a/epilogue.cuh"
#include "gemm/tile_sm90a/planes.cuh"
#include "gemm/tile_sm90a/producer.cuh"
#include "gemm/tile_sm90a/ranges.cuh"
#include "gemm/tile_sm90a/rounds.cuh"

// `S`: the shape of a tile; `Operand`: what A is where there are two teams.
template <typename T, typename S, typename Operand = RowsOperand<S>>
__device__ inline void gemm_4bit_tile_sm90a(const TensorMap *x_map, const TensorMap *codes_map, const Scales &scales,
                                            const Codebook &codebook, const T *bias, T *y, int m, int n, int k,
                                            int block_shift, const LaunchConfig &config, const Workspace &workspace) {
    constexpr int TOKENS = S::TOKENS;
    DYNAMIC_SHARED_1024(shared);
    const int warp = __shfl_sync(ALL_LANES, int(threadIdx.x) / WARP, 0);
    if (threadIdx.x == 0) {
        Pipelines<S>(shared).init();
    }
    __syncthreads();

    // Whether a block may end in the middle of a k-tile.
    const bool two_blocks = block_shift == 5 || k % K_TILE != 0;
    // The barriers of a cluster are for all of its threads: those that end before the reduction pass by both.
    const auto pass_by_reduction = [&]() {
        if (config.split_k > 1) {
            cluster_meet();
            cluster_meet();
        }
    };
    if (warp >= S::CONSUMER_WARPS) {
        give_registers<S::PRODUCER_REGISTERS>();
        const int lane = read_lane(), member = int(threadIdx.x) - (S::THREADS - SCALE_PRODUCERS);
        if (member < 0) {
            if (lane == 0) {
                if (warp == S::CONSUMER_WARPS) {
                    produce_codes<S>(shared, codes_map, {config, n, k});
                } else {
                    produce_x<S>(shared, x_map, {config, n, k});
                }
            }
            __syncwarp();
        } else {
            const ProductWalk<TOKENS> walk(config, n, k);
            if constexpr (S::TEAMS == 2) {
                produce_scales<S>(shared, scales, ScalesSink<S>{}, n, k, block_shift, walk, member, lane);
            } else {
                const PlanesSink<T> planes{codebook, two_blocks};
                produce_scales<S>(shared, scales, planes, n, k, block_shift, walk, member, lane);
            }
        }
        pass_by_reduction();
        return;
    }

    take_registers<S::REGISTERS>();
    const int lane = read_lane(), team = warp / TEAM_WARPS;
    const u32 my_row = u32(warp % TEAM_WARPS) * 16 + u32(lane) / 4;
    float sums[S::ACCUMULATORS];
    if constexpr (S::TEAMS == 2) {
        Operand::prepare(shared, codebook, warp, lane);
        u32 rounds = 0;
        // Where it is in its walk is found anew, as registers do not do for that beside the sums.
        int at = ProductWalk<TOKENS>(config, n, k).at;
        for (;;) {
            const auto here = [&]() {
                ProductWalk<TOKENS> walk(config, n, k);
                walk.at = at;
                return walk;
            };
            multiply_in_rounds<T, Operand, S>(sums, shared, lane, team, my_row, here().stages(), rounds);
            let_next_start();
            // What the epilogue leaves is in the place of x.
            exchange_sums<S>(sums, shared, team);
            const ProductWalk<TOKENS> walk = here();
            const bool more = at + walk.stages() < walk.end;
            if (team == 0) {
                wait_for_previous();
                if (finishes_elsewhere(walk)) {
                    leave_sums<S>(sums, shared, workspace, walk.range());
                } else {
                    collect_sums<S>(sums, shared, workspace, walk);
                    write_tile<T, S>(sums, shared, bias, y, m, n, walk.tile(), walk.split(), config);
                }
            }
            if (!more) {
                break;
            }
            at += walk.stages();
            if (team == 0) {
                // x may come there again.
                stores_before_units();
                meet<3, TEAM>();
                if (team_member() == 0) {
                    barrier_arrive(Pipelines<S>(shared).epilogue);
                }
            }
        }
        if (team == 1) {
            pass_by_reduction();
        }
    } else {
        ConsumerState<S> state;
        for (ProductWalk<TOKENS> walk(config, n, k); walk.there(); walk.advance()) {
            multiply_by_planes<T, S, TOKENS>(sums, shared, state, lane, my_row, walk.stages(), two_blocks);
            // No block of the next kernel has room beside this one: it is not too early before the last tile.
            let_next_start();
            wait_for_previous();
            if (finishes_elsewhere(walk)) {
                leave_sums<S>(sums, shared, workspace, walk.range());
                continue;
            }
            collect_sums<S>(sums, workspace, walk);
            write_tile<T, S>(sums, shared, bias, y, m, n, walk.tile(), walk.split(), config);
        }
    }
}
