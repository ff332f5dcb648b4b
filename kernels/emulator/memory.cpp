// Shared memory, and asynchronous copies into it.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "block.h"

namespace emulator {
namespace {

// A piece of memory of exact size, so that AddressSanitizer sees an access behind its end.
struct Piece {
    const void *key;
    unsigned char *memory;  // what was allocated
    unsigned char *begin;
    size_t bytes;
    uint32_t address;  // of the device's shared memory
};

// The shared memory of one block of the cluster.
struct Arena {
    std::vector<Piece> pieces;  // the dynamic memory is first, without a key
    uint32_t end = 0;           // the first address that nothing has
    std::vector<Chunk> chunks;
};

constexpr size_t DYNAMIC_ALIGNMENT = 128;
constexpr int FILL = 0xff;
// From compute capability 8.0 on.
constexpr uint32_t SYSTEM_SHARED = 1024;
// Addresses of a block; those of the cluster have the rank above, and one more.
constexpr uint32_t WINDOW = 1 << 18;
constexpr uint32_t RANK_SHIFT = 24;

std::vector<Arena> arenas;    // of the running blocks, by rank
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
    Piece piece = {key, static_cast<unsigned char *>(memory), static_cast<unsigned char *>(memory) + lead, bytes, 0};
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

void begin_arena(Arena &arena, size_t dynamic_bytes) {
    arena.pieces.push_back(allocate(nullptr, dynamic_bytes, DYNAMIC_ALIGNMENT, false));
    arena.pieces[0].address = SYSTEM_SHARED;
    arena.end = SYSTEM_SHARED + uint32_t(dynamic_bytes);
}

// The piece that has an address of this process, or null.
const Piece *piece_of(unsigned rank, const void *pointer) {
    const unsigned char *const byte = static_cast<const unsigned char *>(pointer);
    for (const Piece &piece : arenas[rank].pieces) {
        if (byte >= piece.begin && byte < piece.begin + (piece.bytes == 0 ? 1 : piece.bytes)) {
            return &piece;
        }
    }
    return nullptr;
}

}  // namespace

void shared_begin_launch(size_t dynamic_bytes, unsigned blocks) {
    arenas.resize(blocks);
    for (Arena &arena : arenas) {
        arena.chunks.resize(WINDOW / CHUNK);
        begin_arena(arena, dynamic_bytes);
    }
}

void shared_begin_blocks() {
    for (unsigned rank = 0; rank < arenas.size(); rank++) {
        Arena &arena = arenas[rank];
        for (const Piece &piece : arena.pieces) {
            forget_stores(rank, piece.address, piece.bytes);
        }
        if (race_detector()) {
            // Memory of two blocks at one address would be a race between them. It is kept until the launch ends.
            const size_t dynamic_bytes = arena.pieces[0].bytes;
            finished.insert(finished.end(), arena.pieces.begin(), arena.pieces.end());
            arena.pieces.clear();
            begin_arena(arena, dynamic_bytes);
            continue;
        }
        for (const Piece &piece : arena.pieces) {
            if (piece.bytes > 0) {
                unpoison(piece.begin, piece.bytes);
                std::memset(piece.begin, FILL, piece.bytes);
            }
        }
    }
}

void shared_end_launch() {
    for (const Arena &arena : arenas) {
        finished.insert(finished.end(), arena.pieces.begin(), arena.pieces.end());
    }
    for (const Piece &piece : finished) {
        release(piece);
    }
    arenas.clear();
    finished.clear();
}

void *shared_array(const void *key, size_t bytes, size_t alignment) {
    Arena &arena = arenas[current().rank];
    for (const Piece &piece : arena.pieces) {
        if (piece.key == key) {
            return piece.begin;
        }
    }
    race_ignore_begin();
    arena.pieces.push_back(allocate(key, bytes, alignment, true));
    race_ignore_end();
    // As its memory, at a multiple of the alignment and of no more.
    Piece &piece = arena.pieces.back();
    const uint32_t unit = uint32_t(alignment < CHUNK ? CHUNK : alignment);
    piece.address = (arena.end + 2 * unit - 1) / (2 * unit) * (2 * unit) + unit;
    arena.end = piece.address + uint32_t(bytes);
    return piece.begin;
}

unsigned char *dynamic_shared() { return arenas[current().rank].pieces[0].begin; }

uint32_t shared_address(const void *pointer) {
    const Piece *const piece = piece_of(current().rank, pointer);
    // What is not there has an address too, behind or before the dynamic memory.
    const Piece &base = piece == nullptr ? arenas[current().rank].pieces[0] : *piece;
    return base.address + uint32_t(static_cast<const unsigned char *>(pointer) - base.begin);
}

unsigned char *shared_at(unsigned rank, uint32_t address, size_t bytes) {
    for (const Piece &piece : arenas[rank].pieces) {
        if (address >= piece.address && address + bytes <= piece.address + piece.bytes) {
            return piece.begin + (address - piece.address);
        }
    }
    return nullptr;
}

Chunk &chunk_at(unsigned rank, uint32_t address) { return arenas[rank].chunks[address / CHUNK]; }

bool find_shared(const void *pointer, size_t bytes, unsigned *rank, uint32_t *address) {
    *rank = current().rank;
    const Piece *const piece = piece_of(*rank, pointer);
    if (piece == nullptr || static_cast<const unsigned char *>(pointer) + bytes > piece->begin + piece->bytes) {
        return false;
    }
    *address = piece->address + uint32_t(static_cast<const unsigned char *>(pointer) - piece->begin);
    return true;
}

uint32_t cluster_address(const void *pointer, unsigned rank, Site site) {
    if (rank >= arenas.size()) {
        fail(site, "rank %u in a cluster of %u", rank, unsigned(arenas.size()));
    }
    unsigned mine;
    uint32_t address;
    if (!find_shared(pointer, 1, &mine, &address)) {
        fail(site, "the address %p is not in shared memory", pointer);
    }
    return (rank + 1) << RANK_SHIFT | address;
}

void *cluster_memory(uint32_t address, size_t bytes, bool store, Site site) {
    const uint32_t place = address & ((1u << RANK_SHIFT) - 1), above = address >> RANK_SHIFT;
    const unsigned rank = above == 0 ? current().rank : above - 1;
    unsigned char *const memory = rank < arenas.size() ? shared_at(rank, place, bytes) : nullptr;
    if (memory == nullptr) {
        fail(site, "%zu bytes at %#x are not in the cluster's shared memory", bytes, address);
    }
    if (block_of(rank).ended == block_threads()) {
        fail(site, "the memory of block %u of the cluster, which has ended", rank);
    }
    if (store) {
        note_store(rank, place, bytes);
    }
    return memory;
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

}  // namespace emulator
