// The order that the columns of x have for experts_tile_sm90a, which is one of each 64 columns, a k-tile. wgmma takes of each sixteen
// columns, a k-block, 2t, 2t + 1, 2t + 8 and 2t + 9 from lane t of a quad; of four k-blocks these are to be columns 16t to 16t + 15,
// whose codes are 8 consecutive bytes. In words of two columns: at place 8q + 4h + t is word 8t + 2q + h.
//
//     place    0  1  2  3   4  5  6  7   8  9 10 11  12 ...
//     word     0  8 16 24   1  9 17 25   2 10 18 26   3 ...
#pragma once

#include "common/types.cuh"

constexpr int PERMUTED_PIECES = 8;  // of 16 bytes, four words: what the order is one of

// Which word of a k-tile is word t of its piece c.
__device__ inline int permuted_word(int c, int t) { return 8 * t + c; }
