// Short names for torch's stable types, and what is asked of every tensor. Both devices.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;
using Ints = std::vector<int64_t>;

// Tensor::scalar_type() fails on dtypes that the stable ABI has no number for: these have torch's own.
inline ScalarType dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return static_cast<ScalarType>(dtype);
}

// What values of a dtype are computed in.
inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A tensor whose rows the kernels can read: t where its last dimension has unit stride, else a copy.
inline Tensor unit_stride_last(const Tensor& t) {
  const int64_t d = t.dim() - 1;
  return t.stride(d) == 1 || t.size(d) == 1 ? t : torch::stable::contiguous(t);
}
// The same of a matrix; a tensor of more dimensions becomes contiguous, so that its rows have one stride.
inline Tensor unit_stride_rows(const Tensor& t) {
  return t.dim() == 2 ? unit_stride_last(t) : torch::stable::contiguous(t);
}

}  // namespace rk
