// The block that is running, for the parts of the engine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine.h"
#include "fibers.h"
#include "index.h"

namespace emulator {

constexpr unsigned LANES = 32;
constexpr unsigned GROUP = 128;  // threads of a warpgroup
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_CLUSTER = 8;
constexpr unsigned MAX_PHASES = 1024;
constexpr unsigned NAMED = 16;
constexpr uint32_t REGISTERS = 65536;  // of a multiprocessor

enum class State { ready, waiting, ended };

// A wgmma that a thread has issued, and what its registers of a were.
struct Issued {
    Product product;
    uint32_t a[4];
    unsigned slot;  // of the warpgroup's sums
    uint32_t group;
    Site site;
};

// Registers d while the matrix units have them.
struct Held {
    uint32_t *d;
    int columns;
    unsigned slot, pending;
};

// Registers a when they were last read.
struct Seen {
    const uint32_t *a;
    uint32_t value[4];
    uint64_t fences;
};

struct Thread {
    // To the race detector, threads of successive blocks are different ones, as nothing orders them: they have stacks of
    // their own and take turns. Else the first serves all blocks.
    Fiber fibers[2];
    unsigned place = 0;   // among the threads of the cluster
    unsigned rank = 0;    // of its block
    unsigned number = 0;  // in its block
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
    // The same of copies to global memory by the copy engine.
    uint32_t store_group = 0;
    // Barriers of the cluster that it has arrived at, and waited for.
    uint32_t cluster_arrivals = 0, cluster_waits = 0;
    // Products on the way, oldest first, and those that the last wait has ended.
    std::vector<Issued> products;
    std::vector<Product> ended_products;
    std::vector<Held> held;
    std::vector<Seen> seen;
    uint64_t fences = 0, fences_at_return = 0;  // wgmma.fence, and so many when sums came back last
    uint32_t product_group = 0;

    void restart(unsigned new_rank, unsigned new_number);
};

// A barrier in shared memory.
struct Phases {
    const void *address;
    uint32_t arrivals, missing;
    int64_t bytes;   // expected and not there yet; less than none when they came first
    uint32_t over;   // phases that have ended
    unsigned maker;  // a thread's place
    bool known;
    Site expected;   // where bytes were last
    char ends[2];    // for the race detector: of even and odd phases
};

// Threads that wait for each other. For the race detector two addresses to release and acquire, used in turn: else a thread
// that is late at one would also acquire what others did on their way to the next.
struct Gathering {
    unsigned arrived, wanted, turns;
    int true_predicates, result;
    Meeting meeting;
    Site site;
    char ends[2];
};

// A block that runs. There are two for each rank, used in turn as fibers are.
struct Block {
    uint3 index = {};
    unsigned rank = 0;
    unsigned ended = 0;
    Gathering named[NAMED] = {};  // the first is __syncthreads
    Gathering groups[MAX_THREADS / GROUP] = {};
    Phases phases[MAX_PHASES] = {};
    unsigned phases_made = 0;
    uint32_t free_registers = 0;
    uint32_t registers[MAX_THREADS / LANES] = {};
    char warps[MAX_THREADS][2] = {};
    unsigned warp_meetings[MAX_THREADS] = {};
};

// What a kernel is to the engine, and how it is run.
struct Run {
    const char *name;
    void (*call)(void *const *arguments);
    void *const *arguments;
    dim3 grid, block;
    unsigned cluster;  // blocks of one, along x
    size_t shared;
    bool highest_first;           // threads; copies are then made at once
    bool highest_block_first;
    uint64_t first_block, blocks;  // those of the grid that are run
};

// Runs it; gives what went wrong, or nothing.
std::string run(const Run &run);

// The thread that is running, and its block.
Thread &current();
Block &current_block();
// That of the running block with this number, which exists; and the block of the cluster with this rank.
Thread &thread_of(unsigned number);
Block &block_of(unsigned rank);
unsigned block_threads();
const Run &current_run();

// To wait: first for what, then until another thread has made this one ready.
void begin_waiting(Meeting meeting, Site site);
void set_ready(Thread &thread);
void yield();
Thread &thread_at(unsigned place);
// Makes those of a block ready that wait, and fulfil a condition.
template <typename Condition>
inline void wake(unsigned rank, Condition condition) {
    for (unsigned number = 0; number < block_threads(); number++) {
        Thread &thread = thread_at(rank * block_threads() + number);
        if (thread.state == State::waiting && condition(thread)) {
            set_ready(thread);
        }
    }
}

// As `fail`; the second when it is not the doing of the thread that runs.
[[noreturn]] void fail_at(Site site, const std::string &what);
[[noreturn]] void fail_outside(Site site, const std::string &what);
std::string place(Site site);
// "at FILE:LINE (WHAT): threads 0-31; ..."
std::string standstill();

// phases.cpp: a copy has brought bytes to the barrier of a block.
void receive(unsigned rank, const void *barrier, uint32_t bytes, Site site);
// Before that: that copies may use it; and, for the race detector, that the copy is behind what its thread has done.
void check_known(unsigned rank, const void *barrier, Site site);
void announce_to(unsigned rank, const void *barrier);
std::string missing(const Thread &thread);
void begin_phases(Block &block);

// tiles.cpp: makes one copy that is on the way; false when there is none.
bool make_one_transfer();
void begin_transfers();
void check_transfers(const Thread &thread);
void end_transfers();
// A copy on its way to, or still reading, these bytes: where it was issued.
Site transfer_at(unsigned rank, uint32_t address);

// warpgroup.cpp
void begin_products();
void check_products(const Thread &thread);
Site product_at(unsigned rank, uint32_t address);

// collectives.cpp: what the lanes of `mask` of the warp that begins with `warp` take away.
void compute(Meeting meeting, Thread *warp, uint32_t mask);
const char *name_of(Meeting meeting);

// memory.cpp: before the first block, before those of each cluster, after the last.
void shared_begin_launch(size_t dynamic_bytes, unsigned blocks);
void shared_begin_blocks();
void shared_end_launch();

// What is at an address of a block's shared memory, or null when not all of these bytes are there.
unsigned char *shared_at(unsigned rank, uint32_t address, size_t bytes);

// The place of memory of the running thread's block; false when it is not in shared memory.
bool find_shared(const void *pointer, size_t bytes, unsigned *rank, uint32_t *address);

// What others than threads do with 16 bytes of shared memory.
constexpr uint32_t CHUNK = 16;
struct Chunk {
    uint16_t coming;   // copies on the way to them
    uint16_t reading;  // copies and products that read them
};
Chunk &chunk_at(unsigned rank, uint32_t address);
// stores.cpp, where a build knows of ordinary stores: fails if one to these 16 bytes is not fenced from copies and matrix
// units; and forgets what is known of some bytes, or notes that the running thread stores there.
void check_fenced(unsigned rank, uint32_t address, Site site, const char *what);
void forget_stores(unsigned rank, uint32_t address, size_t bytes);
void note_store(unsigned rank, uint32_t address, size_t bytes);
void begin_stores();

// When a thread ends: copies that nobody waited for are a mistake.
void check_copies(Thread &thread);

}  // namespace emulator
