// From a tensor's dtype to the storage type the kernels are templates of.
#pragma once

#include <type_traits>

#include "cpu/runtime/isa.h"
#include "cpu/simd/storage.h"
#include "stable/check.h"

namespace rk {

// Calls body with a null pointer to the storage type of a floating-point dtype that the caller has checked.
template <class Body>
void dispatch_floating(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<fp16*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<bf16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

}  // namespace rk
