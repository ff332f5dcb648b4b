// The producer warps of experts_tile_sm90a: two threads have the copy engine (TMA) bring codes and x, two warps bring scales.
#pragma once

#include "experts/tile_sm90a/shape.cuh"
#include "gemm/tile_sm90a/producer.cuh"

// The maps of a tile's weights.
template <typename Walk>
struct TileMaps {
    const TensorMap *map[2];

    __device__ TileMaps(const ExpertsProduct &product, const Walk &walk)
        : map{product.maps + (product.projection(0) * product.experts + walk.expert),
              product.maps + (product.projection(1) * product.experts + walk.expert)} {}
};

// By one thread: of x [width][K_TILE], the columns of a k-tile to a stage. Behind the expert's tokens are the next one's; what
// comes of them is not written.
template <typename S, typename Walk>
__device__ inline void copy_x(u8 *shared, u32 stage, const TensorMap *x_map, const Walk &walk, int width, int k_tile, Barrier *full) {
    u8 *const to = shared + S::X_AT + stage * S::X_BYTES;
    for (int at = 0; at < width; at += S::STEP) {
        copy_box(to + at * K_TILE_BYTES, x_map, k_tile * K_TILE, walk.begin + walk.token + at, full);
    }
}

// By one thread: stages of codes [QUARTERS][QUARTER_ROWS][CODES_ROW_BYTES], and where it comes with them of x.
template <typename S, typename Walk>
__device__ inline void produce_codes(u8 *shared, const TensorMap *x_map, const ExpertsProduct &product, Walk walk) {
    constexpr int K_TILES = CODES_K / K_TILE;
    const Pipelines<S> pipelines(shared);
    PipelineState<S::CODES_STAGES> state;
    const int stages = (product.k + SCALES_K - 1) / SCALES_K * (SCALES_K / CODES_K);
    for (; walk.left > 0; walk.advance()) {
        const int row = walk.row_tile * product.rows_of_tile(), width = walk.width();
        const TileMaps<Walk> maps(product, walk);
        for (int stage = 0; stage < stages; stage++) {
            Barrier *const full = &pipelines.codes_full[state.stage];
            u8 *const to = shared + S::CODES_AT + state.stage * S::CODES_BYTES;
            barrier_wait(&pipelines.codes_empty[state.stage], state.phase ^ 1);
            barrier_arrive_expecting(full, S::CODES_BYTES + (S::X_WITH_CODES ? K_TILES * u32(width) * K_TILE_BYTES : 0));
#pragma unroll
            for (int q = 0; q < QUARTERS; q++) {
                copy_box(to + q * S::QUARTER_BYTES, maps.map[q % 2], stage * CODES_ROW_BYTES, row + product.rows_before(q), full);
            }
            if constexpr (S::X_WITH_CODES) {
                for (int i = 0; i < K_TILES; i++) {
                    copy_x<S>(shared, state.stage * u32(K_TILES) + u32(i), x_map, walk, width, stage * K_TILES + i, full);
                }
            }
            state.advance();
            if (stage == 0 && walk.left > 1) {
                // Else the next tile's first copy waits for them.
                Walk next = walk;
                next.advance();
                const TileMaps<Walk> ahead(product, next);
                fetch_map(ahead.map[0]);
                fetch_map(ahead.map[1]);
            }
        }
    }
}

// By one thread: stages of x where it does not come with the codes.
template <typename S, typename Walk>
__device__ inline void produce_x(u8 *shared, const TensorMap *x_map, const ExpertsProduct &product, Walk walk) {
    const Pipelines<S> pipelines(shared);
    PipelineState<S::X_STAGES> state;
    const int k_tiles = (product.k + SCALES_K - 1) / SCALES_K * SCALES_K_TILES;
    for (; walk.left > 0; walk.advance()) {
        const int width = walk.width();
        for (int k_tile = 0; k_tile < k_tiles; k_tile++) {
            Barrier *const full = &pipelines.x_full[state.stage];
            barrier_wait(&pipelines.x_empty[state.stage], state.phase ^ 1);
            barrier_arrive_expecting(full, u32(width) * K_TILE_BYTES);
            copy_x<S>(shared, state.stage, x_map, walk, width, k_tile, full);
            state.advance();
        }
    }
}

// The rows of a tile, of one weight [n][k] or of two in turns, by quarters.
struct ExpertRows {
    const ExpertsProduct &product;
    int row;  // of the thread's rows the first
    const void *absmax[2];
    const float *absmax2[2];
    float shifts[2];
    bool nested, in_stages;

    __device__ Scales scales(int i) const {
        const void *const first = i % 2 == 0 ? absmax[0] : absmax[1];
        return {nested ? nullptr : static_cast<const float *>(first), static_cast<const u8 *>(first),
                i % 2 == 0 ? absmax2[0] : absmax2[1], nullptr};
    }
    __device__ float offset(int i) const { return i % 2 == 0 ? shifts[0] : shifts[1]; }
    // Rows that are not there get what the last one has: what comes of them is not written.
    __device__ i64 first(int i) const {
        const int at = row + product.rows_before(i);
        return i64(at < product.n ? at : product.n - 1) * product.k;
    }
};

// By SCALE_PRODUCERS threads: the scales of all tiles. `member` is this thread among them.
template <typename S, typename Walk>
__device__ inline void produce_scales(u8 *shared, const ExpertsProduct &product, Walk walk, int member, int lane) {
    static_assert(QUARTER_ROWS == SCALE_PRODUCERS, "a thread brings the scales of a row of each quarter");
    const bool nested = product.nested != 0;
    const float *map = nullptr;
    if (nested) {
        map = fill_map<S>(shared, member);
    }
    PipelineState<S::SCALES_STAGES> state;
    const int stages = (product.k + SCALES_K - 1) / SCALES_K;
    for (; walk.left > 0; walk.advance()) {
        ExpertRows rows{product, walk.row_tile * product.rows_of_tile() + member, {}, {}, {}, nested, true};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u64 *const entry = product.table + 4 * i64(product.projection(i) * product.experts + walk.expert);
            rows.absmax[i] = reinterpret_cast<const void *>(entry[1]);
            rows.absmax2[i] = reinterpret_cast<const float *>(entry[2]);
            rows.shifts[i] = nested ? *reinterpret_cast<const float *>(entry[3]) : 0.0f;
            rows.in_stages = rows.in_stages && are_in_stages(rows.scales(i), product.k);
        }
        produce_scales<S>(shared, state, rows, ScalesSink<S>{}, map, 0, stages, product.k, product.block_shift, member, lane);
    }
}
