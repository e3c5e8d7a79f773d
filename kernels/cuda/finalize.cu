// What the experts gave, brought back to the tokens.
//
// x[t] = x[t] + shared[t] + weight[t, 0] * out[t, 0] + weight[t, 1] * out[t, 1] ..: one chain of f32, ranks
// ascending, whatever the order in which experts were computed.
//
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "rows.cuh"

struct Token {
    float* x;
    const float *shared, *out, *weights;
    u32 hidden, top_k;
    bool add;
};

// Four columns: a token's rows are read side by side, and all ranks' loads are under way together.
template <bool wide>
DEVICE void finalize_columns(const Token& token, u32 column) {
    auto load = [&](const float* row) { return load_four(row, column, token.hidden, wide); };
    Float4 value{0, 0, 0, 0};
    if (token.add) value = load(token.x);
    if (token.shared) {
        Float4 shared = load(token.shared);
        value = {value.x + shared.x, value.y + shared.y, value.z + shared.z, value.w + shared.w};
    }
#pragma unroll 8
    for (u32 rank = 0; rank < token.top_k; rank++) {
        float weight = token.weights[rank];
        Float4 out = load(token.out + u64(rank) * token.hidden);
        value = {fmaf(weight, out.x, value.x), fmaf(weight, out.y, value.y), fmaf(weight, out.z, value.z),
                 fmaf(weight, out.w, value.w)};
    }
    store_four(token.x, column, token.hidden, wide, value);
}

// x, shared [tokens, hidden]; out [tokens, top_k, hidden]; weights [tokens, top_k]. Of the rows the first *tokens
// are done (all if null). `add`: onto x. Blocks along x take tokens, along y columns.
extern "C" __global__ void __launch_bounds__(128)
    finalize(float* x, u32 add, const float* shared, const float* out, const float* weights, const u32* tokens,
             u32 hidden, u32 top_k) {
    wait_for_previous();
    let_next_start();
    u64 index = blockIdx.x;
    u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if ((tokens && index >= *tokens) || column >= hidden) return;
    Token token{x + index * hidden,
                shared ? shared + index * hidden : nullptr,
                out + index * top_k * hidden,
                weights + index * top_k,
                hidden,
                top_k,
                add != 0};
    bool wide = hidden % 4 == 0 && rows_aligned(x, 0) && rows_aligned(shared, 0) && rows_aligned(out, 0);
    if (wide) finalize_columns<true>(token, column);
    else finalize_columns<false>(token, column);
}
EXPORT(finalize);
