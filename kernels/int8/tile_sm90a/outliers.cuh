// Warps that bring what products of outliers take: codes of W out of the stages, x from memory.
#pragma once

#include "int8/tile_sm90a/shape.cuh"

// The next 16-bit piece of what is left of a value of x: itself, or the upper eight bits of what is left, three times.
__device__ inline u32 next_piece(u16 &left) { return left; }
__device__ inline u32 next_piece(float &left) {
    const u32 bits = __float_as_uint(left);
    if ((bits & 0x7f800000u) == 0x7f800000u) {
        // All in the first; a NaN stays one.
        left = 0.0f;
        return bits >> 16 | ((bits & 0x007fffffu) != 0 ? 0x40u : 0u);
    }
    left = __fsub_rn(left, __uint_as_float(bits & 0xffff0000u));
    return bits >> 16;
}

// Element i of some that were read together.
__device__ inline void take(u16 &value, const Words4 &words, int i) { value = u16(words.word[i / 2] >> (i % 2 * 16)); }
__device__ inline void take(float &value, const Words4 &words, int i) { value = __uint_as_float(words.word[i]); }

// Word i, which the compiler need not know, of registers.
__device__ inline u32 word_of(const Words4 &unit, int i) {
    return i < 2 ? (i == 0 ? unit.word[0] : unit.word[1]) : (i == 2 ? unit.word[2] : unit.word[3]);
}

// The warps take the codes of W in columns with outliers out of the stages, each every third one, and leave zeros. Those of the
// first chunks they put where products of 16-bit values find them, [column][row]; when blocks share a tile, in all of these.
template <int TOKENS>
struct Picker {
    using S = Shape<TOKENS>;
    u8 *const shared;
    const u32 *const mask;
    const Share &mine;
    const int parts;

    __device__ void put(int number, int row, u32 code) const {
        u8 *const to = shared + (S::OUT_AT + u32(number * ROWS + row));
        if (S::DIVIDES && parts > 1) {
            for (int rank = 0; rank < parts; rank++) {
                store_byte_at(address_at(to, u32(rank)), code);
            }
        } else {
            *to = u8(code);
        }
    }
    // What the last chunk has room for and nothing to fill with.
    __device__ void fill(int count) const {
        const int room = (count + CHUNK - 1) / CHUNK * CHUNK;
        for (int number = count; number < (room < S::KEPT * CHUNK ? room : S::KEPT * CHUNK); number++) {
            for (int row = read_lane(); row < ROWS; row += WARP) {
                shared[S::OUT_AT + u32(number * ROWS + row)] = 0;
            }
        }
    }
    // The mask's unit of a step for each lane, from `step` on.
    __device__ Words4 units(int step) const {
        const int at = step + read_lane();
        return at < mine.steps ? load_stream_after(reinterpret_cast<const Words4 *>(mask) + mine.begin + at) : Words4{};
    }
    // The stages of a tile; `number` is that of the first column of the block's part of K, and `now` are the first units.
    __device__ void pick(const Barriers<TOKENS> &barriers, Turn<S::STAGES> &turn, Words4 now, int number, int helper) const {
        const int lane = read_lane();
        for (int step = 0; step < mine.steps; step++) {
            if (step % WARP == 0 && (step > 0 || !S::FIRST_UNITS)) {
                now = units(step);
            }
            const int own = __popc(now.word[0]) + __popc(now.word[1]) + __popc(now.word[2]) + __popc(now.word[3]);
            const int found = __shfl_sync(ALL_LANES, own, step % WARP);
            if (step % HELPERS != helper) {
                number += found;
                turn.next();
                continue;
            }
            u8 *const stage = shared + turn.place * S::STAGE_BYTES;
            // What was there before was another warp's: until it was full too, its phase is taken for this one's.
            barrier_wait(&barriers.clean[turn.place], turn.round ^ 1);
            barrier_wait(&barriers.full[turn.place], turn.round);
            if (found != 0) {
#pragma unroll 1
                for (int i = 0; i < MASK_UNIT; i++) {
#pragma unroll 1
                    for (u32 left = __shfl_sync(ALL_LANES, word_of(now, i), step % WARP); left != 0;
                         left &= left - 1, number++) {
                        const u32 byte = u32(i * WARP + __ffs(int(left)) - 1);
                        u32 codes[ROWS / WARP];
#pragma unroll
                        for (int r = 0; r < ROWS / WARP; r++) {
                            // Rows that are a warp apart are swizzled alike.
                            const u32 place = (byte / 16 ^ u32(lane & 7)) * 16 + byte % 16;
                            u8 *const code = stage + (u32((lane + r * WARP) * STEP) + place);
                            codes[r] = *code;
                            *code = 0;
                        }
                        if (number < S::KEPT * CHUNK) {
#pragma unroll
                            for (int r = 0; r < ROWS / WARP; r++) {
                                put(number, lane + r * WARP, codes[r]);
                            }
                        }
                    }
                }
                stores_before_units();
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&barriers.clean[turn.place]);
            }
            turn.next();
        }
    }
};

// Chunks of x, those behind the last column being zero: of each the pieces, [token][16], of the tile's tokens. `panel` has them
// side by side, or `columns` says where they are.
template <int TOKENS, int COUNT, typename X>
__device__ inline void bring_x(u8 *to, const X *x, const X *panel, const int *columns, int first, int count, int chunks,
                               int token, int m, int k, int member) {
    constexpr int AT_ONCE = 16 / int(sizeof(X));
#pragma unroll 1
    for (int at = member; at < TOKENS; at += HELPERS * WARP) {
        const i64 row = token + at < m ? token + at : m - 1;
        u8 *place = to + u32(at) * CHUNK_ROW;
#pragma unroll 1
        for (int c = 0; c < chunks; c++) {
            // Of float32 a half at a time: there are not the registers for more.
#pragma unroll(sizeof(X) == 4 ? 1 : 2)
            for (int half = 0; half < 2; half++) {
                X left[CHUNK / 2];
                const int number = first + c * CHUNK + half * (CHUNK / 2);
                if (number < PANEL_COLUMNS) {
                    const Words4 *const from = reinterpret_cast<const Words4 *>(panel + row * PANEL_COLUMNS + number);
#pragma unroll
                    for (int i = 0; i < CHUNK / 2 / AT_ONCE; i++) {
                        const Words4 words = load_shared_line(from + i);
#pragma unroll
                        for (int j = 0; j < AT_ONCE; j++) {
                            take(left[i * AT_ONCE + j], words, j);
                        }
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < CHUNK / 2; i++) {
                        left[i] = number + i < count ? x[row * k + columns[number + i]] : X{};
                    }
                }
#pragma unroll
                for (int p = 0; p < COUNT; p++) {
                    Words4 words;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        words.word[i] = next_piece(left[2 * i]) | next_piece(left[2 * i + 1]) << 16;
                    }
                    reinterpret_cast<Words4 *>(place + u32(p) * Shape<TOKENS>::X_CHUNK)[half] = words;
                }
            }
            place += u32(COUNT) * Shape<TOKENS>::X_CHUNK;
        }
    }
}

// Codes of W for chunks of which none were kept, from memory: [column][row].
__device__ inline void gather_w(u8 *to, const i8 *w, const int *columns, int count, int chunks, int row, int n, int k,
                                int member) {
#pragma unroll 1
    for (int i = member; i < chunks * CHUNK * ROWS; i += HELPERS * WARP) {
        const int at = i % ROWS, number = i / ROWS;
        to[i] = number < count ? u8(w[i64(row + at < n ? row + at : n - 1) * k + columns[number]]) : u8(0);
    }
}

// All of it, by the warps from PICKER on. `meet_cluster` is what the others do between the first outliers of a tile and more.
template <int TOKENS, typename Meet>
__device__ inline void bring_outliers(u8 *shared, const TensorMap *panel, const i8 *w, const Epilogue &e, int m, int n, int k,
                                      const TilePlan &plan, const Share &mine, bool divides, int warp,
                                      const Meet &meet_cluster) {
    using S = Shape<TOKENS>;
    wait_for_previous();
    const Barriers<TOKENS> barriers(shared);
    const Picker<TOKENS> picker = {shared, e.mask, mine, plan.parts};
    // Before copies of W are on the way: a load behind those takes 3 microseconds.
    const Words4 first_units = S::FIRST_UNITS ? picker.units(0) : Words4{};
    const int count = *e.count;
    const int first_number = divides ? count_columns(e.mask, mine.begin * MASK_UNIT) : 0;
    Turn<S::STAGES> turn;
    u32 parity = 1;
    for (int tile = mine.worker; tile < plan.tiles && count > 0; tile += plan.workers) {
        const int token = tile % plan.token_tiles * TOKENS, row = mine.row(plan, tile);
        HandOver<TOKENS> now(count, e.kind);
        do {
            if (now.first > 0) {
                meet_cluster();
            }
            barrier_wait(barriers.taken, parity);
            parity ^= 1;
            const int first = now.first * CHUNK, chunks = now.chunks(), member = int(threadIdx.x) - PICKER * WARP;
            u8 *const to = shared + S::OUTLIERS_AT;
            // 16-bit x is in the panel as it is wanted: the copy engine brings it, while warps are at the stages.
            const bool copied = e.kind != KIND_F32 && first + chunks * CHUNK <= PANEL_COLUMNS;
            if (member == 0) {
                barrier_arrive_expecting(barriers.gathered, copied ? u32(chunks) * S::X_CHUNK : 0);
                for (int c = 0; copied && c < chunks; c++) {
                    copy_box(to + u32(c) * S::X_CHUNK, panel, first + c * CHUNK, token, barriers.gathered);
                }
            }
            __syncwarp();
            if (first == 0) {
                if (warp == PICKER) {
                    picker.fill(count);
                }
                picker.pick(barriers, turn, first_units, first_number, warp - PICKER);
            }
            if (e.kind == KIND_F32) {
                bring_x<TOKENS, PIECES>(to, static_cast<const float *>(e.x), static_cast<const float *>(e.panel), e.columns,
                                        first, count, chunks, token, m, k, member);
            } else if (!copied) {
                bring_x<TOKENS, 1>(to, static_cast<const u16 *>(e.x), static_cast<const u16 *>(e.panel), e.columns, first,
                                   count, chunks, token, m, k, member);
            }
            if (!now.kept()) {
                gather_w(shared + S::OUT_AT, w, e.columns + first, count - first, chunks, row, n, k, member);
            }
            __syncwarp();
            if (read_lane() == 0) {
                barrier_arrive(barriers.gathered);
            }
        } while (now.next());
    }
}
