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
inline void fetch_box(const TensorMap *map, int, int, emulator::Site site = emulator::Site::here()) {
    emulator::check_box(map, 2, site);
}
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

// ---- matrices of 8 by 8, transposed --------------------------------------------------------------------------------

inline void store_transposed(void *shared, u32 a, u32 b, u32 c, u32 d, emulator::Site site = emulator::Site::here()) {
    const u32 words[4] = {a, b, c, d};
    emulator::store_matrices<4, true>(shared, words, site);
}

// ---- products ------------------------------------------------------------------------------------------------------

inline u32 operand(const void *shared) { return (emulator::shared_address(shared) & 0x3ffff) >> 4 | 1u << 16; }

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
constexpr bool IS_BF16 = false;
template <>
inline constexpr bool IS_BF16<Bf16> = true;

}  // namespace emulator

// The high word of where b begins, as common/wgmma.cuh has it.
template <typename T, int SUMS>
inline void multiply_fresh(T, float (&d)[SUMS], const u32 *a, u32 y, emulator::Site site = emulator::Site::here()) {
    emulator::multiply_issued({emulator::IS_BF16<T>, false, 2 * SUMS, d, a, 0, u64(0x40000040) << 32 | y, false, false}, site);
}
template <typename T, int SUMS>
inline void multiply_add(T, float (&d)[SUMS], const u32 *a, u32 y, emulator::Site site = emulator::Site::here()) {
    emulator::multiply_issued({emulator::IS_BF16<T>, true, 2 * SUMS, d, a, 0, u64(0x40000040) << 32 | y, false, false}, site);
}
