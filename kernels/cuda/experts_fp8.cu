// The experts' kernels for weights of FP8 with scales per 128 x 128.
// architectures: 90a
#include "experts.cuh"

KERNELS(fp8, Fp8, 3)

EXPORT(experts_up_fp8_few_1);
EXPORT(experts_up_fp8_few_3);
EXPORT(experts_up_fp8_wide);
EXPORT(experts_up_fp8_wgmma);
EXPORT(experts_down_fp8_few_1);
EXPORT(experts_down_fp8_few_3);
EXPORT(experts_down_fp8_wide);
EXPORT(experts_down_fp8_wgmma);
