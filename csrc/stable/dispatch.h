// From a tensor's dtype to a C++ type. Both devices.
#pragma once

#include "stable/tensor.h"

namespace rk {

// Calls body with a null pointer to the type of a floating-point dtype that the caller has checked; the
// 16-bit types are the caller's.
template <class Half, class BFloat16, class Body>
void dispatch_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

}  // namespace rk
