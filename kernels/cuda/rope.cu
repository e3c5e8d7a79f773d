// What happens to rows around attention: lookup of embeddings, rotation by position, and storing in the cache.
//
// Rotations come from a table that the host makes (cosines and sines, times the attention scale). A cached row has
// the bytes that the host's cache would have, to the last bit, so that caches can move between the two.
//
// For kernels that start early (`wait_for_previous`):
// architectures: 90
#include "lanes.cuh"
#include "rows.cuh"

// ---- Embedding.

// Rows of the table by id; of an id below zero (padding) zeros. Blocks along x take rows, along y the columns.
template <class Value>
DEVICE void look_up(const Value* table, const int* ids, u32 width, float* out) {
    wait_for_previous();
    let_next_start();
    u64 row = blockIdx.x;
    u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * UNIT;
    if (column >= width) return;
    int id = ids[row];
    const Value* from = table + u64(id < 0 ? 0 : id) * width;
    float value[UNIT];
    bool wide = width % UNIT == 0 && rows_aligned(table, 0) && rows_aligned(out, 0);
    if (wide && sizeof(Value) == 2) {
        Bytes16 packed = *reinterpret_cast<const Bytes16*>(from + column);
        value[0] = low_bf16(packed.x), value[1] = high_bf16(packed.x);
        value[2] = low_bf16(packed.y), value[3] = high_bf16(packed.y);
        value[4] = low_bf16(packed.z), value[5] = high_bf16(packed.z);
        value[6] = low_bf16(packed.w), value[7] = high_bf16(packed.w);
    } else if (wide) {
        load_unit<true>(value, reinterpret_cast<const float*>(from), column, width);
    } else if (sizeof(Value) == 2) {
#pragma unroll
        for (u32 i = 0; i < UNIT; i++) value[i] = column + i < width ? bf16_to_f32(u16(from[column + i])) : 0.0f;
    } else {
        load_unit<false>(value, reinterpret_cast<const float*>(from), column, width);
    }
#pragma unroll
    for (u32 i = 0; i < UNIT; i++) value[i] = id < 0 ? 0.0f : value[i];
    if (wide) store_unit<true>(out + row * width, column, width, value);
    else store_unit<false>(out + row * width, column, width, value);
}

extern "C" __global__ void __launch_bounds__(128)
    embed_bf16(const u16* table, const int* ids, u32 width, float* out) {
    look_up(table, ids, width, out);
}
EXPORT(embed_bf16);

extern "C" __global__ void __launch_bounds__(128)
    embed_f32(const float* table, const int* ids, u32 width, float* out) {
    look_up(table, ids, width, out);
}
EXPORT(embed_f32);

// ---- Rotation.

struct Heads {
    float* x;
    // Values from a row to the next, and from a head to the next; where in a head the rotated values start.
    u64 stride;
    u32 count, head_stride, offset;
};

// Rotates `dim` values of the heads of two tensors (queries and keys; either may have no heads) by
// table [positions, dim / 2, 2]: pair (a, b) becomes (a cos - b sin, b cos + a sin). Interleaved pairs are
// neighbours, others half the rotated values apart. Rows of a position below zero stay. A thread per pair; blocks
// along x take rows, along y the pairs of a row.
extern "C" __global__ void __launch_bounds__(128)
    rotate(float* queries, u64 query_stride, u32 query_heads, u32 query_head_stride, u32 query_offset, float* keys,
           u64 key_stride, u32 key_heads, u32 key_head_stride, u32 key_offset, const float* table,
           const int* positions, u32 dim, u32 interleaved) {
    wait_for_previous();
    let_next_start();
    u64 row = blockIdx.x;
    u32 index = blockIdx.y * blockDim.x + threadIdx.x, pairs = dim / 2;
    u32 head = index / pairs, pair = index % pairs;
    if (head >= query_heads + key_heads) return;
    int position = positions[row];
    if (position < 0) return;
    Heads heads = head < query_heads ? Heads{queries, query_stride, query_heads, query_head_stride, query_offset}
                                     : Heads{keys, key_stride, key_heads, key_head_stride, key_offset};
    if (head >= query_heads) head -= query_heads;
    float* x = heads.x + row * heads.stride + u64(head) * heads.head_stride + heads.offset;
    u32 first = interleaved ? 2 * pair : pair, second = interleaved ? 2 * pair + 1 : pair + pairs;
    const float* turn = table + (u64(position) * pairs + pair) * 2;
    float cosine = turn[0], sine = turn[1], a = x[first], b = x[second];
    x[first] = fmaf(a, cosine, -(b * sine));
    x[second] = fmaf(b, cosine, a * sine);
}
EXPORT(rotate);

// ---- Cache rows.

// NaN keeps its sign and payload, as on the host.
DEVICE u16 stored_bf16(float x) {
    u32 bits = __float_as_uint(x);
    return (bits & 0x7fffffff) > 0x7f800000 ? u16(bits >> 16 | 0x40) : f32_to_bf16(x);
}

// Four bytes at any address.
DEVICE void store_bytes(u8* at, u32 bytes) {
    if ((u64(at) & 3) == 0) {
        *reinterpret_cast<u32*>(at) = bytes;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) at[i] = u8(bytes >> 8 * i);
    }
}

constexpr u32 TILE = 128;
constexpr float GREATEST_E4M3 = 448.0f;
constexpr float LEAST_SCALE = 1.17549435e-38f;
constexpr u32 INFINITE = 0x7f800000;

// The e4m3 code nearest to x, ties to even; NaN is 0 and what is beyond 448 is 448.
DEVICE u32 encode_e4m3(float x, u32 sign_of) {
    u32 bits = __float_as_uint(x) & 0x7fffffff;
    bits = bits > INFINITE ? 0 : min(bits, __float_as_uint(GREATEST_E4M3));
    // Subnormal codes count 2^-9: adding 2^14 leaves the nearest multiple of that in the low bits.
    u32 small = __float_as_uint(__uint_as_float(bits) + 16384.0f) - __float_as_uint(16384.0f);
    u32 large = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return (bits < __float_as_uint(1.0f / 64.0f) ? small : large) | (sign_of >> 24 & 0x80);
}

// Which of the two tensors that one launch stores a block is for: keys and values, or latents alone.
struct Stored {
    const float* row;
    u8* out;
};

DEVICE bool stored(Stored& mine, const float* x, const float* other_x, u64 stride, u8* cache, u8* other_cache,
                   u64 row_bytes, const int* slots) {
    int slot = slots[blockIdx.x];
    if (slot < 0) return false;
    bool other = blockIdx.z == 1;
    mine.row = (other ? other_x : x) + blockIdx.x * stride;
    mine.out = (other ? other_cache : cache) + u64(slot) * row_bytes;
    return true;
}

// Stores row blockIdx.x of x in row slots[blockIdx.x] of the cache, and with a second layer of blocks that of
// `other_x` in `other_cache`. Rows with a slot below zero are left out. Blocks along y take columns.
extern "C" __global__ void __launch_bounds__(128)
    cache_f32(const float* x, const float* other_x, u64 stride, u32 width, u8* cache, u8* other_cache,
              const int* slots) {
    wait_for_previous();
    let_next_start();
    Stored mine;
    u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * UNIT;
    if (!stored(mine, x, other_x, stride, cache, other_cache, u64(width) * 4, slots)) return;
    auto* out = reinterpret_cast<float*>(mine.out);
    float value[UNIT];
    if (width % UNIT == 0 && rows_aligned(mine.row, 0) && rows_aligned(out, 0)) {
        load_unit<true>(value, mine.row, column, width);
        store_unit<true>(out, column, width, value);
    } else {
        load_unit<false>(value, mine.row, column, width);
        store_unit<false>(out, column, width, value);
    }
}
EXPORT(cache_f32);

extern "C" __global__ void __launch_bounds__(128)
    cache_bf16(const float* x, const float* other_x, u64 stride, u32 width, u8* cache, u8* other_cache,
               const int* slots) {
    wait_for_previous();
    let_next_start();
    Stored mine;
    u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * UNIT;
    if (!stored(mine, x, other_x, stride, cache, other_cache, u64(width) * 2, slots) || column >= width) return;
    auto* out = reinterpret_cast<u16*>(mine.out);
    float value[UNIT];
    if (width % UNIT == 0 && rows_aligned(mine.row, 0) && rows_aligned(out, 0)) {
        load_unit<true>(value, mine.row, column, width);
        u32 word[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) word[i] = stored_bf16(value[2 * i]) | u32(stored_bf16(value[2 * i + 1])) << 16;
        *reinterpret_cast<Bytes16*>(out + column) = {word[0], word[1], word[2], word[3]};
    } else {
        load_unit<false>(value, mine.row, column, width);
#pragma unroll
        for (u32 i = 0; i < UNIT; i++)
            if (column + i < width) out[column + i] = stored_bf16(value[i]);
    }
}
EXPORT(cache_bf16);

// A warp per tile of up to 128 codes; the warps after those take the plain values, 128 each. Nothing in such a row
// need be aligned.
extern "C" __global__ void __launch_bounds__(128)
    cache_fp8(const float* x, const float* other_x, u64 stride, u32 heads, u32 width, u32 plain, u8* cache,
              u8* other_cache, const int* slots) {
    wait_for_previous();
    let_next_start();
    u32 tiles = (width + TILE - 1) / TILE, codes = heads * width, scales = heads * tiles;
    u32 part = blockIdx.y * (blockDim.x / 32) + warp_id();
    Stored mine;
    if (!stored(mine, x, other_x, stride, cache, other_cache, codes + 4 * scales + 2 * plain, slots)) return;
    if (part >= scales) {
        u8* out = mine.out + codes + 4 * scales;
        u32 first = (part - scales) * TILE;
        for (u32 i = first + lane_id(); i < first + TILE && i < plain; i += 32) {
            u16 bits = stored_bf16(mine.row[codes + i]);
            out[2 * i] = u8(bits);
            out[2 * i + 1] = u8(bits >> 8);
        }
        return;
    }
    u32 first = part % tiles * TILE, count = min(width - first, TILE), at = part / tiles * width + first;
    const float* from = mine.row + at;
    float value[4];
    // Bits of magnitudes are ordered as they are; infinities and NaN have no part in the scale.
    u32 greatest = 0;
    if (count == TILE && rows_aligned(from, 0)) {
        Float4 all = reinterpret_cast<const Float4*>(from)[lane_id()];
        value[0] = all.x, value[1] = all.y, value[2] = all.z, value[3] = all.w;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) value[i] = lane_id() * 4 + i < count ? from[lane_id() * 4 + i] : 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 bits = __float_as_uint(value[i]) & 0x7fffffff;
        greatest = max(greatest, bits < INFINITE ? bits : 0u);
    }
    greatest = greatest_of_lanes(greatest);
    float scale = fmaxf(__uint_as_float(greatest) / GREATEST_E4M3, LEAST_SCALE);
    u32 code[4];
    // The sign is the value's own: of a quotient that is NaN it is not the same everywhere.
#pragma unroll
    for (u32 i = 0; i < 4; i++) code[i] = encode_e4m3(value[i] / scale, __float_as_uint(value[i]));
    u8* out = mine.out + at + lane_id() * 4;
    if (lane_id() * 4 + 4 <= count) {
        store_bytes(out, code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24);
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (lane_id() * 4 + i < count) out[i] = u8(code[i]);
    }
    if (lane_id() == 0) store_bytes(mine.out + codes + 4 * part, __float_as_uint(scale));
}
EXPORT(cache_fp8);
