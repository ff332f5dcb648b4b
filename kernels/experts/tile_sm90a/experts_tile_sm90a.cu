// One kernel of experts_tile_sm90a.cuh: EXPERTS_NAME, for elements of type EXPERTS_ELEMENT and tiles of EXPERTS_TOKENS tokens.
#include "experts/tile_sm90a/experts_tile_sm90a.cuh"

// x:        [slots][k], rows sorted by expert, columns in the order of permute.cuh, by boxes of K_TILE columns and ExpertShape::STEP
//           rows, 128-byte swizzle
// product:  see ExpertsProduct; k a multiple of 64, blocks of 64 and more
// codebook: what the codes stand for
// bias:     [experts][bias_pitch], or null: n values of the gate's projection, where there is one, and behind them n of the other
// y:        [slots][pitch], of which n columns are written; rows of slots from offsets[experts] on stay as they are
// workspace: where ExpertsProduct::shares, sums [blocks][teams][ACCUMULATORS / 4][TEAM][4] and a signal for each team of a block
// Grid: any number of blocks, of ExpertShape::THREADS; ExpertShape::BYTES of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(ExpertShape<EXPERTS_TOKENS>::THREADS, 1)
    EXPERTS_NAME(const __grid_constant__ TensorMap x, const __grid_constant__ ExpertsProduct product,
                 const __grid_constant__ Codebook codebook, const EXPERTS_ELEMENT *bias, EXPERTS_ELEMENT *y,
                 const __grid_constant__ Workspace workspace) {
    experts_tile_sm90a<EXPERTS_ELEMENT, EXPERTS_TOKENS>(&x, product, codebook, bias, y, workspace);
}
