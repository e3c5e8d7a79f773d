// What tests set and ask of the mock driver. The numbers of enums are those of driver.h.
#include "driver.h"

using namespace mock;

namespace {
std::lock_guard<std::recursive_mutex> hold() { return std::lock_guard<std::recursive_mutex>(state().lock); }
}  // namespace

// Everything but what is allocated: errors, injections, counts, the schedule, the pretend device.
API void mock_reset() {
    auto held = hold();
    State& s = state();
    s.device = Pretend();
    s.schedule = emulator::Schedule();
    s.lazy = false;
    s.queue.clear();
    s.sticky = s.pending = SUCCESS;
    s.lost = false;
    s.injection = Injection();
    for (uint64_t& calls : s.calls) calls = 0;
    s.injected_into.clear();
    s.last_message.clear();
    s.forgotten = 0;
}

// 0 forward, 1 reverse, 2 random by `seed`.
API void mock_set_schedule(int order, uint64_t seed, unsigned workers) {
    auto held = hold();
    state().schedule.order = emulator::Order(order);
    state().schedule.seed = seed;
    state().schedule.workers = workers;
}

API void mock_set_device(int major, int minor, int multiprocessors) {
    auto held = hold();
    state().device.major = major;
    state().device.minor = minor;
    state().device.multiprocessors = multiprocessors;
}

API void mock_set_device_count(int count) {
    auto held = hold();
    state().device.count = count;
}

// As cuDriverGetVersion has it: 12080 is CUDA 12.8.
API void mock_set_driver_version(int version) {
    auto held = hold();
    state().device.driver_version = version;
}

API void mock_set_memory(size_t bytes) {
    auto held = hold();
    state().device.memory = bytes;
}

// Then work runs when somebody waits for it and no sooner, and its errors show there.
API void mock_set_lazy(int lazy) {
    auto held = hold();
    drain();
    state().lazy = lazy != 0;
}

// The `n`-th call from now of a kind (0 any, 1 allocations, 2 launches; the first is 1) has the given result:
// 0 this once; 1 and every call after it too, as if the device were lost; 2 it returns success, and the error
// shows at the next call that waits.
API void mock_fail(int kind, uint64_t n, int result, int how) {
    auto held = hold();
    Injection& injection = state().injection;
    injection.armed = n > 0;
    injection.kind = Kind(kind);
    injection.countdown = n;
    injection.result = Result(result);
    injection.how = How(how);
}

// Calls of a kind since the last reset.
API uint64_t mock_calls(int kind) {
    auto held = hold();
    return state().calls[kind];
}

// The name of the call that was made to fail; empty if none was yet. Valid until the next call of any kind.
API const char* mock_injected_into() {
    auto held = hold();
    return state().injected_into.c_str();
}

// What the driver last printed. Valid until the next call of any kind.
API const char* mock_last_message() {
    auto held = hold();
    return state().last_message.c_str();
}

// The names of all emulated kernels, in lines. Valid until it is called again.
API const char* mock_kernels() {
    auto held = hold();
    static std::string names;
    names = emulator::kernel_names();
    return names.c_str();
}

// Lines of a kernel's name and an order: what has run to its end since this was last asked, which a reset does not
// change. Valid until it is called again.
API const char* mock_take_ran() {
    auto held = hold();
    static std::string lines;
    lines.clear();
    const char* orders[] = {"forward", "reverse", "random"};
    for (const auto& [name, order] : state().ran) lines += name + " " + orders[int(order)] + "\n";
    state().ran.clear();
    return lines.c_str();
}

API size_t mock_live_allocations() {
    auto held = hold();
    return live_allocations();
}

API size_t mock_live_bytes() {
    auto held = hold();
    return live_bytes();
}

// Streams, events, modules, graphs and retained contexts.
API size_t mock_live_objects() {
    auto held = hold();
    return live_objects() + state().retains;
}

// Allocations and objects that a program had not given back when its context ended, since the last reset.
API size_t mock_forgotten() {
    auto held = hold();
    return state().forgotten;
}
