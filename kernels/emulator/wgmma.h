// The functions of common/wgmma.cuh in C++. A tensor map is a emulator::TileMap.
#pragma once

#include "copies.h"
#include "matrices.h"
#include "ptx.h"

// ---- copies of tiles -----------------------------------------------------------------------------------------------

inline void copy_box(void *shared, const TensorMap *map, int column, int row, Barrier *barrier,
                     emulator::Site site = emulator::Site::here()) {
    const int at[2] = {column, row};
    emulator::announce_box(map, 2, at, shared, barrier, 0, site);
    emulator::begin_load();
}
inline void copy_box_to(u32 ranks, void *shared, const TensorMap *map, int column, int row, Barrier *barrier,
                        emulator::Site site = emulator::Site::here()) {
    const int at[2] = {column, row};
    emulator::announce_box(map, 2, at, shared, barrier, ranks, site);
    emulator::begin_load();
}
inline void fetch_box(const TensorMap *map, int, int, emulator::Site site = emulator::Site::here()) {
    emulator::check_box(map, 2, site);
}
inline void fetch_map(const TensorMap *map, emulator::Site site = emulator::Site::here()) { fetch_box(map, 0, 0, site); }
inline void barrier_arrive_expecting(Barrier *barrier, u32 bytes, emulator::Site site = emulator::Site::here()) {
    (void)*static_cast<volatile u64 *>(&barrier->state);
    emulator::expect(barrier, bytes, site);
    emulator::arrive(barrier, site);
}
inline void barriers_made() { emulator::phases_known(); }

// ---- roles of warpgroups -------------------------------------------------------------------------------------------

template <int REGISTERS>
inline void take_registers(emulator::Site site = emulator::Site::here()) {
    emulator::set_registers(REGISTERS, true, site);
}
template <int REGISTERS>
inline void give_registers(emulator::Site site = emulator::Site::here()) {
    emulator::set_registers(REGISTERS, false, site);
}
template <int ID, int THREADS>
inline void meet(emulator::Site site = emulator::Site::here()) {
    emulator::named_barrier(ID, THREADS, true, site);
}

// ---- clusters ------------------------------------------------------------------------------------------------------

inline u32 cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_meet(emulator::Site site = emulator::Site::here()) {
    emulator::cluster_arrive(site);
    emulator::cluster_wait(site);
}
inline u32 address_at(const void *shared, u32 rank, emulator::Site site = emulator::Site::here()) {
    return emulator::cluster_address(shared, rank, site);
}
inline void store_at(u32 address, float a, float b, float c, float d, emulator::Site site = emulator::Site::here()) {
    Floats4 *const to = static_cast<Floats4 *>(emulator::cluster_memory(address, sizeof(Floats4), true, site));
    emulator::check_aligned(to, sizeof *to, site);
    *to = {a, b, c, d};
}
inline void store_at(u32 address, int a, int b, int c, int d, emulator::Site site = emulator::Site::here()) {
    Words4 *const to = static_cast<Words4 *>(emulator::cluster_memory(address, sizeof(Words4), true, site));
    emulator::check_aligned(to, sizeof *to, site);
    *to = {u32(a), u32(b), u32(c), u32(d)};
}
inline void store_byte_at(u32 address, u32 byte, emulator::Site site = emulator::Site::here()) {
    *static_cast<u8 *>(emulator::cluster_memory(address, 1, true, site)) = u8(byte);
}
inline void barrier_arrive_at(u32 address, emulator::Site site = emulator::Site::here()) {
    emulator::arrive(emulator::cluster_memory(address, sizeof(Barrier), false, site), site);
}

// ---- matrices of 8 by 8, transposed --------------------------------------------------------------------------------

inline void store_transposed(void *shared, u32 a, u32 b, u32 c, u32 d, emulator::Site site = emulator::Site::here()) {
    const u32 words[4] = {a, b, c, d};
    emulator::store_matrices<4, true>(shared, words, site);
}

// ---- products ------------------------------------------------------------------------------------------------------

inline u32 operand(const void *shared) { return (emulator::shared_address(shared) & 0x3ffff) >> 4 | 1u << 16; }

inline void stores_before_units() { emulator::proxy_fence(); }
inline void products_begin() { emulator::products_fence(); }
inline void products_commit(emulator::Site site = emulator::Site::here()) { emulator::commit_products(site); }
template <int GROUPS>
inline void products_wait(emulator::Site site = emulator::Site::here()) {
    emulator::touch_ended(emulator::wait_products(GROUPS, site), site);
}

namespace emulator {

inline void multiply_issued(const Product &product, Site site) {
    issue_product(product, site);
    touch_operands(product, site);
}

template <typename T>
constexpr Values VALUES = Values::f16;
template <>
inline constexpr Values VALUES<Bf16> = Values::bf16;

// Where an operand begins: the high word as common/wgmma.cuh has it.
inline u64 descriptor(u32 low) { return u64(0x40000040) << 32 | low; }

// a is in registers, or for null in shared memory.
template <typename D, int SUMS>
inline void multiply(Values values, bool add, D (&d)[SUMS], const u32 *a, u64 a_place, u32 b, Site site) {
    static_assert(sizeof(D) == sizeof(u32), "sums of 32 bits");
    multiply_issued({values, add, 2 * SUMS, reinterpret_cast<u32 *>(d), a, a_place, descriptor(b), false, false}, site);
}

}  // namespace emulator

template <typename T, int SUMS>
inline void multiply_fresh(T, float (&d)[SUMS], const u32 *a, u32 y, emulator::Site site = emulator::Site::here()) {
    emulator::multiply(emulator::VALUES<T>, false, d, a, 0, y, site);
}
template <typename T, int SUMS>
inline void multiply_add(T, float (&d)[SUMS], const u32 *a, u32 y, emulator::Site site = emulator::Site::here()) {
    emulator::multiply(emulator::VALUES<T>, true, d, a, 0, y, site);
}
template <int SUMS>
inline void multiply_fresh(int (&d)[SUMS], u32 x, u32 y, emulator::Site site = emulator::Site::here()) {
    emulator::multiply(emulator::Values::s8, false, d, nullptr, emulator::descriptor(x), y, site);
}
template <int SUMS>
inline void multiply_add(int (&d)[SUMS], u32 x, u32 y, emulator::Site site = emulator::Site::here()) {
    emulator::multiply(emulator::Values::s8, true, d, nullptr, emulator::descriptor(x), y, site);
}
