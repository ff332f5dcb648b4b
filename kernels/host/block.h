// The block that is running, for the parts of the engine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine.h"
#include "fibers.h"
#include "index.h"

namespace host {

constexpr unsigned LANES = 32;
constexpr unsigned MAX_THREADS = 1024;

enum class State { ready, waiting, ended };

struct Thread {
    // To the race detector, threads of successive blocks are different ones, as nothing orders them: they have stacks of
    // their own and take turns. Else the first serves all blocks.
    Fiber fibers[2];
    unsigned number = 0;
    State state = State::ended;
    // What it waits for.
    Meeting meeting = Meeting::barrier;
    uint32_t mask = 0;              // of lanes, or the parity of a phase
    const void *phases = nullptr;  // the barrier in shared memory
    int first = 0, second = 0;
    Slot slot = {};
    Site site = {};
    // Copies on the way, oldest first, and the group of the next.
    std::vector<Copy> copies;
    uint32_t group = 0;
};

// What a kernel is to the engine, and how it is run.
struct Run {
    const char *name;
    void (*call)(void *const *arguments);
    void *const *arguments;
    dim3 grid, block;
    size_t shared;
    bool highest_first;           // threads and blocks; copies are then made at once
    uint64_t first_block, blocks;  // those of the grid that are run
};

// Runs it; gives what went wrong, or nothing.
std::string run(const Run &run);

// The thread that is running.
Thread &current();
// That of the running block with this number, which exists.
Thread &thread_of(unsigned number);
const Run &current_run();

// collectives.cpp: what the lanes of `mask` of the warp that begins with `warp` take away.
void compute(Meeting meeting, Thread *warp, uint32_t mask);
const char *name_of(Meeting meeting);

// memory.cpp: before the first block, before each block, after the last.
void shared_begin_launch(size_t dynamic_bytes);
void shared_begin_block();
void shared_end_launch();
// When a thread ends: copies that nobody waited for are a mistake.
void check_copies(Thread &thread);

}  // namespace host
