// Memory in which blocks leave their sums for another one, which adds them up.
#pragma once

#include "common/types.cuh"

// All of it may hold anything before. There is a signal for each place that sums of a block have.
struct Workspace {
    float *sums;
    u64 *signals;  // `token` once the sums are there, and 0 when they were read
    u64 token;     // of this launch alone
};

// By one thread, once all have stored the sums of a place, and met.
__device__ inline void signal_sums(const Workspace &workspace, i64 place) {
    signal(workspace.signals + place, workspace.token);
}

// By one thread, for all: until there are sums, of a block that has started before.
__device__ inline void wait_for_sums(const Workspace &workspace, i64 place) {
    wait_for_signal(workspace.signals + place, workspace.token);
    // So that a graph that is launched again finds none.
    workspace.signals[place] = 0;
}

// The same by a warp.
__device__ inline void wait_for_sums_by_warp(const Workspace &workspace, i64 place, int lane) {
    wait_for_signal_by_warp(workspace.signals + place, workspace.token);
    __syncwarp();
    if (lane == 0) {
        workspace.signals[place] = 0;
    }
}
