// lora_up: out[M][columns] = y[M][columns] + scaling * h[M][rank] * factor[rank][columns]: the second product of a LoRA adapter, added
// to that of the base layer; and in the backward pass the same with their gradients. One launch for what are casts of the factor and
// of y, and a product that adds.
//
// Problem. M tokens, 64 to some ten thousand; 1024 to 30000 columns, a multiple of 8; ranks up to 64, even. y is of the products' type,
//   bfloat16 or float16, or float32, and so is `out`; it may be y where they are of one type. Sums are float32, and rounded once.
//
// Roofline. Memory: y is read and `out` written once. 4096 x 8192 from bfloat16 to float32 are 201 MB, 48 us at 4.2 TB/s.
//
// Tile. A block has 256 columns and some rows, a warp 32 of these columns: it keeps the factor of them in registers, and goes from 16
//   rows to the next 16. mma.m16n8k16 with the rows of h as A. Lane 4g + t has columns 4t ... 4t + 3 and 16 + 4t ... 16 + 4t + 3 of rows
//   g and g + 8, so that what a warp reads or writes of a row in one instruction is together: hence column 2t + e of product j of four
//   is the warp's column 16 (j / 2) + 4t + 2 (j % 2) + e. Rows are divided such that all blocks run at once.
//
// Budget. 256 threads, two or three blocks on a multiprocessor; 8 registers of the factor for each 16 ranks; no shared memory. In
//   flight 32 to 64 bytes of y a lane, twice that where it is float32.
//
// Determinism. One product after another, by one warp.
#include "lora/factors.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = 16;       // of mma
constexpr int COLUMNS = 32;    // of a warp
constexpr int PRODUCTS = COLUMNS / 8;
constexpr int RANKS = 16;      // of mma

__device__ inline void store_four(float *to, const float (&from)[4]) {
    *reinterpret_cast<Floats4 *>(to) = {from[0], from[1], from[2], from[3]};
}
template <typename T>
__device__ inline void store_four(T *to, const float (&from)[4]) {
    *reinterpret_cast<Words2 *>(to) = {pack2<T>(from[0], from[1]), pack2<T>(from[2], from[3])};
}

// Y: the type of y, O: of out.
template <typename T, typename Y, typename O, int STEPS>
__device__ inline void lora_up(const Y *y, const T *h, const Factor &factor, float scaling, O *out, T *turned, i64 m, int columns,
                               int rows) {
    constexpr int TOGETHER = STEPS == 1 && sizeof(Y) == 2 ? 2 : 1;  // tiles of rows whose loads are under way at a time
    const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
    const int across = (columns + WARPS * COLUMNS - 1) / (WARPS * COLUMNS);
    const int first_column = int(blockIdx.x % u32(across)) * (WARPS * COLUMNS) + warp * COLUMNS;
    const i64 first_row = i64(blockIdx.x / u32(across)) * rows, last_row = first_row + rows < m ? first_row + rows : m;
    if (first_column >= columns) {
        return;
    }
    const int rank = factor.rank;
    const bool together = factor.rank_stride == 1 && is_aligned(factor.values, 8);
    u32 b[STEPS][PRODUCTS][2];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++) {
            const int column = first_column + j / 2 * 16 + g / 2 * 4 + j % 2 * 2 + g % 2;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int from = RANKS * s + 2 * t + 8 * i;
                b[s][j][i] = factor.pair<T>(from, column, columns, together);
                if (turned != nullptr && first_row == 0 && from < rank && column < columns) {
                    turned[i64(from) * columns + column] = {u16(b[s][j][i])};
                    turned[i64(from + 1) * columns + column] = {u16(b[s][j][i] >> 16)};
                }
            }
        }
    }
    const int column = first_column + 4 * t;
    const bool there[2] = {column < columns, column + 16 < columns};
    for (i64 begin = first_row; begin < last_row; begin += TOGETHER * ROWS) {
        Four<Y> values[TOGETHER][2][2];
        u32 a[TOGETHER][STEPS][4];
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                // Of a row that is not there, another is read: what comes of it is not written.
                const i64 row = begin + u * ROWS + g + 8 * r, read = row < last_row ? row : last_row - 1;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    values[u][r][half] = {};
                    if (y != nullptr && there[half]) {
                        values[u][r][half].load(y + (read * columns + column + 16 * half));
                    }
                }
#pragma unroll
                for (int i = 0; i < 2 * STEPS; i++) {
                    const int from = 8 * i + 2 * t;
                    a[u][i / 2][i % 2 * 2 + r] = from < rank ? *reinterpret_cast<const u32 *>(h + (read * rank + from)) : 0;
                }
            }
        }
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            float sums[PRODUCTS][4] = {};
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
#pragma unroll
                for (int j = 0; j < PRODUCTS; j++) {
                    mma_m16n8k16(T{}, sums[j], a[u][s], b[s][j][0], b[s][j][1]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const i64 row = begin + u * ROWS + g + 8 * r;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float made[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        made[i] = __fmaf_rn(scaling, sums[2 * half + i / 2][2 * r + i % 2], values[u][r][half][i]);
                    }
                    if (row < last_row && there[half]) {
                        store_four(out + (row * columns + column + 16 * half), made);
                    }
                }
            }
        }
    }
}

// y:       [m][columns], or null for zeros
// h:       [m][rank], aligned to 4 bytes
// factor:  of at most RANKS times the kernel's steps
// out:     [m][columns]: y itself, if they are of one type, or apart from it
// turned:  [rank][columns], or null: what the factor is in the products' type, for lora_down
// columns: a multiple of 8
// rows:    of a block, a multiple of ROWS
// Grid: ceil(m / rows) * ceil(columns / (WARPS * COLUMNS)) blocks of THREADS.
#define INSTANCE(name, T, Y, O, steps)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, steps == 4 ? 2 : 3)                                                                   \
        lora_up_##name##_##steps(const Y *y, const T *h, Factor factor, float scaling, O *out, T *turned, i64 m, int columns, \
                                 int rows) {                                                                                  \
        lora_up<T, Y, O, steps>(y, h, factor, scaling, out, turned, m, columns, rows);                                        \
    }

#define INSTANCES(name, T, Y, O)  \
    INSTANCE(name, T, Y, O, 1)    \
    INSTANCE(name, T, Y, O, 2)    \
    INSTANCE(name, T, Y, O, 4)

// Named by the types of the products, of y and of out.
#define TYPES(name, T)                           \
    INSTANCES(name##_f32_f32, T, float, float)   \
    INSTANCES(name##_##name##_f32, T, T, float)  \
    INSTANCES(name##_##name##_##name, T, T, T)

TYPES(bf16, Bf16)
TYPES(f16, F16)
