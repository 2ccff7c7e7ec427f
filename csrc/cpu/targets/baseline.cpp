#define RK_ISA baseline
#define RK_VECTOR_BYTES 16
#include "kernels.h"
