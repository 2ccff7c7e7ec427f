// The activations by their number in the schemas, and checks that hidden layers share.
#pragma once

#include "stable/check.h"

namespace rk {

// torch's rule: an epsilon may be 0 but where it stands beside a variance that may be.
inline void check_epsilon(const char* op, const char* name, double eps, bool positive) {
  RK_CHECK(positive ? eps > 0 : eps >= 0, op, ": ", name,
           positive ? " must be positive in training" : " must not be negative", ", got ", eps);
}

enum class ActivationName : int64_t { linear, sigmoid, relu, leakyrelu, prelu, dice, dice_batch_norm };

inline void check_activation(const char* op, ActivationName activation) {
  const int64_t number = static_cast<int64_t>(activation),
                last = static_cast<int64_t>(ActivationName::dice_batch_norm);
  RK_CHECK(number >= 0 && number <= last, op, ": activation must be 0 .. ", last, ", got ", number);
}

}  // namespace rk
