#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(p, n)
#endif

#if !defined(__x86_64__)
#error "the fibers of the emulator are written for x86-64"
#endif

namespace emulator {
namespace {

// Saves the callee's registers on its stack and goes on where `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch,.-emulator_switch
)");

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK_BYTES = 256 << 10;
// The sanitizer has red zones of its own, which these would hide.
constexpr size_t CANARY_BYTES = 0;
#else
constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t CANARY_BYTES = 64;
#endif
constexpr unsigned char FRESH = 0xCD, CANARY = 0xA5;
constexpr unsigned BARRIERS = 16;
constexpr unsigned PATIENCE = 1 << 20;

struct Copy {
    void* to;
    const void* from;
    unsigned size, bytes;

    void land() const {
        memcpy(to, from, bytes);
        memset(static_cast<char*>(to) + bytes, 0, size - bytes);
    }
};

enum class State { Ready, Waiting, Done };

struct Thread {
    void* stack_pointer;
    State state;
    Place place;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

// A collective operation that some lanes have reached.
struct Meeting {
    uint64_t mask[2], arrived[2];
    Compute compute;
    void* arguments[128];

    bool overlaps(const uint64_t (&other)[2]) const { return (mask[0] & other[0]) || (mask[1] & other[1]); }
    // While some warps wait for their group, the others may still be at something of their own.
    bool conflicts(const uint64_t (&other)[2]) const { return overlaps(other) && whole(mask) == whole(other); }
    static bool whole(const uint64_t (&mask)[2]) { return (mask[0] & mask[1]) == ~uint64_t(0); }
    bool same(const uint64_t (&other)[2]) const { return mask[0] == other[0] && mask[1] == other[1]; }
    bool complete() const { return mask[0] == arrived[0] && mask[1] == arrived[1]; }
};

struct Barrier {
    unsigned count = 0, arrived = 0;
    std::vector<unsigned> waiting;
};

struct SharedArray {
    const void* key;
    unsigned char* data;
    size_t bytes;
};

struct Phase {
    unsigned count = 0, left = 0;
    int64_t bytes = 0;
    unsigned parity = 0;
    std::vector<Copy> copies;
};

struct Block {
    std::vector<Thread> threads;
    // By warp group: what its lanes are in the middle of.
    std::vector<std::vector<Meeting>> meetings;
    Barrier barriers[BARRIERS];
    std::vector<SharedArray> arrays;
    std::map<uint64_t*, Phase> phases;
    SharedArray dynamic;
    std::vector<unsigned> ready, next;
    void* scheduler;
    unsigned current;
    // Times that threads gave way since one of them got on.
    unsigned idle = 0;
    const std::function<void()>* body;
    std::string error;

    Thread& thread() { return threads[current]; }
};

thread_local Block* block;

std::map<std::string, KernelEntry>& kernels() {
    static std::map<std::string, KernelEntry> kernels;
    return kernels;
}

void to_scheduler() { emulator_switch(&block->thread().stack_pointer, block->scheduler); }

void wait() {
    block->thread().state = State::Waiting;
    to_scheduler();
}

void wake(unsigned rank) {
    block->idle = 0;
    block->threads[rank].state = State::Ready;
    block->next.push_back(rank);
}

void thread_main() {
    (*block->body)();
    block->thread().state = State::Done;
    to_scheduler();
    __builtin_unreachable();
}

SharedArray make_array(const void* key, size_t bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 128, bytes + CANARY_BYTES)) abort();
    memset(data, FRESH, bytes);
    memset(static_cast<char*>(data) + bytes, CANARY, CANARY_BYTES);
    return {key, static_cast<unsigned char*>(data), bytes};
}

void check_array(Block& block, const SharedArray& array) {
    for (size_t i = 0; i < CANARY_BYTES && block.error.empty(); i++)
        if (array.data[array.bytes + i] != CANARY)
            block.error = "write past a shared array of " + std::to_string(array.bytes) + " bytes";
    free(array.data);
}

void prepare(Block& block, unsigned char* stacks, const Place& first) {
    const dim3 dim = first.block_dim;
    unsigned count = dim.x * dim.y * dim.z;
    block.threads.resize(count);
    block.meetings.resize((count + 127) / 128);
    for (unsigned rank = 0; rank < count; rank++) {
        Thread& thread = block.threads[rank];
        thread.state = State::Ready;
        thread.place = first;
        thread.place.rank = rank;
        thread.place.thread = dim3(rank % dim.x, rank / dim.x % dim.y, rank / (dim.x * dim.y));
        // As if `thread_main` had been called and switched away from: six registers and where to go on.
        auto** top = reinterpret_cast<void**>(stacks + STACK_BYTES * (rank + 1));
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(thread_main);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        thread.stack_pointer = top;
        block.next.push_back(rank);
    }
}

std::string stuck(const Block& block) {
    unsigned done = 0, warps = 0, barriers = 0;
    for (const Thread& thread : block.threads) done += thread.state == State::Done;
    for (const auto& meetings : block.meetings) warps += meetings.size();
    for (const Barrier& barrier : block.barriers) barriers += barrier.waiting.size();
    const dim3& at = block.threads[0].place.block;
    return "deadlock in block " + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) +
           ": of " + std::to_string(block.threads.size()) + " threads " + std::to_string(done) + " are done, " +
           std::to_string(barriers) + " wait at a barrier, and " + std::to_string(warps) +
           " collective operations lack lanes";
}

struct Random {
    uint64_t state;

    uint64_t operator()() {
        state ^= state << 13;
        state ^= state >> 7;
        return state ^= state << 17;
    }

    template <class T>
    void shuffle(std::vector<T>& items) {
        for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[(*this)() % i]);
    }
};

template <class T>
void arrange(std::vector<T>& items, const Schedule& schedule, Random& random) {
    switch (schedule.order) {
        case Order::Forward: std::sort(items.begin(), items.end()); break;
        case Order::Reverse: std::sort(items.begin(), items.end(), std::greater<T>()); break;
        case Order::Random: random.shuffle(items); break;
    }
}

std::string run_block(const Place& first, size_t dynamic_bytes, const std::function<void()>& body,
                      unsigned char* stacks, const Schedule& schedule, uint64_t seed) {
    Block mine{};
    block = &mine;
    mine.body = &body;
    mine.dynamic = make_array(nullptr, dynamic_bytes);
    prepare(mine, stacks, first);
    Random random{seed};
    while (!mine.next.empty() && mine.error.empty()) {
        std::swap(mine.ready, mine.next);
        mine.next.clear();
        arrange(mine.ready, schedule, random);
        for (unsigned rank : mine.ready) {
            mine.current = rank;
            emulator_switch(&mine.scheduler, mine.threads[rank].stack_pointer);
            if (!mine.error.empty()) break;
        }
    }
    bool done = std::all_of(mine.threads.begin(), mine.threads.end(),
                            [](const Thread& thread) { return thread.state == State::Done; });
    if (!done && mine.error.empty()) mine.error = stuck(mine);
    check_array(mine, mine.dynamic);
    for (const SharedArray& array : mine.arrays) check_array(mine, array);
    block = nullptr;
    return mine.error;
}

// The threads of `mask` (by rank in the warp group) meet; `compute` gets the arguments from `first` on.
void meet(const uint64_t (&mask)[2], unsigned first, void* argument, Compute compute) {
    unsigned rank = block->current, member = rank % 128;
    auto& meetings = block->meetings[rank / 128];
    if (!(mask[member / 64] >> (member % 64) & 1)) fault("a lane takes part in an operation whose mask leaves it out");
    auto at = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.conflicts(mask); });
    if (at == meetings.end()) {
        meetings.push_back({{mask[0], mask[1]}, {0, 0}, compute, {}});
        at = meetings.end() - 1;
    }
    if (!at->same(mask) || at->compute != compute) fault("lanes of a warp meet in different operations");
    at->arguments[member] = argument;
    at->arrived[member / 64] |= uint64_t(1) << (member % 64);
    if (!at->complete()) return wait();
    compute(at->arguments + first);
    meetings.erase(at);
    for (unsigned other = 0; other < 128; other++)
        if (other != member && (mask[other / 64] >> (other % 64) & 1)) wake(rank - member + other);
}

void release(Barrier& barrier) {
    for (unsigned rank : barrier.waiting) wake(rank);
    barrier = {};
}

bool arrive(unsigned id, unsigned count) {
    if (id >= BARRIERS) fault("there are 16 barriers");
    Barrier& barrier = block->barriers[id];
    if (barrier.arrived && barrier.count != count) fault("threads disagree on how many meet at a barrier");
    barrier.count = count;
    return ++barrier.arrived == count;
}

Phase& phase_of(uint64_t* barrier) {
    auto at = block->phases.find(barrier);
    if (at == block->phases.end()) fault("a barrier in shared memory that was not initialised");
    return at->second;
}

// A phase ends when no arrival and no byte is missing.
void end_if_complete(Phase& phase) {
    if (phase.left || phase.bytes) return;
    block->idle = 0;
    phase.parity ^= 1;
    phase.left = phase.count;
}

bool aligned(const void* at, unsigned bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

}  // namespace

bool register_kernel(const char* name, KernelEntry entry) { return kernels().emplace(name, entry).second; }

const KernelEntry* find_kernel(const char* name) {
    auto at = kernels().find(name);
    return at == kernels().end() ? nullptr : &at->second;
}

std::string kernel_names() {
    std::string names;
    for (const auto& kernel : kernels()) names += kernel.first + "\n";
    return names;
}

std::string launch(dim3 grid, dim3 dim, size_t dynamic_bytes, const std::function<void()>& body,
                   const Schedule& schedule) {
    std::vector<size_t> blocks(size_t(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < blocks.size(); i++) blocks[i] = i;
    Random random{schedule.seed | 1};
    arrange(blocks, schedule, random);
    std::atomic<size_t> next{0};
    std::mutex mutex;
    std::string error;
    auto work = [&] {
        size_t bytes = STACK_BYTES * dim.x * dim.y * dim.z;
        void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        std::string mine = stacks == MAP_FAILED ? "no memory for stacks" : "";
        // What lay here before may have been poisoned. Threads that end leave nothing so.
        if (mine.empty()) ASAN_UNPOISON_MEMORY_REGION(stacks, bytes);
        for (size_t i; mine.empty() && (i = next++) < blocks.size();) {
            size_t b = blocks[i];
            dim3 at(b % grid.x, b / grid.x % grid.y, b / (size_t(grid.x) * grid.y));
            Place first{dim3(0, 0, 0), at, dim, grid, 0};
            mine = run_block(first, dynamic_bytes, body, static_cast<unsigned char*>(stacks), schedule,
                             (schedule.seed + b) * 0x9E3779B97F4A7C15u | 1);
        }
        if (stacks != MAP_FAILED) munmap(stacks, bytes);
        if (mine.empty()) return;
        next = blocks.size();
        std::lock_guard lock(mutex);
        if (error.empty()) error = mine;
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < std::min<size_t>(schedule.workers, blocks.size()); i++) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return error;
}

const Place& place() { return block->thread().place; }

void fault(const std::string& message) {
    block->error = message;
    to_scheduler();
    __builtin_unreachable();
}

void warp_meet(unsigned mask, void* argument, Compute compute) {
    // The lanes of a last warp that is not whole do not exist.
    unsigned warp = block->current / 32, lanes = std::min<size_t>(32, block->threads.size() - warp * 32);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    uint64_t wide[2] = {};
    unsigned shift = warp % 4 * 32;
    wide[shift / 64] = uint64_t(mask) << (shift % 64);
    meet(wide, shift, argument, compute);
}

void warpgroup_meet(void* argument, Compute compute) {
    if (block->threads.size() < (block->current / 128 + 1) * 128) fault("a warp group has 128 threads");
    const uint64_t all[2] = {~uint64_t(0), ~uint64_t(0)};
    meet(all, 0, argument, compute);
}

void barrier_wait(unsigned id, unsigned count) {
    if (arrive(id, count)) return release(block->barriers[id]);
    block->barriers[id].waiting.push_back(block->current);
    wait();
}

void barrier_arrive(unsigned id, unsigned count) {
    if (arrive(id, count)) release(block->barriers[id]);
}

void give_way() {
    if (++block->idle > PATIENCE) fault("threads wait for memory that nobody changes");
    block->next.push_back(block->current);
    to_scheduler();
}

void* shared(const void* key, size_t bytes) {
    for (const SharedArray& array : block->arrays)
        if (array.key == key) return array.data;
    block->arrays.push_back(make_array(key, bytes));
    return block->arrays.back().data;
}

void* dynamic_shared() { return block->dynamic.data; }

void copy_async(void* to, const void* from, unsigned size, unsigned bytes) {
    if (!aligned(to, size) || (bytes && !aligned(from, size))) fault("an asynchronous copy is not aligned");
    block->thread().open.push_back({to, from, size, bytes});
}

void copy_commit() {
    Thread& thread = block->thread();
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

void copy_wait(unsigned groups) {
    auto& under_way = block->thread().groups;
    while (under_way.size() > groups) {
        for (const Copy& copy : under_way.front()) copy.land();
        under_way.erase(under_way.begin());
    }
}

void mbarrier_init(uint64_t* barrier, unsigned count) {
    Phase phase;
    phase.count = phase.left = count;
    block->phases[barrier] = phase;
}

void mbarrier_expect(uint64_t* barrier, unsigned bytes) {
    phase_of(barrier).bytes += bytes;
    mbarrier_arrive(barrier);
}

void mbarrier_arrive(uint64_t* barrier) {
    Phase& phase = phase_of(barrier);
    if (phase.left == 0) fault("more arrivals at a barrier than it counts");
    phase.left--;
    end_if_complete(phase);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
    for (;;) {
        Phase& phase = phase_of(barrier);
        if (phase.parity != parity) return;
        for (const Copy& copy : phase.copies) {
            copy.land();
            phase.bytes -= copy.bytes;
        }
        // With nothing on its way the phase is complete, or waits for threads.
        if (std::exchange(phase.copies, {}).empty()) give_way();
        else end_if_complete(phase);
    }
}

void copy_bulk(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
    if (!aligned(to, 16) || !aligned(from, 16) || bytes % 16) fault("a bulk copy is not aligned");
    phase_of(barrier).copies.push_back({to, from, bytes, bytes});
}

}  // namespace emulator
