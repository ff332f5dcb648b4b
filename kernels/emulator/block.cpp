// Running blocks, one after another, or those of a cluster together: their threads by turns, each as far as it gets without
// the others.
//
// The thread that runs is always the first of those that can, in the order of the launch: the lowest, or the highest.
// One thread is thus as far ahead of another as the kernel allows; and what two threads do without a barrier between is
// done in one order by one launch, and in the other by the other.
#include "block.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned MAX_PLACES = MAX_CLUSTER * MAX_THREADS;

struct Engine {
    std::vector<std::unique_ptr<Thread>> threads;  // never fewer again, so that stacks are kept
    Fiber caller;
    const Run *run = nullptr;
    unsigned block = 0;           // threads of a block
    unsigned count = 0, ended = 0;  // threads of the cluster
    unsigned started = 0;  // threads whose fibers wait for the next block
    unsigned set = 0;  // of fibers, that runs this block
    Thread *running = nullptr;
    uint64_t ready[MAX_PLACES / 64] = {};
    bool failed = false;
    std::string error;

    // Nothing is allocated while threads run: the race detector would take it for theirs.
    std::unique_ptr<Block> blocks[2][MAX_CLUSTER];

    // The barrier of the cluster.
    unsigned arrived = 0;
    uint32_t cluster_turns = 0;

    // For the race detector, addresses to release and acquire: of the launch's begin and end, of __threadfence, and of the
    // barrier of the cluster as of others.
    char begin = 0, end = 0, fence = 0;
    char cluster[2][2] = {};

    void set_ready(Thread &thread) {
        thread.state = State::ready;
        ready[thread.place / 64] |= uint64_t(1) << (thread.place % 64);
    }
    void clear_ready(Thread &thread) { ready[thread.place / 64] &= ~(uint64_t(1) << (thread.place % 64)); }

    Fiber &fiber_of(Thread &thread) { return thread.fibers[set]; }

    Thread *next() {
        const unsigned words = (count + 63) / 64;
        for (unsigned i = 0; i < words; i++) {
            const unsigned word = run->highest_first ? words - 1 - i : i;
            if (ready[word] != 0) {
                const unsigned bit = run->highest_first ? 63 - unsigned(__builtin_clzll(ready[word]))
                                                        : unsigned(__builtin_ctzll(ready[word]));
                return threads[word * 64 + bit].get();
            }
        }
        return nullptr;
    }

    void become(Thread &thread) {
        running = &thread;
        const unsigned number = thread.number;
        threadIdx = {number % run->block.x, number / run->block.x % run->block.y,
                     number / (run->block.x * run->block.y)};
        blockIdx = blocks[set][thread.rank]->index;
    }
};

// Lives as long as the process: fibers that a failed launch left behind are never entered again.
Engine &engine = *new Engine;

// Numbers in ascending order, as "0-31, 64".
std::string ranges(const std::vector<unsigned> &numbers) {
    std::string text;
    for (size_t i = 0; i < numbers.size();) {
        size_t last = i;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) {
            last++;
        }
        text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
        if (last > i) {
            text += "-" + std::to_string(numbers[last]);
        }
        i = last + 1;
    }
    return text;
}

[[noreturn]] void leave(const std::string &what) {
    char head[256];
    std::snprintf(head, sizeof head, "%s, block (%u, %u, %u)", engine.run->name, blockIdx.x, blockIdx.y, blockIdx.z);
    engine.error = head + what;
    engine.failed = true;
    Thread &thread = *engine.running;
    race_release(&engine.end);
    Fiber::change(engine.fiber_of(thread), engine.caller);
    __builtin_unreachable();
}

// The barrier of the cluster is over when all have arrived that have not ended.
void finish_cluster_barrier() {
    if (engine.arrived == 0 || engine.arrived < engine.count - engine.ended) {
        return;
    }
    engine.arrived = 0;
    engine.cluster_turns++;
    for (unsigned place = 0; place < engine.count; place++) {
        Thread &thread = *engine.threads[place];
        if (thread.state == State::waiting && thread.meeting == Meeting::cluster) {
            engine.set_ready(thread);
        }
    }
}

// Meetings of lanes of one warp, where the others are those of more threads.
bool of_lanes(Meeting meeting) { return meeting != Meeting::barrier && meeting < Meeting::phase; }

// What each fiber does: the thread's part of one block, and again when it is started for another.
void thread_main() {
    Fiber::entered(engine.fiber_of(*engine.running));
    for (;;) {
        Thread &self = *engine.running;
        race_acquire(&engine.begin);
        engine.run->call(engine.run->arguments);
        check_copies(self);
        check_transfers(self);
        check_products(self);
        race_release(&engine.end);
        self.state = State::ended;
        engine.clear_ready(self);
        engine.ended++;
        current_block().ended++;
        finish_cluster_barrier();
        if (engine.ended == engine.count) {
            end_transfers();
            Fiber::change(engine.fiber_of(self), engine.caller);
        } else {
            yield();
        }
    }
}

void begin_block(Block &block) {
    block.ended = 0;
    block.phases_made = 0;
    std::memset(block.named, 0, sizeof block.named);
    std::memset(block.groups, 0, sizeof block.groups);
    // What a compiler may give each thread when the block is alone: setmaxnreg divides that anew.
    const uint32_t each = REGISTERS / engine.block / 8 * 8;
    const unsigned warps = (engine.block + LANES - 1) / LANES;
    block.free_registers = 0;
    for (unsigned warp = 0; warp < warps; warp++) {
        block.registers[warp] = each < 255 ? each : 255;
    }
}

// The blocks of a cluster, of which the first is number `first` of the grid.
void run_blocks(uint64_t first) {
    const dim3 &grid = engine.run->grid;
    engine.ended = engine.arrived = 0;
    engine.cluster_turns = 0;
    for (unsigned rank = 0; rank < engine.run->cluster; rank++) {
        Block &block = *engine.blocks[engine.set][rank];
        const uint64_t index = first + rank;
        block.index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
        block.rank = rank;
        begin_block(block);
    }
    shared_begin_blocks();
    begin_transfers();
    begin_stores();
    begin_products();
    race_release(&engine.begin);
    for (unsigned place = 0; place < engine.count; place++) {
        Thread &thread = *engine.threads[place];
        thread.restart(place / engine.block, place % engine.block);
        engine.set_ready(thread);
    }
    Thread *const start = engine.next();
    engine.become(*start);
    Fiber::change(engine.caller, engine.fiber_of(*start));
}

}  // namespace

void Thread::restart(unsigned new_rank, unsigned new_number) {
    rank = new_rank;
    number = new_number;
    copies.clear();
    group = store_group = product_group = 0;
    cluster_arrivals = cluster_waits = 0;
    products.clear();
    ended_products.clear();
    held.clear();
    seen.clear();
    fences = fences_at_return = 0;
}

Thread &current() { return *engine.running; }
Block &current_block() { return *engine.blocks[engine.set][engine.running->rank]; }
Thread &thread_of(unsigned number) { return *engine.threads[engine.running->rank * engine.block + number]; }
Thread &thread_at(unsigned place) { return *engine.threads[place]; }
Block &block_of(unsigned rank) { return *engine.blocks[engine.set][rank]; }
unsigned block_threads() { return engine.block; }
const Run &current_run() { return *engine.run; }
void set_ready(Thread &thread) { engine.set_ready(thread); }

std::string place(Site site) {
    if (site.file == nullptr) {
        return "another place";
    }
    const char *slash = std::strrchr(site.file, '/');
    return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

std::string standstill() {
    std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
    for (unsigned number = 0; number < engine.count; number++) {
        const Thread &thread = *engine.threads[number];
        std::string what = "ended";
        if (thread.state == State::waiting) {
            const std::string more = thread.meeting == Meeting::phase ? missing(thread) : "";
            what = "at " + place(thread.site) + " (" + name_of(thread.meeting) + more + ")";
        }
        if (engine.run->cluster > 1) {
            what = "rank " + std::to_string(thread.rank) + " " + what;
        }
        size_t at = 0;
        while (at < groups.size() && groups[at].first != what) {
            at++;
        }
        if (at == groups.size()) {
            groups.push_back({what, {}});
        }
        groups[at].second.push_back(thread.number);
    }
    std::string text;
    for (const auto &[what, numbers] : groups) {
        text += (text.empty() ? "" : "; ") + what + ": " + (numbers.size() == 1 ? "thread " : "threads ") + ranges(numbers);
    }
    return text;
}

void fail_at(Site site, const std::string &what) {
    char who[64];
    std::snprintf(who, sizeof who, ", thread (%u, %u, %u): ", threadIdx.x, threadIdx.y, threadIdx.z);
    leave(who + place(site) + ": " + what);
}

void fail_outside(Site site, const std::string &what) { leave(": " + place(site) + ": " + what); }

void fail(Site site, const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fail_at(site, text);
    __builtin_unreachable();
}

void begin_waiting(Meeting meeting, Site site) {
    Thread &self = *engine.running;
    self.state = State::waiting;
    self.meeting = meeting;
    self.site = site;
    engine.clear_ready(self);
}

// Goes on with the next thread; comes back when it is this one's turn again.
void yield() {
    Thread &self = *engine.running;
    Thread *next = engine.next();
    while (next == nullptr) {
        if (!make_one_transfer()) {
            leave(": no thread can go on: " + standstill());
        }
        next = engine.next();
    }
    if (next != &self) {
        engine.become(*next);
        Fiber::change(engine.fiber_of(self), engine.fiber_of(*next));
    }
}

std::string run(const Run &run) {
    engine.run = &run;
    engine.error.clear();
    engine.failed = false;
    engine.block = run.block.x * run.block.y * run.block.z;
    engine.count = engine.block * run.cluster;
    while (engine.threads.size() < engine.count) {
        engine.threads.push_back(std::make_unique<Thread>());
        engine.threads.back()->place = unsigned(engine.threads.size()) - 1;
    }
    for (auto &blocks : engine.blocks) {
        for (unsigned rank = 0; rank < run.cluster; rank++) {
            if (blocks[rank] == nullptr) {
                blocks[rank] = std::make_unique<Block>();
            }
        }
    }
    for (; engine.started < engine.count; engine.started++) {
        engine.threads[engine.started]->fibers[0].start(thread_main);
        if (race_detector()) {
            engine.threads[engine.started]->fibers[1].start(thread_main);
        }
    }
    std::memset(engine.ready, 0, sizeof engine.ready);
    blockDim = run.block;
    gridDim = run.grid;
    shared_begin_launch(run.shared, run.cluster);
    for (uint64_t i = 0; i < run.blocks && !engine.failed; i += run.cluster) {
        const uint64_t index = run.first_block + (run.highest_block_first ? run.blocks - run.cluster - i : i);
        engine.set = race_detector() ? unsigned(index / run.cluster % 2) : 0;
        run_blocks(index);
    }
    if (engine.failed) {
        engine.started = 0;  // they are in the middle of something
    }
    race_acquire(&engine.end);
    // Threads that a failed launch left behind have handed nothing over: to the race detector they may still use it.
    if (!engine.failed || !race_detector()) {
        shared_end_launch();
    }
    return engine.error;
}

int barrier(bool predicate, Site site) {
    Gathering &all = current_block().named[0];
    const unsigned turn = all.turns % 2;
    race_release(&all.ends[turn]);
    begin_waiting(Meeting::barrier, site);
    all.true_predicates += predicate;
    if (++all.arrived == engine.block) {
        for (unsigned number = 0; number < engine.block; number++) {
            const Site other = thread_of(number).site;
            if (other.line != site.line || std::strcmp(other.file, site.file) != 0) {
                fail_at(site, "one barrier, reached in different places: " + standstill());
            }
        }
        for (unsigned number = 0; number < engine.block; number++) {
            engine.set_ready(thread_of(number));
        }
        all.result = all.true_predicates;
        all.arrived = 0;
        all.true_predicates = 0;
        all.turns++;
    }
    yield();
    race_acquire(&all.ends[turn]);
    // Not overwritten before every thread has left this barrier and come to the next.
    return all.result;
}

void fence() {
    race_acquire(&engine.fence);
    race_release(&engine.fence);
}

unsigned cluster_rank() { return engine.running->rank; }

void cluster_arrive(Site site) {
    Thread &self = *engine.running;
    if (self.cluster_arrivals != self.cluster_waits) {
        fail(site, "a second arrival at the cluster's barrier, before the wait for the first");
    }
    race_release(&engine.cluster[engine.set][self.cluster_arrivals % 2]);
    self.cluster_arrivals++;
    engine.arrived++;
    finish_cluster_barrier();
}

void cluster_wait(Site site) {
    Thread &self = *engine.running;
    if (self.cluster_arrivals == self.cluster_waits) {
        fail(site, "a wait at the cluster's barrier without an arrival");
    }
    if (engine.cluster_turns < self.cluster_arrivals) {
        begin_waiting(Meeting::cluster, site);
        yield();
    }
    race_acquire(&engine.cluster[engine.set][self.cluster_waits % 2]);
    self.cluster_waits++;
}

void meet(Meeting meeting, uint32_t mask, Slot &slot, int first, int second, Site site) {
    Thread &self = *engine.running;
    Block &block = current_block();
    const unsigned lane = self.number % LANES, warp = self.number - lane;
    const unsigned lanes = engine.block - warp < LANES ? engine.block - warp : LANES;
    if ((mask >> lane & 1) == 0) {
        fail_at(site, std::string(name_of(meeting)) + " by a lane that its mask leaves out");
    }
    if (lanes < LANES && mask >> lanes != 0) {
        fail_at(site, std::string(name_of(meeting)) + " waits for lanes that the warp lacks: it has " + std::to_string(lanes));
    }
    begin_waiting(meeting, site);
    self.mask = mask;
    self.slot = slot;
    self.first = first;
    self.second = second;

    // Only __syncwarp orders memory; shuffles and the like do not.
    const unsigned group = warp + unsigned(__builtin_ctz(mask));
    char *const address = &block.warps[group][block.warp_meetings[group] % 2];
    if (meeting == Meeting::syncwarp) {
        race_release(address);
    }
    bool complete = true;
    for (uint32_t left = mask; left != 0; left &= left - 1) {
        const Thread &other = thread_of(warp + unsigned(__builtin_ctz(left)));
        if (other.state != State::waiting || !of_lanes(other.meeting)) {
            complete = false;
        } else if (other.meeting != meeting || other.mask != mask || other.site.line != site.line ||
                   std::strcmp(other.site.file, site.file) != 0) {
            char masks[64];
            std::snprintf(masks, sizeof masks, " (masks %08x and %08x)", mask, other.mask);
            fail_at(site, std::string("lane ") + std::to_string(lane) + " is at " + name_of(meeting) + " while lane " +
                              std::to_string(other.number - warp) + " is at " + name_of(other.meeting) + ", " +
                              place(other.site) + masks);
        }
    }
    if (complete) {
        compute(meeting, &self, mask);
        if (meeting == Meeting::syncwarp) {
            block.warp_meetings[group]++;
        }
        for (uint32_t left = mask; left != 0; left &= left - 1) {
            engine.set_ready(thread_of(warp + unsigned(__builtin_ctz(left))));
        }
    }
    yield();
    slot = self.slot;
    if (meeting == Meeting::syncwarp) {
        race_acquire(address);
    }
}

}  // namespace emulator
