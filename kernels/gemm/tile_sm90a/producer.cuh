// The producer warps of gemm_4bit_tile_sm90a: one thread has the copy engine (TMA) bring codes and x, two warps bring scales.
#pragma once

#include "gemm/tile_sm90a/shape.cuh"

// By one thread: stages of codes [ROWS][CODES_ROW_BYTES] and of x [TOKENS][K_TILE], in the order in which they are needed.
template <int TOKENS>
__device__ inline void produce_codes_and_x(u8 *shared, const TensorMap *x_map,
                                           const TensorMap *codes_map, const Tile &tile) {
    using S = Shape<TOKENS>;
    const Pipelines<S> pipelines(shared);
    const int stages = tile.stages * (SCALES_K / CODES_K), first = tile.begin * (SCALES_K / 2);
    // A prefetch reads nothing, so that it does not matter who still writes the weight.
    for (int stage = 0; stage < stages && stage < S::CODES_STAGES; stage++) {
        fetch_box(codes_map, first + stage * CODES_ROW_BYTES, tile.row);
    }
    wait_for_previous();
    PipelineState<S::CODES_STAGES> codes;
    PipelineState<S::X_STAGES> x;
    const auto bring_codes = [&](int stage) {
        Barrier *const full = &pipelines.codes_full[codes.stage];
        barrier_wait(&pipelines.codes_empty[codes.stage], codes.phase ^ 1);
        barrier_arrive_expecting(full, S::CODES_BYTES);
        copy_box(shared + S::CODES_AT + codes.stage * S::CODES_BYTES, codes_map, first + stage * CODES_ROW_BYTES, tile.row,
                 full);
        codes.advance();
    };
    // So far codes are ahead of x that both wait for the end of the same k-tile.
    constexpr int AHEAD = S::CODES_STAGES - S::X_STAGES / 2;
    for (int stage = 0; stage < stages && stage < AHEAD; stage++) {
        bring_codes(stage);
    }
    for (int stage = 0; stage < stages; stage++) {
        if (stage + AHEAD < stages) {
            bring_codes(stage + AHEAD);
        }
        for (int k_tile = 2 * stage; k_tile < 2 * stage + 2; k_tile++) {
            Barrier *const full = &pipelines.x_full[x.stage];
            barrier_wait(&pipelines.x_empty[x.stage], x.phase ^ 1);
            barrier_arrive_expecting(full, S::X_BYTES);
            copy_box(shared + S::X_AT + x.stage * S::X_BYTES, x_map, tile.begin * SCALES_K + k_tile * K_TILE, tile.token, full);
            x.advance();
        }
    }
}

// The map of nested scales to shared memory, by SCALE_PRODUCERS threads.
template <typename S>
__device__ inline float *fill_map(u8 *shared, int member) {
    float *const map = reinterpret_cast<float *>(shared + S::MAP_AT);
    for (int code = member; code < 256; code += SCALE_PRODUCERS) {
        map[code] = DYNAMIC_MAP[code];
    }
    meet<S::SCALES_MEETING, SCALE_PRODUCERS>();
    return map;
}

// Whether blocks of scales lie by fours: one load of a row for a stage.
__device__ inline bool lie_by_fours(const Scales &scales, int k, int block_shift) {
    const void *const read = scales.absmax == nullptr ? static_cast<const void *>(scales.codes) : scales.absmax;
    return block_shift == 6 && k % SCALES_K == 0 && is_aligned(read, 16);
}

// Stages of scales as float32, [SCALES_K_TILES][TILE_ROWS][2], by SCALE_PRODUCERS threads of which this is `member`: it brings
// rows member + i * SCALE_PRODUCERS. Of row i `rows.scales(i)`, `rows.offset(i)` and `rows.first(i)`, the values of W before
// it; `rows.nested` and `rows.fours` hold for all. Scales are those of columns from stage `begin` on.
template <typename S, typename Rows>
__device__ inline void produce_scales(u8 *shared, PipelineState<S::SCALES_STAGES> &state, const Rows &rows, const float *map,
                                      int begin, int stages, int k, int block_shift, int member, int lane) {
    constexpr int MINE = S::TILE_ROWS / SCALE_PRODUCERS;
    const Pipelines<S> pipelines(shared);
    const bool nested = rows.nested;
    const auto place_of = [&](u32 stage) {
        return reinterpret_cast<Floats2 *>(shared + S::SCALES_AT + stage * S::SCALES_BYTES);
    };
    if (rows.fours) {
        // Of nested scales four codes in a word, and their common second scale.
        Floats4 values[MINE];
        const auto load = [&](int stage) {
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const Scales scales = rows.scales(i);
                const i64 block = (rows.first(i) + i64(begin + stage) * SCALES_K) >> 6;
                if (nested) {
                    values[i].value[0] = __uint_as_float(*reinterpret_cast<const u32 *>(scales.codes + block));
                    values[i].value[1] = scales.absmax2[block >> NESTED_SHIFT];
                } else {
                    values[i] = *reinterpret_cast<const Floats4 *>(scales.absmax + block);
                }
            }
        };
        load(0);
        for (int stage = 0; stage < stages; stage++) {
            barrier_wait(&pipelines.scales_empty[state.stage], state.phase ^ 1);
            Floats2 *const to = place_of(state.stage) + member;
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const u32 codes = __float_as_uint(values[i].value[0]);
                const float second = values[i].value[1];
#pragma unroll
                for (int j = 0; j < SCALES_K_TILES; j++) {
                    const float scale = nested ? RawScale<true>{codes >> 8 * j & 255, second}.value(map, rows.offset(i))
                                               : values[i].value[j];
                    to[j * S::TILE_ROWS + SCALE_PRODUCERS * i] = {scale, scale};
                }
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&pipelines.scales_full[state.stage]);
            }
            state.advance();
            // The consumers are two stages behind.
            load(stage + 1 < stages ? stage + 1 : stage);
        }
    } else {
        for (int stage = 0; stage < stages; stage++) {
            barrier_wait(&pipelines.scales_empty[state.stage], state.phase ^ 1);
            const int left = k - SCALE_SPAN - (begin + stage) * SCALES_K;
#pragma unroll 1
            for (int i = 0; i < MINE; i++) {
                const Scales scales = rows.scales(i);
                const i64 first = rows.first(i) + i64(begin + stage) * SCALES_K;
                // Behind the last column that of the last: there x is zero.
                const auto find = [&](int j) {
                    const i64 block = (first + (j * SCALE_SPAN < left ? j * SCALE_SPAN : left)) >> block_shift;
                    return nested ? ScaleReader<true>(scales, block)[0].value(map, rows.offset(i)) : scales.absmax[block];
                };
                Floats2 found[SCALES_K_TILES];
#pragma unroll
                for (int j = 0; j < SCALES_K_TILES; j++) {
                    found[j] = {find(2 * j), find(2 * j + 1)};
                }
                Floats2 *const to = place_of(state.stage) + member + SCALE_PRODUCERS * i;
#pragma unroll
                for (int j = 0; j < SCALES_K_TILES; j++) {
                    to[j * S::TILE_ROWS] = found[j];
                }
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&pipelines.scales_full[state.stage]);
            }
            state.advance();
        }
    }
}

// The rows of a tile of one weight [n][k].
struct WeightRows {
    const Scales &weight;
    int row, n, k;  // of the thread's first row
    bool nested, fours;
    float shift;

    __device__ Scales scales(int) const { return weight; }
    __device__ float offset(int) const { return shift; }
    // Rows that are not there get what the last one has: what comes of them is not written.
    __device__ i64 first(int i) const {
        const int at = row + i * SCALE_PRODUCERS;
        return i64(at < n ? at : n - 1) * k;
    }
};

// By SCALE_PRODUCERS threads: the scales of a tile. `member` is this thread among them.
template <typename S>
__device__ inline void produce_scales(u8 *shared, const Scales &scales, int n, int k, int block_shift, const Tile &tile,
                                      int member, int lane) {
    wait_for_previous();
    WeightRows rows{scales, tile.row + member, n, k, scales.absmax == nullptr, lie_by_fours(scales, k, block_shift), 0.0f};
    const float *map = nullptr;
    if (rows.nested) {
        map = fill_map<S>(shared, member);
        rows.shift = *scales.offset;
    }
    PipelineState<S::SCALES_STAGES> state;
    produce_scales<S>(shared, state, rows, map, tile.begin, tile.stages, k, block_shift, member, lane);
}
