// Threads together: barriers, shuffles, votes, atomics, under CUDA's names. Each knows the line that it is called from.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine.h"

namespace emulator {

template <typename T>
inline T shuffle(Meeting meeting, unsigned mask, T value, int by, int width, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    static_assert(std::is_arithmetic<T>::value, "shuffles move numbers");
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        fail(site, "a shuffle of width %d, which is no power of two from 1 to 32", width);
    }
    Slot slot = {};
    std::memcpy(slot.word, &value, sizeof value);
    meet(meeting, mask, slot, by, width, site);
    std::memcpy(&value, slot.word, sizeof value);
    return value;
}

inline unsigned word_of_lanes(Meeting meeting, unsigned mask, unsigned value, Site site) {
    Slot slot = {};
    slot.word[0] = value;
    meet(meeting, mask, slot, 0, 0, site);
    return slot.word[0];
}

inline void check_aligned(const void *address, uintptr_t bytes, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        fail(site, "the address %p is not a multiple of %d", address, int(bytes));
    }
}

}  // namespace emulator

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::barrier(false, site); }
inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::barrier(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::barrier(predicate == 0, site) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
    emulator::Slot slot = {};
    emulator::meet(emulator::Meeting::syncwarp, mask, slot, 0, 0, site);
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, emulator::Site site = emulator::Site::here()) {
    return emulator::shuffle(emulator::Meeting::shuffle, mask, value, lane, width, site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, emulator::Site site = emulator::Site::here()) {
    return emulator::shuffle(emulator::Meeting::shuffle_up, mask, value, int(by), width, site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, emulator::Site site = emulator::Site::here()) {
    return emulator::shuffle(emulator::Meeting::shuffle_down, mask, value, int(by), width, site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, emulator::Site site = emulator::Site::here()) {
    return emulator::shuffle(emulator::Meeting::shuffle_xor, mask, value, by, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::word_of_lanes(emulator::Meeting::ballot, mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
    return __ballot_sync(mask, predicate == 0, site) == 0;
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {
    emulator::Slot slot = {};
    std::memcpy(slot.word, &value, sizeof value);
    emulator::meet(emulator::Meeting::match_any, mask, slot, 0, 0, site);
    return slot.word[0];
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
    return emulator::word_of_lanes(emulator::Meeting::reduce_add, mask, value, site);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
    return emulator::word_of_lanes(emulator::Meeting::reduce_min, mask, value, site);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
    return emulator::word_of_lanes(emulator::Meeting::reduce_max, mask, value, site);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
    return emulator::word_of_lanes(emulator::Meeting::reduce_and, mask, value, site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
    return emulator::word_of_lanes(emulator::Meeting::reduce_or, mask, value, site);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
    return emulator::word_of_lanes(emulator::Meeting::reduce_xor, mask, value, site);
}

// Atomics order nothing: that is what fences are for. They are atomic to the race detector.
template <typename T>
inline T atomicExch(T *address, T value, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(address, sizeof(T), site);
    T before;
    __atomic_exchange(address, &value, &before, __ATOMIC_RELAXED);
    return before;
}
template <typename T>
inline T atomicCAS(T *address, T expected, T value, emulator::Site site = emulator::Site::here()) {
    emulator::check_aligned(address, sizeof(T), site);
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

namespace emulator {
template <typename T, typename Change>
inline T atomic(T *address, Site site, Change change) {
    check_aligned(address, sizeof(T), site);
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    do {
        after = change(before);
    } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}
}  // namespace emulator

template <typename T>
inline T atomicAdd(T *address, T value, emulator::Site site = emulator::Site::here()) {
    return emulator::atomic(address, site, [=](T before) { return before + value; });
}
template <typename T>
inline T atomicMax(T *address, T value, emulator::Site site = emulator::Site::here()) {
    return emulator::atomic(address, site, [=](T before) { return before > value ? before : value; });
}
template <typename T>
inline T atomicMin(T *address, T value, emulator::Site site = emulator::Site::here()) {
    return emulator::atomic(address, site, [=](T before) { return before < value ? before : value; });
}
template <typename T>
inline T atomicOr(T *address, T value, emulator::Site site = emulator::Site::here()) {
    return emulator::atomic(address, site, [=](T before) { return before | value; });
}
template <typename T>
inline T atomicAnd(T *address, T value, emulator::Site site = emulator::Site::here()) {
    return emulator::atomic(address, site, [=](T before) { return before & value; });
}
// To 0 from `limit` on, else one more.
inline unsigned atomicInc(unsigned *address, unsigned limit, emulator::Site site = emulator::Site::here()) {
    return emulator::atomic(address, site, [=](unsigned before) { return before >= limit ? 0 : before + 1; });
}

inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }
