// e4m3 codes (sign, four bits of exponent, three of mantissa) as bf16.
#pragma once

#include "primitives.cuh"

// Codes 0 and 1 of a word as one pair, 2 and 3 as the other: exactly, but NaN as 480. See `e4m3_not_a_number`.
DEVICE void e4m3_to_bf16(u32 codes, u32& low, u32& high) {
    // Exponent and mantissa, moved to where bf16 has them, are the value times 2^-120: the biases differ by that.
    constexpr u32 SIGN = 0x80008000, REST = 0x07f007f0, TWO_TO_120 = 0x7b807b80, MINUS_ZERO = 0x80008000;
    u32 first = permute(codes, 0, 0x1404), second = permute(codes, 0, 0x3424);
    low = fma_bf16x2(and_or(first, SIGN, first >> 4 & REST), TWO_TO_120, MINUS_ZERO);
    high = fma_bf16x2(and_or(second, SIGN, second >> 4 & REST), TWO_TO_120, MINUS_ZERO);
}

// Not 0 if one of the four codes is NaN.
DEVICE u32 e4m3_not_a_number(u32 codes) { return ((codes & 0x7f7f7f7f) + 0x01010101) & 0x80808080; }
