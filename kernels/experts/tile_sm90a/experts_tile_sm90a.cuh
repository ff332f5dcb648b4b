// experts_tile_sm90a: TODO
#pragma once

#include "experts/tile_sm90a/epilogue.cuh"
#include "experts/tile_sm90a/producer.cuh"
#include "gemm/tile_sm90a/consumer.cuh"

// The accumulators of the first tokens.
template <int TOKENS, int ALL>
__device__ inline float (&first_of(float (&sums)[ALL]))[TOKENS / 2] {
    return reinterpret_cast<float (&)[TOKENS / 2]>(sums);
}

template <typename T, int TOKENS>
__device__ inline void experts_tile_sm90a(const TensorMap *x_map, const ExpertsProduct &product, const Codebook &codebook,
                                          const T *bias, T *y) {
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
        const TileWalk<TOKENS> walk(product, lane);
        const int role = warp - S::CONSUMER_WARPS, member = thread - (S::THREADS - SCALE_PRODUCERS);
        if (role == 0) {
            if (lane == 0) {
                produce_codes<S>(shared, product, walk);
            }
            __syncwarp();
        } else if (role == 1) {
            if (lane == 0) {
                produce_x<S>(shared, x_map, product, walk);
            }
            __syncwarp();
        } else {
            produce_scales<S>(shared, product, walk, member, lane);
        }
        return;
    }

    take_registers<S::REGISTERS>();
    const int team = warp / TEAM_WARPS, team_warp = warp % TEAM_WARPS;
    const u32 my_row = u32(team) * (2 * QUARTER_ROWS) + u32(team_warp) * 8 + u32(lane) / 4;
    const int stages = (product.k + SCALES_K - 1) / SCALES_K;
    fill_table<S>(shared, codebook, warp, lane);
    wait_for_previous();
    ConsumerState<S> state(0);
    for (TileWalk<TOKENS> walk(product, lane); walk.left > 0; walk.advance()) {
        // Asked for early.
        const int row = walk.begin + walk.token + thread % TOKENS;
        const int y_row = product.order == nullptr || walk.token + thread % TOKENS >= walk.tokens ? row : product.order[row];
        float sums[S::ACCUMULATORS];
        // As many columns of products as there are tokens for.
        switch (walk.width() / STEP_TOKENS) {
            case 1:
                multiply_k_tiles<T, S, 32>(first_of<32>(sums), shared, state, lane, 0, my_row, stages);
                break;
            case 2:
                multiply_k_tiles<T, S, 64>(first_of<64>(sums), shared, state, lane, 0, my_row, stages);
                break;
            case 3:
                multiply_k_tiles<T, S, 96>(first_of<96>(sums), shared, state, lane, 0, my_row, stages);
                break;
            default:
                multiply_k_tiles<T, S, 128>(sums, shared, state, lane, 0, my_row, stages);
        }
        if (walk.left == 1) {
            let_next_start();
        }
        int *const rows = reinterpret_cast<int *>(shared + S::ROWS_AT) + team * TOKENS;
        write_tile<T, S>(sums, shared + S::OUT_AT + team * S::OUT_BYTES, bias, y, product, walk, rows, y_row, team, team_warp,
                         lane, thread % TEAM);
    }
}
