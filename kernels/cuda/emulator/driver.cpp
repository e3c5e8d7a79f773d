// Devices, contexts, streams and events of the mock driver, and how every call begins.
#include "driver.h"

#include <cstdio>

namespace mock {

State& state() {
    // Never destroyed: other threads and destructors of the program may call as the process ends.
    static State* state = new State;
    return *state;
}

void complain(const std::string& message) {
    state().last_message = message;
    fprintf(stderr, "mock cuda: %s\n", message.c_str());
}

size_t live_objects() {
    State& s = state();
    return s.streams.size() + s.events.size() + s.modules.size() + s.graphs.size() + s.executables.size();
}

// Errors after which, by the documentation, a process has to be started again.
static bool ends_context(int result) {
    return result == 4 || result == 46 || result == 214 || result == 220 || result == 226 || result == 700 ||
           result == 702 || (result >= 709 && result <= 719) || result == 721 || result == 999;
}

Call::Call(const char* name, Kind kind) : hold(state().lock), result(SUCCESS) {
    State& s = state();
    s.calls[int(Kind::Any)]++;
    if (kind != Kind::Any) s.calls[int(kind)]++;
    Injection& injection = s.injection;
    if (injection.armed && (injection.kind == Kind::Any || injection.kind == kind) && --injection.countdown == 0) {
        injection.armed = false;
        s.injected_into = name;
        if (injection.how == How::Later) {
            s.pending = injection.result;
        } else {
            result = injection.result;
            s.lost = injection.how == How::Forever;
            if (s.lost || ends_context(result)) s.sticky = result;
        }
    }
    if (s.sticky != SUCCESS) result = s.sticky;
    if (result == SUCCESS && !s.initialized) result = NOT_INITIALIZED;
}

Stream* stream_of(void* handle) {
    State& s = state();
    // 1 and 2 are the legacy and the per-thread null stream.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return &s.null_stream;
    auto* stream = static_cast<Stream*>(handle);
    return s.streams.count(stream) ? stream : nullptr;
}

Result submit(Stream* stream, Work work) {
    State& s = state();
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) {
        if (stream->capture->invalid) return CAPTURE_INVALIDATED;
        if (stream != stream->capture->origin) stream->capture->unjoined.insert(stream);
        stream->capture->work.push_back(std::move(work));
        return SUCCESS;
    }
    if (stream == &s.null_stream) {
        // It would wait for streams that cannot be waited for.
        for (auto& weak : s.captures)
            if (auto capture = weak.lock(); capture && capture->origin->blocking) {
                capture->invalid = true;
                return CAPTURE_IMPLICIT;
            }
    }
    if (s.lazy) {
        s.queue.push_back(std::move(work));
        return SUCCESS;
    }
    Result result = work();
    if (result != SUCCESS) s.sticky = result;
    return result;
}

Result drain() {
    State& s = state();
    while (!s.queue.empty() && s.sticky == SUCCESS) {
        Work work = std::move(s.queue.front());
        s.queue.pop_front();
        if (Result result = work(); result != SUCCESS) s.sticky = result;
    }
    if (s.sticky != SUCCESS) s.queue.clear();
    if (s.sticky == SUCCESS) s.sticky = s.pending;
    s.pending = SUCCESS;
    return s.sticky;
}

}  // namespace mock

using namespace mock;

// ---- The driver and its devices.

API int cuInit(unsigned) {
    {
        std::lock_guard<std::recursive_mutex> hold(state().lock);
        state().initialized = true;
    }
    ENTER(Kind::Any);
    return state().device.count ? SUCCESS : NO_DEVICE;
}

API int cuDriverGetVersion(int* version) {
    *version = state().device.driver_version;
    return SUCCESS;
}

API int cuDeviceGetCount(int* count) {
    ENTER(Kind::Any);
    *count = state().device.count;
    return SUCCESS;
}

API int cuDeviceGet(int* device, int ordinal) {
    ENTER(Kind::Any);
    if (ordinal < 0 || ordinal >= state().device.count) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

API int cuDeviceGetName(char* name, int size, int) {
    ENTER(Kind::Any);
    const Pretend& device = state().device;
    snprintf(name, size, "Emulated GPU %d.%d", device.major, device.minor);
    return SUCCESS;
}

API int cuDeviceGetUuid_v2(void* uuid, int device) {
    ENTER(Kind::Any);
    memset(uuid, 0x40 + device, 16);
    return SUCCESS;
}
API int cuDeviceGetUuid(void* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

API int cuDeviceTotalMem_v2(size_t* bytes, int) {
    ENTER(Kind::Any);
    *bytes = state().device.memory;
    return SUCCESS;
}

namespace mock {

// Of the tables in the CUDA programming guide.
int Pretend::shared_per_multiprocessor() const {
    if (major == 8) return (minor == 0 || minor == 7 ? 164 : 100) << 10;
    if (major == 9 || major == 10) return 228 << 10;
    if (major >= 12) return 100 << 10;
    return 64 << 10;
}
// Blocks cannot use the kilobyte that the system reserves.
int Pretend::shared_per_block_optin() const { return shared_per_multiprocessor() - 1024; }
int Pretend::threads_per_multiprocessor() const {
    if (major == 8) return minor == 0 ? 2048 : 1536;
    return major >= 12 ? 1536 : 2048;
}
int Pretend::blocks_per_multiprocessor() const {
    if (major == 8) return minor == 0 ? 32 : minor == 9 ? 24 : 16;
    return major >= 12 ? 24 : 32;
}

}  // namespace mock

// By number of CUdevice_attribute. What is not here is 0, "not supported".
static int attribute(int number, const Pretend& device) {
    switch (number) {
        case 1: return 1024;                                   // threads per block
        case 2: case 3: return 1024;                           // block x, y
        case 4: return 64;                                     // block z
        case 5: return 0x7fffffff;                             // grid x
        case 6: case 7: return 65535;                          // grid y, z
        case 8: return 48 << 10;                               // shared memory per block
        case 9: return 64 << 10;                               // constant memory
        case 10: return 32;                                    // warp
        case 12: case 82: return 64 << 10;                     // registers per block, multiprocessor
        case 13: return 1755000;                               // clock, kHz
        case 16: return device.multiprocessors;
        case 19: return 1;                                     // can map host memory
        case 31: return 1;                                     // concurrent kernels
        case 33: return 1;                                     // PCI bus
        case 36: return 2619000;                               // memory clock, kHz
        case 37: return 5120;                                  // memory bus, bits
        case 38: return 50 << 20;                              // L2
        case 39: return device.threads_per_multiprocessor();
        case 40: return 3;                                     // copy engines
        case 41: return 1;                                     // unified addressing
        case 75: return device.major;
        case 76: return device.minor;
        case 78: return 1;                                     // stream priorities
        case 81: return device.shared_per_multiprocessor();
        case 91: return 1;                                     // host pointer of registered memory
        case 95: return 1;                                     // cooperative launch
        case 97: return device.shared_per_block_optin();
        case 99: return 1;                                     // host registration
        case 106: return device.blocks_per_multiprocessor();
        case 111: return 1024;                                 // reserved shared memory per block
        case 115: return 1;                                    // memory pools
        default: return 0;
    }
}

API int cuDeviceGetAttribute(int* value, int number, int) {
    ENTER(Kind::Any);
    *value = attribute(number, state().device);
    return SUCCESS;
}

// ---- Contexts. There is the primary one.

static char primary_context;
static thread_local void* current_context;

API int cuDevicePrimaryCtxRetain(void** context, int device) {
    ENTER(Kind::Any);
    if (device >= state().device.count) return INVALID_DEVICE;
    state().retains++;
    *context = &primary_context;
    return SUCCESS;
}

// A context's end is the end of its errors and of all that was made in it. What a program had not given back
// by then it has forgotten, unless there was an error after which nothing can be given back.
static void end_context() {
    State& s = state();
    drain();
    size_t forgotten = live_objects() + live_allocations();
    if (s.sticky == SUCCESS && forgotten) {
        s.forgotten += forgotten;
        complain(std::to_string(forgotten) + " allocations and objects were not given back before the context");
    }
    for (Stream* stream : s.streams) delete stream;
    for (Event* event : s.events) delete event;
    for (Module* module : s.modules) delete module;
    for (Graph* graph : s.graphs) delete graph;
    for (Graph* graph : s.executables) delete graph;
    s.streams.clear(), s.events.clear(), s.modules.clear(), s.graphs.clear(), s.executables.clear();
    s.queue.clear();
    free_everything();
    if (!s.lost) s.sticky = s.pending = SUCCESS;
}

API int cuDevicePrimaryCtxRelease_v2(int) {
    // Like all that gives back, it does so even if it has an error to report: a program can do no more than call.
    Call call(__func__, Kind::Any);
    if (state().retains == 0) return call ? call.result : INVALID_CONTEXT;
    if (--state().retains == 0) end_context();
    return call.result;
}

API int cuCtxSetCurrent(void* context) {
    ENTER(Kind::Any);
    if (context && context != &primary_context) return INVALID_CONTEXT;
    current_context = context;
    return SUCCESS;
}

API int cuCtxGetCurrent(void** context) {
    ENTER(Kind::Any);
    *context = current_context;
    return SUCCESS;
}

API int cuCtxGetDevice(int* device) {
    ENTER(Kind::Any);
    if (!current_context) return INVALID_CONTEXT;
    *device = 0;
    return SUCCESS;
}

API int cuCtxSetFlags(unsigned) {
    Call call(__func__, Kind::Any);
    return call.result;
}

API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER(Kind::Any);
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

API int cuCtxSynchronize() {
    ENTER(Kind::Any);
    if (Result refused = refuse_in_capture()) return refused;
    return drain();
}

// ---- Streams.

API int cuStreamCreateWithPriority(void** handle, unsigned flags, int priority) {
    ENTER(Kind::Any);
    auto* stream = new Stream;
    stream->blocking = !(flags & 1);
    stream->priority = priority;
    state().streams.insert(stream);
    *handle = stream;
    return SUCCESS;
}
API int cuStreamCreate(void** handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }

API int cuStreamDestroy_v2(void* handle) {
    Call call(__func__, Kind::Any);
    auto* stream = static_cast<Stream*>(handle);
    if (!state().streams.erase(stream)) return call ? call.result : INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->invalid = true;
        stream->capture->members.erase(stream);
    }
    delete stream;
    return call.result;
}

API int cuStreamSynchronize(void* handle) {
    ENTER(Kind::Any);
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (Result refused = refuse_in_capture_of(stream)) return refused;
    return drain();
}

API int cuStreamQuery(void* handle) { return cuStreamSynchronize(handle); }

API int cuStreamGetFlags(void* handle, unsigned* flags) {
    ENTER(Kind::Any);
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *flags = stream->blocking ? 0 : 1;
    return SUCCESS;
}

API int cuStreamGetPriority(void* handle, int* priority) {
    ENTER(Kind::Any);
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *priority = stream->priority;
    return SUCCESS;
}

// ---- Events.

static Event* event_of(void* handle) {
    auto* event = static_cast<Event*>(handle);
    return state().events.count(event) ? event : nullptr;
}

API int cuEventCreate(void** handle, unsigned flags) {
    ENTER(Kind::Any);
    auto* event = new Event;
    event->timed = !(flags & 2);
    state().events.insert(event);
    *handle = event;
    return SUCCESS;
}

API int cuEventDestroy_v2(void* handle) {
    Call call(__func__, Kind::Any);
    auto* event = static_cast<Event*>(handle);
    if (!state().events.erase(event)) return call ? call.result : INVALID_HANDLE;
    delete event;
    return call.result;
}

// Flag 1, external: inside a capture the record is a step of the graph, not a mark of dependencies.
API int cuEventRecordWithFlags(void* handle, void* stream_handle, unsigned flags) {
    ENTER(Kind::Any);
    Event* event = event_of(handle);
    Stream* stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    if (stream->capture && !(flags & 1)) {
        if (stream->capture->invalid) return CAPTURE_INVALIDATED;
        event->capture = stream->capture;
        event->captured_from = stream;
        return SUCCESS;
    }
    if (!stream->capture) {
        event->capture.reset();
        event->complete = false;
    }
    event->recorded = true;
    return submit(stream, [event] {
        // The event may be gone by the time that a graph runs again.
        if (!state().events.count(event)) return SUCCESS;
        event->at = std::chrono::steady_clock::now();
        event->complete = true;
        return SUCCESS;
    });
}
API int cuEventRecord(void* handle, void* stream) { return cuEventRecordWithFlags(handle, stream, 0); }

API int cuStreamWaitEvent(void* stream_handle, void* handle, unsigned) {
    ENTER(Kind::Any);
    Event* event = event_of(handle);
    Stream* stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    // Work runs in the order in which it was submitted, whatever the stream: nothing to do but the bookkeeping.
    if (auto capture = event->capture.lock()) {
        if (stream->capture && stream->capture != capture) {
            stream->capture->invalid = capture->invalid = true;
            return CAPTURE_MERGE;
        }
        if (!stream->capture) {
            stream->capture = capture;
            capture->members.insert(stream);
            capture->unjoined.insert(stream);
        }
        if (event->captured_from != stream) capture->unjoined.erase(event->captured_from);
    } else if (stream->capture && event->recorded) {
        // A dependency on work outside the graph.
        stream->capture->invalid = true;
        return CAPTURE_ISOLATION;
    }
    return SUCCESS;
}

API int cuEventSynchronize(void* handle) {
    ENTER(Kind::Any);
    Event* event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    if (auto capture = event->capture.lock()) {
        capture->invalid = true;
        return CAPTURED_EVENT;
    }
    // As on a device, waiting for an event that was never recorded is no wait at all.
    return event->complete && state().pending == SUCCESS ? SUCCESS : drain();
}

API int cuEventQuery(void* handle) { return cuEventSynchronize(handle); }

API int cuEventElapsedTime(float* milliseconds, void* start_handle, void* end_handle) {
    ENTER(Kind::Any);
    Event *start = event_of(start_handle), *end = event_of(end_handle);
    if (!start || !end || !start->recorded || !end->recorded || !start->timed || !end->timed) return INVALID_HANDLE;
    if (!start->complete || !end->complete) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end->at - start->at).count();
    return SUCCESS;
}
API int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime(milliseconds, start, end);
}

// ---- What errors are called.

static const std::pair<int, const char*> ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX"},
    {UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
    {FILE_NOT_FOUND, "CUDA_ERROR_FILE_NOT_FOUND"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {NOT_READY, "CUDA_ERROR_NOT_READY"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
    {COOPERATIVE_LAUNCH_TOO_LARGE, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
};

API int cuGetErrorName(int error, const char** name) {
    auto* found = std::find_if(std::begin(ERRORS), std::end(ERRORS), [&](auto& e) { return e.first == error; });
    *name = found == std::end(ERRORS) ? "CUDA_ERROR_UNKNOWN" : found->second;
    return SUCCESS;
}

API int cuGetErrorString(int error, const char** text) {
    cuGetErrorName(error, text);
    return SUCCESS;
}
