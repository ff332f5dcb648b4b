// Ordinary stores to shared memory: which copies and matrix units may not read before they are fenced (fence.proxy.async).
//
// Known where EMULATOR_STORES is set: kernels are then compiled as for ThreadSanitizer, and the functions that it would call
// are here.
#include "block.h"

#ifndef EMULATOR_STORES
#define EMULATOR_STORES 0
#endif

#if !EMULATOR_STORES

namespace emulator {

void check_fenced(unsigned, uint32_t, Site, const char *) {}
void forget_stores(unsigned, uint32_t, size_t) {}
void note_store(unsigned, uint32_t, size_t) {}
void begin_stores() {}
void proxy_fence() {}

}  // namespace emulator

#else

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

namespace emulator {
namespace {

constexpr uint32_t WINDOW = 1 << 18;

struct Range {
    unsigned rank;
    uint32_t address, bytes;
};

// Of each rank, by address.
struct Known {
    uint16_t writer[WINDOW] = {};         // the place of the thread that has stored this byte and not fenced it, and 1
    const void *line[WINDOW / CHUNK] = {};  // where in the code the last such store is
};

std::vector<Known *> known;
std::vector<std::vector<Range>> stored;  // of each thread's place, since its last fence; empty before the first launch

Known &known_of(unsigned rank) {
    while (known.size() <= rank) {
        known.push_back(new Known);
    }
    return *known[rank];
}

// A place in the code as file and line, if there is a program that knows.
std::string line_of(const void *code) {
    Dl_info info;
    if (code == nullptr || dladdr(code, &info) == 0) {
        return "somewhere";
    }
    char command[512];
    // Of functions that were inlined the outermost is the kernel itself, and the first may be a wrapper.
    std::snprintf(command, sizeof command, "addr2line -i -e '%s' %#lx 2>/dev/null", info.dli_fname,
                  static_cast<unsigned long>(static_cast<const char *>(code) - static_cast<const char *>(info.dli_fbase)) - 1);
    std::FILE *const pipe = popen(command, "r");
    std::string found = "somewhere";
    char line[512];
    while (pipe != nullptr && std::fgets(line, sizeof line, pipe) != nullptr) {
        line[std::strcspn(line, " \n")] = '\0';
        const char *const slash = std::strrchr(line, '/');
        if (std::strstr(line, ".cu") != nullptr) {
            found = slash == nullptr ? line : slash + 1;
            break;
        }
    }
    if (pipe != nullptr) {
        pclose(pipe);
    }
    return found;
}

void note(unsigned rank, uint32_t address, size_t bytes, const void *code) {
    Known &here = known_of(rank);
    const unsigned place = current().place;
    for (size_t i = 0; i < bytes; i++) {
        here.writer[address + i] = uint16_t(place + 1);
        here.line[(address + i) / CHUNK] = code;
    }
    stored[place].push_back({rank, address, uint32_t(bytes)});
}


void access(const void *pointer, size_t bytes, bool store, const void *code) {
    unsigned rank;
    uint32_t address;
    if (stored.empty() || !find_shared(pointer, bytes, &rank, &address)) {
        return;
    }
    const Chunk &chunk = chunk_at(rank, address);
    if (chunk.coming > 0) {
        fail(transfer_at(rank, address), "memory that this copy is on its way to is %s at %s", store ? "written" : "read",
             line_of(code).c_str());
    }
    if (store) {
        if (chunk.reading > 0) {
            const Site product = product_at(rank, address);
            fail(product.file != nullptr ? product : transfer_at(rank, address),
                 "memory that is still read from here on is written at %s", line_of(code).c_str());
        }
        note(rank, address, bytes, code);
    }
}

}  // namespace

void check_fenced(unsigned rank, uint32_t address, Site site, const char *what) {
    const Known &here = known_of(rank);
    for (uint32_t i = 0; i < CHUNK; i++) {
        if (here.writer[address + i] != 0) {
            fail(site, "%s what thread %u of block %u has stored at %s, without a fence.proxy.async of that thread", what,
                 (here.writer[address + i] - 1u) % block_threads(), (here.writer[address + i] - 1u) / block_threads(),
                 line_of(here.line[address / CHUNK]).c_str());
        }
    }
}

void forget_stores(unsigned rank, uint32_t address, size_t bytes) {
    std::memset(known_of(rank).writer + address, 0, bytes * sizeof(uint16_t));
}

void begin_stores() {
    stored.resize(MAX_CLUSTER * MAX_THREADS);
    for (std::vector<Range> &ranges : stored) {
        ranges.clear();
    }
}

void note_store(unsigned rank, uint32_t address, size_t bytes) {
    note(rank, address, bytes, __builtin_return_address(0));
}

void proxy_fence() {
    const unsigned place = current().place;
    for (const Range &range : stored[place]) {
        uint16_t *const writer = known_of(range.rank).writer + range.address;
        for (uint32_t i = 0; i < range.bytes; i++) {
            writer[i] = writer[i] == place + 1 ? 0 : writer[i];
        }
    }
    stored[place].clear();
}

}  // namespace emulator

// What the compiler calls before each access.
#define EMULATOR_ACCESS(name, bytes, store)                                   \
    extern "C" void __tsan_##name(void *address) {                         \
        emulator::access(address, bytes, store, __builtin_return_address(0)); \
    }
EMULATOR_ACCESS(read1, 1, false)
EMULATOR_ACCESS(read2, 2, false)
EMULATOR_ACCESS(read4, 4, false)
EMULATOR_ACCESS(read8, 8, false)
EMULATOR_ACCESS(read16, 16, false)
EMULATOR_ACCESS(write1, 1, true)
EMULATOR_ACCESS(write2, 2, true)
EMULATOR_ACCESS(write4, 4, true)
EMULATOR_ACCESS(write8, 8, true)
EMULATOR_ACCESS(write16, 16, true)
EMULATOR_ACCESS(unaligned_read2, 2, false)
EMULATOR_ACCESS(unaligned_read4, 4, false)
EMULATOR_ACCESS(unaligned_read8, 8, false)
EMULATOR_ACCESS(unaligned_read16, 16, false)
EMULATOR_ACCESS(unaligned_write2, 2, true)
EMULATOR_ACCESS(unaligned_write4, 4, true)
EMULATOR_ACCESS(unaligned_write8, 8, true)
EMULATOR_ACCESS(unaligned_write16, 16, true)

// And in place of an atomic one: of words, as __atomic_load and __atomic_compare_exchange become.
extern "C" {
uint32_t __tsan_atomic32_load(const volatile uint32_t *address, int) {
    emulator::access(const_cast<uint32_t *>(address), 4, false, __builtin_return_address(0));
    return __atomic_load_n(address, __ATOMIC_RELAXED);
}
int __tsan_atomic32_compare_exchange_strong(volatile uint32_t *address, uint32_t *expected, uint32_t value, int, int) {
    emulator::access(const_cast<uint32_t *>(address), 4, true, __builtin_return_address(0));
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
int __tsan_atomic32_compare_exchange_weak(volatile uint32_t *address, uint32_t *expected, uint32_t value, int a, int b) {
    return __tsan_atomic32_compare_exchange_strong(address, expected, value, a, b);
}

void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void *) {}
void __tsan_read_range(void *address, unsigned long bytes) {
    for (unsigned long i = 0; i < bytes; i++) {
        emulator::access(static_cast<char *>(address) + i, 1, false, __builtin_return_address(0));
    }
}
void __tsan_write_range(void *address, unsigned long bytes) {
    for (unsigned long i = 0; i < bytes; i++) {
        emulator::access(static_cast<char *>(address) + i, 1, true, __builtin_return_address(0));
    }
}
}

#endif
