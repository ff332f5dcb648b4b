// The matrix units, and how their operands come from shared memory: by all 32 lanes of a warp.
#pragma once

#include "collectives.h"
#include "index.h"

namespace emulator {

// d += a * b, with the fragments that common/ptx.cuh describes for m16n8k16.
inline void multiply(Meeting meeting, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
    Slot slot = {};
    std::memcpy(slot.word, d, sizeof d);
    std::memcpy(slot.word + 4, a, sizeof a);
    slot.word[8] = b0;
    slot.word[9] = b1;
    meet(meeting, 0xffffffffu, slot, 0, 0, site);
    std::memcpy(d, slot.word, sizeof d);
}

// ldmatrix: 1, 2 or 4 matrices of 8 rows of 8 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and
// gets elements 2 * (l % 4) and the next of row l / 4 of each; transposed, of column l / 4.
template <int MATRICES, bool TRANSPOSED>
inline void load_matrices(uint32_t (&words)[MATRICES], const void *row, Site site) {
    static_assert(MATRICES == 1 || MATRICES == 2 || MATRICES == 4, "as ldmatrix has them");
    Slot slot = {};
    // The addresses of further lanes are not used.
    if (threadIdx.x % 32 < MATRICES * 8) {
        check_aligned(row, 16, site);
        for (int i = 0; i < 4; i++) {
            slot.word[i] = static_cast<const uint32_t *>(row)[i];
        }
    }
    meet(Meeting::ldmatrix, 0xffffffffu, slot, MATRICES, TRANSPOSED, site);
    std::memcpy(words, slot.word, sizeof words);
}

// stmatrix, the way back: lane l gives elements of each matrix as it would get them, and the address of row l % 8 of matrix
// l / 8.
template <int MATRICES, bool TRANSPOSED>
inline void store_matrices(void *row, const uint32_t (&words)[MATRICES], Site site) {
    static_assert(MATRICES == 1 || MATRICES == 2 || MATRICES == 4, "as stmatrix has them");
    Slot slot = {};
    std::memcpy(slot.word, words, sizeof words);
    meet(Meeting::stmatrix, 0xffffffffu, slot, MATRICES, TRANSPOSED, site);
    if (threadIdx.x % 32 < MATRICES * 8) {
        check_aligned(row, 16, site);
        for (int i = 0; i < 4; i++) {
            static_cast<uint32_t *>(row)[i] = slot.word[i];
        }
    }
}

}  // namespace emulator
