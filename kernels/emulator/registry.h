// The kernels of a source, by name, as build_emulator.py lists them.
#pragma once

#include <cstddef>
#include <utility>

namespace emulator {

struct Entry {
    const char *name;
    void (*call)(void *const *arguments);  // one address for each parameter
    size_t parameters;
    const size_t *sizes;
    unsigned threads;  // at most, by its launch bounds
};

struct Constant {
    const char *name;
    long long value;
};

// What build_emulator.py defines for a source; a null name ends each.
extern const Entry entries[];
extern const Constant constants[];

template <auto KERNEL>
struct Unpack;

template <typename... P, void (*KERNEL)(P...)>
struct Unpack<KERNEL> {
    static constexpr size_t sizes[] = {sizeof(P)..., 0};

    template <size_t... I>
    static void call_with(void *const *arguments, std::index_sequence<I...>) {
        KERNEL(*static_cast<P *>(arguments[I])...);
    }
    static void call(void *const *arguments) { call_with(arguments, std::index_sequence_for<P...>{}); }

    static constexpr Entry entry(const char *name, unsigned threads) {
        return {name, call, sizeof...(P), sizes, threads};
    }
};

}  // namespace emulator
