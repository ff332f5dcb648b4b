// gemm_4bit_dgrad_sm90a: dx[M][K] = dy[M][N] * W[N][K], W in 4 bits: the gradient of x, without a dense copy of W.
//
// Problem. The backward pass of training with a frozen weight, M up to some 800. dy and dx are bfloat16 or float16, sums float32.
//   Any codebook and block size of the format, plain or nested scales; N a multiple of 8, K of 32; dy and codes aligned to 16
//   bytes; compute capability 9.0 alone (wgmma, TMA, setmaxnreg).
//
// Roofline. Bytes: N * K / 2 of codes and N * K / blocksize scales once, dy once for each 128 columns of W, dx once. 14336 x 4096
//   in blocks of 64, bfloat16, on an H200, in microseconds (benches/RESULTS.md; 8.9 is what reading codes and scales once takes):
//     rows of dy                     64    128    256    512
//     measured                     34.7   41.7   59.6  105.5
//     a dense copy and cuBLAS      77.1   80.1   89.1  121.6
//     cuBLAS, weight in 16 bits    35.2   36.6   49.4   85.6
//   Up to 128 rows shared memory is the bound. Clocks for 128 columns of W by 64 rows, at 128 bytes a clock:
//     rows of dy                     64    128    256
//     matrix units                  256    512   1024
//     their reads of dy             128    256    512
//     the table: 8 bytes a code     256    256    256
//     dy coming in                   64    128    256
//     codes in, and out twice        96     96     96
//     scales in and out             144    144    144
//     all of shared memory          688    880   1264
//     what follows from the times   840   1030   1500
//   With 256 rows 38 KB come to a multiprocessor for each of these steps: 25 bytes a clock, which is what the second-level cache
//   gives all of them at a time.
//
// Tile. That of gemm_4bit_tile_sm90a, turned: columns of W are the operand of M of wgmma, and rows of W are added over. So dy lies
//   as x does there, and a lane has of W two columns and, of each k-block, four rows, whose codes ldmatrix brings it transposed:
//
//   16-bit element: two bytes of codes, four columns         lane 4g + t gets element g of rows 2t and 2t + 1 in a word,
//     row 0   | e0 | e1 | ... | e7 |   32 columns              and of rows 2t + 8 and 2t + 9 in the next:
//     row 1   | e0 | e1 | ... | e7 |                             byte v % 2 of each for warp v: columns 4g + 2(v % 2), + 1
//     ...                                                      so that two warps take the same 32 columns
//   The table gives the values of both columns of a row; those of two rows are scaled, rounded and paired: no more instructions
//   than of rows of W. Scales are one for each row and 32 columns, [SPANS][K_TILE] of a k-tile, a lane's four together.
//
// Division. As there; tiles that are too few are shared by blocks of a cluster or, without one, through memory (ranges.cuh):
//   clusters of four take 120 of 132 multiprocessors at a time, blocks by themselves all.
//
// Budget. Shared memory and registers as there, with a table whatever the number of rows. One team with 256 rows of dy.
//
// Determinism. As there.
//
// Tried, on an H200, in 14336 x 4096, and no faster:
//   - Parts of N in clusters: 39.3, 48.2 and 67.8 us for 64, 128 and 256 rows in place of 33.6, 41.0 and 58.6.
//   - Scales of one stage ahead instead of three: 37.7 in place of 34.7 us for 64 rows of 4096 x 14336.
//   - With 256 rows the next k-tile dequantized while one is multiplied, with two sets of A: 59.6 in place of 58.9.
#pragma once

#include "gemm/dgrad_sm90a/columns.cuh"
#include "gemm/dgrad_sm90a/one_team.cuh"
#include "gemm/tile_sm90a/epilogue.cuh"
#include "gemm/tile_sm90a/ranges.cuh"
#include "gemm/tile_sm90a/rounds.cuh"

// `config` divides the product as that of gemm_4bit_tile_sm90a is divided, with K in the place of N and N in that of K.
template <typename T, int TOKENS>
__device__ inline void gemm_4bit_dgrad_sm90a(const TensorMap *dy_map, const TensorMap *codes_map, const Scales &scales,
                                             const Codebook &codebook, T *dx, int m, int n, int k, int block_shift,
                                             const LaunchConfig &config, const Workspace &workspace) {
    using S = ColumnsShape<TOKENS>;
    DYNAMIC_SHARED_1024(shared);
    const int warp = __shfl_sync(ALL_LANES, int(threadIdx.x) / WARP, 0);
    if (threadIdx.x == 0) {
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
        const int lane = read_lane(), member = int(threadIdx.x) - (S::THREADS - SCALE_PRODUCERS);
        const ProductWalk<TOKENS> walk(config, k, n);
        if (member < 0) {
            if (lane == 0) {
                if (warp == S::CONSUMER_WARPS) {
                    produce_codes<S>(shared, codes_map, walk);
                } else {
                    produce_x<S>(shared, dy_map, walk);
                }
            }
            __syncwarp();
        } else {
            produce_column_scales<S>(shared, scales, n, k, block_shift, walk, member, lane);
        }
        pass_by_reduction();
        return;
    }

    take_registers<S::REGISTERS>();
    const int lane = read_lane(), team = warp / TEAM_WARPS;
    float sums[S::ACCUMULATORS];
    fill_table<S>(shared, codebook, warp, lane);
    const int stages = ProductWalk<TOKENS>(config, k, n).stages();
    if constexpr (S::TEAMS == 2) {
        u32 rounds = 0;
        multiply_in_rounds<T, ColumnsOperand<S>, S>(sums, shared, lane, team, u32(warp % TEAM_WARPS), stages, rounds);
    } else {
        ConsumerState<S> state;
        multiply_k_tiles<T, ColumnsOperand<S>>(sums, shared, state, lane, u32(warp), stages);
    }
    let_next_start();
    if constexpr (S::TEAMS == 2) {
        exchange_sums<S>(sums, shared, team);
        if (team == 1) {
            pass_by_reduction();
            return;
        }
    }
    wait_for_previous();
    const ProductWalk<TOKENS> walk(config, k, n);
    if (finishes_elsewhere(walk)) {
        leave_sums<S>(sums, shared, workspace, walk.range());
        return;
    }
    collect_sums<S>(sums, shared, workspace, walk);
    // A gradient has no bias.
    write_tile<T, S>(sums, shared, static_cast<const T *>(nullptr), dx, m, k, walk.tile(), walk.split(), config);
}
