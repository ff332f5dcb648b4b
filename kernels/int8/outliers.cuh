// Which columns of x have outliers, one bit for each: the kernel of activations leaves a mask for each of its blocks of
// threads, and int8_panel joins them. In those columns the codes of x mean nothing, and products take the codes of W as 0 there.
#pragma once

#include "common/types.cuh"

// Words of a mask that are read together: 128 columns, bit i of a word being column i of its 32.
constexpr int MASK_UNIT = 4;

// Columns of which x is copied together, and the unit that is filled with zeros.
constexpr int PANEL_COLUMNS = 256;
constexpr int PANEL_UNIT = 16;

// Of the mask of so many columns; what is behind the last is 0.
__device__ inline int mask_words(int columns) { return int(u32(columns + 127) / 128) * MASK_UNIT; }

// By so many threads: joins masks [groups][words] in shared memory, [words] that were zero before. A thread has one unit of
// every so-manieth group, so that few of them meet at a word.
__device__ inline void join_masks(u32 *mask, const u32 *masks, int groups, int words, int thread, int threads) {
    const int units = words / MASK_UNIT, beside = units < threads ? threads / units : 1;
    for (int at = thread; at < units * beside; at += threads) {
        const Words4 *const from = reinterpret_cast<const Words4 *>(masks) + at % units;
        Words4 all = {};
#pragma unroll 4
        for (int group = at / units; group < groups; group += beside) {
            const Words4 unit = load_stream_after(from + group * units);
#pragma unroll
            for (int i = 0; i < MASK_UNIT; i++) {
                all.word[i] |= unit.word[i];
            }
        }
#pragma unroll
        for (int i = 0; i < MASK_UNIT; i++) {
            if (all.word[i] != 0) {
                atomicOr(mask + at % units * MASK_UNIT + i, all.word[i]);
            }
        }
    }
}

// By a warp: how many columns there are in so many words.
__device__ inline int count_columns(const u32 *mask, int words) {
    int count = 0;
    for (int i = read_lane(); i < words; i += WARP) {
        count += __popc(mask[i]);
    }
    for (int by = 1; by < WARP; by *= 2) {
        count += __shfl_xor_sync(ALL_LANES, count, by);
    }
    return count;
}

// By a warp: of the columns, in ascending order, those from number `first` on, as many as there are and have room.
__device__ inline void list_columns(int *list, const u32 *mask, int words, int first, int room) {
    const int lane = read_lane();
    int before = -first;
    for (int begin = 0; begin < words && before < room; begin += WARP) {
        const int i = begin + lane;
        const u32 word = i < words ? mask[i] : 0;
        int sum = __popc(word);
        for (int by = 1; by < WARP; by *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, u32(by));
            sum += lane >= by ? other : 0;
        }
        int place = before + sum - __popc(word);
        for (u32 left = word; left != 0; left &= left - 1, place++) {
            if (place >= 0 && place < room) {
                list[place] = i * WARP + __ffs(int(left)) - 1;
            }
        }
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
}
