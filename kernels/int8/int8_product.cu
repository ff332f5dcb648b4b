// The kernels of int8/int8_product.cuh, for up to 8, 16, 32 and 64 rows of x.
#include "int8/int8_product.cuh"

// x:      [m][pitch] int8, aligned to 16 bytes as is each row; m at most as many as in the name
// weight: [n][k] int8, the same; k is a multiple of 16 and more than 0
// Grid: ceil(n / plan.rows) blocks of THREADS. Dynamic shared memory: for each tile of rows, of as many as the warps of a
// block take in whole steps, 512 bytes for 8 columns; for each column that is kept a word, one more for each column of y that
// is in the name, and 16 bytes for each tile; the rings.
#define PRODUCT(name, fragments)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        name(const u8 *x, i64 pitch, const u8 *weight, Epilogue epilogue, int m, int n, int k, ProductPlan plan) {     \
        int8_product<fragments>(x, pitch, weight, epilogue, m, n, k, plan);                                            \
    }

PRODUCT(int8_product_8, 1)
PRODUCT(int8_product_16, 2)
PRODUCT(int8_product_32, 4)
PRODUCT(int8_product_64, 8)
