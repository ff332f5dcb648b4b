// The copy engine: boxes and runs of bytes between global and shared memory, on their own.
#include <cstring>
#include <memory>

#include "block.h"

namespace emulator {
namespace {

struct Transfer {
    bool store = false;
    const TileMap *map = nullptr;  // null: a run of bytes
    TileMap copy = {};
    int at[5] = {};
    unsigned char *global = nullptr;
    uint32_t bytes = 0;
    unsigned rank = 0;      // whose shared memory, and for loads:
    uint32_t address = 0;   // where
    uint32_t blocks = 0;    // ranks that receive it, as bits
    uint32_t barrier = 0;   // where
    // Stores: of which thread, its group, and how far it is.
    unsigned thread = 0;
    uint32_t group = 0;
    bool read = false, written = false;
    std::vector<unsigned char> content;
    Site site = {};
};

std::vector<std::unique_ptr<Transfer>> pending;  // oldest first
std::unique_ptr<Transfer> announced;
std::vector<Part> parts;

// Around what allocates: to the race detector it is none of the thread's doing.
struct Quiet {
    Quiet() { race_ignore_begin(); }
    ~Quiet() { race_ignore_end(); }
};

const TileMap &checked(const void *map, unsigned rank, Site site) {
    if (uintptr_t(map) % 64 != 0) {
        fail(site, "a tensor map at %p, which is not a multiple of 64", map);
    }
    const TileMap &tiles = *static_cast<const TileMap *>(map);
    if (tiles.kind != TileMap::KIND) {
        fail(site, "what is at %p is no tensor map", map);
    }
    if (tiles.rank != rank || rank < 1 || rank > 5) {
        fail(site, "a copy of %u dimensions by a tensor map of %u", rank, tiles.rank);
    }
    if (tiles.address % 16 != 0) {
        fail(site, "a tensor map of memory at %#llx, which is not a multiple of 16", (unsigned long long)tiles.address);
    }
    for (unsigned i = 0; i < rank; i++) {
        if (tiles.sizes[i] == 0 || tiles.box[i] == 0 || tiles.box[i] > 256) {
            fail(site, "dimension %u has %u elements, and boxes %u: 1 to 256", i, tiles.sizes[i], tiles.box[i]);
        }
        if (i > 0 && (tiles.strides[i - 1] % 16 != 0 || tiles.strides[i - 1] >> 40 != 0)) {
            fail(site, "dimension %u has a stride of %llu bytes: a multiple of 16 below 2^40", i,
                 (unsigned long long)tiles.strides[i - 1]);
        }
    }
    const uint32_t row = tiles.box[0] * tiles.element_bytes;
    if (row % 16 != 0) {
        fail(site, "a box with rows of %u bytes, which is not a multiple of 16", row);
    }
    if (tiles.swizzle != 0 && (row > tiles.swizzle || (tiles.swizzle != 32 && tiles.swizzle != 64 && tiles.swizzle != 128))) {
        fail(site, "a box with rows of %u bytes, swizzled within %u", row, tiles.swizzle);
    }
    if (tiles.swizzle != 0 && row != tiles.swizzle) {
        fail(site, "a box with rows of %u bytes, swizzled within %u: nobody has measured how that lies", row, tiles.swizzle);
    }
    return tiles;
}

uint32_t box_bytes(const TileMap &tiles) {
    uint32_t bytes = tiles.element_bytes;
    for (unsigned i = 0; i < tiles.rank; i++) {
        bytes *= tiles.box[i];
    }
    return bytes;
}

uint32_t swizzled(const TileMap &tiles, uint32_t address) {
    const uint32_t mask = tiles.swizzle == 0 ? 0 : tiles.swizzle / 16 - 1;
    return address ^ (address >> 7 & mask) << 4;
}

// Row `which` of a box: its first byte in memory and the first byte and the end that are inside of the tensor, or nothing
// (begin = end). The first byte may be before the tensor.
struct Row {
    unsigned char *first;
    int64_t begin, end;
};

Row row_of(const Transfer &transfer, uint32_t which) {
    const TileMap &tiles = transfer.copy;
    int64_t offset = int64_t(transfer.at[0]) * tiles.element_bytes;
    bool inside = true;
    for (unsigned i = 1; i < tiles.rank; i++) {
        const int64_t at = transfer.at[i] + int64_t(which % tiles.box[i]);
        which /= tiles.box[i];
        inside &= at >= 0 && at < tiles.sizes[i];
        offset += at * int64_t(tiles.strides[i - 1]);
    }
    const int64_t row = int64_t(tiles.box[0]) * tiles.element_bytes;
    int64_t begin = -int64_t(transfer.at[0]) * tiles.element_bytes;
    int64_t end = (int64_t(tiles.sizes[0]) - transfer.at[0]) * tiles.element_bytes;
    begin = begin < 0 ? 0 : begin > row ? row : begin;
    end = end < begin ? begin : end > row ? row : end;
    return {reinterpret_cast<unsigned char *>(tiles.address + uint64_t(offset)), begin, inside ? end : begin};
}

uint32_t rows_of(const Transfer &transfer) {
    return transfer.bytes / (transfer.copy.box[0] * transfer.copy.element_bytes);
}

// Calls with (byte of global memory or null, address in shared memory) for each byte.
template <typename Use>
void each_byte(const Transfer &transfer, Use use) {
    if (transfer.map == nullptr) {
        for (uint32_t i = 0; i < transfer.bytes; i++) {
            use(transfer.global + i, transfer.address + i);
        }
        return;
    }
    const uint32_t row_bytes = transfer.copy.box[0] * transfer.copy.element_bytes;
    for (uint32_t which = 0; which < rows_of(transfer); which++) {
        const Row row = row_of(transfer, which);
        for (uint32_t i = 0; i < row_bytes; i++) {
            const bool there = int64_t(i) >= row.begin && int64_t(i) < row.end;
            use(there ? row.first + i : nullptr, swizzled(transfer.copy, transfer.address + which * row_bytes + i));
        }
    }
}

// The chunks of shared memory: all of a run of addresses, as swizzles permute within.
template <typename Use>
void each_chunk(const Transfer &transfer, Use use) {
    for (uint32_t address = transfer.address; address < transfer.address + transfer.bytes; address += CHUNK) {
        use(address);
    }
}

void announce(Transfer *transfer, const void *shared, Site site) {
    Quiet quiet;
    announced.reset(transfer);
    transfer->site = site;
    transfer->rank = current().rank;
    transfer->thread = current().place;
    unsigned rank;
    if (!find_shared(shared, transfer->bytes, &rank, &transfer->address)) {
        fail(site, "a copy of %u bytes at %p, which are not all in shared memory", transfer->bytes, shared);
    }
    const uint32_t alignment = transfer->map != nullptr ? 128 : 16;
    if (transfer->address % alignment != 0) {
        fail(site, "a copy at the address %#x of shared memory, which is not a multiple of %u", transfer->address, alignment);
    }
    parts.clear();
    if (transfer->map == nullptr) {
        parts.push_back({transfer->global, transfer->bytes});
        return;
    }
    for (uint32_t which = 0; which < rows_of(*transfer); which++) {
        const Row row = row_of(*transfer, which);
        if (row.end > row.begin) {
            parts.push_back({row.first + row.begin, size_t(row.end - row.begin)});
        }
    }
}

Transfer *new_transfer() {
    Quiet quiet;
    return new Transfer;
}

Transfer *of_box(const void *map, unsigned rank, const int *at, Site site) {
    const TileMap &tiles = checked(map, rank, site);
    Transfer *const transfer = new_transfer();
    transfer->map = &tiles;
    transfer->copy = tiles;
    for (unsigned i = 0; i < rank; i++) {
        transfer->at[i] = at[i];
    }
    transfer->bytes = box_bytes(tiles);
    return transfer;
}

Transfer *of_bytes(void *global, uint32_t bytes, Site site) {
    if (bytes % 16 != 0 || bytes == 0 || uintptr_t(global) % 16 != 0) {
        fail(site, "a copy of %u bytes at %p of global memory: multiples of 16", bytes, global);
    }
    Transfer *const transfer = new_transfer();
    transfer->global = static_cast<unsigned char *>(global);
    transfer->bytes = bytes;
    return transfer;
}

void announce_load(Transfer *transfer, const void *shared, const void *barrier, uint32_t blocks, Site site) {
    announce(transfer, shared, site);
    unsigned rank;
    if (!find_shared(barrier, 8, &rank, &transfer->barrier)) {
        fail(site, "a barrier at %p, which is not in shared memory", barrier);
    }
    transfer->blocks = blocks == 0 ? 1u << transfer->rank : blocks;
    if (transfer->blocks >> current_run().cluster != 0) {
        fail(site, "a copy for the blocks %#x of a cluster of %u", transfer->blocks, current_run().cluster);
    }
    for (unsigned other = 0; other < current_run().cluster; other++) {
        if ((transfer->blocks >> other & 1) == 0) {
            continue;
        }
        if (block_of(other).ended == block_threads()) {
            fail(site, "a copy for block %u of the cluster, which has ended", other);
        }
        unsigned char *const there = shared_at(other, transfer->barrier, 8);
        if (there == nullptr || shared_at(other, transfer->address, transfer->bytes) == nullptr) {
            fail(site, "a copy to memory that block %u of the cluster lacks", other);
        }
        check_known(other, there, site);
        each_chunk(*transfer, [&](uint32_t address) {
            const Chunk &chunk = chunk_at(other, address);
            if (chunk.coming > 0) {
                fail(site, "a copy to memory that the one from %s is on its way to",
                     place(transfer_at(other, address)).c_str());
            }
            if (chunk.reading > 0) {
                const Site product = product_at(other, address);
                fail(site, "a copy to memory that is still read from %s on",
                     place(product.file != nullptr ? product : transfer_at(other, address)).c_str());
            }
            check_fenced(other, address, site, "a copy to");
        });
    }
}

void announce_store(Transfer *transfer, const void *shared, Site site) {
    announce(transfer, shared, site);
    transfer->store = true;
    transfer->group = current().store_group;
    each_chunk(*transfer, [&](uint32_t address) {
        if (chunk_at(transfer->rank, address).coming > 0) {
            fail(site, "a copy from memory that the one from %s is on its way to",
                 place(transfer_at(transfer->rank, address)).c_str());
        }
        check_fenced(transfer->rank, address, site, "a copy from");
    });
}

// A load: brings its bytes, and tells the barriers.
void bring(const Transfer &transfer) {
    for (unsigned rank = 0; rank < current_run().cluster; rank++) {
        if ((transfer.blocks >> rank & 1) == 0) {
            continue;
        }
        unsigned char *const begin = shared_at(rank, transfer.address, transfer.bytes);
        unpoison(begin, transfer.bytes);
        each_byte(transfer, [&](const unsigned char *from, uint32_t address) {
            begin[address - transfer.address] = from == nullptr ? 0 : *from;
        });
        each_chunk(transfer, [&](uint32_t address) { chunk_at(rank, address).coming--; });
    }
    for (unsigned rank = 0; rank < current_run().cluster; rank++) {
        if ((transfer.blocks >> rank & 1) != 0) {
            receive(rank, shared_at(rank, transfer.barrier, 8), transfer.bytes, transfer.site);
        }
    }
}

void read_store(Transfer &transfer) {
    if (transfer.read) {
        return;
    }
    Quiet quiet;
    transfer.read = true;
    const unsigned char *const begin = shared_at(transfer.rank, transfer.address, transfer.bytes);
    transfer.content.assign(begin, begin + transfer.bytes);
    each_chunk(transfer, [&](uint32_t address) { chunk_at(transfer.rank, address).reading--; });
}

void write_store(Transfer &transfer) {
    read_store(transfer);
    transfer.written = true;
    each_byte(transfer, [&](unsigned char *to, uint32_t address) {
        if (to != nullptr) {
            *to = transfer.content[address - transfer.address];
        }
    });
}

}  // namespace

void announce_box(const void *map, unsigned rank, const int *at, void *shared, void *barrier, uint32_t blocks, Site site) {
    announce_load(of_box(map, rank, at, site), shared, barrier, blocks, site);
}

void announce_bytes(void *shared, const void *global, uint32_t bytes, void *barrier, uint32_t blocks, Site site) {
    announce_load(of_bytes(const_cast<void *>(global), bytes, site), shared, barrier, blocks, site);
}

void announce_box_store(const void *map, unsigned rank, const int *at, const void *shared, Site site) {
    announce_store(of_box(map, rank, at, site), shared, site);
}

void announce_bytes_store(void *global, const void *shared, uint32_t bytes, Site site) {
    announce_store(of_bytes(global, bytes, site), shared, site);
}

void check_box(const void *map, unsigned rank, Site site) { checked(map, rank, site); }

Part announced_shared() {
    return {shared_at(announced->rank, announced->address, announced->bytes), announced->bytes};
}
size_t announced_parts() { return parts.size(); }
Part announced_part(size_t which) { return parts[which]; }

void begin_announced() {
    Quiet quiet;
    std::unique_ptr<Transfer> transfer = std::move(announced);
    Transfer &one = *transfer;
    if (one.store) {
        each_chunk(one, [&](uint32_t address) { chunk_at(one.rank, address).reading++; });
        if (copies_at_once()) {
            one.read = true;
            const unsigned char *const begin = shared_at(one.rank, one.address, one.bytes);
            one.content.assign(begin, begin + one.bytes);
            each_byte(one, [&](unsigned char *to, uint32_t address) {
                if (to != nullptr) {
                    *to = one.content[address - one.address];
                }
            });
            // Who has not waited may not rely on it: the memory counts as read until then.
            one.read = false;
            one.written = true;
        }
        pending.push_back(std::move(transfer));
        return;
    }
    for (unsigned rank = 0; rank < current_run().cluster; rank++) {
        if ((one.blocks >> rank & 1) != 0) {
            unsigned char *const begin = shared_at(rank, one.address, one.bytes);
            announce_to(rank, shared_at(rank, one.barrier, 8));
            each_chunk(one, [&](uint32_t address) { chunk_at(rank, address).coming++; });
            forget_stores(rank, one.address, one.bytes);
            if (!copies_at_once()) {
                unpoison(begin, one.bytes);
                std::memset(begin, 0xff, one.bytes);
                poison(begin, one.bytes);
            }
        }
    }
    if (copies_at_once()) {
        bring(one);
    } else {
        pending.push_back(std::move(transfer));
    }
}

bool make_one_transfer() {
    Quiet quiet;
    for (size_t i = pending.size(); i-- > 0;) {
        if (!pending[i]->store) {
            const std::unique_ptr<Transfer> transfer = std::move(pending[i]);
            pending.erase(pending.begin() + long(i));
            bring(*transfer);
            return true;
        }
    }
    return false;
}

void commit_stores() { current().store_group++; }

void wait_stores(unsigned pending_groups, bool read_alone, Site) {
    Quiet quiet;
    const Thread &self = current();
    for (size_t i = 0; i < pending.size();) {
        Transfer &transfer = *pending[i];
        if (!transfer.store || transfer.thread != self.place || transfer.group + pending_groups >= self.store_group) {
            i++;
            continue;
        }
        read_store(transfer);
        if (read_alone) {
            i++;
            continue;
        }
        if (!transfer.written) {
            write_store(transfer);
        }
        pending.erase(pending.begin() + long(i));
    }
}

Site transfer_at(unsigned rank, uint32_t address) {
    for (const auto &transfer : pending) {
        const bool here = transfer->store ? transfer->rank == rank && !transfer->read : (transfer->blocks >> rank & 1) != 0;
        if (here && address >= transfer->address && address < transfer->address + transfer->bytes) {
            return transfer->site;
        }
    }
    return {nullptr, 0};
}

void begin_transfers() {
    pending.clear();
    announced.reset();
    for (unsigned rank = 0; rank < current_run().cluster; rank++) {
        std::memset(&chunk_at(rank, 0), 0, sizeof(Chunk) * (1 << 18) / CHUNK);
    }
}

void check_transfers(const Thread &thread) {
    for (const auto &transfer : pending) {
        if (transfer->store && transfer->thread == thread.place && !transfer->read) {
            fail(transfer->site, "a copy from shared memory that nobody waits for: its thread ends");
        }
    }
}

void end_transfers() {
    Quiet quiet;
    for (const auto &transfer : pending) {
        if (!transfer->store) {
            fail_outside(transfer->site, "a copy that is on its way when its block ends");
        }
        if (!transfer->written) {
            write_store(*transfer);
        }
    }
    pending.clear();
}

}  // namespace emulator
