// Attention in f32 throughout, and the joining of spans that were computed side by side.
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "attention.cuh"

// ---- The plain form: f32 caches, no tensor cores, one warp for a query head. It is what the others are held
// against on a device, and how they compute with exact numerics; it is not meant to be fast.

constexpr u32 PLAIN_TILE = 32;
constexpr u32 PLAIN_COLUMNS = 16;

// Grid [tokens, heads / 4], 128 threads. Of the caches, rows of `key_row` and `value_row` values, a head's `key`
// and `value` columns; for latents both are the same cache. `window` 0: none. Up to 512 values.
extern "C" __global__ void __launch_bounds__(128, 4)
    attention_f32(const float* queries, const float* keys, const float* values, const int* positions,
                  const int* sequences, const int* tables, u32 table_width, u32 heads, u32 kv_heads, u32 key,
                  u32 value, u32 key_row, u32 value_row, float scale, u32 window, const float* sinks, float* out) {
    wait_for_previous();
    let_next_start();
    u32 token = blockIdx.x, head = blockIdx.y * 4 + warp_id(), lane = lane_id();
    if (head >= heads || positions[token] < 0) return;
    u32 position = positions[token], length = span_length(position);
    u32 begin = first_seen(position, window);
    u32 kv_head = head / (heads / kv_heads);
    const int* table = tables + u64(sequences[token]) * table_width;
    const float* query = queries + (u64(token) * heads + head) * key;
    float factor = multiply_rn(scale, LOG2_E);

    Joined all = nothing_joined();
    float joined[PLAIN_COLUMNS] = {};
    for (u32 span = begin / length; span <= position / length; span++) {
        float maximum = -INFINITY, sum = 0, part[PLAIN_COLUMNS] = {};
        u32 span_end = min((span + 1) * length, position + 1);
        for (u32 first = span * length; first < span_end; first += PLAIN_TILE) {
            float score = -INFINITY;
            for (u32 j = 0; j < PLAIN_TILE; j++) {
                if (first + j < begin || first + j >= span_end) continue;
                const float* row = keys + cache_row(table, first + j) * key_row + kv_head * key;
                float dot = 0;
                for (u32 column = lane; column < key; column += 32) dot = fmaf(query[column], row[column], dot);
                dot = warp_sum(dot);
                if (lane == j) score = multiply_rn(dot, factor);
            }
            float before = maximum;
            maximum = fmaxf(maximum, warp_max(score));
            float weight = exp2_fast(score - base_of(maximum)), keep = exp2_fast(before - base_of(maximum));
            sum = fmaf(sum, keep, warp_sum(weight));
            for (u32 i = 0; i < PLAIN_COLUMNS; i++) part[i] *= keep;
            for (u32 j = 0; j < PLAIN_TILE; j++) {
                float share = __shfl_sync(ALL_LANES, weight, j);
                if (first + j < begin || first + j >= span_end) continue;
                const float* row = values + cache_row(table, first + j) * value_row + kv_head * value;
                for (u32 i = 0; i < PLAIN_COLUMNS; i++)
                    if (lane + 32 * i < value) part[i] = fmaf(share, row[lane + 32 * i], part[i]);
            }
        }
        Shares shares = join(all, maximum, sum);
        for (u32 i = 0; i < PLAIN_COLUMNS; i++) joined[i] = join_value(joined[i], part[i], shares);
    }
    float last = last_factor(all, sinks, head);
    for (u32 i = 0; i < PLAIN_COLUMNS; i++)
        if (lane + 32 * i < value)
            out[(u64(token) * heads + head) * value + lane + 32 * i] = multiply_rn(joined[i], last);
}
EXPORT(attention_f32);

// ---- Joining.

constexpr u32 MERGE_WARPS = 8;

// Grid [tokens, heads], a warp for every 64 values. `partials` as latent and grouped attention leave them:
// [tokens, spans, heads, value], then [tokens, spans, heads, {maximum, sum}], with a row's first span at 0.
extern "C" __global__ void __launch_bounds__(256)
    attention_merge(const float* partials, const int* positions, const float* sinks, float* out, u32 spans,
                    u32 heads, u32 value, u32 window) {
    wait_for_previous();
    let_next_start();
    u32 token = blockIdx.x, head = blockIdx.y, lane = lane_id();
    if (positions[token] < 0) return;
    u32 position = positions[token], length = span_length(position);
    u32 begin = first_seen(position, window);
    u32 count = position / length - begin / length + 1;
    u64 first = u64(token) * spans * heads + head;

    // Shares as `join` gives them one after another: the greatest so far is the same in any order.
    SHARED(Shares, all_shares, MERGE_WARPS * MAX_SPANS);
    SHARED(float, all_sums, MERGE_WARPS * MAX_SPANS);
    Shares* shares = all_shares + warp_id() * MAX_SPANS;
    float* sums = all_sums + warp_id() * MAX_SPANS;
    auto* states = reinterpret_cast<const Float2*>(partials + u64(gridDim.x) * spans * heads * value);
    float before = -INFINITY;
    for (u32 some = 0; some < count; some += 32) {
        Float2 state{-INFINITY, 0};
        if (some + lane < count) state = states[first + u64(some + lane) * heads];
        float greatest = fmaxf(state.x, before);
        for (u32 by = 1; by < 32; by *= 2) {
            float other = __shfl_up_sync(ALL_LANES, greatest, by);
            if (lane >= by) greatest = fmaxf(greatest, other);
        }
        float left = __shfl_up_sync(ALL_LANES, greatest, 1), base = base_of(greatest);
        if (lane == 0) left = before;
        if (some + lane < count) {
            shares[some + lane] = {exp2_fast(left - base), exp2_fast(state.x - base)};
            sums[some + lane] = state.y;
        }
        before = __shfl_sync(ALL_LANES, greatest, 31);
    }
    __syncwarp();
    Joined all{before, 0};
    for (u32 span = 0; span < count; span++)
        all.sum = fmaf(sums[span], shares[span].take, multiply_rn(all.sum, shares[span].keep));

    u32 column = warp_id() * 64 + lane * 2;
    if (column >= value) return;
    Float2 joined{0, 0};
    const float* from = partials + first * value + column;
#pragma unroll 16
    for (u32 span = 0; span < count; span++) {
        Float2 part = *reinterpret_cast<const Float2*>(from + u64(span) * heads * value);
        joined = {join_value(joined.x, part.x, shares[span]), join_value(joined.y, part.y, shares[span])};
    }
    float last = last_factor(all, sinks, head);
    *reinterpret_cast<Float2*>(out + (u64(token) * heads + head) * value + column) = {multiply_rn(joined.x, last),
                                                                                      multiply_rn(joined.y, last)};
}
EXPORT(attention_merge);
