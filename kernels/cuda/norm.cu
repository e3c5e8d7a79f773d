// Root-mean-square norms, and f32 rows as planes.
//
// y = x * (1 / sqrt(mean(x^2) + eps)) * weight in f32. The order in which squares are summed depends on the row's
// width only, so a row gives the same bits wherever it stands. Everything here is bound by memory: a row is read
// once, sixteen bytes at a time, and kept in registers between the sum and the products.
//
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "rows.cuh"

constexpr u32 MOST_THREADS = 512;
constexpr u32 MOST_WARPS = MOST_THREADS / 32;
// Units of a row that a thread keeps: rows of up to 8192 values are read once, wider ones twice.
constexpr u32 KEPT = 2;
// Chunks of 32 * 4 values of a head that a warp keeps.
constexpr u32 KEPT_OF_HEAD = 4;

DEVICE float inverse_root(float squares, u32 width, float eps) {
    return 1.0f / sqrtf(squares / float(width) + eps);
}

// The sum over the block, in the order of its warps.
DEVICE float block_sum(float mine) {
    SHARED(float, sums, MOST_WARPS);
    mine = warp_sum(mine);
    if (lane_id() == 0) sums[warp_id()] = mine;
    __syncthreads();
    float sum = 0.0f;
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) sum += sums[warp];
    return sum;
}

DEVICE float add_squares(float sum, const float (&value)[UNIT]) {
#pragma unroll
    for (u32 i = 0; i < UNIT; i++) sum = fmaf(value[i], value[i], sum);
    return sum;
}

struct RowNorm {
    float* x;
    const float *delta, *weight;
    float eps;
    u32 width;
    float* out;
    Planes planes;
    // Where the row starts in a plane.
    u64 at;
};

template <bool wide>
DEVICE void load_weight(float (&gain)[UNIT], const RowNorm& row, u32 column) {
    if (row.weight) load_unit<wide>(gain, row.weight, column, row.width);
    else
#pragma unroll
        for (u32 i = 0; i < UNIT; i++) gain[i] = 1.0f;
}

template <bool wide>
DEVICE void load_sum(float (&value)[UNIT], const RowNorm& row, u32 column) {
    load_unit<wide>(value, row.x, column, row.width);
    if (!row.delta) return;
    float other[UNIT];
    load_unit<wide>(other, row.delta, column, row.width);
#pragma unroll
    for (u32 i = 0; i < UNIT; i++) value[i] += other[i];
}

template <bool wide>
DEVICE void norm_row(const RowNorm& row) {
    u32 step = blockDim.x * UNIT, first = threadIdx.x * UNIT;
    float value[KEPT][UNIT];
#pragma unroll
    for (u32 i = 0; i < KEPT; i++) load_sum<wide>(value[i], row, first + i * step);
    float squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < KEPT; i++) squares = add_squares(squares, value[i]);
    // Stores come after all loads, which then are under way together.
#pragma unroll
    for (u32 i = 0; i < KEPT; i++)
        if (row.delta) store_unit<wide>(row.x, first + i * step, row.width, value[i]);
    for (u32 column = first + KEPT * step; column < row.width; column += step) {
        float late[UNIT];
        load_sum<wide>(late, row, column);
        if (row.delta) store_unit<wide>(row.x, column, row.width, late);
        squares = add_squares(squares, late);
    }
    float scale = inverse_root(block_sum(squares), row.width, row.eps);

    auto finish = [&](float (&mine)[UNIT], u32 column) {
        float gain[UNIT];
        load_weight<wide>(gain, row, column);
#pragma unroll
        for (u32 i = 0; i < UNIT; i++) mine[i] = mine[i] * scale * gain[i];
        if (row.out) store_unit<wide>(row.out, column, row.width, mine);
        store_planes<wide>(row.planes, row.at, column, row.width, mine);
    };
#pragma unroll
    for (u32 i = 0; i < KEPT; i++) finish(value[i], first + i * step);
    // All lanes of a warp go on together, as planes need them.
    for (u32 start = KEPT * step; start < row.width; start += step) {
        float late[UNIT];
        load_unit<wide>(late, row.x, start + first, row.width);
        finish(late, start + first);
    }
}

// A block per row. `delta`, if any, is added to x first, and the sum is written back. The norm goes to `out`,
// which may be x, to the planes, or to both; null: not wanted. Strides are in values; rows of planes are `width`
// apart.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    rms_norm(float* x, u64 x_stride, const float* delta, u64 delta_stride, const float* weight, float eps,
             u32 width, float* out, u64 out_stride, u16* natural, u16* nibble, u64 plane_stride, u32 planes) {
    // Weights are no kernel's output, and are wanted right after the sum is known.
    for (u32 i = threadIdx.x * UNIT; weight && i < width; i += blockDim.x * UNIT) prefetch(weight + i);
    wait_for_previous();
    let_next_start();
    u64 index = blockIdx.x;
    RowNorm row{x + index * x_stride,
                delta ? delta + index * delta_stride : nullptr,
                weight,
                eps,
                width,
                out ? out + index * out_stride : nullptr,
                {natural, nibble, plane_stride, natural || nibble ? planes : 0},
                index * width};
    bool wide = width % UNIT == 0 && rows_aligned(x, x_stride * 4) && rows_aligned(delta, delta_stride * 4) &&
                rows_aligned(weight, 0) && rows_aligned(out, out_stride * 4);
    if (wide) norm_row<true>(row);
    else norm_row<false>(row);
}
EXPORT(rms_norm);

// Norms heads in place, a warp for each: `heads` of `width` values, `head_stride` apart, in each of the rows.
// All have the same weights.
extern "C" __global__ void __launch_bounds__(128)
    head_norm(float* x, u64 stride, u32 rows, u32 heads, u32 head_stride, u32 width, const float* weight,
              float eps) {
    wait_for_previous();
    let_next_start();
    u64 index = u64(blockIdx.x) * (blockDim.x / 32) + warp_id();
    if (index >= u64(rows) * heads) return;
    float* head = x + index / heads * stride + index % heads * head_stride;
    u32 first = lane_id() * 4;
    bool wide = width % 4 == 0 && rows_aligned(x, stride * 4) && rows_aligned(weight, u64(head_stride) * 4);
    auto load = [&](const float* from, u32 column) { return load_four(from, column, width, wide); };
    auto add = [](float sum, Float4 v) {
        return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
    };

    Float4 kept[KEPT_OF_HEAD];
#pragma unroll
    for (u32 i = 0; i < KEPT_OF_HEAD; i++) kept[i] = load(head, first + i * 128);
    float squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < KEPT_OF_HEAD; i++) squares = add(squares, kept[i]);
    for (u32 column = first + KEPT_OF_HEAD * 128; column < width; column += 128)
        squares = add(squares, load(head, column));
    float scale = inverse_root(warp_sum(squares), width, eps);

    auto finish = [&](Float4 v, u32 column) {
        Float4 gain = weight ? load(weight, column) : Float4{1, 1, 1, 1};
        v = {v.x * scale * gain.x, v.y * scale * gain.y, v.z * scale * gain.z, v.w * scale * gain.w};
        store_four(head, column, width, wide, v);
    };
#pragma unroll
    for (u32 i = 0; i < KEPT_OF_HEAD; i++) finish(kept[i], first + i * 128);
    for (u32 column = first + KEPT_OF_HEAD * 128; column < width; column += 128)
        finish(load(head, column), column);
}
EXPORT(head_norm);

// f32 rows as planes. Blocks along x take rows, along y the units of a row.
extern "C" __global__ void __launch_bounds__(128)
    split(const float* x, u64 x_stride, u32 width, u16* natural, u16* nibble, u64 plane_stride, u32 planes) {
    wait_for_previous();
    let_next_start();
    u64 row = blockIdx.x;
    u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * UNIT;
    Planes target{natural, nibble, plane_stride, planes};
    float value[UNIT];
    if (width % UNIT == 0 && rows_aligned(x, x_stride * 4)) {
        load_unit<true>(value, x + row * x_stride, column, width);
        store_planes<true>(target, row * width, column, width, value);
    } else {
        load_unit<false>(value, x + row * x_stride, column, width);
        store_planes<false>(target, row * width, column, width, value);
    }
}
EXPORT(split);
