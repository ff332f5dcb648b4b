// What the headers that kernels see ask of the engine: who runs, where threads meet, shared memory, copies on the way.
//
// The engine is compiled without sanitizers, and kernels with them: what the engine does for a thread is never taken for
// something the kernel did.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define HOST_KERNEL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HOST_KERNEL_ASAN 1
#endif
#endif

namespace host {

// A place in a kernel: as a default argument, that of the call.
struct Site {
    const char *file;
    int line;
    static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch: the report names the kernel, the block and the thread, then says this.
[[noreturn]] void fail(Site site, const char *format, ...) __attribute__((format(printf, 2, 3)));

// ---- meeting -------------------------------------------------------------------------------------------------------

// What threads of a block, or lanes of a warp, do together.
enum class Meeting : int {
    barrier,
    syncwarp,
    shuffle,
    shuffle_up,
    shuffle_down,
    shuffle_xor,
    ballot,
    match_any,
    reduce_add,
    reduce_min,
    reduce_max,
    reduce_and,
    reduce_or,
    reduce_xor,
    ldmatrix,
    mma_bf16,
    mma_f16,
    phase,
};

// What a lane brings to a meeting, and takes away.
struct Slot {
    uint32_t word[12];
};

// Waits for the other lanes of `mask`. The last that comes computes for all. `first` and `second` are what the lane asks
// for (a lane, a width); they may differ between lanes where the instruction allows it.
void meet(Meeting meeting, uint32_t mask, Slot &slot, int first, int second, Site site);

// Waits for all threads of the block. Gives the number of threads whose `predicate` is true.
int barrier(bool predicate, Site site);

// Barriers in shared memory, each at the 8 bytes of its address: made for a number of arrivals, arrived at, and waited for
// until the phase of a parity has ended.
void make_phases(void *address, uint32_t arrivals, Site site);
void arrive(void *address, Site site);
void wait_phase(void *address, uint32_t parity, Site site);

// __threadfence: what this thread has done so far is seen by whoever fences later.
void fence();

// ---- shared memory -------------------------------------------------------------------------------------------------

// The block's array that belongs to `key`, made when first asked for: exactly `bytes` long, at an address that is a
// multiple of `alignment` and of no more, each byte 0xff.
void *shared_array(const void *key, size_t bytes, size_t alignment);

// The launch's dynamic shared memory: exactly as long as was asked for, a multiple of 128, each byte 0xff.
unsigned char *dynamic_shared();

// The address of dynamic shared memory as a device would have it: it begins behind what the system keeps there.
uint32_t shared_address(const void *pointer);

// ---- asynchronous copies -------------------------------------------------------------------------------------------

// One cp.async: `bytes` bytes to shared memory, of which the first `valid` are read and the others zeros.
struct Copy {
    void *to;
    const void *from;
    uint32_t bytes, valid;
    uint32_t group;
    Site site;
};

// Whether a copy is made when it is issued, instead of when it is waited for: both are allowed.
bool copies_at_once();
void push_copy(const Copy &copy);
void commit_copies();
// Takes the oldest copy that is in neither of the last `pending` groups nor uncommitted; false when there is none.
bool pop_copy(uint32_t pending, Copy &copy);

}  // namespace host
