// What a kernel's source needs besides C++: CUDA's words, for a compiler of processor code.
//
// A thread is a fiber, and blocks run one after another, or those of a cluster together: see block.cpp. Not here, because
// nothing of it could be checked: the rounding of the matrix units, bank conflicts, the registers that a compiler takes.
#pragma once

#include "arithmetic.h"
#include "collectives.h"
#include "engine.h"
#include "index.h"

#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
// build_emulator.py looks for these words in the preprocessed source.
#ifndef HALFBYTE_EMULATOR_LISTING
#define __global__
#define __launch_bounds__(...)
#endif

// See common/types.cuh. `key` has one address for each place, and each instance of a template, as the array has.
#define SHARED_ARRAY(type, name, dimensions)                 \
    static char name##_key;                                  \
    auto &name = *static_cast<type(*) dimensions>(           \
        emulator::shared_array(&name##_key, sizeof(type dimensions), alignof(type)))
#define DYNAMIC_SHARED(name) unsigned char *const name = emulator::dynamic_shared()
#define DYNAMIC_SHARED_1024(name) DYNAMIC_SHARED(name)

#define CONSTANT_TABLE const
#define GLOBAL_TABLE const
