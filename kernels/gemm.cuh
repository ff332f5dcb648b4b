// y[M][N] = x[M][K] * W[N][K]^T + bias[N] for more than a few rows of x, W in 4 bits: the products of prompts and batches.
//
// A block of threads makes a tile of ROWS rows of W by TOKENS rows of x; the matrix units have the rows of W as rows, and W
// in registers. Two warpgroups multiply, 64 rows each: while the units work on a step of 64 columns, a warp unpacks the next
// one straight into the registers that they read, each weight its codebook value times the scale of its block in float32,
// rounded once: the bits that dequantize gives. So the result differs from that of a dense copy in the order of the sums
// alone. Four more warps bring codes, x and scales:
//
//                        x: TOKENS rows, from the copy engine, 64 columns a stage
//                      +---------------------------------------------+
//        warpgroup 0   |  64 rows of W, unpacked in registers        |   sums: TOKENS / 2 registers a thread
//        warpgroup 1   |  64 more                                    |
//                      +---------------------------------------------+
//        warp 8: codes of W, 128 columns a stage    warp 9: x    warps 10, 11: scales, 256 columns a stage, as float32
//
// Bound by shared memory up to 128 tokens, then by the matrix units. Clocks of a multiprocessor for 128 rows of W by 64
// columns, at 128 bytes a clock:
//     tokens                         64    128    256
//     matrix units                  256    512   1024
//     their reads of x              128    256    512
//     the table: 8 bytes a code     256    256    256
//     x coming in                    64    128    256
//     codes in and out               96     96     96
//     all of shared memory          544    736   1120
// Measured on an H200, 14336 x 4096: 28.6, 35.4 and 48.8 us (cuBLAS with a 16-bit weight: 33.6, 33.6 and 44.1); without the
// looking up 25.6 and 42.7 for 128 and 256 tokens. Launches of several waves are slower than the sum of these: power.
//
// Shared memory, in this order: the ring of x (4 stages of TOKENS rows of 128 bytes, 128-byte swizzle; 8 with 64 tokens), the
// table (256 bytes by 32 lanes by two float32: 64 KB; no two lanes meet in a bank), the ring of codes (stages of 8 KB,
// 64-byte swizzle), that of scales (2 of 4 KB), the map of nested scales, barriers. At the end sums of the other blocks of a
// cluster take the place of x, and y that of the table, on its way to whole lines of memory.
// Registers: 208 or 224 of a thread that multiplies (sums, and twice 16 of unpacked weights), the rest for the other warps.
//
// When a launch has few tiles, up to four blocks, a cluster, share one, a part of K each: each adds up a range of tokens, in
// an order that is fixed. The result does not change from run to run.
//
// Tried, and slower on an H200 in 14336 x 4096: W unpacked by warps of their own into shared memory, for products of two
// operands from there (48.4 us for 128 rows of x, 94.1 for 256: more of shared memory, and the unpacking waits for itself);
// half of the rows unpacked by permutations of bytes from a scaled table in registers instead of the table (33.7, 40.1 and
// 48.8 us); copies of x for two blocks of a cluster at once (30.4, 37.1 and 51.0 us).
#pragma once

#include "scales.cuh"
#include "wgmma.cuh"

constexpr int GROUP = 128;                       // threads of a warpgroup
constexpr int MULTIPLIERS = 2;                   // warpgroups
constexpr int MULTIPLIER_WARPS = MULTIPLIERS * GROUP / WARP;
constexpr int THREADS = (MULTIPLIERS + 1) * GROUP;
constexpr int ROWS = MULTIPLIERS * 64;           // of W in a tile
constexpr int STEP = 64;                         // columns of W in a step: of a row of x the units want as many together
constexpr int STEP_BYTES = STEP * 2;
constexpr int STAGE = 2 * STEP;                  // columns of a copy of codes
constexpr int STAGE_BYTES = STAGE / 2;
constexpr int UNIT_STEPS = 4;                    // whose scales come together; K is divided by units
constexpr int UNIT = UNIT_STEPS * STEP;
constexpr int PIECE = 32;                        // columns that have one scale, whatever the block size
constexpr int PIECES = UNIT / PIECE;
constexpr int SCALERS = 2 * WARP;                // threads that bring scales
constexpr int MOST_PARTS = 4;                    // of K

// What each code stands for, for a block whose largest magnitude is 1.
struct Codebook {
    float value[16];
};

// Of the tokens of a tile, how many a block of a cluster adds up, at most; and the bytes of their sums from all parts.
__device__ constexpr int part_tokens(int tokens, int parts) { return (tokens / 16 + parts - 1) / parts * 16; }
__device__ constexpr u32 received_bytes(int tokens, int parts) { return u32(parts * part_tokens(tokens, parts)) * (ROWS * 4); }

// How much of everything is in shared memory. rust/cuda/src/gemm.rs has the same numbers.
template <int TOKENS>
struct Shape {
    static constexpr int CODES = TOKENS > 128 ? 3 : 6;  // stages of codes
    static constexpr int X = TOKENS > 64 ? 4 : 8;       // steps of x
    static constexpr int SCALES = 2;                    // units of scales
    static constexpr int SUMS = TOKENS / 2;             // of a thread
    static constexpr u32 CODE_BYTES = ROWS * STAGE_BYTES;
    static constexpr u32 X_BYTES = TOKENS * STEP_BYTES;
    static constexpr u32 SCALE_BYTES = ROWS * PIECES * 4;
    static constexpr u32 TABLE_BYTES = 256 * 256;
    // In this order.
    static constexpr u32 X_AT = 0;
    static constexpr u32 TABLE_AT = X_AT + X * X_BYTES;
    static constexpr u32 CODES_AT = TABLE_AT + TABLE_BYTES;
    static constexpr u32 SCALES_AT = CODES_AT + CODES * CODE_BYTES;
    static constexpr u32 MAP_AT = SCALES_AT + SCALES * SCALE_BYTES;
    static constexpr u32 BARRIERS_AT = MAP_AT + 1024;
    static constexpr u32 BYTES = BARRIERS_AT + 2 * (CODES + X + SCALES) * 8;
    static_assert(TOKENS * ROWS * 2 <= TABLE_BYTES, "y takes the place of the table");
    // Sums of a cluster take the place of x and half of the table, y of a part the other half.
    static constexpr u32 ROOM = TABLE_AT + TABLE_BYTES / 2;
    static_assert(received_bytes(TOKENS, 2) <= ROOM && received_bytes(TOKENS, 3) <= ROOM && received_bytes(TOKENS, 4) <= ROOM,
                  "for 2 to MOST_PARTS parts");
    static_assert(part_tokens(TOKENS, 2) * ROWS * 2 <= TABLE_BYTES / 2, "y of a part");
    static constexpr int REGISTERS = TOKENS == 256 ? 224 : 208, OTHER_REGISTERS = TOKENS == 256 ? 56 : 88;
    static_assert(BYTES <= 232448, "what a block may have");
};

// A place in a ring, and how often the ring was passed.
template <int COUNT>
struct Turn {
    u32 place = 0, round = 0;

    __device__ void next() {
        place++;
        if (place == COUNT) {
            place = 0;
            round ^= 1;
        }
    }
};

// How the work is divided: a tile for each block, or for each cluster of `parts` blocks.
struct GemmPlan {
    int token_tiles;  // those of one range of rows of W follow each other
    int units;        // of K, of a part; the last part may have fewer
    int parts;        // of K: blocks of a cluster that share a tile, 1 to MOST_PARTS
};

template <typename T, int TOKENS>
__device__ inline void gemm(const TensorMap *x_map, const TensorMap *codes_map, const Scales &scales, const Codebook &codebook,
                            const T *bias, T *y, int m, int n, int k, int block_shift, const GemmPlan &plan) {
    using S = Shape<TOKENS>;
    DYNAMIC_SHARED_1024(shared);
    Barrier *const codes_full = reinterpret_cast<Barrier *>(shared + S::BARRIERS_AT);
    Barrier *const codes_empty = codes_full + S::CODES;
    Barrier *const x_full = codes_empty + S::CODES;
    Barrier *const x_empty = x_full + S::X;
    Barrier *const scales_full = x_empty + S::X;
    Barrier *const scales_empty = scales_full + S::SCALES;

    const int thread = int(threadIdx.x), lane = thread % WARP;
    const int warp = __shfl_sync(ALL_LANES, thread / WARP, 0);
    const int part = plan.parts > 1 ? int(cluster_rank()) : 0;
    const int tile = int(blockIdx.x) / plan.parts;
    const int token = tile % plan.token_tiles * TOKENS;
    const int row = tile / plan.token_tiles * ROWS;
    // Of K, in units.
    const int all = (k + UNIT - 1) / UNIT;
    const int begin = part * plan.units;
    const int units = (begin + plan.units < all ? begin + plan.units : all) - begin;

    if (thread == 0) {
        for (int i = 0; i < S::CODES; i++) {
            barrier_init(&codes_full[i], 1);
            barrier_init(&codes_empty[i], MULTIPLIER_WARPS);
        }
        for (int i = 0; i < S::X; i++) {
            barrier_init(&x_full[i], 1);
            barrier_init(&x_empty[i], MULTIPLIER_WARPS);
        }
        for (int i = 0; i < S::SCALES; i++) {
            barrier_init(&scales_full[i], SCALERS / WARP);
            barrier_init(&scales_empty[i], MULTIPLIER_WARPS);
        }
        barriers_made();
    }
    __syncthreads();

    if (warp >= MULTIPLIER_WARPS) {
        give_registers<S::OTHER_REGISTERS>();
        if (warp == MULTIPLIER_WARPS) {
            if (lane == 0) {
                const int stages = units * (UNIT / STAGE), first = begin * (UNIT / 2);
                for (int stage = 0; stage < stages && stage < S::CODES; stage++) {
                    fetch_box(codes_map, first + stage * STAGE_BYTES, row);
                }
                wait_for_previous();
                Turn<S::CODES> turn;
                for (int stage = 0; stage < stages; stage++) {
                    Barrier *const full = &codes_full[turn.place];
                    barrier_wait(&codes_empty[turn.place], turn.round ^ 1);
                    barrier_arrive_expecting(full, S::CODE_BYTES);
                    u8 *const to = shared + S::CODES_AT + turn.place * S::CODE_BYTES;
                    copy_box(to, codes_map, first + stage * STAGE_BYTES, row, full);
                    turn.next();
                }
            }
            __syncwarp();
        } else if (warp == MULTIPLIER_WARPS + 1) {
            if (lane == 0) {
                wait_for_previous();
                Turn<S::X> turn;
                for (int step = 0; step < units * UNIT_STEPS; step++) {
                    Barrier *const full = &x_full[turn.place];
                    barrier_wait(&x_empty[turn.place], turn.round ^ 1);
                    barrier_arrive_expecting(full, S::X_BYTES);
                    copy_box(shared + S::X_AT + turn.place * S::X_BYTES, x_map, begin * UNIT + step * STEP, token, full);
                    turn.next();
                }
            }
            __syncwarp();
        } else {
            wait_for_previous();
            const int mine = thread - (MULTIPLIERS * GROUP + 2 * WARP);
            float *const map = reinterpret_cast<float *>(shared + S::MAP_AT);
            const bool nested = scales.absmax == nullptr;
            float offset = 0.0f;
            if (nested) {
                for (int code = mine; code < 256; code += SCALERS) {
                    map[code] = DYNAMIC_MAP[code];
                }
                offset = *scales.offset;
                meet<2, SCALERS>();
            }
            // Values before row i of the tile. Rows that are not there get what the last one has: what comes of them is not
            // written.
            const auto values_before = [&](int i) { return i64(row + i < n ? row + i : n - 1) * k; };
            const auto place_of = [&](u32 place) {
                return reinterpret_cast<Floats2 *>(shared + S::SCALES_AT + place * S::SCALE_BYTES);
            };
            // Blocks of 64 that lie by fours: one load of a row for a unit.
            const void *const read = nested ? static_cast<const void *>(scales.codes) : scales.absmax;
            const bool fours = block_shift == 6 && k % UNIT == 0 && is_aligned(read, 16);
            Turn<S::SCALES> turn;
            if (fours) {
                const i64 first[2] = {values_before(mine), values_before(mine + SCALERS)};
                Floats4 values[2];
                u32 codes[2];
                float second[2];
                const auto load = [&](int unit) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const i64 block = (first[i] + i64(begin + unit) * UNIT) >> 6;
                        if (nested) {
                            codes[i] = *reinterpret_cast<const u32 *>(scales.codes + block);
                            second[i] = scales.absmax2[block >> NESTED_SHIFT];
                        } else {
                            values[i] = *reinterpret_cast<const Floats4 *>(scales.absmax + block);
                        }
                    }
                };
                load(0);
                for (int unit = 0; unit < units; unit++) {
                    Floats4 now[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        now[i] = values[i];
                        if (nested) {
#pragma unroll
                            for (int j = 0; j < 4; j++) {
                                now[i].value[j] = RawScale<true>{codes[i] >> 8 * j & 255, second[i]}.value(map, offset);
                            }
                        }
                    }
                    load(unit + 1 < units ? unit + 1 : unit);
                    barrier_wait(&scales_empty[turn.place], turn.round ^ 1);
                    Floats2 *const to = place_of(turn.place) + mine;
#pragma unroll
                    for (int i = 0; i < 2; i++) {
#pragma unroll
                        for (int j = 0; j < UNIT_STEPS; j++) {
                            to[j * ROWS + SCALERS * i] = {now[i].value[j], now[i].value[j]};
                        }
                    }
                    __syncwarp();
                    if (lane == 0) {
                        barrier_arrive(&scales_full[turn.place]);
                    }
                    turn.next();
                }
            } else {
                for (int unit = 0; unit < units; unit++) {
                    barrier_wait(&scales_empty[turn.place], turn.round ^ 1);
                    const int left = k - PIECE - (begin + unit) * UNIT;
#pragma unroll 1
                    for (int i = mine; i < ROWS; i += SCALERS) {
                        const i64 first = values_before(i) + i64(begin + unit) * UNIT;
                        float found[PIECES];
#pragma unroll
                        for (int j = 0; j < PIECES; j++) {
                            // Behind the last column that of the last: there x is zero.
                            const i64 block = (first + (j * PIECE < left ? j * PIECE : left)) >> block_shift;
                            found[j] = nested ? ScaleReader<true>(scales, block)[0].value(map, offset) : scales.absmax[block];
                        }
                        Floats2 *const to = place_of(turn.place) + i;
#pragma unroll
                        for (int j = 0; j < UNIT_STEPS; j++) {
                            to[j * ROWS] = {found[2 * j], found[2 * j + 1]};
                        }
                    }
                    __syncwarp();
                    if (lane == 0) {
                        barrier_arrive(&scales_full[turn.place]);
                    }
                    turn.next();
                }
            }
        }
        if (plan.parts > 1) {
            // As the others do, below.
            cluster_meet();
            cluster_meet();
        }
    } else {
        take_registers<S::REGISTERS>();
        {
            // The table: two values of each byte, for each lane.
            Floats2 *const table = reinterpret_cast<Floats2 *>(shared + S::TABLE_AT) + lane;
#pragma unroll 2
            for (int high = warp; high < 16; high += MULTIPLIER_WARPS) {
                const float first = codebook.value[high];
#pragma unroll
                for (int low = 0; low < 16; low++) {
                    table[(16 * high + low) * WARP] = {first, codebook.value[low]};
                }
            }
            meet<1, MULTIPLIERS * GROUP>();
        }
        // What the matrix units want of row g and of row g + 8 in lane 4g + t: of each word of codes byte t, whose address in
        // the table is one permutation of bytes.
        const u32 g = u32(lane) / 4, t = u32(lane) % 4;
        const u32 my_row = u32(warp) * 16 + g;
        const u8 *const my_codes = shared + S::CODES_AT + my_row * STAGE_BYTES;
        const u32 swizzle = g >> 1;
        const u8 *const my_scales = shared + S::SCALES_AT + my_row * 8;
        const u32 lane8 = u32(lane) * 8, selector = 0x1100u | (4u + t) << 4;
        const u32 x_base = operand(shared + S::X_AT);
        float sums[S::SUMS];
        u32 a[2][16];
        Turn<S::CODES> stage;
        Turn<S::SCALES> unit_turn;
        Turn<S::X> x_turn;
        u32 x_before = 0;

        // Step i of a unit.
        const auto decode = [&](u32 (&to)[16], int i) {
            if (i == 0) {
                barrier_wait(&scales_full[unit_turn.place], unit_turn.round);
            }
            if (i % 2 == 0) {
                barrier_wait(&codes_full[stage.place], stage.round);
            }
            const u8 *const from = my_codes + stage.place * S::CODE_BYTES;
            Words4 words[2][2];
            Floats2 scale[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                // Of row g and of row g + 8.
                const u8 *const scales_at = my_scales + unit_turn.place * S::SCALE_BYTES + i * ROWS * 8 + r * 64;
                scale[r] = *reinterpret_cast<const Floats2 *>(scales_at);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const u32 piece = u32(i % 2 * 2 + j) ^ swizzle;
                    words[r][j] = *reinterpret_cast<const Words4 *>(from + r * 8 * STAGE_BYTES + piece * 16);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int w = 0; w < 4; w++) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const u32 offset = permute_bytes(lane8, words[r][j].word[w], selector);
                        const Floats2 pair = *reinterpret_cast<const Floats2 *>(shared + S::TABLE_AT + offset);
                        to[8 * j + 4 * (w / 2) + 2 * (w % 2) + r] =
                            pack2<T>(__fmul_rn(pair.value[0], scale[r].value[j]), __fmul_rn(pair.value[1], scale[r].value[j]));
                    }
                }
            }
            if (i % 2 == 1) {
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(&codes_empty[stage.place]);
                }
                stage.next();
            }
            if (i == UNIT_STEPS - 1) {
                if (lane == 0) {
                    barrier_arrive(&scales_empty[unit_turn.place]);
                }
                unit_turn.next();
            }
        };
        const auto release = [&]() {
            if (lane == 0) {
                barrier_arrive(&x_empty[x_before]);
            }
        };
        // Four steps; `fresh` when they are the first, `more` when others follow.
        const auto unit = [&](bool fresh, bool more) {
#pragma unroll
            for (int i = 0; i < UNIT_STEPS; i++) {
                barrier_wait(&x_full[x_turn.place], x_turn.round);
                const u32 b = x_base + x_turn.place * (S::X_BYTES >> 4);
                products_begin();
                if (fresh && i == 0) {
                    multiply_fresh(T{}, sums, a[0], b);
                } else {
                    multiply_add(T{}, sums, a[i % 2], b);
                }
                multiply_add(T{}, sums, a[i % 2] + 4, b + 2);
                multiply_add(T{}, sums, a[i % 2] + 8, b + 4);
                multiply_add(T{}, sums, a[i % 2] + 12, b + 6);
                products_commit();
                // Those before have ended: their part of x and their registers are free.
                products_wait<1>();
                if (!(fresh && i == 0)) {
                    release();
                }
                x_before = x_turn.place;
                x_turn.next();
                if (i + 1 < UNIT_STEPS || more) {
                    decode(a[(i + 1) % 2], (i + 1) % UNIT_STEPS);
                }
            }
        };
        decode(a[0], 0);
        unit(true, units > 1);
        for (int u = 1; u < units; u++) {
            unit(false, u + 1 < units);
        }
        products_wait<0>();
        release();

        let_next_start();
        wait_for_previous();
        // [token][row] of y, beginning with token 0 of the tile, whether or not that is here.
        u8 *out = shared + S::TABLE_AT;
        constexpr int SIXTEENS = TOKENS / 16;
        // Nobody reads the table any more.
        meet<1, MULTIPLIERS * GROUP>();
        float biases[2] = {0.0f, 0.0f};
        if (bias != nullptr) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int at = row + int(my_row) + 8 * r;
                biases[r] = to_f32(bias[at < n ? at : n - 1]);
            }
        }
        // Sums of sixteen tokens, the 16-byte piece c of a token at place c ^ token % 8.
        const u32 out_token = u32(lane / 16 * 8 + lane % 8);
        const u32 out_offset = out_token * (ROWS * 2) + (u32(warp * 2 + lane / 8 % 2) ^ (out_token & 7)) * 16;
        const auto put = [&](int sixteen, const float *d) {
            store_transposed(out + out_offset + sixteen * 16 * (ROWS * 2), pack2<T>(d[0] + biases[0], d[1] + biases[0]),
                             pack2<T>(d[2] + biases[1], d[3] + biases[1]), pack2<T>(d[4] + biases[0], d[5] + biases[0]),
                             pack2<T>(d[6] + biases[1], d[7] + biases[1]));
        };
        int tokens = TOKENS, first_token = 0;
        if (plan.parts == 1) {
#pragma unroll
            for (int j = 0; j < SIXTEENS; j++) {
                put(j, sums + 8 * j);
            }
        } else {
            // Each block of the cluster adds up a range of tokens, in the order of the parts of K: what the others have of
            // them comes to its memory, in rows of what all threads have of eight tokens.
            const int sixteens = part_tokens(TOKENS, plan.parts) / 16;
            first_token = sixteens * 16 * part;
            tokens = TOKENS - first_token < sixteens * 16 ? TOKENS - first_token : sixteens * 16;
            out = shared + S::TABLE_AT + S::TABLE_BYTES / 2 - first_token * (ROWS * 2);
            constexpr u32 ALL = MULTIPLIERS * GROUP * 16;
            u8 *const mine = shared + S::X_AT + thread * 16;
            // Nobody's matrix units read x any more, and no copy of it is on the way.
            cluster_meet();
            int owner = 0, at = part * sixteens;
            u32 there = address_at(mine, 0);
#pragma unroll
            for (int j = 0; j < SIXTEENS; j++) {
                store_at(there + u32(2 * at) * ALL, sums[8 * j], sums[8 * j + 1], sums[8 * j + 2], sums[8 * j + 3]);
                store_at(there + u32(2 * at + 1) * ALL, sums[8 * j + 4], sums[8 * j + 5], sums[8 * j + 6], sums[8 * j + 7]);
                at++;
                if (at == (part + 1) * sixteens && owner + 1 < plan.parts) {
                    owner++;
                    at = part * sixteens;
                    there = address_at(mine, u32(owner));
                }
            }
            cluster_meet();
#pragma unroll 1
            for (int j = 0; j < tokens / 16; j++) {
                float total[8] = {};
                for (int from = 0; from < plan.parts; from++) {
                    const Floats4 *const theirs =
                        reinterpret_cast<const Floats4 *>(mine + u32(from * sixteens + j) * (2 * ALL));
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        total[i] += theirs[i / 4 * (MULTIPLIERS * GROUP)].value[i % 4];
                    }
                }
                put(first_token / 16 + j, total);
            }
        }
        meet<1, MULTIPLIERS * GROUP>();
        const bool whole = n % 8 == 0 && is_aligned(y, 16);
        for (int i = thread; i < tokens * (ROWS / 8); i += MULTIPLIERS * GROUP) {
            const int at = first_token + i / (ROWS / 8), piece = i % (ROWS / 8);
            const int to = token + at, column = row + piece * 8;
            if (to < m && column < n) {
                const u8 *const from = out + at * (ROWS * 2) + ((piece ^ (at & 7)) * 16);
                T *const target = y + (i64(to) * n + column);
                if (whole) {
                    store_words(reinterpret_cast<Words4 *>(target), *reinterpret_cast<const Words4 *>(from));
                } else {
                    for (int j = 0; j < 8 && column + j < n; j++) {
                        target[j] = reinterpret_cast<const T *>(from)[j];
                    }
                }
            }
        }
    }
}
