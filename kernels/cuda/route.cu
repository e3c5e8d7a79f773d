// The router: from a token's logits to its experts, in ascending order, and their weights.
//
// The rules are those of the host's router: the bias takes part in the choice only, of equal values the lowest
// index wins, and NaN is below everything. A warp per token: expert e is lane e % 32's, so that logits are read
// side by side; values are compared as whole numbers in their order, which a warp does in one instruction.
//
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "lanes.cuh"

constexpr u32 WARPS = 4;
constexpr u32 MOST_EXPERTS = 512;
// A place more for every 32: lanes that read a group each then meet no other in a bank.
constexpr u32 PLACES = MOST_EXPERTS + MOST_EXPERTS / 32;

enum ScoreRule : u32 { SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN };
enum GroupRule : u32 { BEST, BEST_TWO };
enum NormaliseRule : u32 { AS_IS, BY_SUM_AND_EPSILON, BY_SUM_OR_FLOOR };

struct Rule {
    u32 experts, top_k, score;
    // Groups of the experts of which only the best may be chosen from; 1: all experts.
    u32 groups, keep, group_rule;
    u32 normalise;
    float normalise_by, scale;
};

DEVICE u32 place_of(u32 expert) { return expert + expert / 32; }

// A whole number that is greater where the value is. Zeros are equal, NaN is 1, and 0 is left for what may not be
// chosen.
DEVICE u32 order_of(float x) {
    if (x != x) return 1;
    return ascending_bits(x == 0.0f ? 0.0f : x);
}
DEVICE float value_of(u32 order) {
    return __uint_as_float(order == 1 ? 0x7fffffff : order & 0x80000000 ? order & 0x7fffffff : ~order);
}

// The groups to choose from, a bit for each, given the biased scores. There are at most 32: several lanes look for
// the best two of a group's members, then lane g has group g.
DEVICE u32 kept_groups(const Rule& rule, const float* choice) {
    u32 ways = 1;
    while (ways < rule.groups) ways *= 2;
    u32 lanes = 32 / ways, group = lane_id() / lanes, size = rule.experts / rule.groups;
    u32 first = 0, second = 0;
    if (group < rule.groups) {
        for (u32 member = lane_id() % lanes; member < size; member += lanes) {
            u32 order = order_of(choice[place_of(group * size + member)]);
            second = max(second, min(first, order));
            first = max(first, order);
        }
    }
    for (u32 step = lanes / 2; step; step /= 2) {
        u32 other_first = __shfl_xor_sync(ALL_LANES, first, int(step));
        u32 other_second = __shfl_xor_sync(ALL_LANES, second, int(step));
        second = max(max(second, other_second), min(first, other_first));
        first = max(first, other_first);
    }
    float score = value_of(first);
    if (rule.group_rule == BEST_TWO && size > 1) score += value_of(second);
    u32 mine = order_of(__shfl_sync(ALL_LANES, score, int(lane_id() * lanes & 31)));
    u32 ahead = 0;
    for (u32 other = 0; other < rule.groups; other++) {
        u32 theirs = __shfl_sync(ALL_LANES, mine, int(other));
        ahead += theirs > mine || (theirs == mine && other < lane_id());
    }
    return __ballot_sync(ALL_LANES, lane_id() < rule.groups && ahead < rule.keep);
}

// Lane r < top_k holds one of the chosen. Divides as the rule says; the sum has the order of the lanes.
DEVICE float weight_of_chosen(const Rule& rule, float score) {
    bool chosen = lane_id() < rule.top_k;
    if (rule.score == SOFTMAX_OF_CHOSEN) {
        float peak = warp_max(chosen ? score : -INFINITY);
        float power = chosen ? expf(score - peak) : 0.0f;
        score = power / warp_sum(power);
    }
    if (rule.normalise != AS_IS) {
        float sum = warp_sum(chosen ? score : 0.0f);
        score /= rule.normalise == BY_SUM_AND_EPSILON ? sum + rule.normalise_by : fmaxf(sum, rule.normalise_by);
    }
    return score * rule.scale;
}

template <u32 MINE>
DEVICE void to_scores(const Rule& rule, float (&score)[MINE]) {
    if (rule.score == SIGMOID) {
#pragma unroll
        for (u32 i = 0; i < MINE; i++) score[i] = 1.0f / (1.0f + expf(-score[i]));
    }
    if (rule.score == SOFTMAX) {
        float peak = -INFINITY, sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < MINE; i++) peak = fmaxf(peak, score[i]);
        peak = warp_max(peak);
#pragma unroll
        for (u32 i = 0; i < MINE; i++) {
            score[i] = i * 32 + lane_id() < rule.experts ? expf(score[i] - peak) : 0.0f;
            sum += score[i];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (u32 i = 0; i < MINE; i++) score[i] /= sum;
    }
}

// `MINE` experts per lane. `places` is room for a value of every expert.
template <u32 MINE>
DEVICE void route_token(const Rule& rule, const float* logits, const float* bias, float* places, int* ids,
                        float* weights) {
    u32 lane = lane_id();
    float score[MINE];
#pragma unroll
    for (u32 i = 0; i < MINE; i++)
        score[i] = i * 32 + lane < rule.experts ? logits[i * 32 + lane] : -INFINITY;
    to_scores(rule, score);

    u32 order[MINE];
#pragma unroll
    for (u32 i = 0; i < MINE; i++) {
        u32 expert = i * 32 + lane;
        bool exists = expert < rule.experts;
        float choice = bias && exists ? score[i] + bias[expert] : score[i];
        order[i] = exists ? order_of(choice) : 0;
        if (rule.groups > 1 && exists) places[place_of(expert)] = choice;
    }
    if (rule.groups > 1) {
        __syncwarp();
        u32 kept = kept_groups(rule, places), size = rule.experts / rule.groups;
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < MINE; i++)
            if (!(kept >> min((i * 32 + lane) / size, 31u) & 1)) order[i] = 0;
    }
#pragma unroll
    for (u32 i = 0; i < MINE; i++) places[place_of(i * 32 + lane)] = score[i];

    u32 mine = ~0u;
    for (u32 rank = 0; rank < rule.top_k; rank++) {
        u32 best = 0, at = ~0u;
#pragma unroll
        for (u32 i = 0; i < MINE; i++) best = max(best, order[i]);
        best = greatest_of_lanes(best);
#pragma unroll
        for (u32 i = MINE; i-- > 0;)
            if (order[i] == best) at = i * 32 + lane;
        at = least_of_lanes(at);
#pragma unroll
        for (u32 i = 0; i < MINE; i++)
            if (i * 32 + lane == at) order[i] = 0;
        if (lane == rank) mine = at;
    }
    // Makes the places of other lanes known to this one, too.
    __syncwarp();
    float weight = weight_of_chosen(rule, lane < rule.top_k ? places[place_of(mine)] : 0.0f);
    u32 before = 0;
    for (u32 rank = 0; rank < rule.top_k; rank++) before += __shfl_sync(ALL_LANES, mine, int(rank)) < mine;
    if (lane >= rule.top_k) return;
    ids[before] = int(mine);
    weights[before] = weight;
}

// logits [tokens, experts] (and a bias of every expert) to ids and weights [tokens, top_k], top_k <= 32.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    route(const float* logits, const float* bias, u32 tokens, u32 experts, u32 top_k, u32 score, u32 groups,
          u32 keep, u32 group_rule, u32 normalise, float normalise_by, float scale, int* ids, float* weights) {
    SHARED(float, places, WARPS * PLACES);
    wait_for_previous();
    let_next_start();
    u64 token = u64(blockIdx.x) * (blockDim.x / 32) + warp_id();
    if (token >= tokens) return;
    Rule rule{experts, top_k, score, groups, keep, group_rule, normalise, normalise_by, scale};
    logits += token * experts;
    ids += token * top_k;
    weights += token * top_k;
    float* mine = places + warp_id() * PLACES;
    if (experts <= 64) route_token<2>(rule, logits, bias, mine, ids, weights);
    else if (experts <= 128) route_token<4>(rule, logits, bias, mine, ids, weights);
    else if (experts <= 256) route_token<8>(rule, logits, bias, mine, ids, weights);
    else if (experts <= 384) route_token<12>(rule, logits, bias, mine, ids, weights);
    else route_token<16>(rule, logits, bias, mine, ids, weights);
}
EXPORT(route);
