// What the kernel of embedding_fm.h is given: see embedding_bag_args.h.
#pragma once

#include <stdint.h>

namespace rk {

// The backward of the FM and the linear term, in one dtype; matrices have unit stride along their columns.
struct FmGrads {
  const void* embeddings;       // [B, F D], rows stride_xb apart
  const void* grad_embeddings;  // the same, rows stride_gb apart; or null: zero
  const void* grad_fm;          // [B], or null: zero
  const void* grad_linear;      // [B]
  const void* linear_weight;    // [F, D]; null with grad_linear
  void* grad_lookups;           // [B, F D], contiguous
  int64_t stride_xb, stride_gb, F, D;
};

}  // namespace rk
