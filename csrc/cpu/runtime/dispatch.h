// From a tensor's dtype to the storage type the kernels are templates of.
#pragma once

#include <type_traits>

#include "cpu/runtime/isa.h"
#include "cpu/simd/storage.h"
#include "stable/dispatch.h"

namespace rk {

// Calls body with a null pointer to the storage type of a floating-point dtype that the caller has checked.
template <class Body>
void dispatch_floating(ScalarType dtype, const Body& body) {
  dispatch_dtype<fp16, bf16>(dtype, body);
}

}  // namespace rk
