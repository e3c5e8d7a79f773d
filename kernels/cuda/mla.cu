// Latent attention (MLA) in its absorbed form, for prompts and for single tokens alike: one form is what gives a
// prompt the same bits in any chunks.
//
// A block takes one token and up to 64 of its heads. Two warps share 16 heads: each multiplies half of the depth
// (latent and rotated part) for all 32 positions of a tile, they add their halves through shared memory, both do
// the same softmax, and each owns half of the value columns. So queries stay in registers for the whole context,
// and a tile is read from shared memory no more often than needed: at 64 heads its reads take about 2,200 cycles
// of an H100's multiprocessor where HBM needs 2,850 to deliver a tile to each of 132.
//
// The values are the first `latent` columns of the same tile. Rows of tiles are padded by 16 bytes, so the eight
// rows of an 8x8 matrix lie in different banks. Widths are zero-filled up to what the kernel was compiled for.
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "attention.cuh"

// What all blocks of a launch are told.
struct Mla {
    // [tokens, heads, latent + rope].
    const float* queries;
    const u8* cache;
    // [tokens]; -1 where there is none.
    const int* positions;
    // [tokens]: row of `tables`.
    const int* sequences;
    const int* tables;
    u32 table_width, heads, latent, rope;
    float scale;
    // [tokens, heads, latent].
    float* out;
    // [tokens, spans, heads, latent], then [tokens, spans, heads, 2]: for spans side by side. Null: a block takes
    // all of a row's spans.
    float* partials;
    u32 spans;
};

constexpr u32 TILE = 32;
constexpr u32 GROUP_HEADS = 16;

// `steps` times 16 of the depth and `columns` of the values belong to each of two warps; `exact` where that is all
// there is.
template <int steps, int columns, int stages, bool coded, bool exact>
struct MlaBlock {
    static constexpr u32 CHUNKS = steps * 4;
    static constexpr u32 STRIDE = CHUNKS * 16 + 16;
    static constexpr u32 TILE_BYTES = TILE * STRIDE;
    static constexpr int MATRICES = columns / 8;
    // Steps whose queries stay in shared memory: what the 255 registers of a thread have no room for on any
    // architecture, except where 99 KB of shared memory have none either.
    static constexpr int SPARE = steps <= 16 ? 0 : stages == 3 ? 6 : coded ? 1 : 2;

    const Mla& mla;
    u8* shared;
    // Of the token's sequence.
    const int* table;
    // Positions of a span, and past the last one that this block takes.
    u32 length, end;

    DEVICE u32 latent() const { return exact ? 2 * columns : mla.latent; }
    DEVICE u32 width() const { return exact ? 32 * steps : mla.latent + mla.rope; }
    // What can be had again in an instruction or two is not kept: registers are scarce.
    DEVICE u32 warps() const { return blockDim.x / 32; }
    DEVICE u32 row_bytes() const {
        return coded ? 2 * width() - latent() + 4 * scales_of(latent()) : 2 * width();
    }
    // The last rows of a prompt see the most: they go first.
    DEVICE u32 token() const { return gridDim.x - 1 - blockIdx.x; }
    DEVICE u32 warp_half() const { return warp_id() % 2; }
    // Of the lane's two rows the first's; 8 heads on is the second's.
    DEVICE u32 head() const {
        return blockIdx.y * (blockDim.x / 64 * GROUP_HEADS) + warp_id() / 2 * GROUP_HEADS + lane_id() / 4;
    }

    // Tiles of bf16: `stages`, or one with codes.
    DEVICE u8* tile_of(u32 stage) const { return shared + (coded ? 0 : stage * TILE_BYTES); }
    // Rows as they are in the cache, `stages` times.
    DEVICE u8* raw_of(u32 stage) const { return shared + TILE_BYTES + stage * TILE * row_bytes(); }
    // Half scores: [warps][4][32 lanes].
    DEVICE Float4* halves() const {
        return reinterpret_cast<Float4*>(coded ? raw_of(stages) : shared + stages * TILE_BYTES);
    }
    // What is joined so far, of each warp's 16 rows.
    DEVICE Joined* joined() const { return reinterpret_cast<Joined*>(halves() + blockDim.x * 4); }
    // Queries of this thread that have no place in its registers.
    DEVICE Bytes16* spare_queries() const {
        return reinterpret_cast<Bytes16*>(joined() + blockDim.x / 2) + threadIdx.x;
    }

    // All pieces of 16 bytes of a tile: a row at a time for each warp.
    template <class F>
    DEVICE void for_chunks(F&& take) const {
        u32 lane = anew(lane_id());
#pragma unroll 1
        for (u32 row = warp_id(); row < TILE; row += warps()) {
#pragma unroll(coded ? 2 : 3)
            for (u32 some = 0; some < CHUNKS; some += 32)
                if (some + 32 <= CHUNKS || some + lane < CHUNKS) take(row, some + lane);
        }
    }

    // Positions from `first` on, as far as they are seen; what follows is zero, whatever the cache holds there.
    DEVICE void load(u32 stage, u32 first) const {
        if (first < end) {
            u32 row_bytes = this->row_bytes();
            const u8* from = mla.cache + cache_row(table, first) * row_bytes;
            u32 rows = min(end - first, TILE);
            if constexpr (coded) {
                // The rows of a tile follow one another in a page, and 32 of them are whole times 16 bytes.
                u32 valid = rows * row_bytes;
#pragma unroll 1
                for (u32 at = anew(threadIdx.x * 16); at < TILE * row_bytes; at += blockDim.x * 16) {
                    u32 bytes = at < valid ? min(valid - at, 16u) : 0;
                    copy_async_16(raw_of(stage) + at, bytes ? from + at : from, bytes);
                }
            } else {
                for_chunks([&](u32 row, u32 chunk) {
                    bool there = row < rows && chunk * 16 < row_bytes;
                    const u8* at = there ? from + row * row_bytes + chunk * 16 : from;
                    copy_async_16(tile_of(stage) + row * STRIDE + chunk * 16, at, there ? 16 : 0);
                });
            }
        }
        copy_commit();
    }

    // From codes to values.
    DEVICE void decode(u32 stage) const {
        u32 scales = latent(), plain = scales + 4 * scales_of(latent());
        for_chunks([&](u32 row, u32 chunk) {
            u32 column = chunk * 8;
            const u8* from = raw_of(stage) + row * row_bytes();
            Bytes16 values{0, 0, 0, 0};
            if (column < latent()) {
                auto* codes = reinterpret_cast<const u32*>(from + column);
                auto* scale = reinterpret_cast<const float*>(from + scales) + column / CODES_PER_SCALE;
                values = scaled_codes(codes[0], codes[1], *scale);
            } else if (column < width()) {
                auto* pairs = reinterpret_cast<const u32*>(from + plain) + (column - latent()) / 2;
                values = {pairs[0], pairs[1], pairs[2], pairs[3]};
            }
            *reinterpret_cast<Bytes16*>(tile_of(0) + row * STRIDE + column * 2) = values;
        });
    }

    // This warp's half of the depth as A fragments.
    DEVICE void load_queries(u32 (&queries)[steps - SPARE][4]) const {
        u32 width = this->width();
        const float* rows = mla.queries + (u64(token()) * mla.heads + head()) * width;
#pragma unroll
        for (int step = 0; step < steps; step++) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 row = i % 2 * 8, column = (warp_half() * steps + step) * 16 + lane_id() % 4 * 2 + i / 2 * 8;
                Float2 two{0, 0};
                if (head() + row < mla.heads && column < width)
                    two = *reinterpret_cast<const Float2*>(rows + row * width + column);
                pairs[i] = pack_bf16(two.x, two.y);
            }
            if (step < SPARE) {
                spare_queries()[step * blockDim.x] = {pairs[0], pairs[1], pairs[2], pairs[3]};
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) queries[step - SPARE][i] = pairs[i];
            }
        }
    }

    // Scores of the tile that begins at `first`, of all its positions.
    DEVICE void score(const u8* tile, u32 first, const u32 (&queries)[steps - SPARE][4],
                      float (&scores)[4][4]) const {
        clear(scores);
        u32 lane = lane_id();
        const u8* keys = lane_keys<STRIDE>(tile, 0, lane) + warp_half() * steps * 32;
#pragma unroll
        for (int step = 0; step < steps; step++) {
            u32 query[4];
            if (step < SPARE) {
                Bytes16 spare = spare_queries()[step * blockDim.x];
                query[0] = spare.x, query[1] = spare.y, query[2] = spare.z, query[3] = spare.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) query[i] = queries[step - SPARE][i];
            }
            add_scores<STRIDE>(scores, query, keys + step * 32);
        }
        Float4* mine = halves() + warp_id() * 128 + lane;
        Float4* others = halves() + (warp_id() ^ 1) * 128 + lane;
#pragma unroll
        for (int n = 0; n < 4; n++) mine[n * 32] = {scores[n][0], scores[n][1], scores[n][2], scores[n][3]};
        barrier_wait(1 + warp_id() / 2, 64);
        float scale = multiply_rn(mla.scale, LOG2_E);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            Float4 half = others[n * 32];
            scores[n][0] = multiply_rn(scores[n][0] + half.x, scale);
            scores[n][1] = multiply_rn(scores[n][1] + half.y, scale);
            scores[n][2] = multiply_rn(scores[n][2] + half.z, scale);
            scores[n][3] = multiply_rn(scores[n][3] + half.w, scale);
        }
        if (first + TILE > end) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (first + n * 8 + lane % 4 * 2 + i % 2 >= end) scores[n][i] = -INFINITY;
            }
        }
    }

    // Writes the result of the span that begins at `span_begin`, or joins it to what `out` holds.
    DEVICE void close(u32 span_begin, const Softmax& state, const float (&values)[MATRICES][4]) const {
        bool first = span_begin == 0, last = span_begin + length >= end;
        u32 token = anew(this->token()), first_head = anew(this->head());
        Joined* so_far = joined() + warp_id() * GROUP_HEADS + lane_id() / 4;
        Joined both[2] = {nothing_joined(), nothing_joined()};
        if (!first) both[0] = so_far[0], both[1] = so_far[8];
        __syncwarp();
#pragma unroll
        for (int row = 0; row < 2; row++) {
            u32 head = first_head + row * 8;
            float sum = row_sum(state.sum[row]);
            if (head >= mla.heads) continue;
            u32 column = anew(warp_half() * columns + lane_id() % 4 * 2);
            if (mla.partials) {
                u64 at = (u64(token) * mla.spans + blockIdx.z) * mla.heads + head;
                u64 parts = u64(gridDim.x) * mla.spans * mla.heads;
                store_part(mla.partials, parts, at, column, latent(), values, row, state.maximum[row], sum);
                continue;
            }
            Shares shares = join(both[row], state.maximum[row], sum);
            if (lane_id() % 4 == 0) so_far[row * 8] = both[row];
            float factor = last ? last_factor(both[row], nullptr, 0) : 1;
            float* to = mla.out + (u64(token) * mla.heads + head) * latent();
            join_values(to, column, latent(), values, row, first, shares, factor);
        }
    }

    DEVICE void run() {
        wait_for_previous();
        let_next_start();
        int position = mla.positions[token()];
        if (position < 0) return;
        length = span_length(position);
        u32 begin = mla.partials ? blockIdx.z * length : 0;
        if (begin > u32(position)) return;
        end = mla.partials ? min(begin + length, u32(position) + 1) : position + 1;
        table = mla.tables + u64(mla.sequences[token()]) * mla.table_width;
#pragma unroll
        for (int stage = 0; stage < stages - 1; stage++) load(stage, begin + stage * TILE);
        u32 queries[steps - SPARE][4];
        load_queries(queries);
        u32 stage = 0;
        for (u32 span_begin = begin; span_begin < end; span_begin += length) {
            float values[MATRICES][4];
            clear(values);
            Softmax state = fresh_softmax();
            u32 span_end = min(span_begin + length, end);
            for (u32 first = span_begin; first < span_end; first += TILE) {
                take_tile(stage, first, queries, state, values);
                stage = stage + 1 == stages ? 0 : stage + 1;
            }
            close(span_begin, state, values);
        }
    }

    // The tile that begins at `first` and lies in `stage`.
    DEVICE void take_tile(u32 stage, u32 first, const u32 (&queries)[steps - SPARE][4], Softmax& state,
                          float (&values)[MATRICES][4]) const {
        copy_wait<stages - 2>();
        // All copies of this tile are there, and nobody reads the one before any more.
#ifndef FAULT_NO_BARRIER
        __syncthreads();
#endif
        load(stage == 0 ? stages - 1 : stage - 1, first + (stages - 1) * TILE);
        if constexpr (coded) {
            decode(stage);
            __syncthreads();
        }
        const u8* tile = tile_of(stage);
        float scores[4][4], keep[2];
        score(tile, first, queries, scores);
        u32 weights[4][2];
        soften(scores, weights, state, keep);
        rescale(values, keep);
        // Of the values this warp has half of the columns.
        add_values<STRIDE>(values, weights, tile + warp_half() * columns * 2, anew(lane_id()));
    }
};

// Grid [tokens, heads / 64, spans or 1], 64 threads for every 16 of a block's heads. Dynamic shared memory: a tile
// of 32 padded rows for each stage, or with codes one tile and 32 raw rows for each stage; then for each thread 68
// bytes and 16 for each spare step.
#define MLA_KERNEL(name, steps, columns, stages, coded, exact)                                                   \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                         \
        name(const float* queries, const u8* cache, const int* positions, const int* sequences,                  \
             const int* tables, u32 table_width, u32 heads, u32 latent, u32 rope, float scale, float* out,       \
             float* partials, u32 spans) {                                                                       \
        DYNAMIC_SHARED(shared);                                                                                  \
        const Mla mla{queries, cache, positions, sequences, tables, table_width, heads,                          \
                      latent,  rope,  scale,     out,       partials, spans};                                    \
        MlaBlock<steps, columns, stages, coded, exact>{mla, shared, nullptr, 0, 0}.run();                        \
    }                                                                                                            \
    EXPORT(name)

// A latent of 512 and 64 rotated, as all published models have.
MLA_KERNEL(mla_bf16, 18, 256, 3, false, true);
MLA_KERNEL(mla_fp8, 18, 256, 3, true, true);
// The same where a block can have no more than 99 KB of shared memory.
MLA_KERNEL(mla_bf16_two_stages, 18, 256, 2, false, true);
MLA_KERNEL(mla_fp8_two_stages, 18, 256, 2, true, true);
// Others, up to 320 deep, in multiples of eight.
MLA_KERNEL(mla_bf16_narrow, 10, 160, 2, false, false);
MLA_KERNEL(mla_fp8_narrow, 10, 160, 2, true, false);
