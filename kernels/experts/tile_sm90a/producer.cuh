// The producer warps of experts_tile_sm90a: two threads have the copy engine (TMA) bring codes and x, two warps bring scales.
#pragma once

#include "experts/tile_sm90a/shape.cuh"
#include "gemm/tile_sm90a/producer.cuh"

// The maps of an expert's weights.
struct ExpertMaps {
    const TensorMap *codes[2], *scales[2];
    bool copies_scales;

    __device__ ExpertMaps(const ExpertsProduct &product, int expert) : copies_scales(product.copies_scales_of(expert)) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            codes[i] = product.maps + 2 * product.entry(i, expert);
            scales[i] = codes[i] + 1;
        }
    }
    // Prefetches the maps: the first copy by a map otherwise waits for it.
    __device__ void fetch() const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fetch_map(codes[i]);
            if (copies_scales) {
                fetch_map(scales[i]);
            }
        }
    }
};

// By one thread: stages of codes [QUARTERS][QUARTER_ROWS][BOX_BYTES], and of scales that can be copied.
template <typename S, typename Walk>
__device__ inline void produce_codes(u8 *shared, const ExpertsProduct &product, Walk walk) {
    const Pipelines<S> pipelines(shared);
    PipelineState<S::CODES_STAGES> state;
    for (; walk.left > 0; walk.advance()) {
        const int first = walk.first_stage(), end = first + walk.stages();
        const int row = walk.row_tile * product.rows_of_tile();
        const ExpertMaps maps(product, walk.expert);
        for (int stage = first; stage < end; stage++) {
            Barrier *const full = &pipelines.codes_full[state.stage];
            barrier_wait(&pipelines.codes_empty[state.stage], state.phase ^ 1);
            barrier_arrive_expecting(full, S::CODES_BYTES + (maps.copies_scales ? S::SCALES_BYTES : 0));
#pragma unroll
            for (int q = 0; q < QUARTERS; q++) {
                const int at = row + product.rows_before(q);
                copy_box(shared + S::CODES_AT + state.stage * S::CODES_BYTES + q * S::QUARTER_BYTES, maps.codes[q % 2],
                         stage * BOX_BYTES, at, full);
                if (maps.copies_scales) {
                    copy_box(shared + S::SCALES_AT + state.stage * S::SCALES_BYTES + q * (S::SCALES_BYTES / QUARTERS),
                             maps.scales[q % 2], stage * SCALES_K_TILES, at, full);
                }
            }
            state.advance();
            if (stage == first && !walk.is_last()) {
                Walk next = walk;
                next.advance();
                ExpertMaps(product, next.expert).fetch();
            }
        }
    }
}

// By one thread: stages of x [width][K_TILE]. Behind the expert's tokens are the next one's; what comes of them is not written.
template <typename S, typename Walk>
__device__ inline void produce_x(u8 *shared, const TensorMap *x_map, Walk walk) {
    const Pipelines<S> pipelines(shared);
    PipelineState<S::X_STAGES> state;
    for (; walk.left > 0; walk.advance()) {
        const int width = walk.width(), first = walk.first_stage() * SCALES_K_TILES, end = first + walk.stages() * SCALES_K_TILES;
        for (int k_tile = first; k_tile < end; k_tile++) {
            Barrier *const full = &pipelines.x_full[state.stage];
            barrier_wait(&pipelines.x_empty[state.stage], state.phase ^ 1);
            u8 *const to = shared + S::X_AT + state.stage * S::X_BYTES;
            barrier_arrive_expecting(full, u32(width) * K_TILE_BYTES);
            for (int at = 0; at < width; at += S::STEP) {
                copy_box(to + at * K_TILE_BYTES, x_map, k_tile * K_TILE, walk.begin + walk.token + at, full);
            }
            state.advance();
        }
    }
}

// The scales of an expert's weight.
struct WeightScales {
    const void *first;     // float32, or codes of nested ones
    const float *absmax2;  // of nested ones
    float offset;
};

// By one thread: the four scales of a row of a stage, one for each k-tile. `first`: which value of the weight the stage begins with,
// and `left`: how many values the row has from there on; behind the last column scales are zero, whatever the last one is. Blocks
// have 64 values or more. `together`: how many scales a load brings, 4, 2 or 1. Four nested scales are given as they are in memory,
// codes and second scale, for `values_of` to compute later: so nothing waits here for the loads.
__device__ inline Floats4 load_scales(const WeightScales &of, const float *map, i64 first, int left, int block_shift, bool nested,
                                      int together) {
    const float *const absmax = static_cast<const float *>(of.first);
    const u8 *const codes = static_cast<const u8 *>(of.first);
    if (together == 4) {
        const i64 block = first >> 6;
        if (!nested) {
            return *reinterpret_cast<const Floats4 *>(absmax + block);
        }
        return {__uint_as_float(*reinterpret_cast<const u32 *>(codes + block)), of.absmax2[block >> NESTED_SHIFT]};
    }
    Floats4 made = {};
#pragma unroll
    for (int j = 0; j < SCALES_K_TILES; j += 2) {
        if (j * K_TILE >= left) {
            break;
        }
        const i64 block = (first + j * K_TILE) >> block_shift, next = (first + (j + 1) * K_TILE) >> block_shift;
        const bool there = (j + 1) * K_TILE < left;
        if (nested) {
            u32 two;
            if (together == 2) {
                two = *reinterpret_cast<const u16 *>(codes + block);
            } else {
                two = codes[block] | u32(there ? codes[next] : 0) << 8;
            }
            made.value[j] = RawScale<true>{two & 255, of.absmax2[block >> NESTED_SHIFT]}.value(map, of.offset);
            if (there) {
                made.value[j + 1] = RawScale<true>{two >> 8, of.absmax2[next >> NESTED_SHIFT]}.value(map, of.offset);
            }
        } else if (together == 2) {
            const Floats2 two = *reinterpret_cast<const Floats2 *>(absmax + block);
            made.value[j] = two.value[0];
            made.value[j + 1] = two.value[1];
        } else {
            made.value[j] = absmax[block];
            made.value[j + 1] = there ? absmax[next] : 0.0f;
        }
    }
    return made;
}
// The scales themselves.
__device__ inline Floats4 values_of(const Floats4 &loaded, const WeightScales &of, const float *map, bool nested, int together) {
    if (!nested || together < 4) {
        return loaded;
    }
    const u32 codes = __float_as_uint(loaded.value[0]);
    Floats4 made;
#pragma unroll
    for (int j = 0; j < SCALES_K_TILES; j++) {
        made.value[j] = RawScale<true>{codes >> 8 * j & 255, loaded.value[1]}.value(map, of.offset);
    }
    return made;
}

// By SCALE_PRODUCERS threads: the scales that are not copied, of all tiles, in stages [TILE_ROWS][SCALES_K_TILES]. `member` is this
// thread among them, which brings those of a row of each quarter.
template <typename S, typename Walk>
__device__ inline void produce_scales(u8 *shared, const ExpertsProduct &product, Walk walk, int member, int lane) {
    static_assert(QUARTER_ROWS == SCALE_PRODUCERS, "a thread brings the scales of a row of each quarter");
    const Pipelines<S> pipelines(shared);
    const bool nested = product.nested != 0;
    const float *map = nullptr;
    if (nested) {
        map = fill_map<S>(shared, member);
    }
    PipelineState<S::CODES_STAGES> state;
    for (; walk.left > 0; walk.advance()) {
        const int begin = walk.first_stage(), end = begin + walk.stages();
        const bool copied = product.copies_scales_of(walk.expert);
        // Of quarters 2i and 2i + 1.
        WeightScales weights[2];
        const int aligned = product.k % SCALES_K == 0 ? 4 : product.k % (SCALES_K / 2) == 0 ? 2 : 1;
        int together = product.block_shift == 6 ? aligned : 1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u64 *const entry = product.table + 4 * product.entry(i, walk.expert);
            weights[i] = {reinterpret_cast<const void *>(entry[1]), reinterpret_cast<const float *>(entry[2]),
                          nested ? *reinterpret_cast<const float *>(entry[3]) : 0.0f};
            if (!is_aligned(weights[i].first, (nested ? 1 : 4) * together)) {
                together = 1;
            }
        }
        Floats4 values[QUARTERS];
        const auto load = [&](int stage) {
#pragma unroll
            for (int q = 0; q < QUARTERS; q++) {
                // Rows that are not there get what the last one has: what comes of them is not written.
                const int row = walk.row_tile * product.rows_of_tile() + product.rows_before(q) + member;
                const i64 first = i64(row < product.n ? row : product.n - 1) * product.k + stage * SCALES_K;
                const int left = product.k - stage * SCALES_K;
                values[q] = load_scales(weights[q % 2], map, first, left, product.block_shift, nested, together);
            }
        };
        if (!copied) {
            load(begin);
        }
        for (int stage = begin; stage < end; stage++) {
            barrier_wait(&pipelines.codes_empty[state.stage], state.phase ^ 1);
            if (!copied) {
                Floats4 *const to = reinterpret_cast<Floats4 *>(shared + S::SCALES_AT + state.stage * S::SCALES_BYTES) + member;
#pragma unroll
                for (int q = 0; q < QUARTERS; q++) {
                    to[q * QUARTER_ROWS] = values_of(values[q], weights[q % 2], map, nested, together);
                }
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&pipelines.codes_full[state.stage]);
            }
            state.advance();
            if (!copied && stage + 1 < end) {
                // The consumers are some k-tiles behind.
                load(stage + 1);
            }
        }
    }
}
