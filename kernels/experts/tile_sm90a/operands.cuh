// The A operand of experts_tile_sm90a. The rows of x have their columns in another order (permute.cuh), so that the 64 columns of a
// k-tile that a lane multiplies are 8 consecutive bytes of codes for each of its two rows: one load without bank conflicts, where
// columns in their own order would take two of twice the size.
#pragma once

#include "experts/tile_sm90a/shape.cuh"
#include "gemm/tile_sm90a/consumer.cuh"

// Which of the eight rows of a matrix of A are lane group g's: those of half a warp have their codes in different banks.
__device__ inline u32 row_of_group(u32 g) { return g % 4 * 2 + g / 4; }

// What both operands have.
template <typename S>
struct PermutedRows {
    const u8 *const shared, *const my_codes, *const my_scales;
    const u32 at_lane;
    // Where 16-byte pieces of the lane's rows are: a row is of 128 bytes, and piece c at place c ^ row % 8.
    const u32 piece;

    // `my_row`: of the tile's rows the lane's first; `entry`: bytes of an entry of the table.
    __device__ PermutedRows(const u8 *shared, int lane, u32 my_row, u32 entry)
        : shared(shared),
          my_codes(shared + S::CODES_AT + my_row * (S::STAGE_K / 2) + u32(lane) % 2 * 8),
          my_scales(shared + S::SCALES_AT + my_row * 16),
          at_lane(u32(lane) * entry),
          piece((u32(lane) % 4 / 2) ^ (my_row & 7)) {}

    // Where the lane's codes of a k-tile of a stage are, of its first or its second row.
    __device__ const u8 *codes(u32 stage, int k_tile, int r) const {
        return my_codes + stage * S::CODES_BYTES + r * S::SECOND_ROW * (S::STAGE_K / 2) + ((u32(k_tile) * 2) ^ piece) * 16;
    }
    // The offset in the table of byte `byte` of a word of codes: 256 times that, and where this lane's entries begin.
    __device__ u32 entry(u32 word, int byte) const { return permute_bytes(at_lane, word, 0x1100u | (4u + u32(byte)) << 4); }
    // Of both rows: a k-tile is within a block.
    __device__ Floats2 scales(u32 stage, int k_tile) const {
        const u8 *const at = my_scales + stage * S::SCALES_BYTES + k_tile * 4;
        return {*reinterpret_cast<const float *>(at), *reinterpret_cast<const float *>(at + S::SECOND_ROW * 16)};
    }
};

// W as it is in the codebook, rounded to 16 bits; scales are for the sums of a block. See gemm/tile_sm90a/block_sums.cuh.
template <typename T, typename S>
struct PermutedCodebookOperand : PermutedRows<S> {
    static constexpr bool BLOCK_SUMS = true;
    static constexpr int CHUNKS = 1, K_BLOCKS = 4;
    struct Loaded {
        Words2 words[2];
    };

    __device__ static void prepare(u8 *shared, const Codebook &codebook, int warp, int lane) {
        fill_table<S>(shared, codebook, warp, lane, [](float first, float second) { return pack2<T>(first, second); });
    }
    __device__ PermutedCodebookOperand(const u8 *shared, int lane, u32 my_row) : PermutedRows<S>(shared, lane, my_row, 4) {}

    __device__ void load(Loaded &to, u32 stage, int k_tile, int) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            to.words[r] = *reinterpret_cast<const Words2 *>(this->codes(stage, k_tile, r));
        }
    }
    template <typename>
    __device__ void dequantize(u32 *to, const Loaded &from, int, int q) const {
#pragma unroll
        for (int w = 0; w < 2; w++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 offset = this->entry(from.words[r].word[q / 2], q % 2 * 2 + w);
                to[4 * q + 2 * w + r] = *reinterpret_cast<const u32 *>(this->shared + S::TABLE_AT + offset);
            }
        }
    }
};

// W dequantized, bit for bit: half of a k-tile at a time.
template <typename S>
struct PermutedRowsOperand : PermutedRows<S> {
    static constexpr bool BLOCK_SUMS = false;
    static constexpr int CHUNKS = 2, K_BLOCKS = 4 / CHUNKS;
    struct Loaded {
        u32 words[2];
        Floats2 scale;
    };

    __device__ static void prepare(u8 *shared, const Codebook &codebook, int warp, int lane) {
        fill_table<S>(shared, codebook, warp, lane);
    }
    __device__ PermutedRowsOperand(const u8 *shared, int lane, u32 my_row) : PermutedRows<S>(shared, lane, my_row, 8) {}

    __device__ void load(Loaded &to, u32 stage, int k_tile, int c) const {
        to.scale = this->scales(stage, k_tile);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            to.words[r] = *reinterpret_cast<const u32 *>(this->codes(stage, k_tile, r) + c * 4);
        }
    }
    template <typename T>
    __device__ void dequantize(u32 *to, const Loaded &from, int, int q) const {
#pragma unroll
        for (int w = 0; w < 2; w++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 offset = this->entry(from.words[r], q * 2 + w);
                const Floats2 pair = *reinterpret_cast<const Floats2 *>(this->shared + S::TABLE_AT + offset);
                const float by = from.scale.value[r];
                to[4 * q + 2 * w + r] = pack2<T>(__fmul_rn(pair.value[0], by), __fmul_rn(pair.value[1], by));
            }
        }
    }
};
