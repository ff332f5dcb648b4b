// What the headers that kernels see ask of the engine: who runs, where threads meet, shared memory, copies on the way.
//
// The engine is compiled without sanitizers, and kernels with them: what the engine does for a thread is never taken for
// something the kernel did.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_KERNEL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_KERNEL_ASAN 1
#endif
#endif
#if defined(HALFBYTE_EMULATOR_RACES)
#define EMULATOR_KERNEL_TSAN 1
#endif

namespace emulator {

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
    mma_s8,
    stmatrix,
    setmaxnreg,
    phase,
    named,
    cluster,
    registers,
    commit,
    retire,
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

// Waits for `threads` threads of the block, whole warps, at its barrier `number`, 1 to 15; or arrives there and goes on.
void named_barrier(unsigned number, unsigned threads, bool wait, Site site);

// Barriers in shared memory, each at the 8 bytes of its address: made for a number of arrivals, arrived at, and waited for
// until the phase of a parity has ended. A phase ends when all have arrived and all bytes are there that were expected.
void make_phases(void *address, uint32_t arrivals, Site site);
void arrive(void *address, Site site);
void expect(void *address, uint32_t bytes, Site site);
void wait_phase(void *address, uint32_t parity, Site site);
// Those that this thread has made may be used by copies and other blocks.
void phases_known();

// setmaxnreg: as many registers a thread from here on, more than before or fewer.
void set_registers(unsigned count, bool more, Site site);

// ---- clusters ------------------------------------------------------------------------------------------------------

unsigned cluster_rank();
// All threads of the cluster that have not ended.
void cluster_arrive(Site site);
void cluster_wait(Site site);
// The address in the cluster of what is at `pointer` in this block, in that with a rank; and what is there, to `store` to it
// or else.
uint32_t cluster_address(const void *pointer, unsigned rank, Site site);
void *cluster_memory(uint32_t address, size_t bytes, bool store, Site site);

// __threadfence: what this thread has done so far is seen by whoever fences later.
void fence();

// ---- shared memory -------------------------------------------------------------------------------------------------

// The block's array that belongs to `key`, made when first asked for: exactly `bytes` long, at an address that is a
// multiple of `alignment` and of no more, each byte 0xff.
void *shared_array(const void *key, size_t bytes, size_t alignment);

// The launch's dynamic shared memory: exactly as long as was asked for, a multiple of 128, each byte 0xff.
unsigned char *dynamic_shared();

// The address of shared memory as a device would have it: the dynamic begins behind what the system keeps there, and arrays
// follow.
uint32_t shared_address(const void *pointer);

// What ordinary stores of this thread have written can be read by copies and matrix units (fence.proxy.async).
void proxy_fence();

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

// ---- the copy engine -----------------------------------------------------------------------------------------------
// A copy is made when it is issued, or as late as can be: when no thread can go on, the latest first. It brings its bytes to
// a barrier in shared memory; those to global memory are waited for by groups of their thread.

// What cuTensorMapEncodeTiled is told, in the 128 bytes of a tensor map. Dimensions are in the order of memory, the
// innermost first.
struct TileMap {
    static constexpr uint32_t KIND = 0x70616d74;
    uint64_t address;
    uint32_t kind;           // KIND
    uint32_t rank;           // dimensions, 1 to 5
    uint32_t element_bytes;
    uint32_t swizzle;        // 0, 32, 64 or 128: bytes that are a row of the pattern
    uint32_t sizes[5];
    uint32_t box[5];
    uint64_t strides[4];     // bytes, of all dimensions but the innermost
};
static_assert(sizeof(TileMap) <= 128, "in place of the driver's");

// A part of global memory, or of shared memory.
struct Part {
    void *memory;
    size_t bytes;
};

// A copy is announced, which checks it; then what it touches may be looked at; then it begins. `blocks`: the ranks in the
// cluster that receive it, as bits, or 0 for this block alone.
void announce_box(const void *map, unsigned rank, const int *at, void *shared, void *barrier, uint32_t blocks, Site site);
void announce_bytes(void *shared, const void *global, uint32_t bytes, void *barrier, uint32_t blocks, Site site);
void announce_box_store(const void *map, unsigned rank, const int *at, const void *shared, Site site);
void announce_bytes_store(void *global, const void *shared, uint32_t bytes, Site site);
Part announced_shared();
size_t announced_parts();
Part announced_part(size_t which);
void begin_announced();
// That such a box can be copied.
void check_box(const void *map, unsigned rank, Site site);

void commit_stores();
// Until all but the last groups have read what they copy, or have written it too.
void wait_stores(unsigned pending, bool read_alone, Site site);

// ---- products of warpgroups ----------------------------------------------------------------------------------------

// One wgmma as a thread issues it: d[64][columns] of a[64][16] and b[16][columns].
enum class Values { f16, bf16, s8 };

struct Product {
    Values values;        // of a and b; whole numbers have int32 sums, the others float32
    bool add;             // to what d is
    int columns;
    uint32_t *d;          // [columns / 2], the bits of sums
    const uint32_t *a;    // [4], or null: in shared memory
    uint64_t a_place, b_place;  // descriptors
    bool a_transposed, b_transposed;
};

void products_fence();
void issue_product(const Product &product, Site site);
void commit_products(Site site);
// Gives the number of products that have ended by that, of which `ended_product` tells more until the next wait.
size_t wait_products(unsigned pending, Site site);
const Product &ended_product(size_t which);
// The 16-byte pieces of an operand in shared memory.
size_t operand_pieces(const Product &product);
const void *operand_piece(const Product &product, size_t which, Site site);

}  // namespace emulator
