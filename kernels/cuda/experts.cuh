// The feed-forward of routed experts, for pairs (token, rank) that were grouped by expert: gate and up with the
// activation, then down. Weights are read as published, once per unit of work.
//
// `few` is for units of up to 64 tokens (32 with three planes): a block takes 64 rows of a weight, and as many
// columns of eight tokens as the unit has. `wide` is for units of up to 128: a block takes 128 rows. A unit that
// has more is taken in parts. All give the same bits. Blocks are as many as fit on the device, and take items (a
// unit, some rows) by their number. `wgmma` is `wide` by other means, on devices that have them (sm_90a); that its
// sums have the same bits there is for a device to show.
//
// A file per format has its kernels (KERNELS).
#pragma once

#include "activation.cuh"
#include "tile.cuh"

// Pairs of one expert: `count` of them from place `first` in the order on.
struct Unit {
    u32 expert, first, count, padding;
};
// Device addresses of an expert's weights; a bias (f32) may be absent. Where gate and up are rows of one weight by
// turns, `up` begins a row later.
struct Weight {
    u64 codes, scales, bias;
};
struct Expert {
    Weight gate, up, down;
};

namespace {

template <class T>
DEVICE const T* pointer(u64 address) {
    return reinterpret_cast<const T*>(address);
}

// Where value `element` of a row lies: as it is, or in nibble order.
DEVICE u32 position(u32 element, bool nibbles) {
    u32 j = element % 8, t = element % 32 / 8;
    return nibbles ? element / 32 * 32 + j % 4 * 8 + t * 2 + j / 4 : element;
}

// What a block works on: `count` pairs of one expert from place `first` of the order on, and a block of rows. It
// lies in shared memory, and is read again where it is needed: registers are for sums.
template <u32 tokens>
struct Item {
    static constexpr u32 TOKENS = tokens;
    u32 expert, first, count, row_block;
    // Number of the item, and how many of its unit's pairs are in this part and the parts before it.
    u32 number, taken;
    // Of each token of the item its row in the planes.
    u32 rows[tokens];
};

// Of both products: the items, and the sums of one.
struct Grouped {
    const Expert* experts;
    const u32* order;
    const Unit* units;
    const u32* unit_count;
    const u16* planes;
    u64 plane_stride;

    // Calls `work` for each of the block's items.
    template <u32 tokens, class Work>
    DEVICE void for_each(Item<tokens>* item, u32 row_blocks, const Work& work) const {
        if (threadIdx.x == 0) item->number = blockIdx.x, item->taken = 0;
        for (;;) {
            // Done with the item before.
            __syncthreads();
            if (threadIdx.x == 0) next(item, row_blocks);
            __syncthreads();
            if (item->count == 0) break;
            work();
        }
    }

    // By one thread: what is left of the unit, or the block's next item. A count of 0 ends it.
    template <u32 tokens>
    DEVICE void next(Item<tokens>* item, u32 row_blocks) const {
        u32 number = item->number, taken = item->taken, items = *unit_count * row_blocks;
        item->count = 0;
        for (; number < items; number += gridDim.x, taken = 0) {
            Unit unit = units[number / row_blocks];
            if (taken >= unit.count) continue;
            item->expert = unit.expert;
            item->first = unit.first + taken;
            item->count = min(unit.count - taken, tokens);
            item->row_block = number % row_blocks;
            item->number = number;
            item->taken = taken + item->count;
            break;
        }
    }

    // `row_of(place)` is the row of the planes that the pair at this place in the order takes.
    template <class S, class Item, class Multiply, bool paired, class RowOf>
    DEVICE Sums<S> sums(u8* shared, Item* item, const WeightRows<paired>& weights, const RowOf& row_of,
                        const Multiply& multiply) const {
        static_assert(S::TOKENS <= S::THREADS && S::TOKENS <= Item::TOKENS, "a thread finds one token");
        Sums<S> sums = {};
        auto find_tokens = [&] {
            u32 i = threadIdx.x;
            if (i < S::TOKENS) item->rows[i] = i < item->count ? row_of(item->first + i) : NONE;
            wait_for_previous();
        };
        multiply_all<S, paired>(sums, shared, weights, {planes, plane_stride, item->rows}, find_tokens, multiply);
        return sums;
    }
};

// ---- Gate and up.

struct Up {
    Grouped in;
    u16* out;
    u64 out_stride;
    u32 hidden, inter, ranks, row_step, nibbles;
    Activation activation;
    u32 planes;

    static constexpr u32 ROWS_PER_OUTPUT = 2;

    template <class S, class Item, class Multiply>
    DEVICE void run(u8* shared, Item* item, const Multiply& multiply) const {
        const Expert& weight = in.experts[item->expert];
        const WeightRows<true> weights = {{pointer<u8>(weight.gate.codes), pointer<u8>(weight.up.codes)},
                                    {pointer<u8>(weight.gate.scales), pointer<u8>(weight.up.scales)},
                                    row_step, item->row_block * (S::ROWS / 2), inter, hidden};
        auto token_of = [&](u32 place) { return in.order[place] / ranks; };
        Sums<S> sums = in.sums<S>(shared, item, weights, token_of, multiply);
        const Expert& same = in.experts[item->expert];
        const float *gate_bias = pointer<float>(same.gate.bias), *up_bias = pointer<float>(same.up.bias);
#pragma unroll
        for (u32 m = 0; m < S::ROW_TILES; m++) {
            u32 output = item->row_block * (S::ROWS / 2) + Sums<S>::row() / 2 + m * 8 + lane_id() / 4;
            bool spoilt[2] = {sums.watch[m].spoilt(0), sums.watch[m].spoilt(1)};
            // A whole number of eights: all lanes of the warp, or none.
            if (output >= inter) continue;
            float bias[2] = {gate_bias ? gate_bias[output * row_step] : 0,
                             up_bias ? up_bias[output * row_step] : 0};
#pragma unroll
            for (u32 n = 0; n < S::TOKEN_TILES; n++) {
                float value[2];
                for (u32 i = 0; i < 2; i++) {
                    // Zero has one sign, however many zeros were added.
                    float gate = sums.of[m][n][i] + 0.0f + bias[0], up = sums.of[m][n][2 + i] + 0.0f + bias[1];
                    value[i] = activation.fast(gate, up);
                    if (spoilt[0] || spoilt[1]) value[i] = __uint_as_float(0x7fffffff);
                }
                u32 token = Sums<S>::token() + n * 8 + lane_id() % 4 * 2;
                store(value, output, item->first + token, item->first + item->count);
            }
        }
    }

    // The lane has one output of the places `place` and the next; with the lane of the output that is stored beside
    // it, it trades for both outputs of one.
    DEVICE void store(const float (&value)[2], u32 output, u32 place, u32 end) const {
        u32 other = nibbles ? 4 : 1;
        bool second = output & other;
        float traded = __shfl_xor_sync(ALL_LANES, second ? value[0] : value[1], other * 4);
        float low = second ? traded : value[0], high = second ? value[1] : traded;
        place += second;
        if (place >= end) return;
        u16* row = out + u64(place) * inter + position(output & ~other, nibbles);
        for (u32 plane = 0; plane < planes; plane++) {
            u32 pair = take_plane(low, high);
            *reinterpret_cast<u32*>(row + plane * out_stride) = pair;
        }
    }
};

// ---- Down.

struct Down {
    Grouped in;
    float* out;
    u32 hidden, inter;

    static constexpr u32 ROWS_PER_OUTPUT = 1;

    template <class S, class Item, class Multiply>
    DEVICE void run(u8* shared, Item* item, const Multiply& multiply) const {
        const Weight& weight = in.experts[item->expert].down;
        const WeightRows<false> weights = {{pointer<u8>(weight.codes), nullptr},
                                           {pointer<u8>(weight.scales), nullptr},
                                     1, item->row_block * S::ROWS, hidden, inter};
        auto place_of = [&](u32 place) { return place; };
        Sums<S> sums = in.sums<S>(shared, item, weights, place_of, multiply);
        const float* bias = pointer<float>(in.experts[item->expert].down.bias);
#pragma unroll
        for (u32 m = 0; m < S::ROW_TILES; m++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 output = item->row_block * S::ROWS + Sums<S>::row() + m * 16 + half * 8 + lane_id() / 4;
                bool spoilt = sums.watch[m].spoilt(half);
                if (output >= hidden) continue;
                float add = bias ? bias[output] : 0;
#pragma unroll
                for (u32 n = 0; n < S::TOKEN_TILES; n++)
#pragma unroll
                    for (u32 i = 0; i < 2; i++) {
                        u32 token = Sums<S>::token() + n * 8 + lane_id() % 4 * 2 + i;
                        if (token >= item->count) continue;
                        float value = sums.of[m][n][half * 2 + i] + 0.0f + add;
                        if (spoilt) value = __uint_as_float(0x7fffffff);
                        out[u64(in.order[item->first + token]) * hidden + output] = value;
                    }
            }
    }
};

// ---- Shapes.

// Two blocks of `few` fit where a multiprocessor has 100 KB, four where it has 228.
constexpr u32 FEW_TOKENS = 64, EXACT_TOKENS = 32, WIDE_TOKENS = 128;
// Static shared memory, a multiple of 128 bytes, is the rest.
constexpr u32 FEW_BYTES = (49 << 10) - 384, WIDE_BYTES = (99 << 10) - 640;
// Beside it up to 1024 bytes to align.
constexpr u32 WGMMA_BYTES = 192 << 10;

// 128 bytes of a row at once; 64 of codes of four bits where tokens need the room.
template <class Format, u32 planes, u32 token_tiles>
using Few = Shape<Format, planes, 4, 1, 1, token_tiles,
                  (Format::CODE_BITS == 4 && token_tiles > 1) ? 128 : 1024 / Format::CODE_BITS,
                  planes == 1 ? FEW_BYTES : WIDE_BYTES>;
template <class Format, u32 token_tiles>
using Wide = Shape<Format, 1, 4, 2, 2, token_tiles, Format::GROUP == 32 ? 128 : Format::GROUP, WIDE_BYTES>;

template <class Format, u32 token_tiles>
using WideWgmma = Shape<Format, 1, 8, 1, 1, token_tiles, Format::GROUP == 32 ? 128 : Format::GROUP, WGMMA_BYTES>;

template <class Format, u32 planes, class Side, class Item>
DEVICE void few(const Side& side, u32 outputs, u8* shared, Item* item) {
    constexpr u32 OUTPUTS = 64 / Side::ROWS_PER_OUTPUT;
    side.in.for_each(item, (outputs + OUTPUTS - 1) / OUTPUTS, [&] {
        u32 count = item->count;
        if (count <= 8)
            side.template run<Few<Format, planes, 1>>(shared, item, ByMma());
        else if (count <= 16)
            side.template run<Few<Format, planes, 2>>(shared, item, ByMma());
        else if (planes == 3 || count <= 32)
            side.template run<Few<Format, planes, 4>>(shared, item, ByMma());
        else if constexpr (planes == 1)
            side.template run<Few<Format, planes, 8>>(shared, item, ByMma());
    });
}

template <class Format, class Side, class Item>
DEVICE void wide(const Side& side, u32 outputs, u8* shared, Item* item) {
    constexpr u32 OUTPUTS = 128 / Side::ROWS_PER_OUTPUT;
    side.in.for_each(item, (outputs + OUTPUTS - 1) / OUTPUTS, [&] {
        if (item->count <= 64)
            side.template run<Wide<Format, 4>>(shared, item, ByMma());
        else
            side.template run<Wide<Format, 8>>(shared, item, ByMma());
    });
}

template <class Format, class Side, class Item>
DEVICE void wgmma(const Side& side, u32 outputs, u8* shared, Item* item) {
#ifdef HAS_WGMMA
    shared = aligned_for_swizzle(shared);
    constexpr u32 OUTPUTS = 128 / Side::ROWS_PER_OUTPUT;
    side.in.for_each(item, (outputs + OUTPUTS - 1) / OUTPUTS, [&] {
        if (item->count <= 64)
            side.template run<WideWgmma<Format, 8>>(shared, item, ByWgmma());
        else
            side.template run<WideWgmma<Format, 16>>(shared, item, ByWgmma());
    });
#else
    asm volatile("trap;");
#endif
}

}  // namespace

// ---- Kernels. Planes [planes][rows][k] are `stride` values apart; `unit_count` and the units are in device
// memory.

#define GROUPED_PARAMETERS                                                                                     \
    const Expert *experts, const u32 *order, const Unit *units, const u32 *unit_count, const u16 *planes,      \
        u64 stride
#define GROUPED {experts, order, units, unit_count, planes, stride}

// x [planes][tokens][hidden] to inner [planes][place in the order][inter], for pairs token * ranks + rank.
#define UP_KERNEL(name, threads, blocks, tokens, plane_count, ...)                                            \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                             \
        name(GROUPED_PARAMETERS, u16* out, u64 out_stride, u32 hidden, u32 inter, u32 ranks, u32 row_step,    \
             u32 nibbles, u32 clamped, float limit, float alpha) {                                            \
        DYNAMIC_SHARED(shared);                                                                               \
        SHARED(Item<tokens>, item, 1);                                                                        \
        wait_for_previous();                                                                                  \
        let_next_start();                                                                                     \
        Up side = {GROUPED, out, out_stride, hidden, inter, ranks, row_step, nibbles,                                 \
                   {clamped, limit, alpha}, plane_count};                                                     \
        __VA_ARGS__(side, inter, shared, item);                                                               \
    }                                                                                                         \
    EXPORT(name)

// inner [planes][place in the order][inter] to out [pair][hidden].
#define DOWN_KERNEL(name, threads, blocks, tokens, ...)                                                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                             \
        name(GROUPED_PARAMETERS, float* out, u32 hidden, u32 inter) {                                         \
        DYNAMIC_SHARED(shared);                                                                               \
        SHARED(Item<tokens>, item, 1);                                                                        \
        let_next_start();                                                                                     \
        Down side = {GROUPED, out, hidden, inter};                                                            \
        __VA_ARGS__(side, hidden, shared, item);                                                              \
        /* Where there was no item: what comes after this kernel counts on the one before. */                 \
        wait_for_previous();                                                                                  \
    }                                                                                                         \
    EXPORT(name)

// `blocks` of the few on a multiprocessor: what registers allow. Code for sm_100 and later wants a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define FEW_BLOCKS(blocks) (blocks - 1)
#else
#define FEW_BLOCKS(blocks) blocks
#endif
#define KERNELS(format, Format, blocks)                                                                       \
    UP_KERNEL(experts_up_##format##_few_1, 128, FEW_BLOCKS(blocks), FEW_TOKENS, 1, few<Format, 1>);           \
    UP_KERNEL(experts_up_##format##_few_3, 128, 2, EXACT_TOKENS, 3, few<Format, 3>);                          \
    UP_KERNEL(experts_up_##format##_wide, 256, 1, WIDE_TOKENS, 1, wide<Format>);                              \
    UP_KERNEL(experts_up_##format##_wgmma, 256, 1, WIDE_TOKENS, 1, wgmma<Format>);                            \
    DOWN_KERNEL(experts_down_##format##_few_1, 128, FEW_BLOCKS(blocks), FEW_TOKENS, few<Format, 1>);          \
    DOWN_KERNEL(experts_down_##format##_few_3, 128, 2, EXACT_TOKENS, few<Format, 3>);                         \
    DOWN_KERNEL(experts_down_##format##_wide, 256, 1, WIDE_TOKENS, wide<Format>);                             \
    DOWN_KERNEL(experts_down_##format##_wgmma, 256, 1, WIDE_TOKENS, wgmma<Format>)
