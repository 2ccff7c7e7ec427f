// The values of a tensor of any floating-point dtype, or of integers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "stable/dispatch.h"

namespace rk {

// Calls body with a null pointer to a type of the dtype's values that converts to and from others.
template <class Body>
void with_values(ScalarType dtype, const Body& body) {
  dispatch_dtype<torch::headeronly::Half, torch::headeronly::BFloat16>(dtype, body);
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

// The same of n values; zeros where there is no tensor.
template <class A>
std::vector<A> values_or_zeros(const Tensor* t, int64_t n) {
  return t ? values_of<A>(*t) : std::vector<A>(n);
}

// Of int32 or int64.
inline std::vector<int64_t> integers_of(const Tensor& t) {
  const Tensor u = torch::stable::contiguous(t);
  std::vector<int64_t> values(u.numel());
  if (dtype_of(u) == ScalarType::Int)
    std::copy_n(static_cast<const int32_t*>(u.const_data_ptr()), values.size(), values.begin());
  else
    std::copy_n(static_cast<const int64_t*>(u.const_data_ptr()), values.size(), values.begin());
  return values;
}

// A gradient like `param`, whose element i is value(i).
template <class Value>
Tensor gradient_of(const Tensor& param, const Value& value) {
  Tensor grad = torch::stable::new_empty(param, param.sizes());
  with_values(grad.scalar_type(), [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    P* p = static_cast<P*>(grad.mutable_data_ptr());
    const int64_t n = grad.numel();
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<P>(value(i));
  });
  return grad;
}

}  // namespace rk
