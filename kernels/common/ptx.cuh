// Every instruction that C++ has no words for. The only file with inline PTX: kernels/emulator/ptx.h has the same functions
// in C++. Pointers are ordinary ones; the wrappers turn them into addresses of a state space.
#pragma once

#ifdef HALFBYTE_EMULATOR
#include "emulator/ptx.h"
#else

// ---- floats --------------------------------------------------------------------------------------------------------

// The float32 that float16 bits stand for; exact.
__device__ inline float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// The bits of the nearest float16, ties to even. NaN gives a NaN.
__device__ inline u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// The bits of the nearest bfloat16, ties to even. NaN gives a NaN.
__device__ inline u16 float_to_bfloat(float value) {
#if __CUDA_ARCH__ >= 800
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const u32 bits = __float_as_uint(value);
    const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return value == value ? u16(rounded) : u16(0x7fff);
#endif
}

// Both in one word, `first` in the low half.
__device__ inline u32 pack_half2(float first, float second) {
#if __CUDA_ARCH__ >= 800
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#else
    return u32(float_to_half(first)) | u32(float_to_half(second)) << 16;
#endif
}

__device__ inline u32 pack_bfloat2(float first, float second) {
#if __CUDA_ARCH__ >= 800
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#else
    return u32(float_to_bfloat(first)) | u32(float_to_bfloat(second)) << 16;
#endif
}

// a * b + c, rounded once. A NaN has the bits 0x7fffffff, whatever those of the operands.
__device__ inline float multiply_add(float a, float b, float c) {
    float value;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(value) : "f"(a), "f"(b), "f"(c));
    return value;
}

// 1 / x within one step, for 2^-126 <= x < 2^126.
__device__ inline float reciprocal_near(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// ---- signals between blocks ----------------------------------------------------------------------------------------

// What this thread has written, and other threads of the block that it met since, is seen by who finds `value` there.
__device__ inline void signal(u64 *at, u64 value) {
    asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
// Waits until another block has signalled that; it must not be one that starts later.
__device__ inline void wait_for_signal(const u64 *at, u64 value) {
    u64 found;
    do {
        asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(found) : "l"(at) : "memory");
    } while (found != value);
}

// The same by all lanes of a warp, together. If one lane waited alone, ptxas would not use uniform registers around its loop.
__device__ inline void wait_for_signal_by_warp(const u64 *at, u64 value) {
    u64 found;
    do {
        asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(found) : "l"(at) : "memory");
    } while (__any_sync(ALL_LANES, found != value));
}

// ---- bytes ---------------------------------------------------------------------------------------------------------

// Byte i of the result is byte `selector >> 4i & 7` of the eight in (a, b), a's four first.
__device__ inline u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// ---- lanes ---------------------------------------------------------------------------------------------------------

// This thread's lane, read anew: what is computed from it need not be kept in registers since it was computed before.
__device__ inline int read_lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// The same of this thread's warp, in a block of one dimension.
__device__ inline int read_warp() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread / 32;
}

// ---- tables in shared memory ---------------------------------------------------------------------------------------
// A table of 256 words for each lane, so that no two lanes of a warp meet in a bank: entry `byte` of lane l is
// table[byte][l], rows being 64 words apart. The table begins at a multiple of 64 KB of the shared memory's addresses:
// then one permutation of bytes makes the address of an entry.

constexpr int LANE_TABLE_ROW = 64;
constexpr u32 LANE_TABLE_BYTES = 256 * LANE_TABLE_ROW * 4;

// How many bytes behind `shared` the first place for such a table is.
__device__ inline u32 lane_table_place(const void *shared) {
    return (0u - u32(__cvta_generic_to_shared(shared))) & (LANE_TABLE_BYTES - 1);
}

// A lane's entries.
struct LaneTable {
    u32 address;
};

__device__ inline LaneTable lane_table(const u32 *table, int lane) {
    return {u32(__cvta_generic_to_shared(table + lane))};
}

// The entry for byte `BYTE` of `word`.
template <int BYTE>
__device__ inline u32 look_up(LaneTable table, u32 word) {
    u32 entry;
    // Byte 1 of the address from the word, the others from the lane's.
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"(__byte_perm(word, table.address, 0x7604 | BYTE << 4)));
    return entry;
}

// A table whose first address is a multiple of a power of two: bits below that, masked, are the place of an entry, and one
// logical operation makes its address.
struct MaskedTable {
    u32 address;
};

__device__ inline MaskedTable masked_table(const void *table) { return {u32(__cvta_generic_to_shared(table))}; }

// The word that is OFFSET + (bits & MASK) bytes behind the first.
template <u32 MASK, u32 OFFSET>
__device__ inline u32 look_up(MaskedTable table, u32 bits) {
    u32 entry;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(entry) : "r"((bits & MASK) | table.address), "n"(OFFSET));
    return entry;
}

// ---- global memory -------------------------------------------------------------------------------------------------
// Streaming loads are for memory that nobody writes during the kernel and nobody reads twice: they leave the first-level
// cache alone, and have the second level fetch the whole 128-byte line of which they want a part. They are issued where
// they stand, so that a prefetch stays one. Addresses are multiples of the size.

__device__ inline u32 load_stream(const u32 *address) {
    u32 word;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(address)));
    return word;
}

__device__ inline Words2 load_stream(const Words2 *address) {
    Words2 words;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.word[0]), "=r"(words.word[1])
                 : "l"(__cvta_generic_to_global(address)));
    return words;
}

__device__ inline Words4 load_stream(const Words4 *address) {
    Words4 words;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
                 : "l"(__cvta_generic_to_global(address)));
    return words;
}

// The same for memory that the kernel before may still write when this one starts: to be read after `wait_for_previous`.
__device__ inline Words4 load_stream_after(const Words4 *address) {
    Words4 words;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
                 : "l"(__cvta_generic_to_global(address)));
    return words;
}

// For memory that others of the block read too: kept in the first-level cache.
__device__ inline Words4 load_shared_line(const Words4 *address) {
    Words4 words;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
                 : "l"(__cvta_generic_to_global(address)));
    return words;
}

__device__ inline void store_words(Words4 *address, const Words4 &words) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(words.word[0]),
                 "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
                 : "memory");
}

// ---- copies from global to shared memory ---------------------------------------------------------------------------
// A thread's copies go on while it works. `commit` closes a group of those started since the last; `wait<N>` returns when
// all but the last N groups have ended. Other threads see what was copied after a barrier that follows the wait.

#if __CUDA_ARCH__ >= 800
__device__ inline void copy_async(Words4 *shared, const Words4 *global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
}
// Reads the first `bytes` bytes alone, all from the size of the copy on, and makes the others zero.
__device__ inline void copy_async(Words4 *shared, const Words4 *global, u32 bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(u32(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes < 16 ? bytes : 16)
                 : "memory");
}
__device__ inline void copy_async(u32 *shared, const u32 *global, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(u32(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes < 4 ? bytes : 4)
                 : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
#else
// Without that unit the thread copies itself, and goes on then.
__device__ inline void copy_async(Words4 *shared, const Words4 *global) { *shared = *global; }
__device__ inline void copy_async_commit() {}
template <int GROUPS>
__device__ inline void copy_async_wait() {}
#endif

#if __CUDA_ARCH__ >= 900
// Has the second-level cache fetch what it lacks of some memory: a wish, without any effect on what is read or written. Both
// numbers are multiples of 16.
__device__ inline void fetch_to_second_level(const u8 *address, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(bytes));
}
#else
__device__ inline void fetch_to_second_level(const u8 *, u32) {}
#endif

// ---- barriers in shared memory -------------------------------------------------------------------------------------
// A phase of a barrier ends when as many have arrived as the barrier was made for; then the next one begins. Who waits names
// a phase by its parity, 0 for the first: the wait is over when that phase is. What was done before an arrival is seen
// after the wait.

struct Barrier {
    u64 state;
};

#if __CUDA_ARCH__ >= 900
// By one thread, before any other knows of the barrier.
__device__ inline void barrier_init(Barrier *barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(u32(__cvta_generic_to_shared(barrier))), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(Barrier *barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(u32(__cvta_generic_to_shared(barrier))) : "memory");
}
__device__ inline void barrier_wait(Barrier *barrier, u32 parity) {
    u32 over;
    do {
        asm volatile(
            "{\n\t"
            ".reg .pred over;\n\t"
            "mbarrier.try_wait.parity.shared.b64 over, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, over;\n\t"
            "}"
            : "=r"(over)
            : "r"(u32(__cvta_generic_to_shared(barrier))), "r"(parity)
            : "memory");
    } while (over == 0);
}
#endif

// ---- one kernel after another --------------------------------------------------------------------------------------
// A kernel that is launched to start early (Device::launch_early) does so once every block of the kernel before it on the
// stream has ended or called `let_next_start`. Until `wait_for_previous` returns it must not touch what that one reads or
// writes; then that one has ended, and all that it wrote can be seen, though not by load_stream, which is for memory that
// nobody writes from the start of a kernel on. Launched otherwise, both do nothing.

#if __CUDA_ARCH__ >= 900
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ inline void let_next_start() {}
__device__ inline void wait_for_previous() {}
#endif

// ---- matrix units --------------------------------------------------------------------------------------------------
// d[16][8] += a[16][16] * b[16][8], float32 sums, by the 32 lanes of a warp. With g = lane / 4 and t = lane % 4, lane
// has these elements, two to a word, the first in the low half:
//   a[0]: row g,     k = 2t, 2t+1      a[1]: row g + 8, k = 2t, 2t+1
//   a[2]: row g,     k = 2t+8, 2t+9    a[3]: row g + 8, k = 2t+8, 2t+9
//   b[0]: k = 2t, 2t+1, column g       b[1]: k = 2t+8, 2t+9, column g
//   d[0], d[1]: row g, columns 2t, 2t+1      d[2], d[3]: row g + 8, columns 2t, 2t+1

#if __CUDA_ARCH__ >= 800
__device__ inline void mma_m16n8k16(Bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

__device__ inline void mma_m16n8k16(F16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // Two of half the depth, whose lanes have the same elements.
    for (int half = 0; half < 2; half++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half == 0 ? b0 : b1));
    }
#endif
}

// Four matrices of 8 rows of 8 16-bit elements: lane 8i + r gives the address of row r of matrix i, a multiple of 16, and each
// lane gets elements 2t and 2t + 1 of row g of each matrix, which is what mma wants of b[n][k].
__device__ inline void load_matrices(u32 (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(u32(__cvta_generic_to_shared(row))));
}

// The same of the matrices transposed: each lane gets element g of rows 2t and 2t + 1.
__device__ inline void load_transposed(u32 (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(u32(__cvta_generic_to_shared(row))));
}

// d[16][8] += a[16][32] * b[32][8] of 8-bit integers, int32 sums that wrap around. A lane has, four to a word, the first in
// the low byte:
//   a[0]: row g,     k = 4t ... 4t+3       a[1]: row g + 8, k = 4t ... 4t+3
//   a[2]: row g,     k = 4t+16 ... 4t+19   a[3]: row g + 8, k = 4t+16 ... 4t+19
//   b0: k = 4t ... 4t+3, column g          b1: k = 4t+16 ... 4t+19, column g
//   d: as above
__device__ inline void mma_m16n8k32(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // Four of a quarter's size, whose lanes have the same elements.
    for (int i = 0; i < 4; i++) {
        int *const half = d + i % 2 * 2;
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(half[0]), "+r"(half[1])
            : "r"(a[i]), "r"(i < 2 ? b0 : b1));
    }
#endif
}

// sum + the products of the four 8-bit integers in each word, those of the same place.
__device__ inline int dot_4(u32 a, u32 b, int sum) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

#endif
