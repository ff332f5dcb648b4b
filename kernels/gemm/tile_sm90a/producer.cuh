// The producer warps of gemm_4bit_tile_sm90a: one thread has the copy engine (TMA) bring codes, another x; two warps
// bring scales. Codes and x are for gemm_4bit_dgrad_sm90a as well.
#pragma once

#include "gemm/tile_sm90a/walk.cuh"

// By one thread: stages of codes [ROWS][CODES_ROW_BYTES] of the tiles of a walk, one behind the other along K. Where K are
// columns of W, these are the tile's rows; where it is rows of W, the tile's columns.
template <typename S>
__device__ inline void produce_codes(u8 *shared, const TensorMap *map, ProductWalk<S::TOKENS> walk) {
    const Pipelines<S> pipelines(shared);
    static_assert(CODES_K == ROWS, "rows of a stage, whether they are of the tile or along K");
    // A prefetch reads nothing, so that it does not matter who still writes the weight.
    const Tile first = walk.tile();
    for (int i = 0; i < S::CODES_STAGES && i < first.stages * (SCALES_K / CODES_K); i++) {
        const int at = first.begin * SCALES_K + i * CODES_K;
        if constexpr (S::COLUMNS) {
            fetch_box(map, first.row / 2, at);
        } else {
            fetch_box(map, at / 2, first.row);
        }
    }
    wait_for_previous();
    PipelineState<S::CODES_STAGES> state;
    for (; walk.there(); walk.advance()) {
        const Tile tile = walk.tile();
        const int end = (tile.begin + tile.stages) * SCALES_K;
        for (int at = tile.begin * SCALES_K; at < end; at += CODES_K) {
            Barrier *const full = &pipelines.codes_full[state.stage];
            barrier_wait(&pipelines.codes_empty[state.stage], state.phase ^ 1);
            barrier_arrive_expecting(full, S::CODES_BYTES);
            u8 *const to = shared + S::CODES_AT + state.stage * S::CODES_BYTES;
            if constexpr (S::COLUMNS) {
                copy_box(to, map, tile.row / 2, at, full);
            } else {
                copy_box(to, map, at / 2, tile.row, full);
            }
            state.advance();
        }
    }
}

// By one thread: stages of x [TOKENS][K_TILE].
template <typename S>
__device__ inline void produce_x(u8 *shared, const TensorMap *map, ProductWalk<S::TOKENS> walk) {
    const Pipelines<S> pipelines(shared);
    wait_for_previous();
    PipelineState<S::X_STAGES> state;
    u32 parity = 1;  // of the epilogue that is over when the next tile begins: there is none before the first
    for (; walk.there(); walk.advance()) {
        const Tile tile = walk.tile();
        const int end = (tile.begin + tile.stages) * SCALES_K;
        if constexpr (S::SEVERAL_TILES) {
            barrier_wait(pipelines.epilogue, parity);
            parity ^= 1;
        }
        for (int column = tile.begin * SCALES_K; column < end; column += K_TILE) {
            Barrier *const full = &pipelines.x_full[state.stage];
            barrier_wait(&pipelines.x_empty[state.stage], state.phase ^ 1);
            barrier_arrive_expecting(full, S::X_BYTES);
            copy_box(shared + S::X_AT + state.stage * S::X_BYTES, map, column, tile.token, full);
            state.advance();
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

// Whether each stage of each row has whole blocks of scales, or is within a block, and few loads bring them.
__device__ inline bool are_in_stages(const Scales &scales, int k) {
    const void *const read = scales.absmax == nullptr ? static_cast<const void *>(scales.codes) : scales.absmax;
    return k % SCALES_K == 0 && is_aligned(read, 16);
}

// Scales of a row that are loaded at a time, or of nested ones their codes and their common second scale: of a stage, or in blocks
// of 32 of half a stage. SHIFT: log2 of the block size, 7 for all from 128 on.
template <int SHIFT>
struct LoadedScales {
    static constexpr int K_TILES = SHIFT == 5 ? SCALES_K_TILES / 2 : SCALES_K_TILES;
    Floats4 scales;

    // Those of the values from `first` on, at a multiple of K_TILES * K_TILE.
    __device__ void load(const Scales &from, i64 first, int block_shift, bool nested) {
        const i64 block = first >> (SHIFT < 7 ? SHIFT : block_shift);
        const i64 second = (first + SCALES_K / 2) >> block_shift;
        if (nested) {
            if constexpr (SHIFT < 7) {
                scales.value[0] = __uint_as_float(*reinterpret_cast<const u32 *>(from.codes + block));
            } else {
                scales.value[0] = __uint_as_float(from.codes[block]);
                scales.value[2] = __uint_as_float(from.codes[second]);
            }
            scales.value[1] = from.absmax2[block >> NESTED_SHIFT];
        } else if constexpr (SHIFT < 7) {
            scales = *reinterpret_cast<const Floats4 *>(from.absmax + block);
        } else {
            scales.value[0] = from.absmax[block];
            scales.value[2] = from.absmax[second];
        }
    }
    // Of columns 32 * half and more of k-tile j.
    __device__ float get(int j, int half, bool nested, const float *map, float offset) const {
        const int at = SHIFT == 5 ? 2 * j + half : SHIFT == 6 ? j : j / 2 * 2;
        if (nested) {
            const u32 codes = __float_as_uint(scales.value[SHIFT < 7 ? 0 : at]);
            return RawScale<true>{SHIFT < 7 ? codes >> 8 * at & 255 : codes, scales.value[1]}.value(map, offset);
        }
        return scales.value[at];
    }
};

// Where scales go as float32: a stage is [SCALES_K_TILES][TILE_ROWS][2], of columns 0 to 31 of a k-tile and of the others.
template <typename S>
struct ScalesSink {
    static constexpr int K_TILES = SCALES_K_TILES;  // of a stage

    __device__ static void put(u8 *stage, int k_tile, int row, float first, float second) {
        reinterpret_cast<Floats2 *>(stage)[k_tile * S::TILE_ROWS + row] = {first, second};
    }
};

// The stages of scales that one who brings them fills.
template <typename S, typename Sink>
struct ScaleStages {
    u8 *const shared;
    PipelineState<S::SCALES_STAGES> &state;
    const int lane;

    // Around what is put for k-tile j.
    __device__ u8 *enter(int j) const {
        if (j % Sink::K_TILES == 0) {
            barrier_wait(&Pipelines<S>(shared).scales_empty[state.stage], state.phase ^ 1);
        }
        return shared + S::SCALES_AT + state.stage * S::SCALES_BYTES;
    }
    __device__ void leave(int j) const {
        if (j % Sink::K_TILES == Sink::K_TILES - 1) {
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&Pipelines<S>(shared).scales_full[state.stage]);
            }
            state.advance();
        }
    }
};

// As `produce_scales`, where they are in stages.
template <typename Loaded, typename S, typename Rows, typename Sink>
__device__ inline void produce_in_stages(const ScaleStages<S, Sink> &to, const Rows &rows, const Sink &sink, const float *map,
                                         int begin, int stages, int block_shift, int member) {
    constexpr int MINE = S::TILE_ROWS / SCALE_PRODUCERS, K_TILES = Loaded::K_TILES;
    Loaded values[MINE];
    i64 first[MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        first[i] = rows.first(i) + i64(begin) * SCALES_K;
    }
    const auto load = [&](int which) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            values[i].load(rows.scales(i), first[i] + which * (K_TILES * K_TILE), block_shift, rows.nested);
        }
    };
    const int count = stages * (SCALES_K_TILES / K_TILES);
    load(0);
#pragma unroll 1
    for (int which = 0; which < count; which++) {
#pragma unroll
        for (int j = 0; j < K_TILES; j++) {
            const int k_tile = K_TILES < SCALES_K_TILES ? which % 2 * K_TILES + j : j;
            u8 *const stage = to.enter(k_tile);
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const float scale = values[i].get(j, 0, rows.nested, map, rows.offset(i));
                const float other = K_TILES < SCALES_K_TILES ? values[i].get(j, 1, rows.nested, map, rows.offset(i)) : scale;
                sink.put(stage, k_tile % Sink::K_TILES, member + SCALE_PRODUCERS * i, scale, other);
            }
            to.leave(k_tile);
        }
        // The consumers are some k-tiles behind.
        load(which + 1 < count ? which + 1 : which);
    }
}

// Stages of scales, by SCALE_PRODUCERS threads of which this is `member`: it brings rows member + i * SCALE_PRODUCERS, and
// `sink` puts them where the consumers want them. Of row i `rows.scales(i)`, `rows.offset(i)` and `rows.first(i)`, the values
// of W before it; `rows.nested` and `rows.in_stages` hold for all. Scales are those of columns from stage `begin` on.
template <typename S, typename Rows, typename Sink>
__device__ inline void produce_scales(u8 *shared, PipelineState<S::SCALES_STAGES> &state, const Rows &rows, const Sink &sink,
                                      const float *map, int begin, int stages, int k, int block_shift, int member, int lane) {
    constexpr int MINE = S::TILE_ROWS / SCALE_PRODUCERS;
    const ScaleStages<S, Sink> to{shared, state, lane};
    const bool nested = rows.nested;
    if (rows.in_stages && block_shift == 6) {
        produce_in_stages<LoadedScales<6>>(to, rows, sink, map, begin, stages, block_shift, member);
    } else if (rows.in_stages && block_shift == 5) {
        produce_in_stages<LoadedScales<5>>(to, rows, sink, map, begin, stages, block_shift, member);
    } else if (rows.in_stages) {
        produce_in_stages<LoadedScales<7>>(to, rows, sink, map, begin, stages, block_shift, member);
    } else {
        for (int stage = 0; stage < stages; stage++) {
            const int left = k - SCALE_SPAN - (begin + stage) * SCALES_K;
            // Those of a row at a time, so that all loads are on the way together, or those of a k-tile.
            constexpr int AT_ONCE = Sink::K_TILES;
#pragma unroll 1
            for (int j = 0; j < SCALES_K_TILES; j += AT_ONCE) {
                u8 *const stage_at = to.enter(j);
#pragma unroll 1
                for (int i = 0; i < MINE; i++) {
                    const Scales scales = rows.scales(i);
                    const i64 first = rows.first(i) + i64(begin + stage) * SCALES_K;
                    // Behind the last column nothing is added, whatever the last scale is.
                    const auto find = [&](int span) {
                        if (span * SCALE_SPAN > left) {
                            return 0.0f;
                        }
                        const i64 block = (first + span * SCALE_SPAN) >> block_shift;
                        return nested ? ScaleReader<true>(scales, block)[0].value(map, rows.offset(i)) : scales.absmax[block];
                    };
                    Floats2 found[AT_ONCE];
#pragma unroll
                    for (int more = 0; more < AT_ONCE; more++) {
                        found[more] = {find(2 * (j + more)), find(2 * (j + more) + 1)};
                    }
#pragma unroll
                    for (int more = 0; more < AT_ONCE; more++) {
                        sink.put(stage_at, more, member + SCALE_PRODUCERS * i, found[more].value[0], found[more].value[1]);
                    }
                }
                to.leave(j + AT_ONCE - 1);
            }
        }
    }
}

// The rows of a tile of one weight [n][k].
struct WeightRows {
    const Scales &weight;
    int row, n, k;  // of the thread's first row
    bool nested, in_stages;
    float shift;

    __device__ Scales scales(int) const { return weight; }
    __device__ float offset(int) const { return shift; }
    // Rows that are not there get what the last one has: what comes of them is not written.
    __device__ i64 first(int i) const {
        const int at = row + i * SCALE_PRODUCERS;
        return i64(at < n ? at : n - 1) * k;
    }
};

// By SCALE_PRODUCERS threads: the scales of the tiles. `member` is this thread among them.
template <typename S, typename Sink>
__device__ inline void produce_scales(u8 *shared, const Scales &scales, const Sink &sink, int n, int k, int block_shift,
                                      ProductWalk<S::TOKENS> walk, int member, int lane) {
    wait_for_previous();
    WeightRows rows{scales, 0, n, k, scales.absmax == nullptr, are_in_stages(scales, k), 0.0f};
    const float *map = nullptr;
    if (rows.nested) {
        map = fill_map<S>(shared, member);
        rows.shift = *scales.offset;
    }
    PipelineState<S::SCALES_STAGES> state;
    for (; walk.there(); walk.advance()) {
        const Tile tile = walk.tile();
        rows.row = tile.row + member;
        produce_scales<S>(shared, state, rows, sink, map, tile.begin, tile.stages, k, block_shift, member, lane);
    }
}
