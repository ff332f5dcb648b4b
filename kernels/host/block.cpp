// Running blocks, one after another: their threads by turns, each as far as it gets without the others.
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

namespace host {
namespace {

// A barrier in shared memory.
struct Phases {
    const void *address;
    uint32_t arrivals, missing;
    uint32_t over;  // phases that have ended
    char ends[2];   // for the race detector: of even and odd phases
};
constexpr unsigned MAX_PHASES = 1024;

struct Engine {
    std::vector<std::unique_ptr<Thread>> threads;  // never fewer again, so that stacks are kept
    Fiber caller;
    const Run *run = nullptr;
    unsigned count = 0, ended = 0;
    unsigned started = 0;  // threads whose fibers wait for the next block
    unsigned set = 0;  // of fibers, that runs this block
    Thread *running = nullptr;
    uint64_t ready[MAX_THREADS / 64] = {};
    bool failed = false;
    std::string error;

    // The barrier of the block.
    unsigned arrived = 0;
    int true_predicates = 0, result = 0;
    unsigned barriers = 0;

    // Those in shared memory, of the running block, for each set of fibers as below. Nothing is allocated while threads run:
    // the race detector would take it for theirs.
    Phases phases[2][MAX_PHASES] = {};
    unsigned phases_made = 0;

    // For the race detector, addresses to release and acquire: of the launch's begin and end, of __threadfence; of
    // barriers and of meetings of lanes, for each set of fibers, two each, used in turn: else a thread that is late at one
    // would also acquire what others did on their way to the next.
    char begin = 0, end = 0, fence = 0;
    char barrier[2][2] = {};
    char warps[2][MAX_THREADS][2] = {};
    unsigned warp_meetings[MAX_THREADS] = {};

    void set_ready(Thread &thread) {
        thread.state = State::ready;
        ready[thread.number / 64] |= uint64_t(1) << (thread.number % 64);
    }
    void clear_ready(Thread &thread) { ready[thread.number / 64] &= ~(uint64_t(1) << (thread.number % 64)); }

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
    }
};

// Lives as long as the process: fibers that a failed launch left behind are never entered again.
Engine &engine = *new Engine;

std::string place(Site site) {
    const char *slash = std::strrchr(site.file, '/');
    return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

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

// Where the threads are that do not run.
std::string standstill() {
    std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
    for (unsigned number = 0; number < engine.count; number++) {
        const Thread &thread = *engine.threads[number];
        std::string what = "ended";
        if (thread.state == State::waiting) {
            what = "at " + place(thread.site) + " (" + name_of(thread.meeting) + ")";
        }
        size_t at = 0;
        while (at < groups.size() && groups[at].first != what) {
            at++;
        }
        if (at == groups.size()) {
            groups.push_back({what, {}});
        }
        groups[at].second.push_back(number);
    }
    std::string text;
    for (const auto &[what, numbers] : groups) {
        text += (text.empty() ? "" : "; ") + what + ": " + (numbers.size() == 1 ? "thread " : "threads ") + ranges(numbers);
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

void fail_at(Site site, const std::string &what) {
    char who[64];
    std::snprintf(who, sizeof who, ", thread (%u, %u, %u): ", threadIdx.x, threadIdx.y, threadIdx.z);
    leave(who + place(site) + ": " + what);
}

// Goes on with the next thread; comes back when it is this one's turn again.
void yield() {
    Thread &self = *engine.running;
    Thread *const next = engine.next();
    if (next == nullptr) {
        leave(": no thread can go on: " + standstill());
    }
    if (next != &self) {
        engine.become(*next);
        Fiber::change(engine.fiber_of(self), engine.fiber_of(*next));
    }
}

Phases *find_phases(const void *address) {
    for (unsigned i = 0; i < engine.phases_made; i++) {
        if (engine.phases[engine.set][i].address == address) {
            return &engine.phases[engine.set][i];
        }
    }
    return nullptr;
}

Phases &phases_at(const void *address, Site site) {
    Phases *const phases = find_phases(address);
    if (phases == nullptr) {
        fail_at(site, "no barrier was made at this address");
    }
    return *phases;
}

// What each fiber does: the thread's part of one block, and again when it is started for another.
void thread_main() {
    Fiber::entered(engine.fiber_of(*engine.running));
    for (;;) {
        Thread &self = *engine.running;
        race_acquire(&engine.begin);
        engine.run->call(engine.run->arguments);
        check_copies(self);
        race_release(&engine.end);
        self.state = State::ended;
        engine.clear_ready(self);
        engine.ended++;
        if (engine.ended == engine.count) {
            Fiber::change(engine.fiber_of(self), engine.caller);
        } else {
            yield();
        }
    }
}

void run_block() {
    engine.ended = engine.arrived = 0;
    engine.phases_made = 0;
    engine.true_predicates = 0;
    shared_begin_block();
    race_release(&engine.begin);
    for (unsigned number = 0; number < engine.count; number++) {
        Thread &thread = *engine.threads[number];
        thread.copies.clear();
        thread.group = 0;
        engine.set_ready(thread);
    }
    Thread *const first = engine.next();
    engine.become(*first);
    Fiber::change(engine.caller, engine.fiber_of(*first));
}

}  // namespace

Thread &current() { return *engine.running; }
Thread &thread_of(unsigned number) { return *engine.threads[number]; }
const Run &current_run() { return *engine.run; }

void fail(Site site, const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fail_at(site, text);
    __builtin_unreachable();
}

std::string run(const Run &run) {
    engine.run = &run;
    engine.error.clear();
    engine.failed = false;
    engine.count = run.block.x * run.block.y * run.block.z;
    while (engine.threads.size() < engine.count) {
        engine.threads.push_back(std::make_unique<Thread>());
        engine.threads.back()->number = unsigned(engine.threads.size()) - 1;
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
    shared_begin_launch(run.shared);
    for (uint64_t i = 0; i < run.blocks && !engine.failed; i++) {
        const uint64_t index = run.first_block + (run.highest_first ? run.blocks - 1 - i : i);
        engine.set = race_detector() ? unsigned(index % 2) : 0;
        blockIdx = {unsigned(index % run.grid.x), unsigned(index / run.grid.x % run.grid.y),
                    unsigned(index / run.grid.x / run.grid.y)};
        run_block();
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
    Thread &self = *engine.running;
    const unsigned turn = engine.barriers % 2;
    race_release(&engine.barrier[engine.set][turn]);
    self.state = State::waiting;
    self.meeting = Meeting::barrier;
    self.site = site;
    engine.clear_ready(self);
    engine.true_predicates += predicate;
    if (++engine.arrived == engine.count) {
        for (unsigned number = 0; number < engine.count; number++) {
            const Site other = engine.threads[number]->site;
            if (other.line != site.line || std::strcmp(other.file, site.file) != 0) {
                fail_at(site, "one barrier, reached in different places: " + standstill());
            }
        }
        for (unsigned number = 0; number < engine.count; number++) {
            engine.set_ready(*engine.threads[number]);
        }
        engine.result = engine.true_predicates;
        engine.arrived = 0;
        engine.true_predicates = 0;
        engine.barriers++;
    }
    yield();
    race_acquire(&engine.barrier[engine.set][turn]);
    // Not overwritten before every thread has left this barrier and come to the next.
    return engine.result;
}

void make_phases(void *address, uint32_t arrivals, Site site) {
    if (arrivals == 0) {
        fail_at(site, "a barrier for no arrivals");
    }
    if (find_phases(address) != nullptr) {
        fail_at(site, "a barrier where there is one");
    }
    if (engine.phases_made == MAX_PHASES) {
        fail_at(site, "more barriers than there is room for");
    }
    engine.phases[engine.set][engine.phases_made++] = {address, arrivals, arrivals, 0, {}};
}

void arrive(void *address, Site site) {
    Phases &phases = phases_at(address, site);
    race_release(&phases.ends[phases.over % 2]);
    if (--phases.missing > 0) {
        return;
    }
    phases.missing = phases.arrivals;
    phases.over++;
    for (unsigned number = 0; number < engine.count; number++) {
        Thread &thread = *engine.threads[number];
        if (thread.state == State::waiting && thread.meeting == Meeting::phase && thread.phases == &phases &&
            thread.mask == (phases.over - 1) % 2) {
            engine.set_ready(thread);
        }
    }
}

void wait_phase(void *address, uint32_t parity, Site site) {
    if (parity > 1) {
        fail_at(site, "a parity of " + std::to_string(parity));
    }
    Phases &phases = phases_at(address, site);
    // The phase that goes on has the parity of `over`.
    if (phases.over % 2 == parity) {
        Thread &self = *engine.running;
        self.state = State::waiting;
        self.meeting = Meeting::phase;
        self.mask = parity;
        self.phases = &phases;
        self.site = site;
        engine.clear_ready(self);
        yield();
    }
    race_acquire(&phases.ends[parity]);
}

void fence() {
    race_acquire(&engine.fence);
    race_release(&engine.fence);
}

void meet(Meeting meeting, uint32_t mask, Slot &slot, int first, int second, Site site) {
    Thread &self = *engine.running;
    const unsigned lane = self.number % LANES, warp = self.number - lane;
    const unsigned lanes = engine.count - warp < LANES ? engine.count - warp : LANES;
    if ((mask >> lane & 1) == 0) {
        fail_at(site, std::string(name_of(meeting)) + " by a lane that its mask leaves out");
    }
    if (lanes < LANES && mask >> lanes != 0) {
        fail_at(site, std::string(name_of(meeting)) + " waits for lanes that the warp lacks: it has " + std::to_string(lanes));
    }
    self.state = State::waiting;
    self.meeting = meeting;
    self.mask = mask;
    self.slot = slot;
    self.first = first;
    self.second = second;
    self.site = site;
    engine.clear_ready(self);

    // Only __syncwarp orders memory; shuffles and the like do not.
    const unsigned group = warp + unsigned(__builtin_ctz(mask));
    char *const address = &engine.warps[engine.set][group][engine.warp_meetings[group] % 2];
    if (meeting == Meeting::syncwarp) {
        race_release(address);
    }
    bool complete = true;
    for (uint32_t left = mask; left != 0; left &= left - 1) {
        const Thread &other = *engine.threads[warp + unsigned(__builtin_ctz(left))];
        if (other.state != State::waiting || other.meeting == Meeting::barrier || other.meeting == Meeting::phase) {
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
            engine.warp_meetings[group]++;
        }
        for (uint32_t left = mask; left != 0; left &= left - 1) {
            engine.set_ready(*engine.threads[warp + unsigned(__builtin_ctz(left))]);
        }
    }
    yield();
    slot = self.slot;
    if (meeting == Meeting::syncwarp) {
        race_acquire(address);
    }
}

}  // namespace host
