// Memory of the mock driver: allocations with guard bytes around them, copies and fills.
//
// Fresh memory is 0xff in every byte, which is NaN as a float and -1 as an index, so that reading what nobody
// wrote shows. Freed memory is filled with another pattern and kept for a while, so that a late write shows.
#include "driver.h"

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(at, bytes) ASAN_POISON_MEMORY_REGION(at, bytes)
#define UNPOISON(at, bytes) ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#else
#define POISON(at, bytes) ((void)(at), (void)(bytes))
#define UNPOISON(at, bytes) ((void)(at), (void)(bytes))
#endif

namespace mock {

// A row of most matrices in the tests: an index that is off by one row still lands in a guard.
constexpr size_t GUARD = 1024;
constexpr unsigned char GUARD_BYTE = 0xc3, FRESH = 0xff, FREED = 0xdb;
// What a device promises.
constexpr size_t ALIGNMENT = 256;
// Freed memory is looked at after each launch: enough to hold the buffers of a test, too little to be slow.
constexpr size_t QUARANTINE_BYTES = 2 << 20;

unsigned char* Allocation::payload() const { return block + GUARD; }

namespace {

struct Memory {
    // By address of the payload.
    std::map<uintptr_t, Allocation> live;
    std::deque<Allocation> freed;
    size_t device_bytes = 0, freed_bytes = 0;
};
Memory& memory() {
    static Memory* memory = new Memory;
    return *memory;
}

size_t block_bytes(size_t bytes) { return (GUARD + bytes + GUARD + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// Reads what is poisoned for everybody else.
__attribute__((no_sanitize("address"))) bool all(const unsigned char* at, size_t bytes, unsigned char value) {
    const uint64_t wide = 0x0101010101010101ull * value;
    uint64_t difference = 0;
    size_t i = 0;
    for (; i < bytes && reinterpret_cast<uintptr_t>(at + i) % 8; i++) difference |= at[i] ^ value;
    for (; i + 8 <= bytes; i += 8) difference |= *reinterpret_cast<const uint64_t*>(at + i) ^ wide;
    for (; i < bytes; i++) difference |= at[i] ^ value;
    return difference == 0;
}

std::string describe(const Allocation& a) {
    char text[96];
    snprintf(text, sizeof text, "allocation of %zu bytes at %p", a.bytes, static_cast<void*>(a.payload()));
    return text;
}

// Empty, or what is damaged. The range after the payload reaches to the end of the block.
std::string damage_of(const Allocation& a) {
    const unsigned char* end = a.payload() + a.bytes;
    if (!all(a.block, GUARD, GUARD_BYTE)) return "write before the " + describe(a);
    if (!all(end, a.block + block_bytes(a.bytes) - end, GUARD_BYTE)) return "write past the " + describe(a);
    return "";
}

void release(const Allocation& a) {
    UNPOISON(a.block, block_bytes(a.bytes));
    free(a.block);
}

Result allocate(uint64_t* address, size_t bytes, bool host) {
    Memory& m = memory();
    if (!host && bytes > state().device.memory - std::min(m.device_bytes, state().device.memory)) return OUT_OF_MEMORY;
    auto* block = static_cast<unsigned char*>(aligned_alloc(ALIGNMENT, block_bytes(bytes)));
    if (!block) return OUT_OF_MEMORY;
    Allocation a{block, bytes, host};
    memset(block, GUARD_BYTE, block_bytes(bytes));
    memset(a.payload(), FRESH, bytes);
    POISON(block, GUARD);
    POISON(a.payload() + bytes, block_bytes(bytes) - GUARD - bytes);
    *address = reinterpret_cast<uintptr_t>(a.payload());
    m.live[*address] = a;
    if (!host) m.device_bytes += bytes;
    return SUCCESS;
}

Result give_back(uint64_t address) {
    Memory& m = memory();
    auto found = m.live.find(address);
    if (found == m.live.end()) {
        for (auto& a : m.freed)
            if (reinterpret_cast<uintptr_t>(a.payload()) == address) complain("freed twice: " + describe(a));
        return INVALID_VALUE;
    }
    Allocation a = found->second;
    std::string damaged = damage_of(a);
    m.live.erase(found);
    if (!a.host) m.device_bytes -= a.bytes;
    memset(a.payload(), FREED, a.bytes);
    POISON(a.block, block_bytes(a.bytes));
    m.freed.push_back(a);
    m.freed_bytes += a.bytes;
    while (m.freed_bytes > QUARANTINE_BYTES) {
        m.freed_bytes -= m.freed.front().bytes;
        release(m.freed.front());
        m.freed.pop_front();
    }
    // What a launch has reported is not said again.
    if (damaged.empty() || state().sticky != SUCCESS) return SUCCESS;
    complain(damaged + ", seen as it is freed");
    return state().sticky = ILLEGAL_ADDRESS;
}

}  // namespace

std::string damage() {
    for (auto& entry : memory().live)
        if (std::string damaged = damage_of(entry.second); !damaged.empty()) return damaged;
    for (auto& a : memory().freed) {
        if (!all(a.payload(), a.bytes, FREED)) return "write to the freed " + describe(a);
        if (std::string damaged = damage_of(a); !damaged.empty()) return damaged;
    }
    return "";
}

static const Allocation* allocation_of(uint64_t address, size_t bytes) {
    auto after = memory().live.upper_bound(address);
    if (after == memory().live.begin()) return nullptr;
    const Allocation& a = std::prev(after)->second;
    uint64_t offset = address - reinterpret_cast<uintptr_t>(a.payload());
    return offset <= a.bytes && bytes <= a.bytes - offset ? &a : nullptr;
}

void* device_range(uint64_t address, size_t bytes) {
    if (allocation_of(address, bytes)) return reinterpret_cast<void*>(address);
    char text[80];
    snprintf(text, sizeof text, "%zu bytes at 0x%llx are not inside an allocation", bytes, (unsigned long long)address);
    complain(text);
    return nullptr;
}

static bool page_locked(const void* host) {
    const Allocation* a = allocation_of(reinterpret_cast<uintptr_t>(host), 1);
    return a && a->host;
}

size_t live_allocations() { return memory().live.size(); }
size_t live_bytes() {
    size_t bytes = 0;
    for (auto& entry : memory().live) bytes += entry.second.bytes;
    return bytes;
}

void free_everything() {
    for (auto& entry : memory().live) release(entry.second);
    for (auto& a : memory().freed) release(a);
    memory() = Memory();
}

}  // namespace mock

using namespace mock;

// ---- Allocation.

API int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    ENTER(Kind::Allocation);
    if (Result refused = refuse_in_capture()) return refused;
    if (bytes == 0) return INVALID_VALUE;
    return allocate(address, bytes, false);
}

API int cuMemAllocAsync(uint64_t* address, size_t bytes, void* handle) {
    ENTER(Kind::Allocation);
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    // A device would make the allocation a step of the graph; nothing here means to allocate in a step.
    if (Result refused = refuse_in_capture_of(stream)) return refused;
    return allocate(address, bytes, false);
}

API int cuMemFree_v2(uint64_t address) {
    Call call(__func__, Kind::Any);
    if (address == 0) return call.result;
    if (!call) {
        if (Result refused = refuse_in_capture()) return refused;
        call.result = drain();
    }
    // What a program gives back counts as given back, even on a device that is lost.
    Result freed = give_back(address);
    return call ? call.result : freed;
}

API int cuMemFreeAsync(uint64_t address, void* handle) {
    Call call(__func__, Kind::Any);
    Stream* stream = stream_of(handle);
    if (call || !stream) {
        give_back(address);
        return call ? call.result : INVALID_HANDLE;
    }
    if (Result refused = refuse_in_capture_of(stream)) return refused;
    if (address == 0) return SUCCESS;
    if (!allocation_of(address, 0)) return give_back(address);
    return submit(stream, [address] { return give_back(address); });
}

API int cuMemGetInfo_v2(size_t* available, size_t* total) {
    ENTER(Kind::Any);
    *total = state().device.memory;
    *available = *total - std::min(*total, memory().device_bytes);
    return SUCCESS;
}

API int cuMemHostAlloc(void** host, size_t bytes, unsigned) {
    ENTER(Kind::Allocation);
    if (Result refused = refuse_in_capture()) return refused;
    uint64_t address = 0;
    Result result = allocate(&address, bytes, true);
    *host = reinterpret_cast<void*>(address);
    return result;
}
API int cuMemAllocHost_v2(void** host, size_t bytes) { return cuMemHostAlloc(host, bytes, 0); }

API int cuMemFreeHost(void* host) { return cuMemFree_v2(reinterpret_cast<uintptr_t>(host)); }

// With unified addressing the device's address is the host's.
API int cuMemHostGetDevicePointer_v2(uint64_t* address, void* host, unsigned) {
    ENTER(Kind::Any);
    if (!page_locked(host)) return INVALID_VALUE;
    *address = reinterpret_cast<uintptr_t>(host);
    return SUCCESS;
}

// Registered memory is usable by its own address already; the driver has nothing to remember about it.
API int cuMemHostRegister_v2(void*, size_t, unsigned) {
    ENTER(Kind::Allocation);
    return refuse_in_capture();
}
API int cuMemHostUnregister(void*) {
    ENTER(Kind::Any);
    return SUCCESS;
}

// ---- Copies and fills. Ranges are checked as they are submitted and the memory is looked up again as they run,
// for a graph may run after its memory is gone.

namespace {

Result to_device(Stream* stream, uint64_t to, const void* from, size_t bytes) {
    if (bytes == 0) return SUCCESS;
    if (!device_range(to, bytes)) return INVALID_VALUE;
    if (stream && !stream->capture && state().lazy && !page_locked(from)) {
        // Pageable memory is staged before the call returns.
        auto* first = static_cast<const unsigned char*>(from);
        auto staged = std::make_shared<std::vector<unsigned char>>(first, first + bytes);
        return submit(stream, [=] {
            void* at = device_range(to, bytes);
            if (at) memcpy(at, staged->data(), bytes);
            return at ? SUCCESS : ILLEGAL_ADDRESS;
        });
    }
    return submit(stream, [=] {
        void* at = device_range(to, bytes);
        if (at) memcpy(at, from, bytes);
        return at ? SUCCESS : ILLEGAL_ADDRESS;
    });
}

Result to_host(Stream* stream, void* to, uint64_t from, size_t bytes) {
    if (bytes == 0) return SUCCESS;
    if (!device_range(from, bytes)) return INVALID_VALUE;
    Result result = submit(stream, [=] {
        void* at = device_range(from, bytes);
        if (at) memcpy(to, at, bytes);
        return at ? SUCCESS : ILLEGAL_ADDRESS;
    });
    // Pageable memory is filled before the call returns.
    if (result == SUCCESS && !stream->capture && !page_locked(to)) return drain();
    return result;
}

Result on_device(Stream* stream, uint64_t to, uint64_t from, size_t bytes) {
    if (bytes == 0) return SUCCESS;
    if (!device_range(to, bytes) || !device_range(from, bytes)) return INVALID_VALUE;
    return submit(stream, [=] {
        void *at = device_range(to, bytes), *source = device_range(from, bytes);
        if (!at || !source) return ILLEGAL_ADDRESS;
        memmove(at, source, bytes);
        return SUCCESS;
    });
}

template <class T>
Result fill(Stream* stream, uint64_t to, T value, size_t count) {
    if (count == 0) return SUCCESS;
    if (to % sizeof(T) || !device_range(to, count * sizeof(T))) return INVALID_VALUE;
    return submit(stream, [=] {
        auto* at = static_cast<T*>(device_range(to, count * sizeof(T)));
        if (!at) return ILLEGAL_ADDRESS;
        std::fill(at, at + count, value);
        return SUCCESS;
    });
}

// Then what was submitted is also waited for.
Result waited(Result submitted) { return submitted == SUCCESS ? drain() : submitted; }

}  // namespace

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    ENTER(Kind::Any);
    return to_device(stream_of(stream), to, from, bytes);
}
API int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    ENTER(Kind::Any);
    if (Result refused = refuse_in_capture()) return refused;
    return waited(to_device(&state().null_stream, to, from, bytes));
}

API int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    ENTER(Kind::Any);
    return to_host(stream_of(stream), to, from, bytes);
}
API int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    ENTER(Kind::Any);
    if (Result refused = refuse_in_capture()) return refused;
    return waited(to_host(&state().null_stream, to, from, bytes));
}

API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    ENTER(Kind::Any);
    return on_device(stream_of(stream), to, from, bytes);
}
API int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    ENTER(Kind::Any);
    if (Result refused = refuse_in_capture()) return refused;
    return waited(on_device(&state().null_stream, to, from, bytes));
}

API int cuMemsetD8Async(uint64_t to, unsigned char value, size_t count, void* stream) {
    ENTER(Kind::Any);
    return fill<unsigned char>(stream_of(stream), to, value, count);
}
API int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t count) {
    ENTER(Kind::Any);
    if (Result refused = refuse_in_capture()) return refused;
    return fill<unsigned char>(&state().null_stream, to, value, count);
}
API int cuMemsetD16Async(uint64_t to, unsigned short value, size_t count, void* stream) {
    ENTER(Kind::Any);
    return fill<unsigned short>(stream_of(stream), to, value, count);
}
API int cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void* stream) {
    ENTER(Kind::Any);
    return fill<unsigned>(stream_of(stream), to, value, count);
}
API int cuMemsetD32_v2(uint64_t to, unsigned value, size_t count) {
    ENTER(Kind::Any);
    if (Result refused = refuse_in_capture()) return refused;
    return fill<unsigned>(&state().null_stream, to, value, count);
}
