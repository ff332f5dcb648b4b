// The order in which experts_tile_sm90a wants the columns of x within each k-tile, 64 columns. In each k-block of sixteen, wgmma
// takes columns 2t, 2t + 1, 2t + 8 and 2t + 9 from lane t of a quad. What stands at these places in the four k-blocks of a k-tile is
// columns 16t to 16t + 15 of x: their codes are 8 consecutive bytes, which a lane loads at once. In words of two columns, the place
// 8q + 4h + t has word 8t + 2q + h.
//
//     place    0  1  2  3   4  5  6  7   8  9 10 11  12 ...
//     word     0  8 16 24   1  9 17 25   2 10 18 26   3 ...
#pragma once

#include "common/types.cuh"

constexpr int PERMUTED_PIECES = 8;  // of 16 bytes, four words each, in a k-tile of a row of x

// Which word of a k-tile is word t of its piece c.
__device__ inline int permuted_word(int c, int t) { return 8 * t + c; }
