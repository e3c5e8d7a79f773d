// Grouped-query attention with windows and sinks.
//
// A row is a query of one head. Rows whose heads share a key head go together, 16 to a fragment: `groups` of 16 in
// a block, each by `warps` warps. Prompts take four groups of one warp, single tokens one group of four (the
// widest heads always two warps to a group): where there are several a warp computes the scores of a quarter of a
// tile's keys, all warps get all scores through shared memory and do the same softmax, and each owns a quarter of
// the value columns. An element of either product is the same sum in both forms, and softmax sees the same numbers
// in the same lanes: the same bits.
//
// A block takes `tokens_per_block` consecutive tokens. Runs of them that belong to one sequence and cut their
// context alike go through the tiles together; a prompt's are one run.
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "attention.cuh"

// What all blocks of a launch are told.
struct Gqa {
    // [tokens, heads, key].
    const float* queries;
    const u8 *keys, *values;
    // [tokens]; -1 where there is none.
    const int* positions;
    // [tokens]: row of `tables`.
    const int* sequences;
    const int* tables;
    u32 table_width, tokens, tokens_per_block, heads, kv_heads;
    // Widths of heads.
    u32 key, value;
    float scale;
    // 0: none.
    u32 window;
    // [heads], or null.
    const float* sinks;
    // [tokens, heads, value].
    float* out;
    // [tokens, spans, heads, value], then [tokens, spans, heads, 2]: for spans side by side. Null: a block takes
    // all of a row's spans.
    float* partials;
    u32 spans;
};

constexpr u32 GROUP_ROWS = 16;

// Heads of up to `width`.
template <u32 width, u32 warps, u32 groups, bool coded>
struct GqaBlock {
    static constexpr u32 THREADS = 32 * warps * groups;
    static constexpr u32 TILE = width <= 128 ? 64 : 32;
    static constexpr u32 STAGES = 2;
    static constexpr int STEPS = width / 16;
    // 8x8 matrices of a tile's keys, and those that a warp computes the scores of; of a warp's value columns.
    static constexpr int KEYS = TILE / 8, OWN_KEYS = KEYS / warps, COLUMNS = width / 8 / warps;
    static constexpr u32 STRIDE = 2 * width + 16;
    static constexpr u32 TILE_BYTES = TILE * STRIDE;
    // Of codes: those of a head, then its scales.
    static constexpr u32 RAW_STRIDE = width + 16;
    static constexpr u32 RAW_BYTES = TILE * RAW_STRIDE;
    static constexpr u32 SCORE_BYTES = warps > 1 ? groups * KEYS * 32 * 16 : 0;

    // Tokens that go through the tiles together.
    struct Run {
        u32 first, end;
        const int* table;
        u32 length;
        // Positions that any of them sees.
        u32 low, high;
        // What all of them see.
        u32 all_low, all_high;
    };

    const Gqa& gqa;
    u8* shared;
    Run run;

    // Query heads of a block, of those that share a key head.
    DEVICE u32 block_heads() const { return min(gqa.heads / gqa.kv_heads, groups * GROUP_ROWS); }
    DEVICE u32 head_blocks() const { return (gqa.heads / gqa.kv_heads + block_heads() - 1) / block_heads(); }
    DEVICE u32 kv_head() const { return blockIdx.y / head_blocks(); }
    // The last rows of a prompt see the most: they go first.
    DEVICE u32 first_token() const { return (gridDim.x - 1 - blockIdx.x) * gqa.tokens_per_block; }

    // Of this warp's group.
    DEVICE Float4* all_scores() const { return reinterpret_cast<Float4*>(shared) + warp_id() / warps * KEYS * 32; }
    // Keys, then values, of a stage; of codes there is one, and the raw rows have the stages.
    DEVICE u8* tile_of(u32 stage, u32 which) const {
        return shared + SCORE_BYTES + ((coded ? 0 : stage * 2) + which) * TILE_BYTES;
    }
    DEVICE u8* raw_of(u32 stage, u32 which) const {
        return shared + SCORE_BYTES + 2 * TILE_BYTES + (stage * 2 + which) * RAW_BYTES;
    }

    // ---- Rows.

    struct Row {
        u32 token, head;
        bool there;
    };

    // Of the lane's two, `which`.
    DEVICE Row row(u32 which) const {
        u32 row = warp_id() / warps * GROUP_ROWS + lane_id() / 4 + which * 8;
        u32 token = row / block_heads(), per = gqa.heads / gqa.kv_heads;
        u32 head = blockIdx.y % head_blocks() * block_heads() + row % block_heads();
        bool there = token < gqa.tokens_per_block && first_token() + token < gqa.tokens && head < per;
        return {first_token() + token, kv_head() * per + head, there};
    }

    DEVICE u32 begin_of(u32 position) const { return first_seen(position, gqa.window); }

    // The run of tokens from `first` on, before `last`; false if that one is none.
    DEVICE bool find_run(u32 first, u32 last) {
        run.first = first, run.end = first + 1;
        if (gqa.positions[first] < 0) return false;
        u32 position = gqa.positions[first];
        int sequence = gqa.sequences[first];
        run.table = gqa.tables + u64(sequence) * gqa.table_width;
        run.length = span_length(position);
        run.low = run.all_low = begin_of(position);
        run.high = run.all_high = position + 1;
        for (; run.end < last && gqa.positions[run.end] >= 0 && gqa.sequences[run.end] == sequence; run.end++) {
            u32 position = gqa.positions[run.end];
            if (span_length(position) != run.length) break;
            run.low = min(run.low, begin_of(position));
            run.all_low = max(run.all_low, begin_of(position));
            run.high = max(run.high, position + 1);
            run.all_high = min(run.all_high, position + 1);
        }
        return true;
    }

    // Whether a value that some rows of the run see and others do not is no finite number: the others weigh it with
    // 0, and 0 times infinity is NaN. (Keys do no harm: a score that is not seen is replaced.) Each warp looks for
    // itself: mostly at a few rows that the kernel before has just written.
    DEVICE bool spoils_others() const {
        constexpr u32 CHUNKS = width / 8;
        u32 exponents = 0;
        auto look_at = [&](u32 begin, u32 end) {
#pragma unroll 4
            for (u32 i = lane_id(); i < (end - begin) * CHUNKS; i += 32) {
                u32 column = i % CHUNKS * 8;
                if (column >= gqa.value) continue;
                u64 row = cache_row(run.table, begin + i / CHUNKS) * gqa.kv_heads + kv_head();
                Bytes16 eight = *reinterpret_cast<const Bytes16*>(gqa.values + (row * gqa.value + column) * 2);
                // An exponent of ones carries into the place of the sign.
                const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                for (u32 j = 0; j < 4; j++) exponents |= (pairs[j] & 0x7f807f80) + 0x00800080;
            }
        };
        look_at(run.low, run.all_low);
        look_at(run.all_high, run.high);
        return __any_sync(ALL_LANES, (exponents & 0x80008000) != 0);
    }

    // ---- Tiles.

    // The keys or values of a tile, as far as any row of the run sees them; zeros for the others, whatever the
    // cache holds there.
    DEVICE void load_half(u32 stage, u32 first, u32 which) const {
        u32 columns = which ? gqa.value : gqa.key;
        u32 row_bytes = coded ? gqa.kv_heads * (columns + 4 * scales_of(columns)) : 2 * gqa.kv_heads * columns;
        const u8* from = (which ? gqa.values : gqa.keys) + cache_row(run.table, first) * row_bytes;
        auto seen = [&](u32 row) { return first + row >= run.low && first + row < run.high; };
        if constexpr (!coded) {
            from += kv_head() * columns * 2;
#pragma unroll 2
            for (u32 i = threadIdx.x; i < TILE * width / 8; i += THREADS) {
                u32 row = i / (width / 8), column = i % (width / 8) * 8;
                bool there = seen(row) && column < columns;
                const u8* at = there ? from + row * row_bytes + column * 2 : from;
                copy_async_16(tile_of(stage, which) + row * STRIDE + column * 2, at, there ? 16 : 0);
            }
        } else {
            // Rows are multiples of four bytes; of real models of sixteen.
            const u8* scales = from + gqa.kv_heads * columns + kv_head() * 4 * scales_of(columns);
            from += kv_head() * columns;
            u8* to = raw_of(stage, which);
            if (columns % 16 == 0 && row_bytes % 16 == 0) {
#pragma unroll 2
                for (u32 i = threadIdx.x; i < TILE * width / 16; i += THREADS) {
                    u32 row = i / (width / 16), column = i % (width / 16) * 16;
                    bool there = seen(row) && column < columns;
                    const u8* at = there ? from + row * row_bytes + column : from;
                    copy_async_16(to + row * RAW_STRIDE + column, at, there ? 16 : 0);
                }
            } else {
#pragma unroll 2
                for (u32 i = threadIdx.x; i < TILE * width / 4; i += THREADS) {
                    u32 row = i / (width / 4), column = i % (width / 4) * 4;
                    bool there = seen(row) && column < columns;
                    const u8* at = there ? from + row * row_bytes + column : from;
                    copy_async_4(to + row * RAW_STRIDE + column, at, there ? 4 : 0);
                }
            }
            for (u32 i = threadIdx.x; i < TILE * 2; i += THREADS) {
                u32 row = i / 2, scale = i % 2;
                bool there = seen(row) && scale < scales_of(columns);
                const u8* at = there ? scales + row * row_bytes + scale * 4 : scales;
                copy_async_4(to + row * RAW_STRIDE + width + scale * 4, at, there ? 4 : 0);
            }
        }
    }

    DEVICE void load(u32 stage, u32 first, u32 end) const {
        if (first < end) {
            load_half(stage, first, 0);
            load_half(stage, first, 1);
        }
        copy_commit();
    }

    // From codes to values.
    DEVICE void decode(u32 stage) const {
#pragma unroll 1
        for (u32 which = 0; which < 2; which++) {
#pragma unroll 2
            for (u32 i = threadIdx.x; i < TILE * width / 8; i += THREADS) {
                u32 row = i / (width / 8), column = i % (width / 8) * 8;
                const u8* from = raw_of(stage, which) + row * RAW_STRIDE;
                auto* codes = reinterpret_cast<const u32*>(from + column);
                auto* scales = reinterpret_cast<const float*>(from + width);
                *reinterpret_cast<Bytes16*>(tile_of(0, which) + row * STRIDE + column * 2) =
                    scaled_codes(codes[0], codes[1], scales[column / CODES_PER_SCALE]);
            }
        }
    }

    // ---- One tile.

    DEVICE void load_queries(u32 (&queries)[STEPS][4]) const {
#pragma unroll
        for (int which = 0; which < 2; which++) {
            Row row = this->row(which);
            const float* from = gqa.queries + (u64(row.token) * gqa.heads + row.head) * gqa.key;
#pragma unroll
            for (int i = 0; i < 2 * STEPS; i++) {
                u32 column = i * 8 + lane_id() % 4 * 2;
                Float2 two{0, 0};
                if (row.there && column < gqa.key) two = *reinterpret_cast<const Float2*>(from + column);
                queries[i / 2][i % 2 * 2 + which] = pack_bf16(two.x, two.y);
            }
        }
    }

    // This warp's scores, not scaled.
    DEVICE void multiply_keys(const u8* tile, const u32 (&queries)[STEPS][4], float (&scores)[OWN_KEYS][4]) const {
        u32 lane = lane_id(), first = warp_id() % warps * OWN_KEYS * 8;
        const u8* from = lane_keys<STRIDE>(tile, first, lane);
        clear(scores);
#pragma unroll
        for (int step = 0; step < STEPS; step++) add_scores<STRIDE>(scores, queries[step], from + step * 32);
    }

    // All scores of the tile.
    DEVICE void score(const u8* tile, const u32 (&queries)[STEPS][4], float (&scores)[KEYS][4]) const {
        if constexpr (warps == 1) {
            multiply_keys(tile, queries, scores);
        } else {
            float own[OWN_KEYS][4];
            multiply_keys(tile, queries, own);
            Float4* to = all_scores() + warp_id() % warps * OWN_KEYS * 32 + lane_id();
#pragma unroll
            for (int n = 0; n < OWN_KEYS; n++) to[n * 32] = {own[n][0], own[n][1], own[n][2], own[n][3]};
            __syncthreads();
#pragma unroll
            for (int n = 0; n < KEYS; n++) {
                Float4 four = all_scores()[n * 32 + lane_id()];
                scores[n][0] = four.x, scores[n][1] = four.y, scores[n][2] = four.z, scores[n][3] = four.w;
            }
        }
        float scale = multiply_rn(gqa.scale, LOG2_E);
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = multiply_rn(scores[n][i], scale);
        }
    }

    // What a row does not see counts nothing.
    DEVICE void mask(u32 first, const int (&positions)[2], float (&scores)[KEYS][4]) const {
        if (first >= run.all_low && first + TILE <= run.all_high) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int low = positions[i / 2] < 0 ? 0 : begin_of(positions[i / 2]);
#pragma unroll
            for (int n = 0; n < KEYS; n++) {
                int at = first + n * 8 + lane_id() % 4 * 2 + i % 2;
                if (at < low || at > positions[i / 2]) scores[n][i] = -INFINITY;
            }
        }
    }

    // ---- Spans.

    // Writes what `span` gave the two rows, or joins it to what `out` holds.
    DEVICE void close(u32 span, const int (&positions)[2], const Softmax& state, Joined (&joined)[2],
                      const float (&values)[COLUMNS][4]) const {
#pragma unroll
        for (int which = 0; which < 2; which++) {
            float sum = row_sum(state.sum[which]);
            if (positions[which] < 0) continue;
            u32 position = positions[which], first = begin_of(position) / run.length, last = position / run.length;
            if (span < first || span > last) continue;
            Row row = this->row(which);
            u32 column = warp_id() % warps * COLUMNS * 8 + lane_id() % 4 * 2;
            if (gqa.partials) {
                u64 at = (u64(row.token) * gqa.spans + span - first) * gqa.heads + row.head;
                u64 parts = u64(gqa.tokens) * gqa.spans * gqa.heads;
                store_part(gqa.partials, parts, at, column, gqa.value, values, which, state.maximum[which], sum);
                continue;
            }
            Shares shares = join(joined[which], state.maximum[which], sum);
            float factor = span == last ? last_factor(joined[which], gqa.sinks, row.head) : 1;
            float* to = gqa.out + (u64(row.token) * gqa.heads + row.head) * gqa.value;
            join_values(to, column, gqa.value, values, which, span == first, shares, factor);
        }
    }

    // All tiles of the run, or those of the one span that this block has of it.
    DEVICE void take_run(const u32 (&queries)[STEPS][4]) const {
        u32 span = run.low / run.length, begin = run.low / TILE * TILE, end = run.high;
        if (gqa.partials) {
            span += blockIdx.z;
            begin = max(begin, span * run.length);
            end = min(end, (span + 1) * run.length);
            if (begin >= end) return;
        }
        int positions[2];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            Row row = this->row(which);
            bool mine = row.there && row.token >= run.first && row.token < run.end;
            positions[which] = mine ? gqa.positions[row.token] : -1;
        }
        Joined joined[2] = {nothing_joined(), nothing_joined()};
        u32 stage = 0;
        load(0, begin, end);
        for (u32 first = begin; first < end; span++) {
            float values[COLUMNS][4];
            clear(values);
            Softmax state = fresh_softmax();
            u32 span_end = min((span + 1) * run.length, end);
            for (; first < span_end; first += TILE, stage ^= 1)
                take_tile(stage, first, end, queries, positions, state, values);
            close(span, positions, state, joined, values);
        }
    }

    // The tile that begins at `first` and lies in `stage`.
    DEVICE void take_tile(u32 stage, u32 first, u32 end, const u32 (&queries)[STEPS][4], const int (&positions)[2],
                          Softmax& state, float (&values)[COLUMNS][4]) const {
        copy_wait<0>();
        // All copies of this tile are there, and nobody reads the one before any more.
#ifndef FAULT_NO_BARRIER
        __syncthreads();
#endif
        load(stage ^ 1, first + TILE, end);
        if constexpr (coded) {
            decode(stage);
            __syncthreads();
        }
        float scores[KEYS][4], keep[2];
        u32 weights[KEYS][2];
        score(tile_of(stage, 0), queries, scores);
        mask(first, positions, scores);
        soften(scores, weights, state, keep);
        rescale(values, keep);
        // Of the values this warp has some columns.
        const u8* own_values = tile_of(stage, 1) + warp_id() % warps * COLUMNS * 16;
        add_values<STRIDE>(values, weights, own_values, lane_id());
    }

    DEVICE void take_block() {
        wait_for_previous();
        let_next_start();
        u32 queries[STEPS][4];
        load_queries(queries);
        u32 last = min(first_token() + gqa.tokens_per_block, gqa.tokens);
        for (u32 first = first_token(); first < last; first = run.end) {
            if (!find_run(first, last)) continue;
            // Then its first token goes alone. 8-bit rows hold nothing infinite, and single tokens are alone.
            if (groups > 1 && !coded && spoils_others()) find_run(first, first + 1);
            take_run(queries);
            // The next run's first copies land where this one's last tile may still be read.
            __syncthreads();
        }
    }
};

// Grid [tokens / tokens_per_block, kv_heads * blocks of heads, spans + 1 or 1] (a run of tokens may touch one span
// more than a row does); 32 * warps * groups threads. Dynamic shared memory: scores of 16 rows if there is more
// than one warp to a group, a tile of keys and one of values in padded rows, twice; with codes once, and twice the
// codes.
#define GQA_KERNEL(name, width, warps, groups, coded)                                                            \
    extern "C" __global__ void __launch_bounds__(32 * warps * groups, width == 64 ? 3 : 1)                       \
        name(const float* queries, const u8* keys, const u8* values, const int* positions,                       \
             const int* sequences, const int* tables, u32 table_width, u32 tokens, u32 tokens_per_block,         \
             u32 heads, u32 kv_heads, u32 key, u32 value, float scale, u32 window, const float* sinks,           \
             float* out, float* partials, u32 spans) {                                                           \
        DYNAMIC_SHARED(shared);                                                                                  \
        const Gqa gqa{queries,  keys,   values, positions, sequences, tables, table_width,                       \
                      tokens,   tokens_per_block, heads, kv_heads, key, value, scale,                            \
                      window,   sinks,  out,    partials,  spans};                                               \
        GqaBlock<width, warps, groups, coded>{gqa, shared, {}}.take_block();                                     \
    }                                                                                                            \
    EXPORT(name)

// Prompts.
GQA_KERNEL(gqa_bf16_64, 64, 1, 4, false);
GQA_KERNEL(gqa_bf16_128, 128, 1, 4, false);
GQA_KERNEL(gqa_bf16_256, 256, 2, 4, false);
GQA_KERNEL(gqa_fp8_64, 64, 1, 4, true);
GQA_KERNEL(gqa_fp8_128, 128, 1, 4, true);
GQA_KERNEL(gqa_fp8_256, 256, 2, 4, true);
// Single tokens.
GQA_KERNEL(gqa_bf16_64_single, 64, 4, 1, false);
GQA_KERNEL(gqa_bf16_128_single, 128, 4, 1, false);
GQA_KERNEL(gqa_bf16_256_single, 256, 2, 1, false);
GQA_KERNEL(gqa_fp8_64_single, 64, 4, 1, true);
GQA_KERNEL(gqa_fp8_128_single, 128, 4, 1, true);
GQA_KERNEL(gqa_fp8_256_single, 256, 2, 1, true);
