// The products of small_m.cuh with W by way of registers: each warp loads the bytes of its next tile while it uses those of
// this one. For gemm_4bit_small_m_sm80 and gemm_4bit_small_m_sm75, which look values up in different places.
#pragma once

#include "gemm/small_m_sm80/warp.cuh"

// Values looked up in shared memory, two at a time: 64 KB, from the first byte on.
struct TableWeights {
    static constexpr u32 BYTES = LANE_TABLE_BYTES;

    template <typename T, int THREADS>
    __device__ static void fill(u8 *shared, u32 quant_type) {
        fill_table<T, THREADS>(reinterpret_cast<u32 *>(shared), quant_type);  // [256][64], half used
    }
    template <typename T>
    __device__ static PlainTable entries(const u8 *shared, int lane, u32) {
        return {reinterpret_cast<const u32 *>(shared), u32(lane) * 4};
    }
};

// Values found in registers by permutations of bytes.
struct PlanesWeights {
    static constexpr u32 BYTES = 0;

    template <typename T, int THREADS>
    __device__ static void fill(u8 *, u32) {}
    template <typename T>
    __device__ static Planes entries(const u8 *, int, u32 quant_type) {
        Codebook codebook;
#pragma unroll
        for (int code = 0; code < 16; code++) {
            codebook.value[code] = value_of(quant_type, code);
        }
        return scaled_planes<T>(codebook, 1.0f);
    }
};

// How the launcher divides the work.
struct LaunchConfig {
    int rows;      // of W, for each block of threads
    int k_slices;     // parts of K: a power of two, at most the number of warps
    int per_pass;  // tiles whose partial sums fit in shared memory
};

// A k-tile of a tile.
struct WorkItem {
    int tile, pass_begin, pass_end;
    int k_tile;
};

// What one warp has to do: a k-slice, up to K_TILE blocks of it at a time. Its work items come in passes, in each of these
// the k-tiles of its k-slice, in each the tiles of its group.
template <bool NESTED, int WARPS, int K_TILE>
struct Partition {
    const Scales &scales;
    int scale_shift;  // log2 of the blocks here that share a scale
    int row_blocks;
    int first_row, rows;  // of this block of threads
    int k_slices, k_slice, group, groups;
    int first_block, k_tiles, k_tile_size, larger_k_tiles;
    int tiles, per_pass;
    int g, t;

    __device__ Partition(const Scales &scales, int n, int k, int block_shift, const LaunchConfig &config)
        : scales(scales),
          scale_shift(block_shift - BLOCK_SHIFT),
          row_blocks(k / BLOCK),
          k_slices(config.k_slices),
          per_pass(config.per_pass) {
        const int lane = int(threadIdx.x % WARP), warp = int(threadIdx.x / WARP);
        first_row = int(blockIdx.x) * config.rows;
        rows = n - first_row < config.rows ? n - first_row : config.rows;
        tiles = (rows + ROWS - 1) / ROWS;
        // `k_slices` is a power of two.
        const int log2_k_slices = 31 - __clz(k_slices);
        k_slice = warp & (k_slices - 1);
        group = warp >> log2_k_slices;
        groups = WARPS >> log2_k_slices;
        first_block = int(i64(row_blocks) * k_slice >> log2_k_slices);
        // K-tiles of a k-slice are as equal as can be: the first ones may have a block more.
        const int k_slice_blocks = int(i64(row_blocks) * (k_slice + 1) >> log2_k_slices) - first_block;
        k_tiles = (k_slice_blocks + K_TILE - 1) / K_TILE;
        k_tile_size = k_slice_blocks / k_tiles;
        larger_k_tiles = k_slice_blocks - k_tile_size * k_tiles;
        g = lane / 4;
        t = lane % 4;
    }

    __device__ int k_tile_begin(int k_tile) const {
        return first_block + k_tile * k_tile_size + (k_tile < larger_k_tiles ? k_tile : larger_k_tiles);
    }
    __device__ int k_tile_blocks(int k_tile) const { return k_tile_size + (k_tile < larger_k_tiles); }
    __device__ int end_of_pass(int begin) const { return tiles - begin < per_pass ? tiles : begin + per_pass; }

    __device__ WorkItem first() const {
        WorkItem item = {group, 0, end_of_pass(0), 0};
        skip_empty(item);
        return item;
    }
    // To the next work item; false when it is in another k-tile, or the last was the last.
    __device__ bool advance(WorkItem &item) const {
        if (!exists(item)) {
            return true;
        }
        item.tile += groups;
        if (item.tile < item.pass_end) {
            return true;
        }
        if (++item.k_tile == k_tiles) {
            item.k_tile = 0;
            item.pass_begin = item.pass_end;
            item.pass_end = end_of_pass(item.pass_begin);
        }
        item.tile = item.pass_begin + group;
        skip_empty(item);
        return false;
    }
    // The last pass may have no tile for this group.
    __device__ void skip_empty(WorkItem &item) const {
        if (item.tile >= item.pass_end) {
            item.tile = tiles;
        }
    }
    __device__ bool exists(const WorkItem &item) const { return item.tile < tiles; }
    // The first block of a row of a work item's tile.
    __device__ i64 block_of(const WorkItem &item, int row) const {
        return i64(first_row + item.tile * ROWS + row) * row_blocks + k_tile_begin(item.k_tile);
    }
};

// The scales of a warp's work items, one after the other. Of a k-tile's blocks a lane has t, t + 4, ..., for row g and row
// g + 8: the lanes of a quad share theirs later.
template <bool NESTED, int WARPS, int K_TILE>
struct QuadScales {
    RawScale<NESTED> low[K_TILE / 4], high[K_TILE / 4];

    __device__ void load(const Partition<NESTED, WARPS, K_TILE> &partition, const WorkItem &item, i64 low_block, int blocks) {
        const int row = item.tile * ROWS + partition.g;
        const i64 high_block = low_block + i64(ROWS / 2) * partition.row_blocks;
#pragma unroll
        for (int q = 0; q < K_TILE / 4; q++) {
            const int block = q * 4 + partition.t;
            if (block < blocks && row < partition.rows) {
                low[q] = ScaleReader<NESTED>(partition.scales, (low_block + block) >> partition.scale_shift)[0];
            }
            if (block < blocks && row + ROWS / 2 < partition.rows) {
                high[q] = ScaleReader<NESTED>(partition.scales, (high_block + block) >> partition.scale_shift)[0];
            }
        }
    }
};

// After a barrier: y from the partial sums [tile][k-slice][m][16] of the tiles from `begin` to `end`. A warp takes 32 rows of
// one column at a time.
template <typename T, int WARPS, typename W>
__device__ inline void write_pass(const W &partition, int begin, int end, const float *partial, const T *bias, T *y, int m,
                                  int n) {
    const int lane = int(threadIdx.x % WARP), warp = int(threadIdx.x / WARP);
    const int rows = (partition.rows < end * ROWS ? partition.rows : end * ROWS) - begin * ROWS;
    const int first_row = partition.first_row + begin * ROWS;
    const int size = m * ROWS;
#pragma unroll 1
    for (int piece = warp; piece < (rows + WARP - 1) / WARP * m; piece += WARPS) {
        const int column = piece % m, row = piece / m * WARP + lane;
        if (row < rows) {
            const float *from = partial + row / ROWS * partition.k_slices * size + partial_offset(column, row % ROWS, m);
            float sum = bias != nullptr ? to_f32(bias[first_row + row]) : 0.0f;
#pragma unroll 8
            for (int s = 0; s < partition.k_slices; s++) {
                sum += from[s * size];
            }
            y[i64(column) * n + first_row + row] = from_f32<T>(sum);
        }
    }
}

// `Weights` is where the values of codes are looked up: TableWeights or PlanesWeights.
template <typename T, typename Weights, bool NESTED, int FRAGMENTS>
__device__ inline void small_m_by_registers(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m,
                                            int n, int k, int block_shift, u32 quant_type, const LaunchConfig &config) {
    constexpr int WARPS = Shape<FRAGMENTS>::WARPS, THREADS = Shape<FRAGMENTS>::THREADS, K_TILE = Shape<FRAGMENTS>::K_TILE;
    DYNAMIC_SHARED(shared);
    float *const map = reinterpret_cast<float *>(shared + Weights::BYTES);                  // [256]
    float *const partial = reinterpret_cast<float *>(shared + Weights::BYTES + MAP_BYTES);  // [tile][k-slice][m][16]

    const Partition<NESTED, WARPS, K_TILE> partition(scales, n, k, block_shift, config);
    const int lane = int(threadIdx.x) % WARP, g = partition.g, t = partition.t, quad_lane = lane & ~3;
    const u8 *const lane_packed = packed + t * 8;

    // Loads first: tables are made while they are on the way. Rows behind the last are read as the last, and what comes
    // of them is not written.
    WorkItem ahead = partition.first();
    int blocks_ahead = partition.exists(ahead) ? partition.k_tile_blocks(ahead.k_tile) : 0;
    const u8 *low_packed = packed, *high_packed = packed;
    const auto aim = [&]() {
        const int last = partition.rows - 1 - ahead.tile * ROWS;
        low_packed = lane_packed + partition.block_of(ahead, g < last ? g : last) * BLOCK_BYTES;
        high_packed = lane_packed + partition.block_of(ahead, g + 8 < last ? g + 8 : last) * BLOCK_BYTES;
    };
    QuadScales<NESTED, WARPS, K_TILE> quad = {};
    Bytes<K_TILE> bytes = {};
    if (blocks_ahead > 0) {
        aim();
        quad.load(partition, ahead, partition.block_of(ahead, g), blocks_ahead);
#pragma unroll
        for (int j = 0; j < K_TILE; j++) {
            if (j < blocks_ahead) {
                bytes.load(j, low_packed, high_packed);
            }
        }
    }
    const float offset = NESTED ? *scales.offset : 0.0f;
    u32 x_words[K_TILE][FRAGMENTS][8];
    load_x<FRAGMENTS, K_TILE>(x_words, x, m, k, partition.k_tile_begin(0), partition.k_tile_blocks(0), g, t);
    Weights::template fill<T, THREADS>(shared, quant_type);
    fill_map<NESTED, THREADS>(map);
    __syncthreads();

    const auto entries = Weights::template entries<T>(shared, lane, quant_type);
    int k_tile_of_x = 0;
    for (int begin = 0, end; begin < partition.tiles; begin = end) {
        end = partition.end_of_pass(begin);
        for (int k_tile = 0; k_tile < partition.k_tiles; k_tile++) {
            const int blocks = partition.k_tile_blocks(k_tile);
            if (k_tile != k_tile_of_x) {
                k_tile_of_x = k_tile;
                load_x<FRAGMENTS, K_TILE>(x_words, x, m, k, partition.k_tile_begin(k_tile), blocks, g, t);
            }
            for (int tile = begin + partition.group; tile < end; tile += partition.groups) {
                float low_scale[K_TILE / 4], high_scale[K_TILE / 4];
#pragma unroll
                for (int q = 0; q < K_TILE / 4; q++) {
                    low_scale[q] = quad.low[q].value(map, offset);
                    high_scale[q] = quad.high[q].value(map, offset);
                }
                partition.advance(ahead);
                blocks_ahead = partition.exists(ahead) ? partition.k_tile_blocks(ahead.k_tile) : 0;
                if (blocks_ahead > 0) {
                    aim();
                    quad.load(partition, ahead, partition.block_of(ahead, g), blocks_ahead);
                }

                float sums[FRAGMENTS][4] = {};
#pragma unroll
                for (int j = 0; j < K_TILE; j++) {
                    if (j < blocks) {
                        add_block<T>(sums, entries, bytes.low[j], bytes.high[j], x_words[j],
                                     __shfl_sync(ALL_LANES, low_scale[j / 4], quad_lane + j % 4),
                                     __shfl_sync(ALL_LANES, high_scale[j / 4], quad_lane + j % 4));
                    }
                    if (j < blocks_ahead) {
                        bytes.load(j, low_packed, high_packed);
                    }
                }
                float *const own = partial + ((tile - begin) * partition.k_slices + partition.k_slice) * m * ROWS;
                add_partial(own, sums, m, k_tile == 0, g, t);
            }
        }
        __syncthreads();
        write_pass<T, WARPS>(partition, begin, end, partial, bias, y, m, n);
        __syncthreads();
    }
}
