// From a row of logits to a token: adjustments, filters and the draw.
//
// A block takes a row. Probabilities relative to the most likely token are whole numbers of 2^-40, so that their
// sums are exact: no order of threads changes a choice, and the limits of top-k and top-p are found by
// counting instead of sorting. What is less likely than 2^-40 of the most likely token is never drawn.
#include "primitives.cuh"

constexpr u32 SAMPLE_THREADS = 512;
constexpr u32 SAMPLE_WARPS = SAMPLE_THREADS / 32;
// A relative probability of 1.
constexpr float ONE = 1099511627776.0f;

// What is done to the logit of one token before the choice.
struct Adjustment {
    u32 row, token;
    // Added first.
    float bias;
    // 0: not in the prompt or the output; else 1 + how often in the output.
    u32 seen;
};

struct Penalties {
    float repetition, frequency, presence;
};

// How a row's token is chosen.
struct Sampling {
    // 0: the most likely token, and nothing below applies.
    float temperature;
    float min_p, top_p;
    // 0: all.
    u32 top_k;
    // The draw, as a share of 2^64.
    u64 uniform;
};

// Adds biases and penalties, in place: one thread per adjustment, at most one adjustment per row and token.
extern "C" __global__ void adjust_logits(float* logits, u32 vocab, const Adjustment* adjustments, u32 count,
                                         const Penalties* penalties) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    Adjustment a = adjustments[i];
    Penalties p = penalties[a.row];
    float* at = logits + u64(a.row) * vocab + a.token;
    float x = *at + a.bias;
    if (a.seen) {
        x = x > 0.0f ? x / p.repetition : x * p.repetition;
        u32 occurrences = a.seen - 1;
        if (occurrences) x = x - p.frequency * float(occurrences) - p.presence;
    }
    *at = x;
}
EXPORT(adjust_logits);

// Larger for what is more likely, of equal logits for the lower id. NaN and what is masked come last.
DEVICE u64 rank_of(float logit, u32 id) {
    return u64(ascending_bits(logit + 0.0f)) << 32 | u32(~id);
}

struct SampleRow {
    const float* logits;
    const u32* mask;
    u32 vocab;

    DEVICE bool allowed(u32 id) const { return !mask || mask[id / 32] >> (id % 32) & 1; }
    // -inf for NaN and for tokens that the mask leaves out.
    DEVICE float logit(u32 id) const {
        if (!allowed(id)) return -INFINITY;
        float x = logits[id];
        return x == x ? x : -INFINITY;
    }
};

// The greatest of all threads' values, for all of them.
DEVICE u64 block_max(u64 x, u64* scratch) {
    for (int bits = 16; bits; bits >>= 1) {
        u64 other = __shfl_xor_sync(ALL_LANES, x, bits);
        x = other > x ? other : x;
    }
    __syncthreads();
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    for (u32 i = 0; i < SAMPLE_WARPS; i++) x = scratch[i] > x ? scratch[i] : x;
    return x;
}

DEVICE u64 block_sum(u64 x, u64* scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    u64 sum = 0;
    for (u32 i = 0; i < SAMPLE_WARPS; i++) sum += scratch[i];
    return sum;
}

// What each token weighs.
struct Weigher {
    float max, scale;

    // In 2^-40 of the most likely token.
    DEVICE u64 operator()(float logit) const { return u64(exp2_fast((logit - max) * scale) * ONE); }
};

// Tokens that still take part: as likely as `least_weight`, and ranked no lower than `least_rank`.
struct Kept {
    u64 least_weight, least_rank;

    DEVICE bool has(u64 weight, u64 rank) const { return weight >= least_weight && rank >= least_rank; }
};

// What all kept tokens weigh together.
DEVICE u64 kept_mass(const SampleRow& row, const Weigher& weigh, const Kept& kept, u64* scratch) {
    u64 sum = 0;
    for (u32 id = threadIdx.x; id < row.vocab; id += SAMPLE_THREADS) {
        float logit = row.logit(id);
        u64 weight = weigh(logit);
        if (kept.has(weight, rank_of(logit, id))) sum += weight;
    }
    return block_sum(sum, scratch);
}

// The rank down to which, most likely first, what the kept tokens measure together comes to `want`: each 1 if
// `by_count`, else its weight. 0 if all together do not. Found byte by byte from the top.
DEVICE u64 rank_where(const SampleRow& row, const Weigher& weigh, const Kept& kept, bool by_count, u64 want, u64* bins,
                      u64* found) {
    u64 prefix = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (u32 i = threadIdx.x; i < 256; i += SAMPLE_THREADS) bins[i] = 0;
        __syncthreads();
        for (u32 id = threadIdx.x; id < row.vocab; id += SAMPLE_THREADS) {
            float logit = row.logit(id);
            u64 rank = rank_of(logit, id), weight = weigh(logit);
            bool above_matches = shift == 56 || rank >> (shift + 8) == prefix >> (shift + 8);
            if (!above_matches || !kept.has(weight, rank)) continue;
            atomicAdd(&bins[rank >> shift & 255], by_count ? u64(1) : weight);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u64 sum = 0;
            int bin = 255;
            while (bin >= 0 && sum + bins[bin] < want) sum += bins[bin--];
            found[0] = bin < 0 ? ~u64(0) : u64(bin);
            found[1] = sum;
        }
        __syncthreads();
        if (found[0] == ~u64(0)) return 0;
        prefix |= found[0] << shift;
        want -= found[1];
        __syncthreads();
    }
    return prefix;
}

// The kept token at which the weights, summed by ascending id, pass `target`.
DEVICE u32 token_at(const SampleRow& row, const Weigher& weigh, const Kept& kept, u64 target, u64* scratch, u32* token) {
    u64 before = 0;
    // Whole warps of consecutive ids, so that a scan over the block is a scan over ids.
    for (u32 first = 0; first < row.vocab; first += SAMPLE_THREADS) {
        u32 id = first + threadIdx.x;
        u64 weight = 0;
        if (id < row.vocab) {
            float logit = row.logit(id);
            weight = weigh(logit);
            if (!kept.has(weight, rank_of(logit, id))) weight = 0;
        }
        u64 sum = weight;
        for (u32 by = 1; by < 32; by <<= 1) {
            u64 other = __shfl_up_sync(ALL_LANES, sum, by);
            if (lane_id() >= by) sum += other;
        }
        __syncthreads();
        if (lane_id() == 31) scratch[warp_id()] = sum;
        __syncthreads();
        u64 all = 0;
        for (u32 i = 0; i < SAMPLE_WARPS; i++) {
            if (i == warp_id()) sum += all;
            all += scratch[i];
        }
        // Exactly one token covers the target.
        if (weight && before + sum > target && before + sum - weight <= target) *token = id;
        before += all;
        if (before > target) break;
    }
    __syncthreads();
    return *token;
}

// Chooses a token per row. `mask`, if any, has a bit per token of every row: 1 = may be chosen; if none may, or all
// that may have a logit of -inf, the lowest that may be chosen is, or 0. `log_probability`, if any, gets that
// of the choice under the logits as they are given, without mask or temperature.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    sample(const float* logits, u32 vocab, const u32* mask, const Sampling* sampling, u32* tokens, float* log_probability) {
    SHARED(u64, bins, 256);
    SHARED(u64, scratch, SAMPLE_WARPS);
    SHARED(u64, found, 2);
    SHARED(u32, token, 1);
    u32 words = (vocab + 31) / 32;
    SampleRow row{logits + u64(blockIdx.x) * vocab, mask ? mask + u64(blockIdx.x) * words : nullptr, vocab};
    Sampling how = sampling[blockIdx.x];

    u64 best = 0, allowed = 0;
    for (u32 id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) {
        u64 rank = rank_of(row.logit(id), id);
        best = rank > best ? rank : best;
        if (row.allowed(id)) allowed = ~id > u32(allowed) ? ~id : allowed;
    }
    best = block_max(best, scratch);
    allowed = block_max(allowed, scratch);
    u32 choice = ~u32(best);
    float max = row.logits[choice];
    bool nothing = best >> 32 == rank_of(-INFINITY, 0) >> 32;
    if (nothing) choice = allowed ? ~u32(allowed) : 0;

    if (!nothing && max != INFINITY && how.temperature > 0.0f) {
        // Bounded, so that no difference of 0 becomes NaN.
        Weigher weigh{max, fminf(LOG2_E / how.temperature, 1e30f)};
        u64 least = u64(how.min_p * ONE);
        Kept kept{least ? least : 1, 0};
        if (how.top_k && how.top_k < vocab) kept.least_rank = rank_where(row, weigh, kept, true, how.top_k, bins, found);
        u64 total = kept_mass(row, weigh, kept, scratch);
        if (how.top_p < 1.0f) {
            u64 mass = u64(double(how.top_p) * double(total));
            u64 rank = rank_where(row, weigh, kept, false, mass ? mass : 1, bins, found);
            kept.least_rank = rank > kept.least_rank ? rank : kept.least_rank;
            total = kept_mass(row, weigh, kept, scratch);
        }
        choice = token_at(row, weigh, kept, high_product(how.uniform, total), scratch, token);
    }
    if (threadIdx.x == 0) tokens[blockIdx.x] = choice;
    if (!log_probability) return;

    // Under the logits as they are: NaN counts as -inf, and those of +inf share everything.
    u64 top = 0;
    for (u32 id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) {
        float x = row.logits[id];
        u64 rank = rank_of(x == x ? x : -INFINITY, id);
        top = rank > top ? rank : top;
    }
    float peak = row.logits[~u32(block_max(top, scratch))];
    Weigher weigh{peak, LOG2_E};
    u64 sum = 0;
    for (u32 id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) {
        float x = row.logits[id];
        if (peak == INFINITY) sum += x == INFINITY ? u64(ONE) : 0;
        else if (x > -INFINITY) sum += weigh(x);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x) return;
    float x = row.logits[choice];
    float log_sum = logf(float(double(sum) / double(ONE)));
    bool impossible = x != x || x == -INFINITY || (peak == INFINITY && x != INFINITY);
    float gap = peak == INFINITY ? 0.0f : x - peak;
    log_probability[blockIdx.x] = impossible ? -INFINITY : gap - log_sum;
}
EXPORT(sample);
