// What the experts gave, brought back to the tokens.
//
// x[t] = x[t] + shared[t] + weight[t, 0] * out[t, 0] + weight[t, 1] * out[t, 1] ..: one chain of f32, ranks
// ascending, whatever the order in which experts were computed.
//
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
    float value[4];
    auto load = [&](float (&to)[4], const float* row) {
        if (wide) {
            Float4 v = *reinterpret_cast<const Float4*>(row + column);
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else {
#pragma unroll
            for (u32 i = 0; i < 4; i++) to[i] = column + i < token.hidden ? row[column + i] : 0.0f;
        }
    };
#pragma unroll
    for (u32 i = 0; i < 4; i++) value[i] = 0.0f;
    if (token.add) load(value, token.x);
    if (token.shared) {
        float shared[4];
        load(shared, token.shared);
#pragma unroll
        for (u32 i = 0; i < 4; i++) value[i] += shared[i];
    }
#pragma unroll 8
    for (u32 rank = 0; rank < token.top_k; rank++) {
        float out[4], weight = token.weights[rank];
        load(out, token.out + u64(rank) * token.hidden);
#pragma unroll
        for (u32 i = 0; i < 4; i++) value[i] = fmaf(weight, out[i], value[i]);
    }
    if (wide) {
        *reinterpret_cast<Float4*>(token.x + column) = {value[0], value[1], value[2], value[3]};
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (column + i < token.hidden) token.x[column + i] = value[i];
    }
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
