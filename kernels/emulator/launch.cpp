// A launch by name, checked as the driver would.
#include "launch.h"

#include <cstring>
#include <string>

#include "block.h"
#include "registry.h"

namespace {

std::string refuse(const HalfbyteLaunch &launch, const std::string &why) { return std::string(launch.kernel) + ": " + why; }

std::string checked(const HalfbyteLaunch &launch) {
    const emulator::Entry *entry = emulator::entries;
    while (entry->name != nullptr && std::strcmp(entry->name, launch.kernel) != 0) {
        entry++;
    }
    if (entry->name == nullptr) {
        return refuse(launch, "there is no such kernel");
    }
    const dim3 grid(launch.grid[0], launch.grid[1], launch.grid[2]);
    const dim3 block(launch.block[0], launch.block[1], launch.block[2]);
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > entry->threads || threads > emulator::MAX_THREADS) {
        return refuse(launch, std::to_string(threads) + " threads, where 1 to " + std::to_string(entry->threads) + " can be");
    }
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return refuse(launch, "a grid that no device takes");
    }
    if (launch.cluster == 0 || launch.cluster > emulator::MAX_CLUSTER || grid.x % launch.cluster != 0) {
        return refuse(launch, "a grid of " + std::to_string(grid.x) + " blocks in clusters of " +
                                  std::to_string(launch.cluster));
    }
    if (launch.first_block % launch.cluster != 0 || launch.blocks % launch.cluster != 0) {
        return refuse(launch, "a part of a cluster");
    }
    if (launch.first_block > blocks || launch.blocks > blocks - launch.first_block) {
        return refuse(launch, "blocks that the grid lacks");
    }
    if (launch.shared > 227 * 1024) {
        return refuse(launch, "more shared memory than any multiprocessor gives a block");
    }
    if (launch.count != entry->parameters) {
        return refuse(launch, std::to_string(launch.count) + " arguments for " + std::to_string(entry->parameters));
    }
    for (uint32_t i = 0; i < launch.count; i++) {
        if (launch.sizes[i] != entry->sizes[i]) {
            return refuse(launch, "argument " + std::to_string(i) + " has " + std::to_string(launch.sizes[i]) +
                                      " bytes, its parameter " + std::to_string(entry->sizes[i]));
        }
    }
    return emulator::run({entry->name, entry->call, launch.arguments, grid, block, launch.cluster, launch.shared,
                      launch.highest_first != 0, launch.highest_first == 1, launch.first_block, launch.blocks});
}

}  // namespace

const char *halfbyte_emulator_launch(const HalfbyteLaunch *launch) {
    static std::string &error = *new std::string;
    error = checked(*launch);
    return error.empty() ? nullptr : error.c_str();
}

const char *halfbyte_emulator_describe() {
    static std::string &text = *new std::string;
    text = std::string("fibers ") + emulator::fiber_kind() + "\n";
    for (const emulator::Entry *entry = emulator::entries; entry->name != nullptr; entry++) {
        text += std::string("kernel ") + entry->name + " " + std::to_string(entry->threads);
        for (size_t i = 0; i < entry->parameters; i++) {
            text += " " + std::to_string(entry->sizes[i]);
        }
        text += "\n";
    }
    for (const emulator::Constant *constant = emulator::constants; constant->name != nullptr; constant++) {
        text += std::string("constant ") + constant->name + " " + std::to_string(constant->value) + "\n";
    }
    return text.c_str();
}
