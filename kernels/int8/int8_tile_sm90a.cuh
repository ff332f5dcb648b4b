// y[M][N] = x[M][K] * W[N][K]^T for more than a few rows of x, both in int8, and what makes y of the sums: the product of
// LLM.int8() for prompts and batches, on compute capability 9.0.
//
// A tile is 128 rows of W by TOKENS rows of x. The matrix units read both from shared memory, where the copy engine brings 128
// columns of each a stage; one thread asks for them. Two warpgroups multiply, 64 rows of W each.
//
//                     x: TOKENS rows of 128 bytes a stage
//                   +---------------------------------------------+
//     warpgroup 0   |  64 rows of W, 128 bytes a stage            |   sums: TOKENS / 2 registers a thread, int32
//     warpgroup 1   |  64 more                                    |
//                   +---------------------------------------------+
//
//     other warps: one thread has the copy engine bring W and x; three warps gather the columns of x that have no codes
//
// A block goes from tile to tile; while it writes one, copies for the next are on the way. The tokens' tiles of one range of
// rows of W follow each other, so W comes from memory once.
//
// Roofline, clocks of a multiprocessor for a step of 128 columns:
//     tokens                         64    128    256
//     matrix units (4096 a clock)   256    512   1024
//     shared memory, 128 B a clock  448    640   1024    W and x coming in, W out once, x out for each warpgroup
// and from the second-level cache 24, 32 and 48 KB a step. For long launches that is what binds: two blocks, a cluster, then
// share the rows of x, of which each brings a half to both (`sharing`), and 32 KB a step are left. Measured on an H200, this
// kernel alone, for 64, 128, 256, 512, 1024, 2048 and 4096 rows of x: 14336 x 4096 18.2, 20.1, 26.4, 46.8, 91.5, 190 and 346 us
// (389 without sharing; up to 1024 rows sharing gains nothing). A product of bfloat16 in cuBLAS, in the same run: 33.3, 33.4,
// 44.4, 85.7, 153, 307 and 627 us. Up to 128 rows what binds is memory, W being 59 MB.
//
// When a launch has few tiles, up to four blocks, a cluster, share one, a part of K each. Sums are whole numbers: their order
// does not matter.
//
// Then, in registers: sums to float32, times the scale of the token; the columns that are outliers, if there are any, in
// products of 16-bit values with float32 sums on top; times the scale of the row of W; the bias; rounded once. How many such
// columns there are is read on the device. While a tile's sums are made, three warps gather x and W of as many of them as there
// is room for to where y will be put together, and what is more in turns with the products. A float32 of x is the sum of three
// bfloat16, exactly. Gathered by those who multiply, behind their sums, 16 such columns cost 20000 clocks a tile: each was a
// chain of loads.
//
// Shared memory, in this order: the ring of stages (W, then x, rows of 128 bytes with the swizzle of 128 bytes), y on its way
// to whole lines of memory (for each warpgroup up to 128 tokens of 64 16-bit values) and before it outliers, the tokens' scales
// for each warpgroup, barriers. The sums from the other blocks of a cluster take the place of the ring.
#pragma once

#include "common/wgmma.cuh"
#include "int8/int8_epilogue.cuh"

constexpr int GROUP = 128;       // threads of a warpgroup
constexpr int TEAM = 2 * GROUP;  // threads that multiply
constexpr int TEAM_WARPS = TEAM / WARP;
constexpr int GATHERERS = GROUP - WARP;  // threads that gather outliers
constexpr int THREADS = TEAM + GROUP;    // and a warp that has the copy engine work
constexpr int ROWS = TEAM / 2;           // of W in a tile: 64 for each warpgroup
constexpr int GROUP_ROWS = ROWS / 2;
constexpr int STEP = 128;        // columns of a stage: bytes that the swizzle spans
constexpr int QUARTERS = 4;      // of a step: a product of the units takes 32 columns
constexpr int MOST_PARTS = 4;    // of K
constexpr int OUT_TOKENS = 128;  // that a warpgroup writes at once
constexpr int OUT_PITCH = GROUP_ROWS * 2;
constexpr int CHUNK = 16;  // outlier columns that a product takes
constexpr u32 CHUNK_ROW = CHUNK * 2;
constexpr int PIECES = 3;  // 16-bit values that are a float32
constexpr float INVERSE_127 = 1.0f / 127;

// Of the tokens of a tile, how many a block of a cluster adds up, at most; and the bytes of their sums from all parts.
__device__ constexpr int part_tokens(int tokens, int parts) { return (tokens / 16 + parts - 1) / parts * 16; }
__device__ constexpr u32 received_bytes(int tokens, int parts) { return u32(parts * part_tokens(tokens, parts)) * (ROWS * 4); }

// The bytes of a chunk of outliers: x in so many pieces, then codes of W.
__device__ constexpr u32 chunk_bytes(int tokens, int pieces) { return u32(pieces * tokens) * CHUNK_ROW + ROWS * CHUNK; }

// How much of everything is in shared memory. The launcher takes BYTES from here.
template <int TOKENS>
struct Shape {
    // What leaves some 100 KB on the way while one stage is worked on.
    static constexpr int STAGES = TOKENS > 128 ? 4 : TOKENS > 64 ? 6 : 8;
    static constexpr int SUMS = TOKENS / 2;  // of a thread
    // Whether blocks may share a tile: with more sums a thread has no registers for that, and launches have more tiles.
    static constexpr bool DIVIDES = TOKENS <= 128;
    static constexpr u32 W_BYTES = ROWS * STEP;
    static constexpr u32 X_BYTES = TOKENS * STEP;
    static constexpr u32 STAGE_BYTES = W_BYTES + X_BYTES;
    static constexpr u32 OUT_BYTES = (TOKENS < OUT_TOKENS ? TOKENS : OUT_TOKENS) * OUT_PITCH;  // of a warpgroup
    // Of a thread that multiplies, and of the others: those that gather have more loads on the way with more.
    static constexpr int REGISTERS = TOKENS > 128 ? 224 : 184, OTHER_REGISTERS = TOKENS > 128 ? 56 : 136;
    static constexpr int LOADS = TOKENS > 128 ? 2 : 4;
    static_assert(TEAM * REGISTERS + GROUP * OTHER_REGISTERS <= THREADS * (65536 / THREADS / 8 * 8),
                  "a block has the registers that it was launched with, and would wait for more for ever");
    // In this order.
    static constexpr u32 OUT_AT = STAGES * STAGE_BYTES;
    static constexpr u32 SCALES_AT = OUT_AT + 2 * OUT_BYTES;
    static constexpr u32 BARRIERS_AT = SCALES_AT + 2 * TOKENS * 4;
    static constexpr u32 BYTES = BARRIERS_AT + 2 * (STAGES + 1) * 8;
    static_assert(BYTES <= 232448, "what a block may have");
    static_assert(!DIVIDES || (received_bytes(TOKENS, 2) <= OUT_AT && received_bytes(TOKENS, 3) <= OUT_AT &&
                               received_bytes(TOKENS, 4) <= OUT_AT),
                  "sums of all parts take the place of the ring");
    static_assert(chunk_bytes(TOKENS, PIECES) <= 2 * OUT_BYTES, "outliers take the place of y");
};

// How many chunks of outliers are gathered at once, for a type of x.
template <int TOKENS>
__device__ inline int room_for(u32 kind) {
    constexpr u32 ALL = 2 * Shape<TOKENS>::OUT_BYTES;
    return int(kind == KIND_F32 ? ALL / chunk_bytes(TOKENS, PIECES) : ALL / chunk_bytes(TOKENS, 1));
}

// A place in a ring, and whether the ring was passed an odd number of times.
template <int COUNT>
struct Turn {
    u32 place = 0, round = 0;

    __device__ void next() {
        if (++place == u32(COUNT)) {
            place = 0;
            round ^= 1;
        }
    }
};

// How the work is divided.
struct TilePlan {
    int token_tiles;  // those of one range of rows of W follow each other
    int tiles;        // for each block, or cluster of `parts` or `sharing` blocks
    int workers;      // blocks or clusters: each takes every so-manieth tile; with parts, one
    int steps;        // of K, of a part; the last part may have fewer
    int parts;        // of K: blocks of a cluster that share a tile, 1 to MOST_PARTS
    int sharing;      // blocks of a cluster, 1 or 2, with the same tokens and rows of W after each other; 1 with parts
    int early;        // whether W may be read before the kernel before has ended
};

// What a block does. Found by each role for itself: less has to be kept while a thread has few registers.
struct Share {
    int rank, worker;  // in the cluster, and which of them it is
    int begin, steps;  // of K
    int ranges;        // of rows, of the cluster

    __device__ Share(const TilePlan &plan, bool shares, bool divides, int k) {
        rank = shares || divides ? int(cluster_rank()) : 0;
        worker = int(blockIdx.x) / (shares ? plan.sharing : plan.parts);
        const int all = (k + STEP - 1) / STEP;
        begin = divides ? rank * plan.steps : 0;
        steps = (begin + plan.steps < all ? begin + plan.steps : all) - begin;
        ranges = shares ? plan.sharing : 1;
    }
    __device__ int row(const TilePlan &plan, int tile) const {
        return (tile / plan.token_tiles * ranges + (ranges > 1 ? rank : 0)) * ROWS;
    }
};

// The 16-bit pieces of a value of x: itself, or the upper eight bits of what is left, three times.
__device__ inline void split(u32 (&pieces)[1], u16 value) { pieces[0] = value; }
__device__ inline void split(u32 (&pieces)[PIECES], float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) {
        // All in the first; a NaN stays one.
        pieces[0] = bits >> 16 | ((bits & 0x007fffffu) != 0 ? 0x40u : 0u);
        pieces[1] = pieces[2] = 0;
        return;
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const u32 high = __float_as_uint(value) & 0xffff0000u;
        pieces[p] = high >> 16;
        value = __fsub_rn(value, __uint_as_float(high));
    }
}

// Columns [first, first + CHUNK * chunks) of the list of outliers, those behind its last being zero: x of the tile's tokens and
// codes of its rows of W. Of each chunk there are the pieces of x, [token][16], then W, [row][16].
template <int TOKENS, int COUNT, typename X>
__device__ inline void gather(u8 *to, const Epilogue &e, const X *x, const i8 *w, int count, int first, int chunks, int token,
                              int row, int m, int n, int k, int member) {
    constexpr u32 ALL = chunk_bytes(TOKENS, COUNT);
    const auto column_of = [&](int i) { return i < count ? e.columns[i] : -1; };
#pragma unroll(Shape<TOKENS>::LOADS)
    for (int i = member; i < chunks * (CHUNK / 4) * TOKENS; i += GATHERERS) {
        const int at = i % TOKENS, four = i / TOKENS;
        const X *const from = x + i64(token + at < m ? token + at : m - 1) * k;
        X value[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int column = column_of(first + 4 * four + j);
            value[j] = column >= 0 ? from[column] : X{};
        }
        u32 pieces[4][COUNT];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            split(pieces[j], value[j]);
        }
        u8 *const place = to + u32(four / 4) * ALL + u32(at) * CHUNK_ROW + u32(four % 4 * 8);
#pragma unroll
        for (int p = 0; p < COUNT; p++) {
            *reinterpret_cast<Words2 *>(place + u32(p * TOKENS) * CHUNK_ROW) = {pieces[0][p] | pieces[1][p] << 16,
                                                                               pieces[2][p] | pieces[3][p] << 16};
        }
    }
#pragma unroll(Shape<TOKENS>::LOADS)
    for (int i = member; i < chunks * (CHUNK / 4) * ROWS; i += GATHERERS) {
        const int at = i % ROWS, four = i / ROWS;
        const i8 *const from = w + i64(row + at < n ? row + at : n - 1) * k;
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int column = column_of(first + 4 * four + j);
            word |= (column >= 0 ? u32(from[column]) & 0xff : 0u) << (8 * j);
        }
        u8 *const place = to + u32(four / 4) * ALL + u32(COUNT * TOKENS) * CHUNK_ROW + u32(at * CHUNK + four % 4 * 4);
        *reinterpret_cast<u32 *>(place) = word;
    }
}

// sums[eight tokens][4] of a thread += outliers of x, from token `first_token` of the tile on, times those of W, of chunks that
// were gathered; `row` is the thread's first of the tile.
template <typename T, int EIGHTS>
__device__ inline void add_outliers(float (&sums)[EIGHTS][4], const u8 *from, int pieces, int chunks, int row, int first_token,
                                    int tokens, int lane) {
    constexpr int TOKENS = 8 * EIGHTS;
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int c = 0; c < chunks; c++) {
        const u8 *const w = from + u32(pieces * TOKENS) * CHUNK_ROW + u32(row * CHUNK + t * 4);
        // The units' columns 2t, 2t + 1, 2t + 8 and 2t + 9 are 4t to 4t + 3 of the chunk, of both operands.
        u32 a[4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 word = *reinterpret_cast<const u32 *>(w + r * 8 * CHUNK);
            float code[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                code[j] = float(int(word << (24 - 8 * j)) >> 24);
            }
            a[r] = pack2<T>(code[0], code[1]);
            a[2 + r] = pack2<T>(code[2], code[3]);
        }
#pragma unroll 1
        for (int p = 0; p < pieces; p++) {
            const u8 *const x = from + u32(p * TOKENS + first_token + g) * CHUNK_ROW + u32(t * 8);
#pragma unroll
            for (int j = 0; j < EIGHTS; j++) {
                if (8 * j < tokens) {
                    const Words2 b = *reinterpret_cast<const Words2 *>(x + u32(8 * j) * CHUNK_ROW);
                    mma_m16n8k16(T{}, sums[j], a, b.word[0], b.word[1]);
                }
            }
        }
        from += chunk_bytes(TOKENS, pieces);
    }
}

// Up to OUT_TOKENS tokens of y, from `first` on, to [token][row] in shared memory; `to` is the lane's in the first sixteen.
template <typename T, int EIGHTS>
__device__ inline void put(u8 *to, const float (&values)[EIGHTS][4], int first, int tokens) {
#pragma unroll
    for (int j = 0; j < EIGHTS; j += 2) {
        if (8 * j >= first && 8 * j < first + OUT_TOKENS && 8 * j < tokens) {
            store_transposed(to + (8 * j - first) * OUT_PITCH, pack2<T>(values[j][0], values[j][1]),
                             pack2<T>(values[j][2], values[j][3]), pack2<T>(values[j + 1][0], values[j + 1][1]),
                             pack2<T>(values[j + 1][2], values[j + 1][3]));
        }
    }
}

template <int TOKENS>
__device__ inline void int8_tile(const TensorMap *w_map, const TensorMap *x_map, const i8 *w, const Epilogue &e, int m, int n,
                                 int k, const TilePlan &plan) {
    using S = Shape<TOKENS>;
    DYNAMIC_SHARED_1024(shared);
    Barrier *const full = reinterpret_cast<Barrier *>(shared + S::BARRIERS_AT);
    Barrier *const empty = full + S::STAGES;
    Barrier *const gathered = empty + S::STAGES, *const taken = gathered + 1;

    const int thread = int(threadIdx.x), lane = thread % WARP;
    const int warp = __shfl_sync(ALL_LANES, thread / WARP, 0);
    const bool shares = plan.sharing > 1, divides = S::DIVIDES && plan.parts > 1;
    if (thread == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], u32(TEAM_WARPS * plan.sharing));
        }
        barrier_init(gathered, GATHERERS / WARP);
        barrier_init(taken, TEAM_WARPS);
        barriers_made();
    }
    if (shares) {
        // The other block arrives at barriers here, and copies to here.
        cluster_meet();
    } else {
        __syncthreads();
    }

    const bool may_have_outliers = e.count != nullptr;
    if (warp >= TEAM_WARPS) {
        give_registers<S::OTHER_REGISTERS>();
        if (thread == TEAM) {
            const Share mine(plan, shares, divides, k);
            const int worker = mine.worker, steps = mine.steps;
            Turn<S::STAGES> turn;
            // W of the first stages before what is before has ended, or at least to the second-level cache.
            const int ahead = steps < S::STAGES ? steps : S::STAGES;
            const auto bring_w = [&](u32 place, int step, int row) {
                barrier_arrive_expecting(&full[place], S::STAGE_BYTES);
                copy_box(shared + place * S::STAGE_BYTES, w_map, (mine.begin + step) * STEP, row, &full[place]);
            };
            const bool early = plan.early != 0;
            for (int step = 0; step < ahead; step++) {
                if (early) {
                    bring_w(u32(step), step, mine.row(plan, worker));
                } else {
                    fetch_box(w_map, (mine.begin + step) * STEP, mine.row(plan, worker));
                }
            }
            wait_for_previous();
            for (int tile = worker; tile < plan.tiles; tile += plan.workers) {
                const int token = tile % plan.token_tiles * TOKENS, row = mine.row(plan, tile);
                for (int step = 0; step < steps; step++) {
                    if (!early || tile != worker || step >= ahead) {
                        barrier_wait(&empty[turn.place], turn.round ^ 1);
                        bring_w(turn.place, step, row);
                    }
                    u8 *const to = shared + turn.place * S::STAGE_BYTES + S::W_BYTES;
                    if (shares) {
                        const int half = mine.rank * (TOKENS / 2);
                        copy_box_to(3, to + half * STEP, x_map, (mine.begin + step) * STEP, token + half, &full[turn.place]);
                    } else {
                        copy_box(to, x_map, (mine.begin + step) * STEP, token, &full[turn.place]);
                    }
                    turn.next();
                }
            }
        }
        bool met = false;
        // As the others do, below, between the first outliers and what more there are.
        const auto meet_cluster = [&]() {
            if (divides && !met) {
                cluster_meet();
                cluster_meet();
            }
            met = true;
        };
        if (warp > TEAM_WARPS && may_have_outliers) {
            const Share mine(plan, shares, divides, k);
            wait_for_previous();
            const int count = *e.count, room = room_for<TOKENS>(e.kind);
            u32 parity = 1;
            for (int tile = mine.worker; tile < plan.tiles && count > 0; tile += plan.workers) {
                const int token = tile % plan.token_tiles * TOKENS, row = mine.row(plan, tile);
                for (int first = 0; first < count; first += room * CHUNK) {
                    const int left = (count - first + CHUNK - 1) / CHUNK, chunks = left < room ? left : room;
                    u8 *const to = shared + S::OUT_AT;
                    if (first > 0) {
                        meet_cluster();
                    }
                    barrier_wait(taken, parity);
                    parity ^= 1;
                    const int member = thread - TEAM - WARP;
                    if (e.kind == KIND_F32) {
                        const float *const x = static_cast<const float *>(e.x);
                        gather<TOKENS, PIECES>(to, e, x, w, count, first, chunks, token, row, m, n, k, member);
                    } else {
                        const u16 *const x = static_cast<const u16 *>(e.x);
                        gather<TOKENS, 1>(to, e, x, w, count, first, chunks, token, row, m, n, k, member);
                    }
                    __syncwarp();
                    // Read anew: a register less to keep.
                    if (read_lane() == 0) {
                        barrier_arrive(gathered);
                    }
                }
            }
        }
        __syncwarp();
        meet_cluster();
        if (shares) {
            cluster_meet();
        }
        return;
    }

    take_registers<S::REGISTERS>();
    const Share mine(plan, shares, divides, k);
    const int worker = mine.worker, steps = mine.steps, rank = mine.rank;
    const int group = warp / (TEAM_WARPS / 2), member = thread % GROUP;
    const auto meet_group = [&]() {
        if (group == 0) {
            meet<1, GROUP>();
        } else {
            meet<2, GROUP>();
        }
    };
    // Rows g and g + 8 of the warp's sixteen, columns 8j + 2t and the next.
    const int g = lane / 4, t = lane % 4;
    const int my_row = group * GROUP_ROWS + warp % (TEAM_WARPS / 2) * 16 + g;
    const u32 w_base = operand(shared + group * GROUP_ROWS * STEP), x_base = operand(shared + S::W_BYTES);
    const u32 release_at = address_at(empty, shares ? u32(lane % 2) : u32(rank));
    float *const scales = reinterpret_cast<float *>(shared + S::SCALES_AT) + group * TOKENS;
    u8 *const out = shared + S::OUT_AT + u32(group) * S::OUT_BYTES;
    const bool scaled = e.kind != KIND_I32;
    int sums[S::SUMS];
    Turn<S::STAGES> turn;

    const auto step = [&](bool fresh) {
        barrier_wait(&full[turn.place], turn.round);
        const u32 stage = turn.place * (S::STAGE_BYTES >> 4);
        products_begin();
#pragma unroll
        for (int q = 0; q < QUARTERS; q++) {
            if (fresh && q == 0) {
                multiply_fresh(sums, w_base + stage, x_base + stage);
            } else {
                multiply_add(sums, w_base + stage + u32(2 * q), x_base + stage + u32(2 * q));
            }
        }
        products_commit();
    };
    const auto release = [&](u32 place) {
        if (shares) {
            if (lane < 2) {
                barrier_arrive_at(release_at + place * 8);
            }
        } else if (lane == 0) {
            barrier_arrive(&empty[place]);
        }
    };

    // The memory in which outliers are gathered, and y is put together.
    const auto took = [&]() {
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(taken);
        }
    };

    wait_for_previous();
    const int count = may_have_outliers ? *e.count : 0;
    u32 gathered_parity = 0;
    for (int tile = worker; tile < plan.tiles; tile += plan.workers) {
        const int token = tile % plan.token_tiles * TOKENS, row = mine.row(plan, tile) + my_row;
        // Rows and tokens that are not there get what the last one has: what comes of them is not written.
        const int rows[2] = {row < n ? row : n - 1, row + 8 < n ? row + 8 : n - 1};
        // Nobody reads the scales of the tile before any more.
        meet_group();
        if (scaled) {
            for (int i = member; i < TOKENS; i += GROUP) {
                scales[i] = __fmul_rn(e.row_scales[token + i < m ? token + i : m - 1], INVERSE_127);
            }
        }

        step(true);
        u32 before = turn.place;
        turn.next();
        for (int i = 1; i < steps; i++) {
            step(false);
            products_wait<1>();
            release(before);
            before = turn.place;
            turn.next();
        }
        products_wait<0>();
        release(before);
        if (tile + plan.workers >= plan.tiles) {
            let_next_start();
        }

        int tokens = TOKENS, first_token = 0;
        if (S::DIVIDES && divides) {
            // Each block of the cluster adds up a range of tokens: what the others have of them comes to its memory, in rows of
            // what all threads have of eight tokens.
            const int sixteens = part_tokens(TOKENS, plan.parts) / 16;
            first_token = sixteens * 16 * rank;
            tokens = TOKENS - first_token < sixteens * 16 ? TOKENS - first_token : sixteens * 16;
            constexpr u32 ALL = TEAM * 16;
            u8 *const own = shared + thread * 16;
            // Nobody's matrix units read the ring any more, and no copy to it is on the way.
            cluster_meet();
            int owner = 0, at = rank * sixteens;
            u32 there = address_at(own, 0);
#pragma unroll
            for (int j = 0; j < TOKENS / 16; j++) {
                const int *const d = sums + 8 * j;
                store_at(there + u32(2 * at) * ALL, d[0], d[1], d[2], d[3]);
                store_at(there + u32(2 * at + 1) * ALL, d[4], d[5], d[6], d[7]);
                at++;
                if (at == (rank + 1) * sixteens && owner + 1 < plan.parts) {
                    owner++;
                    at = rank * sixteens;
                    there = address_at(own, u32(owner));
                }
            }
            cluster_meet();
#pragma unroll
            for (int j = 0; j < part_tokens(TOKENS, 2) / 16; j++) {
                if (16 * j < tokens) {
                    int total[8] = {};
                    for (int from = 0; from < plan.parts; from++) {
                        const u8 *const received = own + u32(from * sixteens + j) * (2 * ALL);
                        const Words4 *const theirs = reinterpret_cast<const Words4 *>(received);
#pragma unroll
                        for (int i = 0; i < 8; i++) {
                            total[i] += int(theirs[i / 4 * TEAM].word[i % 4]);
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        sums[8 * j + i] = total[i];
                    }
                }
            }
        }
        if (!scaled) {
            // The sums themselves: 32 bytes of eight rows of W at a time.
            int *const y = static_cast<int *>(e.y) + row;
#pragma unroll
            for (int i = 0; i < S::SUMS; i++) {
                const int at = i / 4 * 8 + 2 * t + i % 2, to = token + first_token + at;
                if (at < tokens && to < m && row + i / 2 % 2 * 8 < n) {
                    y[i64(to) * n + i / 2 % 2 * 8] = sums[i];
                }
            }
            continue;
        }

        meet_group();
        float values[TOKENS / 8][4];
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            if (8 * j < tokens) {
                const Floats2 scale = *reinterpret_cast<const Floats2 *>(scales + first_token + 8 * j + 2 * t);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    values[j][i] = __fmul_rn(float(sums[4 * j + i]), scale.value[i % 2]);
                }
            }
        }
        const int pieces = e.kind == KIND_F32 ? PIECES : 1, room = room_for<TOKENS>(e.kind);
        for (int first = 0; first < count; first += room * CHUNK) {
            const int left = (count - first + CHUNK - 1) / CHUNK, chunks = left < room ? left : room;
            barrier_wait(gathered, gathered_parity);
            gathered_parity ^= 1;
            if (e.kind == KIND_F16) {
                add_outliers<F16>(values, shared + S::OUT_AT, pieces, chunks, my_row, first_token, tokens, lane);
            } else {
                add_outliers<Bf16>(values, shared + S::OUT_AT, pieces, chunks, my_row, first_token, tokens, lane);
            }
            if (first + room * CHUNK < count) {
                took();
            }
        }
        if (count > 0) {
            // y takes the place of the last ones.
            meet<3, TEAM>();
        }
        float column_scale[2], bias[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            column_scale[r] = __fmul_rn(e.column_scales[rows[r]], INVERSE_127);
            // Adding -0 changes nothing.
            bias[r] = e.bias != nullptr ? load_as(e.bias, e.bias_kind, rows[r]) : -0.0f;
        }
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                values[j][i] = __fadd_rn(__fmul_rn(values[j][i], column_scale[i / 2]), bias[i / 2]);
            }
        }
        if (e.kind == KIND_F32) {
            float *const y = static_cast<float *>(e.y) + row;
#pragma unroll
            for (int i = 0; i < S::SUMS; i++) {
                const int at = i / 4 * 8 + 2 * t + i % 2, to = token + first_token + at;
                if (at < tokens && to < m && row + i / 2 % 2 * 8 < n) {
                    y[i64(to) * n + i / 2 % 2 * 8] = values[i / 4][i % 4];
                }
            }
            if (count > 0) {
                took();
            }
            continue;
        }
        // Sixteen tokens, [token][row]: the 16-byte piece c of a token at place c ^ token % 8.
        const u32 out_token = u32(lane / 16 * 8 + lane % 8);
        const u32 out_offset = out_token * OUT_PITCH + (u32(warp % (TEAM_WARPS / 2) * 2 + lane / 8 % 2) ^ (out_token & 7)) * 16;
        const bool whole = n % 8 == 0 && is_aligned(e.y, 16);
#pragma unroll
        for (int round = 0; round < (TOKENS + OUT_TOKENS - 1) / OUT_TOKENS; round++) {
            // Nobody reads the tokens before any more.
            meet_group();
            const int first = round * OUT_TOKENS;
            if (e.kind == KIND_BF16) {
                put<Bf16>(out + out_offset, values, first, tokens);
            } else {
                put<F16>(out + out_offset, values, first, tokens);
            }
            meet_group();
            const int here = tokens - first < OUT_TOKENS ? tokens - first : OUT_TOKENS;
            constexpr int PIECES_OF_ROW = OUT_PITCH / 16;
            const int column = mine.row(plan, tile) + group * GROUP_ROWS + member % PIECES_OF_ROW * 8;
            for (int at = member / PIECES_OF_ROW; at < here; at += GROUP / PIECES_OF_ROW) {
                const int to = token + first_token + first + at;
                if (to < m && column < n) {
                    const u8 *const from = out + at * OUT_PITCH + ((member % PIECES_OF_ROW) ^ (at & 7)) * 16;
                    u16 *const target = static_cast<u16 *>(e.y) + (i64(to) * n + column);
                    if (whole) {
                        store_words(reinterpret_cast<Words4 *>(target), *reinterpret_cast<const Words4 *>(from));
                    } else {
                        for (int i = 0; i < 8 && column + i < n; i++) {
                            target[i] = reinterpret_cast<const u16 *>(from)[i];
                        }
                    }
                }
            }
        }
        if (count > 0) {
            took();
        }
    }
    if (shares) {
        // The other block may still copy to here.
        cluster_meet();
    }
}
