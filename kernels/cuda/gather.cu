// Copies of rows: those that an index names, or parts of rows to where they belong.
#include "primitives.cuh"

constexpr u32 GATHER_THREADS = 128;

// to[r, column] = from[index[r], column], or of row r without an index. A row whose index is below zero is left as it
// is. Block (r, part of the columns).
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
    gather_rows(const float* from, u64 from_stride, const int* index, float* to, u64 to_stride, u32 width) {
    wait_for_previous();
    u64 row = blockIdx.x;
    int source = index ? index[row] : int(row);
    u32 column = blockIdx.y * GATHER_THREADS + threadIdx.x;
    if (source >= 0 && column < width) to[row * to_stride + column] = from[u64(source) * from_stride + column];
    let_next_start();
}
EXPORT(gather_rows);
