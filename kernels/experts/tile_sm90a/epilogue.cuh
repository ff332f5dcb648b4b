// The epilogue of experts_tile_sm90a: biases, the gate, and y by whole lines.
#pragma once

#include "experts/activation.cuh"
#include "experts/permute.cuh"
#include "experts/tile_sm90a/operands.cuh"
#include "experts/tile_sm90a/shared_tiles.cuh"

// The gates with a sigmoid by one formula, so that each value takes few instructions, none of them a branch:
// gate * sigmoid(gate * (linear + cubic * gate^2)) * (up + one), of values clamped to `limit`.
struct Sigmoid {
    float limit, linear, cubic, one;
};

__device__ inline Sigmoid sigmoid_of(u32 activation) {
    const float infinite = __uint_as_float(0x7f800000u);
    if (activation == ACTIVATION_CLAMPED_SWIGLU) {
        return {7.0f, 1.702f, 0.0f, 1.0f};
    }
    if (activation == ACTIVATION_GELU_TANH) {
        // (1 + tanh(z)) / 2 is sigmoid(2z): 2 sqrt(2 / pi), and 0.044715 of that.
        return {infinite, 1.5957691216f, 0.0713548163f, 0.0f};
    }
    return {infinite, 1.0f, 0.0f, 0.0f};
}

__device__ inline float activate(const Sigmoid &how, float gate, float up) {
    // NaN stays one.
    gate = gate > how.limit ? how.limit : gate;
    up = up > how.limit ? how.limit : up < -how.limit ? -how.limit : up;
    const float z = gate * (how.linear + how.cubic * (gate * gate));
    // Beyond, the reciprocal has no room, and the quotient is zero in 16 bits.
    const float e = expf(-z < 87.0f ? -z : 87.0f);
    return gate * reciprocal_near(1.0f + e) * (up + how.one);
}

// Gates without a sigmoid.
__device__ inline float seldom(u32 activation, float gate, float up) {
    return activation == ACTIVATION_GELU ? activated(ACTIVATION_GELU, gate, up) : activated(ACTIVATION_RELU2, gate, up);
}

// What becomes of the products of a step of tokens with rows g and g + 8 of a warp, those of a gate and of up: `d` as wgmma has
// it, biases already added; a word for two tokens, zero for those that a tile does not have. The kinds are told apart outside of
// what is unrolled, so that what runs is short.
template <typename T, int STEP>
__device__ inline void gate_step(u32 (&words)[4], const float (&d)[STEP / 2], u32 activation) {
    if (activation == ACTIVATION_GELU || activation == ACTIVATION_RELU2) {
#pragma unroll
        for (int i = 0; i < STEP / 8; i++) {
            words[i] = pack2<T>(seldom(activation, d[4 * i], d[4 * i + 2]), seldom(activation, d[4 * i + 1], d[4 * i + 3]));
        }
    } else {
        const Sigmoid how = sigmoid_of(activation);
#pragma unroll
        for (int i = 0; i < STEP / 8; i++) {
            words[i] = pack2<T>(activate(how, d[4 * i], d[4 * i + 2]), activate(how, d[4 * i + 1], d[4 * i + 3]));
        }
    }
}

// Of a token's 16-byte pieces, which hold eight rows each as row_of_group has them: two neighbouring rows, the first in one half of
// the piece and the other in the other.
__device__ inline u32 two_rows(const Words4 &piece, int word) {
    return permute_bytes(piece.word[word / 2], piece.word[2 + word / 2], word % 2 == 0 ? 0x5410 : 0x7632);
}
// Piece `piece` in the order of rows. `from`: the token's, piece c at place c ^ `swizzle`.
__device__ inline Words4 plain_piece(const u8 *from, int piece, int swizzle) {
    const Words4 found = *reinterpret_cast<const Words4 *>(from + (piece ^ swizzle) * 16);
    return {two_rows(found, 0), two_rows(found, 1), two_rows(found, 2), two_rows(found, 3)};
}
// Or in that of permute.cuh.
__device__ inline Words4 permuted_piece(const u8 *from, int piece, int swizzle) {
    Words4 made;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const int word = permuted_word(piece % PERMUTED_PIECES, t);
        const int source = piece / PERMUTED_PIECES * PERMUTED_PIECES + word / 4;
        const u32 *const found = reinterpret_cast<const u32 *>(from + (source ^ swizzle) * 16) + word % 4 / 2;
        made.word[t] = permute_bytes(found[0], found[2], word % 2 == 0 ? 0x5410 : 0x7632);
    }
    return made;
}

// By one team: what it has of a tile to y [slots][pitch], to the rows of the expert's tokens alone. Of a warp's sixteen rows of
// sums eight are of the first quarter of the team, and eight of the second. `y_row`: where the tile's token `member` goes.
template <typename T, typename S, typename Walk>
__device__ inline void write_tile(const float (&sums)[S::ACCUMULATORS], u8 *shared, const T *bias, T *y,
                                  const ExpertsProduct &product, const Walk &walk, int y_row, int team, int team_warp) {
    const int lane = read_lane(), member = team_warp * WARP + lane;
    u8 *const out = shared + S::OUT_AT + team * S::OUT_BYTES;
    int *const rows = reinterpret_cast<int *>(shared + S::ROWS_AT) + team * S::TOKENS;
    const bool gated = product.gated();
    const int n = product.n;
    // Columns of y of the team, and 16-byte pieces of them.
    const int column = walk.row_tile * product.rows_of_tile() + product.rows_before(2 * team);
    const int pieces_shift = gated ? 3 : 4;
    // Of the lane's rows, the first of the gate's weight and the second of the other, or both of one.
    float biases[2] = {0.0f, 0.0f};
    if (bias != nullptr) {
        const T *const mine = bias + i64(walk.expert) * product.bias_pitch;
        const int first = column + team_warp * 8 + int(row_of_group(u32(lane) / 4)), second = gated ? first : first + QUARTER_ROWS;
        biases[0] = to_f32(mine[first < n ? first : n - 1]);
        biases[1] = to_f32(mine[(second < n ? second : n - 1) + (gated ? n : 0)]);
    }
    constexpr int TOKENS = S::TOKENS, STEP = S::STEP;
    const int left = walk.tokens - walk.token < TOKENS ? walk.tokens - walk.token : TOKENS;
    const bool whole = product.pitch % 8 == 0 && n % 8 == 0 && is_aligned(y, 16);
    // [token][row], the 16-byte piece c of a token at place c ^ token % 8: 64 rows where there is a gate, else 128.
    const u32 place = gated ? u32(lane) * 128 + (u32(team_warp) ^ (u32(lane) & 7)) * 16
                            : u32(lane / 16 * 8 + lane % 8) * 256 + (u32(team_warp + lane / 8 % 2 * 8) ^ (u32(lane) & 7)) * 16;
    const int piece = member & ((1 << pieces_shift) - 1), of_row = column + piece * 8;
#pragma unroll
    for (int step = 0; step < TOKENS / STEP; step++) {
        if (step * STEP >= left) {
            break;
        }
        float d[STEP / 2];
#pragma unroll
        for (int i = 0; i < STEP / 2; i++) {
            d[i] = sums[step * (STEP / 2) + i] + biases[i / 2 % 2];
        }
        // Nobody reads the tokens before any more, nor where they go: a warp may be a short tile ahead of another.
        meet_team(team);
        if (step == 0 && member < TOKENS) {
            rows[member] = y_row;
        }
        if (gated) {
            u32 words[4] = {};
            gate_step<T, STEP>(words, d, product.activation);
            store_transposed(out + place, words[0], words[1], words[2], words[3]);
        } else {
            if (product.activation == ACTIVATION_RELU2) {
#pragma unroll
                for (int i = 0; i < STEP / 2; i++) {
                    d[i] = activated(ACTIVATION_RELU2, d[i], 1.0f);
                }
            }
#pragma unroll
            for (int i = 0; i < STEP / 16; i++) {
                const float *const e = d + 8 * i;
                store_transposed(out + place + i * 16 * 256, pack2<T>(e[0], e[1]), pack2<T>(e[2], e[3]), pack2<T>(e[4], e[5]),
                                 pack2<T>(e[6], e[7]));
            }
        }
        meet_team(team);
#pragma unroll 1
        for (int j = 0; j < 2; j++) {
            const int at = j * (STEP_TOKENS / 2) + (member >> pieces_shift);
            // Where there is a gate a step has half as many pieces.
            if (step * STEP + at >= left || of_row >= n || (j == 1 && gated)) {
                continue;
            }
            const u8 *const from = out + (at << (pieces_shift + 4));
            const Words4 words = product.permutes != 0 ? permuted_piece(from, piece, at & 7) : plain_piece(from, piece, at & 7);
            T *const target = y + (i64(rows[step * STEP + at]) * product.pitch + of_row);
            if (whole) {
                store_words(reinterpret_cast<Words4 *>(target), words);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (of_row + i < n) {
                        reinterpret_cast<u16 *>(target)[i] = u16(words.word[i / 2] >> 16 * (i % 2));
                    }
                }
            }
        }
    }
}
