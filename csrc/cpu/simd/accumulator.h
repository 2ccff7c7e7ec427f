// What sums are computed in, for kernels and for the code that calls them. Types alone: see vec.h.
#pragma once

namespace rk {

// What values stored as T are computed with.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

}  // namespace rk
