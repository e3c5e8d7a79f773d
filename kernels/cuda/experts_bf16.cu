// The experts' kernels for weights of bf16.
// For wgmma, and for kernels that start early (`wait_for_previous`):
// architectures: 90a
#include "experts.cuh"

KERNELS(bf16, Bf16, 4);
