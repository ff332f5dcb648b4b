// The pipeline of a warp of gemm_4bit_small_m_sm90: its stages of codes and scales, filled with cp.async; and prefetches.
#pragma once

#include "gemm/small_m_sm90/shape.cuh"

// Copies of a warp's work items, one after the other. R: a Shape.
template <bool NESTED, typename R>
struct Pipeline {
    static constexpr int K_SLICE = R::K_SLICE, QUADS = R::QUADS, STAGES = R::STAGES, STAGE_BYTES = R::STAGE_BYTES;
    // Of the codes of W 16 bytes for each lane, and as many rows at a time as that gives.
    static constexpr int PIECES = K_SLICE * BLOCK_BYTES / 16, AT_A_TIME = WARP / PIECES;
    // Scales lie in the unused halves of the table's rows, WARP words in each: for each quad of blocks a row of them for the
    // eight rows of W from 0, and one for those from 8. Of nested ones it is these that are made there; behind them are the
    // words that hold the codes, and the second scales. When four scales lie together (`quads`), a lane copies those of a
    // row, else of row g or g + 8 that of block t of a quad.
    static constexpr int SCALE_ROWS = 2 * QUADS * (NESTED ? 2 : 1);
    static_assert(WARPS * STAGES * SCALE_ROWS <= 256 && WARP * 2 == LANE_TABLE_ROW, "halves of the table's rows");

    const Partition<K_SLICE> &partition;
    const Scales &scales;
    const u8 *const packed;
    u8 *const ring;     // [STAGES][STAGE_BYTES] of this warp
    u32 *const halves;  // [STAGES][SCALE_ROWS][LANE_TABLE_ROW] of this warp
    const int shift;    // log2 of the blocks here that share a scale
    const u32 scale_count;
    const bool quads;
    WorkItem item = {0, 0};

    __device__ Pipeline(const Partition<K_SLICE> &partition, const Scales &scales, const u8 *packed, u8 *rings, u32 *table,
                        int shift, int n)
        : partition(partition),
          scales(scales),
          packed(packed),
          ring(rings + threadIdx.x / WARP * (STAGES * STAGE_BYTES)),
          halves(table + WARP + threadIdx.x / WARP * (STAGES * SCALE_ROWS * LANE_TABLE_ROW)),
          shift(shift),
          scale_count(u32((i64(n) * partition.row_blocks + (i64(1) << shift) - 1) >> shift)),
          quads(shift == 0 && partition.row_blocks % 4 == 0 &&
                (NESTED || is_aligned(scales.absmax, sizeof(Words4)))) {}

    // The first block of a work item in a row of its tile.
    __device__ u32 block_of(const WorkItem &item, int row) const {
        return u32(partition.first_row + partition.tile_row(item.step) + row) * u32(partition.row_blocks) +
               u32(partition.first_block(item.k_tile));
    }
    __device__ u32 *scale_row(u32 stage, int i) const { return halves + (stage * SCALE_ROWS + i) * LANE_TABLE_ROW; }

    // Of blocks that are not there, zeros: they have no part in a sum.
    __device__ void copy_quads(u32 stage, int rows, int blocks) const {
        const int lane = read_lane(), row = lane % ROWS, quad = lane / ROWS;
        if (lane >= ROWS * QUADS) {
            return;
        }
        const bool there = row < rows && 4 * quad < blocks;
        const u32 block = there ? block_of(item, row) + u32(4 * quad) : 0;
        if constexpr (NESTED) {
            copy_async(scale_row(stage, 2 * QUADS) + lane, reinterpret_cast<const u32 *>(scales.codes + block), there ? 4 : 0);
            copy_async(scale_row(stage, 2 * QUADS + 1) + lane,
                       reinterpret_cast<const u32 *>(scales.absmax2 + (block >> NESTED_SHIFT)), there ? 4 : 0);
        } else {
            copy_async(reinterpret_cast<Words4 *>(scale_row(stage, 2 * quad + row / 8) + row % 8 * 4),
                       reinterpret_cast<const Words4 *>(scales.absmax + block), there ? 16 : 0);
        }
    }
    __device__ void copy_scales(u32 stage, int rows, int blocks) const {
        const int lane = read_lane();
#pragma unroll 1
        for (int i = 0; i < 2 * QUADS; i++) {
            const int row = lane / 4 + i % 2 * (ROWS / 2), j = i / 2 * 4 + lane % 4;
            const bool there = j < blocks && row < rows;
            const u32 scale = there ? (block_of(item, row) + u32(j)) >> shift : 0;
            if constexpr (NESTED) {
                // The word that holds the code, without what lies behind the last.
                const u32 first = scale & ~3u;
                copy_async(scale_row(stage, i) + lane, reinterpret_cast<const u32 *>(scales.codes + first),
                           there ? scale_count - first : 0);
                copy_async(scale_row(stage, 2 * QUADS + i) + lane,
                           reinterpret_cast<const u32 *>(scales.absmax2 + (scale >> NESTED_SHIFT)), there ? 4 : 0);
            } else {
                copy_async(scale_row(stage, i) + lane, reinterpret_cast<const u32 *>(scales.absmax + scale), there ? 4 : 0);
            }
        }
    }

    // Starts copying a work item to a stage, and goes on to the next. What belongs to rows behind the last is left as it is:
    // what comes of it is not written.
    __device__ void copy(u32 stage) {
        if (item.k_tile < partition.k_tiles) {
            const int blocks = partition.blocks(item.k_tile), rows = partition.rows - partition.tile_row(item.step);
            const int lane = read_lane(), row = lane / PIECES, piece = lane % PIECES;
            u8 *const to = ring + (stage * STAGE_BYTES + u32(ring_offset<K_SLICE>(row, piece / 2) + piece % 2 * 16));
            u8 *const to_odd =
                ring + (stage * STAGE_BYTES + u32(ring_offset<K_SLICE>(row + AT_A_TIME, piece / 2) + piece % 2 * 16));
            const u8 *from = packed + (u64(block_of(item, row)) * BLOCK_BYTES + u32(piece * 16));
            const int row_end = piece / 2 < blocks ? rows - row : 0;
#pragma unroll
            for (int i = 0; i < ROWS; i += 2 * AT_A_TIME) {
                if (i < row_end) {
                    copy_async(reinterpret_cast<Words4 *>(to + i * K_SLICE * BLOCK_BYTES),
                               reinterpret_cast<const Words4 *>(from));
                }
                from += i64(AT_A_TIME * BLOCK_BYTES) * partition.row_blocks;
                if (i + AT_A_TIME < row_end) {
                    copy_async(reinterpret_cast<Words4 *>(to_odd + i * K_SLICE * BLOCK_BYTES),
                               reinterpret_cast<const Words4 *>(from));
                }
                from += i64(AT_A_TIME * BLOCK_BYTES) * partition.row_blocks;
            }
            if (quads) {
                copy_quads(stage, rows, blocks);
            } else {
                copy_scales(stage, rows, blocks);
            }
            if (item.k_tile % R::X_K_TILES + 1 < R::X_K_TILES && item.k_tile + 1 < partition.k_tiles) {
                item.k_tile++;
            } else if (++item.step < partition.steps) {
                item.k_tile -= item.k_tile % R::X_K_TILES;
            } else {
                item = {item.k_tile + 1, 0};
            }
        }
        copy_async_commit();
    }

    // Once a stage's copies have ended for all lanes: the scales of row g (0) or row g + 8 (1), of a quad.
    __device__ const float *scales_of(u32 stage, int half, int quad) const {
        return reinterpret_cast<const float *>(scale_row(stage, 2 * quad + half) + read_lane() / 4 * 4);
    }
    // Of these the scales of blocks 2t and 2t + 1. Nested ones that lie together are made on the way: nobody else wants them.
    __device__ Floats2 pair_of_scales(u32 stage, int half, int t, const float *map, float offset) const {
        if constexpr (NESTED) {
            if (quads) {
                const int from = t / 2 * ROWS + half * (ROWS / 2) + read_lane() / 4;
                const u32 codes = scale_row(stage, 2 * QUADS)[from] >> t % 2 * 16;
                const float absmax2 = __uint_as_float(scale_row(stage, 2 * QUADS + 1)[from]);
                return {RawScale<true>{codes & 0xff, absmax2}.value(map, offset),
                        RawScale<true>{codes >> 8 & 0xff, absmax2}.value(map, offset)};
            }
        }
        return *reinterpret_cast<const Floats2 *>(scales_of(stage, half, t / 2) + t % 2 * 2);
    }
    // Makes them of nested ones.
    __device__ void dequantize_scales(u32 stage, const WorkItem &item, const float *map, float offset) const {
        const int lane = read_lane(), g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 2 * QUADS; i++) {
            const int half = i % 2, quad = i / 2;
            u32 *const to = scale_row(stage, i) + lane;
            u32 word, absmax2;
            int byte = t;
            if (quads) {
                const int from = quad * ROWS + half * (ROWS / 2) + g;
                word = scale_row(stage, 2 * QUADS)[from];
                absmax2 = scale_row(stage, 2 * QUADS + 1)[from];
            } else {
                const u32 block = block_of(item, g + half * (ROWS / 2)) + u32(quad * 4 + t);
                word = *to;
                absmax2 = scale_row(stage, 2 * QUADS + i)[lane];
                byte = int(block >> shift & 3);
            }
            const RawScale<true> raw = {word >> (8 * byte) & 0xff, __uint_as_float(absmax2)};
            *to = __float_as_uint(raw.value(map, offset));
        }
    }
};

// Whole pieces of 16 bytes, from the one on that `from` is in.
__device__ inline void fetch(const void *from, u32 bytes) {
    const u8 *const address = static_cast<const u8 *>(from);
    if (bytes >= 16) {
        fetch_to_second_level(address - u32(reinterpret_cast<u64>(from)) % 16, bytes & ~15u);
    }
}

// Has the second-level cache fetch codes and scales of the first config.ahead rows, which lie together. Nothing is read, so
// that it does not matter who still writes them.
template <bool NESTED, int K_SLICE>
__device__ inline void fetch_ahead(const u8 *packed, const Scales &scales, const Partition<K_SLICE> &partition, int shift,
                                   const LaunchConfig &config) {
    if (threadIdx.x == 0) {
        const u32 rows = u32(partition.rows < config.ahead ? partition.rows : config.ahead);
        const u32 blocks = rows * u32(partition.row_blocks);
        const u64 first = u64(u32(partition.first_row)) * u32(partition.row_blocks);
        fetch(packed + first * BLOCK_BYTES, blocks * BLOCK_BYTES);
        if constexpr (NESTED) {
            fetch(scales.codes + (first >> shift), blocks >> shift);
        } else {
            fetch(scales.absmax + (first >> shift), (blocks >> shift) * u32(sizeof(float)));
        }
    }
}
