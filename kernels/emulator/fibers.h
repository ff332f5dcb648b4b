// Stacks to switch between: one for each thread of a block, and that of the caller.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
public:
    Fiber() = default;
    Fiber(const Fiber &) = delete;
    Fiber &operator=(const Fiber &) = delete;
    ~Fiber();

    // Gives it a stack, once, and has it begin at `entry`, which never returns, when it is next switched to. Whatever
    // was on the stack is forgotten.
    void start(void (*entry)());

    // Leaves `from`, which is running, for `to`.
    static void change(Fiber &from, Fiber &to);

    // To be called first in `entry`.
    static void entered(Fiber &self);

private:
    void *pointer = nullptr;  // where the stack ends, while it is not running
    unsigned char *stack = nullptr;
    size_t size = 0;
    void *fake_stack = nullptr;  // of AddressSanitizer
    void *thread = nullptr;      // of ThreadSanitizer
};

// How the stacks are switched: "assembly" or "ucontext".
const char *fiber_kind();

// What orders accesses of different threads, for the race detector: what was released before what is acquired later.
void race_release(void *address);
void race_acquire(void *address);

// Around what the engine does for a thread of a block with functions that the race detector watches wherever they are
// called: allocations, and copies of memory.
void race_ignore_begin();
void race_ignore_end();

// Whether there is a race detector, which knows threads by their stack and memory by its address.
bool race_detector();

// For AddressSanitizer: nobody may, or may again, read or write these bytes.
void poison(void *address, size_t bytes);
void unpoison(void *address, size_t bytes);

}  // namespace emulator
