// The kernels of experts_few.cuh.
#include "experts/experts_few.cuh"

// Grid: as many blocks of THREADS as there are to share the units. Dynamic shared memory, with P = 2 *
// per_pass * k_slices * 8 * fragments * 64 bytes: LANE_TABLE_BYTES + MAP_BYTES + ROUTE_BYTES + PART_BYTES + SEGMENTS *
// (SEGMENT_BYTES + 32 * fragments) + P.
#define INSTANCE(name, T, nested, fragments)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) experts_few_##name(Experts job) { \
        experts_few<T, nested, fragments>(job);                                                                        \
    }

INSTANCE(bf16_8, Bf16, false, 1)
INSTANCE(bf16_16, Bf16, false, 2)
INSTANCE(bf16_8_nested, Bf16, true, 1)
INSTANCE(bf16_16_nested, Bf16, true, 2)
INSTANCE(f16_8, F16, false, 1)
INSTANCE(f16_16, F16, false, 2)
INSTANCE(f16_8_nested, F16, true, 1)
INSTANCE(f16_16_nested, F16, true, 2)
