// Rows of f32 values, eight at a time, and as the planes of bf16 that products take.
#pragma once

#include "primitives.cuh"

// Values that a thread handles at once: one word of 4-bit codes has as many.
constexpr u32 UNIT = 8;

// Whether all rows can be read sixteen bytes at a time.
DEVICE bool rows_aligned(const void* first, u64 stride_bytes) { return ((u64(first) | stride_bytes) & 15) == 0; }

// Values from `column` on, zero past the row's end. `wide`: all of the row's units are whole and aligned. Kernels
// make two bodies of it, since the narrow one needs many registers.
template <bool wide>
DEVICE void load_unit(float (&value)[UNIT], const float* row, u32 column, u32 width) {
    if (wide) {
        Float4 low{0, 0, 0, 0}, high{0, 0, 0, 0};
        if (column < width) {
            low = *reinterpret_cast<const Float4*>(row + column);
            high = *reinterpret_cast<const Float4*>(row + column + 4);
        }
        value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
        value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
    } else {
#pragma unroll
        for (u32 i = 0; i < UNIT; i++) value[i] = column + i < width ? row[column + i] : 0.0f;
    }
}

template <bool wide>
DEVICE void store_unit(float* row, u32 column, u32 width, const float (&value)[UNIT]) {
    if (wide) {
        if (column >= width) return;
        *reinterpret_cast<Float4*>(row + column) = {value[0], value[1], value[2], value[3]};
        *reinterpret_cast<Float4*>(row + column + 4) = {value[4], value[5], value[6], value[7]};
    } else {
#pragma unroll
        for (u32 i = 0; i < UNIT; i++)
            if (column + i < width) row[column + i] = value[i];
    }
}

// Four columns, as above.
DEVICE Float4 load_four(const float* row, u32 column, u32 width, bool wide) {
    Float4 v{0, 0, 0, 0};
    if (wide && column < width) v = *reinterpret_cast<const Float4*>(row + column);
    if (!wide) {
        if (column < width) v.x = row[column];
        if (column + 1 < width) v.y = row[column + 1];
        if (column + 2 < width) v.z = row[column + 2];
        if (column + 3 < width) v.w = row[column + 3];
    }
    return v;
}
DEVICE void store_four(float* row, u32 column, u32 width, bool wide, Float4 v) {
    if (wide && column < width) *reinterpret_cast<Float4*>(row + column) = v;
    if (!wide) {
        if (column < width) row[column] = v.x;
        if (column + 1 < width) row[column + 1] = v.y;
        if (column + 2 < width) row[column + 2] = v.z;
        if (column + 3 < width) row[column + 3] = v.w;
    }
}

// Brings a line near that is read later.
DEVICE void prefetch(const void* at) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

// Where a row's planes go, in either order of columns or in both. Null: not wanted.
struct Planes {
    u16 *natural, *nibble;
    // Values from a plane to the next.
    u64 stride;
    u32 count;
};

// Lane i of four gets word i of each, in their order.
DEVICE void transpose_words(u32 (&word)[4]) {
#pragma unroll
    for (u32 step = 1; step <= 2; step *= 2) {
        bool second = lane_id() & step;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (i & step) continue;
            u32 got = __shfl_xor_sync(ALL_LANES, second ? word[i] : word[i + step], int(step));
            if (second) word[i] = got;
            else word[i + step] = got;
        }
    }
}

// Writes a unit of the row that starts at value `at` of a plane. A plane holds what the planes before it left of
// each value, rounded to bf16. All lanes of a warp come here, with units that follow each other; unit u is lane
// u % 4 of four. Nibble order puts column (word t, nibble j) of 32 at (j % 4) * 8 + 2 t + j / 4: one lane has the
// pairs (j, j + 4) of word t, and after an exchange the pairs of one j of all four words, which are neighbours.
template <bool wide>
DEVICE void store_planes(const Planes& to, u64 at, u32 column, u32 width, float (&value)[UNIT]) {
    for (u32 plane = 0; plane < to.count; plane++) {
        u32 word[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) word[i] = take_plane(value[2 * i], value[2 * i + 1]);
        u64 first = plane * to.stride + at + column;
        if (to.natural && wide) {
            auto* out = reinterpret_cast<Bytes16*>(to.natural + first);
            if (column < width) *out = {word[0], word[1], word[2], word[3]};
        } else if (to.natural) {
#pragma unroll
            for (u32 i = 0; i < UNIT; i++)
                if (column + i < width) to.natural[first + i] = u16(word[i / 2] >> i % 2 * 16);
        }
        if (to.nibble) {
            u32 pair[4] = {permute(word[0], word[2], 0x5410), permute(word[0], word[2], 0x7632),
                           permute(word[1], word[3], 0x5410), permute(word[1], word[3], 0x7632)};
            transpose_words(pair);
            auto* out = reinterpret_cast<Bytes16*>(to.nibble + first);
            if (column < width) *out = {pair[0], pair[1], pair[2], pair[3]};
        }
    }
}
