// One block of a dense product: some rows of a weight times some tokens, over one or all pieces of k.
//
// Every output is summed in one order, whatever the tile shape, the number of tokens or the device:
//   * k is cut into pieces by the weight's shape alone (kernels/src/cuda/dense.rs); a piece starts from zero;
//   * within a piece, k16 steps ascend, and within a step the planes of x go from the smallest to the largest;
//   * of fp8 weights, a block of 128 k starts from zero and is added as fma(scale, block, piece);
//   * pieces are added to zero in ascending order, then the bias, then what is there already.
#pragma once

#include "fp8.cuh"
#include "workspace.cuh"

enum class Weight { Bf16, Fp8 };

enum class Layout {
    // Weights [out, in].
    Rows,
    // Two such weights, gate and up. Of sixteen rows of a tile, eight are of gate and eight of up, so that one
    // lane has both sums of an output.
    Pair,
    // Weights [in, out].
    Transposed
};

constexpr u32 SCALE_BLOCK = 128;
// What an entry point needs of dynamic shared memory at most: a little less than the smallest devices have.
constexpr int SHARED_BUDGET = 100000, MOST_STAGES = 8;

// Arguments of a launch. Strides count elements.
struct DenseCall {
    // Planes [planes][tokens][heads][k].
    const u16* x;
    u64 x_plane;
    u32 x_token, x_head;
    // Matrices of `width` columns. Head h takes rows from `first_row` + h * `head_rows` on. The second is up.
    const u8 *weights, *second_weights;
    const float *scales, *second_scales;
    u32 width, first_row, head_rows;
    // Sums per head and token, and terms of a sum.
    u32 rows, columns;
    u32 tokens;
    // Of k, a multiple of 128.
    u32 piece;
    Float4* workspace;
    u32* counters;
};

// Bytes from the start of a part of a stage, whose lines have so many chunks of sixteen bytes, to a chunk of line
// `first` + `eighth`: a multiple of eight, and less than eight. Neither eight lines of one chunk (ldmatrix) nor
// four lines of two neighbours (64-bit loads) share banks.
template <int chunks>
DEVICE u32 chunk_at(u32 first, u32 eighth, u32 chunk) {
    u32 turned = chunks == 4 ? chunk ^ eighth >> 1 : chunk ^ ((eighth & 3) << 1 | eighth >> 2);
    return ((first + eighth) * chunks + turned) * 16;
}

template <Weight WEIGHT, Layout LAYOUT, int ROW_WARPS, int TOKEN_WARPS, int ROW_TILES, int TOKEN_TILES,
          int STAGE_K, int PLANE_COUNT>
struct DenseBlock {
    static constexpr int PLANES = PLANE_COUNT;
    static constexpr bool FP8 = WEIGHT == Weight::Fp8, TRANSPOSED = LAYOUT == Layout::Transposed;
    static constexpr int THREADS = 32 * ROW_WARPS * TOKEN_WARPS, STEPS = STAGE_K / 16;
    static constexpr int ROWS = ROW_WARPS * ROW_TILES * 16, TOKENS = TOKEN_WARPS * TOKEN_TILES * 8;
    // Whether a block may take all of k, and not just a piece.
    static constexpr bool WHOLE = ROWS > 64 || PLANES > 1;
    static constexpr u32 TILES = ROW_TILES * TOKEN_TILES, OUTPUTS = LAYOUT == Layout::Pair ? ROWS / 2 : ROWS;
    // Floats from one token to the next where a block's sums lie in shared memory: lanes of a warp that write
    // eight rows of four tokens do not share banks.
    static constexpr u32 TILE_STRIDE = ROWS + 4;
    // Bytes of a weight, and of what lies side by side in a stage: the k of a row, or the rows of a k.
    static constexpr int SIZE = FP8 ? 1 : 2, LINE = SIZE * (TRANSPOSED ? ROWS : STAGE_K);
    static constexpr int LINES = TRANSPOSED ? STAGE_K : ROWS, LINE_CHUNKS = LINE / 16, CHUNK = 16 / SIZE;
    // Copies of a thread are of one chunk of a line and so many lines apart.
    static constexpr int WEIGHT_COPIES = LINES * LINE_CHUNKS / THREADS, COPY_LINES = THREADS / LINE_CHUNKS;
    static constexpr int X_LINE = 2 * STAGE_K, X_CHUNKS = X_LINE / 16, X_COPIES = PLANES * TOKENS * X_CHUNKS;
    static constexpr int X_AT = LINES * LINE, SCALES_AT = X_AT + PLANES * TOKENS * X_LINE;
    static constexpr int STAGE_BYTES = SCALES_AT + (FP8 ? 4 * ROWS : 0);
    static constexpr int FITTING = SHARED_BUDGET / STAGE_BYTES;
    static constexpr int STAGES = FITTING < MOST_STAGES ? FITTING : MOST_STAGES;
    static_assert(STAGES >= 2 && WEIGHT_COPIES * THREADS == LINES * LINE_CHUNKS);
    static_assert(COPY_LINES % 16 == 0);
    static_assert(THREADS / X_CHUNKS % 8 == 0 && STAGE_K <= int(SCALE_BLOCK) && ROWS <= THREADS);
    static_assert(4 * TOKENS * TILE_STRIDE <= STAGES * STAGE_BYTES && THREADS % OUTPUTS == 0 && STEPS % 2 == 0);

    // Of a warp's tiles, row after row.
    using Sums = float[TILES][4];

    const DenseCall& call;
    u8* const stages;
    const u32 lane = lane_id(), row_warp = warp_id() % ROW_WARPS, token_warp = warp_id() / ROW_WARPS;
    u32 row_block, token_block, head;
    // Tokens of the block that there are.
    u32 live_tokens;
    // First row of the head in its matrix; the k of its first term, counted from a block of scales; and the end.
    u32 first_row, k_offset, k_end;
    // Of this thread's copies: where the first comes from at k = 0, bytes from one to the next, and which exist.
    const u8* from;
    u64 copy_step;
    u32 exists = 0;

    DEVICE DenseBlock(const DenseCall& call, u8* stages) : call(call), stages(stages) {
        // Row blocks go round within groups of token blocks: what runs at the same time then shares both sides.
        constexpr u32 GROUP = 8;
        u32 row_blocks = (call.rows + OUTPUTS - 1) / OUTPUTS;
        u32 token_blocks = (call.tokens + TOKENS - 1) / TOKENS;
        u32 group = blockIdx.x / (GROUP * row_blocks), rest = blockIdx.x - group * GROUP * row_blocks;
        u32 members = min(GROUP, token_blocks - group * GROUP);
        row_block = rest / members;
        token_block = group * GROUP + rest % members;
        live_tokens = min(u32(TOKENS), call.tokens - token_block * TOKENS);
        head = blockIdx.z;
        first_row = call.first_row + head * call.head_rows;
        k_offset = TRANSPOSED && FP8 ? first_row % SCALE_BLOCK : 0;
        k_end = k_offset + call.columns;
        find_copies();
    }

    // The output that a row of the block belongs to.
    DEVICE u32 output_of(u32 row) const {
        return row_block * OUTPUTS + (LAYOUT == Layout::Pair ? row / 16 * 8 + row % 8 : row);
    }
    DEVICE bool is_second(u32 row) const { return LAYOUT == Layout::Pair && row % 16 >= 8; }

    DEVICE void find_copies() {
        u32 line = threadIdx.x / LINE_CHUNKS, within = threadIdx.x % LINE_CHUNKS * CHUNK;
        u32 output = TRANSPOSED ? row_block * ROWS + within : output_of(line);
        const u8* matrix = is_second(line) ? call.second_weights : call.weights;
        // Lines before the head's first row are not read.
        u64 at = TRANSPOSED ? u64(first_row - k_offset + line) * call.width + output
                            : u64(first_row + output) * call.width + within;
        from = matrix + at * SIZE;
        constexpr u32 OUTPUTS = TRANSPOSED ? 0 : LAYOUT == Layout::Pair ? COPY_LINES / 2 : COPY_LINES;
        copy_step = u64(TRANSPOSED ? COPY_LINES : OUTPUTS) * call.width * SIZE;
        for (u32 copy = 0; copy < WEIGHT_COPIES; copy++)
            exists |= u32(output + copy * OUTPUTS < call.rows) << copy;
    }

    DEVICE u8* stage(u32 slot) const { return stages + slot * STAGE_BYTES; }

    // Starts the copies of a stage's weights, and of their scales. Of what does not exist no byte is read.
    DEVICE void copy_weights(u8* stage, u32 k) const {
        u32 line = threadIdx.x / LINE_CHUNKS, chunk = threadIdx.x % LINE_CHUNKS;
        const u8* source = from + u64(k) * (TRANSPOSED ? call.width : 1) * SIZE;
        u8* to = stage + chunk_at<LINE_CHUNKS>(line & ~7u, line & 7, chunk);
#pragma unroll
        for (u32 copy = 0; copy < WEIGHT_COPIES; copy++) {
            u32 own_k = k + (TRANSPOSED ? line + copy * COPY_LINES : chunk * CHUNK);
            bool inside = (exists >> copy & 1) && own_k >= k_offset && own_k < k_end;
            if (FP8 && call.width % 16) {
                // Lines of such a matrix are at multiples of eight bytes only, and end in the middle of a chunk.
                u32 left = TRANSPOSED ? call.rows - row_block * ROWS - chunk * CHUNK : k_end - own_k;
                copy_async_8(to, source, inside ? 8 : 0);
                copy_async_8(to + 8, source + 8, inside && left > 8 ? 8 : 0);
            } else {
                copy_async_16(to, source, inside ? 16 : 0);
            }
            source += copy_step;
            to += COPY_LINES * LINE;
        }
        if (!FP8) return;
        u32 row = threadIdx.x;
        if (row >= ROWS) return;
        u32 output = output_of(row);
        u32 at_row = first_row + (TRANSPOSED ? k - k_offset : output), at_column = TRANSPOSED ? output : k;
        u32 scale_width = (call.width + SCALE_BLOCK - 1) / SCALE_BLOCK;
        const float* scales = is_second(row) ? call.second_scales : call.scales;
        const float* scale = scales + u64(at_row / SCALE_BLOCK) * scale_width + at_column / SCALE_BLOCK;
        copy_async_4(stage + SCALES_AT + 4 * row, scale, output < call.rows ? 4 : 0);
    }

    // Where sixteen bytes of a stage's x come from; null if there are none. Threads keep to a chunk of the lines.
    DEVICE const u16* x_source(u32 line, u32 k) const {
        u32 own_k = k + threadIdx.x % X_CHUNKS * 8, token = token_block * TOKENS + line % TOKENS;
        if (token >= call.tokens || own_k < k_offset || own_k >= k_end) return nullptr;
        u64 at = line / TOKENS * call.x_plane + u64(token) * call.x_token + head * call.x_head;
        return call.x + at + (own_k - k_offset);
    }
    DEVICE u8* x_place(u8* stage, u32 line) const {
        return stage + X_AT + chunk_at<X_CHUNKS>(line & ~7u, line & 7, threadIdx.x % X_CHUNKS);
    }

    // Starts the copies of a stage's x.
    DEVICE void copy_x(u8* stage, u32 k) const {
#pragma unroll
        for (u32 first = 0; first < X_COPIES; first += THREADS) {
            u32 i = first + threadIdx.x, line = i / X_CHUNKS;
            if (X_COPIES % THREADS && i >= X_COPIES) break;
            const u16* source = x_source(line, k);
            copy_async_16(x_place(stage, line), source, source ? 16 : 0);
        }
    }

    // Copies the x of all stages but the last at once: their groups of asynchronous copies are closed.
    DEVICE void copy_first_x(u32 k) const {
        // Several are loaded before the first is stored, because the loads take far longer.
        constexpr u32 ALL = (STAGES - 1) * X_COPIES, BATCH = 4;
        for (u32 first = threadIdx.x; first < ALL; first += BATCH * THREADS) {
            Bytes16 held[BATCH];
#pragma unroll
            for (u32 j = 0; j < BATCH; j++) {
                u32 i = first + j * THREADS;
                const u16* source = x_source(i % X_COPIES / X_CHUNKS, k + i / X_COPIES * STAGE_K);
                held[j] = source ? *reinterpret_cast<const Bytes16*>(source) : Bytes16{};
            }
#pragma unroll
            for (u32 j = 0; j < BATCH; j++) {
                u32 i = first + j * THREADS;
                if (i < ALL)
                    *reinterpret_cast<Bytes16*>(x_place(stage(i / X_COPIES), i % X_COPIES / X_CHUNKS)) = held[j];
            }
        }
    }

    // Fragments of sixteen rows and sixteen k of the weights.
    // `codes` are kept from an even step to the next.
    DEVICE void load_weights(u32 (&a)[4], u32 (&codes)[4], u32 (&nan)[2], const u8* stage, int tile, int step,
                             int odd) const {
        u32 row = (row_warp * ROW_TILES + tile) * 16;
        if constexpr (!FP8 && !TRANSPOSED) {
            u32 first = row + lane / 8 % 2 * 8, chunk = 2 * step + lane / 16;
            load_matrix_x4(a, stage + chunk_at<LINE_CHUNKS>(first, lane % 8, chunk));
        } else if constexpr (!FP8) {
            u32 first = 16 * step + lane / 16 * 8, chunk = row / 8 + lane / 8 % 2;
            load_matrix_x4_transposed(a, stage + chunk_at<LINE_CHUNKS>(first, lane % 8, chunk));
        } else {
            // A lane has k 4 t to 4 t + 3 of rows g and g + 8 (t = lane % 4, g = lane / 4).
            if constexpr (!TRANSPOSED) {
                // Two steps at once: words of rows g and g + 8 of this step, then of the next.
                u32 first = row + lane / 8 % 2 * 8, chunk = step + lane / 16;
                if (!odd) load_matrix_x4(codes, stage + chunk_at<LINE_CHUNKS>(first, lane % 8, chunk));
            } else {
                for (u32 half = 0; half < 2; half++) {
                    u32 word = 0, column = row + 8 * half + lane / 4;
                    for (u32 i = 0; i < 4; i++) {
                        u32 line = 16 * step + lane % 4 * 4 + i;
                        u32 at = chunk_at<LINE_CHUNKS>(line & ~7u, line & 7, column / 16) + column % 16;
                        word |= u32(stage[at]) << 8 * i;
                    }
                    codes[2 * odd + half] = word;
                }
            }
            for (int half = 0; half < 2; half++) {
                u32 word = codes[2 * odd + half];
                nan[half] |= e4m3_not_a_number(word);
                e4m3_to_bf16(word, a[half], a[half + 2]);
            }
        }
    }

    // Fragments of sixteen k of all tokens of the warp.
    DEVICE void load_x(u32 (&b)[TOKEN_TILES][2], const u8* stage, int plane, int step) const {
        const u8* x = stage + X_AT;
        u32 first = plane * TOKENS + token_warp * TOKEN_TILES * 8;
        if constexpr (FP8) {
            // The k of a lane are those that it has of the weights.
            for (int tile = 0; tile < TOKEN_TILES; tile++) {
                u32 chunk = 2 * step + lane % 4 / 2;
                const u8* at = x + chunk_at<X_CHUNKS>(first + 8 * tile, lane / 4, chunk) + lane % 2 * 8;
                Bytes8 both = *reinterpret_cast<const Bytes8*>(at);
                b[tile][0] = both.x;
                b[tile][1] = both.y;
            }
        } else if constexpr (TOKEN_TILES == 1) {
            load_matrix_x2(b[0], x + chunk_at<X_CHUNKS>(first, lane % 8, 2 * step + lane / 8 % 2));
        } else {
            for (int tile = 0; tile < TOKEN_TILES; tile += 2) {
                u32 two_tiles = first + 8 * tile + lane / 16 * 8, chunk = 2 * step + lane / 8 % 2, two[4];
                load_matrix_x4(two, x + chunk_at<X_CHUNKS>(two_tiles, lane % 8, chunk));
                for (int i = 0; i < 4; i++) b[tile + i / 2][i % 2] = two[i];
            }
        }
    }

    DEVICE void multiply(Sums& sums, u32 (&nan)[ROW_TILES][2], const u8* stage) const {
        // More at once than two steps only where products are what it takes: the rest waits for memory.
        constexpr int PAIRS_AT_ONCE = PLANES == 1 && STEPS == 4 ? 2 : 1;
#pragma unroll PAIRS_AT_ONCE
        for (int pair = 0; pair < STEPS / 2; pair++) {
            u32 codes[ROW_TILES][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int step = 2 * pair + half;
                u32 a[ROW_TILES][4], b[TOKEN_TILES][2];
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; tile++)
                    load_weights(a[tile], codes[tile], nan[tile], stage, tile, step, half);
#pragma unroll
                for (int plane = PLANES - 1; plane >= 0; plane--) {
                    load_x(b, stage, plane, step);
#pragma unroll
                    for (int tile = 0; tile < int(TILES); tile++)
                        multiply_bf16(sums[tile], a[tile / TOKEN_TILES], b[tile % TOKEN_TILES]);
                }
            }
        }
    }

    // Adds a block of scales' sums, and begins the next from zero.
    DEVICE void add_block(Sums& sums, Sums& part, u32 (&nan)[ROW_TILES][2], const u8* stage) const {
        const float* scales = reinterpret_cast<const float*>(stage + SCALES_AT);
#pragma unroll
        for (int row = 0; row < ROW_TILES; row++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float scale = scales[(row_warp * ROW_TILES + row) * 16 + half * 8 + lane / 4];
                if (__any_sync(ALL_LANES, nan[row][half])) {
                    // The four lanes of a row have seen different k of it.
                    u32 seen = nan[row][half];
                    seen |= __shfl_xor_sync(ALL_LANES, seen, 1);
                    seen |= __shfl_xor_sync(ALL_LANES, seen, 2);
                    if (seen) scale = __uint_as_float(0x7fc00000);
                }
                nan[row][half] = 0;
#pragma unroll
                for (int token = 0; token < 2 * TOKEN_TILES; token++) {
                    int tile = row * TOKEN_TILES + token / 2, i = 2 * half + token % 2;
                    sums[tile][i] = fmaf(scale, part[tile][i], sums[tile][i]);
                }
            }
        clear(part);
    }

    DEVICE static void clear(Sums& sums) {
#pragma unroll
        for (int i = 0; i < int(4 * TILES); i++) sums[i / 4][i % 4] = 0;
    }
    DEVICE static void add(Sums& sums, const Sums& more) {
#pragma unroll
        for (int i = 0; i < int(4 * TILES); i++) sums[i / 4][i % 4] += more[i / 4][i % 4];
    }

    // Sums from `begin`, a multiple of 128, to `end`: of the last piece in `sums`, of those before it in `total`.
    DEVICE void sum(Sums& sums, Sums& total, u32 begin, u32 end) const {
        u32 count = (end - begin + STAGE_K - 1) / STAGE_K, load_slot = STAGES - 1, slot = 0;
        // Weights do not depend on the kernel before, whose results x is made of.
#pragma unroll 1
        for (u32 s = 0; s < STAGES - 1; s++) {
            if (s < count) copy_weights(stage(s), begin + s * STAGE_K);
            copy_commit();
        }
        wait_for_previous();
        copy_first_x(begin);
        Sums part;
        u32 nan[ROW_TILES][2] = {};
        clear(sums);
        clear(total);
        if (FP8) clear(part);
        for (u32 s = 0; s < count; s++) {
            u32 k = begin + s * STAGE_K;
            copy_wait<STAGES - 2>();
            __syncthreads();
            if (s + STAGES - 1 < count) {
                u32 next = k + (STAGES - 1) * STAGE_K;
                copy_weights(stage(load_slot), next);
                copy_x(stage(load_slot), next);
            }
            copy_commit();
            load_slot = load_slot + 1 == STAGES ? 0 : load_slot + 1;
            if (WHOLE && s > 0 && k % call.piece == 0) {
                add(total, sums);
                clear(sums);
            }
            multiply(FP8 ? part : sums, nan, stage(slot));
            bool block_ends = (k + STAGE_K) % SCALE_BLOCK == 0 || s + 1 == count;
            if (FP8 && block_ends) add_block(sums, part, nan, stage(slot));
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
    }

    // Sums of the block in shared memory. Of a pair the first half of the rows is gate and the second up.
    DEVICE float* tile_at(u32 token, u32 row) const {
        return reinterpret_cast<float*>(stages) + token * TILE_STRIDE + row;
    }

    DEVICE void put(const Sums& sums) const {
        // The stages are read no more.
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < int(TILES); tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 row = (row_warp * ROW_TILES + tile / TOKEN_TILES) * 16 + lane / 4;
                u32 token = (token_warp * TOKEN_TILES + tile % TOKEN_TILES) * 8 + lane % 4 * 2 + i % 2;
                bool pair = LAYOUT == Layout::Pair;
                u32 at = pair ? row / 16 * 8 + row % 8 + i / 2 * OUTPUTS : row + i / 2 * 8;
                *tile_at(token, at) = sums[tile][i];
            }
        __syncthreads();
    }

    // Leaves the tile, of one piece, in the workspace. In the block that comes last it is then the sum of all.
    DEVICE bool share(u32* flag) const {
        constexpr u32 ALL = TOKENS * ROWS / 4, LINE = ROWS / 4;
        static_assert(THREADS % LINE == 0);
        u32 pieces = gridDim.y, block = blockIdx.z * gridDim.x + blockIdx.x, live = live_tokens * LINE;
        Float4* parts = call.workspace + u64(block) * pieces * ALL + threadIdx.x;
        // This thread's places in the tile are as many lines apart.
        auto* own = reinterpret_cast<Float4*>(tile_at(threadIdx.x / LINE, threadIdx.x % LINE * 4));
        constexpr u32 STEP = THREADS / LINE * TILE_STRIDE / 4;
        Float4 *to = parts + u64(blockIdx.y) * ALL, *from = own;
#pragma unroll 1
        for (u32 i = threadIdx.x; i < live; i += THREADS, to += THREADS, from += STEP) *to = *from;
        if (!arrives_last(call.counters + block, pieces, flag)) return false;
        // One after the other all pieces of a place, then of the next; but several are loaded before the first is
        // added, because the loads take far longer.
        constexpr u32 BATCH = 8;
        u32 load_place = threadIdx.x, load_piece = 0, piece = 0;
        const Float4* load_from = parts;
        Float4 total{};
        for (u32 i = threadIdx.x; i < live;) {
            Float4 loaded[BATCH];
#pragma unroll
            for (u32 j = 0; j < BATCH; j++) {
                if (load_place >= live) break;
                loaded[j] = load_others(load_from);
                load_from += ALL;
                if (++load_piece < pieces) continue;
                load_piece = 0;
                load_place += THREADS;
                load_from = parts + load_place - threadIdx.x;
            }
#pragma unroll
            for (u32 j = 0; j < BATCH; j++) {
                if (i >= live) break;
                const Float4& p = loaded[j];
                total = {total.x + p.x, total.y + p.y, total.z + p.z, total.w + p.w};
                if (++piece < pieces) continue;
                *own = total;
                own += STEP;
                total = {};
                piece = 0;
                i += THREADS;
            }
        }
        __syncthreads();
        return true;
    }

    // Leaves all sums of this block's outputs in its tile; false if another block will have them.
    DEVICE bool run(u32* flag) const {
        Sums sums, total;
        bool shared = gridDim.y > 1;
        u32 begin = shared ? blockIdx.y * call.piece : 0;
        sum(sums, total, begin, shared ? min(k_end, begin + call.piece) : k_end);
        let_next_start();
        // Zero where the piece is shared.
        add(total, sums);
        put(total);
        return !shared || share(flag);
    }

    // A thread has one output of every so many tokens.
    DEVICE u32 own_output() const { return row_block * OUTPUTS + threadIdx.x % OUTPUTS; }
    static constexpr u32 TOKEN_STEP = THREADS / OUTPUTS;
    DEVICE u32 first_token() const { return threadIdx.x / OUTPUTS; }
};
