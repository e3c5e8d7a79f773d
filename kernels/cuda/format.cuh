// How weights are stored, as published, and how their codes become bf16 on the way into a product.
//
// A product takes weights in blocks of 16 rows and 32 k. Codes become bf16 values that are exact (a whole number,
// e4m3, e2m1); scales are applied to sums of products in f32, per group of k. Codes of four bits come in pairs of
// the columns j and j + 4 of a word of eight, so their activations are stored in nibble order: of each 32 values,
// 8 t + j lies at 8 (j % 4) + 2 t + j / 4.
#pragma once

#include "fp8.cuh"

DEVICE u32 max_bf16x2(u32 a, u32 b) {
#ifdef __CUDACC__
    u32 r;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
#else
    return pack_bf16(fmaxf(low_bf16(a), low_bf16(b)), fmaxf(high_bf16(a), high_bf16(b)));
#endif
}

// Not seen by other files, which may use the same names.
namespace {

// Where a lane reads in a tile of shared memory whose rows have `row_bytes` (64 or 128) bytes: 16-byte chunk c of
// row r lies at c ^ r % 8 (c ^ r / 2 % 4), so that eight rows at the same chunk are in eight different quarters of
// the banks. With 128 it is the device's own swizzle.
template <u32 row_bytes>
struct Swizzled {
    u32 row, chunk;

    // Row `row`, and chunks from the `first` on.
    DEVICE Swizzled(u32 row, u32 first) : row(row * row_bytes), chunk((first ^ turn(row)) << 4) {}
    static DEVICE u32 turn(u32 row) { return row_bytes == 128 ? row % 8 : row / 2 % 4; }
    // Chunk `further` has no bit in common with the first.
    DEVICE u32 at(u32 further) const { return row + (chunk ^ further << 4); }
};

// Each format has: CODE_BITS; GROUP, the k whose products are summed before the scale (32, or a whole tile);
// SCALE_K, SCALE_ROWS and SCALE_BYTES of a scale (0 bytes: none); `Block`, the codes of 16 rows and 32 k as a lane
// holds them, with `load` and `fragment` of one of the two steps of 16 k (as multiply_bf16 takes it); and `Watch`,
// what `fragment` notes on the way and the end of a row is told (of the lane's rows g and g + 8).

struct Unwatched {
    DEVICE bool spoilt(u32) const { return false; }
};

struct Bf16 {
    static constexpr u32 CODE_BITS = 16, GROUP = 64, SCALE_K = 64, SCALE_ROWS = 1, SCALE_BYTES = 0;
    using Watch = Unwatched;
    struct Block {
        u32 words[2][4];
    };

    // Of the tile at `codes`: the rows from `row` (a multiple of 16) on, the k from 32 `at` on.
    template <u32 row_bytes>
    static DEVICE Block load(const u8* codes, u32 row, u32 at) {
        Block block;
        const Swizzled<row_bytes> place(row + lane_id() % 16, lane_id() / 16);
        for (u32 step = 0; step < 2; step++)
            load_matrix_x4(block.words[step], codes + place.at(at * 4 + step * 2));
        return block;
    }
    static DEVICE void fragment(u32 (&a)[4], const Block& block, u32 step, Watch&) {
        for (u32 i = 0; i < 4; i++) a[i] = block.words[step][i];
    }
    static DEVICE float scale(const u8*) { return 1; }
};

// e4m3fn codes with an f32 per block of 128 x 128.
struct Fp8 {
    static constexpr u32 CODE_BITS = 8, GROUP = 128, SCALE_K = 128, SCALE_ROWS = 128, SCALE_BYTES = 4;
    // The greatest of `e4m3_magnitudes`: 0x7f is NaN, would become 480, and has no other way to it.
    struct Watch {
        u32 peak[2] = {0, 0};

        DEVICE bool spoilt(u32 half) const {
            u32 all = peak[half];
            all = max_bf16x2(all, __shfl_xor_sync(ALL_LANES, all, 1));
            all = max_bf16x2(all, __shfl_xor_sync(ALL_LANES, all, 2));
            return (all & 0xffff) == 0x07f0 || all >> 16 == 0x07f0;
        }
    };
    struct Block {
        u16 pairs[2][4];
    };

    template <u32 row_bytes>
    static DEVICE Block load(const u8* codes, u32 row, u32 at) {
        Block block;
        const Swizzled<row_bytes> place(row + lane_id() / 4, 0);
        const u8* pairs = codes + lane_id() % 4 * 2;
        for (u32 step = 0; step < 2; step++)
            for (u32 i = 0; i < 4; i++)
                block.pairs[step][i] = *reinterpret_cast<const u16*>(
                    pairs + place.at(at * 2 + step) + i % 2 * 8 * row_bytes + i / 2 * 8);
        return block;
    }
    static DEVICE void fragment(u32 (&a)[4], const Block& block, u32 step, Watch& watch) {
        for (u32 i = 0; i < 4; i++) {
            u32 spread = permute(block.pairs[step][i], 0, FIRST_TWO);
            watch.peak[i % 2] = max_bf16x2(watch.peak[i % 2], e4m3_magnitudes(spread));
            a[i] = e4m3_pair(spread);
        }
    }
    static DEVICE float scale(const u8* at) { return *reinterpret_cast<const float*>(at); }
};

// Codes of four bits: a matrix of ldmatrix is 8 rows of 32 k, and its word of a lane holds the lane's fragments of
// both steps.
struct Nibbles {
    static constexpr u32 CODE_BITS = 4, GROUP = 32, SCALE_K = 32, SCALE_ROWS = 1;
    using Watch = Unwatched;
    struct Block {
        u32 words[2];
    };

    template <u32 row_bytes>
    static DEVICE Block load(const u8* codes, u32 row, u32 at) {
        Block block;
        const Swizzled<row_bytes> place(row + lane_id() % 16, 0);
        load_matrix_x2(block.words, codes + place.at(at));
        return block;
    }
    // Which of the four pairs of word i % 2 is pair i of the fragment.
    static DEVICE u32 pair(u32 step, u32 i) {
#ifdef WITH_WRONG_PAIR
        return step + i / 2 * 2;
#else
        return step * 2 + i / 2;
#endif
    }
};

// q + 8 in four bits, with a bf16 scale per 32.
struct Int4 : Nibbles {
    static constexpr u32 SCALE_BYTES = 2;

    // The nibble as the low bits of 128 + q + 8, less 136.
    static DEVICE void fragment(u32 (&a)[4], const Block& block, u32 step, Watch&) {
        for (u32 i = 0; i < 4; i++) {
            u32 biased = and_or(block.words[i % 2] >> 4 * pair(step, i), 0x000f000f, 0x43004300);
            a[i] = fma_bf16x2(biased, 0x3f803f80, 0xc308c308);
        }
    }
    static DEVICE float scale(const u8* at) { return bf16_to_f32(*reinterpret_cast<const u16*>(at)); }
};

// e2m1 codes with a power of two per 32.
struct Mxfp4 : Nibbles {
    static constexpr u32 SCALE_BYTES = 1;

    // Sign, and exponent and mantissa, move to where a bf16 has them; its bias is 126 more.
    static DEVICE void fragment(u32 (&a)[4], const Block& block, u32 step, Watch&) {
        for (u32 i = 0; i < 4; i++) {
            u32 codes = block.words[i % 2], j = pair(step, i);
            u32 magnitude = (j < 2 ? codes << (6 - 4 * j) : codes >> (4 * j - 6)) & 0x01c001c0;
            a[i] = fma_bf16x2(and_or(codes << (12 - 4 * j), 0x80008000, magnitude), 0x7e807e80, 0x80008000);
        }
    }
    // 2^(code - 127), of which code 0 is a subnormal; 255 is NaN.
    static DEVICE float scale(const u8* at) {
        u32 code = *at;
        u32 bits = max(code << 23, 0x00400000u);
        return __uint_as_float(code == 255 ? 0x7fffffffu : bits);
    }
};

}  // namespace
