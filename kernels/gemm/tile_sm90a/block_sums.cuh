// The A operand of gemm_4bit_block_sums_sm90a: W goes into the products as it is in the codebook, rounded to 16 bits, and a scale is
// applied in float32 to the sums of its block, as in small_m.cuh.
#pragma once

#include "gemm/tile_sm90a/consumer.cuh"

template <typename T, typename S>
struct CodebookOperand {
    static constexpr bool BLOCK_SUMS = true;
    static constexpr int CHUNKS = 1, K_BLOCKS = 4;
    const u8 *const shared, *const my_codes, *const my_scales;
    // As in RowsOperand, with entries of four bytes.
    const u32 swizzle, at_lane, selector;
    // Codes of row g and of row g + 8.
    struct Loaded {
        Words4 words[2][2];
    };

    // The table with values in T: four bytes for an entry, and half of each row is unused.
    __device__ static void prepare(u8 *shared, const Codebook &codebook, int warp, int lane) {
        fill_table<S>(shared, codebook, warp, lane, [](float first, float second) { return pack2<T>(first, second); });
    }

    // `my_row`: of the tile's rows the lane's first.
    __device__ CodebookOperand(const u8 *shared, int lane, u32 my_row)
        : shared(shared),
          my_codes(shared + S::CODES_AT + my_row * CODES_ROW_BYTES),
          my_scales(shared + S::SCALES_AT + my_row * 8),
          swizzle(u32(lane) / 4 >> 1),
          at_lane(u32(lane) * 4),
          selector(0x1100u | (4u + u32(lane) % 4) << 4) {}

    // The codes of a k-tile, which is in a half of a stage of codes.
    __device__ void load(Loaded &to, u32 codes_stage, u32 half, u32, int, int) const {
        const u8 *const codes = my_codes + codes_stage * S::CODES_BYTES;
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 piece = (half * 2 + u32(j)) ^ swizzle;
                to.words[r][j] = *reinterpret_cast<const Words4 *>(codes + r * S::SECOND_ROW * CODES_ROW_BYTES + piece * 16);
            }
        }
    }
    // K-block q of what was loaded, to the registers that wgmma reads.
    template <typename>
    __device__ void dequantize(u32 *to, const Loaded &from, int, int q) const {
#pragma unroll
        for (int w = 0; w < 2; w++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 offset = permute_bytes(at_lane, from.words[r][q / 2].word[q % 2 * 2 + w], selector);
                to[4 * q + 2 * w + r] = *reinterpret_cast<const u32 *>(shared + S::TABLE_AT + offset);
            }
        }
    }
    // Of row g and of row g + 8: a k-tile is within a block.
    __device__ Floats2 scales(u32 scales_stage, int k_tile) const {
        const u8 *const at = my_scales + scales_stage * S::SCALES_BYTES + k_tile * (S::TILE_ROWS * 8);
        return {*reinterpret_cast<const float *>(at), *reinterpret_cast<const float *>(at + S::SECOND_ROW * 8)};
    }
};
