// Gate and up, with their bias, to what down takes: silu(gate) * up, or the clamped SwiGLU of gpt-oss.
#pragma once

#include "primitives.cuh"

struct Activation {
    // Whether gate and up are limited (gpt-oss).
    u32 clamped;
    float limit, alpha;

    // As dense products have it: with expf and a division that rounds to nearest.
    DEVICE float accurate(float gate, float up) const {
        float steep = limit_both(gate, up);
        return gate / (1 + expf(-(steep * gate))) * up;
    }

    // As routed experts have it: within a few ulp of that, in far fewer instructions.
    DEVICE float fast(float gate, float up) const {
        float steep = limit_both(gate, up);
        float falling = 1 + exp2_fast(multiply_rn(multiply_rn(gate, steep), -LOG2_E));
        return multiply_rn(multiply_rn(gate, reciprocal_fast(falling)), up);
    }

    // Gives back what gate counts times inside the sigmoid. Unlike with fminf, NaN stays.
    DEVICE float limit_both(float& gate, float& up) const {
        if (!clamped) return 1;
        gate = gate > limit ? limit : gate;
        up = (up > limit ? limit : up < -limit ? -limit : up) + 1;
        return alpha;
    }
};
