// The interface of a built source to other languages.
#pragma once

#include <cstdint>

extern "C" {

struct HalfbyteLaunch {
    const char *kernel;
    uint32_t grid[3], block[3];
    uint64_t shared;                // bytes of dynamic shared memory
    uint64_t first_block, blocks;   // those of the grid that are run, in the order x, y, z
    uint32_t cluster;               // blocks of one, along x
    uint32_t highest_first;         // the order of threads and blocks, and when asynchronous copies are made; 2: but not the
                                    // order of blocks, of which some wait for those that start before them
    uint32_t count;                 // of arguments
    void *const *arguments;         // [count] where each is
    const uint64_t *sizes;          // [count] their bytes
};

// Runs a kernel. Null, or what was wrong with the launch or the kernel; the text is there until the next call. One at a
// time in a process.
__attribute__((visibility("default"))) const char *halfbyte_emulator_launch(const HalfbyteLaunch *launch);

// Lines "kernel NAME THREADS SIZE ..." and "constant NAME VALUE", and "fibers KIND".
__attribute__((visibility("default"))) const char *halfbyte_emulator_describe();
}
