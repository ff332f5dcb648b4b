// The products of decode.cuh, W by way of shared memory: each warp copies its bytes and scales with cp.async into a ring of
// its own, STAGES tiles ahead, so that 64 KB are always on the way to each multiprocessor. Needs 224 KB of shared memory,
// which compute capability 9.0 and 10.0 have.
#include "decode.cuh"

// Chunks of a warp in its ring: while it works on one, two are on the way. 32 KB each for all warps.
constexpr int STAGES = 3;

// Block j of row r lies at block j ^ (r % 4) of its row in a stage: so the eight rows that a warp reads at a time, four in
// each half of the warp, are in different banks.
template <int CHUNK>
__device__ inline int ring_offset(int row, int block) {
    return (row * CHUNK + (block ^ (row % 4))) * BLOCK_BYTES;
}

// Copies of a warp's places, one place after the other.
template <bool NESTED, int WARPS, int CHUNK>
struct Copier {
    // Of the codes of W 16 bytes for each lane, and as many rows at a time as that gives.
    static constexpr int PIECES = CHUNK * BLOCK_BYTES / 16, AT_A_TIME = WARP / PIECES;
    static constexpr int STAGE_BYTES = ROWS * CHUNK * BLOCK_BYTES;
    // Of the scales, 4 bytes for each lane at a time: of a chunk's blocks t, t + 4, ..., for row g and row g + 8. They lie in
    // the unused halves of the table's rows, WARP words in each; nested ones after one another the words that hold the
    // codes, and the second scales.
    static constexpr int QUADS = CHUNK / 4;
    static constexpr int SCALE_ROWS = (NESTED ? 4 : 2) * QUADS;
    static_assert(WARPS * STAGES * SCALE_ROWS <= 256 && WARP * 2 == LANE_TABLE_ROW, "halves of the table's rows");

    using W = Work<NESTED, WARPS, CHUNK>;
    const W &work;
    const u8 *const packed;
    u8 *const ring;     // [STAGES][STAGE_BYTES] of this warp
    u32 *const halves;  // [STAGES][SCALE_ROWS][LANE_TABLE_ROW] of this warp
    const int lane, row, piece;
    Place place;
    int blocks;      // of the chunk; none: no more places
    const u8 *from;  // this lane's piece of the first rows
    i64 low_block;   // of row g, the chunk's first
    u32 code_shifts = 0;  // where in their words this lane's codes are, in bytes: CODE_BITS for each stage, the oldest lowest
    static constexpr int CODE_BITS = 4 * QUADS;
    static_assert(CODE_BITS * STAGES <= 32, "two bits for each code");

    __device__ Copier(const W &work, const u8 *packed, u8 *rings, u32 *table)
        : work(work),
          packed(packed),
          ring(rings + threadIdx.x / WARP * (STAGES * STAGE_BYTES)),
          halves(table + WARP + threadIdx.x / WARP * (STAGES * SCALE_ROWS * LANE_TABLE_ROW)),
          lane(int(threadIdx.x) % WARP),
          row(lane / PIECES),
          piece(lane % PIECES),
          place(work.first()) {
        aim();
    }
    __device__ void aim() {
        blocks = work.exists(place) ? work.chunk_blocks(place.chunk) : 0;
        from = packed + work.block_of(place, row) * BLOCK_BYTES + piece * 16;
        low_block = work.block_of(place, work.g);
    }
    __device__ u32 *scale_row(u32 stage, int i) const { return halves + (stage * SCALE_ROWS + i) * LANE_TABLE_ROW; }

    // The word that holds a code. Where part of the word lies outside of the codes, the byte alone is read, and at once.
    __device__ void copy_code(u32 *to, const u8 *code) const {
        const u32 *const word = reinterpret_cast<const u32 *>(code - (u64(code) & 3));
        const u8 *const first = work.scales.codes, *const last = first + work.scale_count;
        if (reinterpret_cast<const u8 *>(word) >= first && reinterpret_cast<const u8 *>(word + 1) <= last) {
            copy_async(to, word);
        } else {
            *to = u32(*code) << (8 * (u64(code) & 3));
        }
    }
    __device__ void copy_scale(u32 stage, int q, int high, i64 block) {
        const i64 scale = block >> work.scale_shift;
        u32 *const to = scale_row(stage, 2 * q + high) + lane;
        if constexpr (NESTED) {
            const u8 *const code = work.scales.codes + scale;
            copy_code(to, code);
            code_shifts |= u32(u64(code) & 3) << (CODE_BITS * (STAGES - 1) + 4 * q + 2 * high);
            copy_async(scale_row(stage, 2 * (QUADS + q) + high) + lane,
                       reinterpret_cast<const u32 *>(work.scales.absmax2 + (scale >> NESTED_SHIFT)));
        } else {
            copy_async(to, reinterpret_cast<const u32 *>(work.scales.absmax + scale));
        }
    }

    // Starts copying a place to a stage, and goes on to the next place. What belongs to rows behind the last is left as it
    // is: what comes of it is not written.
    __device__ void copy(u32 stage) {
        const i64 row_bytes = i64(work.row_blocks) * BLOCK_BYTES;
        const int rows = work.rows - place.tile * ROWS;
        if (piece / 2 < blocks) {
            u8 *const to = ring + (stage * STAGE_BYTES + u32(ring_offset<CHUNK>(row, piece / 2) + piece % 2 * 16));
#pragma unroll
            for (int i = 0; i < ROWS; i += AT_A_TIME) {
                if (row + i < rows) {
                    // Rows that are AT_A_TIME apart have their blocks in the same order, or in one that is exchanged.
                    u8 *const row_to = AT_A_TIME % 4 == 0 ? to + i * CHUNK * BLOCK_BYTES
                                                          : ring + (stage * STAGE_BYTES +
                                                                    u32(ring_offset<CHUNK>(row + i, piece / 2) + piece % 2 * 16));
                    copy_async(reinterpret_cast<Words4 *>(row_to), reinterpret_cast<const Words4 *>(from + i * row_bytes));
                }
            }
        }
        const i64 high_block = low_block + i64(ROWS / 2) * work.row_blocks;
        code_shifts >>= CODE_BITS;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const int block = q * 4 + work.t;
            if (block < blocks && work.g < rows) {
                copy_scale(stage, q, 0, low_block + block);
            }
            if (block < blocks && work.g + ROWS / 2 < rows) {
                copy_scale(stage, q, 1, high_block + block);
            }
        }
        copy_async_commit();
        if (work.advance(place)) {
            const i64 step = i64(work.groups * ROWS) * work.row_blocks;
            from += step * BLOCK_BYTES;
            low_block += step;
            blocks = work.exists(place) ? blocks : 0;
        } else {
            aim();
        }
    }

    // Once a stage's copies have ended for all lanes: the float32 scales of row g (0) and row g + 8 (1), for four blocks.
    __device__ const float *scales_of(u32 stage, int q, int high) const {
        return reinterpret_cast<const float *>(scale_row(stage, 2 * q + high) + work.g * 4);
    }
    // Makes them of nested ones in the oldest stage, each lane those that it copied.
    __device__ void expand_scales(u32 stage, const float *map, float offset) const {
        if constexpr (NESTED) {
#pragma unroll
            for (int i = 0; i < 2 * QUADS; i++) {
                u32 *const word = scale_row(stage, i) + lane;
                const u32 code = (*word >> (8 * (code_shifts >> (2 * i) & 3))) & 0xff;
                const RawScale<true> raw = {code, __uint_as_float(scale_row(stage, 2 * QUADS + i)[lane])};
                *word = __float_as_uint(raw.value(map, offset));
            }
        }
    }
};

template <typename T, bool NESTED, int FRAGMENTS>
__device__ inline void decode_ring(const T *x, const u8 *packed, const Scales &scales, const T *bias, T *y, int m, int n,
                                   int k, int block_shift, u32 quant_type, const DecodePlan &plan) {
    constexpr int WARPS = Sizes<FRAGMENTS>::WARPS, THREADS = Sizes<FRAGMENTS>::THREADS, CHUNK = Sizes<FRAGMENTS>::CHUNK;
    // Blocks with nothing to decide in between, so that look-ups of one go on during the products of another. For more of
    // them, or with two fragments, there are no registers.
    constexpr int TOGETHER = FRAGMENTS == 1 ? 2 : 1;
    DYNAMIC_SHARED(shared);
    float *const map = reinterpret_cast<float *>(shared);                  // [256]
    float *const partial = reinterpret_cast<float *>(shared + MAP_BYTES);  // [tile][slot][m][16]
    const u32 before = MAP_BYTES + u32(plan.per_pass * plan.slots * m * ROWS) * sizeof(float);
    const u32 place_of_table = before + lane_table_place(shared + before);
    u32 *const table = reinterpret_cast<u32 *>(shared + place_of_table);  // [256][LANE_TABLE_ROW], half used

    const Work<NESTED, WARPS, CHUNK> work(scales, n, k, block_shift, plan);
    const int lane = int(threadIdx.x) % WARP, g = work.g, t = work.t;

    // What comes behind copies waits for them in the memory's queue: so everything else is loaded behind the first alone.
    Copier<NESTED, WARPS, CHUNK> copier(work, packed, shared + (place_of_table + LANE_TABLE_BYTES), table);
    copier.copy(0);
    const float offset = NESTED ? *scales.offset : 0.0f;
    u32 x_words[CHUNK][FRAGMENTS][8];
    load_x<FRAGMENTS, CHUNK>(x_words, x, m, k, work.chunk_begin(0), work.chunk_blocks(0), g, t);
    fill_map<NESTED, THREADS>(map);
#pragma unroll 1
    for (u32 s = 1; s < STAGES; s++) {
        copier.copy(s);
    }
    fill_table<T, THREADS>(table, quant_type);
    __syncthreads();

    const LaneTable entries = lane_table(table, lane);
    // This lane's 8 bytes of block j are at this offset, with bits 5 and 6 inverted where those of 32 j are set.
    static_assert(BLOCK_BYTES == 32, "bits 5 and 6");
    const u32 lane_offset = u32(ring_offset<CHUNK>(g, 0) + t * 8);
    int chunk_of_x = 0;
    u32 stage = 0;
    for (int begin = 0, end; begin < work.tiles; begin = end) {
        end = work.end_of_pass(begin);
        for (int chunk = 0; chunk < work.chunks; chunk++) {
            const int blocks = work.chunk_blocks(chunk);
            if (chunk != chunk_of_x) {
                chunk_of_x = chunk;
                load_x<FRAGMENTS, CHUNK>(x_words, x, m, k, work.chunk_begin(chunk), blocks, g, t);
            }
            for (int tile = begin + work.group; tile < end; tile += work.groups) {
                // The oldest copy has ended, for all lanes.
                copy_async_wait<STAGES - 1>();
                copier.expand_scales(stage, map, offset);
                __syncwarp();
                const u8 *const bytes = copier.ring + stage * copier.STAGE_BYTES;
                float sums[FRAGMENTS][4] = {};
                const auto add = [&](int j) {
                    const float *const low_scales = copier.scales_of(stage, j / 4, 0);
                    const float *const high_scales = copier.scales_of(stage, j / 4, 1);
                    const u8 *const lane_bytes = bytes + (lane_offset ^ u32(j * BLOCK_BYTES));
                    const Words2 low = *reinterpret_cast<const Words2 *>(lane_bytes);
                    const Words2 high = *reinterpret_cast<const Words2 *>(lane_bytes + copier.STAGE_BYTES / 2);
                    add_block<T>(sums, entries, low, high, x_words[j], low_scales[j % 4], high_scales[j % 4]);
                };
#pragma unroll
                for (int j = 0; j < CHUNK; j += TOGETHER) {
                    if (j + TOGETHER <= blocks) {
#pragma unroll
                        for (int i = 0; i < TOGETHER; i++) {
                            add(j + i);
                        }
                    } else if (j < blocks) {
                        add(j);
                    }
                }
                // Every lane has read its part.
                __syncwarp();
                copier.copy(stage);
                stage = stage + 1 < STAGES ? stage + 1 : 0;
                float *const own = partial + ((tile - begin) * work.slots + work.slot) * m * ROWS;
                add_partial(own, sums, m, chunk == 0, g, t);
            }
        }
        __syncthreads();
        write_pass<T, WARPS>(work, begin, end, partial, bias, y, m, n);
        __syncthreads();
    }
}

// x:           [m][k] aligned to 16 bytes; m at most 8 times the number of fragments
// packed:      [n * k / 2] aligned to 16 bytes; k is a multiple of 64
// scales:      of n * k / blocksize blocks
// bias:        [n] or null
// y:           [m][n]
// block_shift: log2 of the block size, 6 to 12
// quant_type:  NF4 or FP4
// Grid: ceil(n / plan.rows) blocks of Sizes<fragments>::THREADS. Dynamic shared memory, with P = plan.per_pass * plan.slots *
// m * 64 bytes: MAP_BYTES + P, then the table at the next place where it may begin,
// and STAGES * 32 KB behind it.
#define INSTANCE(name, T, nested, fragments)                                                                          \
    extern "C" __global__ void __launch_bounds__(Sizes<fragments>::THREADS, 1)                                        \
        decode_ring_##name(const T *x, const u8 *packed, Scales scales, const T *bias, T *y, int m, int n, int k,    \
                  int block_shift, u32 quant_type, DecodePlan plan) {                                                 \
        decode_ring<T, nested, fragments>(x, packed, scales, bias, y, m, n, k, block_shift, quant_type, plan);        \
    }

INSTANCE(bf16_8, Bf16, false, 1)
INSTANCE(bf16_16, Bf16, false, 2)
INSTANCE(bf16_8_nested, Bf16, true, 1)
INSTANCE(bf16_16_nested, Bf16, true, 2)
INSTANCE(f16_8, F16, false, 1)
INSTANCE(f16_16, F16, false, 2)
INSTANCE(f16_8_nested, F16, true, 1)
INSTANCE(f16_16_nested, F16, true, 2)
