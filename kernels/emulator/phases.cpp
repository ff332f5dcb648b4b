// Barriers in shared memory: arrivals, and bytes that copies bring.
#include "block.h"

namespace emulator {
namespace {

constexpr int64_t MOST_BYTES = (1 << 20) - 1;  // that a barrier can expect

Phases *find(unsigned rank, const void *address) {
    Block &block = block_of(rank);
    for (unsigned i = 0; i < block.phases_made; i++) {
        if (block.phases[i].address == address) {
            return &block.phases[i];
        }
    }
    return nullptr;
}

// Of the block that runs, or, for an arrival from afar, of the one that has this memory.
Phases &phases_at(const void *address, Site site, unsigned *rank) {
    *rank = current().rank;
    Phases *phases = find(*rank, address);
    for (unsigned other = 0; phases == nullptr && other < current_run().cluster; other++) {
        phases = find(other, address);
        if (phases != nullptr && !phases->known) {
            fail_at(site, "another block's barrier, which nobody made known (fence.mbarrier_init)");
        }
        *rank = other;
    }
    if (phases == nullptr) {
        fail_at(site, "no barrier was made at this address");
    }
    return *phases;
}

// Ends the phase if nothing is missing.
void finish(unsigned rank, Phases &phases) {
    if (phases.missing > 0 || phases.bytes != 0) {
        return;
    }
    phases.missing = phases.arrivals;
    phases.over++;
    wake(rank, [&](const Thread &thread) {
        return thread.meeting == Meeting::phase && thread.phases == &phases && thread.mask == (phases.over - 1) % 2;
    });
}

}  // namespace

void make_phases(void *address, uint32_t arrivals, Site site) {
    Block &block = current_block();
    if (arrivals == 0) {
        fail_at(site, "a barrier for no arrivals");
    }
    if (find(current().rank, address) != nullptr) {
        fail_at(site, "a barrier where there is one");
    }
    if (block.phases_made == MAX_PHASES) {
        fail_at(site, "more barriers than there is room for");
    }
    block.phases[block.phases_made++] = {address, arrivals, arrivals, 0, 0, current().place, false, site, {}};
}

void phases_known() {
    Block &block = current_block();
    for (unsigned i = 0; i < block.phases_made; i++) {
        block.phases[i].known |= block.phases[i].maker == current().place;
    }
}

void arrive(void *address, Site site) {
    unsigned rank;
    Phases &phases = phases_at(address, site, &rank);
    race_release(&phases.ends[phases.over % 2]);
    if (phases.missing == 0) {
        fail_at(site, "one arrival more than the barrier was made for, while it waits for " + std::to_string(phases.bytes) +
                          " bytes expected at " + place(phases.expected));
    }
    phases.missing--;
    if (phases.missing == 0 && phases.bytes < 0) {
        fail_at(site, "the last arrival, and " + std::to_string(-phases.bytes) + " bytes came that nobody expected");
    }
    finish(rank, phases);
}

void expect(void *address, uint32_t bytes, Site site) {
    unsigned rank;
    Phases &phases = phases_at(address, site, &rank);
    phases.bytes += bytes;
    phases.expected = site;
    if (phases.bytes > MOST_BYTES) {
        fail_at(site, std::to_string(phases.bytes) + " bytes expected, " + std::to_string(MOST_BYTES) + " can be");
    }
    finish(rank, phases);
}

void check_known(unsigned rank, const void *barrier, Site site) {
    const Phases *const phases = find(rank, barrier);
    if (phases == nullptr) {
        fail_at(site, "no barrier was made at this address");
    }
    if (!phases->known) {
        fail_at(site, "a copy for a barrier that its maker has not made known (fence.mbarrier_init)");
    }
}

void announce_to(unsigned rank, const void *barrier) {
    Phases &phases = *find(rank, barrier);
    race_release(&phases.ends[phases.over % 2]);
}

void receive(unsigned rank, const void *barrier, uint32_t bytes, Site site) {
    Phases &phases = *find(rank, barrier);
    phases.bytes -= bytes;
    if (phases.missing == 0 && phases.bytes < 0) {
        fail_outside(site, "a copy that brings " + std::to_string(-phases.bytes) + " bytes more than were expected at " +
                               place(phases.expected));
    }
    finish(rank, phases);
}

std::string missing(const Thread &thread) {
    const Phases &phases = *static_cast<const Phases *>(thread.phases);
    std::string text = ", " + std::to_string(phases.missing) + " arrivals";
    if (phases.bytes != 0) {
        text += " and " + std::to_string(phases.bytes) + " bytes, expected at " + place(phases.expected) + ",";
    }
    return text + " missing";
}

void wait_phase(void *address, uint32_t parity, Site site) {
    if (parity > 1) {
        fail_at(site, "a parity of " + std::to_string(parity));
    }
    unsigned rank;
    Phases &phases = phases_at(address, site, &rank);
    if (rank != current().rank) {
        fail_at(site, "a wait at another block's barrier");
    }
    // The phase that goes on has the parity of `over`.
    if (phases.over % 2 == parity) {
        Thread &self = current();
        self.mask = parity;
        self.phases = &phases;
        begin_waiting(Meeting::phase, site);
        yield();
    }
    race_acquire(&phases.ends[parity]);
}

}  // namespace emulator
