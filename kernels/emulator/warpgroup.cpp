// Products of warpgroups (wgmma): issued by 128 threads, made when their group is committed or as late as its wait, and
// theirs alone in between.
#include <cmath>
#include <cstring>
#include <memory>

#include "block.h"

namespace emulator {
namespace {

// A product takes 32 bytes of each row of its operands: 16 columns of 16-bit values, 32 of whole numbers.
constexpr int ROWS = 64, DEPTH = 16, DEPTH_S8 = 32, MOST_COLUMNS = 256;
constexpr unsigned SLOTS = 8;
// What registers hold while the matrix units have them: a NaN that nothing else makes.
constexpr uint32_t TAKEN = 0x7fd1ce00;

struct Committed {
    Product product;
    unsigned slot;
    uint32_t group;
    bool made;
    Site site;
};

struct Warpgroup {
    std::unique_ptr<uint32_t[]> sums[SLOTS];  // [ROWS][MOST_COLUMNS], bits
    std::vector<Committed> committed;         // and not ended
    uint32_t groups = 0;
};

std::vector<std::unique_ptr<Warpgroup>> warpgroups;  // of all blocks of the cluster

struct Quiet {
    Quiet() { race_ignore_begin(); }
    ~Quiet() { race_ignore_end(); }
};

unsigned first_thread() { return current().number / GROUP * GROUP; }

Warpgroup &warpgroup_of(const Thread &thread) {
    return *warpgroups[thread.rank * (MAX_THREADS / GROUP) + thread.number / GROUP];
}

// Every 16-bit float as a float64.
const double *table(bool bf16) {
    static double *const tables[2] = {new double[65536], new double[65536]};
    static bool made = false;
    if (!made) {
        for (uint32_t bits = 0; bits < 65536; bits++) {
            const uint32_t wide = bits << 16;
            float value;
            std::memcpy(&value, &wide, sizeof value);
            tables[1][bits] = value;
            const int exponent = int(bits >> 10 & 31);
            const double fraction = bits & 1023;
            const double size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                                : exponent == 0 ? std::ldexp(fraction, -24)
                                                : std::ldexp(1024.0 + fraction, exponent - 25);
            tables[0][bits] = (bits & 0x8000) != 0 ? -size : size;
        }
        made = true;
    }
    return tables[bf16];
}

// ---- operands in shared memory -------------------------------------------------------------------------------------

// What a descriptor says.
struct Operand {
    uint32_t start, leading, stride, base, span;  // bytes; `base` rows of 128

    explicit Operand(uint64_t place)
        : start(uint32_t(place & 0x3fff) << 4),
          leading(uint32_t(place >> 16 & 0x3fff) << 4),
          stride(uint32_t(place >> 32 & 0x3fff) << 4),
          base(uint32_t(place >> 49 & 7)) {
        const uint32_t spans[4] = {0, 128, 64, 32};
        span = spans[place >> 62];
    }

    uint32_t mask() const { return span == 0 ? 0 : span / 16 - 1; }
    uint32_t swizzled(uint32_t address) const { return address ^ (((address >> 7) - base) & mask()) << 4; }
};

// The address of a 16-byte piece: eight neighbours along K of row `major` (piece 0 or 1), or, transposed, eight neighbours
// of the rows for one k.
uint32_t piece_address(const Operand &operand, bool transposed, uint32_t row, uint32_t k) {
    const uint32_t eight = operand.span == 0 ? 16 : operand.span;
    if (!transposed) {
        const uint32_t piece = k / 8 * (operand.span == 0 ? operand.leading : 16);
        return operand.swizzled(operand.start + row / 8 * operand.stride + row % 8 * eight + piece);
    }
    if (operand.span == 0) {
        return operand.start + row / 8 * operand.stride + k / 8 * operand.leading + k % 8 * 16;
    }
    const uint32_t together = operand.span / 2;
    return operand.swizzled(operand.start + row / together * operand.leading + row % together / 8 * 16 +
                            k / 8 * operand.stride + k % 8 * operand.span);
}

// Calls with (row, k, address) of each piece of an operand with so many rows.
template <typename Use>
void each_piece(uint64_t place, bool transposed, int rows, Use use) {
    const Operand operand(place);
    if (transposed) {
        for (int k = 0; k < DEPTH; k++) {
            for (int row = 0; row < rows; row += 8) {
                use(row, k, piece_address(operand, true, uint32_t(row), uint32_t(k)));
            }
        }
    } else {
        for (int row = 0; row < rows; row++) {
            for (int k = 0; k < DEPTH; k += 8) {
                use(row, k, piece_address(operand, false, uint32_t(row), uint32_t(k)));
            }
        }
    }
}

template <typename Use>
void each_piece_of(const Product &product, Use use) {
    const auto only_address = [&](int, int, uint32_t address) { use(address); };
    each_piece(product.b_place, product.b_transposed, product.columns, only_address);
    if (product.a == nullptr) {
        each_piece(product.a_place, product.a_transposed, ROWS, only_address);
    }
}

void check_operand(uint64_t place, Site site) {
    const Operand operand(place);
    if (operand.span == 0) {
        return;
    }
    // The pattern is that of addresses: where it begins has to be said.
    if ((operand.start - operand.base * 128) % (8 * operand.span) >= operand.span) {
        fail(site, "an operand at %#x, swizzled within %u bytes, with the base offset %u: it begins inside of the pattern, "
                   "which has %u bytes", operand.start, operand.span, operand.base, 8 * operand.span);
    }
}

// Element [k][row] of an operand.
void load(unsigned rank, const Product &product, uint64_t place, bool transposed, int rows, double *to, int pitch) {
    const double *const values = table(product.values == Values::bf16);
    each_piece(place, transposed, rows, [&](int row, int k, uint32_t address) {
        uint16_t piece[8];
        const unsigned char *const from = shared_at(rank, address, CHUNK);
        for (int i = 0; i < 8; i++) {
            piece[i] = uint16_t(from[2 * i] | from[2 * i + 1] << 8);
        }
        for (int i = 0; i < 8; i++) {
            to[transposed ? k * pitch + row + i : (k + i) * pitch + row] = values[piece[i]];
        }
    });
}

// Element [k][row] of an operand of whole numbers.
void load_s8(unsigned rank, uint64_t place, int rows, int32_t *to, int pitch) {
    each_piece(place, false, rows, [&](int row, int k, uint32_t address) {
        const unsigned char *const from = shared_at(rank, address, CHUNK);
        for (int i = 0; i < int(CHUNK); i++) {
            to[(k * 2 + i) * pitch + row] = int8_t(from[i]);
        }
    });
}

// ---- making them ---------------------------------------------------------------------------------------------------

// sums[64][columns] += a * b. Products of 16-bit floats are exact in float64; the sum of the 16 is rounded once, to float32.
void multiply(float *sums, const double *a, const double *b, int columns) {
    double row_sums[MOST_COLUMNS];
    for (int row = 0; row < ROWS; row++) {
        float *const to = sums + row * MOST_COLUMNS;
        for (int column = 0; column < columns; column++) {
            row_sums[column] = to[column];
        }
        for (int k = 0; k < DEPTH; k++) {
            const double value = a[k * ROWS + row];
            const double *const other = b + k * MOST_COLUMNS;
            for (int column = 0; column < columns; column++) {
                row_sums[column] += value * other[column];
            }
        }
        for (int column = 0; column < columns; column++) {
            to[column] = float(row_sums[column]);
        }
    }
}

// The same of whole numbers: exact, but for what does not fit into 32 bits, which wraps around.
void multiply_s8(uint32_t *sums, const int32_t *a, const int32_t *b, int columns) {
    for (int row = 0; row < ROWS; row++) {
        uint32_t *const to = sums + row * MOST_COLUMNS;
        for (int k = 0; k < DEPTH_S8; k++) {
            const int32_t value = a[k * ROWS + row];
            const int32_t *const other = b + k * MOST_COLUMNS;
            for (int column = 0; column < columns; column++) {
                to[column] += uint32_t(value * other[column]);
            }
        }
    }
}

// The row of the sums, and the first column, that register i of a thread has.
int row_of(unsigned number, int i) { return int(number % GROUP / LANES * 16 + number % LANES / 4) + i / 2 % 2 * 8; }
int column_of(unsigned number, int i) { return i / 4 * 8 + int(number % 4) * 2 + i % 2; }

void make(Warpgroup &group, Committed &one, size_t which) {
    static double a[DEPTH * ROWS], b[DEPTH * MOST_COLUMNS];
    Product &product = one.product;
    const unsigned rank = current().rank, first = first_thread();
    one.made = true;
    uint32_t *const sums = group.sums[one.slot].get();
    if (!product.add) {
        std::memset(sums, 0, sizeof(uint32_t) * ROWS * MOST_COLUMNS);
    }
    if (product.values == Values::s8) {
        static int32_t a_s8[DEPTH_S8 * ROWS], b_s8[DEPTH_S8 * MOST_COLUMNS];
        load_s8(rank, product.b_place, product.columns, b_s8, MOST_COLUMNS);
        load_s8(rank, product.a_place, ROWS, a_s8, ROWS);
        multiply_s8(sums, a_s8, b_s8, product.columns);
        return;
    }
    load(rank, product, product.b_place, product.b_transposed, product.columns, b, MOST_COLUMNS);
    if (product.a == nullptr) {
        load(rank, product, product.a_place, product.a_transposed, ROWS, a, ROWS);
    } else {
        const double *const values = table(product.values == Values::bf16);
        for (unsigned number = first; number < first + GROUP; number++) {
            const Issued &issued = thread_of(number).products[which];
            for (int i = 0; i < 4; i++) {
                const uint32_t word = issued.product.a[i];
                const int row = row_of(number, i % 2 * 2), k = int(number % 4) * 2 + i / 2 * 8;
                a[k * ROWS + row] = values[word & 0xffff];
                a[(k + 1) * ROWS + row] = values[word >> 16];
            }
        }
    }
    multiply(reinterpret_cast<float *>(sums), a, b, product.columns);
}

// Waits for the others of the warpgroup; true for the last.
bool gather(Meeting meeting, Site site) {
    Thread &self = current();
    Gathering &all = current_block().groups[self.number / GROUP];
    const auto elsewhere = [&]() { return all.site.line != site.line || std::strcmp(all.site.file, site.file) != 0; };
    if (all.arrived > 0 && (all.meeting != meeting || elsewhere())) {
        fail_at(site, std::string(name_of(meeting)) + " while others of the warpgroup are at " + name_of(all.meeting) + ", " +
                          place(all.site));
    }
    all.meeting = meeting;
    all.site = site;
    if (++all.arrived < GROUP) {
        begin_waiting(meeting, site);
        yield();
        return false;
    }
    return true;
}

void let_go() {
    const unsigned first = first_thread();
    current_block().groups[first / GROUP].arrived = 0;
    for (unsigned number = first; number < first + GROUP; number++) {
        if (&thread_of(number) != &current()) {
            set_ready(thread_of(number));
        }
    }
}

bool same(const Issued &a, const Issued &b) {
    return a.product.values == b.product.values && a.product.add == b.product.add && a.product.columns == b.product.columns &&
           (a.product.a == nullptr) == (b.product.a == nullptr) && a.product.a_place == b.product.a_place &&
           a.product.b_place == b.product.b_place && a.product.a_transposed == b.product.a_transposed &&
           a.product.b_transposed == b.product.b_transposed && a.slot == b.slot && a.group == b.group &&
           a.site.line == b.site.line;
}

}  // namespace

void products_fence() { current().fences++; }

void issue_product(const Product &product, Site site) {
    Quiet quiet;
    Thread &self = current();
    if (self.number / GROUP * GROUP + GROUP > block_threads()) {
        fail(site, "wgmma in a warpgroup that is not whole");
    }
    if (product.columns % 8 != 0 || product.columns < 8 || product.columns > MOST_COLUMNS) {
        fail(site, "wgmma with %d columns: a multiple of 8 up to 256", product.columns);
    }
    if (product.values == Values::s8 && (product.a != nullptr || product.a_transposed || product.b_transposed)) {
        fail(site, "wgmma of 8-bit values with an operand that is not in shared memory, by rows");
    }
    check_operand(product.b_place, site);
    Issued issued = {product, {}, 0, self.product_group, site};
    if (product.a == nullptr) {
        check_operand(product.a_place, site);
    } else {
        std::memcpy(issued.a, product.a, sizeof issued.a);
        Seen *seen = nullptr;
        for (Seen &one : self.seen) {
            seen = one.a == product.a ? &one : seen;
        }
        if (seen == nullptr) {
            self.seen.push_back({product.a, {}, 0});
            seen = &self.seen.back();
        } else if (seen->fences == self.fences && std::memcmp(seen->value, issued.a, sizeof issued.a) != 0) {
            fail(site, "wgmma reads registers that were changed since wgmma.fence");
        }
        std::memcpy(seen->value, issued.a, sizeof issued.a);
        seen->fences = self.fences;
    }
    Held *held = nullptr;
    for (Held &one : self.held) {
        if (one.d == product.d && one.columns == product.columns) {
            held = &one;
        } else if (one.d < product.d + product.columns / 2 && product.d < one.d + one.columns / 2) {
            fail(site, "wgmma adds to registers of which another one, of a different form, has a part");
        }
    }
    if (held == nullptr) {
        if (self.fences == self.fences_at_return) {
            fail(site, "wgmma that takes registers without a wgmma.fence");
        }
        unsigned slot = 0;
        for (const Held &one : self.held) {
            slot = one.slot >= slot ? one.slot + 1 : slot;
        }
        if (slot >= SLOTS) {
            fail(site, "more sums on the way than there is room for");
        }
        Warpgroup &group = warpgroup_of(self);
        if (group.sums[slot] == nullptr) {
            group.sums[slot] = std::make_unique<uint32_t[]>(ROWS * MOST_COLUMNS);
        }
        if (product.add) {
            for (int i = 0; i < product.columns / 2; i++) {
                group.sums[slot][size_t(row_of(self.number, i) * MOST_COLUMNS + column_of(self.number, i))] = product.d[i];
            }
        }
        self.held.push_back({product.d, product.columns, slot, 0});
        held = &self.held.back();
        for (int i = 0; i < product.columns / 2; i++) {
            std::memcpy(&product.d[i], &TAKEN, sizeof TAKEN);
        }
    }
    held->pending++;
    issued.slot = held->slot;
    self.products.push_back(issued);
}

void commit_products(Site site) {
    Thread &self = current();
    self.product_group++;
    if (!gather(Meeting::commit, site)) {
        return;
    }
    Quiet quiet;
    const unsigned first = first_thread();
    for (unsigned number = first; number < first + GROUP; number++) {
        const Thread &other = thread_of(number);
        if (other.products.size() != self.products.size()) {
            fail(site, "thread %u has issued %zu products that have not ended, thread %u %zu", self.number,
                 self.products.size(), number, other.products.size());
        }
        for (size_t i = 0; i < self.products.size(); i++) {
            if (!same(self.products[i], other.products[i])) {
                fail(self.products[i].site, "one wgmma, and another one (%s) of thread %u: other operands, or another form",
                     place(other.products[i].site).c_str(), number);
            }
        }
    }
    Warpgroup &group = warpgroup_of(self);
    for (size_t i = group.committed.size(); i < self.products.size(); i++) {
        const Issued &issued = self.products[i];
        each_piece_of(issued.product, [&](uint32_t address) {
            if (shared_at(self.rank, address, CHUNK) == nullptr) {
                fail(issued.site, "wgmma reads the address %#x, which is not in the block's shared memory", address);
            }
            if (chunk_at(self.rank, address).coming > 0) {
                fail(issued.site, "wgmma reads what the copy from %s is on its way to",
                     place(transfer_at(self.rank, address)).c_str());
            }
            check_fenced(self.rank, address, issued.site, "wgmma reads");
            chunk_at(self.rank, address).reading++;
        });
        group.committed.push_back({issued.product, issued.slot, issued.group, false, issued.site});
        if (copies_at_once()) {
            make(group, group.committed.back(), i);
        }
    }
    group.groups++;
    let_go();
}

size_t wait_products(unsigned pending, Site site) {
    Thread &self = current();
    Warpgroup &group = warpgroup_of(self);
    if (gather(Meeting::retire, site)) {
        Quiet quiet;
        size_t ended = 0;
        while (ended < group.committed.size() && group.committed[ended].group + pending < group.groups) {
            Committed &one = group.committed[ended];
            if (!one.made) {
                make(group, one, ended);
            }
            each_piece_of(one.product, [&](uint32_t address) { chunk_at(self.rank, address).reading--; });
            ended++;
        }
        group.committed.erase(group.committed.begin(), group.committed.begin() + long(ended));
        let_go();
    }
    Quiet quiet;
    self.ended_products.clear();
    size_t ended = 0;
    while (ended < self.products.size() && self.products[ended].group + pending < self.product_group) {
        const Issued &issued = self.products[ended];
        if (issued.product.a != nullptr && std::memcmp(issued.a, issued.product.a, sizeof issued.a) != 0) {
            fail(issued.site, "registers that wgmma reads were changed before the wait for it");
        }
        for (size_t i = 0; i < self.held.size(); i++) {
            Held &held = self.held[i];
            if (held.slot != issued.slot || --held.pending > 0) {
                continue;
            }
            for (int k = 0; k < held.columns / 2; k++) {
                if (std::memcmp(&held.d[k], &TAKEN, sizeof TAKEN) != 0) {
                    fail(issued.site, "sums were changed before the wait for the wgmma that makes them");
                }
                held.d[k] = group.sums[held.slot][size_t(row_of(self.number, k) * MOST_COLUMNS + column_of(self.number, k))];
            }
            self.fences_at_return = self.fences;
            self.held.erase(self.held.begin() + long(i));
            break;
        }
        self.ended_products.push_back(issued.product);
        ended++;
    }
    self.products.erase(self.products.begin(), self.products.begin() + long(ended));
    return ended;
}

const Product &ended_product(size_t which) { return current().ended_products[which]; }

size_t operand_pieces(const Product &product) {
    return size_t(product.columns) * 2 + (product.a == nullptr ? ROWS * 2 : 0);
}

const void *operand_piece(const Product &product, size_t which, Site site) {
    const bool of_b = which < size_t(product.columns) * 2;
    const uint32_t piece = uint32_t(of_b ? which : which - size_t(product.columns) * 2);
    const bool transposed = of_b ? product.b_transposed : product.a_transposed;
    const uint32_t row = transposed ? piece / DEPTH * 8 : piece / 2, k = transposed ? piece % DEPTH : piece % 2 * 8;
    const uint32_t address = piece_address(Operand(of_b ? product.b_place : product.a_place), transposed, row, k);
    const void *const memory = shared_at(current().rank, address, CHUNK);
    if (memory == nullptr) {
        fail(site, "wgmma reads the address %#x, which is not in the block's shared memory", address);
    }
    return memory;
}

void begin_products() {
    const size_t most = size_t(current_run().cluster) * (MAX_THREADS / GROUP);
    while (warpgroups.size() < most) {
        warpgroups.push_back(std::make_unique<Warpgroup>());
    }
    for (const auto &group : warpgroups) {
        group->committed.clear();
        group->groups = 0;
    }
}

void check_products(const Thread &thread) {
    if (!thread.products.empty()) {
        fail(thread.products.front().site, "%zu products begin, of which this is the first, and nobody waits for them",
             thread.products.size());
    }
}

Site product_at(unsigned rank, uint32_t address) {
    for (unsigned i = 0; i < MAX_THREADS / GROUP; i++) {
        const unsigned at = rank * (MAX_THREADS / GROUP) + i;
        if (at >= warpgroups.size()) {
            break;
        }
        for (const Committed &one : warpgroups[at]->committed) {
            bool here = false;
            each_piece_of(one.product, [&](uint32_t other) { here |= other / CHUNK == address / CHUNK; });
            if (here) {
                return one.site;
            }
        }
    }
    return {nullptr, 0};
}

}  // namespace emulator
