// What lanes and threads do together, one kernel for each kind: the results are compared with those of numpy.
#include "common/types.cuh"

constexpr int THREADS = 64;
constexpr int RESULTS = 16;

// out: [THREADS][RESULTS], of in [THREADS]
extern "C" __global__ void __launch_bounds__(THREADS) collect(const u32 *in, u32 *out) {
    const u32 x = in[threadIdx.x];
    const u32 lane = threadIdx.x % WARP;
    // The lanes of each half of a warp have masks of their own.
    const u32 half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    u32 *const to = out + threadIdx.x * RESULTS;
    to[0] = __shfl_sync(ALL_LANES, x, int(lane) + 5, 8);
    to[1] = __shfl_up_sync(ALL_LANES, x, 3);
    to[2] = __shfl_down_sync(half, x, 2, 16);
    to[3] = __shfl_xor_sync(ALL_LANES, x, 9);
    to[4] = __ballot_sync(half, x % 3 == 0);
    to[5] = u32(__any_sync(half, x % 50 == 0));
    to[6] = u32(__all_sync(half, x % 50 != 0));
    to[7] = __match_any_sync(ALL_LANES, x % 4);
    to[8] = __reduce_add_sync(half, x);
    to[9] = __reduce_min_sync(ALL_LANES, x);
    to[10] = __reduce_max_sync(ALL_LANES, x);
    to[11] = __reduce_xor_sync(ALL_LANES, x);
    to[12] = u32(__syncthreads_count(x % 3 == 0));
    to[13] = u32(__syncthreads_or(x == 1000));
    to[14] = u32(__syncthreads_and(x < 1000));
    const double wide = __shfl_xor_sync(ALL_LANES, double(x) + 0.25, 16);
    to[15] = u32(wide * 4.0);
}

// d[16][8] = a[16][16] * b[16][8] by one warp, operands by way of shared memory.
template <typename T>
__device__ inline void multiply_tile(const T *a, const T *b, float *d) {
    SHARED_ARRAY(Words4, rows_of_a, [16][2]);
    SHARED_ARRAY(Words4, rows_of_b, [16]);
    const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
    rows_of_a[lane / 2][lane % 2] = load_stream(reinterpret_cast<const Words4 *>(a) + lane);
    if (lane < 16) {
        rows_of_b[lane] = load_stream(reinterpret_cast<const Words4 *>(b) + lane);
    }
    __syncwarp();
    u32 a_words[4], b_words[2];
    emulator::load_matrices<4, false>(a_words, &rows_of_a[lane % 16][lane / 16], emulator::Site::here());
    emulator::load_matrices<2, true>(b_words, &rows_of_b[lane % 16], emulator::Site::here());
    float sums[4] = {};
    mma_m16n8k16(T{}, sums, a_words, b_words[0], b_words[1]);
    for (int e = 0; e < 4; e++) {
        d[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sums[e];
    }
}

extern "C" __global__ void __launch_bounds__(WARP) multiply_bf16(const Bf16 *a, const Bf16 *b, float *d) {
    multiply_tile(a, b, d);
}
extern "C" __global__ void __launch_bounds__(WARP) multiply_f16(const F16 *a, const F16 *b, float *d) {
    multiply_tile(a, b, d);
}
