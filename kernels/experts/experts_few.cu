// The kernels of experts_few.cuh.
#include "experts/experts_few.cuh"

// Grid: as many blocks of THREADS as there are to share the units. Dynamic shared memory, with P = 2 * per_pass * k_slices * 512
// bytes: LANE_TABLE_BYTES + MAP_BYTES + ROUTE_BYTES + PART_BYTES + SEGMENTS * (SEGMENT_BYTES + 32) + P.
#define INSTANCE(name, T, nested)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) experts_few_##name(Experts job) { \
        experts_few<T, nested, 1>(job);                                                                   \
    }

INSTANCE(bf16, Bf16, false)
INSTANCE(bf16_nested, Bf16, true)
INSTANCE(f16, F16, false)
INSTANCE(f16_nested, F16, true)
