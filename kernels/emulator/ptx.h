// The functions of common/ptx.cuh in C++.
#pragma once

#include "copies.h"
#include "matrices.h"
#include "runtime.h"

// ---- floats --------------------------------------------------------------------------------------------------------

inline float half_to_float(u16 bits) {
    const u32 exponent = bits >> 10 & 31, fraction = bits & 1023u, sign = u32(bits & 0x8000) << 16;
    if (exponent == 0) {
        // A multiple of 2^-24: exact.
        return __uint_as_float(sign | __float_as_uint(float(fraction) * 0x1p-24f));
    }
    if (exponent == 31) {
        return fraction == 0 ? __uint_as_float(sign | 0x7f800000u) : __uint_as_float(0x7fffffffu);
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline u16 float_to_half(float value) {
    const u32 bits = __float_as_uint(value), size = bits & 0x7fffffffu;
    const u16 sign = u16(bits >> 16 & 0x8000);
    if (size > 0x7f800000u) {
        return 0x7fff;
    }
    if (size >= 0x477ff000u) {
        return u16(sign | 0x7c00);  // from 65520 on
    }
    if (size < 0x38800000u) {
        // Below 2^-14: adding 0.5 leaves a multiple of 2^-24 in the low bits, rounded to even.
        return u16(sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u));
    }
    const u32 rounded = size + 0xfff + (size >> 13 & 1);
    return u16(sign | ((rounded >> 13) - (112u << 10)));
}

inline u16 float_to_bfloat(float value) {
    const u32 bits = __float_as_uint(value);
    return value == value ? u16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16) : u16(0x7fff);
}

inline u32 pack_half2(float first, float second) { return u32(float_to_half(first)) | u32(float_to_half(second)) << 16; }
inline u32 pack_bfloat2(float first, float second) {
    return u32(float_to_bfloat(first)) | u32(float_to_bfloat(second)) << 16;
}

inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

inline float reciprocal_near(float x) { return __frcp_rn(x); }

// ---- signals between blocks ----------------------------------------------------------------------------------------

inline void signal(u64 *at, u64 value) {
    *at = value;
    emulator::fence();
}
// Blocks run one after another: what is not there yet does not come.
inline void wait_for_signal(const u64 *at, u64 value, emulator::Site site = emulator::Site::here()) {
    emulator::fence();
    if (*at != value) {
        emulator::fail(site, "a block waits for a signal of one that has not run");
    }
}
inline void wait_for_signal_by_warp(const u64 *at, u64 value, emulator::Site site = emulator::Site::here()) {
    wait_for_signal(at, value, site);
}

// ---- bytes ---------------------------------------------------------------------------------------------------------

inline u32 permute_bytes(u32 a, u32 b, u32 selector, emulator::Site site = emulator::Site::here()) {
    return __byte_perm(a, b, selector, site);
}

// ---- lanes ---------------------------------------------------------------------------------------------------------

inline int read_lane() { return int(threadIdx.x % 32); }
inline int read_warp() { return int(threadIdx.x / 32); }

// ---- tables in shared memory ---------------------------------------------------------------------------------------

constexpr int LANE_TABLE_ROW = 64;
constexpr u32 LANE_TABLE_BYTES = 256 * LANE_TABLE_ROW * 4;

inline u32 lane_table_place(const void *shared) { return (0u - emulator::shared_address(shared)) & (LANE_TABLE_BYTES - 1); }

// A pointer, for accesses to be checked like any other.
struct LaneTable {
    const u32 *entries;
};

inline LaneTable lane_table(const u32 *table, int lane, emulator::Site site = emulator::Site::here()) {
    if (emulator::shared_address(table) % LANE_TABLE_BYTES != 0) {
        emulator::fail(site, "a table of lanes that does not begin at a multiple of %u", LANE_TABLE_BYTES);
    }
    return {table + lane};
}

template <int BYTE>
inline u32 look_up(LaneTable table, u32 word) {
    return table.entries[(word >> (8 * BYTE) & 0xff) * LANE_TABLE_ROW];
}

// A pointer, as above.
struct MaskedTable {
    const u8 *base;
};

inline MaskedTable masked_table(const void *table) { return {static_cast<const u8 *>(table)}; }

template <u32 MASK, u32 OFFSET>
inline u32 look_up(MaskedTable table, u32 bits, emulator::Site site = emulator::Site::here()) {
    if ((emulator::shared_address(table.base) & MASK) != 0) {
        emulator::fail(site, "a table in whose first address bits of the mask %#x are set", MASK);
    }
    return *reinterpret_cast<const u32 *>(table.base + OFFSET + (bits & MASK));
}

// ---- global memory -------------------------------------------------------------------------------------------------

inline u32 load_stream(const u32 *address, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(address, sizeof *address, site);
    return *address;
}
inline Words2 load_stream(const Words2 *address, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(address, sizeof *address, site);
    return *address;
}
inline Words4 load_stream(const Words4 *address, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(address, sizeof *address, site);
    return *address;
}
inline Words4 load_stream_after(const Words4 *address, emulator::Site site = emulator::Site::here()) {
    return load_stream(address, site);
}
inline Words4 load_shared_line(const Words4 *address, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(address, sizeof *address, site);
    return *address;
}
inline void store_words(Words4 *address, const Words4 &words, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(address, sizeof *address, site);
    *address = words;
}

// ---- copies from global to shared memory ---------------------------------------------------------------------------

inline void copy_async(Words4 *shared, const Words4 *global, emulator::Site site = emulator::Site::here()) {
    emulator::issue_copy(shared, global, sizeof *shared, sizeof *shared, site);
}
inline void copy_async(Words4 *shared, const Words4 *global, u32 bytes, emulator::Site site = emulator::Site::here()) {
    emulator::issue_copy(shared, global, sizeof *shared, bytes, site);
}
inline void copy_async(u32 *shared, const u32 *global, u32 bytes, emulator::Site site = emulator::Site::here()) {
    emulator::issue_copy(shared, global, sizeof *shared, bytes, site);
}
inline void copy_async_commit() { emulator::commit_copies(); }
template <int GROUPS>
inline void copy_async_wait() {
    emulator::wait_copies(GROUPS);
}

inline void fetch_to_second_level(const u8 *address, u32 bytes, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(address, 16, site);
    if (bytes % 16 != 0) {
        emulator::fail(site, "%d bytes are no multiple of 16", int(bytes));
    }
}

// ---- barriers in shared memory -------------------------------------------------------------------------------------

struct Barrier {
    u64 state;
};

// The bytes are written, and read by others: so that bounds and order are checked as of any shared memory.
inline void barrier_init(Barrier *barrier, u32 arrivals, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(barrier, sizeof *barrier, site);
    barrier->state = arrivals;
    emulator::make_phases(barrier, arrivals, site);
}
inline void barrier_arrive(Barrier *barrier, emulator::Site site = emulator::Site::here()) {
    (void)*static_cast<volatile u64 *>(&barrier->state);
    emulator::arrive(barrier, site);
}
inline void barrier_wait(Barrier *barrier, u32 parity, emulator::Site site = emulator::Site::here()) {
    (void)*static_cast<volatile u64 *>(&barrier->state);
    emulator::wait_phase(barrier, parity, site);
}

// ---- one kernel after another --------------------------------------------------------------------------------------

// One has ended before the next starts.
inline void let_next_start() {}
inline void wait_for_previous() {}

// ---- matrix units --------------------------------------------------------------------------------------------------

inline void mma_m16n8k16(Bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, emulator::Site site = emulator::Site::here()) {
    emulator::multiply(emulator::Meeting::mma_bf16, d, a, b0, b1, site);
}
inline void mma_m16n8k16(F16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, emulator::Site site = emulator::Site::here()) {
    emulator::multiply(emulator::Meeting::mma_f16, d, a, b0, b1, site);
}
inline void load_matrices(u32 (&words)[4], const void *row, emulator::Site site = emulator::Site::here()) {
    emulator::load_matrices<4, false>(words, row, site);
}
inline void load_transposed(u32 (&words)[4], const void *row, emulator::Site site = emulator::Site::here()) {
    emulator::load_matrices<4, true>(words, row, site);
}
inline void mma_m16n8k32(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, emulator::Site site = emulator::Site::here()) {
    emulator::multiply(emulator::Meeting::mma_s8, d, a, b0, b1, site);
}

inline int dot_4(u32 a, u32 b, int sum) {
    u32 total = u32(sum);
    for (int i = 0; i < 32; i += 8) {
        total += u32(int(static_cast<signed char>(a >> i)) * int(static_cast<signed char>(b >> i)));
    }
    return int(total);
}
