// lora_up: out[M][columns] = y[M][columns] + scaling * h[M][rank] * factor[rank][columns]: the second product of a LoRA adapter, added
// to that of the base layer; and in the backward pass the same with their gradients. One launch for what are casts of the factor and
// of y, and a product that adds.
//
// Problem. M tokens, 64 to some ten thousand; 1024 to 30000 columns, a multiple of 8; ranks up to 64, even. y is of the products' type,
//   bfloat16 or float16, or float32, and so is `out`; it may be y where they are of one type. Sums are float32, and rounded once.
//
// Roofline. Memory: y is read and `out` written once. 4096 x 8192 from bfloat16 to float32 are 201 MB, 47.9 us at 4.2 TB/s; on an H200 it
//   takes 68.0 with 16 ranks, 79.7 with 64 (benches/RESULTS.md). torch takes two launches for it, a cast of y
//   and a product that adds, of 98 and 107 us.
//
// Tile. A block has 8 warps side by side and some rows. A warp has 32 columns, or 64 where `out` is of 16 bits: it keeps the factor of
//   them in registers, and goes from 16 rows to the next 16. mma.m16n8k16 with the rows of h as A. Lane 4g + t reads and writes pieces
//   of 4 or 8 columns of rows g and g + 8, so that four lanes have 64 bytes of a row together, and takes the factor's columns in the same order.
//   Rows are divided such that all blocks run at once.
//
// Budget. 256 threads, two or three blocks on a multiprocessor; 8 registers of the factor for each 16 ranks; no shared memory. In
//   flight 32 to 64 bytes of y a lane, twice that where it is float32.
//
// Tried on an H200: eight columns of a lane together where `out` is float32, which makes two stores of half a sector each: 70 us; 32
//   columns of a warp where it is of 16 bits: 81 in place of 44 us; blocks of few rows, each of which reads the factor: 157 in place of
//   80 us with 64 ranks.
//
// Determinism. One product after another, by one warp.
#include "lora/factors.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = 16;       // of mma
constexpr int COLUMNS = 32;    // of a warp, where `out` is float32 or ranks are more than 32; else twice as many
constexpr int RANKS = 16;      // of mma

// Y: the type of y, O: of out.
template <typename T, typename Y, typename O, int STEPS>
__device__ inline void lora_up(const Y *y, const T *h, const Factor &factor, float scaling, O *out, T *turned, i64 m, int columns,
                               int rows) {
    // Values of `out` that a lane writes at a time, how many of these it has of a row, and products of mma for the warp's columns.
    constexpr int PIECE = 16 / int(sizeof(O)), PIECES = sizeof(O) == 2 && STEPS == 4 ? 1 : 2;
    constexpr int ACROSS = 4 * PIECE * PIECES, PRODUCTS = ACROSS / 8, OF_PIECE = PIECE / 2;
    static_assert(ACROSS == (sizeof(O) == 2 && STEPS < 4 ? 2 : 1) * COLUMNS, "as the launcher counts");
    constexpr int TOGETHER = STEPS == 1 && sizeof(Y) == 2 ? 2 : 1;  // tiles of rows whose loads are under way at a time
    const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
    const int across = (columns + WARPS * ACROSS - 1) / (WARPS * ACROSS);
    const int first_column = int(blockIdx.x % u32(across)) * (WARPS * ACROSS) + warp * ACROSS;
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
            const int column = first_column + (j / OF_PIECE * 4 + g / 2) * PIECE + j % OF_PIECE * 2 + g % 2;
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
    // The first of a piece.
    const auto column_of = [&](int piece) { return first_column + (4 * piece + t) * PIECE; };
    for (i64 begin = first_row; begin < last_row; begin += TOGETHER * ROWS) {
        Values<Y, PIECE> values[TOGETHER][2][PIECES];
        u32 a[TOGETHER][STEPS][4];
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                // Of a row that is not there, another is read: what comes of it is not written.
                const i64 row = begin + u * ROWS + g + 8 * r, read = row < last_row ? row : last_row - 1;
#pragma unroll
                for (int p = 0; p < PIECES; p++) {
                    values[u][r][p] = {};
                    if (y != nullptr && column_of(p) < columns) {
                        values[u][r][p].load(y + (read * columns + column_of(p)));
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
                for (int p = 0; p < PIECES; p++) {
                    float made[PIECE];
#pragma unroll
                    for (int i = 0; i < PIECE; i++) {
                        made[i] = __fmaf_rn(scaling, sums[p * OF_PIECE + i / 2][2 * r + i % 2], values[u][r][p][i]);
                    }
                    if (row < last_row && column_of(p) < columns) {
                        store_values(out + (row * columns + column_of(p)), made);
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
// Grid: ceil(m / rows) * ceil(columns / (WARPS * COLUMNS)) blocks of THREADS; COLUMNS twice as many where that says so.
#define INSTANCE(name, T, Y, O, steps, blocks)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks)                                                             \
        lora_up_##name##_##steps(const Y *y, const T *h, Factor factor, float scaling, O *out, T *turned, i64 m, int columns, \
                                 int rows) {                                                                                  \
        lora_up<T, Y, O, steps>(y, h, factor, scaling, out, turned, m, columns, rows);                                        \
    }

#define INSTANCES(name, T, Y, O, blocks)  \
    INSTANCE(name, T, Y, O, 1, blocks)    \
    INSTANCE(name, T, Y, O, 2, blocks)    \
    INSTANCE(name, T, Y, O, 4, 2)

// Named by the types of the products, of y and of out.
#define TYPES(name, T)                              \
    INSTANCES(name##_f32_f32, T, float, float, 3)   \
    INSTANCES(name##_##name##_f32, T, T, float, 3)  \
    INSTANCES(name##_##name##_##name, T, T, T, 2)

TYPES(bf16, Bf16)
TYPES(f16, F16)
