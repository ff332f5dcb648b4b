// experts_dequantize: the values of one matrix of every expert that any slot has, stacked: out[e] = dequantize(matrices[e]), bit
// for bit what dequantize_blockwise4 makes of each. For products of many slots by torch, in training.
//
// Problem. Matrices of one shape and kind, of any number of values; codes aligned to 16; float16 or bfloat16.
//
// Roofline. Memory: as dequantize_blockwise4, for the experts that have slots. All 128 matrices of 2048 x 768 are 0.1 GB of
//   codes and 0.4 GB of values.
//
// Tile. A block of threads has a tile of one matrix, as in dequantize_blockwise4; tiles of a matrix follow each other. Where an
//   expert has no slots its blocks end at once, and its part of `out` is left as it is.
//
// Determinism. As dequantize_blockwise4.
#include "experts/matrix.cuh"
#include "quant/dequantize_blockwise4.cuh"

// matrices:    [experts] rows of the table of addresses
// ends:        [experts]: where an expert's slots end in the order; an expert's begin where those of the one before end
// out:         [experts][n] aligned to 16
// n:           values of a matrix
// tiles:       of a matrix: ceil(n / TILE)
// block_shift: log2 of the block size, 5 to 12
// quant_type:  NF4 or FP4
// Grid: experts * tiles blocks of THREADS.
#define INSTANCE(name, T, nested)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 5)                                                             \
        experts_dequantize_##name(const Matrix *matrices, const int *ends, T *out, i64 n, u32 tiles, int block_shift,    \
                                  u32 quant_type) {                                                                      \
        const u32 expert = blockIdx.x / tiles;                                                                           \
        if (ends[expert] == (expert > 0 ? ends[expert - 1] : 0)) {                                                       \
            return;                                                                                                      \
        }                                                                                                                \
        const Matrix matrix = matrices[expert];                                                                          \
        dequantize<T, nested>(matrix.codes, matrix.scales(), out + expert * n, n, block_shift, quant_type,               \
                              blockIdx.x - expert * tiles);                                                              \
    }

INSTANCE(bf16, Bf16, false)
INSTANCE(bf16_nested, Bf16, true)
INSTANCE(f16, F16, false)
INSTANCE(f16_nested, F16, true)
