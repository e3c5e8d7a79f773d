// The experts' kernels for weights of bf16.
// architectures: 90a
#include "experts.cuh"

KERNELS(bf16, Bf16, 4)

EXPORT(experts_up_bf16_few_1);
EXPORT(experts_up_bf16_few_3);
EXPORT(experts_up_bf16_wide);
EXPORT(experts_up_bf16_wgmma);
EXPORT(experts_down_bf16_few_1);
EXPORT(experts_down_bf16_few_3);
EXPORT(experts_down_bf16_wide);
EXPORT(experts_down_bf16_wgmma);
