// Warpgroup products: the matrix units reading one operand from registers and one from shared memory, or both from there, and
// the copies of tiles that feed them. For compute capability 9.0 alone (compute_90a), so not in ptx.cuh; as there, each
// function is one instruction that C++ has no words for, and kernels/emulator/wgmma.h has the same ones in C++.
#pragma once

#include "common/types.cuh"

// ---- copies of tiles -----------------------------------------------------------------------------------------------
// A tensor map is the driver's description of a matrix in memory, of the boxes that are copied from it, and of how these
// lie in shared memory (cuTensorMapEncodeTiled). It is a parameter of the kernel, passed by value.

struct alignas(64) TensorMap {
    u64 word[16];
};

#ifdef HALFBYTE_EMULATOR
#include "emulator/wgmma.h"
#else

// One box, its first element at (column, row); what is outside of the matrix is zero. Adds its bytes to what the barrier has
// received.
__device__ inline void copy_box(void *shared, const TensorMap *map, int column, int row, Barrier *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     u32(__cvta_generic_to_shared(shared))),
                 "l"(u64(map)), "r"(column), "r"(row), "r"(u32(__cvta_generic_to_shared(barrier)))
                 : "memory");
}

// The same for several blocks of a cluster, bit r of `ranks` being rank r: to the same place in the shared memory of each, with
// the barrier at the same place.
__device__ inline void copy_box_to(u32 ranks, void *shared, const TensorMap *map, int column, int row, Barrier *barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
        "[%4], %5;" ::"r"(u32(__cvta_generic_to_shared(shared))),
        "l"(u64(map)), "r"(column), "r"(row), "r"(u32(__cvta_generic_to_shared(barrier))), "h"(u16(ranks))
        : "memory");
}

// Has the second-level cache fetch such a box: a wish, without any effect on what is read or written.
__device__ inline void fetch_box(const TensorMap *map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(u64(map)), "r"(column), "r"(row));
}

// Prefetches a tensor map that lies in memory, so that the first copy by it does not wait for the map.
__device__ inline void fetch_map(const TensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(u64(map))); }

// One arrival, and so many bytes more to be received before the phase ends.
__device__ inline void barrier_arrive_expecting(Barrier *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(u32(__cvta_generic_to_shared(barrier))), "r"(bytes)
                 : "memory");
}

// Copies see the barriers that this thread has made.
__device__ inline void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// ---- roles of warpgroups -------------------------------------------------------------------------------------------

// From here on this warpgroup has so many registers a thread; not more together than the block was started with.
template <int REGISTERS>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Waits until so many threads, whole warps, are here; `ID` 1 to 15 tells barriers apart.
template <int ID, int THREADS>
__device__ inline void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// ---- clusters ------------------------------------------------------------------------------------------------------
// Blocks that run at the same time and reach each other's shared memory: there an address of one's own memory, given a rank,
// is that of the same place in that block's. A launch without clusters has clusters of one.

__device__ inline u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of all blocks of the cluster that have not ended; what they wrote before is seen after.
__device__ inline void cluster_meet() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline u32 address_at(const void *shared, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(u32(__cvta_generic_to_shared(shared))), "r"(rank));
    return there;
}
__device__ inline void store_at(u32 address, float a, float b, float c, float d) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ inline void store_at(u32 address, int a, int b, int c, int d) {
    asm volatile("st.shared::cluster.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ inline void store_byte_at(u32 address, u32 byte) {
    asm volatile("st.shared::cluster.u8 [%0], %1;" ::"r"(address), "r"(byte) : "memory");
}
// At a barrier that may be another block's.
__device__ inline void barrier_arrive_at(u32 address) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

// ---- matrices of 8 by 8, transposed --------------------------------------------------------------------------------

// Four matrices, of which each lane has two neighbours of a row as those of mma: row c of the memory of matrix i, 16 bytes at
// the address of lane 8i + c, gets column c.
__device__ inline void store_transposed(void *shared, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     u32(__cvta_generic_to_shared(shared))),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// ---- products ------------------------------------------------------------------------------------------------------
// d[64][N] = a[64][16] * b[N][16]^T, or += that; float32 sums, by the 128 threads of a warpgroup. With w = warp of the
// warpgroup, g = lane / 4 and t = lane % 4, a thread has
//   a[0]: row 16w + g, k = 2t, 2t + 1      a[1]: row 16w + g + 8, the same
//   a[2]: row 16w + g, k = 2t + 8, 2t + 9  a[3]: row 16w + g + 8, the same
//   d[4j], d[4j + 1]: row 16w + g, columns 8j + 2t, 8j + 2t + 1      d[4j + 2], d[4j + 3]: row 16w + g + 8, the same columns
// b lies in shared memory, K consecutive, 64 values (128 bytes) of a row together, rows behind each other, and the 16-byte
// piece c of row r at place c ^ r % 8; it begins at a multiple of 1024.
// The units work on their own: `products_begin` before the first, `products_commit` closes a group, and after
// `products_wait<N>` all but the last N groups have ended. Until then nothing of theirs may be touched.

// The low word of what says where b begins. The piece of 16 values i of its 64 begins 2i behind.
__device__ inline u32 operand(const void *shared) { return (u32(__cvta_generic_to_shared(shared)) & 0x3ffff) >> 4 | 1u << 16; }

// What this thread has stored in shared memory can be read by the units, and overwritten by copies, once others know of it.
__device__ inline void stores_before_units() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS>
__device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Operands of the instruction, by eights.
#define D8(how, i) \
    how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3]), how(d[i + 4]), how(d[i + 5]), how(d[i + 6]), how(d[i + 7])
#define D16(how, i) D8(how, i), D8(how, i + 8)
#define D24(how, i) D16(how, i), D8(how, i + 16)
#define D32(how, i) D8(how, i), D8(how, i + 8), D8(how, i + 16), D8(how, i + 24)
#define D48(how, i) D32(how, i), D8(how, i + 32), D8(how, i + 40)
#define D64(how, i) D32(how, i), D32(how, i + 32)
#define D96(how, i) D64(how, i), D32(how, i + 64)
#define D128(how, i) D64(how, i), D64(how, i + 64)

#define NUMBERS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NUMBERS16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"

#define NUMBERS24                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23"

#define NUMBERS32                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define NUMBERS48                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"

#define NUMBERS64                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define NUMBERS96                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define NUMBERS128                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// 0x40000040, the high word of where b begins: eight rows are 1024 bytes, with the swizzle of 128 bytes.
// PRODUCT(type of the operands, its name, N, sums of a thread, the numbers of a and of where b begins)
// `fresh` does not read d: it may be undefined.
#define PRODUCT(T, type, n, sums, a0, a1, a2, a3, b, high)                                                                \
    __device__ inline void multiply_fresh(T, float (&d)[sums], const u32 *a, u32 y) {                                     \
        asm volatile("{\n\t.reg .b64 place;\n\t.reg .pred add;\n\t"                                                       \
                     "mov.b64 place, {" b ", " high "};\n\tsetp.ne.b32 add, 0, 0;\n\t"                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" NUMBERS##sums "}, {" a0 ", " a1 \
                     ", " a2 ", " a3 "}, place, add, 1, 1, 0;\n\t}"                                                       \
                     : D##sums("=f", 0)                                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(y), "n"(0x40000040));                              \
    }                                                                                                                     \
    __device__ inline void multiply_add(T, float (&d)[sums], const u32 *a, u32 y) {                                       \
        asm volatile("{\n\t.reg .b64 place;\n\t.reg .pred add;\n\t"                                                       \
                     "mov.b64 place, {" b ", " high "};\n\tsetp.ne.b32 add, 1, 0;\n\t"                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" NUMBERS##sums "}, {" a0 ", " a1 \
                     ", " a2 ", " a3 "}, place, add, 1, 1, 0;\n\t}"                                                       \
                     : D##sums("+f", 0)                                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(y), "n"(0x40000040));                              \
    }

#define PRODUCTS(T, type)                                                 \
    PRODUCT(T, type, 16, 8, "%8", "%9", "%10", "%11", "%12", "%13")       \
    PRODUCT(T, type, 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")    \
    PRODUCT(T, type, 48, 24, "%24", "%25", "%26", "%27", "%28", "%29")    \
    PRODUCT(T, type, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")    \
    PRODUCT(T, type, 96, 48, "%48", "%49", "%50", "%51", "%52", "%53")    \
    PRODUCT(T, type, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")   \
    PRODUCT(T, type, 192, 96, "%96", "%97", "%98", "%99", "%100", "%101") \
    PRODUCT(T, type, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

PRODUCTS(Bf16, "bf16")
PRODUCTS(F16, "f16")

#undef PRODUCTS
#undef PRODUCT

// d[64][N] = a[64][32] * b[N][32]^T, or += that, of int8 with int32 sums: both operands in shared memory as b above, 128 values
// (128 bytes) of a row together; the piece of 32 values i of its 128 begins 2i behind.
// PRODUCT(N, sums of a thread, the numbers of where a and b begin, and of the high words)
#define PRODUCT(n, sums, a, b, high)                                                                        \
    __device__ inline void multiply_fresh(int (&d)[sums], u32 x, u32 y) {                                   \
        asm volatile("{\n\t.reg .b64 a, b;\n\t.reg .pred add;\n\t"                                          \
                     "mov.b64 a, {" a ", " high "};\n\tmov.b64 b, {" b ", " high "};\n\t"                   \
                     "setp.ne.b32 add, 0, 0;\n\t"                                                           \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" NUMBERS##sums "}, a, b, add;\n\t}" \
                     : D##sums("=r", 0)                                                                     \
                     : "r"(x), "r"(y), "n"(0x40000040));                                                    \
    }                                                                                                       \
    __device__ inline void multiply_add(int (&d)[sums], u32 x, u32 y) {                                     \
        asm volatile("{\n\t.reg .b64 a, b;\n\t.reg .pred add;\n\t"                                          \
                     "mov.b64 a, {" a ", " high "};\n\tmov.b64 b, {" b ", " high "};\n\t"                   \
                     "setp.ne.b32 add, 1, 0;\n\t"                                                           \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" NUMBERS##sums "}, a, b, add;\n\t}" \
                     : D##sums("+r", 0)                                                                     \
                     : "r"(x), "r"(y), "n"(0x40000040));                                                    \
    }

PRODUCT(64, 32, "%32", "%33", "%34")
PRODUCT(96, 48, "%48", "%49", "%50")
PRODUCT(128, 64, "%64", "%65", "%66")
PRODUCT(192, 96, "%96", "%97", "%98")
PRODUCT(256, 128, "%128", "%129", "%130")

#undef PRODUCT

#endif
