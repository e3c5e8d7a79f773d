// What the attention kernels share: spans, the softmax of a tile, how spans are joined, and 8-bit cache rows.
//
// A row (a query of one head) sees positions in tiles, ascending, and tiles in spans, both from absolute position
// 0. Softmax is kept online inside a span; spans are joined ascending by `join`. Where tiles and spans begin
// depends on the row's own position only, and every step below has one order of operations (no compiler may
// contract what is written with `multiply` and `fmaf`), so it makes no difference to a row's bits which kernel
// took a span, what other rows were with it, and whether its spans went one after another or side by side.
//
// Scores are kept times log2(e): softmax is in powers of two. They and their sums are f32; weights are rounded to
// bf16 for the product with the values, and it is the rounded ones that are summed.
#pragma once
#include "primitives.cuh"

constexpr u32 PAGE = 64;
constexpr float LOG2_E = 1.44269504088896340736f;
// Spans of a row without a window, at most.
constexpr u32 MAX_SPANS = 128;

// Positions of a span, for a query at `position`; always whole pages. As many spans as a device has
// multiprocessors (an H100 132) where the context is long enough for it, so that one sequence keeps all busy; not
// shorter than 256 and from 16,384 on 512 positions, since a span of latent attention costs a partial result of
// 131 KB, as much as 114 positions.
DEVICE u32 span_length(u32 position) {
    if (position < 16384) return 256;
    return max(512u, (position / 8192 + 1) * 64);
}

DEVICE float minus_infinity() { return __uint_as_float(0xff800000); }

// a * b that stays a product of its own.
DEVICE float multiply(float a, float b) {
#ifdef __CUDACC__
    float r;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return a * b;
#endif
}

// x, had anew: what follows from it is not kept in registers through a loop.
DEVICE u32 anew(u32 x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

struct __attribute__((aligned(8))) Float2 {
    float x, y;
};
struct __attribute__((aligned(16))) Float4 {
    float x, y, z, w;
};

// Row of a cache that holds an absolute position; `table` is the sequence's.
DEVICE u64 cache_row(const int* table, u32 position) {
#ifdef FAULT_PAGE
    return u64(table[position < PAGE ? 0 : position / PAGE - 1]) * PAGE + position % PAGE;
#else
    return u64(table[position / PAGE]) * PAGE + position % PAGE;
#endif
}

// ---- The softmax of a span, tile by tile. A lane holds two rows: lane / 4, and that plus 8.

struct Softmax {
    float maximum[2];
    // This lane's columns only, until the span ends.
    float sum[2];
};

DEVICE Softmax fresh_softmax() { return {{minus_infinity(), minus_infinity()}, {0, 0}}; }

// What powers are taken relative to: the greatest score, or anything finite as long as there is none.
DEVICE float base_of(float maximum) { return maximum == minus_infinity() ? 0 : maximum; }

// Weights of a tile's scores as pairs of bf16, in the layout in which they are the next product's A fragments;
// `keep` is what the row's values so far are to be multiplied by. A tile of which a row sees nothing (all -inf)
// changes nothing of the row.
template <int columns>
DEVICE void soften(const float (&scores)[columns][4], u32 (&weights)[columns][2], Softmax& state,
                   float (&keep)[2]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float maximum = state.maximum[row];
#pragma unroll
        for (int n = 0; n < columns; n++)
            maximum = fmaxf(maximum, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
        maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 2));
        float base = base_of(maximum), sum = 0;
#pragma unroll
        for (int n = 0; n < columns; n++) {
            weights[n][row] =
                pack_bf16(exp2_fast(scores[n][2 * row] - base), exp2_fast(scores[n][2 * row + 1] - base));
            sum += low_bf16(weights[n][row]);
            sum += high_bf16(weights[n][row]);
        }
        keep[row] = exp2_fast(state.maximum[row] - base);
        state.sum[row] = fmaf(state.sum[row], keep[row], sum);
        state.maximum[row] = maximum;
    }
}

// Both rows' values so far, brought to the new maximum. Most tiles bring none: then nothing is to be done.
template <int columns>
DEVICE void rescale(float (&values)[columns][4], const float (&keep)[2]) {
    if (__all_sync(ALL_LANES, keep[0] == 1 && keep[1] == 1)) return;
#pragma unroll
    for (int n = 0; n < columns; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) values[n][i] *= keep[i / 2];
    }
}

template <int columns>
DEVICE void clear(float (&values)[columns][4]) {
#pragma unroll
    for (int n = 0; n < columns; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) values[n][i] = 0;
    }
}

// The sum over a row's four lanes.
DEVICE float row_sum(float sum) {
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// ---- Joining spans.

struct Joined {
    float maximum, sum;
};

DEVICE Joined nothing_joined() { return {minus_infinity(), 0}; }

// What a span's values, and those joined so far, count with.
struct Shares {
    float keep, take;
};

DEVICE Shares join(Joined& all, float maximum, float sum) {
    float both = fmaxf(all.maximum, maximum), base = base_of(both);
    Shares shares{exp2_fast(all.maximum - base), exp2_fast(maximum - base)};
    all = {both, fmaf(sum, shares.take, multiply(all.sum, shares.keep))};
    return shares;
}

// (A zero that is added makes -0 into +0: tiles of which a row sees nothing may turn one into the other.)
DEVICE float join_value(float all, float value, Shares shares) {
    return fmaf(value + 0.0f, shares.take, multiply(all, shares.keep));
}

// What joined values are multiplied by in the end. A sink is a score without a value.
DEVICE float last_factor(Joined all, const float* sinks, u32 head) {
    if (!sinks) return 1.0f / all.sum;
    float sink = multiply(sinks[head], LOG2_E), base = base_of(fmaxf(all.maximum, sink));
    float keep = exp2_fast(all.maximum - base);
    return keep / fmaf(all.sum, keep, exp2_fast(sink - base));
}

// ---- Rows of 8-bit codes with a scale per 128, as the host's `RowShape` lays them out.

constexpr u32 CODES_PER_SCALE = 128;

DEVICE u32 scales_of(u32 width) { return (width + CODES_PER_SCALE - 1) / CODES_PER_SCALE; }

// Two e4m3 codes in the high bytes of both halves as bf16, exactly: shifted to where bf16 has its exponent they
// are 2^-120 of their value, those without leading one as well.
DEVICE u32 e4m3_pair(u32 codes) {
    u32 small = (codes & 0x7f007f00) >> 4 | (codes & 0x80008000);
    return fma_bf16x2(small, 0x7b807b80, 0x80008000);
}

// Eight codes times their scale, rounded to f32 and then to bf16.
DEVICE Bytes16 scaled_codes(u32 first, u32 second, float scale) {
    u32 out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 pair = e4m3_pair(permute(i < 2 ? first : second, 0, i % 2 ? 0x3424 : 0x1404));
        out[i] = pack_bf16(multiply(low_bf16(pair), scale), multiply(high_bf16(pair), scale));
    }
    return {out[0], out[1], out[2], out[3]};
}
