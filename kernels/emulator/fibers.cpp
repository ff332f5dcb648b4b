// Switching stacks, and telling the sanitizers about it. EMULATOR_ASAN and EMULATOR_TSAN say which the kernels are compiled
// with.
#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifndef EMULATOR_ASAN
#define EMULATOR_ASAN 0
#endif
#ifndef EMULATOR_TSAN
#define EMULATOR_TSAN 0
#endif
// On other processors, and to try it: slower by a few times.
#ifndef EMULATOR_UCONTEXT
#if defined(__x86_64__)
#define EMULATOR_UCONTEXT 0
#else
#define EMULATOR_UCONTEXT 1
#endif
#endif

#if EMULATOR_UCONTEXT
#include <ucontext.h>
#endif
#if EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
}
#endif

namespace emulator {
namespace {

// Sanitizers make frames larger. Pages that nobody touches take no memory.
#if EMULATOR_ASAN || EMULATOR_TSAN
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 128 << 10;
#endif

#if EMULATOR_UCONTEXT

// The contexts live apart from the stacks: `pointer` is one of them.
void switch_stack(void **from, void *to) { swapcontext(static_cast<ucontext_t *>(*from), static_cast<ucontext_t *>(to)); }

#else

extern "C" void halfbyte_emulator_switch_stack(void **from, void *to);
// Keeps what a function must keep, the stack pointer last, and takes the same from the other stack.
asm(R"(
.text
.hidden halfbyte_emulator_switch_stack
.globl halfbyte_emulator_switch_stack
.type halfbyte_emulator_switch_stack, @function
halfbyte_emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size halfbyte_emulator_switch_stack, .-halfbyte_emulator_switch_stack
)");

void switch_stack(void **from, void *to) { halfbyte_emulator_switch_stack(from, to); }

#endif

// What is given to AddressSanitizer when a stack is left: the bounds of the next. Those of the caller's stack are found
// when it is left for the first time.
#if EMULATOR_ASAN
const void *caller_stack = nullptr;
size_t caller_size = 0;
#endif

}  // namespace

const char *fiber_kind() { return EMULATOR_UCONTEXT ? "ucontext" : "assembly"; }

Fiber::~Fiber() {
#if EMULATOR_TSAN
    if (stack != nullptr) {
        __tsan_destroy_fiber(thread);
    }
#endif
    if (stack != nullptr) {
#if EMULATOR_UCONTEXT
        delete static_cast<ucontext_t *>(pointer);
#endif
        munmap(stack - getpagesize(), size + size_t(getpagesize()));
    }
}

void Fiber::start(void (*entry)()) {
    if (stack == nullptr) {
        // One page below is never mapped: a stack that is too small is a fault, and not a wrong result.
        const size_t guard = size_t(getpagesize());
        void *const memory = mmap(nullptr, STACK_BYTES + guard, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
            std::perror("no memory for the stack of a thread");
            std::abort();
        }
        stack = static_cast<unsigned char *>(memory) + guard;
        size = STACK_BYTES;
#if EMULATOR_TSAN
        thread = __tsan_create_fiber(0);
#endif
#if EMULATOR_UCONTEXT
        pointer = new ucontext_t;
#endif
    }
    unpoison(stack, size);
    fake_stack = nullptr;
#if EMULATOR_UCONTEXT
    ucontext_t *const context = static_cast<ucontext_t *>(pointer);
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = size;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
#else
    // As if `entry` had been called from nowhere: rbp and the return address are 0, which ends a backtrace.
    void **top = reinterpret_cast<void **>(stack + size);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(entry);
    for (int saved = 0; saved < 6; saved++) {
        *--top = nullptr;
    }
    pointer = top;
#endif
}

void Fiber::change(Fiber &from, Fiber &to) {
#if EMULATOR_UCONTEXT
    if (from.pointer == nullptr) {
        from.pointer = new ucontext_t;
    }
#endif
#if EMULATOR_ASAN
    const bool to_caller = to.stack == nullptr;
    __sanitizer_start_switch_fiber(&from.fake_stack, to_caller ? caller_stack : to.stack, to_caller ? caller_size : to.size);
#endif
#if EMULATOR_TSAN
    if (from.stack == nullptr) {
        from.thread = __tsan_get_current_fiber();
    }
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
    switch_stack(&from.pointer, to.pointer);
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::entered([[maybe_unused]] Fiber &self) {
#if EMULATOR_ASAN
    // The first fiber ever entered comes from the caller's stack; each begins with no fake stack of its own.
    const void *bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &bytes);
    if (caller_stack == nullptr) {
        caller_stack = bottom;
        caller_size = bytes;
    }
#endif
}

bool race_detector() { return EMULATOR_TSAN; }

void race_release([[maybe_unused]] void *address) {
#if EMULATOR_TSAN
    __tsan_release(address);
#endif
}

void race_acquire([[maybe_unused]] void *address) {
#if EMULATOR_TSAN
    __tsan_acquire(address);
#endif
}

void race_ignore_begin() {
#if EMULATOR_TSAN
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}

void race_ignore_end() {
#if EMULATOR_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

void poison([[maybe_unused]] void *address, [[maybe_unused]] size_t bytes) {
#if EMULATOR_ASAN
    __asan_poison_memory_region(address, bytes);
#endif
}

void unpoison([[maybe_unused]] void *address, [[maybe_unused]] size_t bytes) {
#if EMULATOR_ASAN
    __asan_unpoison_memory_region(address, bytes);
#endif
}

}  // namespace emulator
