// Sums that several blocks share: each leaves its part in global memory, and the one that arrives last adds the
// parts in their own order, whichever order they came in.
#pragma once

#include "primitives.cuh"

// Four floats that another multiprocessor may have written in this launch: past the first-level cache.
DEVICE Float4 load_others(const Float4* at) {
#ifdef __CUDACC__
    Float4 r;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w)
                 : "l"(at)
                 : "memory");
    return r;
#else
    return *at;
#endif
}

// All threads of the block call this after their part is written. True in the block that is the last of `count`:
// it sees the parts of all. The counter is 0 before the first and after the last. `flag` is in shared memory.
DEVICE bool arrives_last(u32* counter, u32 count, u32* flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        bool last = atomicAdd(counter, 1u) == count - 1;
        if (last) *counter = 0;
        *flag = last;
    }
    __syncthreads();
    __threadfence();
    return *flag;
}
