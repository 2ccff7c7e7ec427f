#define RK_ISA baseline
#define RK_VECTOR_BYTES 16
#include "cpu/targets/all_kernels.h"
