// The values of a tensor of any floating-point dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <vector>

#include "stable/check.h"

namespace rk {

// Calls body with a null pointer to the C++ type of a floating-point dtype.
template <class Body>
void with_values(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<torch::headeronly::Half*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<torch::headeronly::BFloat16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

template <class A>
std::vector<A> values_of(const Tensor& t) {
  const Tensor u = torch::stable::contiguous(t);
  std::vector<A> values(u.numel());
  with_values(u.scalar_type(), [&](auto* type) {
    const auto* p = static_cast<const std::remove_pointer_t<decltype(type)>*>(u.const_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(p[i]);
  });
  return values;
}

// The dtype of what is kept beside tensors of a dtype, the one they are computed in.
inline ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace rk
