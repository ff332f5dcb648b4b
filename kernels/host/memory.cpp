// Shared memory, and asynchronous copies into it.
#include <cstdlib>
#include <cstring>

#include "block.h"

namespace host {
namespace {

// A piece of memory of exact size, so that AddressSanitizer sees an access behind its end.
struct Piece {
    const void *key;
    unsigned char *memory;  // what was allocated
    unsigned char *begin;
    size_t bytes;
};

constexpr size_t DYNAMIC_ALIGNMENT = 128;
constexpr int FILL = 0xff;
// From compute capability 8.0 on.
constexpr uint32_t SYSTEM_SHARED = 1024;

std::vector<Piece> pieces;    // of the running block; the dynamic memory is first, without a key
std::vector<Piece> finished;  // of earlier blocks of the launch

// A multiple of `alignment` and of no more: more than the type asks for is not to be relied on.
Piece allocate(const void *key, size_t bytes, size_t alignment, bool exactly) {
    const size_t lead = exactly && alignment < DYNAMIC_ALIGNMENT ? alignment : 0;
    void *memory = nullptr;
    // Room for one byte, so that no two arrays are at one address.
    const size_t room = lead + (bytes == 0 ? 1 : bytes);
    if (posix_memalign(&memory, DYNAMIC_ALIGNMENT, room) != 0) {
        std::abort();
    }
    Piece piece = {key, static_cast<unsigned char *>(memory), static_cast<unsigned char *>(memory) + lead, bytes};
    std::memset(memory, FILL, room);
    if (lead > 0) {
        poison(memory, lead);
    }
    if (bytes == 0) {
        poison(piece.begin, 1);
    }
    return piece;
}

void release(const Piece &piece) {
    unpoison(piece.memory, size_t(piece.begin - piece.memory) + (piece.bytes == 0 ? 1 : piece.bytes));
    std::free(piece.memory);
}

}  // namespace

void shared_begin_launch(size_t dynamic_bytes) {
    pieces.push_back(allocate(nullptr, dynamic_bytes, DYNAMIC_ALIGNMENT, false));
}

void shared_begin_block() {
    if (race_detector()) {
        // Memory of two blocks at one address would be a race between them. It is kept until the launch ends.
        const size_t dynamic_bytes = pieces[0].bytes;
        finished.insert(finished.end(), pieces.begin(), pieces.end());
        pieces.clear();
        pieces.push_back(allocate(nullptr, dynamic_bytes, DYNAMIC_ALIGNMENT, false));
        return;
    }
    for (const Piece &piece : pieces) {
        if (piece.bytes > 0) {
            unpoison(piece.begin, piece.bytes);
            std::memset(piece.begin, FILL, piece.bytes);
        }
    }
}

void shared_end_launch() {
    finished.insert(finished.end(), pieces.begin(), pieces.end());
    for (const Piece &piece : finished) {
        release(piece);
    }
    pieces.clear();
    finished.clear();
}

void *shared_array(const void *key, size_t bytes, size_t alignment) {
    for (const Piece &piece : pieces) {
        if (piece.key == key) {
            return piece.begin;
        }
    }
    race_ignore_begin();
    pieces.push_back(allocate(key, bytes, alignment, true));
    race_ignore_end();
    return pieces.back().begin;
}

unsigned char *dynamic_shared() { return pieces[0].begin; }

uint32_t shared_address(const void *pointer) {
    return SYSTEM_SHARED + uint32_t(static_cast<const unsigned char *>(pointer) - pieces[0].begin);
}

bool copies_at_once() { return current_run().highest_first; }

void push_copy(const Copy &copy) {
    Thread &self = current();
    race_ignore_begin();
    self.copies.push_back(copy);
    race_ignore_end();
    self.copies.back().group = self.group;
}

void commit_copies() { current().group++; }

bool pop_copy(uint32_t pending, Copy &copy) {
    Thread &self = current();
    if (self.copies.empty() || self.copies.front().group + pending >= self.group) {
        return false;
    }
    copy = self.copies.front();
    race_ignore_begin();
    self.copies.erase(self.copies.begin());
    race_ignore_end();
    return true;
}

void check_copies(Thread &thread) {
    if (!thread.copies.empty()) {
        fail(thread.copies.front().site, "%zu asynchronous copies begin, of which this is the first, and nobody waits for them",
             thread.copies.size());
    }
}

}  // namespace host
