// Operands of the matrix units in shared memory, in each of the forms that a descriptor can say:
// out[64][N] = a[64][16] * b[N][16]^T.
#include "common/wgmma.cuh"

constexpr int GROUP = 128;
constexpr int OPERAND_COLUMNS = 128;

// Where element (row, k) is, in units of 16-bit values, before the swizzle: rows of `span` bytes, eight of them a pattern;
// without a swizzle 8 by 16 bytes a matrix.
template <int SPAN, bool TRANSPOSED>
__device__ inline u32 element_at(int row, int k, int rows) {
    if (SPAN == 0) {
        const int matrix = TRANSPOSED ? k / 8 * (rows / 8) + row / 8 : row / 8 * 2 + k / 8;
        return u32(matrix * 64 + (TRANSPOSED ? k % 8 * 8 + row % 8 : row % 8 * 8 + k % 8));
    }
    constexpr int TOGETHER = SPAN == 0 ? 1 : SPAN / 2;
    const u32 plain = TRANSPOSED ? u32((row / TOGETHER * 16 + k) * TOGETHER + row % TOGETHER) : u32(row * TOGETHER + k);
    const u32 byte = plain * 2;
    return (byte ^ (byte >> 7 & (SPAN == 0 ? 0 : SPAN / 16 - 1)) << 4) / 2;
}

template <int SPAN, bool TRANSPOSED>
__device__ inline u64 describe(const void *begin, int rows) {
    const u32 address = emulator::shared_address(begin);
    u64 leading, stride;
    if (SPAN == 0) {
        leading = TRANSPOSED ? u64(rows / 8) * 128 : 128;
        stride = TRANSPOSED ? 128 : 256;
    } else {
        leading = TRANSPOSED ? 16 * SPAN : 16;
        stride = 8 * SPAN;
    }
    const u64 kind = SPAN == 128 ? 1 : SPAN == 64 ? 2 : SPAN == 32 ? 3 : 0;
    return u64(address >> 4) | leading >> 4 << 16 | stride >> 4 << 32 | kind << 62;
}

template <int SPAN, bool A_TRANSPOSED, bool B_TRANSPOSED>
__device__ inline void by_descriptor(const u16 *a, const u16 *b, float *out) {
    DYNAMIC_SHARED_1024(shared);
    u16 *const a_tile = reinterpret_cast<u16 *>(shared), *const b_tile = reinterpret_cast<u16 *>(shared + 8192);
    const int thread = int(threadIdx.x);
    for (int i = thread; i < OPERAND_COLUMNS * 16; i += GROUP) {
        b_tile[element_at<SPAN, B_TRANSPOSED>(i / 16, i % 16, OPERAND_COLUMNS)] = b[i];
        if (i < 64 * 16) {
            a_tile[element_at<SPAN, A_TRANSPOSED>(i / 16, i % 16, 64)] = a[i];
        }
    }
    emulator::proxy_fence();
    __syncthreads();
    float sums[OPERAND_COLUMNS / 2];
    products_begin();
    emulator::multiply_issued({emulator::Values::f16, false, OPERAND_COLUMNS, reinterpret_cast<u32 *>(sums), nullptr,
                               describe<SPAN, A_TRANSPOSED>(a_tile, 64), describe<SPAN, B_TRANSPOSED>(b_tile, OPERAND_COLUMNS),
                               A_TRANSPOSED, B_TRANSPOSED},
                              emulator::Site::here());
    products_commit();
    products_wait<0>();
    const int row = thread / WARP * 16 + thread % WARP / 4, column = thread % 4 * 2;
    for (int i = 0; i < OPERAND_COLUMNS / 2; i++) {
        out[(row + i / 2 % 2 * 8) * OPERAND_COLUMNS + i / 4 * 8 + column + i % 2] = sums[i];
    }
}

#define OPERAND_ENTRY(form) extern "C" __global__ void __launch_bounds__(GROUP) operands_##form

#define OPERANDS(span) \
    OPERAND_ENTRY(span##_rows_rows)(const u16 *a, const u16 *b, float *out) { \
        by_descriptor<span, false, false>(a, b, out); \
    } \
    OPERAND_ENTRY(span##_rows_columns)(const u16 *a, const u16 *b, float *out) { \
        by_descriptor<span, false, true>(a, b, out); \
    } \
    OPERAND_ENTRY(span##_columns_rows)(const u16 *a, const u16 *b, float *out) { \
        by_descriptor<span, true, false>(a, b, out); \
    }

OPERANDS(0)
OPERANDS(32)
OPERANDS(64)
OPERANDS(128)
