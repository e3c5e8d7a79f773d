// e4m3 codes (sign, four bits of exponent, three of mantissa) as bf16.
#pragma once

#include "primitives.cuh"

// What `permute(codes, 0, ..)` takes to spread two codes of a word: each into the high byte of a half, above zeros.
constexpr u32 FIRST_TWO = 0x1404, LAST_TWO = 0x3424;

// Exponent and mantissa of two spread codes, moved to where bf16 has them.
DEVICE u32 e4m3_magnitudes(u32 spread) { return spread >> 4 & 0x07f007f0; }

// Two spread codes as bf16: exactly, but NaN as 480.
DEVICE u32 e4m3_pair(u32 spread) {
    // What was moved is the value times 2^-120, also without a leading one: the biases differ by that.
    constexpr u32 SIGN = 0x80008000, TWO_TO_120 = 0x7b807b80, MINUS_ZERO = 0x80008000;
    return fma_bf16x2(and_or(spread, SIGN, e4m3_magnitudes(spread)), TWO_TO_120, MINUS_ZERO);
}

// Codes 0 and 1 of a word as one pair, 2 and 3 as the other. See `e4m3_not_a_number`.
DEVICE void e4m3_to_bf16(u32 codes, u32& low, u32& high) {
    low = e4m3_pair(permute(codes, 0, FIRST_TWO));
    high = e4m3_pair(permute(codes, 0, LAST_TWO));
}

// Not 0 if one of the four codes is NaN.
DEVICE u32 e4m3_not_a_number(u32 codes) { return ((codes & 0x7f7f7f7f) + 0x01010101) & 0x80808080; }
