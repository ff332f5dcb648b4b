// int8_activations, int8_outliers, int8_codes: activations to int8 codes, for products with an 8-bit weight. Each value is
// rounded to the 11 significant bits of a float16 first, its exponent being float32's; then codes are those of int8/rows.cuh.
//
// Problem. Matrices of any shape and alignment; float32, float16, bfloat16. With a threshold, values from it on are outliers:
//   they do not count for the scale of their row, and their columns have codes 0 in all rows, as the product adds those
//   columns in floats.
//
// Roofline. Memory, and for few rows the latency of a launch: each lets the next start at once, to wait for it there.
//
// Tile. int8_activations as int8_rowwise: a warp or a block of threads has a row, which is read once. With a threshold for the
//   kernels of many rows: each block leaves the mask of the columns in which its rows have outliers, and gives all columns
//   codes; int8_panel then joins the masks, lists the columns and copies x of the first 256 of them to rows that are read at
//   once. Products take codes of W as 0 in these columns, so that no row is read twice.
//   For the others two kernels: the first finds scales, and for each group of rows a mask of columns; the second has panels of
//   2048 columns, of which it joins the masks, and one block that lists the columns.
//
// Shared memory. The largest magnitude of each warp, twice; the mask of a block, of a group of rows, or of a panel.
//
// Budget. __launch_bounds__(256, 3) for int8_activations, or 2 for float32, up to 100 registers; of a row up to 8192 values.
//
// Determinism. The same bits everywhere; nothing has to be zero before.
#include "int8/outliers.cuh"
#include "int8/rows.cuh"

// Columns that a block of threads codes together.
constexpr int PANEL = THREADS * GROUP;
constexpr int PANEL_WORDS = PANEL / WARP;
constexpr int PANEL_THREADS = 1024;  // of int8_panel

// The nearest value of 11 significant bits, ties to even. Exact for 16-bit floats.
template <typename T>
__device__ inline float round_to_11_bits(float x) {
    if constexpr (sizeof(T) == 4) {
        const u32 bits = __float_as_uint(x);
        const u32 rounded = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
        return (bits & 0x7f800000) == 0x7f800000 ? x : __uint_as_float(rounded);
    } else {
        return x;
    }
}

// Eight values, rounded unless they are to be taken as they are.
template <typename T>
struct Activations {
    Eight<T, true> raw;
    bool exact = false;

    __device__ float operator[](int k) const { return exact ? raw[k] : round_to_11_bits<T>(raw[k]); }
    __device__ float largest(float max) const {
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            max = fmaxf(max, fabsf((*this)[k]));
        }
        return max;
    }
    // The largest magnitude below the threshold, or `max`; bit k of `outliers`: whether value k is one.
    __device__ float largest_below(float threshold, float max, u32 &outliers) const {
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            const float size = fabsf((*this)[k]);
            const bool outlier = size >= threshold;
            outliers |= u32(outlier) << k;
            max = fmaxf(max, outlier ? 0.0f : size);
        }
        return max;
    }
};

// How a warp or a block of threads walks along a row.
struct Walk {
    i64 begin, step, columns;

    __device__ u32 left(i64 i) const { return i >= columns ? 0 : columns - i < GROUP ? u32(columns - i) : u32(GROUP); }
};

// The largest magnitude below the threshold, or `max`; bit k of `outliers`: whether value k is one. A threshold of NaN is none.
template <typename Values>
__device__ inline float largest_below(const Values &x, float threshold, float max, u32 &outliers) {
    float all = 0.0f;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
        all = fmaxf(all, fabsf(x[k]));
    }
    outliers = 0;
    if (all >= threshold) {
        all = 0.0f;
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            const float size = fabsf(x[k]);
            const bool outlier = size >= threshold;
            outliers |= u32(outlier) << k;
            all = fmaxf(all, outlier ? 0.0f : size);
        }
    }
    return fmaxf(max, all);
}

// `masks` is null without a threshold.
template <typename T>
__device__ inline void activations(const T *input, i8 *codes, float *scales, u32 *masks, i64 rows, i64 columns, i64 pitch,
                                   float threshold) {
    SHARED_ARRAY(float, warp_max, [2][WARPS]);
    DYNAMIC_SHARED(shared);
    u32 *const mask = reinterpret_cast<u32 *>(shared);
    const u32 thread = threadIdx.x, warp = thread / WARP;
    const bool alone = columns <= WARP_ROW;
    const i64 teams = alone ? i64(gridDim.x) * WARPS : i64(gridDim.x);
    const i64 team = alone ? i64(blockIdx.x) * WARPS + warp : i64(blockIdx.x);
    const i64 within = alone ? thread % WARP : thread;
    const Walk walk = {within * GROUP, (alone ? WARP : THREADS) * GROUP, columns};
    const i64 words = masks == nullptr ? 0 : mask_words(int(columns));
    const float limit = masks == nullptr ? __uint_as_float(0x7fffffffu) : threshold;
    let_next_start();
    if (masks != nullptr) {
        for (i64 i = thread; i < words; i += THREADS) {
            mask[i] = 0;
        }
        __syncthreads();
    }
    wait_for_previous();

    const auto note = [&](i64 i, u32 outliers) {
        if (outliers != 0) {
            atomicOr(&mask[i / WARP], outliers << (i % WARP));
        }
    };
    u32 turn = 0;
    for (i64 row = team; row < rows; row += teams, turn ^= 1) {
        const T *const in = input + row * columns;
        i8 *const out = codes + row * pitch;
        const bool wide = is_aligned(in, 16);
        Activations<T> x[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const i64 i = walk.begin + d * walk.step;
            if (i < columns) {
                x[d].raw.load(in + i, walk.left(i), wide);
            }
        }
        float max = 0.0f;
        u32 outliers = 0;
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const i64 i = walk.begin + d * walk.step;
            if (i < columns) {
                max = largest_below(x[d], limit, max, outliers);
                note(i, outliers);
            }
        }
        for (i64 i = walk.begin + DEPTH * walk.step; i < columns; i += walk.step) {
            Activations<T> more;
            more.raw.load(in + i, walk.left(i), wide);
            max = largest_below(more, limit, max, outliers);
            note(i, outliers);
        }
        max = largest_of_row(max, warp_max[turn], alone);
        if (within == 0) {
            scales[row] = max;
        }
        const Division division(max);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const i64 i = walk.begin + d * walk.step;
            if (i < columns) {
                store_codes(out + i, x[d], walk.left(i), division);
            }
        }
        for (i64 i = walk.begin + DEPTH * walk.step; i < columns; i += walk.step) {
            Activations<T> more;
            more.raw.load(in + i, walk.left(i), wide);
            store_codes(out + i, more, walk.left(i), division);
        }
        if (columns + within < pitch) {
            out[columns + within] = 0;
        }
    }
    if (masks != nullptr) {
        __syncthreads();
        for (i64 i = thread; i < words; i += THREADS) {
            masks[i64(blockIdx.x) * words + i] = mask[i];
        }
    }
}

// x of columns with outliers, together. Each block of threads joins all masks; the first also writes what that gives.
struct Found {
    int *count;
    int *columns;  // [columns], ascending
    u32 *mask;     // [mask_words(columns)]
};

template <typename X>
__device__ inline void gather_panel(const X *input, const u32 *masks, int groups, const Found &found, X *panel, i64 rows,
                                    int columns) {
    SHARED_ARRAY(int, list, [PANEL_COLUMNS]);
    DYNAMIC_SHARED(shared);
    u32 *const mask = reinterpret_cast<u32 *>(shared);
    const int thread = int(threadIdx.x), words = mask_words(columns);
    for (int i = thread; i < words; i += PANEL_THREADS) {
        mask[i] = 0;
    }
    __syncthreads();
    let_next_start();
    wait_for_previous();
    join_masks(mask, masks, groups, words, thread, PANEL_THREADS);
    __syncthreads();
    const int count = count_columns(mask, words), warp = thread / WARP;
    if (warp == 0) {
        list_columns(list, mask, words, 0, PANEL_COLUMNS);
    } else if (warp == 1 && blockIdx.x == 0) {
        list_columns(found.columns, mask, words, 0, count);
    }
    if (blockIdx.x == 0) {
        for (int i = thread; i < words; i += PANEL_THREADS) {
            found.mask[i] = mask[i];
        }
        if (thread == 0) {
            *found.count = count;
        }
    }
    __syncthreads();
    const int whole = (count + PANEL_UNIT - 1) / PANEL_UNIT * PANEL_UNIT, width = whole < PANEL_COLUMNS ? whole : PANEL_COLUMNS;
    const i64 own = rows > blockIdx.x ? (rows - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
#pragma unroll 2
    for (i64 i = thread; i < own * width; i += PANEL_THREADS) {
        const i64 row = blockIdx.x + u32(i) / u32(width) * i64(gridDim.x);
        const int at = int(u32(i) % u32(width));
        panel[row * PANEL_COLUMNS + at] = at < count ? input[row * columns + list[at]] : X{};
    }
}

// With one, the first kernel: each block of threads has the rows that are its number, and every `gridDim.x`-th from there.
template <typename T>
__device__ inline void find_outliers(const T *input, float *scales, u32 *masks, i64 rows, i64 columns, float threshold,
                                     u32 exact) {
    SHARED_ARRAY(float, warp_max, [2][WARPS]);
    DYNAMIC_SHARED(shared);
    u32 *const mask = reinterpret_cast<u32 *>(shared);
    const u32 thread = threadIdx.x;
    const i64 words = (columns + WARP - 1) / WARP;
    const Walk walk = {thread * GROUP, THREADS * GROUP, columns};
    for (i64 i = thread; i < words; i += THREADS) {
        mask[i] = 0;
    }
    __syncthreads();
    let_next_start();
    wait_for_previous();

    u32 turn = 0;
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
        const T *const in = input + row * columns;
        const bool wide = is_aligned(in, 16);
        float max = 0.0f;
        for (i64 first = walk.begin; first < columns; first += DEPTH * walk.step) {
            Activations<T> x[DEPTH];
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const i64 i = first + d * walk.step;
                x[d].exact = exact != 0;
                x[d].raw.load(in + i, walk.left(i), wide);
            }
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const i64 i = first + d * walk.step;
                u32 outliers = 0;
                max = x[d].largest_below(threshold, max, outliers);
                if (outliers != 0) {
                    atomicOr(&mask[i / WARP], outliers << (i % WARP));
                }
            }
        }
        max = largest_of_row(max, warp_max[turn], false);
        if (thread == 0) {
            scales[row] = max;
        }
    }
    __syncthreads();
    for (i64 i = thread; i < words; i += THREADS) {
        masks[i64(blockIdx.x) * words + i] = mask[i];
    }
}

// Where the list of outlier columns goes.
struct Outliers {
    int *count;
    int *columns;  // [columns], ascending
    u8 *flags;     // [columns], 1 for these and 0 for others; or null
};

// The list, by one block of threads: a thread has some words of the mask, one behind the other.
__device__ inline void list_outliers(const u32 *masks, i64 groups, i64 words, i64 columns, const Outliers &outliers) {
    SHARED_ARRAY(int, warp_sums, [WARPS]);
    const u32 thread = threadIdx.x, lane = thread % WARP;
    const auto word_of = [&](i64 i) {
        u32 word = 0;
#pragma unroll 8
        for (i64 group = 0; group < groups; group++) {
            word |= masks[group * words + i];
        }
        return word;
    };
    int before = 0;
    for (i64 first = 0; first < words; first += THREADS) {
        const i64 i = first + thread;
        const u32 word = i < words ? word_of(i) : 0;
        // How many are in the words before this one.
        const int own = __popc(word);
        int sum = own;
        for (u32 by = 1; by < WARP; by *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, by);
            sum += lane >= by ? other : 0;
        }
        if (lane == WARP - 1) {
            warp_sums[thread / WARP] = sum;
        }
        __syncthreads();
        int place = before + sum - own;
        for (u32 warp = 0; warp < WARPS; warp++) {
            place += warp < thread / WARP ? warp_sums[warp] : 0;
            before += warp_sums[warp];
        }
        __syncthreads();
        for (u32 left = word; left != 0; left &= left - 1) {
            outliers.columns[place++] = int(i) * WARP + __ffs(int(left)) - 1;
        }
        if (outliers.flags != nullptr) {
            for (i64 c = i * WARP; c < (i + 1) * WARP && c < columns; c++) {
                outliers.flags[c] = u8(word >> (c - i * WARP) & 1);
            }
        }
    }
    if (thread == 0) {
        *outliers.count = before;
    }
}

// The second kernel. The last block of threads makes the list; the others have a panel of columns each, of rows some way
// apart.
template <typename T>
__device__ inline void code_activations(const T *input, const float *scales, const u32 *masks, i64 groups, i8 *codes,
                                        const Outliers &outliers, i64 rows, i64 columns, i64 pitch, u32 exact) {
    SHARED_ARRAY(u32, mask, [PANEL_WORDS]);
    const u32 thread = threadIdx.x;
    const i64 words = (columns + WARP - 1) / WARP, panels = (columns + PANEL - 1) / PANEL;
    let_next_start();
    wait_for_previous();
    if (blockIdx.x == gridDim.x - 1) {
        list_outliers(masks, groups, words, columns, outliers);
        return;
    }
    const i64 panel = blockIdx.x % panels, begin = panel * PANEL;
    const i64 rows_apart = (gridDim.x - 1) / panels;
    if (thread < PANEL_WORDS) {
        mask[thread] = 0;
    }
    __syncthreads();
    // Threads that follow each other have words that do.
    const i64 word = begin / WARP + thread % PANEL_WORDS;
    u32 bits = 0;
    if (word < words) {
#pragma unroll 8
        for (i64 group = thread / PANEL_WORDS; group < groups; group += THREADS / PANEL_WORDS) {
            bits |= masks[group * words + word];
        }
    }
    if (bits != 0) {
        atomicOr(&mask[thread % PANEL_WORDS], bits);
    }
    __syncthreads();
    const u32 flags = mask[thread * GROUP / WARP] >> (thread * GROUP % WARP);
    const Walk walk = {begin + thread * GROUP, PANEL, columns};
    for (i64 row = blockIdx.x / panels; row < rows; row += rows_apart) {
        const T *const in = input + row * columns;
        i8 *const out = codes + row * pitch;
        if (walk.begin < columns) {
            Activations<T> x;
            x.exact = exact != 0;
            x.raw.load(in + walk.begin, walk.left(walk.begin), is_aligned(in, 16));
            store_codes(out + walk.begin, x, walk.left(walk.begin), Division(scales[row]), flags);
        }
        if (panel == 0 && columns + thread < pitch) {
            out[columns + thread] = 0;
        }
    }
}

// input:     [rows][columns] aligned to its elements
// codes:     [rows][pitch] int8; of each row `columns`, then zeros, less than 16
// scales:    [rows]
// masks:     [groups][ceil(columns / 32)]
// threshold: more than 0
// exact:     whether values are taken as they are, not rounded
// Grid, in blocks of THREADS: any number for the first two; `groups` is the second's. For the third the product of
// ceil(columns / PANEL) and a number of rows to be coded at a time, and one more. Dynamic shared memory: of the second, a
// word for each 32 columns.
// For int8_activations masks are [blocks of threads][mask_words(columns)], aligned to 16 bytes, or null without a threshold; and
// dynamic shared memory is a mask then. int8_panel takes them, any number of blocks of PANEL_THREADS, and a mask of shared memory;
// panel: [rows][PANEL_COLUMNS], zero behind the last column up to a multiple of PANEL_UNIT.
#define INSTANCE(name, T, blocks)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks)                                                      \
        int8_activations_##name(const T *input, i8 *codes, float *scales, u32 *masks, i64 rows, i64 columns,           \
                                i64 pitch, float threshold) {                                                          \
        activations<T>(input, codes, scales, masks, rows, columns, pitch, threshold);                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                           \
        int8_outliers_##name(const T *input, float *scales, u32 *masks, i64 rows, i64 columns, float threshold,        \
                             u32 exact) {                                                                              \
        find_outliers<T>(input, scales, masks, rows, columns, threshold, exact);                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                           \
        int8_codes_##name(const T *input, const float *scales, const u32 *masks, i64 groups, i8 *codes,                \
                          Outliers outliers, i64 rows, i64 columns, i64 pitch, u32 exact) {                            \
        code_activations<T>(input, scales, masks, groups, codes, outliers, rows, columns, pitch, exact);               \
    }

INSTANCE(bf16, Bf16, 3)
INSTANCE(f16, F16, 3)
INSTANCE(f32, float, 2)

#define PANEL_INSTANCE(name, X)                                                                                        \
    extern "C" __global__ void __launch_bounds__(PANEL_THREADS)                                                        \
        int8_panel_##name(const X *input, const u32 *masks, int groups, Found found, X *panel, i64 rows, int columns) {\
        gather_panel<X>(input, masks, groups, found, panel, rows, columns);                                            \
    }

PANEL_INSTANCE(16, u16)
PANEL_INSTANCE(32, u32)
