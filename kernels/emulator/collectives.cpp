// What lanes of a warp compute together, once all are there.
#include <cmath>
#include <cstring>

#include "block.h"

namespace emulator {
namespace {

float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A 16-bit float as a float32: exact.
float element(bool bf16, uint32_t bits) {
    if (bf16) {
        return as_float(bits << 16);
    }
    const int exponent = int(bits >> 10 & 31);
    const float fraction = float(bits & 1023);
    const float size = exponent == 31  ? ((bits & 1023) != 0 ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(fraction, -24)
                                       : std::ldexp(1024.0f + fraction, exponent - 25);
    return (bits & 0x8000) != 0 ? -size : size;
}

float half_of(bool bf16, uint32_t word, int which) { return element(bf16, which == 0 ? word & 0xffff : word >> 16); }

// The lane that `lane` takes its value from: none where the result is undefined.
int source(const Thread &thread, Meeting meeting, int lane, uint32_t mask) {
    const int width = thread.second, begin = lane & ~(width - 1), end = begin + width;
    int from = lane;
    switch (meeting) {
        case Meeting::shuffle: from = begin + (thread.first & (width - 1)); break;
        case Meeting::shuffle_up: from = lane - thread.first < begin ? lane : lane - thread.first; break;
        case Meeting::shuffle_down: from = lane + thread.first >= end ? lane : lane + thread.first; break;
        // Lower segments may be read, higher ones not.
        default: from = (lane ^ thread.first) >= end ? lane : lane ^ thread.first; break;
    }
    return (mask >> from & 1) != 0 ? from : -1;
}

uint32_t reduced(Meeting meeting, uint32_t a, uint32_t b) {
    switch (meeting) {
        case Meeting::reduce_add: return a + b;
        case Meeting::reduce_min: return a < b ? a : b;
        case Meeting::reduce_max: return a > b ? a : b;
        case Meeting::reduce_and: return a & b;
        case Meeting::reduce_or: return a | b;
        default: return a ^ b;
    }
}

// d[16][8] += a[16][16] * b[16][8]; the words of a slot are d[4], a[4], b[2]. Products of 16-bit floats are exact in
// float64; their sum is rounded once, to float32. The matrix units round elsewhere, within the same bound.
void multiply(bool bf16, Thread *const (&lanes)[LANES]) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < int(LANES); lane++) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t *const word = lanes[lane]->slot.word;
        for (int i = 0; i < 4; i++) {
            for (int half = 0; half < 2; half++) {
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = half_of(bf16, word[4 + i], half);
            }
        }
        for (int i = 0; i < 2; i++) {
            for (int half = 0; half < 2; half++) {
                b[2 * t + i * 8 + half][g] = half_of(bf16, word[8 + i], half);
            }
        }
    }
    for (int lane = 0; lane < int(LANES); lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            uint32_t &d = lanes[lane]->slot.word[i];
            double sum = as_float(d);
            for (int k = 0; k < 16; k++) {
                sum += a[g + i / 2 * 8][k] * b[k][2 * t + i % 2];
            }
            const float rounded = float(sum);
            d = std::isnan(rounded) ? 0x7fffffffu : as_bits(rounded);
        }
    }
}

// d[16][8] += a[16][32] * b[32][8] of 8-bit integers; sums wrap around.
void multiply_integers(Thread *const (&lanes)[LANES]) {
    int8_t a[16][32], b[32][8];
    for (int lane = 0; lane < int(LANES); lane++) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t *const word = lanes[lane]->slot.word;
        for (int j = 0; j < 4; j++) {
            for (int i = 0; i < 4; i++) {
                a[g + i % 2 * 8][4 * t + i / 2 * 16 + j] = int8_t(word[4 + i] >> (8 * j));
            }
            for (int i = 0; i < 2; i++) {
                b[4 * t + i * 16 + j][g] = int8_t(word[8 + i] >> (8 * j));
            }
        }
    }
    for (int lane = 0; lane < int(LANES); lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            uint32_t &d = lanes[lane]->slot.word[i];
            for (int k = 0; k < 32; k++) {
                d += uint32_t(int32_t(a[g + i / 2 * 8][k]) * int32_t(b[k][2 * t + i % 2]));
            }
        }
    }
}

// Lane l has brought the 16 bytes of one row: row l % 8 of matrix l / 8. It takes two elements of each matrix: those at
// 2 * (l % 4) of row l / 4, or, transposed, row 2 * (l % 4) and the next at column l / 4.
void distribute(Thread *const (&lanes)[LANES], int matrices, bool transposed) {
    uint16_t rows[LANES][8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        std::memcpy(rows[lane], lanes[lane]->slot.word, 16);
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        for (int m = 0; m < matrices; m++) {
            const unsigned base = unsigned(m) * 8;
            const uint16_t low = transposed ? rows[base + 2 * t][g] : rows[base + g][2 * t];
            const uint16_t high = transposed ? rows[base + 2 * t + 1][g] : rows[base + g][2 * t + 1];
            lanes[lane]->slot.word[m] = uint32_t(low) | uint32_t(high) << 16;
        }
    }
}

// The opposite: lane l takes the 16 bytes of row l % 8 of matrix l / 8, or, transposed, of its column.
void collect(Thread *const (&lanes)[LANES], int matrices, bool transposed) {
    uint16_t elements[LANES][8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        for (int m = 0; m < matrices; m++) {
            const unsigned base = unsigned(m) * 8;
            for (unsigned half = 0; half < 2; half++) {
                const uint16_t element = uint16_t(lanes[lane]->slot.word[m] >> (16 * half));
                if (transposed) {
                    elements[base + 2 * t + half][g] = element;
                } else {
                    elements[base + g][2 * t + half] = element;
                }
            }
        }
    }
    for (unsigned lane = 0; lane < unsigned(matrices) * 8; lane++) {
        std::memcpy(lanes[lane]->slot.word, elements[lane], 16);
    }
}

}  // namespace

const char *name_of(Meeting meeting) {
    static const char *const names[] = {
        "__syncthreads",     "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",
        "__shfl_xor_sync",   "a vote",            "__match_any_sync",  "__reduce_add_sync", "__reduce_min_sync",
        "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync", "ldmatrix",
        "mma",               "mma",               "mma",               "stmatrix",          "setmaxnreg",
        "a barrier in shared memory",
        "a numbered barrier", "the cluster's barrier", "setmaxnreg, until there are registers", "wgmma.commit_group",
        "wgmma.wait_group",
    };
    return names[int(meeting)];
}

void compute(Meeting meeting, Thread *self, uint32_t mask) {
    Thread *lanes[LANES] = {};
    const unsigned warp = self->number & ~(LANES - 1);
    for (uint32_t left = mask; left != 0; left &= left - 1) {
        const unsigned lane = unsigned(__builtin_ctz(left));
        lanes[lane] = &thread_of(warp + lane);
    }
    switch (meeting) {
        case Meeting::barrier:
        case Meeting::setmaxnreg:
        case Meeting::syncwarp: return;
        case Meeting::mma_bf16:
        case Meeting::mma_f16: return multiply(meeting == Meeting::mma_bf16, lanes);
        case Meeting::mma_s8: return multiply_integers(lanes);
        case Meeting::ldmatrix:
            for (const Thread *lane : lanes) {
                if (lane->first != self->first || lane->second != self->second) {
                    fail(self->site, "ldmatrix of different forms in one warp");
                }
            }
            return distribute(lanes, self->first, self->second != 0);
        case Meeting::stmatrix: return collect(lanes, self->first, self->second != 0);
        default: break;
    }
    Slot before[LANES] = {};
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (lanes[lane] != nullptr) {
            before[lane] = lanes[lane]->slot;
        }
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (lanes[lane] == nullptr) {
            continue;
        }
        Slot &slot = lanes[lane]->slot;
        switch (meeting) {
            case Meeting::shuffle:
            case Meeting::shuffle_up:
            case Meeting::shuffle_down:
            case Meeting::shuffle_xor: {
                const int from = source(*lanes[lane], meeting, int(lane), mask);
                if (from < 0) {
                    std::memset(&slot, 0xff, sizeof slot);  // undefined: a value that is noticed
                } else {
                    slot = before[from];
                }
                break;
            }
            case Meeting::ballot: {
                uint32_t bits = 0;
                for (unsigned other = 0; other < LANES; other++) {
                    bits |= uint32_t(lanes[other] != nullptr && before[other].word[0] != 0) << other;
                }
                slot.word[0] = bits;
                break;
            }
            case Meeting::match_any: {
                uint32_t bits = 0;
                for (unsigned other = 0; other < LANES; other++) {
                    bits |= uint32_t(lanes[other] != nullptr && before[other].word[0] == before[lane].word[0] &&
                                     before[other].word[1] == before[lane].word[1])
                            << other;
                }
                slot.word[0] = bits;
                break;
            }
            default: {
                uint32_t total = before[unsigned(__builtin_ctz(mask))].word[0];
                for (uint32_t left = mask & (mask - 1); left != 0; left &= left - 1) {
                    total = reduced(meeting, total, before[unsigned(__builtin_ctz(left))].word[0]);
                }
                slot.word[0] = total;
                break;
            }
        }
    }
}

}  // namespace emulator
