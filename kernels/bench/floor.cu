// floor: what a kernel that only moves memory takes, the floors of benches/cuda_*.py. Not part of the wheel.
//
// Tile. Every block of 256 threads has its share of the input and of the output; a thread has four reads of 16 bytes in flight.
#include "common/types.cuh"

constexpr int THREADS = 256;
// 16-byte accesses in flight in each thread.
constexpr int DEPTH = 4;

// This block's share of `count`.
__device__ inline void share(i64 count, i64 &begin, i64 &end) {
    begin = count * blockIdx.x / gridDim.x;
    end = count * (i64(blockIdx.x) + 1) / gridDim.x;
}

__device__ inline u32 read_share(const Words4 *in, i64 count) {
    i64 begin, end;
    share(count, begin, end);
    u32 mixed = 0;
    for (i64 i = begin + threadIdx.x; i < end; i += THREADS * DEPTH) {
        Words4 words[DEPTH] = {};
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (i + d * THREADS < end) {
                words[d] = load_stream(in + i + d * THREADS);
            }
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            mixed ^= words[d].word[0] ^ words[d].word[1] ^ words[d].word[2] ^ words[d].word[3];
        }
    }
    return mixed;
}

// Reads in[count]. sink: [1], written when the data are such that this never happens.
extern "C" __global__ void __launch_bounds__(THREADS) floor_read(const Words4 *in, i64 count, u32 *sink) {
    const u32 mixed = read_share(in, count);
    if (mixed == 0x9e3779b9u) {
        *sink = mixed;
    }
}

// Reads in[in_count] and writes out[out_count], every block of threads its share of both.
extern "C" __global__ void __launch_bounds__(THREADS)
    floor_traffic(const Words4 *in, i64 in_count, Words4 *out, i64 out_count) {
    const u32 mixed = read_share(in, in_count);
    i64 begin, end;
    share(out_count, begin, end);
    for (i64 i = begin + threadIdx.x; i < end; i += THREADS) {
        store_words(out + i, {mixed, mixed, mixed, mixed});
    }
}
