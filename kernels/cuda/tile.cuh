// Rows of a weight times gathered tokens, by one block: the loop over k that grouped products share.
//
// A tile is some rows of the weight by some k (codes as published, and their scales), beside the same k of up to
// so many tokens; tiles follow each other through stages of shared memory, filled by asynchronous copies.
//
// Every shape sums in one order, so that an output has the same bits whichever computed it: groups of k ascending;
// in a group, products of 16 k ascending into an f32 that starts from zero, of each the smallest plane first; then
// total = fma(scale, group, total). Past the end of k everything is zero.
#pragma once

#include "format.cuh"
#include "wgmma.cuh"

namespace {

// No token.
constexpr u32 NONE = ~0u;

// A block of ROW_WARPS x TOKEN_WARPS warps, each with ROW_TILES x 16 rows and TOKEN_TILES x 8 tokens, in shared
// memory of at most `bytes`.
template <class Format_, u32 planes, u32 row_warps, u32 token_warps, u32 row_tiles, u32 token_tiles, u32 tile_k,
          u32 bytes>
struct Shape {
    using Format = Format_;
    static constexpr u32 PLANES = planes, ROW_WARPS = row_warps, ROW_TILES = row_tiles, TOKEN_TILES = token_tiles;
    static constexpr u32 ROWS = 16 * row_warps * row_tiles, TOKENS = 8 * token_warps * token_tiles;
    static constexpr u32 THREADS = 32 * row_warps * token_warps;
    static constexpr u32 TILE_K = tile_k, GROUP = Format::GROUP;
    // A row of codes, and of scales: of the latter room for as much again, up to 8 bytes, because a row of scales
    // may begin at any byte of a word.
    static constexpr u32 ROW_BYTES = tile_k * Format::CODE_BITS / 8;
    static constexpr u32 SCALES = Format::SCALE_BYTES * tile_k / Format::SCALE_K;
    static constexpr u32 SCALE_PITCH = Format::SCALE_BYTES == 4 ? SCALES : SCALES < 8 ? 2 * SCALES : SCALES + 8;
    static constexpr u32 CODE_TILE = ROWS * ROW_BYTES;
    // Of each plane and each 64 k: tokens by 128 bytes.
    static constexpr u32 TOKEN_TILE = planes * TOKENS * tile_k * 2;
    static constexpr u32 STAGE = CODE_TILE + TOKEN_TILE, SCALE_STAGE = ROWS * SCALE_PITCH;
    // Parts of 32 k at once: many columns have enough to do in one, and no registers for more.
    static constexpr u32 PRODUCTS = planes * row_tiles * token_tiles;
    static constexpr u32 UNROLL = PRODUCTS == 1 ? 4 : PRODUCTS <= 4 ? 2 : 1;
    static constexpr u32 FIT = bytes / (STAGE + SCALE_STAGE);
    static constexpr u32 STAGES = FIT < 6 ? FIT : 6;
    static_assert(STAGES >= 2, "one tile is loaded while another is multiplied");
    static_assert(tile_k % 64 == 0 && (GROUP == 32 || GROUP == tile_k), "a tile is groups of 32, or one group");
    static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "as Swizzled has it");
};

// Which rows of which weights a block multiplies: tile row r is output `output(r)` of a weight. Paired, a
// warp's 16 rows are 8 of the first weight and the same 8 of the second, and a lane gets both of an output.
template <bool paired>
struct WeightRows {
    const u8* codes[2];
    const u8* scales[2];
    // Rows from one output to the next; the block's first output; outputs of the weight; k of a row.
    u32 step, first, outputs, k;

    static constexpr u32 PER_16 = paired ? 8 : 16;
    // Of the two that belong to each weight, the one of row `row`.
    template <class T>
    static DEVICE T of_half(u32 row, T first, T second) {
        return paired && row / 8 % 2 ? second : first;
    }
    DEVICE u32 output(u32 row) const { return first + (paired ? row / 16 * 8 + row % 8 : row); }

    template <class Format>
    DEVICE u32 scale_row_bytes() const {
        return (k + Format::SCALE_K - 1) / Format::SCALE_K * Format::SCALE_BYTES;
    }
    // The first scale of tile row `row`.
    template <class Format>
    DEVICE const u8* scale_row(u32 row) const {
        u64 scale_row = u64(output(row) / Format::SCALE_ROWS) * step;
        return of_half(row, scales[0], scales[1]) + scale_row * scale_row_bytes<Format>();
    }
};

// Tokens by `rows` (of the block, in shared memory; NONE: zeros) of `planes`, each with `stride` values.
struct TokenRows {
    const u16* planes;
    u64 stride;
    const u32* rows;
};

// What a thread copies of each tile's codes: the same chunk of every so many rows.
template <class S, bool paired>
struct CodeCopies {
    static constexpr u32 CHUNKS = S::ROW_BYTES / 16, ROWS_PER_PASS = S::THREADS / CHUNKS;
    static constexpr u32 PASSES = S::ROWS / ROWS_PER_PASS, K_PER_CHUNK = 128 / S::Format::CODE_BITS;
    static_assert(ROWS_PER_PASS % 16 == 0 && S::ROWS % ROWS_PER_PASS == 0, "a thread stays with one of a pair");

    const u8* from;
    u64 pass_bytes;
    // Passes that have a row; the first value's k; where in the tile.
    u32 passes, k, to;

    DEVICE CodeCopies(const WeightRows<paired>& weights) {
        u32 row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, output = weights.output(row);
        constexpr u32 OUTPUTS = ROWS_PER_PASS / 16 * WeightRows<paired>::PER_16;
        u64 output_bytes = u64(weights.k) * S::Format::CODE_BITS / 8 * weights.step;
        from = weights.of_half(row, weights.codes[0], weights.codes[1]) + output * output_bytes + chunk * 16;
        pass_bytes = OUTPUTS * output_bytes;
        passes = output < weights.outputs ? (weights.outputs - output + OUTPUTS - 1) / OUTPUTS : 0;
        k = chunk * K_PER_CHUNK;
        to = Swizzled<S::ROW_BYTES>(row, chunk).at(0);
    }

    DEVICE void start(u8* tile, u32 tile_k, u32 end) const {
        u32 at = tile_k + k;
        const u8* source = from + u64(tile_k) * S::Format::CODE_BITS / 8;
#pragma unroll
        for (u32 pass = 0; pass < PASSES; pass++) {
            u8* target = tile + to + pass * ROWS_PER_PASS * S::ROW_BYTES;
            bool there = pass < passes;
            if (S::Format::CODE_BITS == 8 && end % 16) {
                // Rows of bytes begin at multiples of eight only.
                copy_async_8(target, source, there && at < end ? 8 : 0);
                copy_async_8(target + 8, source + 8, there && at + 8 < end ? 8 : 0);
            } else {
                copy_async_16(target, source, there && at < end ? 16 : 0);
            }
            source += pass_bytes;
        }
    }
};

// What a thread copies of each tile's scales. A row whose scales begin within a word is copied by whole words from
// the one that they begin in; the reader skips what comes before.
template <class S, bool paired>
struct ScaleCopies {
    using Format = typename S::Format;
    static constexpr u32 SIZE = S::SCALES >= 8 ? 8 : 4, PARTS = S::SCALES / SIZE ? S::SCALES / SIZE : 1;
    static_assert(S::ROWS * PARTS <= S::THREADS, "a thread copies once");

    const u8* from;
    // Bytes of the row from there on; where in the tile; copies of 4 bytes, or 0 for one of SIZE.
    u32 length, to, words;

    DEVICE ScaleCopies(const WeightRows<paired>& weights) {
        u32 row = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
        from = weights.template scale_row<Format>(row);
        bool there = row < S::ROWS && weights.output(row) < weights.outputs;
        length = there ? weights.template scale_row_bytes<Format>() : 0;
        u32 before = Format::SCALE_BYTES == 4 ? 0 : u32(reinterpret_cast<u64>(from)) % SIZE;
        words = before ? S::SCALES / 4 + 1 : 0;
        if (words) {
            from -= before % 4;
            length = length && part == 0 ? length + before % 4 : 0;
        } else {
            from += part * SIZE;
            length = length > part * SIZE ? length - part * SIZE : 0;
        }
        to = row * S::SCALE_PITCH + part * SIZE;
        // Not a row, or another thread's: nothing is written.
        if (row >= S::ROWS || (words && part)) to = NONE;
    }

    DEVICE void start(u8* scales, u32 tile) const {
        if (S::SCALES == 0 || to == NONE) return;
        u32 at = tile * S::SCALES, left = length > at ? length - at : 0;
        if (words == 0) {
            if (SIZE == 8)
                copy_async_8(scales + to, from + at, min(left, SIZE));
            else
                copy_async_4(scales + to, from + at, min(left, SIZE));
        } else {
#pragma unroll 1
            for (u32 i = 0; i < words; i++, at += 4, left = left > 4 ? left - 4 : 0)
                copy_async_4(scales + to + i * 4, from + at, min(left, 4u));
        }
    }
};

// What a thread copies of each tile's tokens.
template <class S>
struct TokenCopies {
    static constexpr u32 CHUNKS = S::TILE_K / 8, TOKENS_PER_PASS = S::THREADS / CHUNKS;
    static constexpr u32 PASSES = (S::TOKENS + TOKENS_PER_PASS - 1) / TOKENS_PER_PASS;

    static DEVICE void start(u8* tile, const TokenRows& tokens, u32 tile_k, u32 end) {
        u32 chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS, at = tile_k + chunk * 8;
        const u8* from = reinterpret_cast<const u8*>(tokens.planes + at);
        tile += chunk / 8 * S::TOKENS * 128;
#pragma unroll
        for (u32 pass = 0; pass < PASSES; pass++) {
            u32 token = first + pass * TOKENS_PER_PASS;
            if (PASSES * TOKENS_PER_PASS > S::TOKENS && token >= S::TOKENS) break;
            u32 row = tokens.rows[token], bytes = row != NONE && at < end ? 16 : 0;
            const u8* source = from + u64(row) * (2 * end);
            u8* target = tile + Swizzled<128>(token, chunk % 8).at(0);
#pragma unroll
            for (u32 plane = 0; plane < S::PLANES; plane++)
                copy_async_16(target + plane * S::TOKENS * S::TILE_K * 2, source + plane * tokens.stride * 2,
                              bytes);
        }
    }
};

// A warp's sums: of row tile m and token tile n what multiply_bf16 has.
template <class S>
struct Sums {
    float of[S::ROW_TILES][S::TOKEN_TILES][4];
    typename S::Format::Watch watch[S::ROW_TILES];

    // The warp's first row and token in the block.
    static DEVICE u32 row() { return warp_id() % S::ROW_WARPS * S::ROW_TILES * 16; }
    static DEVICE u32 token() { return warp_id() / S::ROW_WARPS * S::TOKEN_TILES * 8; }
};

// Adds a group's sums, scaled, and begins the next: rows g and g + 8 of a lane have a scale each.
template <class Format>
DEVICE void add_group(float (&total)[4], float (&group)[4], const float (&scale)[2]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        total[i] = Format::SCALE_BYTES == 0 ? total[i] + group[i] : fmaf(scale[i / 2], group[i], total[i]);
        group[i] = 0;
    }
}

// Where a lane finds its rows' scales in a stage, and their values for a group of the tile.
template <class S, bool paired>
struct ScaleReader {
    u32 at[S::ROW_TILES][2];

    DEVICE ScaleReader(const WeightRows<paired>& weights) {
        using Format = typename S::Format;
        for (u32 m = 0; m < S::ROW_TILES; m++)
            for (u32 i = 0; i < 2; i++) {
                u32 row = Sums<S>::row() + m * 16 + i * 8 + lane_id() / 4;
                u32 before = Format::SCALE_BYTES == 4 || S::SCALES == 0
                                 ? 0
                                 : u32(reinterpret_cast<u64>(weights.template scale_row<Format>(row))) % 4;
                at[m][i] = row * S::SCALE_PITCH + before;
            }
    }
    DEVICE void read(float (&scale)[2], const u8* scales, u32 m, u32 group) const {
        using Format = typename S::Format;
        for (u32 i = 0; i < 2; i++)
            scale[i] = Format::scale(scales + at[m][i] +
                                     group * Format::GROUP / Format::SCALE_K * Format::SCALE_BYTES);
    }
};

// Multiplies one tile by mma.
template <class S, bool paired>
DEVICE void multiply_tile(Sums<S>& sums, const u8* codes, const u8* tokens, const u8* scales,
                          const ScaleReader<S, paired>& reader) {
    using Format = typename S::Format;
    const Swizzled<128> place(Sums<S>::token() + lane_id() % 8, lane_id() / 8);
    float group[S::ROW_TILES][S::TOKEN_TILES][4] = {};
    float scale[S::ROW_TILES][2];
#pragma unroll(S::UNROLL)
    for (u32 i = 0; i < S::TILE_K / 32; i++) {
        u32 a[S::ROW_TILES][2][4];
#pragma unroll
        for (u32 m = 0; m < S::ROW_TILES; m++) {
            if (S::GROUP == 32) reader.read(scale[m], scales, m, i);
            auto block = Format::template load<S::ROW_BYTES>(codes, Sums<S>::row() + m * 16, i);
#pragma unroll
            for (u32 step = 0; step < 2; step++) Format::fragment(a[m][step], block, step, sums.watch[m]);
        }
        const u8* at = tokens + i / 2 * (S::TOKENS * 128) + place.at(i % 2 * 4);
#pragma unroll
        for (u32 n = 0; n < S::TOKEN_TILES; n++) {
            u32 b[S::PLANES][4];
#pragma unroll
            for (u32 plane = 0; plane < S::PLANES; plane++)
                load_matrix_x4(b[plane], at + plane * (S::TOKENS * S::TILE_K * 2) + n * 8 * 128);
#pragma unroll
            for (u32 m = 0; m < S::ROW_TILES; m++) {
#pragma unroll
                for (u32 step = 0; step < 2; step++)
#pragma unroll
                    for (u32 plane = S::PLANES; plane-- > 0;)
                        multiply_bf16(group[m][n], a[m][step], {b[plane][2 * step], b[plane][2 * step + 1]});
                if (S::GROUP == 32) add_group<Format>(sums.of[m][n], group[m][n], scale[m]);
            }
        }
    }
    if (S::GROUP > 32)
#pragma unroll
        for (u32 m = 0; m < S::ROW_TILES; m++) {
            reader.read(scale[m], scales, m, 0);
#pragma unroll
            for (u32 n = 0; n < S::TOKEN_TILES; n++) add_group<Format>(sums.of[m][n], group[m][n], scale[m]);
        }
}

// Multiplies all of k; `shared` has S::STAGES of S::STAGE and as many of S::SCALE_STAGE bytes. `find_tokens` is
// called when the first weights are under way. The block must be done with the shared memory.
template <class S, bool paired, class FindTokens, class Multiply>
DEVICE void multiply_all(Sums<S>& sums, u8* shared, const WeightRows<paired>& weights, const TokenRows& tokens,
                         const FindTokens& find_tokens, const Multiply& multiply) {
    u8* all_scales = shared + S::STAGES * S::STAGE;
    u32 k = weights.k, tiles = (k + S::TILE_K - 1) / S::TILE_K;
    const CodeCopies<S, paired> codes(weights);
    const ScaleCopies<S, paired> scales(weights);
    const ScaleReader<S, paired> reader(weights);
    auto start_weights = [&](u32 tile, u32 stage) {
        codes.start(shared + stage * S::STAGE, tile * S::TILE_K, k);
        scales.start(all_scales + stage * S::SCALE_STAGE, tile);
    };
    auto start_tokens = [&](u32 tile, u32 stage) {
        TokenCopies<S>::start(shared + stage * S::STAGE + S::CODE_TILE, tokens, tile * S::TILE_K, k);
    };
#pragma unroll 1
    for (u32 tile = 0; tile < S::STAGES - 1; tile++)
        if (tile < tiles) start_weights(tile, tile);
    find_tokens();
    __syncthreads();
#pragma unroll 1
    for (u32 tile = 0; tile < S::STAGES - 1; tile++) {
        if (tile < tiles) start_tokens(tile, tile);
        copy_commit();
    }
    u32 stage = 0, next_stage = S::STAGES - 1;
#pragma unroll 1
    for (u32 tile = 0; tile < tiles; tile++) {
#ifndef WITHOUT_COPY_WAIT
        copy_wait<S::STAGES - 2>();
#endif
        // Everyone's copies are there, and everyone is done with the stage that is filled next.
        multiply.before_barrier();
        __syncthreads();
        if (u32 next = tile + S::STAGES - 1; next < tiles) {
            start_weights(next, next_stage);
            start_tokens(next, next_stage);
        }
        copy_commit();
        const u8* at = shared + stage * S::STAGE;
        multiply(sums, at, at + S::CODE_TILE, all_scales + stage * S::SCALE_STAGE, reader);
        next_stage = stage;
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
    }
}

struct ByMma {
    DEVICE void before_barrier() const {}
    template <class S, bool paired>
    DEVICE void operator()(Sums<S>& sums, const u8* codes, const u8* tokens, const u8* scales,
                           const ScaleReader<S, paired>& reader) const {
        multiply_tile<S, paired>(sums, codes, tokens, scales, reader);
    }
};

#ifdef HAS_WGMMA
// Multiplies by wgmma, 64 tokens at a time: a warp group has 64 rows. One half's sums are added up while the other
// half is multiplied, and a group's codes become bf16 while the one before is multiplied.
struct ByWgmma {
    DEVICE void before_barrier() const { fence_for_wgmma(); }

    template <class S, bool paired>
    DEVICE void operator()(Sums<S>& sums, const u8* codes, const u8* tokens, const u8* scales,
                           const ScaleReader<S, paired>& reader) const {
        using Format = typename S::Format;
        constexpr u32 PARTS = S::TILE_K / 32, HALVES = S::TOKEN_TILES / 8, BUFFERS = S::GROUP == 32 ? 2 : PARTS;
        static_assert(S::PLANES == 1 && S::ROW_TILES == 1 && S::ROW_WARPS % 4 == 0, "whole warp groups");
        static_assert(S::TOKENS == S::TOKEN_TILES * 8 && (HALVES == 1 || HALVES == 2), "all of the tokens");
        float group[HALVES][8][4];
        u32 a[BUFFERS][2][4];
        float scale[BUFFERS][2];
        auto find = [&](u32 part) {
            if (S::GROUP == 32 || part == 0) reader.read(scale[part % BUFFERS], scales, 0, part);
            auto block = Format::template load<S::ROW_BYTES>(codes, Sums<S>::row(), part);
#pragma unroll
            for (u32 step = 0; step < 2; step++)
                Format::fragment(a[part % BUFFERS][step], block, step, sums.watch[0]);
        };
        auto add = [&](u32 half, const float (&by)[2]) {
            wgmma_settle(group[half]);
#pragma unroll
            for (u32 n = 0; n < 8; n++) add_group<Format>(sums.of[0][half * 8 + n], group[half][n], by);
        };
        find(0);
#pragma unroll(S::GROUP == 32 ? 2 : PARTS)
        for (u32 part = 0; part < PARTS; part++) {
            wgmma_fence();
#pragma unroll
            for (u32 half = 0; half < HALVES; half++) {
                const u8* at = tokens + part / 2 * (S::TOKENS * 128) + part % 2 * 64 + half * (64 * 128);
#pragma unroll
                for (u32 step = 0; step < 2; step++)
                    wgmma_bf16_n64(group[half], a[part % BUFFERS][step], at + step * 32,
                                   step > 0 || (S::GROUP > 32 && part > 0));
                wgmma_commit();
            }
            if (part + 1 < PARTS) find(part + 1);
            if (S::GROUP > 32 && part + 1 < PARTS) continue;
            if (HALVES == 2) {
                wgmma_wait<1>();
                add(0, scale[S::GROUP == 32 ? part % BUFFERS : 0]);
            }
#ifndef FAULT_NO_WGMMA_WAIT
            wgmma_wait<0>();
#endif
            add(HALVES - 1, scale[S::GROUP == 32 ? part % BUFFERS : 0]);
        }
    }
};
#endif

}  // namespace
