// In registers, y of the sums of a tile; and how it is written.
#pragma once

#include "int8/tile_sm90a/consumer.cuh"

// values[eight tokens][4] of a thread += outliers of x, from token `first_token` of the tile on, times those of W, of chunks that
// were handed over; `row` is the thread's first of the tile.
template <typename T, int EIGHTS>
__device__ inline void add_outliers(float (&values)[EIGHTS][4], const u8 *w, const u8 *x, int pieces, int chunks, int row,
                                    int first_token, int tokens, int lane) {
    constexpr u32 X_CHUNK = Shape<8 * EIGHTS>::X_CHUNK;
    const int g = lane / 4, t = lane % 4;
    w += t * 4 * ROWS + row;
    x += u32(first_token + g) * CHUNK_ROW + u32(t * 8);
#pragma unroll 1
    for (int c = 0; c < chunks; c++, w += CODES_CHUNK) {
        // The units' columns 2t, 2t + 1, 2t + 8 and 2t + 9 are 4t to 4t + 3 of the chunk, of both operands.
        u32 a[4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float code[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                code[j] = float(i8(w[j * ROWS + r * 8]));
            }
            a[r] = pack2<T>(code[0], code[1]);
            a[2 + r] = pack2<T>(code[2], code[3]);
        }
#pragma unroll 1
        for (int p = 0; p < pieces; p++, x += X_CHUNK) {
#pragma unroll
            for (int j = 0; j < EIGHTS; j++) {
                if (8 * j < tokens) {
                    const Words2 b = *reinterpret_cast<const Words2 *>(x + u32(8 * j) * CHUNK_ROW);
                    mma_m16n8k16(T{}, values[j], a, b.word[0], b.word[1]);
                }
            }
        }
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

// The part of a tile that a block makes y of: tokens [token, token + tokens), of which the first is `first_token` of those whose
// scales and outliers are in shared memory; rows of W from `row` on.
struct Part {
    int token, first_token, tokens, row;
};

// The sums themselves: 32 bytes of eight rows of W at a time. Also for values, of float32.
template <int SUMS, typename Y, typename Value>
__device__ inline void write_words(Y *y, const Place &at, const Part &part, int m, int n, const Value &value) {
    const int row = part.row + at.row();
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        const int column = i / 4 * 8 + 2 * at.t() + i % 2, to = part.token + column, of_w = row + i / 2 % 2 * 8;
        if (column < part.tokens && to < m && of_w < n) {
            y[i64(to) * n + of_w] = value(i);
        }
    }
}

// 16-bit y, put together to whole lines of memory.
template <int TOKENS>
__device__ inline void write_lines(const float (&values)[TOKENS / 8][4], u8 *out, const Epilogue &e, const Place &at,
                                   const Part &part, int m, int n) {
    // Sixteen tokens, [token][row]: the 16-byte piece c of a token at place c ^ token % 8.
    const int lane = at.lane, member = at.member();
    const u32 out_token = u32(lane / 16 * 8 + lane % 8);
    const u32 out_offset = out_token * OUT_PITCH + (u32(at.warp % (TEAM_WARPS / 2) * 2 + lane / 8 % 2) ^ (out_token & 7)) * 16;
    const bool whole = n % 8 == 0 && is_aligned(e.y, 16);
#pragma unroll
    for (int round = 0; round < (TOKENS + OUT_TOKENS - 1) / OUT_TOKENS; round++) {
        // Nobody reads the tokens before any more.
        at.meet_group();
        const int first = round * OUT_TOKENS;
        if (e.kind == KIND_BF16) {
            put<Bf16>(out + out_offset, values, first, part.tokens);
        } else {
            put<F16>(out + out_offset, values, first, part.tokens);
        }
        at.meet_group();
        const int here = part.tokens - first < OUT_TOKENS ? part.tokens - first : OUT_TOKENS;
        constexpr int PIECES_OF_ROW = OUT_PITCH / 16;
        const int column = part.row + at.group() * GROUP_ROWS + member % PIECES_OF_ROW * 8;
        for (int i = member / PIECES_OF_ROW; i < here; i += GROUP / PIECES_OF_ROW) {
            const int to = part.token + first + i;
            if (to < m && column < n) {
                const u8 *const from = out + i * OUT_PITCH + ((member % PIECES_OF_ROW) ^ (i & 7)) * 16;
                u16 *const target = static_cast<u16 *>(e.y) + (i64(to) * n + column);
                if (whole) {
                    store_words(reinterpret_cast<Words4 *>(target), *reinterpret_cast<const Words4 *>(from));
                } else {
                    for (int j = 0; j < 8 && column + j < n; j++) {
                        target[j] = reinterpret_cast<const u16 *>(from)[j];
                    }
                }
            }
        }
    }
}

// Makes y of the sums; of `count` columns with outliers the products come on top.
template <int TOKENS>
__device__ inline void write_tile(const int (&sums)[Shape<TOKENS>::SUMS], u8 *shared, const Epilogue &e, const Place &at,
                                  const Part &part, int m, int n, int count, u32 &gathered_parity) {
    using S = Shape<TOKENS>;
    const Barriers<TOKENS> barriers(shared);
    const float *const scales = reinterpret_cast<const float *>(shared + S::SCALES_AT) + at.group() * TOKENS;
    float values[TOKENS / 8][4];
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        if (8 * j < part.tokens) {
            const Floats2 scale = *reinterpret_cast<const Floats2 *>(scales + part.first_token + 8 * j + 2 * at.t());
#pragma unroll
            for (int i = 0; i < 4; i++) {
                values[j][i] = __fmul_rn(float(sums[4 * j + i]), scale.value[i % 2]);
            }
        }
    }
    // The memory in which outliers are, and y is put together.
    const auto took = [&]() {
        stores_before_units();
        __syncwarp();
        if (at.lane == 0) {
            barrier_arrive(barriers.taken);
        }
    };
    if (count > 0) {
        const int pieces = e.kind == KIND_F32 ? PIECES : 1;
        HandOver<TOKENS> now(count, e.kind);
        do {
            if (now.first > 0) {
                took();
            }
            barrier_wait(barriers.gathered, gathered_parity);
            gathered_parity ^= 1;
            const u8 *const w = shared + (S::OUT_AT + u32(now.place()) * CODES_CHUNK), *const x = shared + S::OUTLIERS_AT;
            if (e.kind == KIND_F16) {
                add_outliers<F16>(values, w, x, pieces, now.chunks(), at.row(), part.first_token, part.tokens, at.lane);
            } else {
                add_outliers<Bf16>(values, w, x, pieces, now.chunks(), at.row(), part.first_token, part.tokens, at.lane);
            }
        } while (now.next());
        // y takes the place of the last ones.
        meet<3, TEAM>();
    }
    // Rows that are not there get what the last one has: what comes of them is not written.
    const int row = part.row + at.row();
    const int rows[2] = {row < n ? row : n - 1, row + 8 < n ? row + 8 : n - 1};
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
        write_words<S::SUMS>(static_cast<float *>(e.y), at, part, m, n, [&](int i) { return values[i / 4][i % 4]; });
    } else {
        write_lines<TOKENS>(values, shared + S::OUT_AT + u32(at.group()) * S::OUT_BYTES, e, at, part, m, n);
    }
    if (count > 0) {
        took();
    }
}
