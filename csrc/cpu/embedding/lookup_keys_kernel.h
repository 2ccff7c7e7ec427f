// Keys of lookups, to sort them by (table, row), for one instruction set.
#pragma once

#include "cpu/embedding/ids_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

namespace bags {

template <class I>
static bool write_keys(const Bags& f, const I* ids, const LookupKeys& keys, Range bags, uint64_t* keyed) {
  uint64_t bad = 0;
  // In registers: for the compiler the stores may change what `f` and `keys` point to.
  const uint64_t R = f.R, first_key = keys.first_key, skipped_key = keys.skipped_key;
  const int64_t padding_idx = f.padding_idx, frozen_row = keys.frozen_row;
  const int shift = keys.shift;
  const auto write = [&, ids](int64_t p0, int64_t p1, uint64_t number, uint64_t step)
                         __attribute__((always_inline)) {
                           for (int64_t p = p0; p < p1; ++p, number += step) {
                             const int64_t id = ids[p];
                             bad |= uint64_t(id) >= R;
                             const bool skip = id == padding_idx || id == frozen_row;
                             keyed[p] = (skip ? skipped_key : first_key + id) << shift | number;
                           }
                         };
  const int64_t p0 = f.begin(bags.begin), p1 = f.begin(bags.end);
  if (keys.one_each || f.L == 1)
    write(p0, p1, keys.first_grad + p0, 1);
  else
    for (int64_t b = bags.begin; b < bags.end; ++b) write(f.begin(b), f.begin(b + 1), keys.first_grad + b, 0);
  return !bad;
}

}  // namespace bags

bool embedding_keys(const Bags& f, const LookupKeys& keys, Range range, uint64_t* keyed) {
  return with_ids(f, [&](const auto* ids) { return bags::write_keys(f, ids, keys, range, keyed); });
}

}  // namespace RK_ISA
}  // namespace rk
