// The experts' kernels for weights of FP8 with scales per 128 x 128.
// For wgmma, and for kernels that start early (`wait_for_previous`):
// architectures: 90a
#include "experts.cuh"

KERNELS(fp8, Fp8, 3);
