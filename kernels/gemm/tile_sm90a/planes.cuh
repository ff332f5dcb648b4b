// The main loop of gemm_4bit_tile_sm90a for more than 128 tokens: one team dequantizes W by permutations of bytes, while the
// matrix units work on the k-tile before.
#pragma once

#include "gemm/tile_sm90a/shape.cuh"

// Where scales go as planes: a stage is of one k-tile, [2][2][ROWS][16 bytes], the low and the high bytes of its first half and
// of its second, where that is of other blocks.
template <typename T>
struct PlanesSink {
    static constexpr int K_TILES = 1;  // of a stage
    const Codebook &codebook;
    bool two_blocks;

    __device__ void put(u8 *stage, int, int row, float first, float second) const {
        put_half(stage, row, first);
        if (two_blocks) {
            put_half(stage + PLANES_BYTES, row, second);
        }
        // Keeps ptxas from making the planes of two rows at a time, for which there are not enough registers.
        __syncwarp();
    }
    __device__ void put_half(u8 *half, int row, float scale) const {
        const Planes planes = scaled_planes<T>(codebook, scale);
        Words4 *const to = reinterpret_cast<Words4 *>(half) + row;
        to[0] = {planes.low[0], planes.low[1], planes.low[2], planes.low[3]};
        to[ROWS] = {planes.high[0], planes.high[1], planes.high[2], planes.high[3]};
    }
};

// The products of `stages` stages of scales become `sums`, the accumulators: [64 rows][TOKENS] of a warpgroup, as wgmma has
// them. `my_row`: the lane's first row in the tile. `two_blocks`: whether a block of W may end in the middle of a k-tile.
template <typename T, typename S, int TOKENS>
__device__ inline void multiply_by_planes(float (&sums)[TOKENS / 2], u8 *shared, ConsumerState<S> &state, int lane, u32 my_row,
                                          int stages, bool two_blocks) {
    const Pipelines<S> pipelines(shared);
    static_assert(S::X_STAGES == SCALES_K_TILES && S::SCALES_STAGES == SCALES_K_TILES,
                  "k-tile i of a stage of scales is in stage i of x and of planes: only the phases change");
    // What the matrix units want of row g and of row g + 8 in lane 4g + t: of each word of codes byte t.
    const u32 g = u32(lane) / 4, t = u32(lane) % 4;
    const u8 *const my_codes = shared + S::CODES_AT + my_row * CODES_ROW_BYTES;
    const u8 *const my_planes = shared + S::SCALES_AT + my_row * 16;
    const u32 swizzle = g >> 1, selector = t | (4 + t) << 4;
    const u32 x_base = operand(shared + S::X_AT);
    constexpr int K_BLOCKS = K_TILE / 16;  // of a k-tile, one wgmma each
    // K-blocks that are multiplied, then dequantized, at a time. With two, ptxas 12.0 and 12.4 make products wait for each other.
    constexpr int TOGETHER = K_BLOCKS;
    // The k-tile that is multiplied, and the next, which is dequantized meanwhile.
    u32 a[2][K_BLOCKS][4];
    // Of row g and of row g + 8: the codes of a k-block, and the values of their block.
    Words2 words[2];
    Planes planes[2];

    // The codes of k-block q of k-tile i of a stage of codes.
    const auto load_codes = [&](int i, int q) {
        const u32 piece = u32(i % 2 * 2 + q / 2) ^ swizzle;
        const u8 *const codes = my_codes + state.codes.stage * S::CODES_BYTES + (piece * 16 + u32(q % 2 * 8));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            words[r] = *reinterpret_cast<const Words2 *>(codes + r * S::SECOND_ROW * CODES_ROW_BYTES);
        }
    };
    const auto load_planes = [&](int i, int half) {
        const u8 *const from = my_planes + (i * S::SCALES_BYTES + half * PLANES_BYTES);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const Words4 low = *reinterpret_cast<const Words4 *>(from + r * S::SECOND_ROW * 16);
            const Words4 high = *reinterpret_cast<const Words4 *>(from + r * S::SECOND_ROW * 16 + ROWS * 16);
#pragma unroll
            for (int w = 0; w < 4; w++) {
                planes[r].low[w] = low.word[w];
                planes[r].high[w] = high.word[w];
            }
        }
    };
    // What k-block 0 of k-tile i needs, once it is there.
    const auto load = [&](int i) {
        barrier_wait(&pipelines.scales_full[i], state.scales.phase);
        if (i % 2 == 0) {
            barrier_wait(&pipelines.codes_full[state.codes.stage], state.codes.phase);
        }
        load_planes(i, 0);
        load_codes(i, 0);
    };
    // K-block q of k-tile i, to the registers that wgmma reads; then loads what comes next, unless nothing does.
    const auto dequantize = [&](int i, int q, bool more) {
        if (q == 2 && two_blocks) {
            load_planes(i, 1);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 codes = permute_bytes(words[r].word[0], words[r].word[1], selector);
            look_up(planes[r], codes, a[i % 2][q][r], a[i % 2][q][2 + r]);
        }
        if (q < K_BLOCKS - 1) {
            load_codes(i, q + 1);
            return;
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&pipelines.scales_empty[i]);
            if (i % 2 == 1) {
                barrier_arrive(&pipelines.codes_empty[state.codes.stage]);
            }
        }
        if (i % 2 == 1) {
            state.codes.advance();
        }
        if (i == SCALES_K_TILES - 1) {
            state.scales.phase ^= 1;
        }
        if (i + 1 < SCALES_K_TILES || more) {
            load((i + 1) % SCALES_K_TILES);
        }
    };
    // The stage of x of k-tile i.
    const auto release = [&](int i) {
        if (lane == 0) {
            barrier_arrive(&pipelines.x_empty[i]);
        }
    };
    // SCALES_K_TILES k-tiles; `fresh` when they are the first, `more` when others follow.
    const auto main_loop = [&](bool fresh, bool more) {
#pragma unroll
        for (int i = 0; i < SCALES_K_TILES; i++) {
            barrier_wait(&pipelines.x_full[i], state.x.phase);
            const u32 b = x_base + u32(i) * (S::X_BYTES >> 4);
#pragma unroll
            for (int first = 0; first < K_BLOCKS; first += TOGETHER) {
                products_begin();
#pragma unroll
                for (int q = first; q < first + TOGETHER; q++) {
                    if (fresh && i == 0 && q == 0) {
                        multiply_fresh(T{}, sums, a[i % 2][q], b + u32(2 * q));
                    } else {
                        multiply_add(T{}, sums, a[i % 2][q], b + u32(2 * q));
                    }
                }
                products_commit();
                // The same k-blocks of the k-tile before have been multiplied, and with the last ones its stage of x is free.
                products_wait<K_BLOCKS / TOGETHER>();
                if (first == K_BLOCKS - TOGETHER && !(fresh && i == 0)) {
                    release((i + SCALES_K_TILES - 1) % SCALES_K_TILES);
                }
                if (i + 1 < SCALES_K_TILES || more) {
#pragma unroll
                    for (int q = first; q < first + TOGETHER; q++) {
                        dequantize((i + 1) % SCALES_K_TILES, q, more);
                    }
                }
            }
        }
        state.x.phase ^= 1;
    };
    load(0);
#pragma unroll
    for (int q = 0; q < K_BLOCKS; q++) {
        dequantize(0, q, true);
    }
    main_loop(true, stages > 1);
    for (int s = 1; s < stages; s++) {
        main_loop(false, s + 1 < stages);
    }
    products_wait<0>();
    release(SCALES_K_TILES - 1);
}
