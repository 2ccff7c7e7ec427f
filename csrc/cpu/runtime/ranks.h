// What the processes of a group tell each other in the middle of an op.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "cpu/runtime/values.h"
#include "stable/check.h"

namespace rk {

// Values of each process of the group, one process after the other in the order of the ranks: what is summed
// over them has the same bits everywhere. By an op in Python (rankkernels/ops/_ranks.py), because torch's
// name the group by a type that the stable ABI has not. It gives the text of an error in place of values.
inline std::vector<double> gather(const std::string& group, const std::vector<double>& own,
                                  const Tensor& like) {
  using torch::stable::detail::from;
  const Tensor message =
      torch::stable::new_empty(like, {static_cast<int64_t>(own.size())}, ScalarType::Double);
  std::copy(own.begin(), own.end(), static_cast<double*>(message.mutable_data_ptr()));
  std::array<StableIValue, 2> stack{from(message), from(group)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("rankkernels::gather_ranks", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor every = torch::stable::detail::to<Tensor>(stack[0]);
  if (dtype_of(every) == ScalarType::Byte)
    fail("between the processes of group '", group,
         "': ", std::string(static_cast<const char*>(every.const_data_ptr()), every.numel()));
  return values_of<double>(every);
}

// Their sums over the processes.
inline std::vector<double> sum_over_ranks(const std::string& group, const std::vector<double>& own,
                                          const Tensor& like) {
  const std::vector<double> every = gather(group, own, like);
  std::vector<double> sums(own.size());
  for (size_t i = 0; i < every.size(); ++i) sums[i % own.size()] += every[i];
  return sums;
}

}  // namespace rk
