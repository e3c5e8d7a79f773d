// The experts' kernels for weights of MXFP4.
// For wgmma, and for kernels that start early (`wait_for_previous`):
// architectures: 90a
#include "experts.cuh"

KERNELS(mxfp4, Mxfp4, 4);
