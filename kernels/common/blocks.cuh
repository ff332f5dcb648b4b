// Blocks of any number of values, not a power of two alone.
#pragma once

#include "common/types.cuh"

// In which block the values of a tile are: those from `base` on, fewer than 2^30 of them. Inside a tile 32 bits are
// enough, however large a block is; one division by 64 bits is made for the tile.
struct TileBlocks {
    i64 first;  // the block of the first value
    u32 left;   // how many values from the first on are in it
    u32 size;   // of the blocks that follow

    __device__ TileBlocks(i64 base, i64 blocksize) {
        // What a tile never comes to the end of need not be told apart.
        constexpr i64 MOST = i64(1) << 30;
        first = i64(u64(base) / u64(blocksize));
        const i64 rest = blocksize - (base - first * blocksize);
        left = u32(rest < MOST ? rest : MOST);
        size = u32(blocksize < MOST ? blocksize : MOST);
    }

    // Blocks behind the first.
    __device__ u32 operator[](u32 i) const { return i < left ? 0 : 1 + (i - left) / size; }
};
