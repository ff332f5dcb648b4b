// Asynchronous copies from global to shared memory (cp.async). Their target holds garbage from when they are issued until
// they are waited for; they happen at either end of that time, by the order of the launch.
#pragma once

#include "collectives.h"
#include "index.h"

#if EMULATOR_KERNEL_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

inline void make_copy(const Copy &copy) {
    const unsigned char *const from = static_cast<const unsigned char *>(copy.from);
    unsigned char *const to = static_cast<unsigned char *>(copy.to);
    for (uint32_t i = 0; i < copy.bytes; i++) {
        to[i] = i < copy.valid ? from[i] : 0;
    }
}

// `bytes` is 4, 8 or 16, and both addresses are multiples of it. Behind the first `valid` bytes zeros are written, and
// nothing is read.
inline void issue_copy(void *to, const void *from, uint32_t bytes, uint32_t valid, Site site) {
    if (bytes != 4 && bytes != 8 && bytes != 16) {
        fail(site, "an asynchronous copy of %u bytes", bytes);
    }
    check_aligned(to, bytes, site);
    check_aligned(from, bytes, site);
    const Copy copy = {to, from, bytes, valid < bytes ? valid : bytes, 0, site};
    if (copies_at_once()) {
        make_copy(copy);
    } else {
        // Both are touched here, so that what is out of bounds is reported with the line that asked for it.
        volatile unsigned char read;
        for (uint32_t i = 0; i < bytes; i++) {
            if (i < copy.valid) {
                read = static_cast<const unsigned char *>(from)[i];
            }
            static_cast<unsigned char *>(to)[i] = 0xff;
        }
        (void)read;
    }
#if EMULATOR_KERNEL_ASAN
    __asan_poison_memory_region(to, bytes);
#endif
    push_copy(copy);
}

// Until no more than `pending` groups, the latest, are on the way.
inline void wait_copies(uint32_t pending) {
    Copy copy;
    while (pop_copy(pending, copy)) {
#if EMULATOR_KERNEL_ASAN
        __asan_unpoison_memory_region(copy.to, copy.bytes);
#endif
        if (!copies_at_once()) {
            make_copy(copy);
        }
    }
}

// ---- the copy engine -----------------------------------------------------------------------------------------------

// For the sanitizers: as if the thread that issues a copy, or waits for a product, read or wrote this itself. So what is out
// of bounds or in no order is reported with the line that asked for it.
inline void touch([[maybe_unused]] const Part &part, [[maybe_unused]] bool write) {
#if EMULATOR_KERNEL_ASAN || EMULATOR_KERNEL_TSAN
    unsigned char *at = static_cast<unsigned char *>(part.memory), *const end = at + part.bytes;
    while (at < end) {
        volatile unsigned char *const byte = at;
        volatile uint64_t *const word = reinterpret_cast<volatile uint64_t *>(at);
        const bool wide = reinterpret_cast<uintptr_t>(at) % 8 == 0 && end - at >= 8;
        if (wide && write) {
            *word = ~uint64_t(0);
        } else if (wide) {
            (void)*word;
        } else if (write) {
            *byte = 0xff;
        } else {
            (void)*byte;
        }
        at += wide ? 8 : 1;
    }
#endif
}

inline void begin_load() {
    for (size_t i = 0; i < announced_parts(); i++) {
        touch(announced_part(i), false);
    }
    touch(announced_shared(), true);
    begin_announced();
}

inline void begin_store() {
    for (size_t i = 0; i < announced_parts(); i++) {
        touch(announced_part(i), true);
    }
    touch(announced_shared(), false);
    begin_announced();
}

// What a product of a warpgroup reads in shared memory: all of it by each warp, a lane its share.
inline void touch_operands([[maybe_unused]] const Product &product, [[maybe_unused]] Site site) {
#if EMULATOR_KERNEL_TSAN
    for (size_t i = threadIdx.x % 32; i < operand_pieces(product); i += 32) {
        touch({const_cast<void *>(operand_piece(product, i, site)), 16}, false);
    }
#endif
}

// The same of the last `count` products that have ended: for the warp, whichever lane tells others that they have.
inline void touch_ended([[maybe_unused]] size_t count, [[maybe_unused]] Site site) {
#if EMULATOR_KERNEL_TSAN
    for (size_t i = 0; i < count; i++) {
        touch_operands(ended_product(i), site);
    }
    __syncwarp(0xffffffffu, site);
#endif
}

}  // namespace emulator
