// Kernels for the tests of the emulator and the mock driver themselves. Not shipped.
#include "primitives.cuh"

// out[i] = a * in[i] + b
extern "C" __global__ void selftest_scale(float* out, const float* in, float a, float b, u32 count) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = a * in[i] + b;
}
EXPORT(selftest_scale);

// Writes one value `at` elements from the start, wherever that is.
extern "C" __global__ void selftest_poke(u8* out, long long at, u32 value) {
    if (threadIdx.x == 0 && blockIdx.x == 0) out[at] = u8(value);
}
EXPORT(selftest_poke);

// Every block sums its part of the input through shared memory, in a fixed order.
extern "C" __global__ void selftest_sums(float* out, const float* in) {
    DYNAMIC_SHARED(dynamic);
    float* part = reinterpret_cast<float*>(dynamic);
    part[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
#ifndef FAULT_SELFTEST_BARRIER
    __syncthreads();
#endif
    if (threadIdx.x == blockDim.x / 2) {
        float sum = 0;
        for (u32 i = 0; i < blockDim.x; i++) sum += part[i];
        out[blockIdx.x] = sum;
    }
}
EXPORT(selftest_sums);

// A barrier that only half of the threads reach.
extern "C" __global__ void selftest_deadlock() {
    if (threadIdx.x < blockDim.x / 2) __syncthreads();
}
EXPORT(selftest_deadlock);

// Writes past what it asked for of shared memory.
extern "C" __global__ void selftest_shared_overrun(u32* out, u32 words) {
    DYNAMIC_SHARED(dynamic);
    u32* part = reinterpret_cast<u32*>(dynamic);
    for (u32 i = threadIdx.x; i < words; i += blockDim.x) part[i] = i;
    __syncthreads();
    if (threadIdx.x == 0) out[0] = part[0];
}
EXPORT(selftest_shared_overrun);
