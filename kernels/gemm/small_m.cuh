// What gemm_4bit_small_m_sm75, _sm80 and _sm90 share: y[M][N] = x[M][K] * W[N][K]^T + bias[N] for few rows of x, W in 4 bits,
// the products of token-by-token generation. They are bound by reading W once.
//
// What the layout of the format gives for free:
//   - A block of 64 values of a row of W is 32 consecutive bytes. Each lane of a quad takes 8 of them, 16 values; K of x is
//     permuted the same way. Then one packed byte is one register of the A operand of mma.m16n8k16, so that W is dequantized
//     by one look-up for two weights. W is the operand of 16 rows and x that of 8 columns: M <= 8 costs what M = 1 does.
//   - The look-up table has an entry for each byte, the two unscaled values in T. Lane l has a copy in bank l of shared
//     memory, 256 bytes apart: PRMT puts the byte and the lane together to an address, and no two lanes conflict. On 7.5, where
//     shared memory has no room for it, the values are planes of bytes in registers (common/planes.cuh).
//   - The scale is applied in float32 to the sums of a block, once for 64 products.
//
//   fragment, m16n8k16                             x^T [K][8 columns]: column g, k = 16 t ... of each block
//                                                +------------------+
//     W [16 rows][K]: lane 4g + t has rows g     | accumulators     |   lane 4g + t: rows g and g + 8,
//     and g + 8, bytes 8t ... 8t + 7 of a block  | [16 rows][8]     |   columns 2t and 2t + 1
//                                                +------------------+
//
// A block of threads has some consecutive rows of W, all of K. Groups of warps take tiles of 16 rows in turn; the warps of a
// group have a k-slice each, whose part of x they keep in registers while they walk over the tiles (split-K inside of a block).
//
// Determinism. The sums of the k-slices meet in shared memory and are added in an order that is fixed: the same bits from run
// to run on one device, which decides how many rows a block has. Each weight is its codebook value rounded to T.
#pragma once

#include "common/planes.cuh"
#include "common/scales.cuh"

// Rows of W in a tile, and columns of the product in a fragment: those of mma.m16n8k16.
constexpr int ROWS = 16;
constexpr int COLUMNS = 8;
// Values that share a scale here, and their bytes. Larger blocks of the format are several of these.
constexpr int BLOCK = 64;
constexpr int BLOCK_BYTES = BLOCK / 2;
constexpr int BLOCK_SHIFT = 6;
constexpr u32 MAP_BYTES = 256 * sizeof(float);

// Entry `byte` of a table: its two values in T, for each lane. Eight threads write one, and a warp four neighbouring ones.
template <typename T, int THREADS>
__device__ inline void fill_table(u32 *table, u32 quant_type) {
    const int lane = int(threadIdx.x % WARP);
    const float value = value_of(quant_type, lane % 16);
    for (int item = int(threadIdx.x); item < 256 * 8; item += THREADS) {
        const int byte = item / 8;
        const u32 pair = pack2<T>(__shfl_sync(ALL_LANES, value, byte >> 4), __shfl_sync(ALL_LANES, value, byte & 15));
        *reinterpret_cast<Words4 *>(&table[byte * LANE_TABLE_ROW + item % 8 * 4]) = {pair, pair, pair, pair};
    }
}

template <bool NESTED, int THREADS>
__device__ inline void fill_map(float *map) {
    if (NESTED) {
        for (int code = int(threadIdx.x); code < 256; code += THREADS) {
            map[code] = DYNAMIC_MAP[code];
        }
    }
}

// This lane's part of x for a k-tile: of column g of each fragment the values 16t ... 16t + 15 of each block, zeros of blocks
// that are not there. `row_of(column)` is where the row of x begins that the column is.
template <int FRAGMENTS, int K_TILE, typename Row>
__device__ inline void load_x_rows(u32 (&words)[K_TILE][FRAGMENTS][8], const Row &row_of, int begin, int blocks, int g, int t) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        const Words4 *const from = reinterpret_cast<const Words4 *>(row_of(f * COLUMNS + g) + (i64(begin) * BLOCK + t * 16));
        const auto load = [&](int j, bool there) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Words4 loaded = there ? load_shared_line(from + j * (BLOCK / 8) + half) : Words4{};
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    words[j][f][half * 4 + w] = loaded.word[w];
                }
            }
        };
        // No load waits for another one, nor for a condition.
        if (blocks >= K_TILE) {
#pragma unroll
            for (int j = 0; j < K_TILE; j++) {
                load(j, true);
            }
        } else {
#pragma unroll
            for (int j = 0; j < K_TILE; j++) {
                load(j, j < blocks);
            }
        }
    }
}

// The same of x[m][k]. Columns that are not there get what the last one has, so that all lanes load alike; what comes of them
// is not written.
template <int FRAGMENTS, int K_TILE, typename T>
__device__ inline void load_x(u32 (&words)[K_TILE][FRAGMENTS][8], const T *x, int m, int k, int begin, int blocks, int g,
                              int t) {
    const auto row_of = [&](int column) { return x + i64(column < m ? column : m - 1) * k; };
    load_x_rows<FRAGMENTS, K_TILE>(words, row_of, begin, blocks, g, t);
}

// The A operand of the weights of bytes 2 * PAIR and 2 * PAIR + 1 of `low`, in row g, and of `high`, in row g + 8.
template <int PAIR, typename Table>
__device__ inline void look_up_pair(u32 (&a)[4], const Table &table, u32 low, u32 high) {
    a[0] = look_up<2 * PAIR>(table, low);
    a[1] = look_up<2 * PAIR>(table, high);
    a[2] = look_up<2 * PAIR + 1>(table, low);
    a[3] = look_up<2 * PAIR + 1>(table, high);
}
template <int PAIR>
__device__ inline void look_up_pair(u32 (&a)[4], const Planes &planes, u32 low, u32 high) {
    look_up(planes, low >> (16 * PAIR), a[0], a[2]);
    look_up(planes, high >> (16 * PAIR), a[1], a[3]);
}

// products += those of one block, without its scales.
template <typename T, int FRAGMENTS, typename Table>
__device__ inline void add_products(float (&products)[FRAGMENTS][4], const Table &table, const Words2 &low, const Words2 &high,
                                    const u32 (&x)[FRAGMENTS][8]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 a[2][4];
        look_up_pair<0>(a[0], table, low.word[i], high.word[i]);
        look_up_pair<1>(a[1], table, low.word[i], high.word[i]);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            mma_m16n8k16(T{}, products[f], a[0], x[f][4 * i], x[f][4 * i + 1]);
            mma_m16n8k16(T{}, products[f], a[1], x[f][4 * i + 2], x[f][4 * i + 3]);
        }
    }
}

// sums += scale * (the products of one block). The scales are those of rows g and g + 8.
template <typename T, int FRAGMENTS, typename Table>
__device__ inline void add_block(float (&sums)[FRAGMENTS][4], const Table &table, const Words2 &low, const Words2 &high,
                                 const u32 (&x)[FRAGMENTS][8], float low_scale, float high_scale) {
    float products[FRAGMENTS][4] = {};
    add_products<T>(products, table, low, high, x);
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        sums[f][0] = __fmaf_rn(low_scale, products[f][0], sums[f][0]);
        sums[f][1] = __fmaf_rn(low_scale, products[f][1], sums[f][1]);
        sums[f][2] = __fmaf_rn(high_scale, products[f][2], sums[f][2]);
        sums[f][3] = __fmaf_rn(high_scale, products[f][3], sums[f][3]);
    }
}
