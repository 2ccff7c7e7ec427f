// The ids of a feature, for one instruction set.
#pragma once

#include "cpu/embedding/params.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

// Calls body with the ids as what they are.
template <class Body>
RK_INLINE auto with_ids(const Bags& bags, const Body& body) {
  return bags.wide_ids ? body(static_cast<const int64_t*>(bags.ids))
                       : body(static_cast<const int32_t*>(bags.ids));
}

}  // namespace RK_ISA
}  // namespace rk
