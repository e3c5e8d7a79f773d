// What a check on a device needs beside the kernels that it checks: seeded values made where they are used, plain
// products and attention in f64 to compare with, and the comparison.
//
// Nothing here is fast or shares code with what it checks.
#include "primitives.cuh"

constexpr u32 CHECK_THREADS = 256;

// A number of 64 bits that depends on a seed and an index (SplitMix64's output function).
DEVICE u64 hash_of(u64 seed, u64 index) {
    u64 x = seed + (index + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}
// From -1 to 1.
DEVICE float uniform_of(u64 seed, u64 index) { return float(int(hash_of(seed, index) >> 40) - (1 << 23)) / float(1 << 23); }

DEVICE u64 first_index() { return u64(blockIdx.x) * CHECK_THREADS + threadIdx.x; }
DEVICE u64 index_step() { return u64(gridDim.x) * CHECK_THREADS; }

extern "C" __global__ void fill_f32(float* out, u64 count, u64 seed, float scale) {
    for (u64 i = first_index(); i < count; i += index_step()) out[i] = scale * uniform_of(seed, i);
}
EXPORT(fill_f32);

// From `center - scale` to `center + scale`, rounded to bf16.
extern "C" __global__ void fill_bf16(u16* out, u64 count, u64 seed, float center, float scale) {
    for (u64 i = first_index(); i < count; i += index_step()) out[i] = f32_to_bf16(center + scale * uniform_of(seed, i));
}
EXPORT(fill_bf16);

// Any bits but those of e4m3 NaN if `e4m3`: codes of four or eight bits.
extern "C" __global__ void fill_codes(u8* out, u64 count, u64 seed, u32 e4m3) {
    for (u64 i = first_index(); i < count; i += index_step()) {
        u8 code = u8(hash_of(seed, i) >> 32);
        out[i] = e4m3 && (code & 0x7f) == 0x7f ? 0 : code;
    }
}
EXPORT(fill_codes);

// How a weight is stored; as kernels::format::Values.
enum Format { FORMAT_BF16, FORMAT_FP8, FORMAT_INT4, FORMAT_MXFP4 };

struct PlainWeight {
    const void* codes;
    const void* scales;
    u32 format;
    // Of the whole weight.
    u32 columns;

    DEVICE double at(u64 row, u32 column) const {
        u64 index = row * columns + column;
        u8 byte = static_cast<const u8*>(codes)[format == FORMAT_FP8 ? index : index / 2];
        u32 nibble = index % 2 ? byte >> 4 : byte & 15;
        switch (format) {
            case FORMAT_BF16: return bf16_to_f32(static_cast<const u16*>(codes)[index]);
            case FORMAT_INT4: return (int(nibble) - 8) * double(bf16_to_f32(static_cast<const u16*>(scales)[index / 32]));
            case FORMAT_FP8: {
                double magnitude = byte >> 3 & 15 ? (8 + (byte & 7)) * double(1 << (byte >> 3 & 15)) / 1024
                                                  : (byte & 7) * 2.0 / 1024;
                u32 wide = (columns + 127) / 128;
                return (byte & 0x80 ? -magnitude : magnitude) * static_cast<const float*>(scales)[row / 128 * wide + column / 128];
            }
            default: {
                double magnitude = nibble & 6 ? (2 + (nibble & 1)) * double(1 << (nibble >> 1 & 3)) / 4 : (nibble & 1) * 0.5;
                int exponent = static_cast<const u8*>(scales)[index / 32];
                // An f32 whose bits say 2^(exponent - 127); of 0 the half of the least normal one.
                double scale = exponent ? __uint_as_float(u32(exponent) << 23) : __uint_as_float(1u << 22);
                return (nibble & 8 ? -magnitude : magnitude) * scale;
            }
        }
    }
};

// out[t, n] = sum over k of x[t, k] * w[first_row + n, k], and `magnitudes` the same of absolute values: what an error is
// measured by. A warp per output.
extern "C" __global__ void plain_product(const float* x, const void* codes, const void* scales, u32 format, u32 first_row,
                                         u32 rows, u32 columns, u32 tokens, double* out, double* magnitudes) {
    u64 output = first_index() / 32;
    if (output >= u64(tokens) * rows) return;
    u32 token = output / rows, row = output % rows;
    PlainWeight weight{codes, scales, format, columns};
    double sum = 0, magnitude = 0;
    for (u32 k = lane_id(); k < columns; k += 32) {
        double term = weight.at(first_row + row, k) * x[u64(token) * columns + k];
        sum += term;
        magnitude += fabs(term);
    }
    sum = warp_sum(sum);
    magnitude = warp_sum(magnitude);
    if (lane_id()) return;
    out[output] = sum;
    magnitudes[output] = magnitude;
}
EXPORT(plain_product);

// Latent attention of one token row over positions 0 to `length` - 1 of bf16 rows [latent + rope] that lie in order:
// out [heads, latent] in f64. A block per head, two passes over the scores, which `scores` [heads, length] keeps.
extern "C" __global__ void plain_latent_attention(const float* query, const u16* rows, u32 length, u32 latent, u32 rope,
                                                  float scale, double* scores, double* out) {
    SHARED(double, partial, CHECK_THREADS / 32);
    u32 width = latent + rope, head = blockIdx.x;
    const float* q = query + u64(head) * width;
    double* mine = scores + u64(head) * length;
    for (u32 j = warp_id(); j < length; j += CHECK_THREADS / 32) {
        double sum = 0;
        for (u32 i = lane_id(); i < width; i += 32)
            sum += double(bf16_to_f32(f32_to_bf16(q[i]))) * bf16_to_f32(rows[u64(j) * width + i]);
        sum = warp_sum(sum);
        if (lane_id() == 0) mine[j] = sum * scale;
    }
    __syncthreads();
    double peak = -1e300;
    for (u32 j = 0; j < length; j++) peak = mine[j] > peak ? mine[j] : peak;
    __syncthreads();
    double total = 0;
    for (u32 j = threadIdx.x; j < length; j += CHECK_THREADS) {
        double weight = exp(mine[j] - peak);
        mine[j] = weight;
        total += weight;
    }
    total = warp_sum(total);
    if (lane_id() == 0) partial[warp_id()] = total;
    __syncthreads();
    total = 0;
    for (u32 i = 0; i < CHECK_THREADS / 32; i++) total += partial[i];
    for (u32 i = threadIdx.x; i < latent; i += CHECK_THREADS) {
        double sum = 0;
        for (u32 j = 0; j < length; j++) sum += mine[j] * bf16_to_f32(rows[u64(j) * width + i]);
        out[u64(head) * latent + i] = sum / total;
    }
}
EXPORT(plain_latent_attention);

// The greatest |got - want| / magnitude (where that is 0, of 1), as the bits of an f32, which for what is not negative
// are ordered as the numbers are; NaN counts as infinity. `worst` begins as 0.
extern "C" __global__ void compare_f64(const float* got, const double* want, const double* magnitudes, u64 count, u32* worst) {
    float most = 0;
    for (u64 i = first_index(); i < count; i += index_step()) {
        double magnitude = magnitudes && magnitudes[i] > 0 ? magnitudes[i] : 1;
        float error = float(fabs(double(got[i]) - want[i]) / magnitude);
        if (error != error) error = INFINITY;
        most = error > most ? error : most;
    }
    most = warp_max(most);
    if (lane_id() == 0) atomicMax(worst, __float_as_uint(most));
}
EXPORT(compare_f64);

// How many words differ.
extern "C" __global__ void count_differences(const u32* a, const u32* b, u64 count, u32* different) {
    u32 mine = 0;
    for (u64 i = first_index(); i < count; i += index_step()) mine += a[i] != b[i];
    if (mine) atomicAdd(different, mine);
}
EXPORT(count_differences);

// Copies vectors of 16 bytes: the bandwidth that a kernel can have.
extern "C" __global__ void __launch_bounds__(CHECK_THREADS) copy_vectors(const Bytes16* from, Bytes16* to, u64 count) {
    u64 step = index_step();
    u64 i = first_index();
    for (; i + 3 * step < count; i += 4 * step) {
        Bytes16 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
        to[i] = a;
        to[i + step] = b;
        to[i + 2 * step] = c;
        to[i + 3 * step] = d;
    }
    for (; i < count; i += step) to[i] = from[i];
}
EXPORT(copy_vectors);

// Reads vectors of 16 bytes and writes only what no data makes: the bandwidth of a stream of weights.
extern "C" __global__ void __launch_bounds__(CHECK_THREADS) read_vectors(const Bytes16* from, u64 count, u32* never) {
    u64 step = index_step();
    u64 i = first_index();
    u32 all = 0;
    for (; i + 3 * step < count; i += 4 * step) {
        Bytes16 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
        all |= (a.x & a.y & a.z & a.w) | (b.x & b.y & b.z & b.w) | (c.x & c.y & c.z & c.w) | (d.x & d.y & d.z & d.w);
    }
    for (; i < count; i += step) all |= from[i].x;
    if (all == 0x5EED5EED) atomicOr(never, all);
}
EXPORT(read_vectors);

// Products of fragments in registers, eight chains of them per warp: the arithmetic peak of mma.sync.
extern "C" __global__ void __launch_bounds__(CHECK_THREADS) multiply_forever(u32 rounds, float* out) {
    u32 a[4], b[2];
    for (u32 i = 0; i < 4; i++) a[i] = 0x3f803f80 + threadIdx.x;
    for (u32 i = 0; i < 2; i++) b[i] = 0x3f803f80 - threadIdx.x;
    float d[8][4] = {};
    for (u32 round = 0; round < rounds; round++) {
#pragma unroll
        for (u32 chain = 0; chain < 8; chain++) multiply_bf16(d[chain], a, b);
    }
    float sum = 0;
    for (u32 chain = 0; chain < 8; chain++)
        for (u32 i = 0; i < 4; i++) sum += d[chain][i];
    if (sum == -1.0f) out[0] = sum;
}
EXPORT(multiply_forever);
