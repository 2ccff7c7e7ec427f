#include <torch/csrc/stable/library.h>

#include "cuda/common/driver.h"

namespace rk {
namespace cuda {

static int64_t cuda_refusal() { return static_cast<int64_t>(refusal()); }
static bool is_hip() { return kHip; }

}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_refusal", TORCH_BOX(&rk::cuda::cuda_refusal));
  m.impl("is_hip", TORCH_BOX(&rk::cuda::is_hip));
}
