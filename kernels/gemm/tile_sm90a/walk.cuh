// Which tiles of a product, or parts of tiles, a block of gemm_4bit_tile_sm90a makes.
#pragma once

#include "gemm/tile_sm90a/shape.cuh"

// This consumer among those of its team, found anew: it need not be kept in registers.
__device__ inline int team_member() { return read_warp() % TEAM_WARPS * WARP + read_lane(); }

// What a block makes at a time: rows of W from `row` on by rows of x from `token` on, over stages of scales `begin` to
// `begin + stages` of K.
struct Tile {
    int row, token;
    int begin, stages;
};

// The tiles of a block, one after another. The stages of scales of all tiles are counted through: those of a tile follow each
// other, then come those of the next tokens, then of the next rows of W.
template <int TOKENS>
struct ProductWalk {
    const LaunchConfig &config;
    int n, k;
    int at, end;  // stages: the first of this tile, and behind the last of all

    __device__ ProductWalk(const LaunchConfig &config, int n, int k) : config(config), n(n), k(k) {
        if (config.ranges > 0) {
            at = first_of(range());
            end = first_of(range() + 1);
        } else {
            const int first = int(blockIdx.x) / config.split_k * of_tile(), begin = split() * config.scales_stages;
            const int left = of_tile() - begin;
            at = first + begin;
            end = at + (config.scales_stages < left ? config.scales_stages : left);
        }
    }
    // Stages of a tile.
    __device__ int of_tile() const { return (k + SCALES_K - 1) / SCALES_K; }
    // Which part of K this block of a cluster makes.
    __device__ int split() const { return config.split_k > 1 ? int(cluster_rank()) : 0; }
    // Which range is this block's: the last is that of the first block, as a block must not wait for one that starts later.
    __device__ int range() const { return config.ranges - 1 - int(blockIdx.x); }
    // Of a range, the first stage.
    __device__ int first_of(int range) const {
        const int tiles = (n + ROWS - 1) / ROWS * config.token_tiles;
        const i64 units = i64(tiles) * (of_tile() / config.range_unit);
        return int(units * range / config.ranges) * config.range_unit;
    }

    __device__ bool there() const { return at < end; }
    __device__ int stages() const {
        const int left = of_tile() - at % of_tile();
        return left < end - at ? left : end - at;
    }
    __device__ Tile tile() const {
        const int index = at / of_tile();
        return {index / config.token_tiles * ROWS, index % config.token_tiles * TOKENS, at - index * of_tile(), stages()};
    }
    __device__ void advance() { at += stages(); }
};
