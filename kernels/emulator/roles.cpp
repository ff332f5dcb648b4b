// Parts of a block that do different things: their barriers, by number, and their registers.
#include "block.h"

namespace emulator {
namespace {

void meet_all_lanes(Site site) {
    Slot slot = {};
    meet(Meeting::setmaxnreg, 0xffffffffu, slot, 0, 0, site);
}

}  // namespace

void named_barrier(unsigned number, unsigned threads, bool wait, Site site) {
    if (number == 0 || number >= NAMED) {
        fail(site, "the barrier %u, where there are 1 to %u", number, NAMED - 1);
    }
    if (threads == 0 || threads % LANES != 0 || threads > block_threads()) {
        fail(site, "a barrier for %u threads: whole warps of the block", threads);
    }
    Gathering &those = current_block().named[number];
    if (those.arrived > 0 && those.wanted != threads) {
        fail_at(site, "a barrier for " + std::to_string(threads) + " threads that is one for " +
                          std::to_string(those.wanted) + " at " + place(those.site));
    }
    const unsigned turn = those.turns % 2;
    race_release(&those.ends[turn]);
    those.wanted = threads;
    those.site = site;
    if (wait) {
        current().first = int(number);
        begin_waiting(Meeting::named, site);
    }
    if (++those.arrived == threads) {
        those.arrived = 0;
        those.turns++;
        wake(current().rank,
             [=](const Thread &thread) { return thread.meeting == Meeting::named && thread.first == int(number); });
    }
    if (wait) {
        yield();
        race_acquire(&those.ends[turn]);
    }
}

void set_registers(unsigned count, bool more, Site site) {
    Thread &self = current();
    Block &block = current_block();
    const unsigned warp = self.number / LANES;
    if (count % 8 != 0 || count < 24 || count > 256) {
        fail(site, "setmaxnreg to %u registers: a multiple of 8 from 24 to 256", count);
    }
    meet_all_lanes(site);
    uint32_t &mine = block.registers[warp];
    if (self.number % LANES == 0) {
        if (more ? count < mine : count > mine) {
            fail(site, "setmaxnreg to %u registers of a warp that has %u: that is not %s", count, mine,
                 more ? "more" : "fewer");
        }
        if (!more) {
            block.free_registers += (mine - count) * LANES;
            mine = count;
            wake(self.rank, [](const Thread &thread) { return thread.meeting == Meeting::registers; });
        }
        while (more && mine < count) {
            const uint32_t wanted = (count - mine) * LANES;
            if (wanted <= block.free_registers) {
                block.free_registers -= wanted;
                mine = count;
            } else {
                begin_waiting(Meeting::registers, site);
                yield();
            }
        }
    }
    meet_all_lanes(site);
    if (mine != count) {
        fail(site, "setmaxnreg to %u registers in a warp that takes %u", count, mine);
    }
}

}  // namespace emulator
