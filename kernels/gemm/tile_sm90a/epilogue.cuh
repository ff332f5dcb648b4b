// The epilogue of gemm_4bit_tile_sm90a and of gemm_4bit_dgrad_sm90a: sums of teams and of splits of K, the bias, and y by
// whole lines.
#pragma once

#include "gemm/tile_sm90a/walk.cuh"

// The second team's sums to where x was, from where `add_sums` takes them; by all consumers.
template <typename S>
__device__ inline void exchange_sums(const float (&sums)[S::ACCUMULATORS], u8 *shared, int team) {
    Floats4 *const theirs = reinterpret_cast<Floats4 *>(shared + S::X_AT) + team_member();
    // Nobody's matrix units read x any more.
    meet<1, S::CONSUMERS>();
    if (team == 1) {
#pragma unroll
        for (int i = 0; i < S::ACCUMULATORS / 4; i++) {
            theirs[i * TEAM] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
        }
        if constexpr (S::SEVERAL_TILES) {
            // x may come there again.
            stores_before_units();
        }
    }
    meet<1, S::CONSUMERS>();
}

// By the first team: the sums of both.
template <typename S>
__device__ inline void add_sums(float (&sums)[S::ACCUMULATORS], const u8 *shared) {
    const Floats4 *const theirs = reinterpret_cast<const Floats4 *>(shared + S::X_AT) + team_member();
#pragma unroll
    for (int i = 0; i < S::ACCUMULATORS / 4; i++) {
        const Floats4 other = theirs[i * TEAM];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sums[4 * i + j] += other.value[j];
        }
    }
}

// By one team: y [m][n] of the tile, or with a split K of this block's range of tokens.
template <typename T, typename S>
__device__ inline void write_tile(const float (&sums)[S::ACCUMULATORS], u8 *shared, const T *bias, T *y, int m, int n,
                                  const Tile &tile, int split, const LaunchConfig &config) {
    constexpr int TOKENS = S::TOKENS;
    const int member = team_member(), lane = member % WARP, team_warp = member / WARP;
    const u32 my_row = u32(team_warp) * 16 + u32(lane) / 4;
    // [token][row] of y, beginning with token 0 of the tile, whether or not that is here.
    u8 *out = shared + S::OUT_AT;
    constexpr int SIXTEENS = TOKENS / 16;
    // Nobody of the team reads x, or the other team's sums, any more.
    meet<3, TEAM>();
    float biases[2] = {0.0f, 0.0f};
    if (bias != nullptr) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int at = tile.row + int(my_row) + 8 * r;
            biases[r] = to_f32(bias[at < n ? at : n - 1]);
        }
    }
    // Sums of sixteen tokens, the 16-byte piece c of a token at place c ^ token % 8.
    const u32 out_token = S::COLUMNS ? u32(lane % 4 * 2) : u32(lane / 16 * 8 + lane % 8);
    const u32 out_piece = S::COLUMNS ? my_column(team_warp, lane) / 8 : u32(team_warp * 2 + lane / 8 % 2);
    const u32 out_offset = out_token * (ROWS * 2) + (out_piece ^ (out_token & 7)) * 16;
    const auto put = [&](int sixteen, const float *d) {
        if constexpr (S::COLUMNS) {
            // Of a token two neighbours; the next one's piece has the last bit of its place turned.
            const u32 within = my_column(team_warp, lane) % 8 * 2, next = (out_offset + ROWS * 2) ^ 16;
            u8 *const to = out + sixteen * 16 * (ROWS * 2) + within;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float *const of = d + 4 * half;
                *reinterpret_cast<u32 *>(to + half * 8 * (ROWS * 2) + out_offset) = pack2<T>(of[0], of[2]);
                *reinterpret_cast<u32 *>(to + half * 8 * (ROWS * 2) + next) = pack2<T>(of[1], of[3]);
            }
            return;
        }
        store_transposed(out + out_offset + sixteen * 16 * (ROWS * 2), pack2<T>(d[0] + biases[0], d[1] + biases[0]),
                         pack2<T>(d[2] + biases[1], d[3] + biases[1]), pack2<T>(d[4] + biases[0], d[5] + biases[0]),
                         pack2<T>(d[6] + biases[1], d[7] + biases[1]));
    };
    const bool whole = n % 8 == 0 && is_aligned(y, 16);
    // Tokens first_token to first_token + tokens of the tile, from where they were put.
    const auto write = [&](int first_token, int tokens) {
        meet<3, TEAM>();
        for (int i = member; i < tokens * (ROWS / 8); i += TEAM) {
            const int at = first_token + i / (ROWS / 8), piece = i % (ROWS / 8);
            const int to = tile.token + at, column = tile.row + piece * 8;
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
    };
    if (config.split_k == 1) {
        constexpr int AT_ONCE = S::OUT_TOKENS / 16;
#pragma unroll
        for (int part = 0; part < SIXTEENS; part += AT_ONCE) {
            if (part > 0) {
                meet<3, TEAM>();
                out -= S::OUT_TOKENS * (ROWS * 2);
            }
#pragma unroll
            for (int j = part; j < part + AT_ONCE; j++) {
                put(j, sums + 8 * j);
            }
            write(part * 16, S::OUT_TOKENS);
        }
    } else {
        // Each block of the cluster adds up a range of tokens, in the order of the splits of K: what the others have of
        // them comes to its memory, in rows of what all threads have of eight tokens.
        const int sixteens = split_tokens(TOKENS, config.split_k) / 16;
        const int first_token = sixteens * 16 * split;
        const int tokens = TOKENS - first_token < sixteens * 16 ? TOKENS - first_token : sixteens * 16;
        out = shared + S::SPLIT_AT - first_token * (ROWS * 2);
        constexpr u32 ALL = TEAM * 16;
        u8 *const mine = shared + S::X_AT + member * 16;
        // Nobody's matrix units read x any more, and no copy of it is on the way.
        cluster_meet();
        int owner = 0, at = split * sixteens;
        u32 there = address_at(mine, 0);
#pragma unroll
        for (int j = 0; j < SIXTEENS; j++) {
            store_at(there + u32(2 * at) * ALL, sums[8 * j], sums[8 * j + 1], sums[8 * j + 2], sums[8 * j + 3]);
            store_at(there + u32(2 * at + 1) * ALL, sums[8 * j + 4], sums[8 * j + 5], sums[8 * j + 6], sums[8 * j + 7]);
            at++;
            if (at == (split + 1) * sixteens && owner + 1 < config.split_k) {
                owner++;
                at = split * sixteens;
                there = address_at(mine, u32(owner));
            }
        }
        cluster_meet();
#pragma unroll 1
        for (int j = 0; j < tokens / 16; j++) {
            float total[8] = {};
            for (int from = 0; from < config.split_k; from++) {
                const Floats4 *const theirs =
                    reinterpret_cast<const Floats4 *>(mine + u32(from * sixteens + j) * (2 * ALL));
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    total[i] += theirs[i / 4 * TEAM].value[i % 4];
                }
            }
            put(first_token / 16 + j, total);
        }
        write(first_token, tokens);
    }
}
