// Modules, functions and launches of the mock driver.
//
// The code of a module is never run: kernels are compiled into this library and found by name. What is read of
// the PTX is what a driver would refuse for: the version, the target, and which kernels it declares.
#include "driver.h"

#include <csignal>
#include <cstdio>

#include <unistd.h>

namespace mock {
namespace {

// A fat binary (with and without its wrapper) and ELF.
bool is_binary(const void* image) {
    uint32_t magic;
    memcpy(&magic, image, 4);
    return magic == 0x466243b1 || magic == 0xba55ed50 || magic == 0x464c457f;
}

// PTX that a driver knows, in tenths: CUDA 11.0 brought 7.0, 12.0 8.0, 13.0 9.0, and each version after them one
// more, but for 12.6.
int newest_ptx(int driver_version) {
    int major = driver_version / 1000, minor = driver_version % 1000 / 10;
    return (major - 4) * 10 + minor - (major == 12 && minor >= 6);
}

Result parse_ptx(const std::string& text, Module& module) {
    const Pretend& device = state().device;
    int major = 0, minor = 0, target = 0, used = 0;
    size_t version = text.find(".version"), at = text.find(".target");
    if (version == std::string::npos || at == std::string::npos) return INVALID_PTX;
    if (sscanf(text.c_str() + version, ".version %d.%d", &major, &minor) != 2) return INVALID_PTX;
    if (sscanf(text.c_str() + at, ".target sm_%d%n", &target, &used) != 1) return INVALID_PTX;
    if (major * 10 + minor > newest_ptx(device.driver_version)) return UNSUPPORTED_PTX_VERSION;
    int capability = device.major * 10 + device.minor;
    // Code for sm_90a runs on 9.0 alone.
    bool one_only = text[at + used] == 'a';
    if (one_only ? target != capability : target > capability) return NO_BINARY_FOR_GPU;

    std::string current;
    for (size_t dot = text.find('.'); dot != std::string::npos; dot = text.find('.', dot + 1)) {
        if (text.compare(dot, 6, ".entry") && text.compare(dot, 8, ".maxntid") && text.compare(dot, 9, ".shared .")) continue;
        // Copied: sscanf looks for the end of the text first, wherever that is.
        std::string line = text.substr(dot, 640);
        const char* word = line.c_str();
        char name[512];
        int number = 0, bytes = 0;
        if (sscanf(word, ".entry %511[A-Za-z0-9_$]", name) == 1) {
            current = name;
            module.functions[current].name = current;
        } else if (sscanf(word, ".maxntid %d", &number) == 1 && !current.empty()) {
            module.functions[current].max_threads = number;
        } else if (sscanf(word, ".shared .align %d .b8 %511[A-Za-z0-9_$][%d]", &number, name, &bytes) == 3) {
            // A kernel's own array has the kernel's name in its own; one of a function stands in the kernel.
            Function* owner = current.empty() ? nullptr : &module.functions[current];
            for (auto& entry : module.functions)
                if (strstr(name, (std::to_string(entry.first.size()) + entry.first + "E").c_str())) owner = &entry.second;
            if (owner) owner->static_shared += bytes;
        }
    }
    return SUCCESS;
}

Function* function_of(void* handle) {
    for (Module* module : state().modules)
        for (auto& entry : module->functions)
            if (&entry.second == handle) return &entry.second;
    return nullptr;
}

struct Shape {
    dim3 grid, block;
    unsigned dynamic_shared;
    bool cooperative;
};

int blocks_per_multiprocessor(const Function& function, unsigned threads, size_t dynamic_shared) {
    const Pretend& device = state().device;
    threads = (threads + 31) / 32 * 32;
    if (threads == 0 || int(threads) > function.max_threads) return 0;
    size_t shared = function.static_shared + dynamic_shared + 1024;
    int by_shared = device.shared_per_multiprocessor() / shared;
    int by_threads = device.threads_per_multiprocessor() / threads;
    return std::min({by_shared, by_threads, device.blocks_per_multiprocessor()});
}

Result check(const Function& function, const Shape& shape) {
    uint64_t threads = uint64_t(shape.block.x) * shape.block.y * shape.block.z;
    if (!shape.grid.x || !shape.grid.y || !shape.grid.z || !threads) return INVALID_VALUE;
    if (shape.grid.x > 0x7fffffff || shape.grid.y > 65535 || shape.grid.z > 65535) return INVALID_VALUE;
    if (shape.block.x > 1024 || shape.block.y > 1024 || shape.block.z > 64 || threads > 1024) return INVALID_VALUE;
    if (threads > uint64_t(function.max_threads)) return LAUNCH_OUT_OF_RESOURCES;
    if (shape.dynamic_shared > unsigned(function.max_dynamic_shared)) return INVALID_VALUE;
    int together = blocks_per_multiprocessor(function, unsigned(threads), shape.dynamic_shared);
    if (together == 0) return LAUNCH_OUT_OF_RESOURCES;
    uint64_t blocks = uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z;
    if (shape.cooperative && blocks > uint64_t(together) * state().device.multiprocessors)
        return COOPERATIVE_LAUNCH_TOO_LARGE;
    return SUCCESS;
}

#ifndef __SANITIZE_ADDRESS__
// An address that belongs to nobody ends the process, as on a device it ends the context: the last words say which
// kernel it was.
class LastWords {
  public:
    explicit LastWords(const std::string& kernel) {
        running = kernel.c_str();
        struct sigaction action = {};
        action.sa_handler = speak;
        action.sa_flags = SA_ONSTACK;
        sigaction(SIGSEGV, &action, &previous);
    }
    ~LastWords() { sigaction(SIGSEGV, &previous, nullptr); }

  private:
    static const char* running;
    struct sigaction previous;

    // Does nothing that a signal may not interrupt. The fault comes again when it returns, to nobody.
    static void speak(int signal) {
        for (const char* part : {"mock cuda: ", running, ": read or write at an address that is not mapped\n"})
            if (write(STDERR_FILENO, part, strlen(part)) < 0) break;
        std::signal(signal, SIG_DFL);
    }
};
const char* LastWords::running;
#endif

Result run(const std::string& name, const emulator::KernelEntry& kernel, const Shape& shape, void** arguments) {
    std::string wrong;
    {
#ifndef __SANITIZE_ADDRESS__
        LastWords last_words(name);
#endif
        wrong = emulator::launch(
            shape.grid, shape.block, shape.dynamic_shared, [&] { kernel.run(arguments); }, state().schedule);
    }
    if (!wrong.empty()) {
        complain(name + ": " + wrong);
        return LAUNCH_FAILED;
    }
    if (std::string damaged = damage(); !damaged.empty()) {
        complain(name + ": " + damaged);
        return ILLEGAL_ADDRESS;
    }
    state().ran.emplace(name, state().schedule.order);
    return SUCCESS;
}

Result launch(void* handle, const Shape& shape, void* stream_handle, void** parameters, void** extra) {
    Function* function = function_of(handle);
    Stream* stream = stream_of(stream_handle);
    if (!function || !stream) return INVALID_HANDLE;
    const emulator::KernelEntry& kernel = *function->kernel;
    if (extra || (!parameters && !kernel.sizes.empty())) return INVALID_VALUE;
    if (Result wrong = check(*function, shape)) {
        complain("launch of " + function->name + " is outside the limits of the device");
        return wrong;
    }
    // The caller's values are gone when the launch returns, so they are copied, each to a multiple of 16 bytes.
    auto values = std::make_shared<std::vector<unsigned char>>();
    std::vector<size_t> offsets;
    for (size_t i = 0; i < kernel.sizes.size(); i++) {
        if (!parameters[i]) {
            complain(function->name + " has more parameters than it was passed");
            return INVALID_VALUE;
        }
        offsets.push_back(values->size());
        auto* value = static_cast<unsigned char*>(parameters[i]);
        values->insert(values->end(), value, value + kernel.sizes[i]);
        values->resize((values->size() + 15) / 16 * 16);
    }
    return submit(stream, [name = function->name, &kernel, shape, values, offsets] {
        std::vector<void*> arguments;
        for (size_t offset : offsets) arguments.push_back(values->data() + offset);
        return run(name, kernel, shape, arguments.data());
    });
}

}  // namespace
}  // namespace mock

using namespace mock;

// ---- Modules.

API int cuModuleLoadDataEx(void** handle, const void* image, unsigned count, int* options, void** values) {
    ENTER(Kind::Any);
    if (Result refused = refuse_in_capture()) return refused;
    auto module = std::make_unique<Module>();
    if (is_binary(image)) {
        module->any = true;
    } else if (Result wrong = parse_ptx(static_cast<const char*>(image), *module)) {
        // Options 5 and 6: where the compiler's errors go, and how many bytes.
        char* log = nullptr;
        size_t bytes = 0;
        for (unsigned i = 0; i < count; i++) {
            if (options[i] == 5) log = static_cast<char*>(values[i]);
            if (options[i] == 6) bytes = reinterpret_cast<uintptr_t>(values[i]);
        }
        if (log) snprintf(log, bytes, "ptxas fatal: refused by the mock driver");
        return wrong;
    }
    *handle = *state().modules.insert(module.release()).first;
    return SUCCESS;
}
API int cuModuleLoadData(void** handle, const void* image) {
    return cuModuleLoadDataEx(handle, image, 0, nullptr, nullptr);
}
API int cuModuleLoadFatBinary(void** handle, const void* image) {
    return cuModuleLoadDataEx(handle, image, 0, nullptr, nullptr);
}

API int cuModuleUnload(void* handle) {
    Call call(__func__, Kind::Any);
    auto* module = static_cast<Module*>(handle);
    if (!state().modules.erase(module)) return call ? call.result : INVALID_HANDLE;
    delete module;
    return call.result;
}

API int cuModuleGetFunction(void** handle, void* module_handle, const char* name) {
    ENTER(Kind::Any);
    auto* module = static_cast<Module*>(module_handle);
    if (!state().modules.count(module)) return INVALID_HANDLE;
    const emulator::KernelEntry* kernel = emulator::find_kernel(name);
    bool declared = module->any || module->functions.count(name);
    if (!kernel && declared) complain(std::string(name) + " is in the image and not among the emulated kernels");
    if (!kernel || !declared) return NOT_FOUND;
    Function& function = module->functions[name];
    function.name = name;
    function.kernel = kernel;
    *handle = &function;
    return SUCCESS;
}

// No kernel here has variables of its own in device memory.
API int cuModuleGetGlobal_v2(uint64_t*, size_t*, void*, const char*) {
    ENTER(Kind::Any);
    return NOT_FOUND;
}

// ---- Functions.

API int cuFuncGetAttribute(int* value, int attribute, void* handle) {
    ENTER(Kind::Any);
    Function* function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    const Pretend& device = state().device;
    switch (attribute) {
        case 0: *value = function->max_threads; break;
        case 1: *value = function->static_shared; break;
        case 2: case 3: *value = 0; break;
        // Registers and cache modes are the compiler's affair; the tables of resources show them.
        case 4: *value = 32; break;
        case 5: case 6: *value = device.major * 10 + device.minor; break;
        case 8: *value = function->max_dynamic_shared; break;
        default: *value = 0;
    }
    return SUCCESS;
}

API int cuFuncGetParamInfo(void* handle, size_t index, size_t* offset, size_t* size) {
    ENTER(Kind::Any);
    Function* function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    const std::vector<size_t>& sizes = function->kernel->sizes;
    if (index >= sizes.size()) return INVALID_VALUE;
    *offset = 0;
    // Every parameter lies at a multiple of its size.
    for (size_t i = 0; i <= index; i++) {
        *offset = (*offset + sizes[i] - 1) / sizes[i] * sizes[i];
        if (i < index) *offset += sizes[i];
    }
    if (size) *size = sizes[index];
    return SUCCESS;
}

API int cuFuncSetAttribute(void* handle, int attribute, int value) {
    ENTER(Kind::Any);
    Function* function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    if (attribute == 8) {
        if (value < 0 || value + function->static_shared > state().device.shared_per_block_optin()) return INVALID_VALUE;
        function->max_dynamic_shared = value;
        return SUCCESS;
    }
    // The carve-out of shared memory is a hint.
    return attribute == 9 ? SUCCESS : INVALID_VALUE;
}

API int cuFuncSetCacheConfig(void* handle, int) {
    ENTER(Kind::Any);
    return function_of(handle) ? SUCCESS : INVALID_HANDLE;
}

API int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* handle, int threads, size_t dynamic_shared,
                                                             unsigned) {
    ENTER(Kind::Any);
    Function* function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    *blocks = blocks_per_multiprocessor(*function, threads, dynamic_shared);
    return SUCCESS;
}
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads, size_t dynamic_shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, handle, threads, dynamic_shared, 0);
}

// ---- Launches.

API int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned dynamic_shared, void* stream, void** parameters,
                       void** extra) {
    ENTER(Kind::Launch);
    Shape shape{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, dynamic_shared, false};
    return launch(function, shape, stream, parameters, extra);
}

API int cuLaunchCooperativeKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                  unsigned block_y, unsigned block_z, unsigned dynamic_shared, void* stream,
                                  void** parameters) {
    ENTER(Kind::Launch);
    Shape shape{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, dynamic_shared, true};
    return launch(function, shape, stream, parameters, nullptr);
}

// CUlaunchConfig, and of CUlaunchAttribute what is read here.
struct LaunchAttribute {
    unsigned id;
    unsigned padding;
    unsigned value[16];
};
struct LaunchConfig {
    unsigned grid[3], block[3], dynamic_shared;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned attribute_count;
};

API int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
    ENTER(Kind::Launch);
    const unsigned *grid = config->grid, *block = config->block;
    Shape shape{{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, config->dynamic_shared, false};
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const LaunchAttribute& attribute = config->attributes[i];
        if (attribute.id == 2) shape.cooperative = attribute.value[0] != 0;
        // Clusters of blocks are not emulated.
        if (attribute.id == 4 && attribute.value[0] * attribute.value[1] * attribute.value[2] > 1) return NOT_SUPPORTED;
    }
    return launch(function, shape, config->stream, parameters, extra);
}

API int cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
    ENTER(Kind::Launch);
    return submit(stream_of(handle), [=] {
        function(data);
        return SUCCESS;
    });
}
