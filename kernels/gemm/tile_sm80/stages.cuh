// What comes to shared memory for gemm_4bit_tile_sm80, by all threads: x and codes in stages, by cp.async, and W dequantized.
#pragma once

#include "gemm/tile_sm80/shape.cuh"

// The copies of one thread. Rows that are not there are read as the last one: what comes of them is not written.
template <int TOKENS>
struct Copier {
    using S = Shape<TOKENS>;
    static constexpr int X_PIECES = X_ROW_BYTES / 16, ROWS_AT_ONCE = THREADS / X_PIECES;
    static constexpr int CODES_PIECES = CODES_ROW_BYTES / 16;
    static_assert(ROWS * CODES_PIECES == THREADS, "a piece of codes for each thread");
    const u8 *x[TOKENS / ROWS_AT_ONCE], *codes;  // of the next k-tile
    u32 x_to, codes_to;

    __device__ Copier(const void *all_x, const u8 *packed, int m, int n, int k, const Tile &tile) {
        const int thread = int(threadIdx.x), row = thread / X_PIECES, piece = thread % X_PIECES;
        const u8 *const bytes = static_cast<const u8 *>(all_x) + (i64(tile.first) * X_ROW_BYTES + piece * 16);
#pragma unroll
        for (int i = 0; i < TOKENS / ROWS_AT_ONCE; i++) {
            const int token = tile.token + row + i * ROWS_AT_ONCE;
            x[i] = bytes + i64(token < m ? token : m - 1) * k * 2;
        }
        static_assert(ROWS_AT_ONCE % 8 == 0, "all rows of a thread have their pieces in the same places");
        x_to = piece_offset(u32(row), u32(piece));
        const int code_row = tile.row + thread / CODES_PIECES;
        codes = packed + (i64(code_row < n ? code_row : n - 1) * (k / 2) + tile.first * CODES_ROW_BYTES +
                          thread % CODES_PIECES * 16);
        codes_to = S::CODES_AT + u32(thread) * 16;
    }

    // Starts the copies of the next k-tile: of x, and of codes, which are a k-tile ahead.
    __device__ void copy_x(u8 *stage) {
#pragma unroll
        for (int i = 0; i < TOKENS / ROWS_AT_ONCE; i++) {
            copy_async(reinterpret_cast<Words4 *>(stage + x_to + i * (ROWS_AT_ONCE * X_ROW_BYTES)),
                       reinterpret_cast<const Words4 *>(x[i]));
            x[i] += X_ROW_BYTES;
        }
    }
    __device__ void copy_codes(u8 *stage) {
        copy_async(reinterpret_cast<Words4 *>(stage + codes_to), reinterpret_cast<const Words4 *>(codes));
        codes += CODES_ROW_BYTES;
    }
};

// What one thread dequantizes: of row thread / 2 of the tile 32 columns of each k-tile, which have one scale. That is read
// before it is wanted.
struct Dequantizer {
    const Scales &scales;
    const float *map;
    float offset;
    i64 first;  // of W's values, this thread's first of k-tile 0
    int block_shift;
    bool nested;
    // Plain: the scale. Nested: the second scale, and the code.
    float factor;
    u32 code;

    // `map` is written here, and may be read after a barrier.
    __device__ Dequantizer(const Scales &scales, float *map, const Tile &tile, int n, int k, int block_shift)
        : scales(scales), map(map), offset(0.0f), block_shift(block_shift), nested(scales.absmax == nullptr), code(0) {
        const int row = tile.row + int(threadIdx.x) / 2;
        first = i64(row < n ? row : n - 1) * k + int(threadIdx.x) % 2 * HALF;
        if (nested) {
            static_assert(THREADS == 256, "entries of the map");
            map[threadIdx.x] = DYNAMIC_MAP[threadIdx.x];
            offset = *scales.offset;
        }
    }

    __device__ void load_scale(int k_tile) {
        const i64 block = (first + k_tile * K_TILE) >> block_shift;
        if (nested) {
            code = scales.codes[block];
            factor = scales.absmax2[block >> NESTED_SHIFT];
        } else {
            factor = scales.absmax[block];
        }
    }

    // With the scale that was loaded; `codes` of the tile, `w` [ROWS][K_TILE].
    template <typename T>
    __device__ void dequantize(const Codebook &codebook, const u8 *codes, u8 *w) const {
        const u32 row = threadIdx.x / 2, half = threadIdx.x % 2;
        const Planes planes =
            scaled_planes<T>(codebook, nested ? RawScale<true>{code, factor}.value(map, offset) : factor);
        const Words4 mine = *reinterpret_cast<const Words4 *>(codes + row * CODES_ROW_BYTES + half * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Words4 values;
            look_up(planes, mine.word[i], values.word[0], values.word[1]);
            look_up(planes, mine.word[i] >> 16, values.word[2], values.word[3]);
            *reinterpret_cast<Words4 *>(w + piece_offset(row, half * 4 + u32(i))) = values;
        }
    }
};
