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
//     other warps: one thread has the copy engine bring W and x; three bring the columns of x that are outliers
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
// products of 16-bit values with float32 sums on top; times the scale of the row of W; the bias; rounded once. A float32 of x is
// the sum of three bfloat16, exactly.
//
// Which columns those are, a kernel before has found out. Of a tile, three warps follow the ring: in each stage with such columns one
// takes their codes of W out and leaves zeros, and the matrix units wait for that. x of these columns lies together for the first
// 256 of them: 16-bit x comes by the copy engine while the units work, pieces of float32 and what lies elsewhere by these warps
// behind the stages. So W comes once. When blocks share a tile each hands its codes to all of them. Of more columns than are kept
// (Shape::KEPT chunks of 16) codes of W are gathered from memory, behind the sums.
//
// Shared memory, in this order: the ring of stages (W, then x, rows of 128 bytes with the swizzle of 128 bytes), y on its way
// to whole lines of memory (for each warpgroup up to 128 tokens of 64 16-bit values) and before it outliers, the tokens' scales
// for each warpgroup, barriers. The sums from the other blocks of a cluster take the place of the
// ring.
//
// Tried, and slower: x gathered by each tile from where it lies, 48 loads of 2 bytes from lines of their own for each token (280 us
// more for 4096 rows of 14336 x 4096); masks of all rows joined by each block of threads (12 us for 256 rows); one warp for all
// stages (5 us for 64 rows). No faster: more or less of W to the second-level cache in the beginning, up to all of it, since what
// binds up to 128 rows is what that cache gives to multiprocessors; the instructions of the three warps fetched before the wait for
// the kernel before, though the first stage is rid of outliers 2.5 us earlier then.
#pragma once

#include "int8/tile_sm90a/consumer.cuh"
#include "int8/tile_sm90a/epilogue.cuh"
#include "int8/tile_sm90a/outliers.cuh"
#include "int8/tile_sm90a/producer.cuh"

template <int TOKENS>
__device__ inline void int8_tile(const TensorMap *w_map, const TensorMap *x_map, const TensorMap *panel, const i8 *w,
                                 const Epilogue &e, int m, int n, int k, const TilePlan &plan) {
    using S = Shape<TOKENS>;
    DYNAMIC_SHARED_1024(shared);
    const int thread = int(threadIdx.x), lane = thread % WARP;
    const int warp = __shfl_sync(ALL_LANES, thread / WARP, 0);
    const bool shares = plan.sharing > 1, divides = S::DIVIDES && plan.parts > 1;
    const bool may_have_outliers = e.count != nullptr;
    if (thread == 0) {
        Barriers<TOKENS>(shared).init(plan.sharing);
    }
    if (shares || divides) {
        // Other blocks arrive at barriers here, and write to here.
        cluster_meet();
    } else {
        __syncthreads();
    }

    if (warp >= TEAM_WARPS) {
        give_registers<S::OTHER_REGISTERS>();
        const Share mine(plan, shares, divides, k);
        bool met = false;
        // As those who multiply do when they add up parts.
        const auto meet_cluster = [&]() {
            if (divides && !met) {
                cluster_meet();
                cluster_meet();
            }
            met = true;
        };
        if (thread == COPIER * WARP) {
            bring_stages<TOKENS>(shared, w_map, x_map, mine, plan, shares);
        } else if (warp >= PICKER && may_have_outliers) {
            bring_outliers<TOKENS>(shared, panel, w, e, m, n, k, plan, mine, divides, warp, meet_cluster);
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
    const Place at = {thread, warp, lane};
    wait_for_previous();
    const int count = may_have_outliers ? *e.count : 0;
    float *const scales = reinterpret_cast<float *>(shared + S::SCALES_AT) + at.group() * TOKENS;
    const bool scaled = e.kind != KIND_I32;
    int sums[S::SUMS];
    Turn<S::STAGES> turn;
    u32 gathered_parity = 0;
    for (int tile = mine.worker; tile < plan.tiles; tile += plan.workers) {
        Part part = {tile % plan.token_tiles * TOKENS, 0, TOKENS, mine.row(plan, tile)};
        // Nobody reads the scales of the tile before any more.
        at.meet_group();
        if (scaled) {
            for (int i = at.member(); i < TOKENS; i += GROUP) {
                scales[i] = __fmul_rn(e.row_scales[part.token + i < m ? part.token + i : m - 1], INVERSE_127);
            }
        }
        multiply_stages<TOKENS>(sums, shared, turn, at, mine.steps, mine.rank, shares, count > 0);
        if (tile + plan.workers >= plan.tiles) {
            let_next_start();
        }
        if (S::DIVIDES && divides) {
            const int sixteens = part_tokens(TOKENS, plan.parts) / 16, first = sixteens * 16 * mine.rank;
            const int tokens = TOKENS - first < sixteens * 16 ? TOKENS - first : sixteens * 16;
            add_parts<TOKENS>(sums, shared, thread, mine.rank, plan.parts, sixteens, tokens);
            part = {part.token + first, first, tokens, part.row};
        }
        if (!scaled) {
            write_words<S::SUMS>(static_cast<int *>(e.y), at, part, m, n, [&](int i) { return sums[i]; });
            continue;
        }
        at.meet_group();
        write_tile<TOKENS>(sums, shared, e, at, part, m, n, count, gathered_parity);
    }
    if (shares) {
        // The other block may still copy to here.
        cluster_meet();
    }
}
