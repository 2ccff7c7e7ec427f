// Square matrices as operands of the GEMM, and experts, which have one each.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <utility>

#include "cpu/interaction/params.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/values.h"
#include "cpu/simd/operand.h"

namespace rk {

struct SquareMatrix {
  const void* p;
  int64_t stride_row, stride_column;
};

// Matrices [D, D] of any strides, matrix(i) the i-th, one behind the other, zero beyond D.
template <class A, class Matrix>
const A* square_operands(ScalarType dtype, int64_t count, int64_t D, bool transposed, Arena<A>& arena,
                         const Matrix& matrix) {
  const int64_t stride = padded<A>(D);
  A* all = arena.take(count * D * stride);
  with_values(dtype, [&](auto* type) {
    run_tasks(count, count * D * D, [&](int64_t m) {
      SquareMatrix of = matrix(m);
      if (transposed) std::swap(of.stride_row, of.stride_column);
      const auto* from = static_cast<const std::remove_pointer_t<decltype(type)>*>(of.p);
      A* to = all + m * D * stride;
      for (int64_t i = 0; i < D; ++i)
        for (int64_t j = 0; j < D; ++j)
          to[i * stride + j] = static_cast<A>(from[i * of.stride_row + j * of.stride_column]);
    });
  });
  return all;
}

// The same of weight [count, D, D].
template <class A>
const A* square_operands(const Tensor& weight, bool transposed, Arena<A>& arena) {
  const auto* first = static_cast<const char*>(weight.const_data_ptr());
  const int64_t bytes = weight.stride(0) * weight.element_size();
  return square_operands<A>(
      dtype_of(weight), weight.size(0), weight.size(1), transposed, arena,
      [&](int64_t i) { return SquareMatrix{first + i * bytes, weight.stride(1), weight.stride(2)}; });
}

// What both passes of experts with this weight [E, r, r] read, but their projections.
template <class T>
MixedExperts<T> experts_of(const Tensor& weight, Arena<Accumulator<T>>& arena) {
  MixedExperts<T> a{};
  a.E = weight.size(0);
  a.rank = weight.size(1);
  a.stride = padded<Accumulator<T>>(a.rank);
  a.transposed = square_operands<Accumulator<T>>(weight, true, arena);
  return a;
}

}  // namespace rk
