// What the consumers of gemm_4bit_tile_sm90a, gemm_4bit_dgrad_sm90a and experts_tile_sm90a share: the table of codes; and for the
// first of them rows of W as the A operand of wgmma. `S` is the shape of a tile.
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
