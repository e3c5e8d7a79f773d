// Stream capture and graphs of the mock driver: a graph is the list of what was submitted, run again in order.
#include "driver.h"

namespace mock {

// Captures in progress. Those whose streams are gone have gone with them.
static std::vector<std::shared_ptr<Capture>> captures() {
    std::vector<std::shared_ptr<Capture>> found;
    for (auto& weak : state().captures)
        if (auto capture = weak.lock()) found.push_back(capture);
    return found;
}

// Of a call that a device might serve by synchronising: a capture forbids it to its own thread, or to all,
// unless it was begun as relaxed.
Result refuse_in_capture() {
    for (auto& capture : captures()) {
        if (capture->mode == CaptureMode::Relaxed) continue;
        if (capture->mode == CaptureMode::ThreadLocal && capture->thread != std::this_thread::get_id()) continue;
        capture->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

// Of a call that a stream cannot serve while it is captured, whatever the mode.
Result refuse_in_capture_of(Stream* stream) {
    if (!stream->capture) return SUCCESS;
    stream->capture->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

}  // namespace mock

using namespace mock;

API int cuStreamBeginCapture_v2(void* handle, int mode) {
    ENTER(Kind::Any);
    State& s = state();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream == &s.null_stream) return CAPTURE_UNSUPPORTED;
    if (stream->capture) return 401;  // CUDA_ERROR_ILLEGAL_STATE
    auto capture = std::make_shared<Capture>();
    capture->origin = stream;
    capture->mode = CaptureMode(mode);
    capture->thread = std::this_thread::get_id();
    capture->id = ++s.capture_ids;
    capture->members.insert(stream);
    stream->capture = capture;
    s.captures.erase(std::remove_if(s.captures.begin(), s.captures.end(), [](auto& c) { return c.expired(); }),
                     s.captures.end());
    s.captures.push_back(capture);
    return SUCCESS;
}

API int cuStreamEndCapture(void* handle, void** graph) {
    *graph = nullptr;
    ENTER(Kind::Any);
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    std::shared_ptr<Capture> capture = stream->capture;
    if (!capture) return 401;  // CUDA_ERROR_ILLEGAL_STATE
    if (capture->origin != stream) return CAPTURE_UNMATCHED;
    if (capture->mode != CaptureMode::Relaxed && capture->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    for (Stream* member : capture->members) member->capture.reset();
    if (capture->invalid) return CAPTURE_INVALIDATED;
    if (!capture->unjoined.empty()) return CAPTURE_UNJOINED;
    auto* made = new Graph{std::move(capture->work)};
    state().graphs.insert(made);
    *graph = made;
    return SUCCESS;
}

// 0: not capturing, 1: capturing, 2: invalidated.
API int cuStreamGetCaptureInfo_v2(void* handle, int* status, uint64_t* id, void** graph, const void*** dependencies,
                                  size_t* dependency_count) {
    ENTER(Kind::Any);
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    if (id && stream->capture) *id = stream->capture->id;
    if (graph) *graph = nullptr;
    if (dependencies) *dependencies = nullptr;
    if (dependency_count) *dependency_count = 0;
    return SUCCESS;
}
API int cuStreamIsCapturing(void* handle, int* status) {
    return cuStreamGetCaptureInfo_v2(handle, status, nullptr, nullptr, nullptr, nullptr);
}

API int cuThreadExchangeStreamCaptureMode(int* mode) {
    ENTER(Kind::Any);
    *mode = int(CaptureMode::Global);
    return SUCCESS;
}

API int cuGraphInstantiateWithFlags(void** executable, void* handle, unsigned long long flags) {
    ENTER(Kind::Allocation);
    auto* graph = static_cast<Graph*>(handle);
    if (!state().graphs.count(graph)) return INVALID_HANDLE;
    // 4, launch from the device, goes with none of the others.
    if (flags & 4) return flags == 4 ? NOT_SUPPORTED : INVALID_VALUE;
    auto* made = new Graph(*graph);
    state().executables.insert(made);
    *executable = made;
    return SUCCESS;
}

API int cuGraphUpload(void* handle, void* stream) {
    ENTER(Kind::Any);
    return state().executables.count(static_cast<Graph*>(handle)) && stream_of(stream) ? SUCCESS : INVALID_HANDLE;
}

API int cuGraphLaunch(void* handle, void* stream_handle) {
    ENTER(Kind::Launch);
    auto* graph = static_cast<Graph*>(handle);
    Stream* stream = stream_of(stream_handle);
    if (!state().executables.count(graph) || !stream) return INVALID_HANDLE;
    for (const Work& work : graph->work)
        if (Result result = submit(stream, work)) return result;
    return SUCCESS;
}

API int cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
    ENTER(Kind::Any);
    auto* graph = static_cast<Graph*>(handle);
    if (!state().graphs.count(graph)) return INVALID_HANDLE;
    // The number is what callers ask for; single nodes cannot be looked at here.
    if (nodes) return NOT_SUPPORTED;
    *count = graph->work.size();
    return SUCCESS;
}

static int destroy(std::set<Graph*>& graphs, void* handle, Result result) {
    auto* graph = static_cast<Graph*>(handle);
    if (!graphs.erase(graph)) return result != SUCCESS ? result : INVALID_HANDLE;
    delete graph;
    return result;
}

API int cuGraphExecDestroy(void* handle) {
    Call call(__func__, Kind::Any);
    return destroy(state().executables, handle, call.result);
}

API int cuGraphDestroy(void* handle) {
    Call call(__func__, Kind::Any);
    return destroy(state().graphs, handle, call.result);
}
