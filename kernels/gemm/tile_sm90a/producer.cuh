// The producer warps of gemm_4bit_tile_sm90a: one thread has the copy engine (TMA) bring codes and x, two warps bring scales.
#pragma once

#include "gemm/tile_sm90a/shape.cuh"

// By one thread: stages of codes [ROWS][CODES_ROW_BYTES] and of x [TOKENS][K_TILE], in the order in which they are needed.
template <int TOKENS>
__device__ inline void produce_codes_and_x(u8 *shared, const TensorMap *x_map,
                                           const TensorMap *codes_map, const Tile &tile) {
    using S = Shape<TOKENS>;
    const Pipelines<TOKENS> pipelines(shared);
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

// By SCALE_PRODUCERS threads: stages of scales as float32, [SCALES_K_TILES][ROWS][2]. `member` is this thread among them.
template <int TOKENS>
__device__ inline void produce_scales(u8 *shared, const Scales &scales, int n, int k,
                                      int block_shift, const Tile &tile, int member, int lane) {
    using S = Shape<TOKENS>;
    const Pipelines<TOKENS> pipelines(shared);
    wait_for_previous();
    float *const map = reinterpret_cast<float *>(shared + S::MAP_AT);
    const bool nested = scales.absmax == nullptr;
    float offset = 0.0f;
    if (nested) {
        for (int code = member; code < 256; code += SCALE_PRODUCERS) {
            map[code] = DYNAMIC_MAP[code];
        }
        offset = *scales.offset;
        meet<2, SCALE_PRODUCERS>();
    }
    // Values before row i of the tile. Rows that are not there get what the last one has: what comes of them is not written.
    const auto values_before = [&](int i) { return i64(tile.row + i < n ? tile.row + i : n - 1) * k; };
    const auto place_of = [&](u32 stage) {
        return reinterpret_cast<Floats2 *>(shared + S::SCALES_AT + stage * S::SCALES_BYTES);
    };
    // Blocks of 64 that lie by fours: one load of a row for a stage.
    const void *const read = nested ? static_cast<const void *>(scales.codes) : scales.absmax;
    const bool fours = block_shift == 6 && k % SCALES_K == 0 && is_aligned(read, 16);
    PipelineState<S::SCALES_STAGES> state;
    if (fours) {
        const i64 first[2] = {values_before(member), values_before(member + SCALE_PRODUCERS)};
        Floats4 values[2];
        u32 codes[2];
        float second[2];
        const auto load = [&](int stage) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const i64 block = (first[i] + i64(tile.begin + stage) * SCALES_K) >> 6;
                if (nested) {
                    codes[i] = *reinterpret_cast<const u32 *>(scales.codes + block);
                    second[i] = scales.absmax2[block >> NESTED_SHIFT];
                } else {
                    values[i] = *reinterpret_cast<const Floats4 *>(scales.absmax + block);
                }
            }
        };
        load(0);
        for (int stage = 0; stage < tile.stages; stage++) {
            Floats4 now[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                now[i] = values[i];
                if (nested) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        now[i].value[j] = RawScale<true>{codes[i] >> 8 * j & 255, second[i]}.value(map, offset);
                    }
                }
            }
            load(stage + 1 < tile.stages ? stage + 1 : stage);
            barrier_wait(&pipelines.scales_empty[state.stage], state.phase ^ 1);
            Floats2 *const to = place_of(state.stage) + member;
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < SCALES_K_TILES; j++) {
                    to[j * ROWS + SCALE_PRODUCERS * i] = {now[i].value[j], now[i].value[j]};
                }
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&pipelines.scales_full[state.stage]);
            }
            state.advance();
        }
    } else {
        for (int stage = 0; stage < tile.stages; stage++) {
            barrier_wait(&pipelines.scales_empty[state.stage], state.phase ^ 1);
            const int left = k - SCALE_SPAN - (tile.begin + stage) * SCALES_K;
#pragma unroll 1
            for (int i = member; i < ROWS; i += SCALE_PRODUCERS) {
                const i64 first = values_before(i) + i64(tile.begin + stage) * SCALES_K;
                float found[SCALES_PER_ROW];
#pragma unroll
                for (int j = 0; j < SCALES_PER_ROW; j++) {
                    // Behind the last column that of the last: there x is zero.
                    const i64 block = (first + (j * SCALE_SPAN < left ? j * SCALE_SPAN : left)) >> block_shift;
                    found[j] = nested ? ScaleReader<true>(scales, block)[0].value(map, offset) : scales.absmax[block];
                }
                Floats2 *const to = place_of(state.stage) + i;
#pragma unroll
                for (int j = 0; j < SCALES_K_TILES; j++) {
                    to[j * ROWS] = {found[2 * j], found[2 * j + 1]};
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
