// Launches that are described in a file, for builds that a sanitizer wants to be whole programs.
//
//     program CASES OUTPUT
//
// CASES holds little-endian 64-bit integers and bytes: the number of cases, then of each the buffers (their number, and
// of each its length, how far its address is behind a multiple of 256, and its bytes; then of each the number of addresses in it,
// and of each address where in the buffer it is and of which buffer) and the launches (their number, and
// of each the length of the kernel's name, the name, grid, block, shared, first_block, blocks, cluster, highest_first
// and the number of arguments; of each argument its length, its bytes, the number of addresses in it, and of each address where
// in the argument it is and of which buffer). OUTPUT receives the bytes of every buffer. What is wrong goes to stderr,
// and ends the program with 1.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "fibers.h"
#include "launch.h"

namespace {

constexpr size_t ALIGNMENT = 256;

[[noreturn]] void stop(const char *what) {
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

struct Reader {
    std::FILE *file;

    void bytes(void *to, size_t count) {
        if (count > 0 && std::fread(to, 1, count, file) != count) {
            stop("the file of cases ends early");
        }
    }
    uint64_t number() {
        uint64_t value;
        bytes(&value, sizeof value);
        return value;
    }
    uint32_t small() { return uint32_t(number()); }
};

// As an allocator of exact size makes it: behind its end is nothing.
struct Buffer {
    unsigned char *memory;
    size_t shift, bytes;

    explicit Buffer(Reader &reader) : bytes(reader.number()) {
        shift = reader.number();
        void *made = nullptr;
        if (posix_memalign(&made, ALIGNMENT, shift + bytes) != 0) {
            stop("no memory for a buffer");
        }
        memory = static_cast<unsigned char *>(made);
        emulator::poison(memory, shift);
        reader.bytes(begin(), bytes);
    }
    unsigned char *begin() const { return memory + shift; }
};

// Writes addresses of buffers to where they belong.
void put_addresses(Reader &reader, const std::vector<Buffer> &buffers, unsigned char *to) {
    for (uint64_t left = reader.number(); left > 0; left--) {
        const uint64_t at = reader.number();
        const unsigned char *const address = buffers.at(reader.number()).begin();
        std::memcpy(to + at, &address, sizeof address);
    }
}

void launch(Reader &reader, const std::vector<Buffer> &buffers) {
    std::string name(reader.number(), '\0');
    reader.bytes(&name[0], name.size());
    HalfbyteLaunch launch = {};
    launch.kernel = name.c_str();
    for (uint32_t &extent : launch.grid) {
        extent = reader.small();
    }
    for (uint32_t &extent : launch.block) {
        extent = reader.small();
    }
    launch.shared = reader.number();
    launch.first_block = reader.number();
    launch.blocks = reader.number();
    launch.cluster = reader.small();
    launch.highest_first = reader.small();
    launch.count = reader.small();
    // Aligned as any argument needs.
    struct alignas(64) Line {
        unsigned char bytes[64];
    };
    std::vector<std::vector<Line>> values;
    std::vector<uint64_t> sizes;
    for (uint32_t i = 0; i < launch.count; i++) {
        sizes.push_back(reader.number());
        values.emplace_back(sizes.back() / sizeof(Line) + 1);
        unsigned char *const value = reinterpret_cast<unsigned char *>(values.back().data());
        reader.bytes(value, sizes.back());
        put_addresses(reader, buffers, value);
    }
    std::vector<void *> arguments;
    for (std::vector<Line> &value : values) {
        arguments.push_back(value.data());
    }
    launch.arguments = arguments.data();
    launch.sizes = sizes.data();
    const char *const error = halfbyte_emulator_launch(&launch);
    if (error != nullptr) {
        stop(error);
    }
}

}  // namespace

int main(int count, char **words) {
    if (count == 1) {
        std::fputs(halfbyte_emulator_describe(), stdout);
        return 0;
    }
    std::FILE *const output = count == 3 ? std::fopen(words[2], "wb") : nullptr;
    Reader reader = {count == 3 ? std::fopen(words[1], "rb") : nullptr};
    if (reader.file == nullptr || output == nullptr) {
        stop("usage: program CASES OUTPUT");
    }
    for (uint64_t cases = reader.number(); cases > 0; cases--) {
        std::vector<Buffer> buffers;
        for (uint64_t left = reader.number(); left > 0; left--) {
            buffers.emplace_back(reader);
        }
        for (const Buffer &buffer : buffers) {
            put_addresses(reader, buffers, buffer.begin());
        }
        for (uint64_t left = reader.number(); left > 0; left--) {
            launch(reader, buffers);
        }
        for (const Buffer &buffer : buffers) {
            std::fwrite(buffer.begin(), 1, buffer.bytes, output);
            emulator::unpoison(buffer.memory, buffer.shift);
            std::free(buffer.memory);
        }
    }
    if (std::fclose(output) != 0) {
        stop("the output could not be written");
    }
    return 0;
}
