// What the consumers of gemm_4bit_tile_sm90a, gemm_4bit_dgrad_sm90a and experts_tile_sm90a share: the table, rows of W as the A operand
// of wgmma, and the main loop of teams that multiply every k-tile (rounds.cuh has that of two which take turns). `S` is the shape
// of a tile.
#pragma once

#include "gemm/tile_sm90a/shape.cuh"

// The table: entry `byte` of a lane is what `entry` makes of the two values of its codes. Entries of a byte are in a row of 256 bytes,
// so that one permutation of bytes makes the offset of an entry. By all consumers.
template <typename S, typename Entry>
__device__ inline void fill_table(u8 *shared, const Codebook &codebook, int warp, int lane, const Entry &entry) {
    using Value = decltype(entry(0.0f, 0.0f));
    Value *const table = reinterpret_cast<Value *>(shared + S::TABLE_AT) + lane;
#pragma unroll 2
    for (int high = warp; high < 16; high += S::CONSUMER_WARPS) {
        const float first = codebook.value[high];
#pragma unroll
        for (int low = 0; low < 16; low++) {
            table[(16 * high + low) * (256 / int(sizeof(Value)))] = entry(first, codebook.value[low]);
        }
    }
    meet<1, S::CONSUMERS>();
}
// The same with float32 values.
template <typename S>
__device__ inline void fill_table(u8 *shared, const Codebook &codebook, int warp, int lane) {
    fill_table<S>(shared, codebook, warp, lane, [](float first, float second) { return Floats2{first, second}; });
}

// Rows of W as the rows of A: two to a lane. What it dequantizes are chunks of a k-tile: spans of 32 columns, and k-blocks of
// 16, of which one wgmma makes the products.
template <typename S>
struct RowsOperand {
    static constexpr bool BLOCK_SUMS = false;
    static constexpr int CHUNKS = S::chunks(S::TOKENS), SPANS = 2 / CHUNKS, K_BLOCKS = 4 / CHUNKS;
    const u8 *const shared, *const my_codes, *const my_scales;
    // The offset of an entry of the table is one permutation of bytes: 256 times a byte of codes, and where this lane's begin.
    // Of each word of codes the units want byte t in lane 4g + t.
    const u32 swizzle, at_lane, selector;
    // Codes and scales of row g and of row g + 8. Not a member: then registers would not do for 96 tokens.
    struct Loaded {
        Words4 words[2][SPANS];
        Floats2 scale[2];
    };

    __device__ static void prepare(u8 *shared, const Codebook &codebook, int warp, int lane) {
        fill_table<S>(shared, codebook, warp, lane);
    }

    // `my_row`: of the tile's rows the lane's first.
    __device__ RowsOperand(const u8 *shared, int lane, u32 my_row)
        : shared(shared),
          my_codes(shared + S::CODES_AT + my_row * CODES_ROW_BYTES),
          my_scales(shared + S::SCALES_AT + my_row * 8),
          swizzle(u32(lane) / 4 >> 1),
          at_lane(u32(lane) * 8),
          selector(0x1100u | (4u + u32(lane) % 4) << 4) {}

    // The codes and scales of chunk c of k-tile `k_tile` of a stage of scales, which is in a half of a stage of codes.
    __device__ void load(Loaded &to, u32 codes_stage, u32 half, u32 scales_stage, int k_tile, int c) const {
        const u8 *const codes = my_codes + codes_stage * S::CODES_BYTES;
        const u8 *const scales_at = my_scales + scales_stage * S::SCALES_BYTES + k_tile * (S::TILE_ROWS * 8);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            to.scale[r] = *reinterpret_cast<const Floats2 *>(scales_at + r * S::SECOND_ROW * 8);
#pragma unroll
            for (int j = 0; j < SPANS; j++) {
                const u32 piece = (half * 2 + u32(c + j)) ^ swizzle;
                to.words[r][j] = *reinterpret_cast<const Words4 *>(codes + r * S::SECOND_ROW * CODES_ROW_BYTES + piece * 16);
            }
        }
    }
    // K-block q of what was loaded, to the registers that wgmma reads: scaled in float32, rounded once.
    template <typename T>
    __device__ void dequantize(u32 *to, const Loaded &from, int c, int q) const {
#pragma unroll
        for (int w = 0; w < 2; w++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 offset = permute_bytes(at_lane, from.words[r][q / 2].word[q % 2 * 2 + w], selector);
                const Floats2 pair = *reinterpret_cast<const Floats2 *>(shared + S::TABLE_AT + offset);
                const float by = from.scale[r].value[c + q / 2];
                to[4 * q + 2 * w + r] = pack2<T>(__fmul_rn(pair.value[0], by), __fmul_rn(pair.value[1], by));
            }
        }
    }
};

// The products of the k-tiles in `stages` stages of scales become `sums`, the accumulators: [64 rows][TOKENS] of a warpgroup, as
// wgmma has them. `Operand`: what A is, and `place` where of it this lane's part is.
template <typename T, typename Operand, typename S>
__device__ inline void multiply_k_tiles(float (&sums)[S::ACCUMULATORS], u8 *shared, ConsumerState<S> &state, int lane, u32 place,
                                        int stages) {
    const Pipelines<S> pipelines(shared);
    Operand a_operand(shared, lane, place);
    const u32 x_base = operand(shared + S::X_AT);
    constexpr int CHUNKS = Operand::CHUNKS, CHUNK_K_BLOCKS = Operand::K_BLOCKS;
    u32 a[4 * CHUNK_K_BLOCKS];
    typename Operand::Loaded loaded;
    PipelineState<S::CODES_STAGES> &codes_state = state.codes;
    PipelineState<S::SCALES_STAGES> &scales_state = state.scales;
    PipelineState<S::X_STAGES> &x_state = state.x;

    // The codes and scales of chunk c of k-tile i of a stage of scales.
    const auto load = [&](int i, int c) {
        if (i == 0 && c == 0) {
            barrier_wait(&pipelines.scales_full[scales_state.stage], scales_state.phase);
        }
        if ((i & 1) == 0 && c == 0) {
            barrier_wait(&pipelines.codes_full[codes_state.stage], codes_state.phase);
        }
        a_operand.load(loaded, codes_state.stage, u32(i & 1), scales_state.stage, i, c);
    };
    // K-block q of what was loaded.
    const auto dequantize = [&](u32 *to, int i, int c, int q) {
        a_operand.template dequantize<T>(to, loaded, c, q);
        if (c < CHUNKS - 1 || q < CHUNK_K_BLOCKS - 1) {
            return;
        }
        if ((i & 1) == 1) {
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&pipelines.codes_empty[codes_state.stage]);
            }
            codes_state.advance();
        }
        if (i == SCALES_K_TILES - 1) {
            if (lane == 0) {
                barrier_arrive(&pipelines.scales_empty[scales_state.stage]);
            }
            scales_state.advance();
        }
    };
    // Adds the products of k-block q of chunk c to the sums, or begins them.
    const auto multiply = [&](const u32 *from, int c, int q, bool fresh) {
        const u32 b = x_base + x_state.stage * (S::X_BYTES >> 4) + u32(2 * (c * CHUNK_K_BLOCKS + q));
        if (fresh) {
            multiply_fresh(T{}, sums, from + 4 * q, b);
        } else {
            multiply_add(T{}, sums, from + 4 * q, b);
        }
    };
    // Two k-tiles of a stage of scales from `first` on; `fresh` when they are the first of all.
    const auto main_loop = [&](bool fresh, int first) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                load(first + i, c);
#pragma unroll
                for (int q = 0; q < CHUNK_K_BLOCKS; q++) {
                    dequantize(a, first + i, c, q);
                }
                if (c == 0) {
                    barrier_wait(&pipelines.x_full[x_state.stage], x_state.phase);
                }
                products_begin();
#pragma unroll
                for (int q = 0; q < CHUNK_K_BLOCKS; q++) {
                    multiply(a, c, q, fresh && i == 0 && c == 0 && q == 0);
                }
                products_commit();
                products_wait<0>();
            }
            if (lane == 0) {
                barrier_arrive(&pipelines.x_empty[x_state.stage]);
            }
            x_state.advance();
        }
    };
    main_loop(true, 0);
    constexpr int PAIRS = SCALES_K_TILES / 2;
    for (int p = 1; p < stages * PAIRS; p++) {
        main_loop(false, p % PAIRS * 2);
    }
}
