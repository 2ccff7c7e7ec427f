// Every kernel of the library, for the instruction set RK_ISA.
#include "fm_interaction.h"
#include "din_attention.h"
