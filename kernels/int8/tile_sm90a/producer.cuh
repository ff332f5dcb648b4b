// One thread has the copy engine bring stages of W and x.
#pragma once

#include "int8/tile_sm90a/shape.cuh"

template <int TOKENS>
__device__ inline void bring_stages(u8 *shared, const TensorMap *w_map, const TensorMap *x_map, const Share &mine,
                                    const TilePlan &plan, bool shares) {
    using S = Shape<TOKENS>;
    const Barriers<TOKENS> barriers(shared);
    Turn<S::STAGES> turn;
    // W of the first stages to the second-level cache while what is before still runs.
    for (int step = 0; step < (mine.steps < S::STAGES ? mine.steps : S::STAGES); step++) {
        fetch_box(w_map, (mine.begin + step) * STEP, mine.row(plan, mine.worker));
    }
    wait_for_previous();
    for (int tile = mine.worker; tile < plan.tiles; tile += plan.workers) {
        const int token = tile % plan.token_tiles * TOKENS, row = mine.row(plan, tile);
        for (int step = 0; step < mine.steps; step++) {
            Barrier *const full = &barriers.full[turn.place];
            u8 *const to = shared + turn.place * S::STAGE_BYTES;
            const int column = (mine.begin + step) * STEP;
            barrier_wait(&barriers.empty[turn.place], turn.round ^ 1);
            barrier_arrive_expecting(full, S::STAGE_BYTES);
            copy_box(to, w_map, column, row, full);
            if (shares) {
                const int half = mine.rank * (TOKENS / 2);
                copy_box_to(3, to + S::W_BYTES + half * STEP, x_map, column, token + half, full);
            } else {
                copy_box(to + S::W_BYTES, x_map, column, token, full);
            }
            turn.next();
        }
    }
}
