// The mock driver, libcuda.so.1: the calls of the CUDA driver that this project makes, over host memory and
// emulated kernels. Unmodified host code runs on it, so what only shows on a machine with a GPU is seen on any.
//
//   driver.cpp          devices, contexts, streams, events, what errors are called
//   driver_memory.cpp   allocations with guard bytes around them, copies, fills
//   driver_launch.cpp   modules, functions, launches within the limits of the pretend device
//   driver_graph.cpp    stream capture as record and replay
//   driver_control.cpp  mock_*: what a test sets and asks
//
// One lock guards everything, and work runs on the thread that asks for it: either as it is submitted, or, when
// set to be lazy, as late as a real device may run it, which is when somebody waits.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "emulator.h"

#define API extern "C" __attribute__((visibility("default")))

namespace mock {

// The values of CUresult.
enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_PTX = 218,
    UNSUPPORTED_PTX_VERSION = 222,
    FILE_NOT_FOUND = 301,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_FAILED = 719,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

// A piece of device work. It may run many times, when it is part of a graph.
using Work = std::function<Result()>;

enum class CaptureMode { Global = 0, ThreadLocal = 1, Relaxed = 2 };

struct Capture;

struct Stream {
    // Waits for the null stream and the null stream for it.
    bool blocking = true;
    int priority = 0;
    // Set between the begin and the end of a capture.
    std::shared_ptr<Capture> capture;
};

struct Event {
    bool timed = true;
    bool recorded = false;
    // False while the record waits to be run.
    bool complete = true;
    std::chrono::steady_clock::time_point at;
    // Set if the last record was part of a capture: other streams join it by waiting for this event.
    std::weak_ptr<Capture> capture;
    Stream* captured_from = nullptr;
};

struct Capture {
    Stream* origin;
    CaptureMode mode;
    std::thread::id thread;
    uint64_t id;
    bool invalid = false;
    std::vector<Work> work;
    // All streams that take part, and those whose last work no other one has waited for.
    std::set<Stream*> members, unjoined;
};

struct Graph {
    std::vector<Work> work;
};

struct Function {
    std::string name;
    const emulator::KernelEntry* kernel = nullptr;
    int static_shared = 0;
    int max_threads = 1024;
    int max_dynamic_shared = 48 << 10;
};

struct Module {
    // An image that is not text could hold any kernel.
    bool any = false;
    // By name: what the text declares, or of what is not text, what has been asked for.
    std::map<std::string, Function> functions;
};

// What the device pretends to be.
struct Pretend {
    int count = 1;
    int major = 9, minor = 0;
    int multiprocessors = 132;
    int driver_version = 12080;
    size_t memory = size_t(80) << 30;

    int shared_per_multiprocessor() const;
    int shared_per_block_optin() const;
    int threads_per_multiprocessor() const;
    int blocks_per_multiprocessor() const;
};

// What kind of call fails: the numbers are part of the control interface.
enum class Kind { Any = 0, Allocation = 1, Launch = 2 };
enum class How { Once = 0, Forever = 1, Later = 2 };

struct Injection {
    bool armed = false;
    Kind kind = Kind::Any;
    How how = How::Once;
    uint64_t countdown = 0;
    Result result = SUCCESS;
};

struct State {
    std::recursive_mutex lock;
    bool initialized = false;
    Pretend device;
    emulator::Schedule schedule;
    // Work waits until somebody waits for it.
    bool lazy = false;
    std::deque<Work> queue;

    // The error of the context: once set, every call returns it. A lost device returns it to the next one too.
    Result sticky = SUCCESS;
    bool lost = false;
    // An error that only a call that waits reports; it is sticky from then on.
    Result pending = SUCCESS;
    Injection injection;
    uint64_t calls[3] = {0, 0, 0};
    std::string injected_into;
    std::string last_message;
    // Names of kernels that ran to their end, each with the order that its threads went on in.
    std::set<std::pair<std::string, emulator::Order>> ran;

    Stream null_stream;
    std::set<Stream*> streams;
    std::set<Event*> events;
    std::set<Module*> modules;
    std::set<Graph*> graphs;
    std::set<Graph*> executables;
    std::vector<std::weak_ptr<Capture>> captures;
    uint64_t capture_ids = 0;
    // Of the primary context.
    int retains = 0;
    // What was alive in a healthy context when it ended.
    size_t forgotten = 0;
};

State& state();

// What a call may do besides its own work, given where it is made.
struct Call {
    std::unique_lock<std::recursive_mutex> hold;
    Result result;
    Call(const char* name, Kind kind);
    // If there is an error to return before anything is done.
    explicit operator bool() const { return result != SUCCESS; }
};
#define ENTER(kind)             \
    Call call(__func__, kind); \
    if (call) return call.result

// Says what went wrong, on stderr and to `mock_last_message`.
void complain(const std::string& message);

// Null if the handle is none of ours. Null and the two special handles are the null stream.
Stream* stream_of(void* handle);

// Runs, queues or records work, and returns what a device would return at once.
Result submit(Stream* stream, Work work);
// Runs what is queued; the result is the context's error, if it has one now.
Result drain();
// Refuses a call that a capture in progress does not allow, and spoils that capture.
Result refuse_in_capture();
Result refuse_in_capture_of(Stream* stream);

// ---- Memory.

struct Allocation {
    // Of the block that holds guard, payload, guard.
    unsigned char* block;
    size_t bytes;
    // Page-locked memory of the host: counts towards no limit of the device.
    bool host;
    unsigned char* payload() const;
};

// Whether guard bytes around all allocations and freed memory are as they were left: empty, or what is damaged.
std::string damage();
// Null if the range is not inside one allocation of the device or one of mapped host memory.
void* device_range(uint64_t address, size_t bytes);
size_t live_allocations();
size_t live_bytes();
void free_everything();

// Streams, events, modules and graphs.
size_t live_objects();

}  // namespace mock
