// The CUDA execution model on the host, for kernels compiled as C++.
//
// Every CUDA thread is a fiber. The fibers of a block share one OS thread and give way where threads wait for
// each other: at barriers and in warp-wide operations. Blocks are independent and spread over a few OS threads.
// The order in which waiting threads go on is forward, reverse or random by seed: code that lacks a barrier
// gives another result in one of them. Copies that are asynchronous on a device land here when they are waited
// for and no sooner, in shared memory that was filled with a pattern: code that lacks a wait reads the pattern.
//
// Not seen here: bank conflicts, fences between proxies, weak memory order between blocks, speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

enum class Order { Forward, Reverse, Random };

// How threads and blocks take turns.
struct Schedule {
    Order order = Order::Forward;
    uint64_t seed = 1;
    unsigned workers = 2;
};

// Runs a grid to its end. Empty, or what went wrong first: a deadlock, a collective operation that the lanes
// of a warp do not reach together, a write past shared memory, a misaligned copy.
std::string launch(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& body,
                   const Schedule& schedule);

// ---- Kernels by name.

using Trampoline = void (*)(void** arguments);

struct KernelEntry {
    Trampoline run;
    // Of each parameter, in order.
    std::vector<size_t> sizes;
};

bool register_kernel(const char* name, KernelEntry entry);
// Null if there is none of the name.
const KernelEntry* find_kernel(const char* name);
// In lines.
std::string kernel_names();

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <auto kernel, class... A>
KernelEntry entry_of(void (*)(A...)) {
    return {[](void** arguments) { call(kernel, arguments, std::index_sequence_for<A...>{}); }, {sizeof(A)...}};
}

// ---- Where a thread is.

struct Place {
    dim3 thread, block, block_dim, grid_dim;
    // Number of the thread in its block.
    unsigned rank;
};

const Place& place();

// Ends the block with an error. Does not return.
[[noreturn]] void fault(const std::string& message);

// ---- Threads meeting.

// What the last lane to arrive computes for all: one argument per lane, null for those outside the mask.
using Compute = void (*)(void** arguments);

// All lanes of `mask` meet; the last to arrive runs `compute`. Lanes that meet must name the same operation.
void warp_meet(unsigned mask, void* argument, Compute compute);
// The same for the 128 threads of four consecutive warps.
void warpgroup_meet(void* argument, Compute compute);

// Barrier 0 to 15 of the block, complete when `count` threads have arrived.
void barrier_wait(unsigned id, unsigned count);
void barrier_arrive(unsigned id, unsigned count);

// Lets other threads of the block run: for loops that wait for memory to change.
void give_way();

// ---- Shared memory.

// The block's array named by `key`, made on first use.
void* shared(const void* key, size_t bytes);
void* dynamic_shared();

// ---- Asynchronous copies of one thread, in groups.

// Copies `bytes` and fills the rest of `size` with zeros; lands when waited for.
void copy_async(void* to, const void* from, unsigned size, unsigned bytes);
void copy_commit();
// Until at most `groups` are left.
void copy_wait(unsigned groups);

// ---- Barriers in shared memory that count bytes and arrivals (mbarrier), and bulk copies.

void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_expect(uint64_t* barrier, unsigned bytes);
void mbarrier_arrive(uint64_t* barrier);
// Waits until the phase of this parity is over.
void mbarrier_wait(uint64_t* barrier, unsigned parity);
// Lands when some thread waits for the phase that it belongs to.
void copy_bulk(void* to, const void* from, unsigned bytes, uint64_t* barrier);

}  // namespace emulator

// ---- The words of CUDA C++.

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define threadIdx (emulator::place().thread)
#define blockIdx (emulator::place().block)
#define blockDim (emulator::place().block_dim)
#define gridDim (emulator::place().grid_dim)

inline void __syncthreads() {
    const dim3& d = emulator::place().block_dim;
    emulator::barrier_wait(0, d.x * d.y * d.z);
}
inline void __syncwarp(unsigned mask = ~0u) {
    emulator::warp_meet(mask, &mask, [](void**) {});
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { emulator::give_way(); }

namespace emulator {

template <class T>
struct Exchange {
    T value, result;
    unsigned from;
};

// Every lane gets the value of the lane that it names.
template <class T>
T exchange(unsigned mask, T value, unsigned from) {
    Exchange<T> mine{value, value, from & 31};
    warp_meet(mask, &mine, [](void** lanes) {
        for (unsigned lane = 0; lane < 32; lane++)
            if (auto* to = static_cast<Exchange<T>*>(lanes[lane]))
                // Of a lane that takes no part the value is undefined on a device.
                if (auto* from = static_cast<Exchange<T>*>(lanes[to->from])) to->result = from->value;
    });
    return mine.result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    int lane = emulator::place().rank & 31;
    return emulator::exchange(mask, value, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return emulator::exchange(mask, value, (emulator::place().rank & 31) ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
    int lane = emulator::place().rank & 31;
    return emulator::exchange(mask, value, lane < by ? lane : lane - by);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
    int lane = emulator::place().rank & 31;
    return emulator::exchange(mask, value, lane + by > 31 ? lane : lane + by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    struct Vote {
        int predicate;
        unsigned votes;
    } mine{predicate, 0};
    emulator::warp_meet(mask, &mine, [](void** lanes) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < 32; lane++)
            if (auto* vote = static_cast<Vote*>(lanes[lane])) votes |= unsigned(vote->predicate != 0) << lane;
        for (unsigned lane = 0; lane < 32; lane++)
            if (auto* vote = static_cast<Vote*>(lanes[lane])) vote->votes = votes;
    });
    return mine.votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T atomicAdd(T* at, T value) {
    static_assert(std::is_integral_v<T>, "sums of floats have a fixed order");
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicExch(T* at, T value) {
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicOr(T* at, T value) {
    return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicMax(T* at, T value) {
    T old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}

inline float __uint_as_float(unsigned x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline unsigned __float_as_uint(float x) {
    unsigned u;
    memcpy(&u, &x, 4);
    return u;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
