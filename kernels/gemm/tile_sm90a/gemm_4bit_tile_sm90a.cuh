// y[M][N] = x[M][K] * W[N][K]^T + bias[N] for more than a few rows of x, W in 4 bits: the products of prompts and batches.
//
// A block of threads makes a tile of ROWS rows of W by TOKENS rows of x. The matrix units take the rows of W as their rows,
// and read W from registers. A team of two warpgroups multiplies, 64 rows each. Before a step of 64 columns each warp unpacks
// its part of W straight into the registers that the units read: each weight is its codebook value times the scale of its
// block in float32, rounded once, the bits that dequantize gives. So the result differs from that of a dense copy in the
// order of the sums alone.
//
//                     x: TOKENS rows, from the copy engine, 64 columns a stage
//                   +---------------------------------------------+
//     warpgroup 0   |  64 rows of W, unpacked in registers        |   sums: TOKENS / 2 registers a thread
//     warpgroup 1   |  64 more                                    |
//                   +---------------------------------------------+
//     other warps: one thread has the copy engine bring codes (128 columns a stage) and x; two warps bring scales as float32,
//     256 columns a stage
//
// Up to 128 tokens two teams take turns, a step each, and their sums are added at the end: what a warp does for a step is a
// chain of look-ups, and it waits for its own products; a second team works meanwhile. Beyond, registers for the sums have
// room for one team, which unpacks a quarter of a step between two products.
//
// Bound by shared memory up to 128 tokens, then by the matrix units. Clocks of a multiprocessor for 128 rows of W by 64
// columns, at 128 bytes a clock, and what follows from the times of an H200 (a clock counter in the kernel, which had one team
// then, said 657, 818 and 1240 for 64, 128 and 256 tokens, and 1193 for 256 with quarters):
//     tokens                         64     96    128    192    256
//     matrix units                  256    384    512    768   1024
//     their reads of x              128    192    256    384    512
//     the table: 8 bytes a code     256    256    256    256    256
//     x coming in                    64     96    128    192    256
//     codes in and out               96     96     96     96     96
//     all of shared memory          544    640    736    928   1120
//     from its times                610    715    810   1030   1190
// A tile takes some 4500 clocks before its first product, most of them the latency of memory, and 1200 to 3700 behind its
// last one, to write y. Measured on an H200, 14336 x 4096, for 64, 96, 128, 256 and 512 rows of x: 26.4, 30.5, 34.0, 49.3 and
// 99.1 us (cuBLAS with a 16-bit weight: 33.9, 34.0, 33.8, 45.1 and 85.1). Launches that keep the card busy for long run at
// 1.53 instead of 1.78 GHz, for want of power.
//
// Shared memory, in this order: the ring of x (4 stages of TOKENS rows of 128 bytes, 128-byte swizzle; 8 with 64 tokens), the
// table (256 bytes by 32 lanes by two float32: 64 KB; no two lanes meet in a bank), the ring of codes (stages of 8 KB,
// 64-byte swizzle), that of scales (2 of 4 KB), the map of nested scales, barriers. At the end the sums of the other team and
// of the other blocks of a cluster take the place of x and the table, as does y on its way to whole lines of memory.
//
// When a launch has few tiles, up to four blocks, a cluster, share one, a part of K each: each adds up a range of tokens, in
// an order that is fixed. The result does not change from run to run.
//
// Tried, on an H200 in 14336 x 4096:
// - One team for up to 128 tokens: 28.8, 34.2 and 34.5 us for 64, 96 and 128 rows of x.
// - W unpacked by warps of their own into shared memory, for products of two operands from there: 48.4 us for 128 rows, 94.1
//   for 256. More of shared memory, and the unpacking waits for itself.
// - No table of 64 KB: warps beside make the 16 scaled values of each block, those that multiply look four weights up at once
//   by permutations of bytes (110 instructions of a warp for a step, each 2.2 clocks of its quarter). 32.4, 34.0, 39.3, 48.4,
//   98.4 and 205 us for 64, 96, 128, 256, 512 and 1024 rows: less of shared memory, but the permutations take 60 % of their
//   unit and their chain is longer than that of the look-ups; with two teams as well.
// - Copies of x for two blocks of a cluster at once: 30.4, 37.1 and 51.0 us for 64, 128 and 256 rows.
// - Scales for the sums instead of the weights, with 4 bytes of the table for a code: ptxas does not keep two sets of sums in
//   registers, and makes the products wait for each other (C7512).
#pragma once

#include "common/scales.cuh"
#include "common/wgmma.cuh"

constexpr int GROUP = 128;         // threads of a warpgroup
constexpr int TEAM = 2 * GROUP;    // threads that multiply the same step
constexpr int TEAM_WARPS = TEAM / WARP;
constexpr int ROWS = TEAM / 2;     // of W in a tile: 64 for each warpgroup
constexpr int STEP = 64;           // columns of W in a step: of a row of x the units want as many together
constexpr int STEP_BYTES = STEP * 2;
constexpr int STAGE = 2 * STEP;    // columns of a copy of codes
constexpr int STAGE_BYTES = STAGE / 2;
constexpr int UNIT_STEPS = 4;      // whose scales come together; K is divided by units
constexpr int UNIT = UNIT_STEPS * STEP;
constexpr int PIECE = 32;          // columns that have one scale, whatever the block size
constexpr int PIECES = UNIT / PIECE;
constexpr int MOST_PARTS = 4;      // of K
constexpr int SCALERS = 2 * WARP;  // threads that bring scales, the last of the block

// What each code stands for, for a block whose largest magnitude is 1.
struct Codebook {
    float value[16];
};

// Of the tokens of a tile, how many a block of a cluster adds up, at most; and the bytes of their sums from all parts.
__device__ constexpr int part_tokens(int tokens, int parts) { return (tokens / 16 + parts - 1) / parts * 16; }
__device__ constexpr u32 received_bytes(int tokens, int parts) { return u32(parts * part_tokens(tokens, parts)) * (ROWS * 4); }
__device__ constexpr u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// What a block of threads is made of, and how much of everything is in its shared memory. The launcher takes BYTES from here.
template <int TOKENS>
struct Shape {
    // Teams that take turns. The sums of two fit into registers up to 128 tokens; then a step is unpacked by halves.
    static constexpr int TEAMS = TOKENS <= 128 ? 2 : 1;
    static constexpr int CHUNKS = TOKENS == 128 ? 2 : 1;
    static constexpr int MULTIPLIERS = TEAMS * TEAM, MULTIPLIER_WARPS = MULTIPLIERS / WARP;
    static constexpr int THREADS = MULTIPLIERS + GROUP;
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
    static_assert(BYTES <= 232448, "what a block may have");
    // At the end: the other team's sums, or those of all parts of K, and behind these y of a part.
    static_assert(TEAMS == 1 || TEAM * SUMS * 4 <= X * X_BYTES, "the other team's sums take the place of x");
    static_assert(TOKENS * ROWS * 2 <= X * X_BYTES, "y takes the place of x");
    static constexpr u32 PART_AT =
        larger(received_bytes(TOKENS, 2), larger(received_bytes(TOKENS, 3), received_bytes(TOKENS, 4)));
    static_assert(PART_AT + part_tokens(TOKENS, 2) * ROWS * 2 <= CODES_AT, "y of a part");
    // Of a thread that multiplies, and of the others.
    static constexpr int REGISTERS = TEAMS == 2 ? 104 : TOKENS == 256 ? 224 : 208;
    static constexpr int OTHER_REGISTERS = TEAMS == 2 ? 64 : TOKENS == 256 ? 56 : 88;
    static_assert(MULTIPLIERS * REGISTERS + GROUP * OTHER_REGISTERS <= THREADS * (65536 / THREADS / 8 * 8),
                  "a block has the registers that it was launched with, and would wait for more for ever");
    static_assert(X % 2 == 0 && CODES > X / 2, "steps of two teams, and how far codes are ahead of x");
};

// A place in a ring, and whether the ring was passed an odd number of times.
template <int COUNT>
struct Turn {
    u32 place = 0, round = 0;

    __device__ void next(u32 by = 1) {
        place += by;
        if (place >= u32(COUNT)) {
            place -= u32(COUNT);
            round ^= 1;
        }
    }
};

// How the work is divided: a tile for each block, or for each cluster of `parts` blocks.
struct LaunchConfig {
    int token_tiles;  // those of one range of rows of W follow each other
    int units;        // of K, of a part; the last part may have fewer
    int parts;        // of K: blocks of a cluster that share a tile, 1 to MOST_PARTS
};

template <typename T, int TOKENS>
__device__ inline void gemm_4bit_tile_sm90a(const TensorMap *x_map, const TensorMap *codes_map, const Scales &scales, const Codebook &codebook,
                            const T *bias, T *y, int m, int n, int k, int block_shift, const LaunchConfig &config) {
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
    const int part = config.parts > 1 ? int(cluster_rank()) : 0;
    const int tile = int(blockIdx.x) / config.parts;
    const int token = tile % config.token_tiles * TOKENS;
    const int row = tile / config.token_tiles * ROWS;
    // Of K, in units.
    const int all = (k + UNIT - 1) / UNIT;
    const int begin = part * config.units;
    const int units = (begin + config.units < all ? begin + config.units : all) - begin;

    if (thread == 0) {
        for (int i = 0; i < S::CODES; i++) {
            barrier_init(&codes_full[i], 1);
            barrier_init(&codes_empty[i], S::MULTIPLIER_WARPS);
        }
        for (int i = 0; i < S::X; i++) {
            barrier_init(&x_full[i], 1);
            barrier_init(&x_empty[i], TEAM_WARPS);
        }
        for (int i = 0; i < S::SCALES; i++) {
            barrier_init(&scales_full[i], SCALERS / WARP);
            barrier_init(&scales_empty[i], S::MULTIPLIER_WARPS);
        }
        barriers_made();
    }
    __syncthreads();

    if (warp >= S::MULTIPLIER_WARPS) {
        give_registers<S::OTHER_REGISTERS>();
        const int mine = thread - (S::THREADS - SCALERS);
        if (warp == S::MULTIPLIER_WARPS) {
            if (lane == 0) {
                const int stages = units * (UNIT / STAGE), first = begin * (UNIT / 2);
                for (int stage = 0; stage < stages && stage < S::CODES; stage++) {
                    fetch_box(codes_map, first + stage * STAGE_BYTES, row);
                }
                wait_for_previous();
                Turn<S::CODES> codes_turn;
                Turn<S::X> x_turn;
                const auto bring_codes = [&](int stage) {
                    Barrier *const full = &codes_full[codes_turn.place];
                    barrier_wait(&codes_empty[codes_turn.place], codes_turn.round ^ 1);
                    barrier_arrive_expecting(full, S::CODE_BYTES);
                    copy_box(shared + S::CODES_AT + codes_turn.place * S::CODE_BYTES, codes_map, first + stage * STAGE_BYTES, row,
                             full);
                    codes_turn.next();
                };
                // So far codes are ahead of x that both wait for the same step's end.
                constexpr int AHEAD = S::CODES - S::X / 2;
                for (int stage = 0; stage < stages && stage < AHEAD; stage++) {
                    bring_codes(stage);
                }
                for (int stage = 0; stage < stages; stage++) {
                    if (stage + AHEAD < stages) {
                        bring_codes(stage + AHEAD);
                    }
                    for (int step = 2 * stage; step < 2 * stage + 2; step++) {
                        Barrier *const full = &x_full[x_turn.place];
                        barrier_wait(&x_empty[x_turn.place], x_turn.round ^ 1);
                        barrier_arrive_expecting(full, S::X_BYTES);
                        copy_box(shared + S::X_AT + x_turn.place * S::X_BYTES, x_map, begin * UNIT + step * STEP, token, full);
                        x_turn.next();
                    }
                }
            }
            __syncwarp();
        } else if (mine >= 0) {
            wait_for_previous();
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
        if (config.parts > 1) {
            // As the others do, below.
            cluster_meet();
            cluster_meet();
        }
        return;
    }

    take_registers<S::REGISTERS>();
    const int team = warp / TEAM_WARPS, team_warp = warp % TEAM_WARPS, member = thread % TEAM;
    // What the matrix units want of row g and of row g + 8 in lane 4g + t: of each word of codes byte t.
    const u32 g = u32(lane) / 4, t = u32(lane) % 4;
    const u32 my_row = u32(team_warp) * 16 + g;
    const u8 *const my_codes = shared + S::CODES_AT + my_row * STAGE_BYTES;
    const u8 *const my_scales = shared + S::SCALES_AT + my_row * 8;
    const u32 swizzle = g >> 1;
    // The offset of an entry of the table is one permutation of bytes: 256 times a byte of codes, and where this lane's begin.
    const u32 at_lane = u32(lane) * 8, selector = 0x1100u | (4u + t) << 4;
    const u32 x_base = operand(shared + S::X_AT);
    constexpr int STEPS = UNIT_STEPS / S::TEAMS;  // of a team in a unit
    // One team unpacks a step while the units work on the one before; two teams do so for each other.
    constexpr int BUFFERS = S::TEAMS == 1 ? 2 : 1;
    // Of a chunk: pieces of 32 columns, and quarters of a step, of which a product of the units makes one.
    constexpr int CHUNK_PIECES = 2 / S::CHUNKS, CHUNK_QUARTERS = 4 / S::CHUNKS;
    float sums[S::SUMS];
    u32 a[BUFFERS][4 * CHUNK_QUARTERS];
    // Codes and scales of row g and of row g + 8.
    Words4 words[2][CHUNK_PIECES];
    Floats2 scale[2];
    Turn<S::CODES> stage;
    Turn<S::SCALES> unit_turn;
    Turn<S::X> x_turn;
    x_turn.place = u32(team);
    u32 x_before = 0;

    // The codes and scales of chunk c of step i of the team in a unit.
    const auto load = [&](int i, int c) {
        if (i == 0 && c == 0) {
            barrier_wait(&scales_full[unit_turn.place], unit_turn.round);
        }
        // Two teams take a half of each stage, one both halves after each other.
        if ((S::TEAMS == 2 || i % 2 == 0) && c == 0) {
            barrier_wait(&codes_full[stage.place], stage.round);
        }
        const u32 half = S::TEAMS == 2 ? u32(team) : u32(i % 2);
        const u8 *const codes = my_codes + stage.place * S::CODE_BYTES;
        const u8 *const scales_at =
            my_scales + unit_turn.place * S::SCALE_BYTES + (S::TEAMS == 2 ? 2 * i + team : i) * (ROWS * 8);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            scale[r] = *reinterpret_cast<const Floats2 *>(scales_at + r * 64);
#pragma unroll
            for (int j = 0; j < CHUNK_PIECES; j++) {
                const u32 piece = (half * 2 + u32(c + j)) ^ swizzle;
                words[r][j] = *reinterpret_cast<const Words4 *>(codes + r * 8 * STAGE_BYTES + piece * 16);
            }
        }
    };
    // Quarter q of what was loaded, to the registers that a product reads.
    const auto unpack = [&](u32 *to, int i, int c, int q) {
#pragma unroll
        for (int w = 0; w < 2; w++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 offset = permute_bytes(at_lane, words[r][q / 2].word[q % 2 * 2 + w], selector);
                const Floats2 pair = *reinterpret_cast<const Floats2 *>(shared + S::TABLE_AT + offset);
                const float by = scale[r].value[c + q / 2];
                to[4 * q + 2 * w + r] = pack2<T>(__fmul_rn(pair.value[0], by), __fmul_rn(pair.value[1], by));
            }
        }
        if (c < S::CHUNKS - 1 || q < CHUNK_QUARTERS - 1) {
            return;
        }
        if (S::TEAMS == 2 || i % 2 == 1) {
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&codes_empty[stage.place]);
            }
            stage.next();
        }
        if (i == STEPS - 1) {
            if (lane == 0) {
                barrier_arrive(&scales_empty[unit_turn.place]);
            }
            unit_turn.next();
        }
    };
    // Adds quarter q of chunk c of a step to the sums, or begins them.
    const auto multiply = [&](const u32 *from, int c, int q, bool fresh) {
        const u32 b = x_base + x_turn.place * (S::X_BYTES >> 4) + u32(2 * (c * CHUNK_QUARTERS + q));
        if (fresh) {
            multiply_fresh(T{}, sums, from + 4 * q, b);
        } else {
            multiply_add(T{}, sums, from + 4 * q, b);
        }
    };
    const auto release_before = [&]() {
        if (lane == 0) {
            barrier_arrive(&x_empty[x_before]);
        }
    };
    const auto next_x = [&]() {
        x_before = x_turn.place;
        x_turn.next(S::TEAMS);
    };
    // The steps of a unit; `fresh` when they are the first, `more` when others follow.
    const auto unit = [&](bool fresh, bool more) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if constexpr (S::TEAMS == 2) {
#pragma unroll
                for (int c = 0; c < S::CHUNKS; c++) {
                    load(i, c);
#pragma unroll
                    for (int q = 0; q < CHUNK_QUARTERS; q++) {
                        unpack(a[0], i, c, q);
                    }
                    if (c == 0) {
                        barrier_wait(&x_full[x_turn.place], x_turn.round);
                    }
                    products_begin();
#pragma unroll
                    for (int q = 0; q < CHUNK_QUARTERS; q++) {
                        multiply(a[0], c, q, fresh && i == 0 && c == 0 && q == 0);
                    }
                    products_commit();
                    products_wait<0>();
                }
                next_x();
                release_before();
            } else {
                const int next = (i + 1) % STEPS;
                barrier_wait(&x_full[x_turn.place], x_turn.round);
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    products_begin();
                    multiply(a[i % BUFFERS], 0, q, fresh && i == 0 && q == 0);
                    products_commit();
                    // The same quarter of the step before has ended, and with the last one its part of x is free.
                    products_wait<4>();
                    if (q == 3 && !(fresh && i == 0)) {
                        release_before();
                    }
                    if (i + 1 < STEPS || more) {
                        unpack(a[next % BUFFERS], next, 0, q);
                    }
                }
                next_x();
                if (i + 2 < STEPS || more) {
                    load((i + 2) % STEPS, 0);
                }
            }
        }
    };
    {
        // The table: two values of each byte, for each lane.
        Floats2 *const table = reinterpret_cast<Floats2 *>(shared + S::TABLE_AT) + lane;
#pragma unroll 2
        for (int high = warp; high < 16; high += S::MULTIPLIER_WARPS) {
            const float first = codebook.value[high];
#pragma unroll
            for (int low = 0; low < 16; low++) {
                table[(16 * high + low) * WARP] = {first, codebook.value[low]};
            }
        }
        meet<1, S::MULTIPLIERS>();
    }
    if constexpr (S::TEAMS == 1) {
        load(0, 0);
#pragma unroll
        for (int q = 0; q < 4; q++) {
            unpack(a[0], 0, 0, q);
        }
        load(1, 0);
    }
    unit(true, units > 1);
    for (int u = 1; u < units; u++) {
        unit(false, u + 1 < units);
    }
    if constexpr (S::TEAMS == 1) {
        products_wait<0>();
        release_before();
    }

    let_next_start();
    if constexpr (S::TEAMS == 2) {
        // The first team adds the second one's sums to its own. Nobody's matrix units read x any more.
        Floats4 *const theirs = reinterpret_cast<Floats4 *>(shared + S::X_AT) + member;
        meet<1, S::MULTIPLIERS>();
        if (team == 1) {
#pragma unroll
            for (int i = 0; i < S::SUMS / 4; i++) {
                theirs[i * TEAM] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
            }
        }
        meet<1, S::MULTIPLIERS>();
        if (team == 1) {
            if (config.parts > 1) {
                cluster_meet();
                cluster_meet();
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < S::SUMS / 4; i++) {
            const Floats4 other = theirs[i * TEAM];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sums[4 * i + j] += other.value[j];
            }
        }
    }
    wait_for_previous();
    // [token][row] of y, beginning with token 0 of the tile, whether or not that is here.
    u8 *out = shared + S::X_AT;
    constexpr int SIXTEENS = TOKENS / 16;
    // Nobody of the team reads x, or the other team's sums, any more.
    meet<3, TEAM>();
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
    const u32 out_offset = out_token * (ROWS * 2) + (u32(team_warp * 2 + lane / 8 % 2) ^ (out_token & 7)) * 16;
    const auto put = [&](int sixteen, const float *d) {
        store_transposed(out + out_offset + sixteen * 16 * (ROWS * 2), pack2<T>(d[0] + biases[0], d[1] + biases[0]),
                         pack2<T>(d[2] + biases[1], d[3] + biases[1]), pack2<T>(d[4] + biases[0], d[5] + biases[0]),
                         pack2<T>(d[6] + biases[1], d[7] + biases[1]));
    };
    int tokens = TOKENS, first_token = 0;
    if (config.parts == 1) {
#pragma unroll
        for (int j = 0; j < SIXTEENS; j++) {
            put(j, sums + 8 * j);
        }
    } else {
        // Each block of the cluster adds up a range of tokens, in the order of the parts of K: what the others have of
        // them comes to its memory, in rows of what all threads have of eight tokens.
        const int sixteens = part_tokens(TOKENS, config.parts) / 16;
        first_token = sixteens * 16 * part;
        tokens = TOKENS - first_token < sixteens * 16 ? TOKENS - first_token : sixteens * 16;
        out = shared + S::PART_AT - first_token * (ROWS * 2);
        constexpr u32 ALL = TEAM * 16;
        u8 *const mine = shared + S::X_AT + member * 16;
        // Nobody's matrix units read x any more, and no copy of it is on the way.
        cluster_meet();
        int owner = 0, at = part * sixteens;
        u32 there = address_at(mine, 0);
#pragma unroll
        for (int j = 0; j < SIXTEENS; j++) {
            store_at(there + u32(2 * at) * ALL, sums[8 * j], sums[8 * j + 1], sums[8 * j + 2], sums[8 * j + 3]);
            store_at(there + u32(2 * at + 1) * ALL, sums[8 * j + 4], sums[8 * j + 5], sums[8 * j + 6], sums[8 * j + 7]);
            at++;
            if (at == (part + 1) * sixteens && owner + 1 < config.parts) {
                owner++;
                at = part * sixteens;
                there = address_at(mine, u32(owner));
            }
        }
        cluster_meet();
#pragma unroll 1
        for (int j = 0; j < tokens / 16; j++) {
            float total[8] = {};
            for (int from = 0; from < config.parts; from++) {
                const Floats4 *const theirs =
                    reinterpret_cast<const Floats4 *>(mine + u32(from * sixteens + j) * (2 * ALL));
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    total[i] += theirs[i / 4 * TEAM].value[i % 4];
                }
            }
            put(first_token / 16 + j, total);
        }
    }
    meet<3, TEAM>();
    const bool whole = n % 8 == 0 && is_aligned(y, 16);
    for (int i = member; i < tokens * (ROWS / 8); i += TEAM) {
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
