// Small kernels, each right, and again with a mistake planted: that the ways to run kernels here find it is tested. The
// name of the mistake stands behind the lines that a report may name.
#include "common/types.cuh"

constexpr int THREADS = 64;
constexpr int ROUNDS = 3;

enum Mistake {
    NONE,
    NO_BARRIER,
    NEIGHBOUR_ABOVE,
    NEIGHBOUR_BELOW,
    SHARED_READ_PAST,
    SHARED_WRITE_PAST,
    GLOBAL_READ_PAST,
    GLOBAL_WRITE_PAST,
    NEVER_WRITTEN,
    SOME_AT_BARRIER,
    EXIT_BEFORE_BARRIER,
    TWO_BARRIERS,
    NO_SECOND_BARRIER,
    DYNAMIC_READ_PAST,
    NO_SYNCWARP,
    SHUFFLE_BY_HALF,
    SHUFFLE_IN_TWO_PLACES,
    SHUFFLE_FROM_OUTSIDE,
    SHUFFLE_NOT_IN_MASK,
    MISALIGNED_WRAPPER,
    MISALIGNED_ACCESS,
    NO_WAIT,
    WAIT_TOO_SHORT,
    NO_BARRIER_AFTER_WAIT,
    NO_BARRIER_BEFORE_REUSE,
    COPY_READ_PAST,
    SAME_ELEMENT,
    NOT_ATOMIC,
    NO_FENCE,
    NO_WAIT_FOR_PHASE,
    WAIT_FOR_OTHER_PARITY,
    TOO_FEW_ARRIVALS,
    NO_BARRIER_MADE,
    NO_WAIT_BEFORE_REUSE,
};

// out[block][i] = in[block][THREADS - 1 - i]
template <Mistake MISTAKE>
__device__ inline void reverse(const float *in, float *out) {
    SHARED_ARRAY(float, tile, [THREADS]);
    const int i = int(threadIdx.x), base = int(blockIdx.x) * THREADS;
    if (MISTAKE == EXIT_BEFORE_BARRIER && i >= 48) {
        return;
    }
    const int from = base + i + (MISTAKE == GLOBAL_READ_PAST);
    const int to = MISTAKE == SHARED_WRITE_PAST ? i + 1 : i;
    if (MISTAKE != NEVER_WRITTEN || i != 5) {
        tile[to] = in[from];  // NO_BARRIER SOME_AT_BARRIER SHARED_WRITE_PAST GLOBAL_READ_PAST
    }
    if (MISTAKE == SOME_AT_BARRIER) {
        if (i < 48) {
            __syncthreads();  // SOME_AT_BARRIER
        }
    } else if (MISTAKE == TWO_BARRIERS) {
        if (i % 2 == 0) {
            __syncthreads();  // TWO_BARRIERS
        } else {
            __syncthreads();  // TWO_BARRIERS
        }
    } else if (MISTAKE != NO_BARRIER) {
        __syncthreads();  // EXIT_BEFORE_BARRIER
    }
    const int at = MISTAKE == SHARED_READ_PAST ? THREADS - i : THREADS - 1 - i;
    out[base + i + (MISTAKE == GLOBAL_WRITE_PAST)] = tile[at];  // NO_BARRIER SOME_AT_BARRIER SHARED_READ_PAST GLOBAL_WRITE_PAST
}

// out[i] = in[i + 1] or in[i - 1], around the block's end: without the barrier one order alone goes wrong.
template <Mistake MISTAKE>
__device__ inline void rotate(const float *in, float *out) {
    SHARED_ARRAY(float, tile, [THREADS]);
    const int i = int(threadIdx.x), base = int(blockIdx.x) * THREADS;
    tile[i] = in[base + i];  // NEIGHBOUR_ABOVE NEIGHBOUR_BELOW
    if (MISTAKE == NONE) {
        __syncthreads();
        out[base + i] = tile[(i + 1) % THREADS];
    } else if (MISTAKE == NEIGHBOUR_ABOVE) {
        out[base + i] = i + 1 < THREADS ? tile[i + 1] : in[base];  // NEIGHBOUR_ABOVE
    } else {
        // What the thread below gave, for the thread below: the same result.
        out[base + (i + THREADS - 2) % THREADS] = i > 0 ? tile[i - 1] : in[base + THREADS - 1];  // NEIGHBOUR_BELOW
    }
}

// out[round][i] = in[round][THREADS - 1 - i], by one array in turn.
template <Mistake MISTAKE>
__device__ inline void reverse_in_turn(const float *in, float *out) {
    DYNAMIC_SHARED(shared);
    float *const tile = reinterpret_cast<float *>(shared);  // [THREADS]
    const int i = int(threadIdx.x);
    for (int round = 0; round < ROUNDS; round++) {
        tile[i] = in[round * THREADS + i];  // NO_SECOND_BARRIER
        __syncthreads();
        const int at = THREADS - 1 - i + (MISTAKE == DYNAMIC_READ_PAST);
        out[round * THREADS + i] = tile[at];  // NO_SECOND_BARRIER DYNAMIC_READ_PAST
        if (MISTAKE != NO_SECOND_BARRIER) {
            __syncthreads();
        }
    }
}

// out[warp][lane] = in[warp][WARP - 1 - lane]
template <Mistake MISTAKE>
__device__ inline void reverse_in_warp(const float *in, float *out) {
    SHARED_ARRAY(float, tile, [THREADS / WARP][WARP]);
    const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
    tile[warp][lane] = in[threadIdx.x];  // NO_SYNCWARP
    if (MISTAKE != NO_SYNCWARP) {
        __syncwarp();
    }
    out[threadIdx.x] = tile[warp][WARP - 1 - lane];  // NO_SYNCWARP
}

// out[warp][lane] = the sum of in[warp]
template <Mistake MISTAKE>
__device__ inline void sum_in_warp(const float *in, float *out) {
    const int lane = int(threadIdx.x) % WARP;
    float sum = in[threadIdx.x];
    for (int step = WARP / 2; step > 0; step /= 2) {
        float other;
        if (MISTAKE == SHUFFLE_BY_HALF) {
            other = lane < 16 ? __shfl_xor_sync(ALL_LANES, sum, step) : 0.0f;  // SHUFFLE_BY_HALF
        } else if (MISTAKE == SHUFFLE_IN_TWO_PLACES) {
            if (lane < 16) {
                other = __shfl_xor_sync(ALL_LANES, sum, step);  // SHUFFLE_IN_TWO_PLACES
            } else {
                other = __shfl_xor_sync(ALL_LANES, sum, step);  // SHUFFLE_IN_TWO_PLACES
            }
        } else if (MISTAKE == SHUFFLE_FROM_OUTSIDE) {
            other = __shfl_xor_sync(lane < 16 ? 0x0000ffffu : 0xffff0000u, sum, step);
        } else if (MISTAKE == SHUFFLE_NOT_IN_MASK) {
            other = __shfl_xor_sync(0x0000ffffu, sum, step);  // SHUFFLE_NOT_IN_MASK
        } else {
            other = __shfl_xor_sync(ALL_LANES, sum, step);
        }
        sum += other;
    }
    out[threadIdx.x] = sum;
}

// out[4 i ...] = in[4 i ...], 16 bytes at a time
template <Mistake MISTAKE>
__device__ inline void copy_words(const float *in, float *out) {
    const int i = int(threadIdx.x);
    const float *const from = in + 4 * i + (MISTAKE == MISALIGNED_WRAPPER);
    Words4 words;
    if (MISTAKE == MISALIGNED_ACCESS) {
        const u8 *const bytes = reinterpret_cast<const u8 *>(from);
        const u32 word = *reinterpret_cast<const u32 *>(bytes + 2);  // MISALIGNED_ACCESS
        words = load_stream(reinterpret_cast<const Words4 *>(from));
        words.word[0] = (words.word[0] & 0xffff) | word << 16;
    } else {
        words = load_stream(reinterpret_cast<const Words4 *>(from));  // MISALIGNED_WRAPPER
    }
    store_words(reinterpret_cast<Words4 *>(out) + i, words);
}

__device__ inline void copy_16(void *to, const void *from, emulator::Site site = emulator::Site::here()) {
    emulator::issue_copy(to, from, 16, 16, site);
}

// out[round][i] = in[round][(i + 1) % THREADS], of 16 bytes each, through two stages of shared memory.
template <Mistake MISTAKE>
__device__ inline void staged(const float *in, float *out) {
    SHARED_ARRAY(Words4, stage, [2][THREADS]);
    const Words4 *const from = reinterpret_cast<const Words4 *>(in);
    const int i = int(threadIdx.x);
    copy_16(&stage[0][i], from + i);
    emulator::commit_copies();
    for (int round = 0; round < ROUNDS; round++) {
        if (round + 1 < ROUNDS) {
            const int past = MISTAKE == COPY_READ_PAST ? THREADS : 0;
            const Words4 *const next = from + (round + 1) * THREADS + i + past;
            copy_16(&stage[(round + 1) % 2][i], next);  // NO_BARRIER_BEFORE_REUSE COPY_READ_PAST
            emulator::commit_copies();
        }
        if (MISTAKE != NO_WAIT) {
            emulator::wait_copies(MISTAKE == WAIT_TOO_SHORT || round + 1 < ROUNDS ? 1 : 0);
        }
        if (MISTAKE != NO_BARRIER_AFTER_WAIT) {
            __syncthreads();
        }
        const Words4 &other = stage[round % 2][(i + 1) % THREADS];
        Words4 *const to = reinterpret_cast<Words4 *>(out) + round * THREADS + i;
        store_words(to, other);  // NO_WAIT WAIT_TOO_SHORT NO_BARRIER_AFTER_WAIT NO_BARRIER_BEFORE_REUSE
        if (MISTAKE != NO_BARRIER_BEFORE_REUSE) {
            __syncthreads();
        }
    }
    emulator::wait_copies(0);
}

// out[block][i] = in[block][i]
template <Mistake MISTAKE>
__device__ inline void by_blocks(const float *in, float *out) {
    const int base = int(blockIdx.x) * THREADS, i = int(threadIdx.x);
    if (MISTAKE == SAME_ELEMENT && blockIdx.x > 0 && i == 0) {
        out[base - 1] = in[base];  // SAME_ELEMENT
    }
    out[base + i] = in[base + i];  // SAME_ELEMENT
}

// out[0] = the sum of all, in any order: of small integers, so that it is exact
template <Mistake MISTAKE>
__device__ inline void add_up(const float *in, float *out) {
    const float value = in[blockIdx.x * THREADS + threadIdx.x];
    if (MISTAKE == NOT_ATOMIC) {
        out[0] += value;  // NOT_ATOMIC
    } else {
        atomicAdd(out, value);
    }
}

// out[0] = the sum of all: each block adds its part up, and the last one those of all. Behind them a counter.
template <Mistake MISTAKE>
__device__ inline void add_up_last(const float *in, float *out) {
    SHARED_ARRAY(bool, last, );
    float *const parts = out + 1;
    u32 *const counter = reinterpret_cast<u32 *>(out + 1 + gridDim.x);
    float sum = in[blockIdx.x * THREADS + threadIdx.x];
    for (int step = WARP / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    }
    SHARED_ARRAY(float, warps, [THREADS / WARP]);
    if (threadIdx.x % WARP == 0) {
        warps[threadIdx.x / WARP] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = warps[0] + warps[1];  // NO_FENCE
        if (MISTAKE != NO_FENCE) {
            __threadfence();
        }
        last = atomicAdd(counter, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 40) {
        if (MISTAKE != NO_FENCE) {
            __threadfence();
        }
        float total = 0.0f;
        for (u32 block = 0; block < gridDim.x; block++) {
            total += parts[block];  // NO_FENCE
        }
        out[0] = total;
    }
}

// out[round][i] = in[round][THREADS - 1 - i] of the lower half, by the upper half: one hands over, and hears when it may again.
template <Mistake MISTAKE>
__device__ inline void hand_over(const float *in, float *out) {
    constexpr int HALF = THREADS / 2;
    SHARED_ARRAY(float, tile, [HALF]);
    SHARED_ARRAY(Barrier, given, );
    SHARED_ARRAY(Barrier, taken, );
    const int i = int(threadIdx.x);
    if (i == 0) {
        if (MISTAKE != NO_BARRIER_MADE) {
            barrier_init(&given, HALF);
        }
        barrier_init(&taken, HALF);
    }
    __syncthreads();
    for (u32 round = 0; round < ROUNDS; round++) {
        if (i < HALF) {
            if (MISTAKE != NO_WAIT_BEFORE_REUSE && round > 0) {
                barrier_wait(&taken, (round - 1) % 2);  // NO_WAIT_FOR_PHASE WAIT_FOR_OTHER_PARITY
            }
            tile[i] = in[round * HALF + u32(i)];  // NO_WAIT_FOR_PHASE NO_WAIT_BEFORE_REUSE
            if (MISTAKE != TOO_FEW_ARRIVALS || i != 3) {
                barrier_arrive(&given);  // NO_BARRIER_MADE
            }
        } else {
            if (MISTAKE != NO_WAIT_FOR_PHASE) {
                const u32 parity = (round + (MISTAKE == WAIT_FOR_OTHER_PARITY)) % 2;
                barrier_wait(&given, parity);  // WAIT_FOR_OTHER_PARITY TOO_FEW_ARRIVALS NO_BARRIER_MADE NO_WAIT_BEFORE_REUSE
            }
            const float value = tile[THREADS - 1 - i];  // NO_WAIT_FOR_PHASE NO_WAIT_BEFORE_REUSE
            out[round * HALF + u32(i - HALF)] = value;
            barrier_arrive(&taken);
        }
    }
}

#define INSTANCE(function, MISTAKE)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) function##_##MISTAKE(const float *in, float *out) { \
        function<MISTAKE>(in, out);                                                                       \
    }

INSTANCE(reverse, NONE)
INSTANCE(reverse, NO_BARRIER)
INSTANCE(reverse, SHARED_READ_PAST)
INSTANCE(reverse, SHARED_WRITE_PAST)
INSTANCE(reverse, GLOBAL_READ_PAST)
INSTANCE(reverse, GLOBAL_WRITE_PAST)
INSTANCE(reverse, NEVER_WRITTEN)
INSTANCE(reverse, SOME_AT_BARRIER)
INSTANCE(reverse, EXIT_BEFORE_BARRIER)
INSTANCE(reverse, TWO_BARRIERS)
INSTANCE(rotate, NONE)
INSTANCE(rotate, NEIGHBOUR_ABOVE)
INSTANCE(rotate, NEIGHBOUR_BELOW)
INSTANCE(reverse_in_turn, NONE)
INSTANCE(reverse_in_turn, NO_SECOND_BARRIER)
INSTANCE(reverse_in_turn, DYNAMIC_READ_PAST)
INSTANCE(reverse_in_warp, NONE)
INSTANCE(reverse_in_warp, NO_SYNCWARP)
INSTANCE(sum_in_warp, NONE)
INSTANCE(sum_in_warp, SHUFFLE_BY_HALF)
INSTANCE(sum_in_warp, SHUFFLE_IN_TWO_PLACES)
INSTANCE(sum_in_warp, SHUFFLE_FROM_OUTSIDE)
INSTANCE(sum_in_warp, SHUFFLE_NOT_IN_MASK)
INSTANCE(copy_words, NONE)
INSTANCE(copy_words, MISALIGNED_WRAPPER)
INSTANCE(copy_words, MISALIGNED_ACCESS)
INSTANCE(staged, NONE)
INSTANCE(staged, NO_WAIT)
INSTANCE(staged, WAIT_TOO_SHORT)
INSTANCE(staged, NO_BARRIER_AFTER_WAIT)
INSTANCE(staged, NO_BARRIER_BEFORE_REUSE)
INSTANCE(staged, COPY_READ_PAST)
INSTANCE(by_blocks, NONE)
INSTANCE(by_blocks, SAME_ELEMENT)
INSTANCE(add_up, NONE)
INSTANCE(add_up, NOT_ATOMIC)
INSTANCE(add_up_last, NONE)
INSTANCE(add_up_last, NO_FENCE)
INSTANCE(hand_over, NONE)
INSTANCE(hand_over, NO_WAIT_FOR_PHASE)
INSTANCE(hand_over, WAIT_FOR_OTHER_PARITY)
INSTANCE(hand_over, TOO_FEW_ARRIVALS)
INSTANCE(hand_over, NO_BARRIER_MADE)
INSTANCE(hand_over, NO_WAIT_BEFORE_REUSE)
