// experts_sum: y[token] = sum over j of weights[token][j] * out[token][j], what the router's weights make of its experts.
//
// Problem. float16 or bfloat16 rows of a multiple of 8 columns, weights of the same type or float32; slots of no expert are
//   left out.
//
// Roofline. Memory: (top_k + 1) * 2 bytes for each element of y. With few tokens latency alone.
//
// Tile. A thread has eight columns of a token; it loads those of eight slots before it uses the first.
//
// Determinism. j ascending, in float32, rounded once.
#include "common/vectors.cuh"
#include "experts/route.cuh"

constexpr int THREADS = 128;
constexpr int PER_THREAD = 8;
constexpr int AT_ONCE = 8;

template <typename T>
__device__ inline void experts_sum(const T *out, const i64 *ids, const void *weights, u32 wide_weights, T *y, i64 tokens,
                                   int top_k, int experts, int columns) {
    const i64 item = i64(blockIdx.x) * THREADS + threadIdx.x;
    const int per_row = columns / PER_THREAD;
    const i64 token = item / per_row;
    const i64 column = (item - token * per_row) * PER_THREAD;
    wait_for_previous();
    let_next_start();
    if (token >= tokens) {
        return;
    }
    float sums[PER_THREAD] = {};
    for (int begin = 0; begin < top_k; begin += AT_ONCE) {
        Eight<T, true> loaded[AT_ONCE];
        float weight[AT_ONCE];
        bool there[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const i64 slot = token * top_k + begin + j;
            there[j] = begin + j < top_k && expert_of(ids[slot], experts) < experts;
            loaded[j] = {};
            weight[j] = 0.0f;
            if (there[j]) {
                loaded[j].load(out + slot * columns + column);
                weight[j] = wide_weights != 0 ? static_cast<const float *>(weights)[slot]
                                              : to_f32(static_cast<const T *>(weights)[slot]);
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (there[j]) {
#pragma unroll
                for (int c = 0; c < PER_THREAD; c++) {
                    sums[c] = __fmaf_rn(weight[j], loaded[j][c], sums[c]);
                }
            }
        }
    }
    store_values(y + token * columns + column, sums);
}

// out:          [tokens * top_k][columns] aligned to 16 bytes; columns is a multiple of PER_THREAD
// ids:          [tokens * top_k]
// weights:      [tokens * top_k], float32 if `wide_weights`, else T
// y:            [tokens][columns] aligned to 16 bytes
// Grid: ceil(tokens * columns / PER_THREAD / THREADS) blocks of THREADS.
#define INSTANCE(name, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
        experts_sum_##name(const T *out, const i64 *ids, const void *weights, u32 wide_weights, T *y, i64 tokens,       \
                           int top_k, int experts, int columns) {                                                       \
        experts_sum(out, ids, weights, wide_weights, y, tokens, top_k, experts, columns);                               \
    }

INSTANCE(bf16, Bf16)
INSTANCE(f16, F16)
