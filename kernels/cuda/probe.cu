// Two plain kernels for the tests of the device layer: what they do is known without running them.
#include "primitives.cuh"

// destination[i] = source[i], `count` times sixteen bytes.
extern "C" __global__ void copy(Bytes16* destination, const Bytes16* source, u64 count) {
    u64 stride = u64(gridDim.x) * blockDim.x;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) destination[i] = source[i];
}
EXPORT(copy);

// values[i] = hash(seed, i), the finaliser of MurmurHash3 over a Weyl sequence: the same on every machine.
extern "C" __global__ void fill_seeded(u32* values, u64 count, u32 seed) {
    u64 stride = u64(gridDim.x) * blockDim.x;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        u32 h = u32(i) * 0x9e3779b9u + u32(i >> 32) * 0x7feb352du + seed;
        h = (h ^ (h >> 16)) * 0x85ebca6bu;
        h = (h ^ (h >> 13)) * 0xc2b2ae35u;
        values[i] = h ^ (h >> 16);
    }
}
EXPORT(fill_seeded);
