// The experts' kernels for weights of INT4 with scales per 32.
// For wgmma, and for kernels that start early (`wait_for_previous`):
// architectures: 90a

// Faults that tests plant.
#ifdef FAULT_NO_COPY_WAIT
#define WITHOUT_COPY_WAIT
#endif
#ifdef FAULT_FRAGMENT_INDEX
#define WITH_WRONG_PAIR
#endif

#include "experts.cuh"

KERNELS(int4, Int4, 4);
