// What the attention kernels share: spans, the softmax of a tile, how spans are joined, and 8-bit cache rows.
//
// A row (a query of one head) sees positions in tiles, ascending, and tiles in spans, both from absolute position
// 0. Softmax is kept online inside a span; spans are joined ascending by `join`. Where tiles and spans begin
// depends on the row's own position only, and every step below has one order of operations (no compiler may
// contract what is written with `multiply_rn` and `fmaf`), so it makes no difference to a row's bits which kernel
// took a span, what other rows were with it, and whether its spans went one after another or side by side.
//
// Scores are kept times log2(e): softmax is in powers of two. They and their sums are f32; weights are rounded to
// bf16 for the product with the values, and it is the rounded ones that are summed.
#pragma once
#include "fp8.cuh"

constexpr u32 PAGE = 64;
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

// The first position that a query sees; `window` 0: all.
DEVICE u32 first_seen(u32 position, u32 window) {
    return window && position >= window ? position + 1 - window : 0;
}

// x, had anew: what follows from it is not kept in registers through a loop.
DEVICE u32 anew(u32 x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

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

DEVICE Softmax fresh_softmax() { return {{-INFINITY, -INFINITY}, {0, 0}}; }

// What powers are taken relative to: the greatest score, or anything finite as long as there is none.
DEVICE float base_of(float maximum) { return maximum == -INFINITY ? 0 : maximum; }

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

// ---- Products of a tile, whose rows (positions) are `stride` bytes apart.

// Where a lane reads the keys from row `first` on.
template <u32 stride>
DEVICE const u8* lane_keys(const u8* tile, u32 first, u32 lane) {
    return tile + (first + lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 16;
}
// scores += 16 columns of the queries times the same columns of as many keys.
template <u32 stride, int count>
DEVICE void add_scores(float (&scores)[count][4], const u32 (&query)[4], const u8* keys) {
#pragma unroll
    for (int n = 0; n < count; n += 2) {
        u32 key[4];
        load_matrix_x4(key, keys + n * 8 * stride);
        multiply_bf16(scores[n], query, {key[0], key[1]});
        multiply_bf16(scores[n + 1], query, {key[2], key[3]});
    }
}

// values += weights * the columns of the tile from `from` on.
template <u32 stride, int positions, int columns>
DEVICE void add_values(float (&values)[columns][4], const u32 (&weights)[positions][2], const u8* from, u32 lane) {
    from += lane % 16 * stride + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < positions / 2; step++) {
        const u32 weight[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0],
                               weights[2 * step + 1][1]};
#pragma unroll
        for (int n = 0; n < columns; n += 2) {
            u32 value[4];
            load_matrix_x4_transposed(value, from + step * 16 * stride + n * 16);
            multiply_bf16(values[n], weight, {value[0], value[1]});
            multiply_bf16(values[n + 1], weight, {value[2], value[3]});
        }
    }
}

// ---- Joining spans.

struct Joined {
    float maximum, sum;
};

DEVICE Joined nothing_joined() { return {-INFINITY, 0}; }

// What a span's values, and those joined so far, count with.
struct Shares {
    float keep, take;
};

DEVICE Shares join(Joined& all, float maximum, float sum) {
    float both = fmaxf(all.maximum, maximum), base = base_of(both);
    Shares shares{exp2_fast(all.maximum - base), exp2_fast(maximum - base)};
    all = {both, fmaf(sum, shares.take, multiply_rn(all.sum, shares.keep))};
    return shares;
}

// (A zero that is added makes -0 into +0: tiles of which a row sees nothing may turn one into the other.)
DEVICE float join_value(float all, float value, Shares shares) {
    return fmaf(value + 0.0f, shares.take, multiply_rn(all, shares.keep));
}

// Of a lane's values those of its row `row`, of columns from `column` on, as far as there are `width`: joined to
// what earlier spans left at `to` (`first`: none did), and times `factor`.
template <int columns>
DEVICE void join_values(float* to, u32 column, u32 width, const float (&values)[columns][4], int row, bool first,
                        Shares shares, float factor) {
#pragma unroll
    for (int n = 0; n < columns; n++) {
        if (column + n * 8 >= width) continue;
        Float2* two = reinterpret_cast<Float2*>(to + column + n * 8);
        Float2 old = first ? Float2{0, 0} : *two;
        *two = {multiply_rn(join_value(old.x, values[n][2 * row], shares), factor),
                multiply_rn(join_value(old.y, values[n][2 * row + 1], shares), factor)};
    }
}

// The same values, for attention_merge to join later: part `part` of `parts` in all, then of each its maximum and
// sum.
template <int columns>
DEVICE void store_part(float* partials, u64 parts, u64 part, u32 column, u32 width,
                       const float (&values)[columns][4], int row, float maximum, float sum) {
    float* to = partials + part * width + column;
#pragma unroll
    for (int n = 0; n < columns; n++)
        if (column + n * 8 < width)
            *reinterpret_cast<Float2*>(to + n * 8) = {values[n][2 * row] + 0.0f, values[n][2 * row + 1] + 0.0f};
    if (column == 0) *reinterpret_cast<Float2*>(partials + parts * width + part * 2) = {maximum, sum};
}

// What joined values are multiplied by in the end. A sink is a score without a value.
DEVICE float last_factor(Joined all, const float* sinks, u32 head) {
    if (!sinks) return 1.0f / all.sum;
    float sink = multiply_rn(sinks[head], LOG2_E), base = base_of(fmaxf(all.maximum, sink));
    float keep = exp2_fast(all.maximum - base);
    return keep / fmaf(all.sum, keep, exp2_fast(sink - base));
}

// ---- Rows of 8-bit codes with a scale per 128, as the host's `RowShape` lays them out.

constexpr u32 CODES_PER_SCALE = 128;

DEVICE u32 scales_of(u32 width) { return (width + CODES_PER_SCALE - 1) / CODES_PER_SCALE; }

// Eight codes times their scale, rounded to f32 and then to bf16.
DEVICE Bytes16 scaled_codes(u32 first, u32 second, float scale) {
    u32 pair[4];
    e4m3_to_bf16(first, pair[0], pair[1]);
    e4m3_to_bf16(second, pair[2], pair[3]);
#pragma unroll
    for (int i = 0; i < 4; i++)
        pair[i] = pack_bf16(multiply_rn(low_bf16(pair[i]), scale), multiply_rn(high_bf16(pair[i]), scale));
    return {pair[0], pair[1], pair[2], pair[3]};
}
