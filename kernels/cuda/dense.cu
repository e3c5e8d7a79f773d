// Dense products: planes of bf16 times a weight as it was published, plus a bias, to f32; and the gate and up
// products of a feed-forward with its activation, to planes. For few tokens each block streams its rows of the
// weight with as many copies under way as shared memory holds, and k is spread over blocks; for many tokens blocks
// are wide and take all of k. What is the same in both is in dense.cuh: the order of every sum.
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "activation.cuh"
#include "dense.cuh"

// out[token, head, row] = sum over k of weight and x, + bias, + what is there if `add`.
template <class Block>
DEVICE void dense_product(const DenseCall& call, const float* bias, float* out, u32 out_token, u32 out_head,
                          u32 add) {
    DYNAMIC_SHARED(stages);
    SHARED(u32, flag, 1);
    Block block(call, stages);
    u32 row = block.own_output();
    if (!block.run(flag) || row >= call.rows) return;
    // A sum that began at zero is never -0, so that adding zero changes nothing.
    float offset = bias ? bias[row] : 0;
    float* own = out + u64(block.token_block * Block::TOKENS) * out_token + block.head * out_head + row;
    constexpr u32 BATCH = 4, STEP = Block::TOKEN_STEP;
#pragma unroll 1
    for (u32 first = block.first_token(); first < block.live_tokens; first += BATCH * STEP) {
        float before[BATCH];
#pragma unroll
        for (u32 j = 0; j < BATCH; j++) {
            u32 token = first + j * STEP;
            before[j] = add && token < block.live_tokens ? own[u64(token) * out_token] : 0;
        }
#pragma unroll
        for (u32 j = 0; j < BATCH; j++) {
            u32 token = first + j * STEP;
            if (token >= block.live_tokens) break;
            float sum = *block.tile_at(token, threadIdx.x % Block::OUTPUTS) + offset;
            own[u64(token) * out_token] = before[j] + sum;
        }
    }
}

// out[plane, token, row] = planes of the activation of gate and up.
template <class Block>
DEVICE void dense_pair(const DenseCall& call, const float* bias, u16* out, u64 out_plane, u32 out_token,
                       const Activation& activation) {
    DYNAMIC_SHARED(stages);
    SHARED(u32, flag, 1);
    Block block(call, stages);
    u32 row = block.own_output(), own_row = threadIdx.x % Block::OUTPUTS;
    if (!block.run(flag) || row >= call.rows) return;
    float gate_offset = bias ? bias[2 * row] : 0, up_offset = bias ? bias[2 * row + 1] : 0;
#pragma unroll 1
    for (u32 token = block.first_token(); token < block.live_tokens; token += Block::TOKEN_STEP) {
        float gate = *block.tile_at(token, own_row) + gate_offset;
        float up = *block.tile_at(token, Block::OUTPUTS + own_row) + up_offset;
        float rest = activation.accurate(gate, up);
        u16* to = out + u64(block.token_block * Block::TOKENS + token) * out_token + row;
#pragma unroll
        for (int plane = 0; plane < Block::PLANES; plane++) to[plane * out_plane] = take_plane(rest);
    }
}

template <Weight weight, Layout layout, int tokens, int planes>
using Narrow = DenseBlock<weight, layout, 4, 1, 1, tokens / 8, weight == Weight::Fp8 ? 128 : 64, planes>;
// Decoding codes takes most of the instructions: for many tokens at once.
template <Weight weight, Layout layout>
using Wide = DenseBlock<weight, layout, weight == Weight::Fp8 ? 8 : 4, weight == Weight::Fp8 ? 1 : 2,
                        weight == Weight::Fp8 ? 1 : 2, 8, 64, 1>;

#define PRODUCT(name, ...)                                                                                    \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS) name(                                  \
        const u16* x, u64 x_plane, u32 x_token, u32 x_head, const u8* weights, const float* scales,           \
        u32 width, u32 first_row, u32 head_rows, u32 rows, u32 columns, u32 tokens, u32 piece,                \
        Float4* workspace, u32* counters, const float* bias, float* out, u32 out_token, u32 out_head,         \
        u32 add) {                                                                                            \
        DenseCall call{x,     x_plane,   x_token,   x_head, weights, nullptr, scales, nullptr,   width,       \
                       first_row, head_rows, rows,  columns, tokens, piece,   workspace, counters};           \
        dense_product<__VA_ARGS__>(call, bias, out, out_token, out_head, add);                                \
    }                                                                                                         \
    EXPORT(name)

#define PAIR(name, ...)                                                                                       \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS) name(                                  \
        const u16* x, u64 x_plane, u32 x_token, const u8* gate, const u8* up, const float* gate_scales,       \
        const float* up_scales, u32 width, u32 first_row, u32 rows, u32 columns, u32 tokens, u32 piece,       \
        Float4* workspace, u32* counters, const float* bias, u16* out, u64 out_plane, u32 out_token,          \
        u32 clamped, float limit, float alpha) {                                                              \
        DenseCall call{x,         x_plane, x_token, 0,       gate,   up,    gate_scales, up_scales, width,    \
                       first_row, 0,       rows,    columns, tokens, piece, workspace,   counters};           \
        dense_pair<__VA_ARGS__>(call, bias, out, out_plane, out_token, {clamped, limit, alpha});              \
    }                                                                                                         \
    EXPORT(name)

constexpr Weight BF16 = Weight::Bf16, FP8 = Weight::Fp8;
constexpr Layout ROWS = Layout::Rows, TRANSPOSED = Layout::Transposed, GATE_UP = Layout::Pair;

// By the number of tokens that a block has at most, and of planes.
PRODUCT(dense_bf16_t8_p1, Narrow<BF16, ROWS, 8, 1>);
PRODUCT(dense_bf16_t16_p1, Narrow<BF16, ROWS, 16, 1>);
PRODUCT(dense_bf16_t32_p1, Narrow<BF16, ROWS, 32, 1>);
PRODUCT(dense_bf16_t64_p1, Narrow<BF16, ROWS, 64, 1>);
PRODUCT(dense_bf16_t32_p3, Narrow<BF16, ROWS, 32, 3>);
PRODUCT(dense_bf16_wide_p1, Wide<BF16, ROWS>);
PRODUCT(dense_fp8_t8_p1, Narrow<FP8, ROWS, 8, 1>);
PRODUCT(dense_fp8_t16_p1, Narrow<FP8, ROWS, 16, 1>);
PRODUCT(dense_fp8_t32_p1, Narrow<FP8, ROWS, 32, 1>);
PRODUCT(dense_fp8_t64_p1, Narrow<FP8, ROWS, 64, 1>);
PRODUCT(dense_fp8_t32_p3, Narrow<FP8, ROWS, 32, 3>);
PRODUCT(dense_fp8_wide_p1, Wide<FP8, ROWS>);

PRODUCT(dense_transposed_bf16_t16_p1, Narrow<BF16, TRANSPOSED, 16, 1>);
PRODUCT(dense_transposed_bf16_t32_p3, Narrow<BF16, TRANSPOSED, 32, 3>);
PRODUCT(dense_transposed_bf16_wide_p1, Wide<BF16, TRANSPOSED>);
PRODUCT(dense_transposed_fp8_t16_p1, Narrow<FP8, TRANSPOSED, 16, 1>);
PRODUCT(dense_transposed_fp8_t32_p3, Narrow<FP8, TRANSPOSED, 32, 3>);
PRODUCT(dense_transposed_fp8_wide_p1, Wide<FP8, TRANSPOSED>);

PAIR(dense_pair_bf16_t16_p1, Narrow<BF16, GATE_UP, 16, 1>);
PAIR(dense_pair_bf16_t64_p1, Narrow<BF16, GATE_UP, 64, 1>);
PAIR(dense_pair_bf16_t32_p3, Narrow<BF16, GATE_UP, 32, 3>);
PAIR(dense_pair_bf16_wide_p1, Wide<BF16, GATE_UP>);
PAIR(dense_pair_fp8_t16_p1, Narrow<FP8, GATE_UP, 16, 1>);
PAIR(dense_pair_fp8_t64_p1, Narrow<FP8, GATE_UP, 64, 1>);
PAIR(dense_pair_fp8_t32_p3, Narrow<FP8, GATE_UP, 32, 3>);
PAIR(dense_pair_fp8_wide_p1, Wide<FP8, GATE_UP>);
