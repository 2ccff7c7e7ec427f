// Every kernel of the library, for the instruction set RK_ISA.
#include "deepfm.h"
#include "din_attention_backward.h"
#include "embedding_bag.h"
#include "embedding_bag_backward.h"
#include "embedding_fm.h"
#include "fm_interaction.h"
#include "linear_weight_grad.h"
#include "norm_activation.h"
