// The experts' kernels for weights of INT4 with scales per 32.
// architectures: 90a

// Faults that tests plant.
#ifdef FAULT_NO_COPY_WAIT
#define WITHOUT_COPY_WAIT
#endif
#ifdef FAULT_FRAGMENT_INDEX
#define WITH_WRONG_PAIR
#endif

#include "experts.cuh"

KERNELS(int4, Int4, 4)

EXPORT(experts_up_int4_few_1);
EXPORT(experts_up_int4_few_3);
EXPORT(experts_up_int4_wide);
EXPORT(experts_up_int4_wgmma);
EXPORT(experts_down_int4_few_1);
EXPORT(experts_down_int4_few_3);
EXPORT(experts_down_int4_wide);
EXPORT(experts_down_int4_wgmma);
