// As planted.cu, for what compute capability 9.0 has: copies of tiles, products of warpgroups, their memory, roles, clusters.
#include "common/wgmma.cuh"

constexpr int THREADS = 160;
constexpr int GROUP = 128;
constexpr int ROUNDS = 4;
constexpr int STAGES = 2;
// A tile: 8 rows of 64 16-bit values, swizzled.
constexpr int TILE_ROWS = 8;
constexpr int COLUMNS = 64;
constexpr int TILE = TILE_ROWS * COLUMNS;
constexpr u32 TILE_BYTES = TILE * 2;

enum Mistake {
    NONE,
    EXPECT_FEWER_BYTES,
    EXPECT_MORE_BYTES,
    EXPECT_NOTHING,
    NO_WAIT_FOR_BOX,
    BARRIERS_NOT_KNOWN,
    NO_WAIT_FOR_ROOM,
    BOX_MISALIGNED,
    BOX_NOBODY_WAITS_FOR,
    TWO_ARRIVALS,
    NO_PROXY_FENCE,
    PROXY_FENCE_OF_ANOTHER,
    STORE_INTO_COMING_BOX,
    NO_PRODUCTS_BEGIN,
    SUMS_READ_BEFORE_WAIT,
    SUMS_WRITTEN_BEFORE_WAIT,
    A_CHANGED_BEFORE_WAIT,
    A_CHANGED_WITHOUT_BEGIN,
    B_CHANGED_BEFORE_WAIT,
    OPERAND_PAST_END,
    OPERAND_MISALIGNED,
    HALF_A_WARPGROUP,
    DIFFERENT_OPERANDS,
    NOBODY_WAITS,
    NO_SWIZZLE,
    REUSED_BEFORE_READ,
    STORE_NOBODY_WAITS_FOR,
    TOO_MANY_REGISTERS,
    REGISTERS_NOT_BY_EIGHT,
    GIVES_TO_HAVE_MORE,
    ONE_BARRIER_TWO_SIZES,
    NO_CLUSTER_MEET,
    ENDED_BEFORE_WRITTEN,
    NO_SUCH_RANK,
    NOT_FOR_ALL_BLOCKS,
    BYTES_NOT_BY_SIXTEEN,
    NO_BARRIER_THERE,
};

// Element i of a tile: where in it, as a copy or the matrix units have it.
__device__ inline int place_of(int i) {
    const int row = i / COLUMNS, column = i % COLUMNS;
    return row * COLUMNS + ((column / 8) ^ (row % 8)) * 8 + column % 8;
}

// out[round][i] = in[round][i], of a tile each, by way of copies into two stages.
template <Mistake MISTAKE>
__device__ inline void ring(const TensorMap *in, u16 *out) {
    DYNAMIC_SHARED_1024(shared);
    Barrier *const full = reinterpret_cast<Barrier *>(shared + STAGES * TILE_BYTES), *const empty = full + STAGES;
    const int thread = int(threadIdx.x);
    if (thread == GROUP) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], GROUP);
        }
        if (MISTAKE != BARRIERS_NOT_KNOWN) {
            barriers_made();
        }
    }
    __syncthreads();
    constexpr int COPIES = ROUNDS + (MISTAKE == BOX_NOBODY_WAITS_FOR);
    if (thread == GROUP) {
        for (int round = 0; round < COPIES; round++) {
            const int stage = round % STAGES;
            if (MISTAKE != NO_WAIT_FOR_ROOM) {
                barrier_wait(&empty[stage], u32(round / STAGES % 2) ^ 1);  // NO_WAIT_FOR_BOX
            }
            constexpr u32 BYTES = MISTAKE == EXPECT_FEWER_BYTES ? TILE_BYTES - 16
                                  : MISTAKE == EXPECT_MORE_BYTES ? TILE_BYTES + 16
                                                                 : TILE_BYTES;
            if (MISTAKE == EXPECT_NOTHING) {
                barrier_arrive(&full[stage]);  // EXPECT_NOTHING
            } else {
                barrier_arrive_expecting(&full[stage], BYTES);  // EXPECT_MORE_BYTES TWO_ARRIVALS NO_WAIT_FOR_ROOM
            }
            if (MISTAKE == TWO_ARRIVALS) {
                barrier_arrive(&full[stage]);  // TWO_ARRIVALS
            }
            u8 *const to = shared + stage * TILE_BYTES + (MISTAKE == BOX_MISALIGNED ? 64 : 0);
            const int row = round % ROUNDS * TILE_ROWS;
            copy_box(to, in, 0, row, &full[stage]);  // EXPECT_FEWER_BYTES EXPECT_NOTHING NO_WAIT_FOR_BOX BARRIERS_NOT_KNOWN NO_WAIT_FOR_ROOM BOX_MISALIGNED BOX_NOBODY_WAITS_FOR STORE_INTO_COMING_BOX
            if (MISTAKE == STORE_INTO_COMING_BOX) {
                to[5] = 1;  // STORE_INTO_COMING_BOX
            }
        }
    } else if (thread < GROUP) {
        for (int round = 0; round < ROUNDS; round++) {
            const int stage = round % STAGES;
            if (MISTAKE != NO_WAIT_FOR_BOX) {
                barrier_wait(&full[stage], u32(round / STAGES % 2));  // EXPECT_MORE_BYTES NO_WAIT_FOR_ROOM
            }
            const u16 *const from = reinterpret_cast<const u16 *>(shared + stage * TILE_BYTES);
            for (int i = thread; i < TILE; i += GROUP) {
                out[round * TILE + i] = from[place_of(i)];  // EXPECT_NOTHING NO_WAIT_FOR_BOX NO_WAIT_FOR_ROOM
            }
            barrier_arrive(&empty[stage]);
        }
    }
}

// out[64][64] = a[64][64] * b[64][64]^T, of bfloat16, float32 sums.
template <Mistake MISTAKE>
__device__ inline void multiply(const u16 *a, const u16 *b, float *out) {
    DYNAMIC_SHARED_1024(shared);
    constexpr int SIZE = 64;
    u8 *const begin = shared + (MISTAKE == OPERAND_MISALIGNED ? 128 : 0);
    u16 *const tile = reinterpret_cast<u16 *>(begin);
    const int thread = int(threadIdx.x), lane = thread % WARP;
    if (thread < GROUP) {
        for (int i = thread; i < SIZE * SIZE; i += GROUP) {
            tile[MISTAKE == NO_SWIZZLE ? i : i / TILE * TILE + place_of(i % TILE)] = b[i];  // NO_PROXY_FENCE PROXY_FENCE_OF_ANOTHER
        }
        if (MISTAKE != NO_PROXY_FENCE && (MISTAKE != PROXY_FENCE_OF_ANOTHER || thread == 0)) {
            emulator::proxy_fence();
        }
        meet<1, GROUP>();
        const int row = thread / WARP * 16 + lane / 4, column = lane % 4 * 2;
        u32 words[4][4];
        for (int step = 0; step < 4; step++) {
            for (int i = 0; i < 4; i++) {
                const int at = (row + i % 2 * 8) * SIZE + step * 16 + column + i / 2 * 8;
                words[step][i] = u32(a[at]) | u32(a[at + 1]) << 16;
            }
        }
        u32 place = operand(begin + (MISTAKE == OPERAND_PAST_END ? 1024 : 0));
        if (MISTAKE == DIFFERENT_OPERANDS && thread >= 64) {
            place += 2;
        }
        float sums[SIZE / 2] = {};
        if (MISTAKE == HALF_A_WARPGROUP && thread >= 64) {
            return;
        }
        if (MISTAKE != NO_PRODUCTS_BEGIN) {
            products_begin();
        }
        multiply_fresh(Bf16{}, sums, words[0], place);  // NO_PROXY_FENCE PROXY_FENCE_OF_ANOTHER NO_PRODUCTS_BEGIN B_CHANGED_BEFORE_WAIT OPERAND_PAST_END OPERAND_MISALIGNED DIFFERENT_OPERANDS NOBODY_WAITS
        multiply_add(Bf16{}, sums, words[1], place + 2);  // SUMS_WRITTEN_BEFORE_WAIT
        products_commit();  // HALF_A_WARPGROUP
        if (MISTAKE == A_CHANGED_WITHOUT_BEGIN) {
            for (int i = 0; i < 4; i++) {
                words[1][i] = words[2][i];
            }
            multiply_add(Bf16{}, sums, words[1], place + 4);  // A_CHANGED_WITHOUT_BEGIN
        } else {
            multiply_add(Bf16{}, sums, words[2], place + 4);  // A_CHANGED_BEFORE_WAIT
        }
        multiply_add(Bf16{}, sums, words[3], place + 6);  // SUMS_WRITTEN_BEFORE_WAIT
        products_commit();
        if (MISTAKE == A_CHANGED_BEFORE_WAIT) {
            words[2][1] = 0;
        }
        if (MISTAKE == B_CHANGED_BEFORE_WAIT) {
            tile[thread] = 0;  // B_CHANGED_BEFORE_WAIT
        }
        if (MISTAKE == SUMS_WRITTEN_BEFORE_WAIT) {
            sums[3] = 0.0f;
        }
        if (MISTAKE != SUMS_READ_BEFORE_WAIT && MISTAKE != NOBODY_WAITS) {
            products_wait<0>();  // B_CHANGED_BEFORE_WAIT
        }
        for (int i = 0; i < SIZE / 2; i++) {
            out[(row + i / 2 % 2 * 8) * SIZE + i / 4 * 8 + column + i % 2] = sums[i];
        }
        products_wait<MISTAKE == NOBODY_WAITS ? 2 : 0>();
    }
}

// out[64][64] = a[64][128] * b[64][128]^T, of int8, int32 sums: both from shared memory.
template <Mistake MISTAKE>
__device__ inline void multiply_bytes(const u8 *a, const u8 *b, int *out) {
    DYNAMIC_SHARED_1024(shared);
    constexpr int SIZE = 64, DEPTH = 128;
    u8 *const begin = shared + (MISTAKE == OPERAND_MISALIGNED ? 128 : 0);
    const int thread = int(threadIdx.x), lane = thread % WARP;
    if (thread < GROUP) {
        for (int i = thread; i < SIZE * DEPTH; i += GROUP) {
            const int row = i / DEPTH, swizzled = MISTAKE == NO_SWIZZLE ? i : i ^ row % 8 * 16;
            begin[swizzled] = a[i];  // NO_PROXY_FENCE PROXY_FENCE_OF_ANOTHER
            begin[SIZE * DEPTH + (i ^ row % 8 * 16)] = b[i];  // NO_PROXY_FENCE PROXY_FENCE_OF_ANOTHER
        }
        if (MISTAKE != NO_PROXY_FENCE && (MISTAKE != PROXY_FENCE_OF_ANOTHER || thread == 0)) {
            emulator::proxy_fence();
        }
        meet<1, GROUP>();
        const u32 x = operand(begin), other = MISTAKE == DIFFERENT_OPERANDS && thread >= 64 ? x + 2 : x;
        const u32 y = operand(begin + SIZE * DEPTH) + (MISTAKE == OPERAND_PAST_END ? 64 : 0);
        int sums[SIZE / 2] = {};
        if (MISTAKE != NO_PRODUCTS_BEGIN) {
            products_begin();
        }
        multiply_fresh(sums, other, y);  // NO_PROXY_FENCE PROXY_FENCE_OF_ANOTHER NO_PRODUCTS_BEGIN OPERAND_PAST_END OPERAND_MISALIGNED DIFFERENT_OPERANDS NOBODY_WAITS A_CHANGED_BEFORE_WAIT
        multiply_add(sums, x + 2, y + 2);  // SUMS_WRITTEN_BEFORE_WAIT
        multiply_add(sums, x + 4, y + 4);
        multiply_add(sums, x + 6, y + 6);  // SUMS_WRITTEN_BEFORE_WAIT
        products_commit();
        if (MISTAKE == A_CHANGED_BEFORE_WAIT) {
            begin[thread] = 0;  // A_CHANGED_BEFORE_WAIT
        }
        if (MISTAKE == SUMS_WRITTEN_BEFORE_WAIT) {
            sums[3] = 0;
        }
        if (MISTAKE != SUMS_READ_BEFORE_WAIT && MISTAKE != NOBODY_WAITS) {
            products_wait<0>();  // A_CHANGED_BEFORE_WAIT
        }
        const int row = thread / WARP * 16 + lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < SIZE / 2; i++) {
            out[(row + i / 2 % 2 * 8) * SIZE + i / 4 * 8 + column + i % 2] = sums[i];
        }
        products_wait<MISTAKE == NOBODY_WAITS ? 2 : 0>();
    }
}

// out[round][i] = in[round][i], of a tile each: ordinary stores to shared memory, and copies from there.
template <Mistake MISTAKE>
__device__ inline void send(const u16 *in, const TensorMap *out) {
    DYNAMIC_SHARED_1024(shared);
    u16 *const tile = reinterpret_cast<u16 *>(shared);
    const int thread = int(threadIdx.x);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = thread; i < TILE; i += THREADS) {
            tile[place_of(i)] = in[round * TILE + i];  // NO_PROXY_FENCE PROXY_FENCE_OF_ANOTHER REUSED_BEFORE_READ
        }
        if (MISTAKE != NO_PROXY_FENCE && (MISTAKE != PROXY_FENCE_OF_ANOTHER || thread == 0)) {
            emulator::proxy_fence();
        }
        __syncthreads();
        if (thread == 0) {
            const int at[2] = {0, round * TILE_ROWS};
            emulator::announce_box_store(out, 2, at, tile, emulator::Site::here());  // NO_PROXY_FENCE PROXY_FENCE_OF_ANOTHER REUSED_BEFORE_READ STORE_NOBODY_WAITS_FOR
            emulator::begin_store();
            emulator::commit_stores();
            if (MISTAKE != REUSED_BEFORE_READ && (MISTAKE != STORE_NOBODY_WAITS_FOR || round + 1 < ROUNDS)) {
                emulator::wait_stores(0, true, emulator::Site::here());
            }
        }
        __syncthreads();
    }
    if (MISTAKE != STORE_NOBODY_WAITS_FOR && thread == 0) {
        emulator::wait_stores(0, false, emulator::Site::here());
    }
}

// out[i] = 2 * in[i], by threads that have as many registers as they want.
template <Mistake MISTAKE>
__device__ inline void roles(const float *in, float *out) {
    SHARED_ARRAY(float, tile, [2 * GROUP]);
    const int thread = int(threadIdx.x);
    if (thread < GROUP) {
        give_registers<MISTAKE == REGISTERS_NOT_BY_EIGHT ? 60 : MISTAKE == GIVES_TO_HAVE_MORE ? 256 : 56>();  // REGISTERS_NOT_BY_EIGHT GIVES_TO_HAVE_MORE
        tile[thread] = in[thread];
        tile[GROUP + thread] = in[GROUP + thread];
        meet<1, 2 * GROUP>();  // ONE_BARRIER_TWO_SIZES
    } else if (thread < 2 * GROUP) {
        // 168 each of three warpgroups: 112 of the first, and the third gives none.
        take_registers<240>();  // TOO_MANY_REGISTERS
        if (MISTAKE == ONE_BARRIER_TWO_SIZES) {
            meet<1, GROUP>();  // ONE_BARRIER_TWO_SIZES
        } else {
            meet<1, 2 * GROUP>();
        }
        out[thread - GROUP] = 2.0f * tile[thread - GROUP];
        out[thread] = 2.0f * tile[thread];
    } else if (MISTAKE == TOO_MANY_REGISTERS) {
        take_registers<256>();  // TOO_MANY_REGISTERS
    }
}

// out[block][i] = in[other block of the cluster][i], by fours.
template <Mistake MISTAKE>
__device__ inline void exchange(const float *in, float *out) {
    DYNAMIC_SHARED_1024(shared);
    const int thread = int(threadIdx.x), rank = int(cluster_rank());
    const float *const mine = in + (i64(blockIdx.x) * GROUP + thread) * 4;
    if (MISTAKE == ENDED_BEFORE_WRITTEN && rank == 0) {
        return;
    }
    if (thread < GROUP) {
        const u32 other = MISTAKE == NO_SUCH_RANK ? 2 : u32(rank ^ 1);
        const u32 there = address_at(shared + thread * 16, other);  // NO_SUCH_RANK
        store_at(there, mine[0], mine[1], mine[2], mine[3]);  // ENDED_BEFORE_WRITTEN NO_CLUSTER_MEET
    }
    if (MISTAKE != NO_CLUSTER_MEET) {
        cluster_meet();
    }
    if (thread < GROUP) {
        const Floats4 theirs = *reinterpret_cast<const Floats4 *>(shared + thread * 16);  // NO_CLUSTER_MEET
        for (int i = 0; i < 4; i++) {
            out[(i64(blockIdx.x) * GROUP + thread) * 4 + i] = theirs.value[i];
        }
    }
    if (MISTAKE == NO_CLUSTER_MEET) {
        cluster_meet();
    }
}

// out[block][i] = in[i], a tile: one copy for both blocks of a cluster.
template <Mistake MISTAKE>
__device__ inline void share(const TensorMap *in, u16 *out) {
    DYNAMIC_SHARED_1024(shared);
    Barrier *const full = reinterpret_cast<Barrier *>(shared + TILE_BYTES);
    const int thread = int(threadIdx.x);
    if (thread == 0) {
        barrier_init(full, 1);
        barriers_made();
        barrier_arrive_expecting(full, TILE_BYTES);  // NOT_FOR_ALL_BLOCKS
    }
    cluster_meet();
    if (thread == 0 && cluster_rank() == 0) {
        copy_box_to(MISTAKE == NOT_FOR_ALL_BLOCKS ? 1 : 3, shared, in, 0, 0, full);
    }
    barrier_wait(full, 0);  // NOT_FOR_ALL_BLOCKS
    for (int i = thread; i < TILE; i += THREADS) {
        out[int(blockIdx.x) * TILE + i] = reinterpret_cast<const u16 *>(shared)[place_of(i)];
    }
    cluster_meet();
}

// out[i] = in[i], a run of bytes for each block of a cluster, which tell each other when they are there.
template <Mistake MISTAKE>
__device__ inline void relay(const u16 *in, u16 *out) {
    DYNAMIC_SHARED_1024(shared);
    Barrier *const full = reinterpret_cast<Barrier *>(shared + TILE_BYTES), *const other = full + 1;
    const int thread = int(threadIdx.x);
    if (thread == 0) {
        barrier_init(full, 1);
        barrier_init(other, 1);
        barriers_made();
        barrier_arrive_expecting(full, TILE_BYTES);
    }
    cluster_meet();
    const u16 *const from = in + int(blockIdx.x) * TILE;
    u16 *const to = out + int(blockIdx.x) * TILE;
    if (thread == 0) {
        const u32 bytes = TILE_BYTES - (MISTAKE == BYTES_NOT_BY_SIXTEEN ? 8 : 0);
        emulator::announce_bytes(shared, from, bytes, full, 0, emulator::Site::here());  // BYTES_NOT_BY_SIXTEEN
        emulator::begin_load();
        barrier_wait(full, 0);
        emulator::announce_bytes_store(to, shared, TILE_BYTES, emulator::Site::here());
        emulator::begin_store();
        emulator::commit_stores();
        emulator::wait_stores(0, false, emulator::Site::here());
        const u32 there = address_at(other + (MISTAKE == NO_BARRIER_THERE), cluster_rank() ^ 1);
        barrier_arrive_at(there);  // NO_BARRIER_THERE
    }
    barrier_wait(other, 0);
    if (thread == 0) {
        to[1] = in[(int(blockIdx.x) ^ 1) * TILE + 1];
    }
    cluster_meet();
}

#define ENTRY(function, MISTAKE, threads) extern "C" __global__ void __launch_bounds__(threads) function##_##MISTAKE
#define RING(MISTAKE) \
    ENTRY(ring, MISTAKE, THREADS)(const __grid_constant__ TensorMap in, u16 *out) { ring<MISTAKE>(&in, out); }
#define MULTIPLY(MISTAKE) \
    ENTRY(multiply, MISTAKE, THREADS)(const u16 *a, const u16 *b, float *out) { multiply<MISTAKE>(a, b, out); }
#define MULTIPLY_BYTES(MISTAKE) \
    ENTRY(multiply_bytes, MISTAKE, THREADS)(const u8 *a, const u8 *b, int *out) { multiply_bytes<MISTAKE>(a, b, out); }
#define SEND(MISTAKE) \
    ENTRY(send, MISTAKE, THREADS)(const u16 *in, const __grid_constant__ TensorMap out) { send<MISTAKE>(in, &out); }
#define ROLES(MISTAKE) \
    ENTRY(roles, MISTAKE, 3 * GROUP)(const float *in, float *out) { roles<MISTAKE>(in, out); }
#define EXCHANGE(MISTAKE) \
    ENTRY(exchange, MISTAKE, THREADS)(const float *in, float *out) { exchange<MISTAKE>(in, out); }
#define SHARE(MISTAKE) \
    ENTRY(share, MISTAKE, THREADS)(const __grid_constant__ TensorMap in, u16 *out) { share<MISTAKE>(&in, out); }
#define RELAY(MISTAKE) \
    ENTRY(relay, MISTAKE, THREADS)(const u16 *in, u16 *out) { relay<MISTAKE>(in, out); }

RING(NONE)
RING(EXPECT_FEWER_BYTES)
RING(EXPECT_MORE_BYTES)
RING(EXPECT_NOTHING)
RING(NO_WAIT_FOR_BOX)
RING(BARRIERS_NOT_KNOWN)
RING(NO_WAIT_FOR_ROOM)
RING(BOX_MISALIGNED)
RING(BOX_NOBODY_WAITS_FOR)
RING(TWO_ARRIVALS)
RING(STORE_INTO_COMING_BOX)
MULTIPLY(NONE)
MULTIPLY(NO_PROXY_FENCE)
MULTIPLY(PROXY_FENCE_OF_ANOTHER)
MULTIPLY(NO_PRODUCTS_BEGIN)
MULTIPLY(SUMS_READ_BEFORE_WAIT)
MULTIPLY(SUMS_WRITTEN_BEFORE_WAIT)
MULTIPLY(A_CHANGED_BEFORE_WAIT)
MULTIPLY(A_CHANGED_WITHOUT_BEGIN)
MULTIPLY(B_CHANGED_BEFORE_WAIT)
MULTIPLY(OPERAND_PAST_END)
MULTIPLY(OPERAND_MISALIGNED)
MULTIPLY(HALF_A_WARPGROUP)
MULTIPLY(DIFFERENT_OPERANDS)
MULTIPLY(NOBODY_WAITS)
MULTIPLY(NO_SWIZZLE)
MULTIPLY_BYTES(NONE)
MULTIPLY_BYTES(NO_PROXY_FENCE)
MULTIPLY_BYTES(PROXY_FENCE_OF_ANOTHER)
MULTIPLY_BYTES(NO_PRODUCTS_BEGIN)
MULTIPLY_BYTES(SUMS_READ_BEFORE_WAIT)
MULTIPLY_BYTES(SUMS_WRITTEN_BEFORE_WAIT)
MULTIPLY_BYTES(A_CHANGED_BEFORE_WAIT)
MULTIPLY_BYTES(OPERAND_PAST_END)
MULTIPLY_BYTES(OPERAND_MISALIGNED)
MULTIPLY_BYTES(DIFFERENT_OPERANDS)
MULTIPLY_BYTES(NOBODY_WAITS)
MULTIPLY_BYTES(NO_SWIZZLE)
SEND(NONE)
SEND(NO_PROXY_FENCE)
SEND(PROXY_FENCE_OF_ANOTHER)
SEND(REUSED_BEFORE_READ)
SEND(STORE_NOBODY_WAITS_FOR)
ROLES(NONE)
ROLES(TOO_MANY_REGISTERS)
ROLES(REGISTERS_NOT_BY_EIGHT)
ROLES(GIVES_TO_HAVE_MORE)
ROLES(ONE_BARRIER_TWO_SIZES)
EXCHANGE(NONE)
EXCHANGE(NO_CLUSTER_MEET)
EXCHANGE(ENDED_BEFORE_WRITTEN)
EXCHANGE(NO_SUCH_RANK)
SHARE(NONE)
SHARE(NOT_FOR_ALL_BLOCKS)
RELAY(NONE)
RELAY(BYTES_NOT_BY_SIXTEEN)
RELAY(NO_BARRIER_THERE)
