// Asynchronous copies from global to shared memory (cp.async). Their target holds garbage from when they are issued until
// they are waited for; they happen at either end of that time, by the order of the launch.
#pragma once

#include "collectives.h"

#if HOST_KERNEL_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace host {

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
#if HOST_KERNEL_ASAN
    __asan_poison_memory_region(to, bytes);
#endif
    push_copy(copy);
}

// Until no more than `pending` groups, the latest, are on the way.
inline void wait_copies(uint32_t pending) {
    Copy copy;
    while (pop_copy(pending, copy)) {
#if HOST_KERNEL_ASAN
        __asan_unpoison_memory_region(copy.to, copy.bytes);
#endif
        if (!copies_at_once()) {
            make_copy(copy);
        }
    }
}

}  // namespace host
