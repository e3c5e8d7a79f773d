// What the lanes of a warp find out about each other's integers.
#pragma once

#include "primitives.cuh"

#ifndef __CUDACC__
namespace emulator {

struct Compared {
    u32 value, result;
};

enum class Comparison { Greatest, Least, Same };

template <Comparison comparison>
void compare_lanes(void** lanes) {
    for (u32 lane = 0; lane < 32; lane++) {
        auto* mine = static_cast<Compared*>(lanes[lane]);
        if (!mine) continue;
        mine->result = comparison == Comparison::Same ? 0 : mine->value;
        for (u32 i = 0; i < 32; i++) {
            auto* other = static_cast<Compared*>(lanes[i]);
            if (!other) continue;
            if (comparison == Comparison::Greatest) mine->result = max(mine->result, other->value);
            if (comparison == Comparison::Least) mine->result = min(mine->result, other->value);
            if (comparison == Comparison::Same) mine->result |= u32(other->value == mine->value) << i;
        }
    }
}

template <Comparison comparison>
u32 compared(u32 value) {
    Compared mine{value, 0};
    warp_meet(ALL_LANES, &mine, compare_lanes<comparison>);
    return mine.result;
}

}  // namespace emulator
#endif

// The greatest and the least value of the warp's lanes.
DEVICE u32 greatest_of_lanes(u32 value) {
#ifdef __CUDACC__
    u32 r;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(value));
    return r;
#else
    return emulator::compared<emulator::Comparison::Greatest>(value);
#endif
}
DEVICE u32 least_of_lanes(u32 value) {
#ifdef __CUDACC__
    u32 r;
    asm volatile("redux.sync.min.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(value));
    return r;
#else
    return emulator::compared<emulator::Comparison::Least>(value);
#endif
}

// The lanes that have the same value, a bit for each.
DEVICE u32 lanes_with_same(u32 value) {
#ifdef __CUDACC__
    u32 r;
    asm volatile("match.any.sync.b32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(value));
    return r;
#else
    return emulator::compared<emulator::Comparison::Same>(value);
#endif
}

// The bits of the lanes before this one.
DEVICE u32 lanes_before() { return (1u << lane_id()) - 1; }
