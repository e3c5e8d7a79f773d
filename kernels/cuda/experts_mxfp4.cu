// The experts' kernels for weights of MXFP4.
// architectures: 90a
#include "experts.cuh"

KERNELS(mxfp4, Mxfp4, 4)

EXPORT(experts_up_mxfp4_few_1);
EXPORT(experts_up_mxfp4_few_3);
EXPORT(experts_up_mxfp4_wide);
EXPORT(experts_up_mxfp4_wgmma);
EXPORT(experts_down_mxfp4_few_1);
EXPORT(experts_down_mxfp4_few_3);
EXPORT(experts_down_mxfp4_wide);
EXPORT(experts_down_mxfp4_wgmma);
