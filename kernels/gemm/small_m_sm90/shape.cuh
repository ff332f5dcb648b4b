// The shape of gemm_4bit_small_m_sm90: constants, and what a warp has to do.
#pragma once

#include "gemm/small_m.cuh"

constexpr int LOG2_WARPS = 3;
constexpr int WARPS = 1 << LOG2_WARPS;
constexpr int THREADS = WARPS * WARP;

// What depends on the columns and on whether there are several rounds.
template <int FRAGMENTS, bool LONG>
struct Shape {
    // Blocks of a k-slice, by fours, and k-tiles of a round: with x of them a warp fills half of its registers.
    static constexpr int K_SLICE = FRAGMENTS > 2 ? 4 : 8, QUADS = K_SLICE / 4, X_K_TILES = FRAGMENTS > 1 ? 1 : 2;
    // Work items of a warp that are on the way before the first is worked on, 64 KB for all warps.
    // More would hold up x, which comes by the same way.
    static constexpr int AHEAD = 16 / K_SLICE;
    // In a ring of as many stages the next copy begins once a work item is done. With several rounds x comes again and again:
    // there a further stage lets it begin before. All measured on an H100.
    static constexpr int STAGES = LONG ? AHEAD + 1 : AHEAD;
    static constexpr int STAGE_BYTES = ROWS * K_SLICE * BLOCK_BYTES;
};

// Sums of a warp for 8 columns of a step: [row][column], the pairs of columns exchanged by row, so that neither the lanes
// that store a fragment nor those that add up a row meet in a bank.
constexpr int SUMS = ROWS * COLUMNS;

// How the launcher divides the work. Whole numbers that take a division are its business.
struct LaunchConfig {
    int rows;          // of W, for each block of threads
    int log2_k_slices; // of a k-tile, which has 1 to WARPS
    int k_tiles;       // of K: the last may have less, or nothing, for a k-slice
    int per_pass;      // steps whose sums fit in shared memory; with several rounds all
    int log2_sharing;  // with several rounds: of the warps that share a place, no more than there are k-slices
    int ahead;         // rows that are fetched while the kernel before still runs
};

// A warp's part of a k-tile of a step.
struct WorkItem {
    int k_tile, step;
};

// What a warp has to do. K_SLICE: its Shape's.
template <int K_SLICE>
struct Partition {
    int row_blocks, first_row, rows, steps;
    int k_slices, k_slice, groups, group;
    int k_tiles;

    __device__ Partition(int n, int k, const LaunchConfig &config) : row_blocks(k / BLOCK), k_tiles(config.k_tiles) {
        const int warp = int(threadIdx.x / WARP);
        first_row = int(blockIdx.x) * config.rows;
        rows = n - first_row < config.rows ? n - first_row : config.rows;
        k_slices = 1 << config.log2_k_slices;
        k_slice = warp & (k_slices - 1);
        group = warp >> config.log2_k_slices;
        groups = WARPS >> config.log2_k_slices;
        // Both factors of the divisor are powers of two.
        steps = int(u32(rows + groups * ROWS - 1) / ROWS) >> (LOG2_WARPS - config.log2_k_slices);
    }
    __device__ int first_block(int k_tile) const { return (k_tile * k_slices + k_slice) * K_SLICE; }
    // None, or less than that, when there is nothing left for this k-slice.
    __device__ int blocks(int k_tile) const {
        const int left = row_blocks - first_block(k_tile);
        return left < K_SLICE ? left : K_SLICE;
    }
    __device__ int tile_row(int step) const { return (step * groups + group) * ROWS; }
};

// Block j of row r lies at block j ^ (r % 4) of its row in a stage: so the eight rows that a warp reads at a time, four in
// each half of the warp, are in different banks.
template <int K_SLICE>
__device__ inline int ring_offset(int row, int block) { return (row * K_SLICE + (block ^ (row % 4))) * BLOCK_BYTES; }
